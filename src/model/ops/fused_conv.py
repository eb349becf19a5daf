"""Convolutions that keep height and width, and what stands behind them: activation, factor and sum.

On a CPU without gradients, where llvmlite is installed, those of 3x3 need a quarter of the multiplications
(`llvm.fused_conv`), and those of 1x1 are linear layers of pixels (`fused_linear`). Otherwise these are PyTorch's
operations, one after the other.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from model.ops.fast import float32_by_llvm, is_for_llvm, operation
from model.ops.fused_linear import fused_linear

# With fewer a kernel is slower than PyTorch's library: channels that go in, pixels, and channels * channels * pixels.
FEWEST_CHANNELS, FEWEST_PIXELS, LEAST = 8, 512, 2**20


def fused_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    dilation: int = 1,
    *,
    slope: float = 1.0,
    plus: Tensor | None = None,
    factor: float = 1.0,
) -> Tensor:
    """Convolution with zeros around the maps: activation(x * weight + bias), or plus + factor * that.

    Args:
        x: maps (N, C, H, W).
        weight: (C', C, K, K) with an odd K.
        bias: (C',).
        dilation: pixels from one that the weight meets to the next.
        slope: the activation multiplies negative numbers by that: 0 is ReLU, 1 none.
        plus: maps (N, C', H, W).
        factor: of what `plus` is added to.

    Returns:
        (N, C', H, W). A kernel takes maps in channels_last memory and gives such. Of normal numbers its results are
        within some 3e-6 of the largest one; a number that is not finite makes those up to three pixels away not finite.
    """
    if weight.shape[1:] == (x.shape[1], 1, 1) and has_pixels_as_rows(x):
        out = fused_linear(x.permute(0, 2, 3, 1), [(weight, bias)]).permute(0, 3, 1, 2)
        return finished(out, slope, plus, factor)
    run = fast_forward if is_for_kernel(x, weight, dilation, plus) else forward
    return run(x, weight, bias, dilation, slope, plus, factor)


def is_for_kernel(x: Tensor, weight: Tensor, dilation: int, plus: Tensor | None) -> bool:
    """Whether a kernel takes these maps and is worth it."""
    outs, ins, *size = weight.shape
    if torch.is_autocast_enabled('cpu') or size != [3, 3] or dilation != 1 or not has_pixels_as_rows(x):
        return False
    if x.shape[1] != ins or (plus is not None and plus.shape != (len(x), outs, *x.shape[2:])):
        return False
    return ins >= FEWEST_CHANNELS and ins * outs * x[:, 0].numel() >= LEAST


def has_pixels_as_rows(x: Tensor) -> bool:
    """Whether these are maps in channels_last memory, for which a kernel would be used, of not too few pixels."""
    return is_for_llvm(x) and x.dim() == 4 and x.stride(1) == 1 and x[:, 0].numel() >= FEWEST_PIXELS


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int, slope: float, plus: Tensor | None, factor: float
) -> Tensor:
    """See `fused_conv`."""
    out = F.conv2d(x, weight, bias, padding=dilation * (weight.shape[-1] // 2), dilation=dilation)
    return finished(out, slope, plus, factor)


def finished(out: Tensor, slope: float, plus: Tensor | None, factor: float) -> Tensor:
    """What stands behind a convolution."""
    if slope != 1:
        out = F.leaky_relu_(out, slope) if slope else F.relu_(out)
    return out if plus is None else torch.add(plus, out, alpha=factor)


@operation('fused_conv')
def fast_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int, slope: float, plus: Tensor | None, factor: float
) -> Tensor:
    """An operation with a name, by which its time is told from that of others."""
    return float32_by_llvm('fused_conv', forward, x, weight, bias, dilation, slope, plus, factor)
