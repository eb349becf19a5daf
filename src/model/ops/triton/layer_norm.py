"""Layer normalisation in Triton, for a GPU; `model.ops.layer_norm` chooses it.

A program computes a tile of whole rows, in float32 or more. What a row's gradient needs is worked out from the row
again. The gradients of weight and bias are summed by a fixed number of programs, and then over these: always alike.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096  # values of a program
PROGRAMS = 1024  # that sum gradients of weight and bias

jit = triton.jit(do_not_specialize=['rows'])  # compiled once for images of all sizes


@triton.jit
def normed_rows(
    x, row, column, exist, CHANNELS: tl.constexpr, EPS: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """Rows of mean 0 and variance 1, and the factor that made it so."""
    value = tl.load(x + row * CHANNELS + column, exist, other=0.0).to(WIDE)
    centred = tl.where(exist, value - tl.sum(value, 1, keep_dims=True) / CHANNELS, 0.0)
    rstd = 1 / tl.sqrt(tl.sum(centred * centred, 1, keep_dims=True) / CHANNELS + EPS)
    return centred * rstd, rstd


@jit
def normalise(
    x, weight, bias, out, rows,
    CHANNELS: tl.constexpr, EPS: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The normalisation itself."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None].to(tl.int64)  # places can exceed 2**31
    column = tl.arange(0, COLUMNS)[None, :]
    exist = (row < rows) & (column < CHANNELS)
    normed, _ = normed_rows(x, row, column, exist, CHANNELS, EPS, WIDE)
    gain = tl.load(weight + column, column < CHANNELS, other=0.0).to(WIDE)
    shift = tl.load(bias + column, column < CHANNELS, other=0.0).to(WIDE)
    tl.store(out + row * CHANNELS + column, normed * gain + shift, exist)


@jit
def differentiate(
    grad, x, weight, grad_x, sums, rows,
    CHANNELS: tl.constexpr, EPS: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Gradients by the input, and of this program's rows the sums of those by weight and bias: (programs, 2, C)."""
    column = tl.arange(0, COLUMNS)[None, :]
    gain = tl.load(weight + column, column < CHANNELS, other=0.0).to(WIDE)
    by_weight = tl.zeros((1, COLUMNS), WIDE)
    by_bias = tl.zeros((1, COLUMNS), WIDE)
    for block in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = block * ROWS + tl.arange(0, ROWS)[:, None].to(tl.int64)  # places can exceed 2**31
        exist = (row < rows) & (column < CHANNELS)
        normed, rstd = normed_rows(x, row, column, exist, CHANNELS, EPS, WIDE)
        given = tl.load(grad + row * CHANNELS + column, exist, other=0.0).to(WIDE)
        scaled = given * gain
        mean = tl.sum(scaled, 1, keep_dims=True) / CHANNELS
        along = tl.sum(scaled * normed, 1, keep_dims=True) / CHANNELS
        tl.store(grad_x + row * CHANNELS + column, (scaled - mean - normed * along) * rstd, exist)
        by_weight += tl.sum(given * normed, 0, keep_dims=True)
        by_bias += tl.sum(given, 0, keep_dims=True)
    place = sums + tl.program_id(0) * 2 * CHANNELS + column
    tl.store(place, by_weight, column < CHANNELS)
    tl.store(place + CHANNELS, by_bias, column < CHANNELS)


def sizes(x: Tensor, eps: float) -> tuple[int, dict]:
    """Rows of `x`, and what its kernels are compiled for."""
    channels = x.shape[-1]
    columns = triton.next_power_of_2(channels)
    wide = tl.float64 if x.dtype == torch.float64 else tl.float32
    rows = max(TILE // columns, 1)
    return x.numel() // channels, {
        'CHANNELS': channels, 'EPS': eps, 'WIDE': wide, 'ROWS': rows, 'COLUMNS': columns,
    }  # fmt: skip


def forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """As `layer_norm.forward`, of a contiguous `x`."""
    out, (rows, options) = torch.empty_like(x), sizes(x, eps)
    with torch.cuda.device_of(x):
        normalise[(triton.cdiv(rows, options['ROWS']),)](x, weight, bias, out, rows, **options)
    return out


def backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """As `layer_norm.backward`, of a contiguous `grad` and `x`."""
    grad_x, (rows, options) = torch.empty_like(x), sizes(x, eps)
    programs = min(triton.cdiv(rows, options['ROWS']), PROGRAMS)
    sums = weight.new_empty(programs, 2, x.shape[-1])
    with torch.cuda.device_of(x):
        differentiate[(programs,)](grad, x, weight, grad_x, sums, rows, **options)
    by_weight, by_bias = sums.sum(0).unbind()
    return grad_x, by_weight, by_bias
