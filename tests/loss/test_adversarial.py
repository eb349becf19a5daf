"""The adversarial terms with a discriminator of one weight, so that every number can be had by hand."""

import io
import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn, optim

from loss.adversarial import GAN, RGAN, WGANGP, make_wgan_optimizer
from loss.discriminator import Discriminator
from tests.test_trainer import equal

KINDS = pytest.mark.parametrize('kind', [GAN, WGANGP, RGAN])
SR = [0.5, -1.0]  # each the value of all four pixels of an image
HR = [2.0, 1.5]
RATE = 0.1
WEIGHT = 0.75


class Mean(nn.Module):
    """Logit = weight * mean of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(WEIGHT))
        self.calls: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(x.detach().clone())
        return self.weight * x.mean((1, 2, 3)).unsqueeze(1)


def flat(values: list[float]) -> Tensor:
    return torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 1, 2, 2).clone()


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def entropy(x: float) -> float:
    """-log of the probability of a logit."""
    return -math.log(sigmoid(x))


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def of_discriminator(kind: type[GAN], w: float) -> float:
    """Its loss, a function of its weight."""
    real, fake = [w * x for x in HR], [w * x for x in SR]
    if kind is WGANGP:
        # The derivative by each of the four pixels is w / 4, wherever it is taken.
        return mean(fake) - mean(real) + 10 * (math.sqrt(4 * (w / 4) ** 2) - 1) ** 2
    if kind is RGAN:
        real, fake = [x - mean(fake) for x in real], [x - mean(real) for x in fake]
    return mean([entropy(x) for x in real]) + mean([entropy(-x) for x in fake])


def of_generator(kind: type[GAN], w: float, before: float, sr: list[float]) -> float:
    """Its loss, a function of its output; `before` is the weight at the last step of the discriminator."""
    fake = [w * x for x in sr]
    if kind is WGANGP:
        return -mean(fake)
    if kind is GAN:
        return mean([entropy(x) for x in fake])
    real = [before * x for x in HR]
    return mean([entropy(x - mean(real)) for x in fake]) + mean([entropy(mean(fake) - x) for x in real])


def slope(function, x: float) -> float:
    return (function(x + 1e-5) - function(x - 1e-5)) / 2e-5


@KINDS
@pytest.mark.parametrize('steps', [1, 3])
def test_by_hand(kind, steps):
    """The steps of the discriminator, and then loss and gradient of the generator."""
    term = kind(Mean(), partial(optim.SGD, lr=RATE), steps)
    sr = flat(SR).requires_grad_()
    loss = term(sr, flat(HR))
    loss.backward()
    w, before = WEIGHT, math.nan
    for _ in range(steps):
        w, before = w - RATE * slope(partial(of_discriminator, kind), w), w
    assert term.discriminator.weight.item() == pytest.approx(w, rel=1e-5)
    assert loss.item() == pytest.approx(of_generator(kind, w, before, SR), rel=1e-5)
    for i in range(2):

        def moved(x: float, i: int = i) -> float:
            return of_generator(kind, w, before, [x if i == j else SR[j] for j in range(2)])

        torch.testing.assert_close(sr.grad[i], torch.full((1, 2, 2), slope(moved, SR[i]) / 4), rtol=1e-4, atol=1e-6)


@KINDS
def test_the_generator_is_led_to_what_looks_more_real(kind):
    term = kind(Mean(), partial(optim.SGD, lr=RATE))
    sr = flat(SR).requires_grad_()
    term(sr, flat(HR)).backward()
    with torch.no_grad():
        assert (term.discriminator(sr - sr.grad) > term.discriminator(sr)).all()


@KINDS
def test_gradients_go_only_where_they_should(kind):
    """That of the discriminator's loss not into the network, that of the generator's not into the discriminator."""
    term = kind(Mean(), partial(optim.SGD, lr=RATE))
    sr, hr = flat(SR).requires_grad_(), flat(HR)
    loss = term(sr, hr)
    assert sr.grad is None
    weight, own = term.discriminator.weight, term.discriminator.weight.grad.clone()
    loss.backward()
    assert weight.requires_grad
    assert torch.equal(weight.grad, own)
    assert sr.grad is not None
    assert hr.grad is None


@KINDS
@pytest.mark.parametrize('steps', [1, 2, 5])
def test_steps_of_the_discriminator(kind, steps):
    term = kind(Mean(), partial(optim.Adam, lr=RATE), steps)
    term(flat(SR), flat(HR))
    (state,) = term.optimizer.state.values()
    assert state['step'].item() == steps
    passes = 3 if kind is WGANGP else 2
    assert len(term.discriminator.calls) == passes * steps + 1


def test_the_penalty_is_taken_at_one_point_an_image_between_fake_and_real():
    torch.manual_seed(0)
    term = WGANGP(Mean(), make_wgan_optimizer)
    sr, hr = torch.zeros(64, 3, 2, 2), torch.ones(64, 3, 2, 2)
    hr[:, 1] = 10
    term(sr, hr)
    between = term.discriminator.calls[2]
    share = between[:, :1, :1, :1]
    torch.testing.assert_close(between, (share * hr).expand_as(between))
    assert share.unique().numel() == 64
    assert 0 <= share.min() < 0.1
    assert 0.9 < share.max() <= 1


def test_the_penalty_of_a_curved_discriminator_by_hand():
    """w |x|^2 / 2 for the logit, so the length of the derivative by x is w |x|."""

    class Square(Mean):
        def forward(self, x: Tensor) -> Tensor:
            self.calls.append(x.detach().clone())
            return self.weight * x.square().sum((1, 2, 3)).unsqueeze(1) / 2

    term = WGANGP(Square(), make_wgan_optimizer)
    penalty = term.penalty(flat(SR), flat(HR))
    penalty.backward()
    (between,) = term.discriminator.calls
    lengths = between.square().flatten(1).sum(1).sqrt()
    assert len(lengths.unique()) == 2
    assert penalty.item() == pytest.approx((10 * (WEIGHT * lengths - 1) ** 2).mean().item(), rel=1e-5)
    expected = (20 * (WEIGHT * lengths - 1) * lengths).mean().item()
    assert term.discriminator.weight.grad.item() == pytest.approx(expected, rel=1e-5)


def test_gradient_of_the_penalty_of_the_real_discriminator():
    """By its first layer, along one direction, against a difference too small to pass a kink of its ReLUs."""
    torch.manual_seed(5)
    term = WGANGP(Discriminator(3, 16).double(), make_wgan_optimizer)
    sr, hr = torch.rand(2, 2, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weight = term.discriminator.features[0][0].weight
    direction = torch.randn(weight.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def penalty(move: float) -> Tensor:
        torch.manual_seed(2)  # of the points between
        with torch.no_grad():
            weight.add_(move * direction)
        return term.penalty(sr, hr)

    (gradient,) = torch.autograd.grad(penalty(0.0), weight)
    difference = penalty(1e-9) - penalty(-2e-9)
    assert (gradient * direction).sum().item() == pytest.approx(difference.item() / 2e-9, rel=1e-3)


def test_adam_of_the_wgan():
    (group,) = make_wgan_optimizer([nn.Parameter(torch.ones(1))]).param_groups
    assert (group['lr'], group['betas'], group['eps'], group['weight_decay']) == (1e-5, (0.0, 0.9), 1e-8, 0)


@KINDS
def test_state_round_trip(kind):
    def fresh(lr: float = RATE) -> GAN:
        return kind(Mean(), partial(optim.Adam, lr=lr))

    one, other = fresh(), fresh()
    for _ in range(2):
        one(flat(SR), flat(HR))
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert equal(other.optimizer.state_dict(), one.optimizer.state_dict())
    for term in (one, other):
        torch.manual_seed(0)
        term(flat(SR), flat(HR))
    assert equal(one.state_dict(), other.state_dict())
    assert one.discriminator.weight != fresh().discriminator.weight
    typed = fresh(0.5)
    typed.load_state_dict(one.state_dict())
    assert typed.optimizer.param_groups[0]['lr'] == 0.5


def test_rates_are_multiples_of_the_first():
    term = GAN(Mean(), partial(optim.SGD, lr=0.5))
    for factor in (0.5, 0.5, 1.0):
        term.scale_rate(factor)
        assert term.optimizer.param_groups[0]['lr'] == 0.5 * factor


@KINDS
@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf, 1e38])
def test_what_is_not_finite_does_not_touch_the_discriminator(kind, value):
    term = kind(Mean(), partial(optim.Adam, lr=RATE))
    term(flat(SR), flat(HR))
    before = term.discriminator.weight.item()
    term(flat([value, 1.0]), flat([4e38 if value == 1e38 else 1.0, 1.0]))
    assert term.discriminator.weight.item() == before
    assert term(flat(SR), flat(HR)).isfinite()
    assert term.discriminator.weight.item() != before
