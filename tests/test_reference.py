"""The whole comparison with the official networks: every recorded output, loss and gradient."""

import subprocess
import sys
from pathlib import Path

from conftest import ROOT


def test_every_recorded_case_passes(shared: Path) -> None:
    command = [sys.executable, shared / 'reference' / 'check.py', '--build', 'model:build', '--sys-path', ROOT / 'src']
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert done.stdout.splitlines()[-1].endswith('passed, 0 failed, 0 skipped')
