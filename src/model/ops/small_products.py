"""Products of many small matrices: on a CPU, where llvmlite is installed, by a kernel, several times as fast as `bmm`.

The library behind `bmm` calls itself for every pair of matrices.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.ops.fast import float32_by_llvm, has_llvm, operation

MOST = 256  # rows and columns of matrices that a kernel takes


def small_products(x: Tensor, y: Tensor) -> Tensor:
    """x @ y of (B, M, K) and (B, K, N), all in one type. By a kernel it can be differentiated once."""
    fits = has_llvm(x) and x.dim() == y.dim() == 3 and (len(x), x.shape[2]) == y.shape[:2]
    if not fits or max(x.shape[2], y.shape[2]) > MOST or torch.is_autocast_enabled('cpu') or x.dtype != torch.float32:
        return torch.bmm(x, y)
    return SmallProducts.apply(x, y) if torch.is_grad_enabled() else fast_products(x, y)


def products(x: Tensor, y: Tensor) -> Tensor:
    """See `small_products`."""
    return torch.bmm(x, y)


@operation('small_matmul')
def fast_products(x: Tensor, y: Tensor) -> Tensor:
    """An operation with a name, by which its time is told from that of others."""
    return float32_by_llvm('small_products', products, x, y)


class SmallProducts(torch.autograd.Function):
    """See `small_products`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, y)
        return fast_products(x, y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, y = ctx.saved_tensors
        by_x, by_y = ctx.needs_input_grad
        return fast_products(grad, y.mT) if by_x else None, fast_products(x.mT, grad) if by_y else None
