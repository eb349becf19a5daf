"""How the threads of an operation wait for the next one."""

import os

CHOICES = ('OMP_WAIT_POLICY', 'GOMP_SPINCOUNT', 'KMP_BLOCKTIME')  # of OpenMP, of GNU's, of LLVM's and Intel's
LOOKS = 3000  # for work before a thread sleeps, some tens of microseconds (docs/LOG.md)


def let_threads_sleep() -> None:
    """Have the threads of GNU's OpenMP sleep sooner, once it is loaded, which `import torch` does.

    By default they look for work 300,000 times, which keeps a core busy for milliseconds after each operation: beside
    another program they then wait for each other's cores. Variables of the environment have the last word.
    """
    if not any(name in os.environ for name in CHOICES):
        os.environ['GOMP_SPINCOUNT'] = str(LOOKS)
