"""What a program of this project does first."""

import os
import sys
from collections.abc import Callable, Sequence

from error import UserError
from system.allocator import tune_malloc
from system.threads import let_threads_sleep


def tune_process() -> None:
    """Have memory kept, threads sleep, and Ctrl-C come to this program; before PyTorch is loaded."""
    tune_malloc()
    let_threads_sleep()
    if sys.platform == 'win32':  # or Intel's Fortran, which SciPy of conda brings, ends the program at Ctrl-C
        os.environ.setdefault('FOR_DISABLE_CONSOLE_CTRL_HANDLER', '1')


def share(script: str, argv: Sequence[str], processes: int, cpu: bool, work: Callable[[], None]) -> None:
    """`parallel.share`, where the packages that it needs are there.

    Raises:
        UserError: they are not; or as there.
    """
    try:
        from system import parallel
    except ModuleNotFoundError as error:
        raise UserError(
            f'{error.name} is missing in {sys.executable}: use .venv/bin/python, or pip install -r requirements.txt.'
        ) from error

    parallel.share(os.path.abspath(script), argv, processes, cpu, work)  # noqa: PTH100
