"""Linear layers of pixels with what stands around them: norm or sum before, GELU between, norm and sum behind.

On a CPU without gradients, where llvmlite is installed, a few pixels at a time go through all of that in registers and
the first cache (`llvm.fused_linear`). Otherwise these are PyTorch's operations, one after the other.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from model.ops.fast import by_llvm, is_for_llvm, operation
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
    gelu: bool = False,
    norm_after: Norm | None = None,
    plus: Tensor | None = None,
) -> Tensor:
    """Tokens (N, L, C), or pixels (N, H, W, C) of maps in channels_last memory, through one or two linear layers.

    Args:
        x: the pixels.
        layers: the linear layers.
        norm: normalises x first.
        gelu_summed: like x; its GELU is added to x first. Not together with `norm`.
        gelu: whether GELU follows the first layer.
        norm_after: normalises what the last layer gives. Not together with `norm`.
        plus: added in the end, of the shape of the result.

    Returns:
        (N, L, C') or (N, H, W, C') with the C' outputs of the last layer.

    Raises:
        ValueError: steps that do not go together, or more than two layers.
    """
    if len(layers) > 2 or (norm is not None and not (gelu_summed is None and norm_after is None)):
        raise ValueError('fused_linear takes one or two layers, and a norm without gelu_summed and norm_after.')
    weights, biases = [weight.flatten(1) for weight, _ in layers], [bias for _, bias in layers]
    first, last = ([] if n is None else [n.weight, n.bias] for n in (norm, norm_after))
    eps = next((n.eps for n in (norm, norm_after) if n is not None), 0.0)
    others = [t for t in (*biases, gelu_summed, plus) if t is not None]
    run = fast_forward if is_for_kernel([x, *weights, *first, *last, *others]) else forward
    return run(x, weights, biases, first, last, eps, gelu_summed, gelu, plus)


def is_for_kernel(tensors: Sequence[Tensor]) -> bool:
    """Whether a kernel takes these pixels and parameters."""
    wanted = is_for_llvm(tensors[0]) and not torch.is_autocast_enabled('cpu')
    return wanted and all(t.dtype == torch.float32 and t.shape[-1] <= MOST_CHANNELS for t in tensors)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Linear layer of (N, L, C) or (N, H, W, C). A CPU is faster, by up to two, at the same as a 1x1 convolution."""
    if x.dim() == 3 and not x.is_cpu:
        return F.linear(x, weight, bias)
    maps = (x.unsqueeze(1) if x.dim() == 3 else x).permute(0, 3, 1, 2)  # channels_last
    # A dilation, which a 1x1 kernel does not feel, has PyTorch take its fast library on one thread, too.
    traced = torch.jit.is_tracing() or torch.compiler.is_compiling()
    dilation = 2 if x.is_cpu and torch.get_num_threads() == 1 and not traced else 1
    out = F.conv2d(maps, weight[:, :, None, None], bias, dilation=dilation).permute(0, 2, 3, 1)
    return out.squeeze(1) if x.dim() == 3 else out


def forward(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    norm: Sequence[Tensor],
    norm_after: Sequence[Tensor],
    eps: float,
    gelu_summed: Tensor | None,
    gelu: bool,
    plus: Tensor | None,
) -> Tensor:
    """See `fused_linear`. Norms are weight and bias, or nothing."""
    if norm:
        x = layer_norm(x, norm[0], norm[1], eps)
    if gelu_summed is not None:
        x = x + F.gelu(gelu_summed)
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        x = linear(x, weight, bias)
        if gelu and i == 0:
            x = F.gelu(x)
    if norm_after:
        x = layer_norm(x, norm_after[0], norm_after[1], eps)
    return x if plus is None else plus + x


@operation('fused_linear')
def fast_forward(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    norm: Sequence[Tensor],
    norm_after: Sequence[Tensor],
    eps: float,
    gelu_summed: Tensor | None,
    gelu: bool,
    plus: Tensor | None,
) -> Tensor:
    """An operation with a name, by which its time is told from that of others."""
    steps = (x, weights, biases, norm, norm_after, eps, gelu_summed, gelu, plus)
    return by_llvm('fused_linear', forward, *steps)
