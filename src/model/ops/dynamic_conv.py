"""The dynamic convolution of DLGSANet: in plain PyTorch, in strips on a CPU, in Triton on a GPU where that works."""

from collections.abc import Callable
from functools import lru_cache
from itertools import product
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.common import at_least_float32
from model.ops.fast import by_triton, is_exporting, is_for_triton

STRIP = 2**20  # kernel values of a strip: 4 MB in float32, and as much for where they meet the image


def by_tap(weights: Tensor) -> tuple[Tensor, ...]:
    """Views (N, G, 1, H, W) of kernels (N, G, k, k, H, W), one for each tap, row by row."""
    return weights.flatten(2, 3).unsqueeze(2).unbind(3)


def shifted(padded: Tensor, size: int) -> list[Tensor]:
    """Views (..., H, W) of `padded`, what each tap of a size x size kernel meets, row by row."""
    height, width = padded.shape[-2] - size + 1, padded.shape[-1] - size + 1
    return [padded[..., i : i + height, j : j + width] for i, j in product(range(size), repeat=2)]


def forward(x: Tensor, weights: Tensor) -> Tensor:
    """See `dynamic_conv`."""
    groups, size = weights.shape[1:3]
    x_groups = at_least_float32(x.unflatten(1, (groups, -1)))
    out = torch.zeros_like(x_groups)
    padded = F.pad(x_groups, [size // 2] * 4)
    for weight, view in zip(by_tap(weights), shifted(padded, size), strict=True):
        out.addcmul_(weight, view)
    return out.flatten(1, 2).to(x.dtype)


def backward(grad: Tensor, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients by `x` and by `weights`, given the one by the result (N, C, H, W)."""
    groups, size = weights.shape[1:3]
    x_groups, grad_groups = (at_least_float32(t.unflatten(1, (groups, -1))) for t in (x, grad))
    padded = F.pad(x_groups, [size // 2] * 4)
    grad_padded, grad_weights = torch.zeros_like(padded), torch.empty_like(weights)
    for weight, view in zip(by_tap(weights), shifted(grad_padded, size), strict=True):
        view.addcmul_(weight, grad_groups)
    for grad_weight, view in zip(by_tap(grad_weights), shifted(padded, size), strict=True):
        grad_weight.copy_((grad_groups * view).sum(2, keepdim=True))
    return F.pad(grad_padded, [-(size // 2)] * 4).flatten(1, 2).to(x.dtype), grad_weights


# torch.compile leaves these two as they are. From the plain form it would take minutes to compile a training step.


@torch.library.custom_op('frugalsr::dynamic_conv', mutates_args=())
def fast_forward(x: Tensor, weights: Tensor) -> Tensor:
    return by_triton('dynamic_conv', forward, x.contiguous(), weights.contiguous())


@torch.library.custom_op('frugalsr::dynamic_conv_backward', mutates_args=())
def fast_backward(grad: Tensor, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    tensors = (tensor.contiguous() for tensor in (grad, x, weights))
    return by_triton('dynamic_conv', backward, *tensors)


@fast_forward.register_fake
def _(x: Tensor, weights: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@fast_backward.register_fake
def _(grad: Tensor, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weights.new_empty(weights.shape)


def is_left_alone(x: Tensor) -> bool:
    """Whether PyTorch gets `fast_forward` and `fast_backward` to see instead of the plain form."""
    return is_for_triton(x) or (torch.compiler.is_compiling() and not is_exporting())


class DynamicConv(torch.autograd.Function):
    """See `dynamic_conv`. The backward pass needs the two inputs only, none of their k * k products."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(x, weights)
        return (fast_forward if is_left_alone(x) else forward)(x, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return (fast_backward if is_left_alone(grad) else backward)(grad, *ctx.saved_tensors)


def dynamic_conv(x: Tensor, weights: Tensor) -> Tensor:
    """Convolution with kernels of every pixel's own, without bias, zeros outside the image.

    out[n, c, y, x] = sum over i, j of weights[n, c // (C / G), i, j, y, x] * in[n, c, y + i - k // 2, x + j - k // 2]

    Args:
        x: (N, C, H, W).
        weights: (N, G, k, k, H, W) with an odd k; each of the G kernels of a pixel serves C / G channels in a row.

    Returns:
        (N, C, H, W) of the type of `x`, summed in float32 or more.
    """
    apart = torch.is_grad_enabled() or is_for_triton(x)  # a trace follows the plain form alone
    return DynamicConv.apply(x, weights) if apart else forward(x, weights)


@torch.compiler.disable  # it would write out every strip
def dynamic_conv_in_strips(
    x: Tensor, hidden: Tensor, to_kernels: Callable[[Tensor], Tensor], groups: int, size: int
) -> Tensor:
    """`dynamic_conv` without gradients on a CPU, whose kernels are made for a few rows of the image at a time.

    A pixel's result is a weighted sum of the pixels around it, which PyTorch has under the name of embedding bag: the
    table is the strip with its surroundings, a row for each pixel and group; a bag is where the taps of a kernel are.

    Args:
        x: (N, C, H, W) in channels_last memory.
        hidden: (N, K, H, W) in channels_last memory.
        to_kernels: 1x1 convolution of (1, K, h, W) to kernels (1, groups * size^2, h, W).
        groups: kernels of a pixel; each serves C / groups channels in a row.
        size: side of the kernels, odd.

    Returns:
        (N, C, H, W) in channels_last memory and of the type of `x`, summed in float32 or more.
    """
    _, channels, height, width = x.shape
    rows = min(max(STRIP // (groups * size**2 * width), 1), height)
    tables = F.pad(at_least_float32(x.permute(0, 2, 3, 1)), (0, 0, *[size // 2] * 4)).unflatten(-1, (groups, -1))
    bags = torch.from_numpy(taps(rows, width, groups, size))
    out = torch.empty_like(x, memory_format=torch.channels_last)
    for i, top in product(range(len(x)), range(0, height, rows)):
        kernels = (
            at_least_float32(to_kernels(hidden[i : i + 1, :, top : top + rows]))
            .permute(0, 2, 3, 1)
            .reshape(-1, size**2)
        )
        table = tables[i, top : top + rows + size - 1].flatten(0, 2)
        sums = F.embedding_bag(bags[: len(kernels)], table, mode='sum', per_sample_weights=kernels)
        out[i, :, top : top + rows] = sums.view(-1, width, channels).permute(2, 0, 1)
    return out


@lru_cache(maxsize=1)
def taps(height: int, width: int, groups: int, size: int) -> np.ndarray:
    """Where each tap of each kernel of an image meets it, (H * W * G, size^2) int32.

    As rows of the image padded by size // 2, (H + size - 1, W + size - 1, G), flattened. The last one is kept, for all
    blocks of a network need the same: not as a tensor, which would be of the mode that is on at the time.
    """
    y, x, group, tap = (np.arange(length, dtype=np.int32) for length in (height, width, groups, size))
    row = groups * (width + size - 1)
    first = np.add.outer(np.add.outer(y * row, x * groups), group)
    return np.add.outer(first.ravel(), np.add.outer(tap * row, tap * groups).ravel())
