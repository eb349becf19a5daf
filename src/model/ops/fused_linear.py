"""Linear layers of pixels with what stands around them: norm or gate before, GELU between, norm and sum behind.

On a CPU without gradients, where llvmlite is installed, a few pixels at a time go through all of that in registers and
the first cache (`fused_linear_llvm`). Otherwise these are PyTorch's operations, one after the other.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from model.ops.fast import by_llvm, is_for_llvm
from model.ops.layer_norm import layer_norm

Layer = tuple[Tensor, Tensor | None]  # weight (O, I), or (O, I, 1, 1) as of a convolution, and bias (O,)
MOST_CHANNELS = 512  # that a kernel takes


class Norm(Protocol):
    """Layer normalisation over C channels."""

    @property
    def weight(self) -> Tensor: ...
    @property
    def bias(self) -> Tensor: ...
    @property
    def eps(self) -> float: ...


def fused_linear(
    x: Tensor,
    layers: Sequence[Layer],
    *,
    norm: Norm | None = None,
    gelu_summed: Tensor | None = None,
    gelu_gate: Tensor | None = None,
    gelu: bool = False,
    norm_after: Norm | None = None,
    plus: Tensor | None = None,
) -> Tensor:
    """Tokens (N, L, C), or pixels (N, H, W, C) of maps in channels_last memory, through one or two linear layers.

    Args:
        x: the pixels.
        layers: the linear layers.
        norm: normalises x first.
        gelu_summed: like x; its GELU is added to x first.
        gelu_gate: like x; x is multiplied by its GELU first. At most one of these three is given.
        gelu: whether GELU follows the first layer.
        norm_after: normalises what the last layer gives. Not together with `norm`.
        plus: added in the end, of the shape of the result.

    Returns:
        (N, L, C') or (N, H, W, C') with the C' outputs of the last layer.
    """
    weights, biases = [weight.flatten(1) for weight, _ in layers], [bias for _, bias in layers]
    other = gelu_gate if gelu_summed is None else gelu_summed
    normed = norm or norm_after
    scale, shift, eps = (None, None, 0.0) if normed is None else (normed.weight, normed.bias, normed.eps)
    steps = 'norm' if norm else 'sum' if gelu_summed is not None else 'gate' if gelu_gate is not None else ''
    tensors = [x, *weights, *(t for t in (*biases, other, scale, shift, plus) if t is not None)]
    run = fast_forward if is_for_kernel(tensors) else forward
    return run(x, weights, biases, steps, other, scale, shift, eps, gelu, norm_after is not None, plus)


def is_for_kernel(tensors: Sequence[Tensor]) -> bool:
    """Whether a kernel takes these pixels and parameters."""
    small = all(t.dtype == torch.float32 and t.shape[-1] <= MOST_CHANNELS for t in tensors)
    return small and is_for_llvm(tensors[0]) and not torch.is_autocast_enabled('cpu')


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Linear layer of (N, L, C) or (N, H, W, C). A CPU is faster, by up to two, at the same as a 1x1 convolution."""
    if x.dim() == 3 and not x.is_cpu:
        return F.linear(x, weight, bias)
    maps = (x.unsqueeze(1) if x.dim() == 3 else x).permute(0, 3, 1, 2)  # channels_last
    out = F.conv2d(maps, weight[:, :, None, None], bias).permute(0, 2, 3, 1)
    return out.squeeze(1) if x.dim() == 3 else out


def forward(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    before: str,
    other: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    gelu: bool,
    normed: bool,
    plus: Tensor | None,
) -> Tensor:
    """See `fused_linear`: `before` is 'norm', 'sum', 'gate' or nothing, `normed` says whether a norm is behind."""
    if before == 'norm':
        x = layer_norm(x, scale, shift, eps)
    elif before == 'sum':
        x = x + F.gelu(other)
    elif before == 'gate':
        x = x * F.gelu(other)
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        x = linear(x, weight, bias)
        if gelu and i == 0:
            x = F.gelu(x)
    if normed:
        x = layer_norm(x, scale, shift, eps)
    return x if plus is None else plus + x


@torch.library.custom_op('frugalsr::fused_linear', mutates_args=())
def fast_forward(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    before: str,
    other: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    gelu: bool,
    normed: bool,
    plus: Tensor | None,
) -> Tensor:
    """An operation with a name, by which its time is told from that of others."""
    return by_llvm('fused_linear_llvm', forward, x, weights, biases, before, other, scale, shift, eps, gelu, normed, plus)
