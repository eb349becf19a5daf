"""speedrun.sh with a tiny network and a tiny goal."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.test_trainer import metrics, state

TINY = '--model EDSR --n_resblocks 1 --n_feats 8 --patch_size 16 --batch_size 2 --test_every 2'


def speedrun(data: Path, goal: int, *options: str) -> subprocess.CompletedProcess:
    command = ['bash', str(ROOT / 'tests' / 'speedrun.sh'), str(data), *TINY.split(), *' '.join(options).split()]
    environment = os.environ | {'GOAL': str(goal), 'OUT': str(data.parent / 'runs'), 'PYTHON': sys.executable}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_a_run_ends_at_its_goal_and_goes_on_after_a_stop(data_folder):
    run = data_folder.parent / 'runs' / 'speedrun'
    done = speedrun(data_folder, 3, '--epochs 2000 --max_time 0.01')
    assert (done.returncode, state(run)['step']) == (1, 1)
    assert '3 dB on Set5 not reached' in done.stderr
    done = speedrun(data_folder, 3, '--epochs 2000 --max_time 200')
    assert done.returncode == 0, done.stderr
    steps, minutes = re.search(r'Reached 3 dB on Set5 \(.*\): (\d+) steps, ([\d.]+) minutes', done.stdout).groups()
    records = metrics(run)
    assert len(records) < 2000
    first = next(record for record in records if record['test']['Set5']['psnr'] >= 3)
    assert int(steps) == first['step']
    assert float(minutes) == pytest.approx(sum(r['seconds'] for r in records[: first['epoch']]) / 60, abs=0.05)
    assert speedrun(data_folder, 3).stdout.count('Reached 3 dB') == 1  # and nothing is trained
    assert metrics(run) == records


def test_what_is_wrong_with_a_command_is_said(data_folder):
    done = speedrun(data_folder, 3, '--lr x')
    assert done.returncode == 2
    assert "--lr: 'x' is not a number" in done.stderr
