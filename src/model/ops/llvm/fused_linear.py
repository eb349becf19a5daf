"""Linear layers with what stands around them in registers and the first cache: see `fused_linear`, whose form this is.

A few rows at a time, each the channels of a pixel, are read, go through all of it, and are written.
"""

import math
from collections.abc import Sequence
from functools import partial
from itertools import accumulate, pairwise

from llvmlite import ir
from torch import Tensor

from model.ops.fused_linear import JOINED
from model.ops.llvm.code import FLOAT, INT, Code, filled_up, lanes
from model.ops.llvm.kernel_cache import compiled
from model.ops.llvm.product import BLOCKS, Rows, layer, packed

NAMES = (
    *(f'x{i}{end}' for i in range(JOINED) for end in ('', '_step')), 'summed', 'summed_step', 'scale', 'shift',
    'first', 'second', 'weighed', 'weighed_step', 'plus', 'plus_step', 'out', 'count',
)  # fmt: skip
FURTHEST = 5.75  # from where on erf(x / sqrt(2)) is 1; there the quotient below is larger by more than its rounding
ERF = (  # erf(x / sqrt(2)) = x P(x^2) / Q(x^2) to 1.5e-8 where it is below 1: P and Q, fitted by weighted least squares
    (0.797884466, 0.0678614585, 0.00936332166, 0.000339135965, 1.27039569e-05, 4.53076235e-08),
    (1.0, 0.251717614, 0.0286895699, 0.00188865275, 7.38585777e-05, 1.19471204e-06),
)


def erf(code: Code, x: ir.Value) -> ir.Value:
    """erf(x / sqrt(2))."""
    to = code.to
    near = code.select_less(code.vector(FURTHEST), code.select_greater(code.vector(-FURTHEST), x))
    square, parts = to.fmul(near, near), []
    for *others, last in ERF:
        part = code.vector(last)
        for coefficient in reversed(others):
            part = code.multiply_add(part, square, code.vector(coefficient))
        parts.append(part)
    found = to.fdiv(to.fmul(near, parts[0]), parts[1])
    return code.select_less(code.vector(1), code.select_greater(code.vector(-1), found))


def gelu(code: Code, x: ir.Value) -> ir.Value:
    """x (1 + erf(x / sqrt(2))) / 2 to 2e-7 of |x|."""
    half = code.to.fmul(x, code.vector(0.5))
    return code.multiply_add(half, erf(code, x), half)


def sigmoid(code: Code, x: ir.Value) -> ir.Value:
    """1 / (1 + e^-x) to 2^-22."""
    power = code.exp2(code.to.fmul(x, code.vector(-1 / math.log(2))))
    return code.to.fdiv(code.vector(1), code.to.fadd(code.vector(1), power))


def leaky_relu(code: Code, x: ir.Value, slope: float) -> ir.Value:
    """Negative numbers times `slope`, and with a slope of 0 none of them."""
    below = code.to.fmul(x, code.vector(slope)) if slope else code.vector(0)
    return code.to.select(code.to.fcmp_ordered('<', x, code.vector(0)), below, x)


def gelu_slope(code: Code, x: ir.Value) -> ir.Value:
    """The derivative of `gelu`: (1 + erf(x / sqrt(2))) / 2 + x e^(-x^2 / 2) / sqrt(2 pi)."""
    to, half = code.to, code.vector(0.5)
    share = code.multiply_add(erf(code, x), half, half)
    bell = code.exp2(to.fmul(to.fmul(x, x), code.vector(-0.5 / math.log(2))))
    return code.multiply_add(to.fmul(x, code.vector(1 / math.sqrt(2 * math.pi))), bell, share)


def layer_norm(
    code: Code, row: Sequence[ir.Value], width: int, scale: Sequence[ir.Value], shift: Sequence[ir.Value]
) -> list[ir.Value]:
    """A row of `width` numbers, filled up by zeros to whole vectors, of mean 0 and variance 1, times scale, plus shift.

    `code.factor` is added to the variance.
    """
    to = code.to

    def mean(vectors: Sequence[ir.Value]) -> ir.Value:
        total, *others = vectors
        for vector in others:
            total = to.fadd(total, vector)
        return to.fmul(code.sum(total), FLOAT(1 / width))

    middle = code.spread(mean(row))
    *whole, last = [to.fsub(vector, middle) for vector in row]
    centred = [*whole, code.padded(code.part(last, 0, width - len(whole) * code.lanes), code.lanes)]
    variance = mean([to.fmul(vector, vector) for vector in centred])
    share = code.spread(to.fdiv(FLOAT(1), code.sqrt(to.fadd(variance, code.factor))))
    unit = [to.fmul(vector, share) for vector in centred]
    return [code.multiply_add(*factors) for factors in zip(unit, scale, shift, strict=True)]


@compiled
def kernel(
    joined: tuple[int, ...],
    outputs: tuple[int, ...],
    before: str,
    active: bool,
    normed: bool,
    weighs: bool,
    slope: float,
    added: bool,
    lanes: int,
) -> Code:
    """Linear layers to these numbers of channels, with what stands around them as in `fused_linear.forward`.

    `joined` are the channels of the tensors whose rows, side by side, are those of the first layer. `active` says
    whether GELU follows that, `weighs` whether there are maps to weigh, `added` whether `plus` is added.
    """
    code, widths = Rows(NAMES, lanes), (sum(joined), *outputs)
    to, numbers = code.to, [INT(i) for i in range(code.count)]
    finished = normed or weighs or slope != 1 or added  # else the last layer's rows are written as they are found
    others = [name for name, wanted in (('weighed', weighs), ('plus', added)) if wanted]
    steps = filled_up(widths, lanes)  # from row to row of a block
    places = [code.count * sum(steps[:i]) for i in range(len(steps))]
    blocks = [code.at(code.memory, INT(place)) for place in places]  # before, between and behind the layers

    def given(name: str, i: ir.Value) -> ir.Value:
        return code.row_of(name, code.given[f'{name}_step'], i)

    def result(i: ir.Value) -> ir.Value:
        return code.row_of('out', widths[-1], i)

    def norm(vectors: list[ir.Value], width: int) -> list[ir.Value]:
        scale, shift = (code.load_row(code.pointer(name), width) for name in ('scale', 'shift'))
        return layer_norm(code, vectors, width, scale, shift)

    def read(i: ir.Value) -> None:
        """Row i, while what is needed at the end comes from memory."""
        code.prefetch(result(i), widths[-1], written=True)
        for name in others:
            code.prefetch(given(name, i), widths[-1])
        if len(joined) > 1:
            target = code.row(blocks[0], steps[0], i)
            for number, end in enumerate(accumulate(joined)):
                width = joined[number]
                vectors = code.load_row(given(f'x{number}', i), width)
                code.store_row(vectors, code.at(target, INT(end - width)), width)
            if not before:
                return
            vectors = code.load_row(target, widths[0])
        else:
            vectors = code.load_row(given('x0', i), widths[0])
        if before == 'norm':
            vectors = norm(vectors, widths[0])
        elif before:
            summed = code.load_row(given('summed', i), widths[0])
            vectors = [to.fadd(x, gelu(code, other)) for x, other in zip(vectors, summed, strict=True)]
        code.store_row(vectors, code.row(blocks[0], steps[0], i), steps[0])

    def write(layer: int, j: ir.Value, width: int, found: list[ir.Value]) -> None:
        """Some vectors of what a layer gives, from vector j on, of which the first `width` numbers are channels."""
        count = len(found) // code.count
        if active and layer == 0:
            found = [gelu(code, x) for x in found]
        for r, i in enumerate(numbers):
            vectors = found[r * count : (r + 1) * count]
            if layer == len(widths) - 2 and not finished:
                target, size = result(i), width
            else:
                target, size = code.row(blocks[layer + 1], steps[layer + 1], i), count * lanes
            code.store_row(vectors, code.at(target, to.mul(j, INT(lanes))), size)

    def finish(i: ir.Value) -> None:
        vectors = code.load_row(code.row(blocks[-1], steps[-1], i), widths[-1])
        if normed:
            vectors = norm(vectors, widths[-1])
        if weighs:
            weighed = code.load_row(given('weighed', i), widths[-1])
            vectors = [to.fmul(y, sigmoid(code, x)) for x, y in zip(vectors, weighed, strict=True)]
        if slope != 1:
            vectors = [leaky_relu(code, x, slope) for x in vectors]
        if added:
            vectors = [
                to.fadd(*pair) for pair in zip(code.load_row(given('plus', i), widths[-1]), vectors, strict=True)
            ]
        code.store_row(vectors, result(i), widths[-1])

    def block() -> None:
        code.each(read)
        for number, (inputs, outputs) in enumerate(pairwise(widths)):
            rows = [code.row(blocks[number], steps[number], i) for i in numbers]
            layer(code, rows, inputs, code.pointer(('first', 'second')[number]), outputs, partial(write, number))
        if finished:
            code.each(finish)

    code.blocks(block)
    return code


def by_row(tensor: Tensor | None) -> tuple[Tensor | int, int]:
    """A tensor as rows of numbers that follow one another, and how far apart these are; zeros for none."""
    if tensor is None:
        return 0, 0
    tensor = tensor.reshape(-1, tensor.shape[-1])
    tensor = tensor if tensor.stride(1) == 1 else tensor.contiguous()
    return tensor, tensor.stride(0)


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
    """See `fused_linear.forward`."""
    vector = lanes()
    parts = x, *beside
    joined = tuple(part.shape[-1] for part in parts)
    outputs = tuple(map(len, weights))
    out = x.new_empty(*x.shape[:-1], outputs[-1])
    before = 'norm' if norm else '' if gelu_summed is None else 'sum'
    layers = [packed(*layer, vector) for layer in zip(weights, biases, strict=True)]
    run = kernel(joined, outputs, before, gelu, bool(norm_after), weighed is not None, slope, plus is not None, vector)
    given = [
        *(number for part in parts for number in by_row(part)), *[0, 0] * (JOINED - len(parts)),
        *by_row(gelu_summed),
        *(t.contiguous() for t in (*norm, *norm_after)), *[0] * (2 - len(norm) - len(norm_after)),
        *layers, *[0] * (2 - len(layers)), *by_row(weighed), *by_row(plus), out,
        out.shape[:-1].numel(),
    ]  # fmt: skip
    run(given, BLOCKS[vector][0] * sum(filled_up([sum(joined), *outputs], vector)), eps)
    return out
