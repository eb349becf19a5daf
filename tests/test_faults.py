"""Faults injected into runs, and what becomes of them.

Elsewhere: a torn state and a full disk (test_checkpoint.py), signals, kill -9 and losses that are not finite
(test_trainer.py), a killed rank and torchrun's restart (test_parallel.py), folders that are read-only (test_srdata.py).
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import main
from report import picture
from tests.conftest import ROOT, slow
from tests.system.test_parallel import children
from tests.system.test_parallel import run as run_program
from tests.test_trainer import EDSR, LONG, arguments, in_process, log, metrics, same_run, state, train, wait_for

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    monkeypatch.setattr(picture, 'curves', lambda records: {})


KILLED_IN_A_CALL = """
import os, signal, sys
sys.path.insert(0, {source!r})
import main

real, left = os.{name}, {number}

def fatal(*args):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args)

os.{name} = fatal
sys.exit(main.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    'name, number',
    [('fsync', 1), *slow(('replace', 1), ('replace', 2), ('fsync', 2), ('replace', 9))],
)
def test_killed_within_a_save(data_folder, name, number):
    """At the system calls of which the writing of a state consists, and in the middle of what an epoch leaves."""
    more = '--epochs 2 --test_every 4 --weight_ema 0.9 --save_every 1'
    whole = train(data_folder, EDSR, more, name='whole')
    train(data_folder, EDSR, more, '--epochs 1', name='parts')
    program = KILLED_IN_A_CALL.format(source=str(ROOT / 'src'), name=name, number=number)
    command = [sys.executable, '-c', program, *arguments(data_folder, '--load parts --epochs 2')]
    environment = os.environ | {'OMP_NUM_THREADS': '1'}
    killed = subprocess.run(command, capture_output=True, timeout=120, env=environment)
    assert killed.returncode == -signal.SIGKILL
    same_run(train(data_folder, '--load parts --epochs 2', name='parts'), whole)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-300])


def test_an_image_that_is_truncated_during_a_run_ends_it(data_folder, capsys, monkeypatch):
    path = data_folder / 'SR291' / 'HR' / '0002.png'
    monkeypatch.setattr(
        'report.board.Board.write', lambda self, record, images: record['epoch'] == 2 and truncate(path)
    )
    command = f'{EDSR} --ext img --epochs 4 --save run'
    assert main.main(arguments(data_folder, command)) == 2
    errors = capsys.readouterr().err
    assert errors.startswith(f'Error: {path} cannot be read')
    assert errors.count('\n') == 1
    assert state(data_folder.parent / 'runs' / 'run')['epoch'] == 2


@pytest.mark.parametrize('workers', [0, 1])
def test_or_is_counted_and_replaced(data_folder, monkeypatch, workers):
    path = data_folder / 'SR291' / 'HR' / '0002.png'
    monkeypatch.setattr(
        'report.board.Board.write', lambda self, record, images: record['epoch'] == 2 and truncate(path)
    )
    command = f'{EDSR} --ext img --epochs 8 --batch_size 3 --test_every 1 --skip_bad_images --n_threads {workers}'
    run = train(data_folder, command)
    if not workers:  # a worker has read ahead
        assert [record['replaced'] for record in metrics(run)] == [0, 0, *6 * [1]]
    assert metrics(run)[-1]['replaced'] == 1
    assert log(run).count('SR291/0002 cannot be used: the next image takes its place') == 1


@pytest.mark.slow
@pytest.mark.serial
def test_each_bad_image_is_counted_once_by_several_processes(data_folder):
    path = data_folder / 'SR291' / 'HR' / '0002.png'
    more = '--ext img --epochs 2 --batch_size 6 --test_every 1 --skip_bad_images --n_threads 0 --save'
    train(data_folder, EDSR, more, 'first', name='first')  # makes LR
    truncate(path)
    one = train(data_folder, EDSR, more, 'one', name='one')
    done = run_program(data_folder, EDSR, more, 'two --n_GPUs 2')
    assert done.returncode == 0, done.stderr
    two = data_folder.parent / 'runs' / 'two'
    for run in (one, two):
        assert [record['replaced'] for record in metrics(run)] == [2, 2]
        assert log(run).count('SR291/0002 cannot be used: the next image takes its place') == 1


@pytest.mark.slow
@pytest.mark.serial
def test_a_killed_loading_process_is_replaced(data_folder):
    more = '--epochs 2 --test_every 60'
    whole = train(data_folder, EDSR, more, name='whole')
    process = in_process(data_folder, EDSR, more, '--n_threads 2 --print_every 1 --save parts')
    wait_for(process, 'Epoch 1, batch 5/')
    os.kill(int(children(process.pid)[-1]), signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    parts = data_folder.parent / 'runs' / 'parts'
    assert len(re.findall(r'A loading process died \(.*\): loading starts again after batch', log(parts))) == 1
    same_run(parts, whole)


def test_loading_processes_that_die_at_once_end_the_run(data_folder, capsys, monkeypatch):
    monkeypatch.setattr('data.traindata.TrainData.__getitem__', lambda self, number: os._exit(9))
    assert main.main(arguments(data_folder, f'{EDSR} --n_threads 1 --save run')) == 2
    assert re.search(r'Error: A loading process died again \(.*--n_threads', capsys.readouterr().err)


@pytest.mark.slow
@pytest.mark.serial
def test_a_run_folder_that_is_deleted_is_made_again(data_folder):
    """In the second epoch, when all files have been there."""
    whole = train(data_folder, EDSR, '--epochs 3 --test_every 40', name='whole')
    process = in_process(data_folder, f'{EDSR} --epochs 3 --test_every 40 --print_every 1 --save_every 10 --save run')
    wait_for(process, 'Epoch 2, batch 12/')
    run = data_folder.parent / 'runs' / 'run'
    shutil.rmtree(run)
    wait_for(process, 'was deleted under the run and is made again')
    assert main.main(arguments(data_folder, f'{EDSR} --save run')) == 2  # the new folder is taken, too
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    same_run(run, whole)
    assert 'Epoch 3/3' in log(run)


@pytest.mark.slow
@pytest.mark.serial
def test_another_run_in_a_deleted_folder_is_left_alone(data_folder):
    process = in_process(data_folder, LONG, '--save_every 50')
    wait_for(process, 'Epoch 1, batch 3/')
    run = data_folder.parent / 'runs' / 'run'
    shutil.rmtree(run)
    train(data_folder, EDSR)
    before = state(run)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    assert 'was deleted under this run, and another one was started in it' in errors
    assert state(run)['samples'] == before['samples']


def test_a_clock_that_jumps_back(data_folder, monkeypatch):
    whole = train(data_folder, EDSR, '--epochs 3', name='whole')
    now = iter(range(2_000_000_000, 0, -3600))
    monkeypatch.setattr(time, 'time', lambda: float(next(now)))
    train(data_folder, EDSR, '--epochs 2', name='parts')
    for path in (data_folder / 'SR291').rglob('*.png'):
        os.utime(path, (1e9, 1e9))
    parts = train(data_folder, '--load parts --epochs 3', name='parts')
    same_run(parts, whole)
    assert all(record['seconds'] > 0 for record in metrics(parts))


def test_a_data_folder_that_cannot_be_written(data_folder):
    """As root nothing is read-only: files stand where the folders should be."""
    for name in ('LR_bicubic', 'bin'):
        (data_folder / 'SR291' / name).write_text('')
    run = train(data_folder, EDSR, '--epochs 2')
    assert len(metrics(run)) == 2
    assert (data_folder / 'SR291' / 'bin').read_text() == ''
