"""Layer normalisation over few channels: PyTorch's, on a GPU in Triton where that works.

PyTorch gives every row a block of threads, of which 48 channels leave most idle: a third of ASID's time on an H200. And
under autocast it answers in float32, which the convolution after it has to make small again.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.ops.fast import by_triton, is_for_triton


def forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """See `layer_norm`."""
    return F.layer_norm(x.to(weight.dtype), weight.shape, weight, bias, eps).to(x.dtype)


def backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by `x`, `weight` and bias, given the one by the result."""
    wide, grad = x.to(weight.dtype), grad.to(weight.dtype)
    centred = wide - wide.mean(-1, keepdim=True)
    rstd = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    normed, scaled = centred * rstd, grad * weight
    through = scaled - scaled.mean(-1, keepdim=True) - normed * (scaled * normed).mean(-1, keepdim=True)
    return (through * rstd).to(x.dtype), (grad * normed).flatten(0, -2).sum(0), grad.flatten(0, -2).sum(0)


class LayerNorm(torch.autograd.Function):
    """See `layer_norm`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return by_triton('layer_norm', forward, x, weight, bias, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        return *by_triton('layer_norm', backward, grad.contiguous(), x, weight, ctx.eps), None


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(..., C) to the same shape, each row of mean 0 and variance 1, times `weight` (C,), plus `bias` (C,).

    Computed in the type of the weights; on a GPU with Triton the result has the type of `x`, also under autocast.
    """
    if is_for_triton(x) and not torch.compiler.is_compiling():
        return LayerNorm.apply(x, weight, bias, eps)
    return F.layer_norm(x, weight.shape, weight, bias, eps)
