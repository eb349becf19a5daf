"""The training and evaluation loops, run by the program on small data with tiny networks."""

import json
import math
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, optim

import main
from data.image import read_rgb, write_png
from data.sets import ImageSet
from data.srdata import SRData
from evaluation import Evaluation, table
from loss import Loss
from metric import METRICS
from report import picture as pictures
from system.background import WorkerPool
from system.stopping import Stop, Stopped
from tests.conftest import ROOT, picture
from tests.test_checkpoint import strict
from trainer import Trainer

TINY = (
    '--cpu --n_threads 0 --data_train SR291 --data_test Set5 --scale 2 --patch_size 16 --batch_size 4 --test_every 2 '
    '--epochs 1'
)
LCOAN = f'{TINY} --model LCoAN --n_resgroups 2 --n_resblocks 1 --n_feats 8 --n_clusters 4 --window_size 16'
EDSR = f'{TINY} --model EDSR --n_resblocks 1 --n_feats 8'
NLSN = f'{TINY} --model NLSN --n_resblocks 2 --n_feats 16 --chunk_size 16'
SWINIR = f'{TINY} --model SwinIR-light --n_resgroups 1 --n_resblocks 2 --n_feats 12 --n_heads 2 --drop_path 0.5'
NETWORKS = pytest.mark.parametrize('network', [EDSR, LCOAN], ids=['EDSR', 'LCoAN'])


def arguments(data: Path, *options: str) -> list[str]:
    """A command line on the data folder, with its runs beside it."""
    folders = ['--dir_data', str(data), '--save_dir', str(data.parent / 'runs')]
    return [*folders, *' '.join(options).split()]


def train(data: Path, *options: str, name: str = 'run') -> Path:
    """Run the program; returns the run folder."""
    line = ' '.join(options)
    own = [] if '--load' in line else ['--save', name]
    assert main.main([*arguments(data, *options), *own]) == 0
    if '--load' in line and '--test_only' in line and '--save' not in line:
        name = f'{name}_test'
    return data.parent / 'runs' / name


def weights(run: Path, which: str = 'latest') -> dict[str, Tensor]:
    return torch.load(run / 'model' / f'model_{which}.pt', weights_only=True)


def state(run: Path) -> dict:
    return torch.load(run / 'state.pt', weights_only=True)


def metrics(run: Path) -> list[dict]:
    return [strict(line) for line in (run / 'metrics.jsonl').read_text().splitlines()]


def learned(run: Path) -> list[dict]:
    """The log of a run without what depends on the clock."""
    clock = ('seconds', 'images_per_second', 'wait')
    records = [{key: value for key, value in record.items() if key not in clock} for record in metrics(run)]
    for record in records:
        record['test'] = {name: scores['psnr'] for name, scores in record['test'].items()}
    return records


def equal(a: object, b: object) -> bool:
    """Bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    """Drawing them takes five times as long as the training."""
    monkeypatch.setattr(pictures, 'curves', lambda records: {})


@NETWORKS
@pytest.mark.parametrize(
    'optimizer', ['SGD --lr 1e-6', 'ADAM', 'ADAMW', 'RMSprop', 'MUON', 'ADAM --weight_ema 0.9 --warmup 5']
)
def test_a_continued_run_equals_an_unbroken_one(data_folder, network, optimizer):
    more = f'--optimizer {optimizer} --decay 2 --weight_decay 0.01'
    whole = train(data_folder, network, more, '--epochs 3', name='whole')
    train(data_folder, network, more, name='parts')
    parts = train(data_folder, '--load parts --epochs 2', name='parts')
    parts = train(data_folder, '--load parts --epochs 3', name='parts')
    assert learned(parts) == learned(whole)
    assert len(learned(whole)) == 3
    for key in ('model', 'average', 'optimizer', 'epoch', 'step', 'samples'):
        assert equal(state(parts)[key], state(whole)[key]), key
    assert equal(weights(parts, 'best'), weights(whole, 'best'))
    assert not equal(weights(train(data_folder, network, more, name='once')), weights(whole))


def test_nothing_is_left_to_do(data_folder, capsys):
    run = train(data_folder, EDSR)
    before = state(run)
    train(data_folder, '--load run')
    assert equal(state(run), before)
    assert 'All 1 epochs are done' in capsys.readouterr().out


def test_resume_goes_back_to_an_epoch(data_folder):
    """With a rate too small to change a weight, what is saved next is what was read."""
    run = train(data_folder, EDSR, '--epochs 3 --save_models --decay 1-2 --gamma 0.1 --lr 0.01')
    before = metrics(run)
    train(data_folder, '--load run --resume 1 --epochs 2 --lr 1e-25')
    after = metrics(run)
    assert [record['epoch'] for record in after] == [1, 2]
    assert after[0] == before[0]
    assert after[1]['lr'] == pytest.approx(1e-26)
    assert after[1]['samples'] == before[1]['samples']
    assert equal(weights(run), weights(run, '1'))
    assert equal(weights(run, '2'), weights(run, '1'))
    assert not equal(weights(run, '3'), weights(run, '1'))


def measure_psnr_as(monkeypatch, measure) -> None:
    """Put `measure` in the place of the function of PSNR."""
    monkeypatch.setattr('metric.METRICS', (replace(METRICS[0], measure=measure), *METRICS[1:]))


def train_with_scores(data_folder: Path, monkeypatch, *scores: float) -> Path:
    """A run of as many epochs, each of which is kept, that are scored so on one image."""
    given = iter(scores)
    measure_psnr_as(monkeypatch, lambda *_: next(given))
    for path in sorted((data_folder / 'benchmark' / 'Set5' / 'HR').iterdir())[1:]:
        path.unlink()
    run = train(data_folder, EDSR, f'--epochs {len(scores)} --save_models --lr 0.01')
    measure_psnr_as(monkeypatch, lambda *_: 10.0)
    return run


def test_resume_at_an_epoch_takes_back_the_best(data_folder, monkeypatch):
    run = train_with_scores(data_folder, monkeypatch, 20.0, 30.0, 40.0)
    assert equal(weights(run, 'best'), weights(run, '3'))
    train(data_folder, '--load run --resume 2 --epochs 3')
    assert equal(weights(run, 'best'), weights(run, '2'))


def test_resume_keeps_the_best_that_it_does_not_leave(data_folder, monkeypatch):
    """Also where the weights of that epoch were not kept under its number."""
    run = train_with_scores(data_folder, monkeypatch, 20.0, 40.0, 30.0)
    best = weights(run, 'best')
    assert equal(best, weights(run, '2'))
    (run / 'model' / 'model_2.pt').unlink()
    train(data_folder, '--load run --resume 3 --epochs 4')
    assert equal(weights(run, 'best'), best)


@pytest.mark.parametrize('epoch', [-1, 0])
def test_resume_of_the_latest(data_folder, epoch):
    run = train(data_folder, EDSR, '--epochs 2')
    train(data_folder, f'--load run --resume {epoch} --epochs 3')
    assert [record['epoch'] for record in metrics(run)] == [1, 2, 3]


def test_what_is_typed_wins_over_the_saved_optimiser(data_folder):
    run = train(data_folder, EDSR, '--betas 0.9 0.99')
    train(data_folder, '--load run --epochs 2 --betas 0.5 0.6 --weight_decay 0.25')
    (group,) = state(run)['optimizer']['param_groups']
    assert (tuple(group['betas']), group['weight_decay']) == ((0.5, 0.6), 0.25)


def test_reset_starts_over_and_spares_what_it_did_not_write(data_folder):
    run = train(data_folder, EDSR, '--epochs 2 --save_models --save_results')
    first = learned(run)
    for name in ('notes.txt', 'model/mine.pt', 'results-Set5/mine.txt'):
        (run / name).write_text('mine')
    train(data_folder, EDSR, '--reset')
    assert learned(run) == first[:1]
    assert not (run / 'model' / 'model_1.pt').exists()
    assert not (run / 'results-Set5' / '0001_x2_SR.png').exists()
    for name in ('notes.txt', 'model/mine.pt', 'results-Set5/mine.txt'):
        assert (run / name).read_text() == 'mine'


@NETWORKS
def test_a_run_repeats_and_the_seed_changes_it(data_folder, network):
    runs = [train(data_folder, network, f'--seed {seed}', name=f'{i}') for i, seed in enumerate([1, 1, 2])]
    assert equal(weights(runs[0]), weights(runs[1]))
    assert learned(runs[0]) == learned(runs[1])
    assert learned(runs[0])[0]['loss'] != learned(runs[2])[0]['loss']


@NETWORKS
def test_workers_do_not_change_a_run(data_folder, network):
    one, none = (train(data_folder, network, f'--n_threads {n}', name=str(n)) for n in (1, 0))
    assert equal(state(one)['model'], state(none)['model'])
    assert learned(one) == learned(none)


def test_decoded_copies_do_not_change_a_run(data_folder):
    kinds = ('img', 'sep', 'sep', 'sep_reset')
    runs = [train(data_folder, EDSR, f'--ext {kind}', name=str(i)) for i, kind in enumerate(kinds)]
    assert all(equal(weights(run), weights(runs[0])) for run in runs)
    assert list((data_folder / 'SR291' / 'bin' / 'HR').glob('*.npy'))


@pytest.mark.parametrize('parts', [2, 3, 4])
def test_parts_of_a_batch_add_up_to_it(data_folder, parts):
    base = f'{EDSR} --optimizer SGD --lr 1e-4 --loss 1*L1+0.01*MSE'
    whole = train(data_folder, base, name='whole')
    split = train(data_folder, base, f'--split_batch {parts}', name='split')
    start = train(data_folder, base, '--lr 1e-25', name='start')
    change = {key: value - weights(start)[key] for key, value in weights(whole).items()}
    for key, value in weights(split).items():
        torch.testing.assert_close(value - weights(start)[key], change[key], rtol=1e-3, atol=1e-6)
    assert max(value.abs().max() for value in change.values()) > 1e-3
    assert metrics(split)[0]['loss'] == pytest.approx(metrics(whole)[0]['loss'], rel=1e-5)


def test_gradients_are_clipped(data_folder):
    """A step of plain gradient descent at rate 1 moves a weight by its gradient."""
    base = f'{EDSR} --optimizer SGD --momentum 0 --test_every 1'
    start = weights(train(data_folder, base, '--lr 1e-25', name='start'))
    moved = {}
    for clip in (0, 1e-3):
        end = weights(train(data_folder, base, f'--lr 1 --gclip {clip}', name=f'clip{clip}'))
        moved[clip] = torch.cat([(end[key] - start[key]).flatten() for key in end])
    assert moved[0].abs().max() > 0.1
    expected = moved[0].clamp(-1e-3, 1e-3)
    torch.testing.assert_close(moved[1e-3], expected, rtol=0, atol=1e-6)


def test_learning_rate_is_that_of_pytorch(data_folder):
    run = train(data_folder, EDSR, '--epochs 4 --lr 0.02 --decay 1-3 --gamma 0.3 --test_every 1')
    schedule = optim.lr_scheduler.MultiStepLR(optim.SGD([torch.ones(1)], 0.02), [1, 3], 0.3)
    for record in metrics(run):
        assert record['lr'] == pytest.approx(schedule.get_last_lr()[0], rel=1e-12)
        schedule.optimizer.step()
        schedule.step()


def test_warm_up_counts_steps(data_folder):
    run = train(data_folder, EDSR, '--epochs 4 --lr 0.01 --warmup 5 --decay 3')
    assert [record['lr'] for record in metrics(run)] == pytest.approx([0.004, 0.008, 0.01, 0.005])
    assert [record['step'] for record in metrics(run)] == [2, 4, 6, 8]


def test_average_of_the_weights_is_what_is_kept_and_tested(data_folder):
    base = f'{EDSR} --optimizer SGD --lr 1e-3 --test_every 1 --weight_ema 0.75'
    expected = weights(train(data_folder, base, '--lr 1e-25', name='start'))
    train(data_folder, base)
    for epochs in (1, 2, 3):
        run = train(data_folder, f'--load run --epochs {epochs}')
        now = state(run)['model']
        expected = {key: 0.75 * value + 0.25 * now[key] for key, value in expected.items()}
        for key, value in weights(run).items():
            torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-6)
    assert max((weights(run)[key] - value).abs().max() for key, value in now.items()) > 1e-3
    trained = metrics(run)[-1]['test']['Set5']['psnr']
    train(data_folder, '--load run --test_only')
    assert json.loads((run / 'results.json').read_text())['sets']['Set5']['psnr'] == trained


def test_what_a_network_draws_depends_on_the_step_alone(data_folder, monkeypatch):
    drawn = []

    def noted(self, *parts: Tensor) -> Tensor:
        drawn.append(torch.rand(()).item())
        return torch.ones(len(self.names))

    monkeypatch.setattr('step.TrainStep.train_on', noted)
    train(data_folder, EDSR, '--epochs 2', name='whole')
    whole = drawn.copy()
    drawn.clear()
    train(data_folder, EDSR, name='parts')
    torch.rand(3)
    train(data_folder, '--load parts --epochs 2', name='parts')
    assert drawn == whole
    assert len(set(drawn)) == 4
    drawn.clear()
    train(data_folder, EDSR, '--seed 2', name='other')
    assert not set(drawn) & set(whole)


def test_an_epoch_has_test_every_steps(data_folder):
    run = train(data_folder, EDSR, '--test_every 3 --batch_size 2 --epochs 2')
    assert [record['samples'] for record in metrics(run)] == [6, 12]
    steps = [entry['step'].item() for entry in state(run)['optimizer']['state'].values()]
    assert set(steps) == {6}


def test_log_names_each_term_and_the_total(data_folder):
    run = train(data_folder, EDSR, '--loss 2*L1+0.5*MSE --print_every 1')
    (record,) = metrics(run)
    assert list(record['loss']) == ['L1', 'MSE', 'total']
    assert record['loss']['total'] == pytest.approx(record['loss']['L1'] + record['loss']['MSE'])
    assert min(record['loss'].values()) > 0
    lines = re.findall(r'Epoch 1, batch (\d)/2: L1 [\d.]+, MSE [\d.]+, lr 0.0001, .* images/s, .*%', log(run))
    assert lines == ['1', '2']


@pytest.mark.parametrize('every, expected', [(1, ['1', '2', '3', '4']), (2, ['2', '4']), (3, ['3']), (5, [])])
def test_print_every(data_folder, every, expected):
    run = train(data_folder, EDSR, f'--test_every 4 --print_every {every}')
    assert re.findall(r'batch (\d)/4', log(run)) == expected


def test_weights_of_every_epoch_and_the_best(data_folder, monkeypatch):
    """The best epoch is the one with the highest PSNR on the first test set."""
    scores = {'Set5': iter([30.0, 31.0, 29.0]), 'SR291': iter([20.0, 10.0, 40.0])}

    def rigged(images: SRData, *_: object) -> dict:
        return {'psnr': next(scores[images.name]), 'seconds': 1.0, 'images': {}}

    monkeypatch.setattr(Evaluation, '_set', lambda self, *options: rigged(*options))
    run = train(data_folder, EDSR, '--epochs 3 --save_models --data_test Set5+SR291')
    assert sorted(path.stem for path in (run / 'model').iterdir()) == [
        'model_1', 'model_2', 'model_3', 'model_best', 'model_latest'
    ]  # fmt: skip
    assert equal(weights(run, 'best'), weights(run, '2'))
    assert equal(weights(run, 'latest'), weights(run, '3'))
    assert not equal(weights(run, '2'), weights(run, '3'))
    assert [record['test']['SR291']['psnr'] for record in metrics(run)] == [20, 10, 40]


def test_scores_of_other_protocols_are_not_compared(data_folder, monkeypatch):
    scores = iter([40.0, 30.0, 20.0, 25.0, 24.0, 39.0])
    monkeypatch.setattr(Evaluation, '_set', lambda *_: {'psnr': next(scores), 'seconds': 1.0, 'images': {}})
    said = 'scored in another way'
    assert said not in log(train(data_folder, EDSR, '--epochs 2 --save_models'))
    run = train(data_folder, '--load run --epochs 4 --shave 3')
    assert log(run).count(said) == 1
    assert equal(weights(run, 'best'), weights(run, '4'))
    train(data_folder, '--load run --epochs 5')
    assert equal(weights(run, 'best'), weights(run, '4'))
    train(data_folder, '--load run --epochs 6 --shave 2')  # as at first, whose weights are no longer the best there
    assert equal(weights(run, 'best'), weights(run, '6'))
    assert [record['protocol']['shave'] for record in metrics(run)] == [2, 2, 3, 3, 3, 2]
    assert log(run).count(said) == 2


def test_what_is_saved_only_when_wanted(data_folder):
    plain = train(data_folder, EDSR, name='plain')
    assert not [*plain.glob('results-*'), *plain.glob('comparison-*')]
    assert sorted(path.stem for path in (plain / 'model').iterdir()) == ['model_best', 'model_latest']
    assert 'ssim' not in json.loads((plain / 'results.json').read_text())['sets']['Set5']
    full = train(data_folder, EDSR, '--save_results --save_gt --ssim', name='full')
    results = json.loads((full / 'results.json').read_text())['sets']['Set5']
    assert 0 < results['ssim'] < 1
    assert metrics(full)[0]['test']['Set5']['ssim'] == results['ssim']
    images = full / 'results-Set5'
    names = [f'{name}_x2_{kind}.png' for name in ('0001', '0002') for kind in ('HR', 'LR', 'SR')]
    assert sorted(path.name for path in images.iterdir()) == names
    hr = read_rgb(data_folder / 'benchmark' / 'Set5' / 'HR' / '0002.png')
    lr = read_rgb(data_folder / 'benchmark' / 'Set5' / 'LR_bicubic' / 'X2' / '0002x2.png')
    height, width = (2 * (n // 2) for n in hr.shape[:2])
    assert (read_rgb(images / '0002_x2_HR.png') == hr[:height, :width]).all()
    assert (read_rgb(images / '0002_x2_LR.png') == lr).all()
    assert read_rgb(images / '0002_x2_SR.png').shape == (height, width, 3)
    assert read_rgb(full / 'comparison-Set5.png').size


@pytest.mark.parametrize('setting', ['--n_colors 1', '--shift_mean False', '--dilation', '--act gelu', '--rgb_range 2'])
@NETWORKS
def test_settings_build_train_and_test(data_folder, network, setting):
    run = train(data_folder, network, setting)
    plain = train(data_folder, network, name='plain')
    assert metrics(run)[0]['loss'] != metrics(plain)[0]['loss']
    assert main.main([*arguments(data_folder, '--load run --test_only')]) == 0


def test_a_loss_that_is_not_finite_ends_the_run(data_folder, capsys):
    run = train(data_folder, EDSR, '--epochs 2')
    before, record = state(run), metrics(run)
    capsys.readouterr()
    assert main.main(arguments(data_folder, '--load run --epochs 3 --lr 1e30 --test_every 12')) == 2
    message = capsys.readouterr().err
    assert re.fullmatch(r'Error: The loss is (nan|inf) in epoch 3, on patches of .*\n', message)
    assert set(re.findall(r'SR291/000\d', message)) <= {'SR291/0001', 'SR291/0002', 'SR291/0003'} != set()
    assert 'the 10th time in a row; epoch 2 is kept' in message
    assert equal(state(run), before)
    assert metrics(run) == record
    train(data_folder, '--load run --epochs 3 --lr 1e-4')
    assert len(metrics(run)) == 3


def test_a_run_that_diverges_keeps_a_state_from_before(data_folder, capsys):
    """What its first steps at such a rate made is finite and useless: the state that it started from is there."""
    run = train(data_folder, EDSR, '--epochs 2')
    before = state(run)
    assert main.main(arguments(data_folder, '--load run --epochs 9 --lr 1e20 --test_every 30 --save_every 1')) == 2
    assert 'epoch 2 is kept: --load run continues it' in capsys.readouterr().err
    assert equal(state(run)['model'], before['model'])
    train(data_folder, '--load run --epochs 3 --test_every 2 --lr 1e-4 --save_every 0')
    assert metrics(run)[-1]['loss']['total'] < 1.5 * metrics(run)[0]['loss']['total']


def test_a_run_whose_tests_are_not_finite_keeps_a_state_from_before(data_folder, capsys):
    """Its epochs are too short for ten losses in a row that are not finite."""
    run = train(data_folder, EDSR)
    before = state(run)
    assert main.main(arguments(data_folder, '--load run --epochs 9 --lr 1e20 --test_every 6 --save_every 1')) == 2
    said = 'the weights of epoch 2 give is not finite; epoch 1 is kept: --load run continues it, with a lower --lr'
    assert said in capsys.readouterr().err
    assert equal(state(run)['model'], before['model'])


def test_a_loaded_state_that_leads_to_nothing_gives_way_to_the_one_before(data_folder, capsys):
    """As after a kill right after a step at such a rate had been saved."""
    run = train(data_folder, EDSR)
    before = state(run)
    (run / 'state.pt').rename(run / 'state_before.pt')
    far = before | {'model': {key: 1e30 * value for key, value in before['model'].items()}}
    torch.save(far, run / 'state.pt')
    assert main.main(arguments(data_folder, '--load run --epochs 2')) == 2
    assert 'the state before it is kept: --load run continues it' in capsys.readouterr().err
    assert equal(state(run)['model'], before['model'])


@pytest.mark.parametrize('broken', [{'partial': {}}, {'optimizer': None}, {'epoch': 'one'}])
def test_a_state_of_another_form_is_not_continued(data_folder, capsys, broken):
    run = train(data_folder, EDSR)
    torch.save(state(run) | broken, run / 'state.pt')
    assert main.main(arguments(data_folder, '--load run --epochs 2')) == 2
    assert f'The state in {run} is not one that can be continued' in capsys.readouterr().err


def test_a_run_that_diverges_at_once_keeps_no_state(data_folder, capsys):
    assert main.main(arguments(data_folder, EDSR, '--lr 1e30 --test_every 30 --save_every 1 --save run')) == 2
    assert 'start again with a lower --lr' in capsys.readouterr().err
    train(data_folder, EDSR)  # nothing is in the way


@pytest.mark.parametrize('name', ['state.pt', 'state_before.pt'])
def test_a_state_whose_weights_are_not_finite_is_not_continued_from(data_folder, capsys, name):
    run = train(data_folder, EDSR, '--epochs 2')
    broken = state(run)
    next(iter(broken['model'].values())).view(-1)[0] = math.nan
    torch.save(broken, run / name)
    if name == 'state_before.pt':
        (run / 'state.pt').unlink()
        assert main.main(arguments(data_folder, '--load run --epochs 3')) == 2
        assert 'state_before.pt holds weights that are not finite' in capsys.readouterr().err
    else:
        train(data_folder, '--load run --epochs 3')
        assert 'state.pt holds weights that are not finite' in capsys.readouterr().out
        assert len(metrics(run)) == 3


def test_weights_that_are_not_finite_are_not_kept(data_folder, capsys):
    """The last step of an epoch may break them after a loss that was still finite."""
    run = train(data_folder, EDSR)
    before = state(run)
    capsys.readouterr()
    command = '--load run --epochs 2 --test_every 1 --lr 1e30 --epsilon 1e-30 --betas 0 0 --weight_decay 1e30'
    assert main.main(arguments(data_folder, command)) == 2
    assert 'The weights are no longer finite after epoch 2; epoch 1 is kept' in capsys.readouterr().err
    assert equal(state(run), before)


def test_a_loss_that_is_not_finite_at_once(data_folder, capsys):
    assert main.main(arguments(data_folder, EDSR, '--lr 1e30 --test_every 12 --save run')) == 2
    assert 'start again with a lower --lr' in capsys.readouterr().err
    train(data_folder, EDSR)  # nothing is in the way


def test_batches_of_too_great_a_loss_are_skipped(data_folder):
    run = train(data_folder, EDSR)
    before = weights(run)
    train(data_folder, '--load run --epochs 3 --skip_threshold 1e-9')  # of the last epoch that learned anything
    assert equal(weights(run), before)
    skipped = re.findall(
        r'Batch skipped for its loss of [\d.]+: patches of (SR291/000\d(?:, SR291/000\d)*)\.', log(run)
    )
    assert len(skipped) == 4
    train(data_folder, '--load run --epochs 4 --skip_threshold 100')
    assert not equal(weights(run), before)
    records = metrics(run)
    assert [record['skipped'] for record in records] == [0, 2, 2, 0]
    assert records[1]['loss'] == {'L1': None, 'total': None}
    assert records[3]['loss']['total'] > 0


def test_a_skipped_batch_is_named_by_its_images(data_folder):
    """Black is the output of a new network without the mean colour: the brighter an image, the greater its loss."""
    for i, brightness in enumerate([100, 101, 200, 102]):
        write_png(data_folder / 'Grey' / 'HR' / f'{i}.png', np.full((40, 40, 3), brightness, np.uint8))
    train(data_folder, EDSR, '--data_train Grey --batch_size 1 --test_every 4 --lr 1e-25 --shift_mean False')
    run = train(data_folder, '--load run --epochs 2 --skip_threshold 1.2')
    assert re.findall(r'Batch skipped .*: patches of (.*)\.\n', log(run)) == ['Grey/2']
    assert [record['skipped'] for record in metrics(run)] == [0, 1]


def test_an_error_in_a_loading_process_is_one_sentence(data_folder, capsys):
    train(data_folder, EDSR, name='first')  # makes LR
    path = data_folder / 'SR291' / 'HR' / '0002.png'
    path.write_bytes(path.read_bytes()[:-300])
    capsys.readouterr()
    assert main.main(arguments(data_folder, EDSR, '--ext img --n_threads 1 --save second')) == 2
    message = capsys.readouterr().err
    assert message.startswith(f'Error: {path} cannot be read')
    assert message.count('\n') == 1


def test_a_failed_continuation_changes_nothing(data_folder, capsys):
    run = train(data_folder, EDSR, '--epochs 3 --save_models')
    before = {path: path.read_bytes() for path in run.rglob('*') if path.is_file() and path.name != 'log.txt'}
    for options in ('--epochs 5 --lr 1e30 --test_every 12', '--resume 1 --epochs 3 --lr 1e30 --test_every 12'):
        capsys.readouterr()
        assert main.main(arguments(data_folder, f'--load run {options}')) == 2
        assert 'epoch 3 is kept' in capsys.readouterr().err
    train(data_folder, '--load run --epochs 1')
    train(data_folder, '--load run --resume 1 --epochs 1')
    assert {path: path.read_bytes() for path in before} == before


def test_one_batch_whose_loss_is_not_finite_is_skipped(data_folder, monkeypatch):
    losses = iter([math.nan, None, None, math.inf] + 20 * [None])
    step = Loss.forward

    def spoiled(self, sr: Tensor, hr: Tensor, **more: Tensor) -> dict[str, Tensor]:
        bad = next(losses)
        return {name: value if bad is None else value * bad for name, value in step(self, sr, hr, **more).items()}

    monkeypatch.setattr('loss.Loss.forward', spoiled)
    run = train(data_folder, EDSR, '--test_every 6')
    assert [(record['skipped'], record['step']) for record in metrics(run)] == [(2, 6)]
    assert math.isfinite(metrics(run)[0]['loss']['total'])
    assert len(re.findall(r'Batch skipped for its loss of (?:nan|inf): patches of', log(run))) == 2


def moved(run: Path, start: Path) -> Tensor:
    """What plain gradient descent at rate 1 changed: the gradient."""
    one, other = weights(run), weights(start)
    return torch.cat([(one[key] - other[key]).flatten() for key in one if one[key].is_floating_point()])


def test_gradients_are_scaled_down_together(data_folder):
    base = f'{EDSR} --optimizer SGD --momentum 0 --test_every 1'
    start = train(data_folder, base, '--lr 1e-25', name='start')
    free, bound, loose = (
        moved(train(data_folder, base, f'--lr 1 --clip_norm {norm}', name=f'norm{norm}'), start)
        for norm in (0, 0.5, 1e9)
    )
    assert free.norm() > 1
    torch.testing.assert_close(bound, free * 0.5 / free.norm(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(loose, free, rtol=0, atol=0)


@pytest.mark.parametrize('network, option', [
    *[(network, option) for network in (EDSR, LCOAN) for option in ('--channels_last', '--checkpointing')],
    (EDSR, '--amp bf16'), (EDSR, '--amp fp16'),
], ids=lambda text: ' '.join(text.split()[-2:]))  # fmt: skip
def test_ways_to_compute_a_run(data_folder, network, option):
    """Recomputed activations change nothing; another type or order of summation changes digits."""
    more = f'--optimizer SGD --lr {1e-4 if network == EDSR else 0.1} --momentum 0'
    plain = train(data_folder, network, more, name='plain')
    run = train(data_folder, network, more, option, name='run')
    near = 0.05 if 'amp' in option else 1e-4
    start = train(data_folder, network, more, '--lr 1e-25', name='start')
    difference, change = moved(run, plain), moved(plain, start)
    assert difference.norm() <= near * change.norm()
    assert (difference.norm() == 0) == (option == '--checkpointing')
    assert not [
        key for key, value in weights(run).items() if value.is_floating_point() and value.dtype != torch.float32
    ]
    again = train(data_folder, '--load run --epochs 2', name='run')
    assert len(metrics(again)) == 2


def test_compiled(data_folder, monkeypatch):
    """The graph that PyTorch records computes what the network does, and the weights keep their names."""
    compiled = []

    def record(net: torch.nn.Module) -> torch.nn.Module:
        compiled.append(net)
        return compile_(net, backend='eager')

    compile_ = torch.compile
    monkeypatch.setattr(torch, 'compile', record)
    run = train(data_folder, EDSR, '--compile')
    (net,) = compiled
    plain = train(data_folder, EDSR, name='plain')
    for key, value in weights(run).items():
        torch.testing.assert_close(value, weights(plain)[key], rtol=1e-4, atol=1e-5)
    assert weights(run).keys() == weights(plain).keys() == net.state_dict().keys()
    train(data_folder, '--load run --epochs 2')
    assert len(compiled) == 2


def test_what_changes_in_a_continued_run_is_logged(data_folder):
    train(data_folder, EDSR, '--lr 0.001')
    run = train(data_folder, '--load run --epochs 2 --lr 1e-4 --batch_size 3')
    assert re.findall(r'Changed: (.*)', log(run)) == ['batch_size 4 -> 3', 'epochs 1 -> 2', 'lr 0.001 -> 0.0001']
    train(data_folder, '--load run')
    assert len(re.findall(r'Changed: (.*)', log(run))) == 3


def test_a_network_that_does_not_stand_float16_says_so(data_folder):
    run = train(data_folder, EDSR, '--amp fp16')
    assert '--amp fp16: EDSR computes in bfloat16' in log(run)
    assert state(run)['scaler'] == {}
    assert state(train(data_folder, LCOAN, '--amp fp16', name='other'))['scaler']['scale'] > 0


def test_cosine(data_folder):
    run = train(data_folder, EDSR, '--epochs 3 --lr 0.02 --schedule cosine --lr_min 0.01')
    assert [record['lr'] for record in metrics(run)] == pytest.approx([0.02, 0.0175, 0.0125])
    run = train(data_folder, EDSR, '--epochs 3 --lr 0.02 --decay 3 --decay_unit steps', name='steps')
    assert [record['lr'] for record in metrics(run)] == pytest.approx([0.02, 0.01, 0.01])


# Stopped and continued.


def unbroken(data: Path, network: str, more: str = '') -> Path:
    return train(data, network, more, '--epochs 3 --test_every 5', name='whole')


def same_run(parts: Path, whole: Path) -> None:
    """All that the two runs learned is equal, bit for bit."""
    assert learned(parts) == learned(whole)
    for key in ('model', 'average', 'optimizer', 'epoch', 'batch', 'step', 'samples'):
        assert equal(state(parts)[key], state(whole)[key]), key
    assert equal(weights(parts, 'best'), weights(whole, 'best'))


def test_changed_options_last_when_a_run_is_stopped_again(data_folder, monkeypatch):
    train(data_folder, EDSR, '--test_every 5')
    train_on = Trainer.train
    monkeypatch.setattr(Trainer, 'train', lambda self, epochs, stop: train_on(self, epochs, After(2)))
    train(data_folder, '--load run --epochs 3 --lr 1e-5')
    monkeypatch.setattr(Trainer, 'train', train_on)
    run = train(data_folder, '--load run')
    assert [record['lr'] for record in metrics(run)] == pytest.approx([1e-4, 1e-5, 1e-5])
    assert log(run).count('Changed: lr') == 1


def test_the_best_is_taken_back_when_a_rewound_run_is_stopped(data_folder, monkeypatch):
    scores = iter([20.0, 30.0, 40.0])
    measure_psnr_as(monkeypatch, lambda *_: next(scores))
    for path in sorted((data_folder / 'benchmark' / 'Set5' / 'HR').iterdir())[1:]:
        path.unlink()
    train(data_folder, EDSR, '--epochs 3 --save_models --test_every 5')
    train_on = Trainer.train
    monkeypatch.setattr(Trainer, 'train', lambda self, epochs, stop: train_on(self, epochs, After(2)))
    train(data_folder, '--load run --resume 2 --epochs 4')
    monkeypatch.setattr(Trainer, 'train', train_on)
    measure_psnr_as(monkeypatch, lambda *_: 10.0)
    run = train(data_folder, '--load run')
    assert equal(weights(run, 'best'), weights(run, '2'))
    assert [record['test']['Set5']['psnr'] for record in metrics(run)] == [20, 30, 10, 10]


def test_another_loss_after_a_stop_in_an_evaluation(data_folder, monkeypatch):
    def stopping(self, *options: object) -> dict:
        monkeypatch.undo()
        raise Stopped

    monkeypatch.setattr(Evaluation, '__call__', stopping)
    train(data_folder, EDSR)
    run = train(data_folder, '--load run --loss 1*MSE')
    (record,) = metrics(run)
    assert record['loss'] == {'MSE': None, 'total': None}
    assert record['images_per_second'] > 0


@pytest.mark.parametrize('network', [NLSN, SWINIR], ids=['NLSN', 'SwinIR'])
def test_a_stopped_run_of_a_network_that_draws_equals_an_unbroken_one(data_folder, monkeypatch, network):
    """NLSN draws its hashes and SwinIR the blocks it leaves out."""
    whole = unbroken(data_folder, network)
    train_on = Trainer.train
    monkeypatch.setattr(Trainer, 'train', lambda self, epochs, stop: train_on(self, epochs, After(7)))
    train(data_folder, network, '--epochs 3 --test_every 5', name='parts')
    monkeypatch.setattr(Trainer, 'train', train_on)
    torch.rand(5)
    same_run(train(data_folder, '--load parts', name='parts'), whole)
    other = train(data_folder, network, '--epochs 3 --test_every 5 --seed 2', name='other')
    assert learned(other) != learned(whole)


class After:
    """A stop that asks for the end after a number of steps."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def __call__(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise Stopped


@NETWORKS
@pytest.mark.parametrize('steps', [[1], [3, 4], [5], [7, 1, 1], [14]])
def test_a_run_stopped_within_an_epoch_equals_an_unbroken_one(data_folder, monkeypatch, network, steps):
    more = '--weight_ema 0.9 --warmup 7 --decay 2 --print_every 2'
    whole = unbroken(data_folder, network, more)
    options = f'{network} {more} --epochs 3 --test_every 5'
    train_on = Trainer.train
    for i, after in enumerate(steps):
        monkeypatch.setattr(Trainer, 'train', lambda self, epochs, stop, n=after: train_on(self, epochs, After(n)))
        train(data_folder, '--load parts' if i else options, name='parts')
    monkeypatch.setattr(Trainer, 'train', train_on)
    same_run(train(data_folder, '--load parts --n_threads 1', name='parts'), whole)


def test_a_run_stopped_in_an_evaluation_repeats_it(data_folder, monkeypatch):
    whole = unbroken(data_folder, EDSR)
    evaluations = []

    def stopping(self, *options: object) -> dict:
        evaluations.append(1)
        if len(evaluations) == 2:
            raise Stopped
        return evaluate(self, *options)

    evaluate = Evaluation.__call__
    monkeypatch.setattr(Evaluation, '__call__', stopping)
    parts = train(data_folder, EDSR, '--epochs 3 --test_every 5', name='parts')
    assert (state(parts)['epoch'], state(parts)['batch']) == (1, 5)
    same_run(train(data_folder, '--load parts', name='parts'), whole)
    assert len(evaluations) == 4


def in_process(data: Path, *options: str) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / 'src' / 'main.py'), *arguments(data, *options)]
    environment = os.environ | {'PYTHONUNBUFFERED': '1', 'OMP_NUM_THREADS': '1'}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def wait_for(process: subprocess.Popen, text: str) -> None:
    for line in process.stdout:
        if text in line:
            return
    pytest.fail(f'{text!r} was not said: {process.stderr.read()}')


LONG = f'{EDSR} --test_every 400 --epochs 2 --print_every 1 --save run'


@pytest.mark.serial
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_run_in_good_order(data_folder, number):
    process = in_process(data_folder, LONG, '--n_threads 1')
    wait_for(process, 'batch 3/400')
    process.send_signal(number)
    said, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, '')
    place = re.search(rf'{number.name}: stopped, and saved in epoch 1, batch (\d+); --load run continues', said)
    assert state(data_folder.parent / 'runs' / 'run')['batch'] == int(place[1]) >= 3


def test_a_second_ctrl_c_ends_a_run_at_once(monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    with Stop() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert (stop(), stop.name) == (True, 'SIGINT')
        killed = []
        monkeypatch.setattr('os.kill', lambda *what: killed.append(what))
        signal.raise_signal(signal.SIGINT)
        assert killed == [(os.getpid(), signal.SIGINT)]
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.serial
@pytest.mark.usefixtures('one_thread')
def test_a_killed_run_equals_an_unbroken_one(data_folder):
    more = '--epochs 2 --test_every 40 --print_every 1 --weight_ema 0.9'
    whole = train(data_folder, EDSR, more, name='whole')
    train(data_folder, EDSR, more, '--epochs 1', name='parts')
    for killed in ('Epoch 2, batch 7/', 'Epoch 2, batch 22/'):
        process = in_process(data_folder, '--load parts --epochs 2 --save_every 3 --n_threads 1')
        wait_for(process, killed)
        process.kill()
        process.wait()
        assert state(data_folder.parent / 'runs' / 'parts')['batch'] % 3 == 0
    parts = train(data_folder, '--load parts --epochs 2', name='parts')
    assert len(metrics(parts)) == 2
    same_run(parts, whole)


@pytest.mark.serial
def test_a_second_run_in_one_folder_is_refused(data_folder, capsys):
    process = in_process(data_folder, LONG)
    wait_for(process, 'batch 1/400')
    assert main.main(arguments(data_folder, LONG)) == 2
    assert 'is being trained by another process' in capsys.readouterr().err
    process.kill()
    process.wait()


@pytest.mark.parametrize('error', [MemoryError(), torch.OutOfMemoryError('CUDA out of memory')])
def test_out_of_memory_is_one_sentence(data_folder, capsys, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr('model.Model.forward', fail)
    assert main.main(arguments(data_folder, EDSR)) == 2
    message = capsys.readouterr().err
    assert message.startswith('Error: Memory ran out')
    assert '--batch_size' in message


def log(run: Path) -> str:
    return (run / 'log.txt').read_text()


def three(tmp_path: Path, channels: str = 'Y') -> SRData:
    """A set of three images, one too small to be scored."""
    files = [tmp_path / f'{name}.png' for name in ('a', 'b', 'tiny')]
    for i, (path, size) in enumerate(zip(files, [(40, 30), (25, 26), (4, 9)], strict=True)):
        write_png(path, picture(i, *size))
    data = SRData(ImageSet('Some', files, [None] * 3, channels), 2)
    data.prepare()
    return data


@pytest.fixture
def pair(tmp_path) -> SRData:
    return three(tmp_path)


def test_evaluation(pair, messages):
    """One grey level off everywhere: the MSE of luma is (219/255)^2."""

    def off_by_one(images: SRData, index: int) -> tuple[np.ndarray, float]:
        hr = images.hr(index)
        return np.where(hr > 127, hr - 1, hr + 1).astype(np.uint8), 0.25

    grey = {i: np.full(pair.hr(i).shape, 50 * (i + 1), np.uint8) for i in range(3)}
    pair.hr = grey.__getitem__
    evaluation = Evaluation([pair], METRICS)
    results = evaluation(off_by_one, 'x')
    assert list(results) == ['Some']
    images = results['Some']['images']
    assert list(images) == ['a', 'b', 'tiny']
    expected = 20 * math.log10(255 * 255 / 219)
    assert images['a']['psnr'] == pytest.approx(expected)
    assert images['b']['psnr'] == pytest.approx(expected)
    assert math.isnan(images['tiny']['psnr'])
    assert results['Some']['psnr'] == pytest.approx(expected)  # of those that have one
    assert messages[-2:] == [
        f'Some: {name} is the mean of 2 of 3 images; too small for it: tiny' for name in ('PSNR', 'SSIM')
    ]
    messages.clear()
    evaluation(off_by_one, 'x')
    assert not messages  # it was said
    assert images['a']['ssim'] < 1
    assert results['Some']['seconds'] == 0.25


@pytest.mark.parametrize('channels, border', [('Y', 2), ('RGB', 8)])
def test_protocol_and_shaved_border(tmp_path, channels, border):
    """An image that is wrong only in the border that is not scored is perfect."""
    pair = three(tmp_path, channels)

    def wrong_border(width: int):
        def upscale(images: SRData, index: int) -> tuple[np.ndarray, float]:
            sr = 255 - images.hr(index)
            sr[width:-width, width:-width] = images.hr(index)[width:-width, width:-width]
            return sr, 0.0

        return upscale

    evaluation = Evaluation([pair], METRICS[:1])
    expected = {'channels': channels, 'shave': border, 'lr_made': 3, 'lr_border': 'mirror'}
    assert evaluation.protocol() == {'Some': expected}
    assert evaluation(wrong_border(border), 'x')['Some']['images']['a']['psnr'] == math.inf
    assert evaluation(wrong_border(border + 1), 'x')['Some']['images']['a']['psnr'] < 60


def test_table():
    image = {'psnr': 30.0, 'ssim': 0.9, 'seconds': 0.5}
    results = {
        'Set5': {'psnr': 30.125, 'ssim': 0.91239, 'seconds': 0.5, 'images': {'a': image, 'b': image}},
        'Manga109': {'psnr': math.inf, 'ssim': math.nan, 'seconds': 0.25, 'images': {'a': image}},
        'X': {'psnr': math.nan, 'seconds': 0.25, 'images': {'a': image}},
    }
    lines = [line.split() for line in table(results).splitlines()]
    assert lines == [
        ['Set', 'images', 'PSNR', 'SSIM', 's/image'],
        ['Set5', '2', '30.12', '0.9124', '0.500'],
        ['Manga109', '1', 'inf', '-', '0.250'],
        ['X', '1', '-', '-', '0.250'],
    ]
    assert len({len(line) for line in table(results).splitlines()}) == 1


def test_an_image_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / 'results').write_text('in the way')
    with pytest.raises(Exception, match=r'a\.png could not be written'), WorkerPool() as background:
        background.start(write_png, tmp_path / 'results' / 'a.png', picture(0, 5, 5))
