"""How the threads of an operation wait for the next one."""

import os

CHOICES = ('OMP_WAIT_POLICY', 'GOMP_SPINCOUNT', 'KMP_BLOCKTIME')  # of OpenMP, of GNU's, of LLVM's and Intel's


def let_threads_sleep() -> None:
    """Have the threads of OpenMP sleep while they wait, once it is loaded, which `import torch` does.

    By default they keep a core busy for milliseconds after each operation. Beside another program they then wait for
    each other's cores, and small operations take ten times as long. Variables of the environment have the last word.
    """
    if not any(name in os.environ for name in CHOICES):
        os.environ['OMP_WAIT_POLICY'] = 'PASSIVE'
