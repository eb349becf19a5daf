"""Linear layers of pixels with what stands around them: joined channels, norm or sum before, GELU between, and norm,
gate, LeakyReLU and sum behind.

On a CPU, where llvmlite is installed, a few pixels at a time go through all of that in registers and the first cache
(`llvm.fused_linear`), and once more for the gradients (`llvm.linear_gradients`), which need nothing but `x`,
`gelu_summed` and the parameters. Otherwise these are PyTorch's operations, one after the other.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.ops.fast import by_llvm, has_llvm, operation
from model.ops.layer_norm import layer_norm

Layer = tuple[Tensor, Tensor | None]  # weight (O, I), or (O, I, 1, 1) as of a convolution, and bias (O,)
MOST_CHANNELS = 512  # that a kernel takes
JOINED = 4  # tensors whose channels a kernel joins, at most
MOST_WEIGHTS = 2**16  # of a layer, with whose sums a kernel of gradients is fast


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
    beside: Sequence[Tensor] = (),
    norm: Norm | None = None,
    gelu_summed: Tensor | None = None,
    gelu: bool = False,
    norm_after: Norm | None = None,
    weighed: Tensor | None = None,
    slope: float = 1.0,
    plus: Tensor | None = None,
) -> Tensor:
    """Tokens (N, L, C), or pixels (N, H, W, C) of maps in channels_last memory, through one or two linear layers.

    Where kernels compute it, it can be differentiated once.

    Args:
        x: the pixels.
        layers: the linear layers.
        beside: like x but for the channels, which are joined to those of x.
        norm: normalises x first.
        gelu_summed: like x with what is joined to it; its GELU is added to x first. Not together with `norm`.
        gelu: whether GELU follows the first layer.
        norm_after: normalises what the last layer gives. Not together with `norm`.
        weighed: of the shape of the result; times the sigmoid of what was found up to here it takes the place of that.
        slope: multiplies numbers that are negative then: 0 is ReLU, 1 changes nothing.
        plus: added in the end, of the shape of the result.

    Returns:
        (N, L, C') or (N, H, W, C') with the C' outputs of the last layer.

    Raises:
        ValueError: steps that do not go together, or more than two layers.
    """
    if len(layers) > 2 or (norm is not None and not (gelu_summed is None and norm_after is None)):
        raise ValueError('fused_linear takes one or two layers, and a norm without gelu_summed and norm_after.')
    if beside and (torch.is_grad_enabled() or len(beside) >= JOINED):  # `FusedLinear` takes one tensor
        x, beside = torch.cat((x, *beside), -1), ()
    weights, biases = [weight.flatten(1) for weight, _ in layers], [bias for _, bias in layers]
    first, last = ([] if n is None else [n.weight, n.bias] for n in (norm, norm_after))
    eps = next((n.eps for n in (norm, norm_after) if n is not None), 0.0)
    others = [t for t in (*biases, gelu_summed, weighed, plus) if t is not None]
    maps = [t for t in (weighed, plus) if t is not None]
    widths = [sum(t.shape[-1] for t in (x, *beside)), *map(len, weights)]
    fast = (
        is_for_kernel([x, *beside, *weights, *first, *last, *others])
        and all(t.shape[:-1] == x.shape[:-1] for t in beside)
        and all(weight.shape[1] == width for weight, width in zip(weights, widths, strict=False))
        and all(len(t) == width for norm, width in ((first, widths[0]), (last, widths[-1])) for t in norm)
        and (gelu_summed is None or gelu_summed.shape == (*x.shape[:-1], widths[0]))
        and all(t.shape == (*x.shape[:-1], widths[-1]) for t in maps)
    )
    if fast and torch.is_grad_enabled():
        if not last and all(weight.numel() <= MOST_WEIGHTS for weight in weights):
            inside = weighed is None and slope == 1
            parameters = eps, gelu, len(layers), *weights, *biases, *first
            out = FusedLinear.apply(x, gelu_summed, plus if inside else None, *parameters)
            return out if inside else finished(out, weighed, slope, plus)
        fast = False
    steps = (x, weights, biases, first, last, eps, gelu_summed, gelu, weighed, slope, plus, beside)
    return (fast_forward if fast else forward)(*steps)


def is_for_kernel(tensors: Sequence[Tensor]) -> bool:
    """Whether a kernel takes these pixels and parameters."""
    wanted = has_llvm(tensors[0]) and not torch.is_autocast_enabled('cpu')
    return wanted and all(t.dtype == torch.float32 and 0 < t.shape[-1] <= MOST_CHANNELS for t in tensors)


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
    weighed: Tensor | None,
    slope: float,
    plus: Tensor | None,
    beside: Sequence[Tensor],
) -> Tensor:
    """See `fused_linear`. Norms are weight and bias, or nothing."""
    if beside:
        x = torch.cat((x, *beside), -1)
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
    return finished(x, weighed, slope, plus)


def finished(x: Tensor, weighed: Tensor | None, slope: float, plus: Tensor | None, factor: float = 1.0) -> Tensor:
    """What stands behind layers; `x`, which they give, may be overwritten."""
    if weighed is not None:
        x = weighed * x.sigmoid()
    if slope != 1:
        x = F.leaky_relu(x, slope, inplace=slope > 0) if slope else F.relu_(x)
    return x if plus is None else torch.add(plus, x, alpha=factor)


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
    weighed: Tensor | None,
    slope: float,
    plus: Tensor | None,
    beside: Sequence[Tensor],
) -> Tensor:
    """An operation with a name, by which its time is told from that of others."""
    steps = (x, weights, biases, norm, norm_after, eps, gelu_summed, gelu, weighed, slope, plus, beside)
    return by_llvm('fused_linear', forward, *steps)


class FusedLinear(torch.autograd.Function):
    """See `fused_linear`; the parameters are weights, biases, and weight and bias of a norm before them."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gelu_summed: Tensor | None,
        plus: Tensor | None,
        eps: float,
        gelu: bool,
        layers: int,
        *parameters: Any,
    ) -> Tensor:
        ctx.save_for_backward(x, gelu_summed, *parameters)
        ctx.eps, ctx.gelu, ctx.layers, ctx.added = eps, gelu, layers, plus is not None
        weights, biases, norm = parameters[:layers], parameters[layers : 2 * layers], parameters[2 * layers :]
        return fast_forward(x, weights, biases, norm, [], eps, gelu_summed, gelu, None, 1.0, plus, ())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, gelu_summed, *parameters), layers = ctx.saved_tensors, ctx.layers
        weights, biases, norm = parameters[:layers], parameters[layers : 2 * layers], parameters[2 * layers :]
        by_x, by_summed, *found = fast_gradients(grad, x, weights, biases, norm, ctx.eps, gelu_summed, ctx.gelu)
        by_parameters = (None if p is None else g for p, g in zip(parameters, found, strict=True))
        by_plus = grad if ctx.added else None
        return by_x, None if gelu_summed is None else by_summed, by_plus, None, None, None, *by_parameters


def gradients(
    grad: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    norm: Sequence[Tensor],
    eps: float,
    gelu_summed: Tensor | None,
    gelu: bool,
) -> list[Tensor]:
    """By `x`, `gelu_summed`, weights, biases and norm, given the one by the result of `forward`; empty for None."""
    given = [x, gelu_summed, *weights, *biases, *norm]
    leaves: list[Any] = [None if t is None else t.detach().requires_grad_() for t in given]
    with torch.enable_grad():
        pixels, summed, *others = leaves
        first, last = len(weights), 2 * len(weights)
        out = forward(
            pixels, others[:first], others[first:last], others[last:], [], eps, summed, gelu, None, 1.0, None, ()
        )
    found = iter(torch.autograd.grad(out, [t for t in leaves if t is not None], grad))
    return [x.new_empty(0) if t is None else next(found) for t in leaves]


@operation('fused_linear_gradients')
def fast_gradients(
    grad: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    norm: Sequence[Tensor],
    eps: float,
    gelu_summed: Tensor | None,
    gelu: bool,
) -> list[Tensor]:
    """As `fast_forward`."""
    return by_llvm('linear_gradients', gradients, grad, x, weights, biases, norm, eps, gelu_summed, gelu)
