"""Page faults of tensors that are made and freed, in processes of their own."""

import subprocess
import sys

import pytest

from tests.conftest import ROOT

FAULTS = """
import resource, sys
sys.path.insert(0, {source!r})
import torch
from system.allocator import tune_malloc
{call}
faults = []
for _ in range(30):
    torch.ones(2**24)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(faults[-1] - faults[-11])
"""


def faults(call: str, **environment: str) -> int:
    program = FAULTS.format(source=str(ROOT / 'src'), call=call)
    return int(subprocess.run([sys.executable, '-c', program], capture_output=True, env=environment, check=True).stdout)


@pytest.mark.serial
@pytest.mark.skipif(sys.platform != 'linux', reason='glibc alone')
def test_freed_memory_is_kept_for_the_next_tensor():
    """Ten times 64 MiB, after some that glibc leaves gaps between: 163840 pages of 4 KiB, or 320 of 2 MiB."""
    plain = faults('')
    assert plain >= 320
    assert faults('tune_malloc()') < plain / 10
    assert faults('tune_malloc()', MALLOC_TOP_PAD_='131072') > plain / 2


END_OF_HEAP = """
import ctypes, sys
sys.path.insert(0, {source!r})
from system.allocator import trim_heap, tune_malloc
tune_malloc()
c = ctypes.CDLL(None)
c.malloc.restype = c.sbrk.restype = ctypes.c_void_p
ends = [c.sbrk(0)]
blocks = [ctypes.c_void_p(c.malloc(ctypes.c_size_t(3 * 2**29))) for _ in range(2)]  # never touched, so no memory
ends.append(c.sbrk(0))
for block in blocks:
    c.free(block)
ends.append(c.sbrk(0))
trim_heap()
ends.append(c.sbrk(0))
print(*ends)
"""


@pytest.mark.serial
@pytest.mark.skipif(sys.platform != 'linux', reason='glibc alone')
def test_freed_memory_is_kept_however_much_it_is_until_it_is_given_back():
    program = END_OF_HEAP.format(source=str(ROOT / 'src'))
    found = subprocess.run([sys.executable, '-c', program], capture_output=True, env={}, check=True).stdout
    start, full, kept, given_back = map(int, found.split())
    assert full - start >= 3 * 2**30
    assert kept == full
    assert given_back - start < 2**28
