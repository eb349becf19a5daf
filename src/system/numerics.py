"""What decides how exactly a run repeats itself and computes."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch


def set_numerics(seed: int, deterministic: bool, tf32: bool) -> None:
    """Seed PyTorch, and choose its algorithms.

    Args:
        seed: of everything random that does not have one of its own.
        deterministic: the same bits in every run on the same machine, where PyTorch has such an algorithm.
        tf32: matrix products and convolutions of float32 may use TensorFloat-32 on a GPU, which keeps 10 of 23 bits;
            PyTorch's own choice would be yes for convolutions.
    """
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # cuBLAS repeats its results only with this
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    # Costs time, and nothing here reads memory before it is written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32


@contextmanager
def precision(tf32: bool) -> Iterator[None]:
    """Within this block products and convolutions of a GPU in float32 use TF32, or do not."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def exact_float32(device: torch.device) -> AbstractContextManager[None]:
    """Within this block float32 is computed as such on a GPU of NVIDIA, not in TensorFloat-32; then as before."""
    return precision(tf32=False) if device.type == 'cuda' else nullcontext()
