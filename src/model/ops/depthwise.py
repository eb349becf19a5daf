"""Depthwise convolutions that keep height and width, and what follows them: a sum, GELU, or a gate.

On a CPU, where llvmlite is installed, a kernel does all at once, with gradients all but the sum, and another one does
so again for these (`llvm.depthwise`). Otherwise these are PyTorch's operations, one after the other.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.ops.fast import are_float32, float32_by_llvm, has_llvm, operation


def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, act: str = '', *, plus: Tensor | None = None) -> Tensor:
    """Depthwise convolution with zeros around the maps, and what follows it. Kernels can be differentiated once.

    Args:
        x: maps (N, C, H, W).
        weight: (C, 1, K, K) with an odd K.
        bias: (C,).
        act: '', 'gelu', or 'gate': GELU of the first half of the channels, times the other half.
        plus: (N, C, H, W), added before `act`. Not together with a gate.

    Returns:
        (N, C, H, W), or (N, C / 2, H, W) of a gate; by a kernel in channels_last memory.

    Raises:
        ValueError: `plus` and a gate.
    """
    if plus is not None and act == 'gate':
        raise ValueError('depthwise adds nothing before a gate.')
    fast = is_for_kernel(x, weight) and x.shape[1] == len(weight) and (plus is None or plus.shape == x.shape)
    if torch.is_grad_enabled():
        if plus is not None:
            out = depthwise(x, weight, bias) + plus
            return gelu(out) if act else out
        if fast:
            return Depthwise.apply(x, weight, bias, act)
    elif fast and (act or plus is not None):  # of a convolution alone PyTorch is as fast
        return fast_forward(x, weight, bias, act, plus)
    return forward(x, weight, bias, act, plus)


def is_for_kernel(x: Tensor, weight: Tensor) -> bool:
    """Whether a kernel takes maps like these."""
    return has_llvm(x) and x.dim() == 4 and x.stride(1) == 1 and are_float32(x, weight)


def gelu(x: Tensor) -> Tensor:
    """GELU of maps (N, C, H, W) in channels_last memory, seen as contiguous (N, H, W, C), for which a CPU is faster."""
    return F.gelu(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, act: str, plus: Tensor | None = None) -> Tensor:
    """See `depthwise`."""
    out = F.conv2d(x, weight, bias, padding=weight.shape[2] // 2, groups=len(weight))
    if plus is not None:
        out = out + plus
    if act == 'gate':
        first, second = out.chunk(2, 1)
        return gelu(first) * second
    return gelu(out) if act else out


@operation('depthwise_conv')
def fast_forward(x: Tensor, weight: Tensor, bias: Tensor | None, act: str, plus: Tensor | None = None) -> Tensor:
    """An operation with a name, by which its time is told from that of others."""
    return float32_by_llvm('depthwise', forward, x, weight, bias, act, plus)


def gradients(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, act: str) -> list[Tensor]:
    """By `x`, weight and bias, given the one by the result of `forward`; some for a bias that is None, too."""
    given = [x, weight, x.new_zeros(len(weight)) if bias is None else bias]
    with torch.enable_grad():
        x, weight, bias = (t.detach().requires_grad_() for t in given)
        out = forward(x, weight, bias, act)
    return list(torch.autograd.grad(out, [x, weight, bias], grad))


@operation('depthwise_conv_gradients')
def fast_gradients(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, act: str) -> list[Tensor]:
    """As `fast_forward`."""
    return float32_by_llvm('depthwise', gradients, grad, x, weight, bias, act)


class Depthwise(torch.autograd.Function):
    """See `depthwise`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, act: str) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.act = act
        return fast_forward(x, weight, bias, act)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        by_x, by_weight, by_bias = fast_gradients(grad, x, weight, bias, ctx.act)
        return by_x, by_weight, None if bias is None else by_bias, None
