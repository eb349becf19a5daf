"""Convolutions that keep height and width, and what stands behind them: gate, activation, factor and sum.

On a CPU, where llvmlite is installed, those of 3x3 need a quarter of the multiplications (`llvm.fused_conv`), and those
of 1x1 are linear layers of pixels (`fused_linear`). The gradient of the former by their maps is such a convolution,
too; the one by weights is PyTorch's. Otherwise these are PyTorch's operations, one after the other.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.ops.fast import float32_by_llvm, has_llvm, operation
from model.ops.fused_linear import finished, fused_linear

# With fewer a kernel is slower than PyTorch's library: channels that go in, pixels, and channels * channels * pixels.
FEWEST_CHANNELS, FEWEST_PIXELS, LEAST = 8, 512, 2**20


def fused_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    dilation: int = 1,
    *,
    weighed: Tensor | None = None,
    slope: float = 1.0,
    plus: Tensor | None = None,
    factor: float = 1.0,
) -> Tensor:
    """Convolution with zeros around the maps: y = x * weight + bias, or, to weigh maps, their product with sigmoid(y).

    Of that the activation is the result, or plus + factor * that.

    Args:
        x: maps (N, C, H, W).
        weight: (C', C, K, K) with an odd K.
        bias: (C',).
        dilation: pixels from one that the weight meets to the next.
        weighed: maps (N, C', H, W).
        slope: the activation multiplies negative numbers by that: 0 is ReLU, 1 none.
        plus: maps (N, C', H, W).
        factor: of what `plus` is added to.

    Returns:
        (N, C', H, W). A kernel takes maps in channels_last memory and gives such, and can be differentiated once. Of
        normal numbers its results are within some 3e-6 of the largest one; a number that is not finite makes those up
        to three pixels away not finite.
    """
    if weight.shape[1:] == (x.shape[1], 1, 1) and has_pixels_as_rows(x):
        pixels, layer = by_pixel(x), [(weight, bias)]
        if factor == 1 and all(maps is None or maps.dim() == 4 for maps in (weighed, plus)):
            weighed, plus = (maps if maps is None else by_pixel(maps) for maps in (weighed, plus))
            return fused_linear(pixels, layer, weighed=weighed, slope=slope, plus=plus).permute(0, 3, 1, 2)
        return finished(fused_linear(pixels, layer).permute(0, 3, 1, 2), weighed, slope, plus, factor)
    if weighed is not None:
        return finished(fused_conv(x, weight, bias, dilation), weighed, slope, plus, factor)
    fast = is_for_kernel(x, weight, dilation, plus)
    if fast and torch.is_grad_enabled():
        if x.dtype == torch.float32 and (slope == 1 or (plus is None and slope >= 0)):
            return FusedConv.apply(x, weight, bias, slope, plus, factor)
        fast = False
    return (fast_forward if fast else forward)(x, weight, bias, dilation, slope, plus, factor)


def by_pixel(x: Tensor) -> Tensor:
    """Maps (N, C, H, W) seen as (N, H, W, C)."""
    return x.permute(0, 2, 3, 1)


def is_for_kernel(x: Tensor, weight: Tensor, dilation: int, plus: Tensor | None) -> bool:
    """Whether a kernel takes these maps and is worth it."""
    outs, ins, *size = weight.shape
    if torch.is_autocast_enabled('cpu') or size != [3, 3] or dilation != 1 or not has_pixels_as_rows(x):
        return False
    if x.shape[1] != ins or not (plus is None or fits(plus, x, weight)):
        return False
    return ins >= FEWEST_CHANNELS and outs * x.numel() >= LEAST


def fits(maps: Tensor, x: Tensor, weight: Tensor) -> bool:
    """Whether `maps` have a number for each of the result."""
    return maps.shape == (len(x), len(weight), *x.shape[2:])


def has_pixels_as_rows(x: Tensor) -> bool:
    """Whether these are maps in channels_last memory, for which a kernel would be used, of not too few pixels."""
    if not has_llvm(x) or x.dim() != 4 or x.stride(1) != 1:
        return False
    n, _, height, width = x.shape
    return n * height * width >= FEWEST_PIXELS


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int, slope: float, plus: Tensor | None, factor: float
) -> Tensor:
    """See `fused_conv`."""
    out = F.conv2d(x, weight, bias, padding=dilation * (weight.shape[-1] // 2), dilation=dilation)
    return finished(out, None, slope, plus, factor)


@operation('fused_conv')
def fast_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int, slope: float, plus: Tensor | None, factor: float
) -> Tensor:
    """An operation with a name, by which its time is told from that of others."""
    return float32_by_llvm('fused_conv', forward, x, weight, bias, dilation, slope, plus, factor)


class FusedConv(torch.autograd.Function):
    """See `fused_conv`. Where numbers are below 0 the result shows, as no sum follows an activation here."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, slope: float, plus: Tensor | None, factor: float
    ) -> Tensor:
        out = fast_forward(x, weight, bias, 1, slope, plus, factor)
        ctx.save_for_backward(x, weight, out if slope != 1 else None)
        ctx.slope, ctx.factor, ctx.added = slope, 1.0 if plus is None else factor, plus is not None
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, out = ctx.saved_tensors
        by_plus = grad if ctx.added else None
        grad = grad.contiguous(memory_format=torch.channels_last)
        if ctx.slope != 1:
            grad = torch.ops.aten.leaky_relu_backward(grad, out, ctx.slope, True)
        wanted, *others = ctx.needs_input_grad[:3]
        turned = weight.flip(2, 3).transpose(0, 1)
        fast = wanted and is_for_kernel(grad, turned, 1, None)
        mask = [wanted and not fast, *others]
        by_x, by_weight, by_bias = torch.ops.aten.convolution_backward(
            grad, x, weight, weight.shape[:1], [1, 1], [1, 1], [1, 1], False, [0, 0], 1, mask
        )
        if ctx.factor != 1:
            turned, by_x, by_weight, by_bias = (
                None if t is None else t * ctx.factor for t in (turned, by_x, by_weight, by_bias)
            )
        if fast:
            by_x = fast_forward(grad, turned, None, 1, 1.0, None, 1.0)
        return by_x, by_weight, by_bias, None, by_plus, None
