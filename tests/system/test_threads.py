"""What GNU's OpenMP says of itself when it is loaded, in processes of their own."""

import os
import subprocess
import sys

import pytest
import torch

from system.threads import CHOICES, LOOKS
from tests.conftest import ROOT

pytestmark = pytest.mark.skipif(
    sys.platform != 'linux' or 'OpenMP' not in torch.__config__.parallel_info(), reason="PyTorch's with GNU's OpenMP"
)


def spins(program: str, **variables: str) -> int:
    """How often a thread looks for work before it sleeps."""
    environment = {name: value for name, value in os.environ.items() if name not in CHOICES}
    environment |= {'PYTHONPATH': f'{ROOT}/src', 'OMP_DISPLAY_ENV': 'VERBOSE', **variables}
    done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, env=environment)
    (line,) = (line for line in done.stderr.splitlines() if 'GOMP_SPINCOUNT' in line)
    return int(line.split("'")[1])


def test_threads_sleep_soon_in_the_program_alone() -> None:
    """Which chooses before PyTorch is loaded."""
    assert spins('import main; main.main(["--model", "Bicubic", "--pre_train", "missing", "--test_only"])') == LOOKS
    assert spins('import torch') > 10 * LOOKS


def test_the_environment_has_the_last_word() -> None:
    program = 'from system.threads import let_threads_sleep; let_threads_sleep(); import torch'
    assert spins(program) == LOOKS
    assert spins(program, OMP_WAIT_POLICY='ACTIVE') > 10 * LOOKS
    assert spins(program, GOMP_SPINCOUNT='1000') == 1000
