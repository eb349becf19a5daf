"""Page faults of tensors that are made and freed, in processes of their own."""

import subprocess
import sys

import pytest
from conftest import ROOT

FAULTS = """
import resource, sys
sys.path.insert(0, {source!r})
import torch
from allocator import keep_memory
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


@pytest.mark.skipif(sys.platform != 'linux', reason='glibc alone')
def test_freed_memory_is_kept_for_the_next_tensor():
    """Ten times 64 MiB, after some that glibc leaves gaps between: 163840 pages of 4 KiB, or 320 of 2 MiB."""
    plain = faults('')
    assert plain >= 320
    assert faults('keep_memory()') < plain / 10
    assert faults('keep_memory()', MALLOC_TOP_PAD_='131072') > plain / 2
