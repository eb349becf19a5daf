"""The dynamic convolution in Triton, for a GPU; `model.dynamic_conv` chooses it.

A program computes a tile: all channels of one group at a block of pixels. It reads each of its kernel weights once and
sums in registers, in float32 or more, in an order that is always the same.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 1024  # channels times pixels of a program
LEAST_PIXELS = 32  # of a program, however many channels there are

jit = triton.jit(do_not_specialize=['height', 'width'])  # compiled once for images of all sizes


@triton.jit
def locate(height, width, CHANNELS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Number of the group among all images, pixels (1, BLOCK) of the tile, its offsets (ROWS, BLOCK), which exist."""
    n_blocks = tl.cdiv(height * width, BLOCK)
    group = (tl.program_id(0) // n_blocks).to(tl.int64)  # what a tensor is indexed by can exceed 2**31
    pixel = tl.program_id(0) % n_blocks * BLOCK + tl.arange(0, BLOCK)[None, :]
    channel = tl.arange(0, ROWS)[:, None]
    offsets = (group * CHANNELS + channel) * (height * width) + pixel
    return group, pixel, offsets, (channel < CHANNELS) & (pixel < height * width)


@triton.jit
def is_inside(pixel, down, right, height, width):
    """Which pixels of the image have a neighbour in it that many rows below and columns to the right."""
    row, column = pixel // width, pixel % width
    vertical = (row < height) & (row + down >= 0) & (row + down < height)
    return vertical & (column + right >= 0) & (column + right < width)


@jit
def convolve(
    x, weights, out, height, width,
    CHANNELS: tl.constexpr, SIZE: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    ADJOINT: tl.constexpr,
):  # fmt: skip
    """The convolution; ADJOINT: its gradient by the input, in which a pixel gathers from where it had its effect."""
    group, pixel, offsets, exist = locate(height, width, CHANNELS, ROWS, BLOCK)
    total = tl.zeros((ROWS, BLOCK), WIDE)
    for i in range(SIZE):
        for j in tl.static_range(SIZE):
            down, right = i - SIZE // 2, j - SIZE // 2
            if ADJOINT:
                down, right = -down, -right
            inside = is_inside(pixel, down, right, height, width)
            shift = down * width + right
            tap = (group * SIZE * SIZE + i * SIZE + j) * (height * width) + pixel
            if ADJOINT:
                tap += shift
            weight = tl.load(weights + tap, inside, other=0.0).to(WIDE)
            total += weight * tl.load(x + offsets + shift, exist & inside, other=0.0).to(WIDE)
    tl.store(out + offsets, total, exist)


@jit
def correlate(
    x, grad, grad_weights, height, width,
    CHANNELS: tl.constexpr, SIZE: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of the convolution by its weights: products of both, summed over the channels of a group."""
    group, pixel, offsets, exist = locate(height, width, CHANNELS, ROWS, BLOCK)
    grads = tl.load(grad + offsets, exist, other=0.0).to(WIDE)
    for i in range(SIZE):
        for j in tl.static_range(SIZE):
            down, right = i - SIZE // 2, j - SIZE // 2
            inside = is_inside(pixel, down, right, height, width)
            values = tl.load(x + offsets + (down * width + right), exist & inside, other=0.0).to(WIDE)
            tap = (group * SIZE * SIZE + i * SIZE + j) * (height * width) + pixel
            tl.store(grad_weights + tap, tl.sum(grads * values, 0, keep_dims=True), pixel < height * width)


def launch(kernel: Any, tensors: tuple[Tensor, ...], shape: torch.Size, groups: int, size: int, **options: bool) -> None:
    """Runs `kernel` on contiguous `tensors`; `shape` (N, C, H, W) is that of the first one."""
    n, c, height, width = shape
    rows = triton.next_power_of_2(c // groups)
    block = max(TILE // rows, LEAST_PIXELS)
    wide = tl.float64 if tensors[0].dtype == torch.float64 else tl.float32
    sizes = {'CHANNELS': c // groups, 'SIZE': size, 'WIDE': wide, 'ROWS': rows, 'BLOCK': block}
    grid = (n * groups * triton.cdiv(height * width, block),)
    with torch.cuda.device_of(tensors[0]):
        kernel[grid](*tensors, height, width, **sizes, **options)


def forward(x: Tensor, weights: Tensor) -> Tensor:
    """As `model.dynamic_conv.forward`, of contiguous tensors."""
    out = torch.empty_like(x)
    launch(convolve, (x, weights, out), x.shape, *weights.shape[1:3], ADJOINT=False)
    return out


def backward(grad: Tensor, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """As `model.dynamic_conv.backward`, of contiguous tensors."""
    grad_x, grad_weights = torch.empty_like(x), torch.empty_like(weights)
    launch(convolve, (grad, weights, grad_x), x.shape, *weights.shape[1:3], ADJOINT=True)
    launch(correlate, (x, grad, grad_weights), x.shape, *weights.shape[1:3])
    return grad_x, grad_weights
