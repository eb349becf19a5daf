"""Gradients of linear layers with what stands around them: see `fused_linear.gradients`, whose form in LLVM this is.

A few dozen pixels at a time are read, normalised and brought as far as GELU again, so that nothing of that is kept from
the forward pass. Then the gradient by their results goes back to them, and what they add to the gradients by weights is
summed up, all in the caches of a core. A task is a part of the pixels, which has sums of its own.

A norm has no parameters here: its scale is multiplied into the layer behind it, and its shift added to that one's bias.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from llvmlite import ir
from torch import Tensor

from model.ops.llvm.code import FLOAT, INT, Code, filled_up, lanes
from model.ops.llvm.fused_linear import by_row, gelu, gelu_slope
from model.ops.llvm.kernel_cache import compiled
from model.ops.llvm.product import BLOCKS, packed, product

PIXELS = 48  # at once
OF_PART = 32 * PIXELS
NAMES = (
    'one', 'x', 'x_step', 'summed', 'summed_step', 'grad', 'grad_step', 'first', 'first_back', 'second_back',
    'by_x', 'by_summed', 'sums', 'count', 'parts',
)  # fmt: skip
Vectors = list[ir.Value]


def sizes(widths: Sequence[int], lanes: int) -> list[int]:
    """Of what a part sums up, one behind the other: for each layer (outs, ins filled up) by weights, and by biases."""
    steps = filled_up(widths, lanes)
    return [size for (ins, outs), n in zip(pairwise(steps), widths[1:], strict=True) for size in (n * ins, outs)]


def apart(widths: Sequence[int], lanes: int) -> list[int]:
    """From a pixel's channels to the next one's: an odd number of vectors, as the first cache keeps few of others."""
    return [width + (width // lanes + 1) % 2 * lanes for width in filled_up(widths, lanes)]


def places(widths: Sequence[int], lanes: int) -> list[int]:
    """In a thread's memory, of each pixel: what goes into the layers; the gradients by that, and by the result; the
    derivative of the sum's GELU; what the norm multiplied by. And where the memory ends.
    """
    steps = apart(widths, lanes)
    return [0, *(PIXELS * number for number in accumulate([*steps[:-1], *steps, steps[0], 1]))]


@compiled
def kernel(widths: tuple[int, ...], before: str, active: bool, lanes: int) -> Code:
    """Linear layers from and to these numbers of channels; `before` is 'norm', 'sum' or ''."""
    code = Code(NAMES, lanes)
    to, given = code.to, code.given
    n_rows, n_columns = BLOCKS[lanes]
    steps, filled = apart(widths, lanes), filled_up(widths, lanes)
    layers = range(len(widths) - 1)
    *of_rows, slopes, shares = (code.at(code.memory, INT(place)) for place in places(widths, lanes)[:-1])
    values, grads = of_rows[: len(layers)], of_rows[len(layers) :]

    def row(block: ir.Value, i: ir.Value, layer: int) -> ir.Value:
        return code.at(block, to.mul(i, INT(steps[layer])))

    def blocks(count: int, most: int, body: Callable[[int, ir.Value, Vectors], Vectors]) -> None:
        """`body` for `count` things, `most` of them at once."""
        whole = count // most * most
        code.loop(INT(0), INT(whole), most, partial(body, most))
        if whole < count:
            body(count - whole, INT(whole), [])

    def outside(name: str, i: ir.Value, step: ir.Value) -> ir.Value:
        return code.at(code.pointer(name), to.mul(i, step))

    def mean(vectors: Vectors) -> ir.Value:
        total, *rest = vectors
        for vector in rest:
            total = to.fadd(total, vector)
        return to.fmul(code.sum(total), FLOAT(1 / widths[0]))

    def channels(vectors: Vectors) -> Vectors:
        """Zeros behind the last channel."""
        *whole, last = vectors
        return [*whole, code.padded(code.part(last, 0, widths[0] - len(whole) * lanes), lanes)]

    def read(first: ir.Value, i: ir.Value, _: Vectors) -> Vectors:
        """What goes into the first layer of pixel i, and the gradient by its result."""
        here = to.add(first, i)
        later = to.add(here, INT(PIXELS))
        code.prefetch(outside('x', later, given['x_step']), widths[0])
        if before == 'sum':
            code.prefetch(outside('summed', later, given['summed_step']), widths[0])
        code.prefetch(outside('grad', later, given['grad_step']), widths[-1])
        code.prefetch(outside('by_x', here, INT(widths[0])), widths[0], written=True)
        vectors = code.load_row(outside('x', here, given['x_step']), widths[0])
        if before == 'norm':
            middle = code.spread(mean(vectors))
            vectors = channels([to.fsub(x, middle) for x in vectors])
            variance = mean([to.fmul(x, x) for x in vectors])
            share = to.fdiv(FLOAT(1), code.sqrt(to.fadd(variance, code.factor)))
            to.store(share, code.at(shares, i))
            vectors = [to.fmul(x, code.spread(share)) for x in vectors]
        elif before:
            summed = code.load_row(outside('summed', here, given['summed_step']), widths[0])
            code.store_row([gelu_slope(code, y) for y in summed], row(slopes, i, 0), filled[0])
            vectors = [to.fadd(x, gelu(code, y)) for x, y in zip(vectors, summed, strict=True)]
        code.store_row(vectors, row(values[0], i, 0), filled[0])
        found = code.load_row(outside('grad', here, given['grad_step']), widths[-1])
        code.store_row(found, row(grads[-1], i, -1), filled[-1])
        return []

    def multiply(
        pixels: ir.Value,
        source: tuple[ir.Value, int],
        columns: Callable[[ir.Value], ir.Value],
        target: tuple[ir.Value, int],
        count: int,
        step: int,
        finish: Callable[[ir.Value, ir.Value], ir.Value],
        start: Callable[[ir.Value], ir.Value],
    ) -> None:
        """Rows of a block times columns, to another block."""

        def tile(pixel: ir.Value, _: Vectors) -> Vectors:
            rows = [row(source[0], to.add(pixel, INT(r)), source[1]) for r in range(n_rows)]

            def some(n: int, j: ir.Value, _: Vectors) -> Vectors:
                numbers = [to.add(j, INT(v)) for v in range(n)]
                sums = [start(v) for v in numbers] * n_rows
                found = product(code, rows, [columns(v) for v in numbers], INT(step), INT(count), sums)
                for i, x in enumerate(found):
                    place = code.offset(
                        (to.add(pixel, INT(i // n)), INT(steps[target[1]])), (numbers[i % n], INT(lanes))
                    )
                    code.store(finish(x, place), code.at(target[0], place))
                return []

            blocks(filled[target[1]] // lanes, n_columns, some)
            return []

        code.loop(INT(0), pixels, n_rows, tile)

    def repeat(pixels: ir.Value) -> None:
        """The first layer once more: to `values[1]`, and GELU's derivative to `grads[1]`, or into what is there."""
        columns = (1 + widths[0]) * lanes

        def start(v: ir.Value) -> ir.Value:
            return code.load(code.at(code.pointer('first'), to.mul(v, INT(columns))), lanes)

        def column(v: ir.Value) -> ir.Value:
            return code.at(code.pointer('first'), to.add(to.mul(v, INT(columns)), INT(lanes)))

        def finish(x: ir.Value, place: ir.Value) -> ir.Value:
            if len(layers) == 1:
                return to.fmul(gelu_slope(code, x), code.load(code.at(grads[1], place), lanes))
            code.store(gelu(code, x) if active else x, code.at(values[1], place))
            return gelu_slope(code, x) if active else x

        multiply(pixels, (values[0], 0), column, (grads[1], 1), widths[0], lanes, finish, start)

    def back(layer: int, pixels: ir.Value) -> None:
        """From the gradient by what a layer gives to that by what goes into it."""
        weight = code.pointer(('first_back', 'second_back')[layer])

        def finish(x: ir.Value, place: ir.Value) -> ir.Value:
            return to.fmul(x, code.load(code.at(grads[layer], place), lanes)) if active and layer else x

        multiply(
            pixels,
            (grads[layer + 1], layer + 1),
            lambda v: code.at(weight, to.mul(v, INT(lanes))),
            (grads[layer], layer),
            widths[layer + 1],
            filled[layer],
            finish,
            lambda v: code.vector(0),
        )

    def add_up(layer: int, pixels: ir.Value, sums: ir.Value) -> None:
        """The gradients by weight and bias of a layer."""
        of_weight = code.at(sums, INT(sum(sizes(widths, lanes)[: 2 * layer])))
        of_bias = code.at(of_weight, INT(widths[layer + 1] * filled[layer]))

        def add(rows: Vectors, row_step: int, columns: Vectors, step: int, targets: Vectors) -> None:
            before = [code.load(target, lanes) for target in targets]
            found = product(code, rows, columns, INT(step), pixels, before, INT(row_step))
            for x, target in zip(found, targets, strict=True):
                code.store(x, target)

        def outs(count: int, o: ir.Value, _: Vectors) -> Vectors:
            numbers = [to.add(o, INT(r)) for r in range(count)]
            rows = [code.at(grads[layer + 1], number) for number in numbers]

            def ins(n: int, j: ir.Value, _: Vectors) -> Vectors:
                starts = [to.mul(to.add(j, INT(v)), INT(lanes)) for v in range(n)]
                targets = [
                    code.at(of_weight, to.add(to.mul(number, INT(filled[layer])), start))
                    for number in numbers
                    for start in starts
                ]
                columns = [code.at(values[layer], start) for start in starts]
                add(rows, steps[layer + 1], columns, steps[layer], targets)
                return []

            blocks(filled[layer] // lanes, n_columns, ins)
            return []

        def biases(n: int, j: ir.Value, _: Vectors) -> Vectors:
            starts = [to.mul(to.add(j, INT(v)), INT(lanes)) for v in range(n)]
            columns = [code.at(grads[layer + 1], start) for start in starts]
            add([code.pointer('one')], 0, columns, steps[layer + 1], [code.at(of_bias, start) for start in starts])
            return []

        blocks(widths[layer + 1], n_rows, outs)
        blocks(filled[layer + 1] // lanes, n_rows, biases)

    def write(first: ir.Value, i: ir.Value, _: Vectors) -> Vectors:
        """The gradients by pixel i."""
        here = to.add(first, i)
        vectors = code.load_row(row(grads[0], i, 0), widths[0])
        if before == 'norm':
            unit = code.load_row(row(values[0], i, 0), widths[0])
            products = [to.fmul(*pair) for pair in zip(vectors, unit, strict=True)]
            middle, along, share = (
                code.spread(x) for x in (mean(vectors), mean(products), to.load(code.at(shares, i)))
            )
            across = [to.fsub(to.fsub(g, middle), to.fmul(x, along)) for g, x in zip(vectors, unit, strict=True)]
            vectors = [to.fmul(x, share) for x in across]
        elif before:
            pairs = zip(vectors, code.load_row(row(slopes, i, 0), widths[0]), strict=True)
            summed = [to.fmul(*pair) for pair in pairs]
            code.store_row(summed, outside('by_summed', here, INT(widths[0])), widths[0])
        code.store_row(vectors, outside('by_x', here, INT(widths[0])), widths[0])
        return []

    def part(task: ir.Value) -> None:
        start = to.mul(task, INT(OF_PART))
        sums = code.at(code.pointer('sums'), to.mul(task, INT(sum(sizes(widths, lanes)))))
        end = to.add(start, INT(OF_PART))
        end = to.select(to.icmp_signed('<', end, given['count']), end, given['count'])

        def some(first: ir.Value, _: Vectors) -> Vectors:
            left = to.sub(end, first)
            pixels = to.select(to.icmp_signed('<', left, INT(PIXELS)), left, INT(PIXELS))
            code.loop(INT(0), pixels, 1, partial(read, first))
            if active or len(layers) > 1:
                repeat(pixels)
            for layer in reversed(layers):
                add_up(layer, pixels, sums)
                back(layer, pixels)
            code.loop(INT(0), pixels, 1, partial(write, first))
            return []

        code.loop(start, end, PIXELS, some)

    code.tasks(given['parts'], part)
    return code


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
    """See `fused_linear.gradients`."""
    vector, n_pixels = lanes(), x.shape[:-1].numel()
    widths = (x.shape[-1], *map(len, weights))
    first, *last = weights
    bias = biases[0]
    if norm:
        shift = first @ norm[1]
        first, bias = first * norm[0], shift if bias is None else bias + shift
    parts = -(-n_pixels // OF_PART)
    sums = x.new_zeros(parts, sum(sizes(widths, vector)))
    by_x, by_summed = (x.new_empty(y.shape if y is not None else 0) for y in (x, gelu_summed))
    given = [
        x.new_ones(1), *by_row(x), *by_row(gelu_summed), *by_row(grad),
        packed(first, bias, vector), *(F.pad(layer, (0, -layer.shape[1] % vector)) for layer in (first, *last)),
        *[0] * (1 - len(last)), by_x, by_summed, sums, n_pixels, parts,
    ]  # fmt: skip
    before = 'norm' if norm else '' if gelu_summed is None else 'sum'
    kernel(widths, before, gelu, vector)(given, places(widths, vector)[-1], eps)

    found = sums.sum(0).split(sizes(widths, vector))
    by_weights = [part.view(len(w), -1)[:, : w.shape[1]] for part, w in zip(found[::2], weights, strict=True)]
    by_biases = [part[: len(w)] for part, w in zip(found[1::2], weights, strict=True)]
    by_norm = []
    if norm:
        by_norm = [(by_weights[0] * weights[0]).sum(0), by_biases[0] @ weights[0]]
        by_weights[0] = torch.addcmul(torch.outer(by_biases[0], norm[1]), by_weights[0], norm[0])
    return [by_x, by_summed, *by_weights, *by_biases, *by_norm]
