import pytest
import torch
from torch import Tensor, nn, optim

from error import UserError
from loss import TERMS, Loss, Term
from loss.adversarial import GAN, RGAN, WGANGP
from loss_language import find_whole_batches, known_terms
from options.table import build_parser
from report import picture as pictures
from tests.test_trainer import EDSR, equal, learned, metrics, state, train

SR = torch.tensor([1.0, 2.0, 3.0, 5.0]).view(1, 1, 2, 2)
HR = torch.tensor([1.0, 4.0, 2.0, 1.0]).view(1, 1, 2, 2)
L1 = (0 + 2 + 1 + 4) / 4
MSE = (0 + 4 + 1 + 16) / 4


@pytest.mark.parametrize(
    'text, expected',
    [
        ('1*L1', {'L1': L1}),
        ('L1', {'L1': L1}),
        ('MSE', {'MSE': MSE}),
        ('1*L1+0.5*MSE', {'L1': L1, 'MSE': 0.5 * MSE}),
        ('2.5*MSE + 1e-2*L1', {'MSE': 2.5 * MSE, 'L1': 0.01 * L1}),
    ],
)
def test_values_by_hand(text, expected):
    assert {name: term.item() for name, term in Loss(text)(SR, HR).items()} == pytest.approx(expected)


def test_gradient_is_that_of_the_sum():
    sr = SR.clone().requires_grad_()
    sum(Loss('2*L1+0.5*MSE')(sr, HR).values()).backward()
    expected = 2 * (SR - HR).sign() / 4 + 0.5 * 2 * (SR - HR) / 4
    torch.testing.assert_close(sr.grad, expected)


@pytest.mark.parametrize(
    'text, words',
    [
        ('1*VGG', r"unknown term '1\*VGG'"),
        ('', "unknown term ''"),
        ('1*L1+', "unknown term ''"),
        ('1*l1', r"unknown term '1\*l1'"),
        ('L1*1', r"unknown term 'L1\*1'"),
        ('0*L1', "weight '0' is not"),
        ('-1*L1', "weight '-1' is not"),
        ('nan*L1', "weight 'nan' is not"),
        ('inf*L1', "weight 'inf' is not"),
        ('*L1', "weight '' is not"),
        ('1*2*L1', r"weight '1\*2' is not"),
        ('1*L1+2*L1', 'L1 stands twice'),
    ],
)
def test_mistakes(text, words):
    with pytest.raises(UserError, match=words) as caught:
        Loss(text)
    assert f'--loss {text}' in str(caught.value)


def test_unknown_term_names_the_known():
    with pytest.raises(UserError, match='with L1, MSE, Charbonnier, FFT, Distill, VGG22, VGG54, GAN, WGAN_GP or RGAN'):
        Loss('1*SSIM')


@pytest.mark.parametrize(
    'value_range, eps', [((0.0, 1.0), 0.001), ((0.0, 255.0), 0.255), ((-1.0, 1.0), 0.002)], ids=['1', '255', '-1']
)
def test_charbonnier_follows_the_range(value_range, eps):
    (term,) = Loss('2*Charbonnier', value_range)(SR, SR).values()
    assert term.item() == pytest.approx(2 * eps)


def test_the_help_names_every_term():
    (loss,) = (action for action in build_parser()._actions if action.dest == 'loss')
    with pytest.raises(UserError) as caught:
        Loss('1*SSIM')
    named = str(caught.value).partition(' with ')[2].rstrip('.')
    assert named in loss.help


def test_terms_that_need_whole_batches_are_known_with_torch_and_without():
    text = 'L1+MSE+Charbonnier+FFT+GAN+WGAN_GP+RGAN'
    assert Loss(text, patch_size=16).whole_batches == ['GAN', 'WGAN_GP', 'RGAN']
    assert find_whole_batches(f'{text}+VGG22+VGG54') == ['GAN', 'WGAN_GP', 'RGAN']


class Watching(nn.L1Loss):
    """Notes what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = []

    def forward(self, sr: Tensor, hr: Tensor, *, lr: Tensor, step: Tensor) -> Tensor:
        self.seen.append((lr, int(step)))
        return super().forward(sr, hr)


class Counting(nn.L1Loss):
    def forward(self, sr: Tensor, hr: Tensor, *, step: Tensor) -> Tensor:
        return super().forward(sr, hr) * step


def test_a_term_is_given_what_it_asks_for(monkeypatch):
    monkeypatch.setitem(TERMS, 'Watching', Term(Watching))
    monkeypatch.setitem(TERMS, 'Counting', Term(Counting))
    loss, lr = Loss('L1+Watching+2*Counting'), torch.rand(1, 1, 1, 1, dtype=torch.bfloat16)
    found = loss(SR, HR, lr=lr, step=torch.tensor(3))
    assert {name: value.item() for name, value in found.items()} == {'L1': L1, 'Watching': L1, 'Counting': 6 * L1}
    ((seen, step),) = loss.terms['Watching'].seen
    assert (seen.dtype, step) == (torch.float32, 3)
    assert torch.equal(seen, lr.float())
    assert loss.wants('lr')
    assert not Loss('Counting').wants('lr')
    assert not Loss('L1').wants('step')


def test_a_continued_run_tells_a_term_how_many_steps_were_made(data_folder, monkeypatch):
    terms = []
    monkeypatch.setattr(pictures, 'curves', lambda records: {})
    monkeypatch.setitem(known_terms(), 'Watching', False)
    monkeypatch.setitem(TERMS, 'Watching', Term(lambda: terms.append(Watching()) or terms[-1]))
    train(data_folder, EDSR, '--loss 1*Watching --split_batch 2 --batch_size 3 --test_every 2 --rgb_range 100')
    train(data_folder, '--load run --epochs 2')
    assert [[step for _, step in term.seen] for term in terms] == [[0, 0, 1, 1], [2, 2, 3, 3]]
    first, second = (lr for lr, _ in terms[0].seen[:2])
    assert (first.shape, second.shape) == ((2, 3, 8, 8), (1, 3, 8, 8))
    assert 1 < first.max() <= 100


def test_adversarial_terms_by_their_names():
    loss = Loss('1*GAN+2*WGAN_GP+3*RGAN', patch_size=16, gan_k=2, make_optimizer=lambda p: optim.SGD(p, 0.5))
    kinds = {name: (type(term), type(term.optimizer), term.steps) for name, term in loss.terms.items()}
    assert kinds == {
        'GAN': (GAN, optim.SGD, 2), 'WGAN_GP': (WGANGP, optim.Adam, 2), 'RGAN': (RGAN, optim.SGD, 2)
    }  # fmt: skip
    (group,) = loss.terms['WGAN_GP'].optimizer.param_groups
    assert (group['lr'], group['betas'], group['eps'], group['weight_decay']) == (1e-5, (0.0, 0.9), 1e-8, 0)
    loss.scale_rates(0.25)
    assert [term.optimizer.param_groups[0]['lr'] for term in loss.terms.values()] == [0.125, 2.5e-6, 0.125]


def patches(seed: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    sr, hr = torch.rand(2, 2, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    return sr.to(dtype).requires_grad_(), hr


@pytest.mark.parametrize('text', ['L1', 'Charbonnier', 'FFT', 'GAN', 'WGAN_GP', 'RGAN'])
def test_terms_are_float32_whatever_comes_in(text):
    loss = Loss(text, patch_size=16)
    seen = []
    for module in loss.modules():
        module.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    sr, hr = patches(0, torch.bfloat16)
    with torch.autocast('cpu', torch.bfloat16):
        (term,) = loss(sr, hr).values()
    assert {output.dtype for output in seen if isinstance(output, Tensor)} == {torch.float32}
    term.backward()
    assert sr.grad.abs().max() > 0


def test_the_seed_makes_the_discriminator():
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        states.append(Loss('GAN', patch_size=16).state_dict())
    assert equal(states[0], states[1])
    assert not equal(states[0], states[2])


@pytest.fixture
def quick(monkeypatch):
    """No curves, and a discriminator that is small on the disk."""

    def small(n_colors: int, patch_size: int) -> nn.Module:
        side = patch_size // 2
        layers = nn.Conv2d(n_colors, 4, 2, 2), nn.BatchNorm2d(4, track_running_stats=False), nn.LeakyReLU(0.2)
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * side**2, 1))

    monkeypatch.setattr(pictures, 'curves', lambda records: {})
    monkeypatch.setattr('loss.Discriminator', small)


@pytest.mark.usefixtures('quick')
def test_a_term_that_is_new_starts_anew_and_one_that_is_gone_is_left_out():
    old = Loss('GAN+RGAN', patch_size=16)
    old(*patches(0))
    loss = Loss('L1+RGAN+WGAN_GP', patch_size=16)
    fresh = {key: value.clone() for key, value in loss.terms['WGAN_GP'].discriminator.state_dict().items()}
    loss.load_state_dict(old.state_dict())
    assert equal(loss.terms['RGAN'].state_dict(), old.terms['RGAN'].state_dict())
    assert equal(loss.terms['WGAN_GP'].discriminator.state_dict(), fresh)
    Loss('L1').load_state_dict(old.state_dict())
    loss.load_state_dict({})


@pytest.mark.usefixtures('quick')
def test_a_discriminator_of_another_patch_size():
    with pytest.raises(UserError, match='--patch_size'):
        Loss('GAN', patch_size=32).load_state_dict(Loss('GAN', patch_size=16).state_dict())


def test_what_is_not_trained_is_not_saved():
    assert Loss('L1+MSE+Charbonnier+FFT').state_dict() == {}


@pytest.mark.usefixtures('quick')
@pytest.mark.parametrize('kind', ['GAN --gan_k 2 --decay 1', 'WGAN_GP'])
def test_a_continued_run_equals_an_unbroken_one(data_folder, kind):
    command = f'{EDSR} --test_every 1 --loss 1*L1+0.1*{kind}'
    whole = train(data_folder, command, '--epochs 2', name='whole')
    train(data_folder, command, name='parts')
    before = state(data_folder.parent / 'runs' / 'parts')
    parts = train(data_folder, '--load parts --epochs 2', name='parts')
    for key in ('model', 'optimizer', 'loss'):
        assert equal(state(parts)[key], state(whole)[key]), key
        assert not equal(state(parts)[key], before[key]), key
    assert learned(parts) == learned(whole)
    assert list(learned(whole)[0]['loss']) == ['L1', kind.split()[0], 'discriminator', 'total']
    assert [record['skipped'] for record in learned(whole)] == [0, 0]


@pytest.mark.usefixtures('quick')
def test_a_run_may_take_on_a_discriminator_and_drop_it(data_folder):
    train(data_folder, EDSR, '--test_every 1')
    run = train(data_folder, '--load run --epochs 2 --loss 1*L1+0.1*RGAN')
    assert any(key.startswith('terms.RGAN') for key in state(run)['loss'])
    run = train(data_folder, '--load run --epochs 3 --loss 1*L1')
    assert state(run)['loss'] == {}
    assert [list(record['loss']) for record in metrics(run)] == [
        ['L1', 'total'],
        ['L1', 'RGAN', 'discriminator', 'total'],
        ['L1', 'total'],
    ]


@pytest.mark.usefixtures('quick')
def test_a_loss_below_0_is_no_reason_to_skip(data_folder, monkeypatch):
    """That of WGAN_GP falls without end; the threshold is of its size."""
    values = iter([-2.0, -1.0, -3.0])
    monkeypatch.setattr(Loss, 'forward', lambda self, sr, hr, **more: {'L1': 0 * sr.sum() + next(values)})
    train(data_folder, EDSR, '--test_every 1')
    run = train(data_folder, '--load run --epochs 3')
    assert [record['skipped'] for record in metrics(run)] == [0, 0, 0]
