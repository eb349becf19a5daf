"""The dynamic convolution in Triton, for a GPU; `model.ops.dynamic_conv` chooses it.

A program computes a tile: all channels of one group at a block of pixels. It reads each of its kernel weights once and
sums in registers, in float32 or more, in an order that is always the same.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 1024  # channels times pixels of a program, which has 32 to 128 pixels

jit = triton.jit(do_not_specialize=['height', 'width'])  # compiled once for images of all sizes


@triton.jit
def locate(height, width, CHANNELS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Of this program: number of its group among all images, pixels (1, BLOCK), values (ROWS, BLOCK), which exist."""
    n_blocks = tl.cdiv(height * width, BLOCK)
    group = (tl.program_id(0) // n_blocks).to(tl.int64)  # places in a tensor can exceed 2**31
    pixel = tl.program_id(0) % n_blocks * BLOCK + tl.arange(0, BLOCK)[None, :]
    channel = tl.arange(0, ROWS)[:, None]
    values = (group * CHANNELS + channel) * (height * width) + pixel
    return group, pixel, values, (channel < CHANNELS) & (pixel < height * width)


@jit
def convolve(
    x, weights, out, height, width,
    CHANNELS: tl.constexpr, SIZE: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    ADJOINT: tl.constexpr,
):  # fmt: skip
    """The convolution; ADJOINT: its gradient by the input, for which a pixel gathers from where it had its effect."""
    group, pixel, values, exist = locate(height, width, CHANNELS, ROWS, BLOCK)
    row, column = pixel // width, pixel % width
    taps = group * (SIZE * SIZE) * (height * width) + pixel
    total = tl.zeros((ROWS, BLOCK), WIDE)
    for i in range(SIZE):
        down = SIZE // 2 - i if ADJOINT else i - SIZE // 2
        in_height = (row < height) & (row + down >= 0) & (row + down < height)
        for j in tl.static_range(SIZE):
            right = SIZE // 2 - j if ADJOINT else j - SIZE // 2
            inside = in_height & (column + right >= 0) & (column + right < width)
            shift = down * width + right
            weight = tl.load(weights + taps + (shift if ADJOINT else 0), inside, other=0.0).to(WIDE)
            total += weight * tl.load(x + values + shift, exist & inside, other=0.0).to(WIDE)
            taps += height * width
    tl.store(out + values, total, exist)


@jit
def correlate(
    x, grad, grad_weights, height, width,
    CHANNELS: tl.constexpr, SIZE: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of the convolution by its weights: input times gradient, summed over the channels of a group."""
    group, pixel, values, exist = locate(height, width, CHANNELS, ROWS, BLOCK)
    row, column = pixel // width, pixel % width
    taps = group * (SIZE * SIZE) * (height * width) + pixel
    grads = tl.load(grad + values, exist, other=0.0).to(WIDE)
    for i in range(SIZE):
        down = i - SIZE // 2
        in_height = exist & (row + down >= 0) & (row + down < height)
        for j in tl.static_range(SIZE):
            right = j - SIZE // 2
            inside = in_height & (column + right >= 0) & (column + right < width)
            value = tl.load(x + values + (down * width + right), inside, other=0.0).to(WIDE)
            tl.store(grad_weights + taps, tl.sum(grads * value, 0, keep_dims=True), row < height)
            taps += height * width


def launch(kernel: Any, tensors: tuple[Tensor, ...], groups: int, size: int, **options: bool) -> None:
    """Runs `kernel` on contiguous `tensors`, the first of which is (N, C, H, W)."""
    n, c, height, width = tensors[0].shape
    rows = triton.next_power_of_2(c // groups)
    block = min(max(TILE // rows, 32), 128)
    wide = tl.float64 if tensors[0].dtype == torch.float64 else tl.float32
    sizes = {'CHANNELS': c // groups, 'SIZE': size, 'WIDE': wide, 'ROWS': rows, 'BLOCK': block}
    grid = (n * groups * triton.cdiv(height * width, block),)
    with torch.cuda.device_of(tensors[0]):
        kernel[grid](*tensors, height, width, **sizes, **options)


def forward(x: Tensor, weights: Tensor) -> Tensor:
    """As `dynamic_conv.forward`, of contiguous tensors."""
    out = torch.empty_like(x)
    launch(convolve, (x, weights, out), *weights.shape[1:3], ADJOINT=False)
    return out


def backward(grad: Tensor, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """As `dynamic_conv.backward`, of contiguous tensors."""
    grad_x, grad_weights = torch.empty_like(x), torch.empty_like(weights)
    launch(convolve, (grad, weights, grad_x), *weights.shape[1:3], ADJOINT=True)
    launch(correlate, (x, grad, grad_weights), *weights.shape[1:3])
    return grad_x, grad_weights
