"""Several processes on the CPU do what one does."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import main
from data.image import read_rgb, write_png
from error import UserError
from system import parallel
from system.parallel import Batches, rank_indices
from tests.conftest import ROOT, picture
from tests.test_trainer import EDSR, LCOAN, TINY, arguments, equal, learned, log, metrics, state, train

CATANET = (
    f'{TINY} --model CATANet --n_resblocks 1 --n_feats 8 --n_heads 2 --net qk_dim=8 --net patch_sizes=8 '
    '--net n_centres=4 --net group_sizes=16'
)
PROGRAM = [sys.executable, str(ROOT / 'src' / 'main.py')]
TORCHRUN = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node']


def run(data: Path, *options: str, launcher: list[str] | None = None) -> subprocess.CompletedProcess:
    environment = os.environ | {'OMP_NUM_THREADS': '1'}
    command = [*(launcher or PROGRAM), *arguments(data, *options)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def test_windows_has_one_process(monkeypatch):
    monkeypatch.setattr(sys, 'platform', 'win32')
    with pytest.raises(UserError, match='--n_GPUs 2: PyTorch on Windows'):
        parallel.share('main.py', [], 2, cpu=True, work=lambda: None)


@pytest.mark.parametrize('batch_size', [4, 7, 8])
@pytest.mark.parametrize('size', [1, 2, 3, 4])
def test_every_sample_of_a_batch_is_seen_once(monkeypatch, size, batch_size):
    monkeypatch.setattr(parallel, 'world_size', lambda: size)
    numbers = range(5, 5 + 3 * batch_size)
    parts = []
    for rank in range(size):
        monkeypatch.setattr(parallel, 'rank', lambda rank=rank: rank)
        parts.append(list(Batches(numbers, batch_size)))
        assert len(parts[-1]) == 3
    for i in range(3):
        together = [number for part in parts for number in part[i]]
        assert together == list(numbers[i * batch_size : (i + 1) * batch_size])
        assert max(len(part[i]) for part in parts) - min(len(part[i]) for part in parts) <= 1


@pytest.mark.parametrize('count', [0, 1, 5, 6, 7])
def test_every_piece_of_work_is_dealt_once(monkeypatch, count):
    monkeypatch.setattr(parallel, 'world_size', lambda: 3)
    dealt = []
    for rank in range(3):
        monkeypatch.setattr(parallel, 'rank', lambda rank=rank: rank)
        dealt.append([own for _, own in rank_indices(count)])
    assert sorted(own for part in dealt for own in part if own is not None) == list(range(count))
    assert len({len(part) for part in dealt}) == 1  # all take part in all rounds


@pytest.mark.slow
@pytest.mark.serial
@pytest.mark.parametrize('network', [EDSR, LCOAN, CATANET], ids=['EDSR', 'LCoAN', 'CATANet'])
def test_several_processes_learn_what_one_learns(data_folder, network):
    more = '--optimizer SGD --lr 1e-4 --batch_size 7 --test_every 3 --epochs 2 --weight_ema 0.9 --save'
    one = train(data_folder, network, more, 'one', name='one')
    for size, parts in ((2, 3), (4, 1)) if network == EDSR else ((2, 1), (4, 1)):
        done = run(data_folder, network, more, f'p{size}{parts} --n_GPUs {size} --split_batch {parts}')
        assert done.returncode == 0, done.stderr
        if network != CATANET:  # PyTorch says that gradients of depthwise kernels lie in memory as it did not expect
            assert done.stderr == ''
        several = data_folder.parent / 'runs' / f'p{size}{parts}'
        for key, value in state(one)['model'].items():
            torch.testing.assert_close(state(several)['model'][key], value, rtol=1e-4, atol=1e-5, msg=key)
        for mine, theirs in zip(learned(several), learned(one), strict=True):
            assert mine['loss'] == pytest.approx(theirs['loss'], rel=1e-4)
            assert mine['test'] == pytest.approx(theirs['test'], abs=1e-2)
            assert mine['samples'] == theirs['samples']
        assert log(several).count('Epoch 2/2') == 1  # one process speaks


@pytest.mark.serial
def test_processes_with_shares_of_unequal_size_keep_in_step_in_parts(data_folder):
    """The centroids of LCoAN are averaged over the processes in every part."""
    done = run(data_folder, LCOAN, '--batch_size 7 --split_batch 3 --n_GPUs 2 --save run')
    assert done.returncode == 0, done.stderr
    assert metrics(data_folder.parent / 'runs' / 'run')[0]['samples'] == 14


@pytest.mark.slow
@pytest.mark.serial
def test_a_run_goes_on_with_another_number_of_processes(data_folder):
    """In parts of a batch, stopped by SIGTERM and continued by one process."""
    more = (
        f'{EDSR} --batch_size 4 --split_batch 2 --test_every 300 --epochs 1 --print_every 1 --optimizer SGD --lr 1e-6'
    )
    command = [*PROGRAM, *arguments(data_folder, more, '--save run --n_GPUs 2')]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {'OMP_NUM_THREADS': '1'})
    for line in process.stdout:
        if 'batch 5/300' in line:
            process.send_signal(signal.SIGTERM)
            break
    process.communicate(timeout=60)
    assert process.returncode == 0
    stopped = data_folder.parent / 'runs' / 'run'
    assert 5 <= state(stopped)['batch'] < 300
    assert re.search(r'SIGTERM: stopped, and saved in epoch 1, batch \d+; --load run continues', log(stopped))
    parts = train(data_folder, '--load run --split_batch 1', name='run')
    whole = train(data_folder, more, name='whole')
    assert metrics(parts)[0]['loss'] == pytest.approx(metrics(whole)[0]['loss'], rel=1e-4)
    assert metrics(parts)[0]['samples'] == 1200


@pytest.mark.slow
@pytest.mark.serial
def test_a_folder_is_shared_out(data_folder, tmp_path):
    for i in range(5):
        write_png(tmp_path / 'photos' / f'{i}.png', picture(i, 20 + i, 30))
    (tmp_path / 'photos' / 'bad.png').write_bytes(b'no image')
    options = f'--model Bicubic --cpu --scale 2 --test_only --data_test Set5+Demo --dir_demo {tmp_path}/photos'
    assert main.main(arguments(data_folder, options, '--save one --save_results')) == 2
    done = run(data_folder, options, '--save two --save_results --n_GPUs 2')
    assert 'bad.png' in done.stderr
    one, two = (data_folder.parent / 'runs' / name for name in ('one', 'two'))
    images = sorted(path.relative_to(one) for path in one.rglob('*_SR.png'))
    assert len(images) == 7
    assert images == sorted(path.relative_to(two) for path in two.rglob('*_SR.png'))
    assert all((read_rgb(one / image) == read_rgb(two / image)).all() for image in images)


@pytest.mark.slow
@pytest.mark.serial
def test_a_process_that_dies_ends_the_run_with_the_reason(data_folder):
    command = [*PROGRAM, *arguments(data_folder, EDSR, '--n_GPUs 2 --test_every 100000 --print_every 1 --save run')]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {'OMP_NUM_THREADS': '1'}
    )
    for line in process.stdout:
        if 'batch 3/' in line:
            break
    ranks = [int(pid) for pid in children(process.pid)]
    os.kill(max(ranks), signal.SIGKILL)
    start = time.monotonic()
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    assert re.search(r'Error: Process \d of 2 ended with status -9', errors)
    assert time.monotonic() - start < 100


@pytest.mark.slow
@pytest.mark.serial
def test_torchrun_starts_a_run_again_from_its_last_state(data_folder):
    more = f'{EDSR} --test_every 60 --epochs 1 --print_every 1 --save_every 5 --optimizer SGD --lr 1e-6 --save'
    command = [*TORCHRUN, '2', '--max_restarts=1', PROGRAM[1], *arguments(data_folder, more, 'run')]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=os.environ | {'OMP_NUM_THREADS': '1'}
    )
    for line in process.stdout:
        if 'batch 12/' in line:
            break
    os.kill(max(int(pid) for pid in children(process.pid)), signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == 0
    again = data_folder.parent / 'runs' / 'run'
    assert re.search(r'on cpu, 2 processes, weights from the run run, epoch 0 and \d+ batches;', log(again))
    whole = train(data_folder, more, 'whole', name='whole')
    assert learned(again)[0]['samples'] == 240
    assert learned(again)[0]['loss'] == pytest.approx(learned(whole)[0]['loss'], rel=1e-4)


def test_a_job_of_slurm_without_srun_is_one_process(monkeypatch):
    for name in parallel.SLURM.values():
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('SLURM_NTASKS', '2')
    monkeypatch.setenv('SLURM_PROCID', '0')
    assert not parallel.launched()


def test_a_number_of_processes_that_cannot_meet(monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '2')
    for name in ('RANK', 'MASTER_ADDR', 'MASTER_PORT'):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match='WORLD_SIZE is 2 in the environment, and RANK is not there'):
        parallel.launched()


@pytest.mark.slow
@pytest.mark.serial
def test_tasks_of_slurm_find_each_other(data_folder):
    more = f'{EDSR} --epochs 2 --optimizer SGD --lr 1e-4 --save'
    one = train(data_folder, more, 'one', name='one')
    job = {'SLURM_JOB_ID': str(os.getpid()), 'SLURM_NTASKS': '2', 'SLURM_LAUNCH_NODE_IPADDR': '127.0.0.1'}
    tasks = []
    for task in ('0', '1'):
        environment = os.environ | job | {'SLURM_PROCID': task, 'SLURM_LOCALID': task, 'OMP_NUM_THREADS': '1'}
        command = [*PROGRAM, *arguments(data_folder, more, 'two')]
        tasks.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment))
    said = [task.communicate(timeout=120)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0]
    assert ('Epoch 2/2' in said[0], said[1]) == (True, '')
    for mine, theirs in zip(learned(data_folder.parent / 'runs' / 'two'), learned(one), strict=True):
        assert mine['loss'] == pytest.approx(theirs['loss'], rel=1e-4)
        assert mine['samples'] == theirs['samples']


def children(pid: int) -> list[str]:
    return Path(f'/proc/{pid}/task/{pid}/children').read_text().split()


@pytest.mark.slow
@pytest.mark.serial
def test_a_batch_smaller_than_the_processes(data_folder):
    done = run(data_folder, EDSR, '--batch_size 2 --n_GPUs 3 --save run')
    assert done.returncode == 2
    assert re.search(r'--batch_size 2 \(2 HR patches .*\) is too small for 3 processes', done.stderr)
    assert not (data_folder.parent / 'runs' / 'run' / 'state.pt').exists()


def test_one_process_needs_no_group(data_folder):
    assert (parallel.rank(), parallel.world_size(), parallel.all_reduce_sum([1.5]), parallel.gather('x')) == (
        0,
        1,
        [1.5],
        ['x'],
    )
    assert equal(parallel.broadcast({'a': 1}), {'a': 1})
