"""What a program of this project does first."""

import os
import sys

from system.allocator import tune_malloc
from system.threads import let_threads_sleep


def tune_process() -> None:
    """Have memory kept, threads sleep, and Ctrl-C come to this program; before PyTorch is loaded."""
    tune_malloc()
    let_threads_sleep()
    if sys.platform == 'win32':  # or Intel's Fortran, which SciPy of conda brings, ends the program at Ctrl-C
        os.environ.setdefault('FOR_DISABLE_CONSOLE_CTRL_HANDLER', '1')
