"""What a program of this project does first."""

from system.allocator import tune_malloc
from system.threads import let_threads_sleep


def tune_process() -> None:
    """Have memory kept and threads sleep, as is best for networks on a CPU; before PyTorch is loaded."""
    tune_malloc()
    let_threads_sleep()
