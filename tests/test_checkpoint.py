import gc
import io
import json
import logging
import math
import os
import pickle
import re
import resource
import subprocess
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from PIL import Image
from tqdm import tqdm

import checkpoint
from checkpoint import RunFolder, finite, start_screen
from error import UserError, WriteError
from tests.conftest import ROOT


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / 'run')


def state(*psnr: float) -> dict:
    """What a run of len(psnr) epochs leaves."""
    log = [
        {'epoch': i + 1, 'loss': {'L1': 1 / (i + 1), 'total': 1 / (i + 1)}, 'test': {'Set5': {'psnr': value}}}
        for i, value in enumerate(psnr)
    ]
    weights = {'body.weight': torch.full((30, 30), float(len(psnr)))}
    counters = {'epoch': len(psnr), 'batch': 0, 'step': 2 * len(psnr), 'samples': 4 * len(psnr), 'partial': {}}
    learners = {'average': None, 'optimizer': {'state': {}}, 'scaler': {}, 'loss': {}}
    return {'model': weights, **learners, **counters, 'log': log}


def strict(text: str) -> object:
    """JSON without NaN and Infinity, which other programs refuse."""

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    return json.loads(text, parse_constant=refuse)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


@contextmanager
def full_disk(room: int = 1000) -> Iterator[None]:
    """No file can grow beyond `room` bytes: writes fail in the middle, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class Malice:
    """Unpickling this makes a folder."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple:
        return Path.mkdir, (self.proof,)


def test_finite():
    value = {'a': [1.5, math.nan, {'b': math.inf}], 'c': -math.inf, 'd': 'nan', 'e': 3}
    assert finite(value) == {'a': [1.5, None, {'b': None}], 'c': None, 'd': 'nan', 'e': 3}


def test_an_epoch_leaves_these_files(run):
    run.save_epoch(state(30.0), best=True, keep=True)
    models = ['model/model_1.pt', 'model/model_best.pt', 'model/model_latest.pt']
    others = ['loss.png', 'metrics.jsonl', *models, 'state.pt', 'test_Set5.png']
    assert sorted(files(run.folder)) == ['config.txt', *others]
    for name in models:
        weights = torch.load(run.folder / name, weights_only=True)
        assert torch.equal(weights['body.weight'], state(30.0)['model']['body.weight'])
    with Image.open(run.folder / 'loss.png') as image:
        image.load()


def test_best_and_kept_weights(run):
    for epoch, best in enumerate([True, True, False], 1):
        run.save_epoch(state(*[30.0] * epoch), best, keep=epoch == 1)
    kept = {path.stem: torch.load(path, weights_only=True)['body.weight'][0, 0] for path in run.models.iterdir()}
    assert kept == {'model_1': 1, 'model_best': 2, 'model_latest': 3}


def test_metrics_are_one_line_of_strict_json_an_epoch(run):
    run.save_epoch(state(30.5, math.inf, math.nan), best=False, keep=False)
    records = [strict(line) for line in (run.folder / 'metrics.jsonl').read_text().splitlines()]
    assert [record['epoch'] for record in records] == [1, 2, 3]
    assert [record['test']['Set5']['psnr'] for record in records] == [30.5, None, None]


def test_results_are_strict_json(run):
    run.write_results({'sets': {'Set5': {'psnr': math.inf, 'images': {'baby': {'psnr': math.nan, 'ssim': 1.0}}}}})
    text = (run.folder / 'results.json').read_text()
    assert strict(text) == {'sets': {'Set5': {'psnr': None, 'images': {'baby': {'psnr': None, 'ssim': 1.0}}}}}


def test_state_round_trip(run):
    saved, run.config = state(30.0, math.inf), 'model: "EDSR"\n'
    run.save_epoch(saved, best=False, keep=False)
    loaded = run.load_state()
    assert torch.equal(loaded.pop('model')['body.weight'], saved.pop('model')['body.weight'])
    assert loaded == saved | {'options': 'model: "EDSR"\n', 'launch': ''}
    assert run.holds_training()


def test_the_state_before_is_kept(run, caplog):
    logging.getLogger('frugalsr').propagate = True
    for epochs in (1, 2, 3):
        run.save_state(state(*[30.0] * epochs))
    assert run.load_state()['epoch'] == 3
    (run.folder / 'state.pt').unlink()  # killed between the two renames
    assert run.holds_training()
    assert run.load_state()['epoch'] == 2
    assert 'state.pt is missing: the state before it is taken' in caplog.text


@pytest.mark.parametrize('share', [0, 0.1, 0.5, 0.99])
def test_a_torn_state_falls_back_to_the_one_before(run, caplog, share):
    logging.getLogger('frugalsr').propagate = True
    for epochs in (1, 2):
        run.save_state(state(*[30.0] * epochs))
    path = run.folder / 'state.pt'
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert run.load_state()['epoch'] == 1
    assert 'damaged' in caplog.text


def test_a_torn_state_does_not_replace_the_one_before(run):
    for epochs in (1, 2):
        run.save_state(state(*[30.0] * epochs))
    path = run.folder / 'state.pt'
    path.write_bytes(path.read_bytes()[:-100])
    run.save_state(state(30.0, 31.0, 32.0))
    assert torch.load(run.folder / 'state_before.pt', weights_only=True)['epoch'] == 1
    assert run.load_state()['epoch'] == 3


def test_a_restarted_launch_knows_its_own_state(run, monkeypatch):
    assert not run.saved_by_this_launch()
    for name, later in (('one', True), ('two', False)):
        monkeypatch.setenv('TORCHELASTIC_RUN_ID', 'one')
        run.save_state(state(30.0))
        monkeypatch.setenv('TORCHELASTIC_RUN_ID', name)
        assert run.saved_by_this_launch() == later


def test_a_launch_without_a_name_is_known_by_its_parent(run, monkeypatch):
    """torchrun without a rendezvous calls every launch "none"."""
    monkeypatch.setenv('TORCHELASTIC_RUN_ID', 'none')
    run.save_state(state(30.0))
    assert run.saved_by_this_launch()
    parent = os.getppid()
    monkeypatch.setattr(os, 'getppid', lambda: parent + 1)
    assert not run.saved_by_this_launch()


def test_what_is_remembered_of_an_error_is_its_words(monkeypatch):
    """Not the images that it met, for as long as the program runs."""
    monkeypatch.setattr(checkpoint.log, 'handlers', [remembered := checkpoint.Remembered()])

    class Image:
        pass

    def fail() -> weakref.ref:
        image = Image()
        try:
            raise ValueError('odd')
        except ValueError:
            checkpoint.log.exception('An image:')
        return weakref.ref(image)

    found = fail()
    gc.collect()
    assert found() is None
    assert 'ValueError: odd' in logging.Formatter().format(remembered.records[0])


def test_the_best_weights_of_a_branch_that_was_left_are_removed(run, caplog):
    run.models.mkdir(parents=True, exist_ok=True)
    for name in ('model_1', 'model_best'):
        (run.models / f'{name}.pt').write_text(name)
    run.keep_best(1)
    assert (run.models / 'model_best.pt').read_text() == 'model_1'
    run.keep_best(2)
    assert not (run.models / 'model_best.pt').exists()
    assert 'those of epoch 2, the best, were not kept' in caplog.text


def test_two_processes_cannot_train_in_one_folder(run):
    with run.locked():
        code = (
            f'from checkpoint import *; import pathlib\nwith RunFolder(pathlib.Path({str(run.folder)!r})).locked(): 1'
        )
        environment = os.environ | {'PYTHONPATH': str(ROOT / 'src')}
        done = subprocess.run([sys.executable, '-c', code], env=environment, capture_output=True, text=True)
        assert 'is being trained by another process' in done.stderr
    assert subprocess.run([sys.executable, '-c', code], env=environment).returncode == 0
    with run.locked():
        pass


def test_a_full_disk_leaves_the_last_epoch_whole(run):
    run.save_epoch(state(30.0), best=True, keep=False)
    before = files(run.folder)
    with full_disk(), pytest.raises(WriteError, match=r'model_latest\.pt could not be written .*unchanged'):
        run.save_epoch(state(30.0, 31.0), best=True, keep=False)
    assert files(run.folder) == before


def test_every_write_can_fail(run):
    run.save_epoch(state(30.0), best=True, keep=False)
    before = files(run.folder)
    with full_disk(10):
        for name in before:
            with pytest.raises(WriteError, match=Path(name).name):
                run.write(name, 'something longer than ten bytes')
    assert files(run.folder) == before


@pytest.mark.parametrize('content', [b'', b'garbage', b'PK\x03\x04 not a zip', bytes(range(256)) * 40])
def test_a_damaged_state(run, content):
    run.folder.mkdir()
    (run.folder / 'state.pt').write_bytes(content)
    with pytest.raises(UserError, match=r'state\.pt is not .*damaged'):
        run.load_state()


@pytest.mark.parametrize('share', [0.1, 0.5, 0.99])
def test_a_truncated_state(run, share):
    run.save_epoch(state(30.0), best=False, keep=False)
    path = run.folder / 'state.pt'
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(UserError, match=r'state\.pt is not .*damaged'):
        run.load_state()


def test_no_state(run):
    assert not run.holds_training()
    with pytest.raises(UserError, match='holds no state'):
        run.load_state()


@pytest.mark.parametrize('content', [{'params': torch.ones(1)}, torch.ones(2), [1, 2]])
def test_the_state_of_another_program(run, content):
    run.folder.mkdir()
    torch.save(content, run.folder / 'state.pt')
    with pytest.raises(UserError, match=r'state\.pt is not a state of this program'):
        run.load_state()


@pytest.mark.filterwarnings('ignore:Detected pickle protocol')
@pytest.mark.parametrize('dump', [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_code_in_a_state_is_not_run(run, tmp_path, dump):
    run.folder.mkdir()
    dump({'model': Malice(tmp_path / 'proof')}, run.folder / 'state.pt')
    with pytest.raises(UserError, match=r'state\.pt'):
        run.load_state()
    assert not (tmp_path / 'proof').exists()
    pickle.loads(pickle.dumps(Malice(tmp_path / 'proof')))  # it would have worked
    assert (tmp_path / 'proof').exists()


def test_clear_deletes_what_a_run_left_and_nothing_else(run):
    run.save_epoch(state(30.0), best=True, keep=True)
    run.write('config.txt', 'x')
    run.write('log.txt', 'x')
    run.write('report.html', 'x')
    run.write_results({})
    for name in (*(f'results-Set5/a_x2_{kind}.png' for kind in ('SR', 'HR', 'attention')), 'comparison-Set5.png'):
        run.write(name, 'x')
    mine = ['notes.txt', 'mine/a.pt', 'model/mine.pt', 'results-Set14/notes.txt', 'results-2024', 'best.png']
    for name in mine:
        run.write(name, 'mine')
    run.clear()
    assert sorted(files(run.folder)) == sorted(mine)
    assert not (run.folder / 'results-Set5').exists()


def test_clear_of_nothing(run):
    run.clear()
    assert not run.folder.exists()


def test_log_goes_to_screen_and_file_and_is_continued(run, capsys):
    log = logging.getLogger('frugalsr')
    for message in ('first', 'second'):
        start_screen()
        run.start_log()
        log.info('%s message', message)
    assert (run.folder / 'log.txt').read_text() == 'first message\nsecond message\n'
    assert capsys.readouterr().out == 'first message\nsecond message\n'


def test_what_was_said_before_the_log_is_in_it(run, capsys):
    log = logging.getLogger('frugalsr')
    start_screen()
    log.info('LR made: 5 of 5')
    run.start_log()
    log.info('second message')
    assert (run.folder / 'log.txt').read_text() == 'LR made: 5 of 5\nsecond message\n'
    assert capsys.readouterr().out == 'LR made: 5 of 5\nsecond message\n'


def test_a_log_on_a_full_disk_says_nothing(run, capsys):
    run.folder.mkdir()
    (run.folder / 'log.txt').symlink_to('/dev/full')
    start_screen()
    run.start_log()
    logging.getLogger('frugalsr').info('message')
    assert capsys.readouterr() == ('message\n', '')


def test_what_a_killed_run_left_aside_goes_when_the_run_goes_on(run):
    for place in ('', 'model/', 'results-Set5/'):
        run.write(f'{place}.frugalsr-0123abcd.tmp', 'half of a file')
    run.write('notes.tmp', 'of a stranger')
    run.start_log()
    assert sorted(files(run.folder)) == ['log.txt', 'notes.tmp']


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / 'file').write_text('x')
    with pytest.raises(UserError, match=r'file/run cannot be written .*--save_dir'):
        RunFolder(tmp_path / 'file' / 'run').start_log()


def test_a_message_takes_the_place_of_a_progress_bar(monkeypatch):
    terminal = io.StringIO()
    monkeypatch.setattr(sys, 'stdout', terminal)
    monkeypatch.setattr(sys, 'stderr', terminal)
    start_screen()
    with tqdm(total=2, desc='bar', file=terminal, ncols=40, leave=False):
        logging.getLogger('frugalsr').info('said')
    bar, blank, said, *_ = re.split('[\r\n]', terminal.getvalue().lstrip('\r'))
    assert bar.startswith('bar:')
    assert not blank.strip()
    assert said == 'said'
