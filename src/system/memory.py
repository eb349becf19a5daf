"""How much memory is free and in use, of the host where `device` is 'cpu', else of the device; None: not known."""

from contextlib import suppress
from pathlib import Path

import torch

GROUP = Path('/sys/fs/cgroup')


def start_peak(device: str) -> int | None:
    """Bytes in use now, from where the peak is counted; on a host those that the process has in memory."""
    if device == 'cuda':
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):
        Path('/proc/self/clear_refs').write_text('5')  # VmHWM starts anew
    return in_use(device)


def in_use(device: str) -> int | None:
    """Bytes in use now."""
    return torch.cuda.memory_allocated() if device == 'cuda' else _linux('self/status', 'VmRSS')


def peak(device: str) -> int | None:
    """Largest number of bytes in use since `start_peak`."""
    return torch.cuda.max_memory_allocated() if device == 'cuda' else _linux('self/status', 'VmHWM')


def free(device: str) -> int | None:
    """Bytes that can still be taken."""
    if device == 'cuda':
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    available = _linux('meminfo', 'MemAvailable')
    if available is None:
        return None
    with suppress(OSError, ValueError):  # the limit of a container, if that is a number
        limit, used = (int((GROUP / name).read_text()) for name in ('memory.max', 'memory.current'))
        available = min(available, limit - used + _cached_files())
    return available


def _cached_files() -> int:
    """Bytes of files in the memory of a container, which count as used there, and are given back as needed."""
    with suppress(OSError, ValueError):
        stated = dict(line.split() for line in (GROUP / 'memory.stat').read_text().splitlines())
        return int(stated.get('inactive_file', 0))
    return 0


def _linux(file: str, key: str) -> int | None:
    """A figure that Linux keeps in /proc, in bytes; None elsewhere."""
    with suppress(OSError):
        for line in Path('/proc', file).read_text().splitlines():
            if line.startswith(f'{key}:'):
                return int(line.split()[1]) * 1024
    return None
