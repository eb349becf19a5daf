"""How the C library's allocator deals with the large blocks that tensors are."""

import ctypes
import os
import sys

# mallopt(3): parameters of glibc, and what they are set to.
KEPT = {
    -3: 2**31 - 1,  # M_MMAP_THRESHOLD, bytes: larger blocks are mapped apart and given back when freed
    -1: -1,  # M_TRIM_THRESHOLD: the end of the heap is never given back
    -2: 2**26,  # M_TOP_PAD, bytes: the heap grows by this more than is needed
}


def tune_malloc() -> None:
    """Have glibc on Linux keep freed memory for the next tensor; elsewhere nothing.

    By default each large tensor is given back to the system and mapped anew, and on a CPU the page faults of that can
    take as long as the arithmetic. Variables MALLOC_... of the environment have the last word.
    """
    if sys.platform == 'linux' and not any(name.startswith('MALLOC_') for name in os.environ):
        mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)  # not every C library has it
        if mallopt is not None:
            for parameter, value in KEPT.items():
                mallopt(parameter, value)


def trim_heap() -> None:
    """Have glibc on Linux return to the system what is freed; elsewhere nothing."""
    trim = getattr(ctypes.CDLL(None), 'malloc_trim', None) if sys.platform == 'linux' else None
    if trim is not None:
        trim(0)
