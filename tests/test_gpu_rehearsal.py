"""The checks on a GPU, rehearsed on a CPU with one network, so that none of them fails there for a typing error."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from tests.conftest import ROOT

pytestmark = [
    pytest.mark.skipif(sys.platform != 'linux', reason='run.sh needs timeout, and Triton is made for Linux'),
    pytest.mark.slow,
    pytest.mark.serial,
]


def rehearse(out, *options: str, **more: str) -> subprocess.CompletedProcess:
    own = {key: value for key, value in os.environ.items() if key != 'CI'}  # the checks left out here are skips
    environment = {**own, 'PYTHON': sys.executable, 'FRUGALSR_GPU_ONLY': 'EDSR-baseline', **more}
    command = ['bash', str(ROOT / 'tests' / 'gpu' / 'run.sh'), str(out), '--rehearse', *options]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1500)


def test_all_checks_can_be_run(shared, tmp_path) -> None:
    done = rehearse(tmp_path, 'check', 'speed')
    assert done.returncode == 0, done.stdout + done.stderr
    assert 'check: passed' in done.stdout
    assert 'speed: passed' in done.stdout
    assert json.loads((tmp_path / 'latency.json').read_text())[0]['forms']['float32']['ms'] > 0
    rows = [json.loads(line) for line in (tmp_path / 'check.jsonl').read_text().splitlines()]
    wanted = {'parity', 'gradients', 'half', 'kernels', 'graph', 'limited', 'group'}
    assert wanted <= {row['what'] for row in rows}
    assert all(row['device'] == 'cpu' for row in rows)


def test_a_step_that_fails_or_runs_out_of_time_is_told_and_the_next_one_runs(tmp_path) -> None:
    done = rehearse(tmp_path, 'check', 'speed', CHECK_ONLY='no_such_test', SPEED_SECONDS='1')
    assert done.returncode == 1
    assert 'check: failed with status 5' in done.stdout
    assert 'speed: out of time (1 s)' in done.stdout


def test_a_network_that_computes_something_else_is_named(shared, tmp_path) -> None:
    """The recorded output here is off by a thousandth of its largest value, in one pixel."""
    for part in ('check.py', 'weights.py', 'manifests'):
        (tmp_path / 'other' / 'reference').mkdir(parents=True, exist_ok=True)
        (tmp_path / 'other' / 'reference' / part).symlink_to((shared / 'reference' / part).resolve())
    golden = 'reference/golden/EDSR-baseline_x2.npz'
    with np.load(shared / golden) as data:
        arrays = dict(data)
    arrays['output0'][0, 0, 5, 7] += 1e-3 * np.abs(arrays['output0']).max()
    (tmp_path / 'other' / golden).parent.mkdir()
    np.savez(tmp_path / 'other' / golden, **arrays)
    done = rehearse(tmp_path / 'out', 'check', CHECK_ONLY='recorded_outputs', FRUGALSR_SHARED=str(tmp_path / 'other'))
    assert done.returncode == 1
    assert 'FAILED tests/gpu/test_parity.py::test_equals_the_recorded_outputs[EDSR-baseline-2]' in done.stdout
