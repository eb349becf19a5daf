"""How much memory is free and in use, of the host where `device` is 'cpu', else of the device; None: not known."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch

GROUP = Path('/sys/fs/cgroup')
OWN_GROUPS = Path('/proc/self/cgroup')
VERSION_1 = ('memory.limit_in_bytes', 'memory.usage_in_bytes', 'total_inactive_file')
VERSION_2 = ('memory.max', 'memory.current', 'inactive_file')


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
    for folder, names in _groups():
        with suppress(OSError, ValueError):  # there is no limit, or it is not a number
            limit, used = (int((folder / name).read_text()) for name in names[:2])
            available = min(available, limit - used + _cached_files(folder, names[2]))
    return available


def _groups() -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """The control groups of this process and those above them, such as of a container or a job of a queue.

    Each with the names of its limit, of what is used, and of files in memory in memory.stat.
    """
    with suppress(OSError):
        for line in OWN_GROUPS.read_text().splitlines():
            _, kinds, path = line.split(':', 2)
            if kinds and 'memory' not in kinds.split(','):
                continue
            root, names = (GROUP / 'memory', VERSION_1) if kinds else (GROUP, VERSION_2)
            own = root / path.strip('/')
            yield from ((folder, names) for folder in (own, *own.parents) if folder.is_relative_to(root))


def _cached_files(folder: Path, key: str) -> int:
    """Bytes of files in the memory of a group, which count as used there, and are given back as needed."""
    with suppress(OSError, ValueError):
        stated = dict(line.split() for line in (folder / 'memory.stat').read_text().splitlines())
        return int(stated.get(key, 0))
    return 0


def _linux(file: str, key: str) -> int | None:
    """A figure that Linux keeps in /proc, in bytes; None elsewhere."""
    with suppress(OSError):
        for line in Path('/proc', file).read_text().splitlines():
            if line.startswith(f'{key}:'):
                return int(line.split()[1]) * 1024
    return None
