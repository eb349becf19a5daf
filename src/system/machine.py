"""The machine: what networks can run on, and where something was measured."""

import platform
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path

import torch


def machine(device: str) -> dict[str, str]:
    """Name of the GPU or processor, version of PyTorch, and today's date."""
    return {
        'device': torch.cuda.get_device_name() if device == 'cuda' else cpu_name(),
        'torch': torch.__version__,
        'date': datetime.now(timezone.utc).date().isoformat(),
    }


def best_device() -> str:
    """What networks run on if nobody says: cuda, else cpu.

    Not mps: nothing was ever run there, and PyTorch before 2.13 convolves channels of a map in channels_last memory as
    if no others stood between them (https://github.com/pytorch/pytorch/issues/180984).
    """
    return 'cuda' if torch.cuda.is_available() else 'cpu'


def cpu_name() -> str:
    """The processor, as far as the system says."""
    with suppress(OSError, StopIteration):
        lines = Path('/proc/cpuinfo').read_text().splitlines()
        return next(line.split(': ', 1)[1] for line in lines if line.startswith('model name'))
    return platform.processor() or platform.machine() or 'CPU'
