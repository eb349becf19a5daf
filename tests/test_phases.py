"""What a run is trained with in its course: sizes of patches, the last loss, and the output of a teacher."""

import json
import re

import pytest
import torch
from torch import Tensor, nn

import main
import option
import wiring
from error import UserError
from loss.distill import Distill
from model import Model
from report import picture as pictures
from step import TrainStep
from tests.conftest import slow
from tests.test_trainer import (
    EDSR,
    LCOAN,
    After,
    arguments,
    equal,
    learned,
    log,
    metrics,
    same_run,
    state,
    train,
    weights,
)
from trainer import Trainer

LINE = '--model EDSR --scale 2 --n_resblocks 1 --n_feats 8 --cpu'


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    monkeypatch.setattr(pictures, 'curves', lambda records: {})


def phases(options: str) -> list[tuple[int, int, int, list[str]]]:
    """Of each phase the epochs before it, side of the patches, batch and terms of the loss."""
    args = option.parse([*LINE.split(), *options.split()])
    found = wiring.make_phases(args, wiring.make_model(args))
    return [(phase.begin, phase.patch_size, phase.batch_size, list(phase.loss.terms)) for phase in found]


@pytest.mark.parametrize(
    'options, expected',
    [
        ('', [(0, 192, 16, ['L1'])]),
        (
            '--patch_schedule 32-48-64 --patch_size 128 --batch_size 32 --epochs 6',  # 32 * 128^2 pixels
            [(0, 64, 128, ['L1']), (2, 96, 57, ['L1']), (4, 128, 32, ['L1'])],
        ),
        (
            '--patch_schedule 8-16 --patch_size 16 --batch_size 3 --epochs 3',
            [(0, 16, 3, ['L1']), (2, 32, 1, ['L1'])],
        ),
        ('--patch_schedule 500 --patch_size 2 --batch_size 1', [(0, 1000, 1, ['L1'])]),
        ('--loss_final 1*MSE --epochs 5', [(0, 192, 16, ['L1']), (4, 192, 16, ['MSE'])]),
        (
            '--patch_schedule 32-64 --patch_size 128 --loss_final MSE+L1 --final_epochs 3 --epochs 4',
            [(0, 64, 64, ['L1']), (1, 64, 64, ['MSE', 'L1']), (2, 128, 16, ['MSE', 'L1'])],
        ),
    ],
)
def test_phases_by_hand(options, expected):
    assert phases(options) == expected


def test_a_loss_is_the_same_in_all_sizes():
    args = option.parse([*LINE.split(), *['--patch_schedule', '8-16-24', '--loss_final', 'MSE', '--epochs', '6']])
    first, second, third, final = (phase.loss for phase in wiring.make_phases(args, wiring.make_model(args)))
    assert first is second is third is not final


@pytest.mark.parametrize(
    'options, words',
    [
        ('--patch_schedule 8-16-24 --epochs 2', 'has 3 sizes'),
        ('--loss_final MSE --final_epochs 4 --epochs 4', 'none would be left'),
        ('--loss_final MSE --epochs 1', 'none would be left'),
        ('--loss_final 1*L3', "unknown term '1\\*L3'"),
        ('--loss_final GAN --split_batch 2', 'GAN of the loss GAN sees whole batches'),
        ('--patch_schedule 8-16 --loss 1*L1+1*GAN', 'sees patches of one size'),
        ('--patch_schedule 8-16 --loss_final GAN', 'sees patches of one size'),
        ('--patch_schedule 4-8 --loss 1*VGG54', 'needs patches'),
        ('--patch_schedule 8-0', 'not a list of sides'),
        ('--patch_schedule 8+16', 'not a list of sides'),
        ('--distill 1', 'name the weights'),
        ('--loss L1+Distill', 'name the weights'),
        ('--loss_final Distill', 'name the weights'),
        ('--teacher some.pt', 'how much its output counts'),
        ('--teacher some.pt --distill 1', 'no such file'),
        ('--distill -1', 'not a number of 0 or more'),
    ],
)
def test_mistakes(options, words):
    with pytest.raises(UserError, match=words):
        phases(options)


def test_a_small_batch_of_large_patches_is_too_small_for_its_parts(data_folder, capsys):
    line = arguments(data_folder, EDSR, '--patch_schedule 8-16 --split_batch 4 --epochs 2 --save run')
    assert main.main(line) == 2
    assert '1 HR patches of 32 pixels a step, loss L1) is too small' in capsys.readouterr().err
    assert not (data_folder.parent / 'runs' / 'run' / 'state.pt').exists()


def seen(monkeypatch) -> list[tuple[int, int, int]]:
    """Notes of each step its number, the samples of its batch and their side."""
    found, step = [], TrainStep.train_on

    def noted(self, lr: Tensor, hr: Tensor, *more: Tensor) -> Tensor:
        found.append((int(self.number), len(hr), hr.shape[-1]))
        return step(self, lr, hr, *more)

    monkeypatch.setattr(TrainStep, 'train_on', noted)
    return found


SCHEDULE = '--patch_schedule 4-8-12 --batch_size 8 --loss_final 1*MSE --epochs 3 --test_every 3 --weight_ema 0.9'


def test_sizes_and_losses_in_the_course_of_a_run(data_folder, monkeypatch):
    """8 patches of 16 pixels are 32 of 8 and 4 of 24, which is 3.6 rounded."""
    steps = seen(monkeypatch)
    run = train(data_folder, EDSR, SCHEDULE)
    expected = 3 * [(32, 8)] + 3 * [(8, 16)] + 3 * [(4, 24)]
    assert steps == [(i, *each) for i, each in enumerate(expected)]
    records = metrics(run)
    assert [record['samples'] for record in records] == [96, 120, 132]
    assert [list(record['loss']) for record in records] == [['L1', 'total'], ['L1', 'total'], ['MSE', 'total']]
    assert 'From epoch 3 on: 4 HR patches of 24 pixels a step, loss MSE' in log(run)


@pytest.mark.parametrize('steps', [[1], [7], [2, 4], *slow([3], [6], [1, 2, 4, 1])])
@pytest.mark.parametrize('network', [EDSR, *slow(LCOAN)])
@pytest.mark.parametrize('workers', [0, *slow(1)])
def test_a_run_stopped_within_and_between_phases_equals_an_unbroken_one(
    data_folder, monkeypatch, network, steps, workers
):
    options = f'{network} {SCHEDULE} --optimizer MUON --clip_norm 0.5 --gclip 0.1'
    whole = train(data_folder, options, name='whole')
    train_on = Trainer.train
    for i, after in enumerate(steps):
        monkeypatch.setattr(Trainer, 'train', lambda self, epochs, stop, n=after: train_on(self, epochs, After(n)))
        train(data_folder, '--load parts' if i else options, name='parts')
    monkeypatch.setattr(Trainer, 'train', train_on)
    same_run(train(data_folder, f'--load parts --n_threads {workers}', name='parts'), whole)


def test_going_back_to_an_epoch_goes_back_to_its_phase(data_folder, monkeypatch):
    train(data_folder, EDSR, SCHEDULE, '--save_models')
    steps = seen(monkeypatch)
    run = train(data_folder, '--load run --resume 1')
    assert steps == [*((i, 8, 16) for i in (3, 4, 5)), *((i, 4, 24) for i in (6, 7, 8))]
    assert [record['samples'] for record in metrics(run)] == [96, 120, 132]


def test_a_discriminator_goes_on_into_the_last_phase(data_folder, monkeypatch):
    """To the bit, also where the run was stopped between the two."""
    options = f'{EDSR} --loss 1*L1+0.1*GAN --loss_final 1*MSE+0.1*GAN --epochs 2 --test_every 1 --batch_size 2'
    whole = train(data_folder, options, name='whole')
    numbers = [entry['step'].item() for entry in state(whole)['loss']['terms.GAN._extra_state'].values()]
    assert set(numbers) == {2}
    train_on = Trainer.train
    monkeypatch.setattr(Trainer, 'train', lambda self, epochs, stop: train_on(self, 1, stop))
    train(data_folder, options, name='parts')
    monkeypatch.setattr(Trainer, 'train', train_on)
    parts = train(data_folder, '--load parts', name='parts')
    same_run(parts, whole)
    assert equal(state(parts)['loss'], state(whole)['loss'])


def test_the_greatest_loss_is_by_epochs_of_the_same_loss(data_folder):
    """In [0, 255] a squared difference is far greater than one of the loss before."""
    options = '--rgb_range 255 --loss_final MSE --skip_threshold 1.5 --epochs 3 --final_epochs 1'
    run = train(data_folder, EDSR, options)
    records = metrics(run)
    assert records[2]['skipped'] == 0
    assert records[2]['loss']['total'] > 10 * records[1]['loss']['total']
    assert [record['loss_weights'] for record in records] == [{'L1': 1}, {'L1': 1}, {'MSE': 1}]
    train(data_folder, '--load run --epochs 4 --loss_final 1000*MSE')
    assert metrics(run)[3]['skipped'] == 0
    assert metrics(run)[3]['loss']['total'] > 100 * records[2]['loss']['total']


def test_samples_of_another_size_are_of_the_same_image_around_the_same_place(data_folder):
    data = wiring.train_data(option.parse(arguments(data_folder, EDSR)))
    small, large = data.with_patches(8), data.with_patches(24)
    assert (data.patch_size, small[0].hr.shape, large[0].lr.shape) == (16, (3, 8, 8), (3, 12, 12))
    for number in range(20):
        one, other = small[number], large[number]
        assert torch.equal(one.flips, other.flips)
        assert small.name(number) == large.name(number)
        # The corner moves by a share of the difference in size.
        windows = other.hr.unfold(1, 8, 1).unfold(2, 8, 1).permute(1, 2, 0, 3, 4)
        assert (windows == one.hr).flatten(2).all(2).any()


# Distillation


@pytest.fixture
def teacher(data_folder):
    """Weights of another network than the one that learns from it, of range 1 instead of 255."""
    run = train(data_folder, LCOAN, '--lr 1e-3', name='teacher')
    return run / 'model' / 'model_latest.pt'


def test_distill_by_hand():
    sr, hr, lr = torch.tensor([1.0, 4.0]), torch.zeros(2), torch.tensor([2.0, 1.0])
    sr.requires_grad_()
    weight = nn.Parameter(torch.tensor(3.0))
    loss = Distill(lambda x: weight * x)(sr, hr, lr=lr)
    assert loss.item() == (5 + 1) / 2
    loss.backward()
    assert sr.grad.tolist() == [-0.5, 0.5]
    assert weight.grad is None


@pytest.mark.parametrize('rgb_range', [1.0, 255.0])
def test_the_teacher_gives_what_it_gives_by_itself(data_folder, teacher, rgb_range):
    """Between the ranges of the two, without gradients, in evaluation."""
    args = option.parse([*LINE.split(), '--teacher', str(teacher), '--distill', '0.5', '--rgb_range', str(rgb_range)])
    model = wiring.make_model(args)
    teach = wiring.make_teacher(args, model)
    alone = Model('LCoAN', 2, n_resgroups=2, n_resblocks=1, n_feats=8, n_clusters=4, window_size=16)
    alone.net.load_state_dict(torch.load(teacher, weights_only=True))
    alone.net.eval()
    images = torch.randint(0, 256, (2, 3, 9, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = alone.upscale_tensor(images / 255)
    found = teach(model.to_range(images))
    torch.testing.assert_close(found, expected * rgb_range, rtol=0, atol=1e-5 * rgb_range)
    assert not found.requires_grad


def test_a_run_with_a_teacher(data_folder, teacher):
    """Its state and weights are those of the network alone, and it continues to the bit."""
    options = f'{EDSR} --teacher {teacher} --distill 0.25 --test_every 1'
    run = train(data_folder, options, '--epochs 2', name='whole')
    plain = train(data_folder, EDSR, '--test_every 1 --epochs 2', name='plain')
    assert list(metrics(run)[0]['loss']) == ['L1', 'Distill', 'total']
    assert metrics(run)[0]['loss']['L1'] == metrics(plain)[0]['loss']['L1']
    assert metrics(run)[1]['loss']['L1'] != metrics(plain)[1]['loss']['L1']
    assert state(run)['loss'] == state(plain)['loss'] == {}
    assert weights(run).keys() == weights(plain).keys()
    train(data_folder, options, name='parts')
    parts = train(data_folder, '--load parts --epochs 2', name='parts')
    assert learned(parts) == learned(run)
    teacher.unlink()
    train(data_folder, '--load parts --test_only', name='parts')


def test_with_a_teacher_alone_a_network_learns_its_output(data_folder, teacher, monkeypatch):
    monkeypatch.setattr('torch.nn.L1Loss.forward', lambda self, sr, hr: 0 * sr.sum())
    run = train(data_folder, EDSR, f'--teacher {teacher} --distill 1 --lr 3e-3 --test_every 20 --epochs 3')
    found = [record['loss']['Distill'] for record in metrics(run)]
    assert found[2] < 0.5 * found[0]


@pytest.mark.parametrize(
    'options, words',
    [
        ('--scale 4', 'LCoAN x2 of 3 channels, and EDSR x4 has 3: give'),
        ('--n_colors 1', 'LCoAN x2 of 3 channels, and EDSR x2 has 1: give'),
    ],
)
def test_a_teacher_that_does_not_fit(data_folder, teacher, capsys, options, words):
    capsys.readouterr()
    line = arguments(data_folder, EDSR, f'--teacher {teacher} --distill 1 --save run', options)
    assert main.main(line) == 2
    assert words in capsys.readouterr().err
    assert [path.name for path in (data_folder.parent / 'runs' / 'run').iterdir()] == ['lock']


def test_what_is_no_teacher(data_folder, tmp_path, capsys):
    path = tmp_path / 'other.pt'
    torch.save({'a': torch.ones(1)}, path)
    assert main.main(arguments(data_folder, EDSR, f'--teacher {path} --distill 1 --save run')) == 2
    assert re.match(f'Error: {path}: No network known here', capsys.readouterr().err)


def test_a_teacher_is_found_again_from_elsewhere(data_folder, teacher, monkeypatch):
    monkeypatch.chdir(teacher.parent)
    run = train(data_folder, EDSR, f'--teacher {teacher.name} --distill 1 --test_every 1')
    monkeypatch.chdir(data_folder)
    train(data_folder, '--load run --epochs 2')
    assert f'teacher: {json.dumps(str(teacher))}\n' in (run / 'config.txt').read_text()
