"""The gated feed-forward network on a CPU without gradients: see `gated_ffn`, whose form in LLVM this is."""

from functools import cache

import torch
from llvmlite import ir
from torch import Tensor

from model.ops.llvm import INT, Code, Kernel, lanes
from model.ops.planes_llvm import Planes, Vectors, call, fitting

NAMES = ('x', 'scale', 'shift', 'project_in', 'depthwise', 'project_out', 'out')
SIZE = 3  # of the depthwise convolution

FURTHEST = 3.9  # where erf is 1 in float32
ERF = (  # erf(x) = x P(x^2) / Q(x^2) for |x| up to that, to 1.5e-8: coefficients of P and Q, found by least squares
    (1.128379, 0.19194043, 0.052966844, 0.0038368527, 0.00028745702, 2.0503953e-06),
    (1.0, 0.50343454, 0.11475796, 0.015109156, 0.0011817294, 3.8230814e-05),
)


def gelu(code: Code, x: ir.Value) -> ir.Value:
    """x (1 + erf(x / sqrt(2))) / 2 to 2e-7 of |x|."""
    to = code.to
    y = to.fmul(x, code.vector(0.5**0.5))
    y = code.select_less(code.vector(FURTHEST), code.select_greater(code.vector(-FURTHEST), y))
    square, parts = to.fmul(y, y), []
    for *others, part in ERF:
        part = code.vector(part)
        for coefficient in reversed(others):
            part = code.multiply_add(part, square, code.vector(coefficient))
        parts.append(part)
    erf = to.fdiv(to.fmul(y, parts[0]), parts[1])
    erf = code.select_less(code.vector(1), code.select_greater(code.vector(-1), erf))
    half = to.fmul(x, code.vector(0.5))
    return code.multiply_add(half, erf, half)


@cache
def kernel(channels: int, hidden: int, lanes: int) -> Kernel:
    """A few hidden channels at a time, from the first projection to the sums of the last one."""
    code = Planes(NAMES, lanes, SIZE // 2)
    to = code.to
    few = fitting(hidden, lanes)
    mask, normed, gates, gated, sums = 0, 1, channels + 1, channels + 1 + 2 * few, channels + 1 + 3 * few
    project_in, depthwise, project_out = (code.pointer(name) for name in ('project_in', 'depthwise', 'project_out'))

    def zero(*_: ir.Value) -> ir.Value:
        return code.vector(0)

    def sum_before(i: ir.Value, place: ir.Value) -> ir.Value:
        return code.load(code.plane(to.add(INT(sums), i), place), lanes)

    def channels_from(first: ir.Value, start) -> None:
        for half in range(2):
            rows = code.at(project_in, code.offset((INT(half * hidden * channels),), (first, INT(channels))))
            code.linear(rows, channels, normed, gates + half * few, (channels, few), code.whole, zero)

        def channel(i: ir.Value, _: Vectors) -> Vectors:
            filters = [
                code.at(depthwise, to.mul(to.add(first, to.add(i, INT(half * hidden))), INT(SIZE**2)))
                for half in range(2)
            ]

            def pixels(places: list[ir.Value]) -> None:
                found = (
                    code.filtered(weight, to.add(i, INT(gates + half * few)), places, SIZE, code.vector(0))
                    for half, weight in enumerate(filters)
                )
                for place, gate, value in zip(places, *found, strict=True):
                    code.store(to.fmul(gelu(code, gate), value), code.plane(to.add(i, INT(gated)), place))

            code.lines(code.inner, 1, pixels)
            return []

        code.loop(INT(0), INT(few), 1, channel)
        code.linear(code.at(project_out, first), hidden, gated, sums, (few, channels), code.inner, start)

    def tile() -> None:
        code.read('x', channels, normed, SIZE // 2, mask)
        code.norm('scale', 'shift', channels, normed, mask, code.whole)
        channels_from(INT(0), zero)
        code.loop(INT(few), INT(hidden), few, lambda first, _: channels_from(first, sum_before) or [])
        code.write('out', channels, sums, 'x')

    code.tiles(tile)
    return Kernel(code)


def gated_ffn(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    epsilon: float,
    project_in: Tensor,
    depthwise: Tensor,
    project_out: Tensor,
) -> Tensor:
    """See there."""
    channels, hidden = x.shape[1], project_out.shape[1]
    x = x.contiguous(memory_format=torch.channels_last)
    out = torch.empty_like(x)
    planes = 1 + 2 * channels + 3 * fitting(hidden, lanes())
    weights = [weight.contiguous() for weight in (scale, shift, project_in, depthwise, project_out)]
    call(kernel(channels, hidden, lanes()), x, SIZE // 2, planes, [x, *weights, out], epsilon)
    return out
