"""3x3 convolutions by Winograd's algorithm, tiles of 4x4 pixels at a time in a CPU's cache: see `conv3x3`.

A. Lavin and S. Gray, "Fast Algorithms for Convolutional Neural Networks" (CVPR 2016): F(4x4, 3x3).
"""

from collections.abc import Sequence
from functools import cache, partial

import torch
from llvmlite import ir
from torch import Tensor

from model.ops.llvm.code import INT, FLOAT, Code, Kernel, filled_up, lanes
from model.ops.llvm.product import BLOCKS, product

NEAR, FAR = 3 / 4, 3 / 2
TILE, PATCH = 4, 6
TILES = 24
CHUNK = 4
Vectors = list[ir.Value]
MAPS = 'x', 'plus', 'out'
NAMES = (
    'counter', 'weight', 'bias', *(f'{name}{part}' for name in MAPS for part in ('', '_image', '_row', '_pixel')),
    'height', 'width', 'rows', 'columns', 'count',
)  # fmt: skip


def to_points(code: Code, d: Sequence[ir.Value]) -> Vectors:
    """Values at the points of six numbers: B^T d."""
    def fma(x, factor, y):
        return code.multiply_add(x, code.vector(factor), y)

    near, far = NEAR**2, FAR**2
    def ends(x, y, z):
        return fma(y, -near - far, fma(x, near * far, z))

    pairs = []
    for point, other in ((NEAR, far), (FAR, near)):
        even, odd = fma(d[2], -other, d[4]), fma(d[1], -other, d[3])
        pairs += [fma(odd, point, even), fma(odd, -point, even)]
    return [ends(d[0], d[2], d[4]), *pairs, ends(d[1], d[3], d[5])]


def from_points(code: Code, m: Sequence[ir.Value]) -> Vectors:
    """A^T m."""
    to = code.to
    near, far = to.fadd(m[1], m[2]), to.fadd(m[3], m[4])
    near_odd, far_odd = to.fsub(m[1], m[2]), to.fsub(m[3], m[4])
    def mix(power, near, far, start=None):
        first = to.fmul(near, code.vector(NEAR**power)) if start is None else code.multiply_add(near, code.vector(NEAR**power), start)
        return code.multiply_add(far, code.vector(FAR**power), first)
    return [to.fadd(to.fadd(m[0], near), far), mix(1, near_odd, far_odd), mix(2, near, far), mix(3, near_odd, far_odd, m[5])]


def weight_to_points(code: Code, g: Sequence[ir.Value]) -> Vectors:
    """G g."""
    to = code.to
    near, far = NEAR**2, FAR**2
    found = [to.fmul(g[0], code.vector(1 / (near * far)))]
    for point, other in ((NEAR, far), (FAR, near)):
        n = 2 * point**2 * (point**2 - other)
        even = code.multiply_add(g[2], code.vector(point**2 / n), to.fmul(g[0], code.vector(1 / n)))
        found += [code.multiply_add(g[1], code.vector(p / n), even) for p in (point, -point)]
    return [*found, g[2]]


def by_rows(f, code, square):
    """f over both axes of a matrix [row][column]."""
    first = [f(code, column) for column in zip(*square, strict=True)]  # [column][row']
    return [f(code, row) for row in zip(*first, strict=True)]


@cache
def weight_kernel(ins: int, outs: int, lanes: int) -> Kernel:
    """(outs, ins, 3, 3) to (36, vectors of outs, ins, lanes)."""
    code = Code(('counter', 'weight', 'zeros', 'out'), lanes)
    to = code.to
    n_vectors = -(-outs // lanes)
    source, target = code.pointer('weight'), code.pointer('out')

    def task(number: ir.Value) -> None:
        vector, block = to.sdiv(number, INT(-(-ins // lanes))), to.srem(number, INT(-(-ins // lanes)))
        first = to.mul(block, INT(lanes))
        first = to.select(to.icmp_signed('<', first, INT(max(ins - lanes, 0))), first, INT(max(ins - lanes, 0)))
        count = min(lanes, ins)
        rows = []
        for o in range(lanes):
            out = to.add(to.mul(vector, INT(lanes)), INT(o))
            rows.append(to.select(to.icmp_signed('<', out, INT(outs)), code.at(source, code.offset((out, INT(9 * ins)), (first, INT(9)))), code.pointer('zeros')))
        # 9 * count numbers of each row
        places = range(0, 9 * count, lanes)
        for p in places:
            parts = [code.padded(code.load(code.at(row, INT(p)), min(lanes, 9 * count - p)), lanes) for row in rows]
            for i, column in enumerate(code.transposed(parts)):
                code.store(column, code.at(code.memory, INT((p + i) * lanes)))

        def channel(i, _):
            g = [[code.load(code.at(code.memory, to.mul(to.add(to.mul(i, INT(9)), INT(3 * y + x)), INT(lanes))), lanes) for x in range(3)] for y in range(3)]
            for pos, value in enumerate(v for row in by_rows(weight_to_points, code, g) for v in row):
                code.store(value, code.at(target, code.offset((to.add(vector, INT(pos * n_vectors)), INT(ins * lanes)), (to.add(first, i), INT(lanes)))))
            return []
        code.loop(INT(0), INT(count), 1, channel)

    code.tasks(code.pointer('counter', INT), INT(n_vectors * -(-ins // lanes)), task)
    return Kernel(code)


def sizes(ins, outs, lanes, n_tiles=None, chunk=None):
    n_tiles, chunk = n_tiles or TILES, chunk or CHUNK
    in_step = -(-ins // lanes) * lanes
    n_vectors = -(-outs // lanes)
    chunk = min(chunk, n_vectors)
    out_step = chunk * lanes
    v_pos = n_tiles * in_step + 16
    m_pos = n_tiles * out_step + 16
    v, m = 0, PATCH**2 * v_pos
    scratch = m + PATCH**2 * m_pos
    return in_step, out_step, n_vectors, chunk, v_pos, m_pos, m, scratch, scratch + PATCH**2 * max(in_step, out_step)


@cache
def kernel(ins: int, outs: int, active: bool, added: bool, lanes: int, n_tiles, chunk) -> Kernel:
    code = Code(NAMES, lanes)
    to, given = code.to, code.given
    n_rows, n_columns = BLOCKS[lanes]
    in_step, out_step, n_vectors, chunk, v_pos, m_pos, m_place, s_place, _ = sizes(ins, outs, lanes, n_tiles, chunk)
    v, m, scratch = (code.at(code.memory, INT(p)) for p in (0, m_place, s_place))
    total = code.offset((given['rows'], given['columns']), )

    def located(first, i):
        """image, y, x of tile's upper left"""
        index = to.add(first, i)
        last = to.sub(given['tiles'], INT(1))
        index = to.select(to.icmp_signed('<', index, last), index, last)
        column, line = to.srem(index, given['columns']), to.sdiv(index, given['columns'])
        row, image = to.srem(line, given['rows']), to.sdiv(line, given['rows'])
        return image, to.mul(row, INT(TILE)), to.mul(column, INT(TILE))

    def place(name, image, y, x):
        return code.at(code.pointer(name), code.offset((image, given[f'{name}_image']), (y, given[f'{name}_row']), (x, given[f'{name}_pixel'])))

    def per_vector(width, body):
        """body(offset, count)"""
        rest = width % lanes
        def whole(c, _):
            body(c, lanes)
            return []
        code.loop(INT(0), INT(width - rest), lanes, whole)
        if rest:
            body(INT(width - rest), rest)

    def when(condition, body, otherwise):
        with to.if_else(condition) as (yes, no):
            with yes:
                body()
            with no:
                otherwise()

    def in_image(y, x):
        return to.and_(to.icmp_unsigned('<', y, given['height']), to.icmp_unsigned('<', x, given['width']))

    def read(first, i, _):
        image, top, left = located(first, i)
        top, left = to.sub(top, INT(1)), to.sub(left, INT(1))
        inside = to.and_(in_image(top, left), in_image(to.add(top, INT(PATCH - 1)), to.add(left, INT(PATCH - 1))))

        def transform(pointer, row, pixel):
            def vector(c, count):
                d = [[code.padded(code.load(code.at(pointer, code.offset((INT(y), row), (INT(x), pixel), (c,))), count), lanes) for x in range(PATCH)] for y in range(PATCH)]
                for pos, value in enumerate(z for line in by_rows(to_points, code, d) for z in line):
                    code.store(value, code.at(v, code.offset((INT(pos * v_pos),), (i, INT(in_step)), (c,))))
            per_vector(ins, vector)

        def border():
            def line(y, _):
                def pixel(x, _):
                    there = in_image(to.add(top, y), to.add(left, x))
                    p = place('x', image, to.add(top, y), to.add(left, x))
                    target = code.at(scratch, code.offset((to.add(to.mul(y, INT(PATCH)), x), INT(in_step))))
                    def copy():
                        per_vector(ins, lambda c, count: code.store(code.load(code.at(p, c), count), code.at(target, c)))
                    def clear():
                        per_vector(ins, lambda c, count: code.store(code.vector_type([0.0]*lanes), code.at(target, c)))
                    when(there, copy, clear)
                    return []
                code.loop(INT(0), INT(PATCH), 1, pixel)
                return []
            code.loop(INT(0), INT(PATCH), 1, line)
            transform(scratch, INT(PATCH * in_step), INT(in_step))
        when(inside, lambda: transform(place('x', image, top, left), given['x_row'], given['x_pixel']), border)
        return []

    def multiply(base, width, pos, _):
        """Position pos, `width` vectors from vector `base` on."""
        def columns(count, j, _):
            vector = to.add(base, j)
            place = code.offset((pos, INT(n_vectors * ins * lanes)), (vector, INT(ins * lanes)))
            pointers = [code.at(code.pointer('weight'), to.add(place, INT(n * ins * lanes))) for n in range(count)]
            def rows(r, _):
                row = code.at(v, code.offset((pos, INT(v_pos)), (r, INT(in_step))))
                found = product(code, [code.at(row, INT(n * in_step)) for n in range(n_rows)], pointers, INT(lanes), INT(ins), [code.vector(0)] * (n_rows * count))
                target = code.at(m, code.offset((pos, INT(m_pos)), (r, INT(out_step)), (j, INT(lanes))))
                for n, x in enumerate(found):
                    code.store(x, code.at(target, INT(n // count * out_step + n % count * lanes)))
                return []
            code.loop(INT(0), INT(n_tiles), n_rows, rows)
            return []
        whole = width // n_columns * n_columns
        code.loop(INT(0), INT(whole), n_columns, partial(columns, n_columns))
        if width > whole:
            columns(width - whole, INT(whole), [])
        return []

    def write(base, width, first, i, _):
        """width channels from vector base on."""
        image, top, left = located(first, i)
        inside = in_image(to.add(top, INT(TILE - 1)), to.add(left, INT(TILE - 1)))
        channel = to.mul(base, INT(lanes))

        def transform(out, plus):
            def vector(c, count):
                d = [[code.load(code.at(m, code.offset((INT((PATCH * y + x) * m_pos),), (i, INT(out_step)), (c,))), lanes) for x in range(PATCH)] for y in range(PATCH)]
                bias = code.load(code.at(code.pointer('bias'), to.add(channel, c)), lanes)
                for y, line in enumerate(by_rows(from_points, code, d)):
                    for x, value in enumerate(line):
                        value = to.fadd(value, bias)
                        if active:
                            value = code.select_greater(to.fmul(value, code.spread(code.factor)), value)
                        value = code.part(value, 0, count) if count < lanes else value
                        if added:
                            value = to.fadd(value, code.load(code.at(plus(INT(y), INT(x)), c), count))
                        code.store(value, code.at(out(INT(y), INT(x)), c))
            per_vector(width, vector)

        def pixels(name):
            base = code.at(place(name, image, top, left), channel)
            return lambda y, x: code.at(base, code.offset((y, given[f'{name}_row']), (x, given[f'{name}_pixel'])))

        def whole():
            transform(pixels('out'), pixels('plus'))

        def border():
            def in_scratch(y, x):
                return code.at(scratch, code.offset((y, INT(TILE * out_step)), (x, INT(out_step))))
            def copied(source, target):
                def line(y, _):
                    def pixel(x, _):
                        with to.if_then(in_image(to.add(top, y), to.add(left, x))):
                            per_vector(width, lambda c, count: code.store(code.load(code.at(source(y, x), c), count), code.at(target(y, x), c)))
                        return []
                    code.loop(INT(0), INT(TILE), 1, pixel)
                    return []
                code.loop(INT(0), INT(TILE), 1, line)
            if added:
                copied(pixels('plus'), in_scratch)
            transform(in_scratch, in_scratch)
            copied(in_scratch, pixels('out'))
        when(inside, whole, border)
        return []

    given['tiles'] = given['count']

    def task(number):
        first = to.mul(number, INT(n_tiles))
        code.loop(INT(0), INT(n_tiles), 1, partial(read, first))
        whole = n_vectors // chunk if outs % (chunk * lanes) else outs // (chunk * lanes)
        whole = outs // (chunk * lanes)

        def part(base, width):
            code.loop(INT(0), INT(PATCH**2), 1, partial(multiply, base, -(-width // lanes)))
            code.loop(INT(0), INT(n_tiles), 1, partial(write, base, width, first))
        def one(n, _):
            part(to.mul(n, INT(chunk)), chunk * lanes)
            return []
        code.loop(INT(0), INT(whole), 1, one)
        if outs > whole * chunk * lanes:
            part(INT(whole * chunk), outs - whole * chunk * lanes)

    code.tasks(code.pointer('counter', INT), to.sdiv(to.add(given['count'], INT(n_tiles - 1)), INT(n_tiles)), task)
    return Kernel(code)


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor, slope: float | None, plus: Tensor | None, n_tiles=24, chunk=4) -> Tensor:
    vector = lanes()
    n, ins, height, width = x.shape
    outs = len(weight)
    out = torch.empty((n, outs, height, width), memory_format=torch.channels_last)
    n_vectors = -(-outs // vector)
    counters = torch.zeros(2, dtype=torch.int64)
    transformed = x.new_empty(PATCH**2 * n_vectors * ins * vector)
    zeros = x.new_zeros(max(9 * vector, 1))
    weight_kernel(ins, outs, vector)([counters, weight, zeros, transformed], 9 * vector * vector, 0.0)
    rows, columns = -(-height // TILE), -(-width // TILE)
    bias = torch.nn.functional.pad(bias, (0, -outs % vector)) if outs % vector else bias

    def strides(t):
        return (0,) * 4 if t is None else (t, t.stride(0), t.stride(2), t.stride(3))

    run = kernel(ins, outs, slope is not None, plus is not None, vector, n_tiles, chunk)
    run([counters[1:], transformed, bias, *strides(x), *strides(plus), *strides(out), height, width, rows, columns, n * rows * columns],
        sizes(ins, outs, vector, n_tiles, chunk)[-1], slope or 0.0)
    return out
