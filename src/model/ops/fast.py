"""The door to kernels in Triton: used on a GPU where Triton works, else the plain form of the same operation is."""

import importlib
import logging
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar('T')
log = logging.getLogger('frugalsr')
failed: set[str] = set()  # modules whose kernels did not run


def is_for_triton(x: Tensor) -> bool:
    """Whether `x` is on a GPU of NVIDIA or AMD."""
    return x.is_cuda


def by_triton(module: str, plain: Callable[..., T], first: Tensor, *others: Any) -> T:
    """What `plain` gives; on a GPU by the function of its name in a module here, until one there fails."""
    if is_for_triton(first) and module not in failed:
        try:
            # Only where it is needed: Triton is no part of every PyTorch.
            return getattr(importlib.import_module(f'model.ops.{module}'), plain.__name__)(first, *others)
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:  # Triton, its compiler, the C compiler that it calls and the driver have their own
            failed.add(module)
            what = module.removesuffix('_triton').replace('_', ' ')
            log.warning('The %s runs without Triton, slower: %s: %s', what, type(error).__name__, error)
    return plain(first, *others)
