"""Pixels and a dictionary of tokens on a CPU: `token_dictionary.read` and `refine` without gradients.

A few pixels at a time are normalised, multiplied, compared with the tokens, and written. For the refinement a task is
some thousand pixels, whose weights are made, a few hundred at a time, in the cache and multiplied with them.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch
from llvmlite import ir
from torch import Tensor

from model.ops.cached_attention import LOG2_E
from model.ops.llvm.code import BIT, FLOAT, INT, Code, filled_up, lanes
from model.ops.llvm.fused_linear import layer_norm
from model.ops.llvm.kernel_cache import compiled
from model.ops.llvm.planes import divisor
from model.ops.llvm.product import BLOCKS, Rows, layer, packed, product

LEAST_LENGTH = 1e-12  # of a query, as of torch.nn.functional.normalize
PARTS = 32  # in which pixels are added up, at most
LEAST_PART = 512  # pixels of a part, at least, but for the last one
AT_ONCE = 128  # pixels whose weights are in the cache
READ = 'count', 'x', 'scale', 'shift', 'linear', 'query', 'keys', 'values', 'qkv', 'out', 'map', 'category'
MOMENTS = 'parts', 'count', 'map', 'moments'
REFINE = 'parts', 'count', 'map', 'x', 'factors', 'sums'


@compiled
def read_kernel(channels: int, outputs: int, reduced: int, tokens: int, lanes: int) -> Code:
    """See `read`; to what `keys` are multiplied with 2 is the base of the powers."""
    code = Rows(READ, lanes)
    to, pointer = code.to, code.pointer
    wide, low = filled_up((channels, reduced), lanes)
    normed, queries = code.memory, code.at(code.memory, INT(code.count * wide))
    powers = code.at(queries, INT(code.count * low))
    numbers = [INT(i) for i in range(code.count)]

    def norm(i: ir.Value) -> None:
        scale, shift = (code.load_row(pointer(name), channels) for name in ('scale', 'shift'))
        vectors = layer_norm(code, code.load_row(code.row_of('x', channels, i), channels), channels, scale, shift)
        code.store_row(vectors, code.row(normed, wide, i), wide)

    def to_unit(i: ir.Value) -> None:
        """Queries of length 1."""
        row = code.row(queries, low, i)
        vectors = code.load_row(row, low)
        total = code.vector(0)
        for x in vectors:
            total = code.multiply_add(x, x, total)
        length = code.sqrt(code.sum(total))
        length = to.select(to.fcmp_ordered('<', length, FLOAT(LEAST_LENGTH)), FLOAT(LEAST_LENGTH), length)
        share = code.spread(to.fdiv(FLOAT(1), length))
        code.store_row([to.fmul(x, share) for x in vectors], row, low)

    def share_out(i: ir.Value) -> None:
        """Powers that sum to 1, and the first of the greatest."""
        row = code.row(powers, tokens, i)
        vectors = code.load_row(row, tokens)
        total, most = vectors[0], vectors[0]
        for x in vectors[1:]:
            total, most = to.fadd(total, x), code.select_greater(most, x)
        share = code.spread(to.fdiv(FLOAT(1), code.sum(total)))
        vectors = [to.fmul(x, share) for x in vectors]
        for target in (row, code.row_of('map', tokens, i)):
            code.store_row(vectors, target, tokens)
        most = code.spread(code.fold(most, code.select_greater))
        most, category, bits = to.fmul(most, share), INT(0), ir.IntType(lanes)
        for n, x in reversed([*enumerate(vectors)]):
            found = to.bitcast(to.fcmp_ordered('==', x, most), bits)
            place = to.add(INT(n * lanes), to.zext(to.cttz(found, BIT(1)), INT))
            category = to.select(to.icmp_signed('!=', found, bits(0)), place, category)
        to.store(category, code.at(pointer('category', INT), code.number(i)))

    def write(target: Callable[[ir.Value], ir.Value], change: Callable[[ir.Value], ir.Value] = lambda x: x):
        """What a layer gives to rows at `target`."""

        def some(j: ir.Value, width: int, found: list[ir.Value]) -> None:
            vectors = -(-width // lanes)
            for r, i in enumerate(numbers):
                part = [change(x) for x in found[r * vectors : (r + 1) * vectors]]
                code.store_row(part, code.at(target(i), to.mul(j, INT(lanes))), width)

        return some

    def start(j: ir.Value, width: int) -> list[ir.Value]:
        """The pixels."""
        rows = (code.at(code.row_of('x', channels, i), to.mul(j, INT(lanes))) for i in numbers)
        return [x for row in rows for x in code.load_row(row, width)]

    def block() -> None:
        code.each(norm)
        rows = [code.row(normed, wide, i) for i in numbers]
        layer(code, rows, channels, pointer('linear'), outputs, write(partial(code.row_of, 'qkv', outputs)))
        layer(code, rows, channels, pointer('query'), low, write(partial(code.row, queries, low)))
        code.each(to_unit)
        rows = [code.row(queries, low, i) for i in numbers]
        layer(code, rows, reduced, pointer('keys'), tokens, write(partial(code.row, powers, tokens), code.exp2))
        code.each(share_out)
        rows = [code.row(powers, tokens, i) for i in numbers]
        layer(code, rows, tokens, pointer('values'), channels, write(partial(code.row_of, 'out', channels)), start)

    code.blocks(block)
    return code


@compiled
def moments_kernel(tokens: int, lanes: int) -> Code:
    """Of each part of the pixels the mean similarity to each token, squared differences from it, least and greatest."""
    code = Code(MOMENTS, lanes)
    to, given, rows = code.to, code.given, code.pointer('map')

    def part(number: ir.Value) -> None:
        first, stop = code.part_of(given['count'], number)
        share = code.spread(to.fdiv(FLOAT(1), to.sitofp(to.sub(stop, first), FLOAT)))
        moments = code.at(code.pointer('moments'), to.mul(number, INT(4 * tokens)))

        def column(start: ir.Value, _: Sequence[ir.Value]) -> list[ir.Value]:
            def x(i: ir.Value) -> ir.Value:
                return code.load(code.at(rows, code.offset((i, INT(tokens)), (start,))), lanes)

            def add(i: ir.Value, found: list[ir.Value]) -> list[ir.Value]:
                total, least, greatest = found
                return [to.fadd(total, x(i)), code.select_less(x(i), least), code.select_greater(x(i), greatest)]

            def add_square(i: ir.Value, found: list[ir.Value]) -> list[ir.Value]:
                centred = to.fsub(x(i), mean)
                return [code.multiply_add(centred, centred, found[0])]

            limits = [code.vector(sign * math.inf) for sign in (1, -1)]
            total, *extremes = code.loop(first, stop, 1, add, [code.vector(0), *limits])
            mean = to.fmul(total, share)
            squares = code.loop(first, stop, 1, add_square, [code.vector(0)])
            for n, vector in enumerate((mean, *squares, *extremes)):
                code.store(vector, code.at(moments, to.add(INT(n * tokens), start)))
            return []

        code.loop(INT(0), INT(tokens), lanes, column)

    code.tasks(given['parts'], part)
    return code


@compiled
def refine_kernel(channels: int, tokens: int, lanes: int) -> Code:
    """Of each part of the pixels, for each token, the sum of 2^(factor (similarity - extreme)), and of that times x.

    The sums are rows of `channels` in whole vectors, behind which a vector has the other sum in each number.
    """
    code = Code(REFINE, lanes)
    to, given = code.to, code.given
    (wide,) = filled_up([channels], lanes)
    row, weights = wide + lanes, code.at(code.memory, INT(AT_ONCE * (wide + lanes)))
    few, at_once = divisor(tokens, BLOCKS[lanes][0]), BLOCKS[lanes][1]
    factors = code.pointer('factors')

    def part(number: ir.Value) -> None:
        first, stop = code.part_of(given['count'], number)
        sums = code.at(code.pointer('sums'), to.mul(number, INT(tokens * row)))

        def some(start: ir.Value, _: Sequence[ir.Value]) -> list[ir.Value]:
            left = to.sub(stop, start)
            count = to.select(to.icmp_signed('<', left, INT(AT_ONCE)), left, INT(AT_ONCE))

            def weigh(i: ir.Value, _: Sequence[ir.Value]) -> list[ir.Value]:
                pixel = to.add(start, i)
                x = code.load_row(code.at(code.pointer('x'), to.mul(pixel, INT(channels))), channels)
                code.store_row([*x, code.vector(1)], code.at(code.memory, to.mul(i, INT(row))), row)
                similarities = code.at(code.pointer('map'), to.mul(pixel, INT(tokens)))
                for n in range(0, tokens, lanes):
                    factor, extreme = (code.load(code.at(factors, INT(k * tokens + n)), lanes) for k in (0, 1))
                    power = to.fmul(to.fsub(code.load(code.at(similarities, INT(n)), lanes), extreme), factor)
                    code.store(code.exp2(power), code.at(weights, code.offset((i, INT(tokens)), (INT(n),))))
                return []

            def add(vectors: int, t: ir.Value, j: ir.Value, _: Sequence[ir.Value]) -> list[ir.Value]:
                numbers = [code.at(weights, to.add(t, INT(n))) for n in range(few)]
                columns = [code.at(code.memory, to.add(j, INT(n * lanes))) for n in range(vectors)]
                places = [
                    code.at(sums, code.offset((to.add(t, INT(n)), INT(row)), (j,), (INT(v * lanes),)))
                    for n in range(few)
                    for v in range(vectors)
                ]
                found = [code.load(place, lanes) for place in places]
                found = product(code, numbers, columns, INT(row), count, found, INT(tokens))
                for x, place in zip(found, places, strict=True):
                    code.store(x, place)
                return []

            def of_tokens(t: ir.Value, _: Sequence[ir.Value]) -> list[ir.Value]:
                whole = row // (at_once * lanes) * at_once * lanes
                code.loop(INT(0), INT(whole), at_once * lanes, partial(add, at_once, t))
                if row > whole:
                    add((row - whole) // lanes, t, INT(whole), [])
                return []

            code.loop(INT(0), count, 1, weigh)
            code.loop(INT(0), INT(tokens), few, of_tokens)
            return []

        code.loop(first, stop, AT_ONCE, some)

    code.tasks(given['parts'], part)
    return code


def read(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    query_weight: Tensor,
    query_bias: Tensor | None,
    keys: Tensor,
    values: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `token_dictionary.read`."""
    (n, length, channels), tokens, size = x.shape, keys.shape[1], lanes()
    outputs, reduced = len(qkv_weight), len(query_weight)
    qkv, out, similarity = (x.new_empty(n, length, width) for width in (outputs, channels, tokens))
    category = torch.empty(n, length, dtype=torch.int64)
    run = read_kernel(channels, outputs, reduced, tokens, size)
    (wide, low), rows = filled_up((channels, reduced), size), BLOCKS[size][0]
    layers = [packed(*pair, size) for pair in ((qkv_weight, qkv_bias), (query_weight, query_bias))]
    shared = [scale.contiguous(), shift.contiguous(), *layers]
    for image in zip(x.contiguous(), keys, values, qkv, out, similarity, category, strict=True):
        pixels, key, value, *results = image
        own = [packed(key * LOG2_E, None, size), packed(value.mT, None, size)]
        run([length, pixels, *shared, *own, *results], rows * (wide + low + tokens), eps)
    return qkv, out, similarity, category


def refine(
    x: Tensor, tokens: Tensor, similarity: Tensor, scale: Tensor, shift: Tensor, eps: float, share: Tensor
) -> Tensor:
    """See `token_dictionary.refine`. What is added to all logits of a token changes no weight."""
    (n, count, channels), length, size = tokens.shape, x.shape[1], lanes()
    (wide,) = filled_up([channels], size)
    parts = max(1, min(PARTS, length // LEAST_PART))
    ends = [length * i // parts for i in range(parts + 1)]
    counts = x.new_tensor([[stop - start] for start, stop in pairwise(ends)])
    moved = x.new_empty(n, count, channels)
    for pixels, rows, target in zip(x.contiguous(), similarity.contiguous(), moved, strict=True):
        moments = x.new_empty(parts, 4, count)
        moments_kernel(count, size)([parts, length, rows, moments], 0, 0.0)
        means, squares, least, greatest = moments.unbind(1)
        mean = (means * counts).sum(0) / length
        variance = (squares + counts * (means - mean).square()).sum(0) / length
        gain = scale * (variance + eps).rsqrt()
        factors = torch.stack((gain * LOG2_E, torch.where(gain < 0, least.amin(0), greatest.amax(0))))
        sums = x.new_zeros(parts, count, wide + size)
        refine_kernel(channels, count, size)(
            [parts, length, rows, pixels, factors, sums], AT_ONCE * (wide + size + count), 0.0
        )
        total = sums.sum(0)
        torch.div(total[:, :channels], total[:, wide : wide + 1], out=target)
    return torch.lerp(moved, tokens, share)
