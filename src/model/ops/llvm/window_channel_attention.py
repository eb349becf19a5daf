"""The attention between channels of OmniSR and ASID on a CPU without gradients: see `blocks.pixels.ChannelAttention`.

One kernel makes queries, keys and values, a tile at a time. Another one takes a group of pixels at a time: of queries
and keys it sums up what the group's map is made of, and then weights and projects the values. A vector holds channels.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from llvmlite import ir
from torch import Tensor

from model.ops.cached_attention import LOG2_E
from model.ops.fast import operation
from model.ops.llvm.code import FLOAT, INT, Code, filled_up, lanes
from model.ops.llvm.groups import groups_of
from model.ops.llvm.kernel_cache import compiled
from model.ops.llvm.planes import Tiles, Vectors, call, divisor
from model.ops.llvm.product import BLOCKS, packed, product

SIZE = 3  # side of the depthwise convolution
PIXELS = 64  # whose queries and keys are brought together at once
LEAST = 1e-24  # of a sum of squares


@compiled
def projections_kernel(channels: int, lanes: int) -> Code:
    """Queries, keys and values of a tile."""
    code = Tiles(('scale', 'shift', 'project_in', 'depthwise', 'out'), lanes, SIZE // 2)
    project_in, depthwise = code.pointer('project_in'), code.pointer('depthwise')
    mask, normed, projected, filtered = 0, 1, 1 + channels, 1 + 2 * channels

    def tile() -> None:
        code.read('x', channels, normed, SIZE // 2, mask)
        code.norm('scale', 'shift', channels, normed, mask, code.whole)

        def part(i: ir.Value, _: Vectors) -> Vectors:
            first = code.to.mul(i, INT(channels))
            weight = code.at(project_in, code.to.mul(first, INT(channels)))
            code.linear(weight, channels, normed, projected, (channels, channels), code.whole)
            code.depthwise(code.at(depthwise, code.to.mul(first, INT(SIZE**2))), SIZE, projected, filtered, channels)
            code.write('out', channels, filtered, of=(3 * channels, first))
            return []

        code.loop(INT(0), INT(3), 1, part)

    code.tiles(tile)
    return code


def memory(channels: int, heads: int, lanes: int) -> list[int]:
    """Numbers in a thread's memory: queries and keys, a factor of each, maps, mixed values, projected ones."""
    per_head, rows = channels // heads, BLOCKS[lanes][0]
    maps = channels * filled_up([per_head], lanes)[0]
    return [
        PIXELS * (2 * channels + lanes),
        2 * channels + lanes,
        maps,
        rows * (channels + lanes),
        rows * filled_up([channels], lanes)[0],
    ]


@compiled
def attention_kernel(channels: int, heads: int, lanes: int) -> Code:
    """What the map of a group makes of its values, projected, plus the input."""
    names = 'count', 'bases', 'places', 'pixels', 'qkv', 'temperature', 'project_out', 'x', 'out'
    code = Code(names, lanes)
    to, given, sizes = code.to, code.given, memory(channels, heads, lanes)
    pairs, factors, maps, mixed, projected = (code.at(code.memory, INT(sum(sizes[:i]))) for i in range(len(sizes)))
    per_head, (n_rows, n_vectors) = channels // heads, BLOCKS[lanes]
    pair, (of_map, of_projected) = sizes[1], filled_up([per_head, channels], lanes)  # distances of rows

    def integer(name: str, i: ir.Value) -> ir.Value:
        return to.load(code.at(code.pointer(name, INT), i))

    def in_map(h: ir.Value, key: ir.Value, query: ir.Value | int) -> ir.Value:
        column = INT(query) if isinstance(query, int) else query
        return code.at(maps, code.offset((h, INT(per_head * of_map)), (key, INT(of_map)), (column,)))

    def clear(pointer: ir.Value, count: int) -> None:
        def body(i: ir.Value, _: Vectors) -> Vectors:
            code.store(code.vector(0), code.at(pointer, i))
            return []

        code.loop(INT(0), INT(count), lanes, body)

    def few_vectors(count: int, body: Callable[[int, int], None]) -> None:
        """`body` for a few vectors of `count` numbers at a time: the first number, how many vectors."""
        whole = count // lanes
        for i in range(0, whole, n_vectors):
            body(i * lanes, min(n_vectors, whole - i))

    def bring(base: ir.Value, first: ir.Value, p: ir.Value, _: Vectors) -> Vectors:
        """Put queries and keys of a pixel behind those of the one before, and add up their squares."""
        pixel = to.add(base, integer('places', to.add(first, p)))
        row = code.load_row(code.at(code.pointer('qkv'), to.mul(pixel, INT(3 * channels))), 2 * channels)
        target = code.at(pairs, to.mul(p, INT(pair)))
        for i, x in enumerate(row):
            total = code.at(factors, INT(i * lanes))
            code.store(code.multiply_add(x, x, code.load(total, lanes)), total)
            code.store(x, code.at(target, INT(i * lanes)))
        return []

    def add_products(count: ir.Value, h: ir.Value, _: Vectors) -> Vectors:
        """Add those of keys, in rows, and queries of `count` pixels to the map of a head."""
        vectors = divisor(of_map // lanes, n_vectors + 1)
        rows = divisor(per_head, n_rows * n_vectors // vectors)
        query = code.at(pairs, to.mul(h, INT(per_head)))

        def keys(b: ir.Value, _: Vectors) -> Vectors:
            def queries(a: ir.Value, _: Vectors) -> Vectors:
                heights = [to.add(b, INT(r)) for r in range(rows)]
                columns = [to.add(a, INT(v * lanes)) for v in range(vectors)]
                places = [in_map(h, height, column) for height in heights for column in columns]
                key_rows = [code.at(query, to.add(height, INT(channels))) for height in heights]
                query_columns = [code.at(query, column) for column in columns]
                sums = [code.load(place, lanes) for place in places]
                found = product(code, key_rows, query_columns, INT(pair), count, sums, INT(pair))
                for x, place in zip(found, places, strict=True):
                    code.store(x, place)
                return []

            code.loop(INT(0), INT(of_map), vectors * lanes, queries)
            return []

        code.loop(INT(0), INT(per_head), rows, keys)
        return []

    def softmax(h: ir.Value, _: Vectors) -> Vectors:
        """Over the keys of each query, of products over the norms of both."""
        temperature = code.spread(to.fmul(to.load(code.at(code.pointer('temperature'), h)), FLOAT(LOG2_E)))
        own = code.at(factors, to.mul(h, INT(per_head)))

        def queries(a: ir.Value, _: Vectors) -> Vectors:
            factor = to.fmul(code.load(code.at(own, a), lanes), temperature)

            def scale(b: ir.Value, most: Vectors) -> Vectors:
                of_key = code.spread(to.load(code.at(own, to.add(b, INT(channels)))))
                x = to.fmul(to.fmul(code.load(in_map(h, b, a), lanes), of_key), factor)
                code.store(x, in_map(h, b, a))
                return [code.select_greater(x, *most)]

            (most,) = code.loop(INT(0), INT(per_head), 1, scale, [code.vector(-math.inf)])

            def power(b: ir.Value, total: Vectors) -> Vectors:
                x = code.exp2(to.fsub(code.load(in_map(h, b, a), lanes), most))
                code.store(x, in_map(h, b, a))
                return [to.fadd(x, *total)]

            (total,) = code.loop(INT(0), INT(per_head), 1, power, [code.vector(0)])
            share = to.fdiv(code.vector(1), total)

            def divide(b: ir.Value, _: Vectors) -> Vectors:
                code.store(to.fmul(code.load(in_map(h, b, a), lanes), share), in_map(h, b, a))
                return []

            code.loop(INT(0), INT(per_head), 1, divide)
            return []

        code.loop(INT(0), INT(of_map), lanes, queries)
        return []

    def mix(base: ir.Value, first: ir.Value, _: Vectors) -> Vectors:
        """Weight, project and write the values of a few pixels. Behind the last one of all it is that one again."""
        last = to.sub(given['pixels'], INT(1))
        numbers = [to.add(first, INT(r)) for r in range(n_rows)]
        places = (to.select(to.icmp_signed('<', p, last), p, last) for p in numbers)
        pixels = [to.add(base, integer('places', p)) for p in places]
        qkv, weights, x, out = (code.pointer(name) for name in ('qkv', 'project_out', 'x', 'out'))
        values = [code.at(qkv, code.offset((p, INT(3 * channels)), (INT(2 * channels),))) for p in pixels]
        rows = [code.at(mixed, INT(r * (channels + lanes))) for r in range(n_rows)]
        results = [code.at(projected, INT(r * of_projected)) for r in range(n_rows)]

        def multiply(
            rows: Vectors, columns: Vectors, step: int, count: int, targets: Vectors, target: ir.Value
        ) -> None:
            zeros = [code.vector(0)] * (len(rows) * len(columns))
            found = product(code, rows, columns, INT(step), INT(count), zeros)
            for i, vector in enumerate(found):
                r, v = divmod(i, len(columns))
                code.store(vector, code.at(targets[r], to.add(target, INT(v * lanes))))

        def head(h: ir.Value, _: Vectors) -> Vectors:
            start = to.mul(h, INT(per_head))
            own = [code.at(value, start) for value in values]

            def some(a: int, vectors: int) -> None:
                # What is written behind the channels of a head is not of it: the next head writes there.
                columns = [in_map(h, INT(0), a + v * lanes) for v in range(vectors)]
                multiply(own, columns, of_map, per_head, rows, to.add(start, INT(a)))

            few_vectors(of_map, some)
            return []

        def project(o: int, vectors: int) -> None:
            starts = [(o // lanes + v) * (1 + channels) * lanes + lanes for v in range(vectors)]  # behind the biases
            multiply(rows, [code.at(weights, INT(i)) for i in starts], lanes, channels, results, INT(o))

        code.loop(INT(0), INT(heads), 1, head)
        few_vectors(of_projected, project)
        for result, pixel in zip(results, pixels, strict=True):
            place = to.mul(pixel, INT(channels))
            both = zip(code.load_row(result, channels), code.load_row(code.at(x, place), channels), strict=True)
            code.store_row([to.fadd(*vectors) for vectors in both], code.at(out, place), channels)
        return []

    def group(number: ir.Value) -> None:
        base = integer('bases', number)
        clear(factors, pair)
        clear(maps, sizes[2])

        def some(first: ir.Value, _: Vectors) -> Vectors:
            left = to.sub(given['pixels'], first)
            count = to.select(to.icmp_signed('<', left, INT(PIXELS)), left, INT(PIXELS))
            code.loop(INT(0), count, 1, partial(bring, base, first))
            code.loop(INT(0), INT(heads), 1, partial(add_products, count))
            return []

        code.loop(INT(0), given['pixels'], PIXELS, some)
        for i in range(0, 2 * channels, lanes):
            square = code.select_greater(code.vector(LEAST), code.load(code.at(factors, INT(i)), lanes))
            code.store(to.fdiv(code.vector(1), code.sqrt(square)), code.at(factors, INT(i)))
        code.loop(INT(0), INT(heads), 1, softmax)
        code.loop(INT(0), given['pixels'], n_rows, partial(mix, base))

    code.tasks(given['count'], group)
    return code


@operation('window_channel_attention')
def window_channel_attention(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    epsilon: float,
    project_in: Tensor,
    depthwise: Tensor,
    temperature: Tensor,
    project_out: Tensor,
    cell: int,
    strided: bool,
) -> Tensor:
    """See `ChannelAttention`."""
    n, channels, height, width = x.shape
    heads, vector = len(temperature), lanes()
    x = x.contiguous(memory_format=torch.channels_last)
    qkv, out = x.new_empty(n, height, width, 3 * channels), torch.empty_like(x)
    weights = [weight.contiguous() for weight in (scale, shift, project_in, depthwise)]
    call(projections_kernel(channels, vector), x, SIZE // 2, 1 + 3 * channels, [*weights, qkv], factor=epsilon)
    bases, places = groups_of(n, height, width, (cell, cell), strided)
    last = packed(project_out.flatten(1), None, vector)
    given: list[Tensor | int] = [
        len(bases),
        bases,
        places,
        len(places),
        qkv,
        temperature.contiguous(),
        last,
        x,
        out,
    ]
    attention_kernel(channels, heads, vector)(given, sum(memory(channels, heads, vector)), 0.0)
    return out
