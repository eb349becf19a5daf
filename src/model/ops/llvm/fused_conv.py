"""3x3 convolutions by Winograd's algorithm: see `fused_conv`, whose form in LLVM this is.

F(4x4, 3x3) of A. Lavin and S. Gray, "Fast Algorithms for Convolutional Neural Networks" (CVPR 2016). Patches of 6x6
values and filters of 3x3 are taken as polynomials, and by their values at six points an axis; there a product of
polynomials is one of numbers, 36 of them for 4x4 results in place of 144. So a convolution becomes 36 products of
matrices, tiles by channels and channels by channels.

Errors grow with how unequal the powers of the points are: those here, exact in binary, make a third of the error that
0, +-1, +-2 and infinity make. A block of tiles at a time goes through all of it in the second cache of a core.
"""

import struct
from collections.abc import Callable, Sequence
from functools import partial

import torch
from llvmlite import ir
from torch import Tensor

from model.ops.llvm.code import FLOAT, INT, Code, filled_up, lanes
from model.ops.llvm.kernel_cache import compiled
from model.ops.llvm.product import BLOCKS, product

NEAR, FAR = 3 / 4, 3 / 2  # the points are 0, +-NEAR, +-FAR and infinity, in this order
SIZE, TILE, PATCH = 3, 4, 6  # sides of a filter, of what a tile gives, and of what it meets
TILES = 24  # of a block
OUTS = 64  # channels whose values at the points a block holds
MOST_OUTS = 256  # channels whose weights are in memory as values at the points
APART = 16  # numbers between the 36 matrices: a power of 2 apart they would drive each other from the cache
PLACES = ('', '_image', '_row', '_pixel')  # of a map: its address, and numbers from one image, row or pixel to the next
NAMES = (
    'weight', 'bias', 'share', *(name + part for name in ('x', 'plus', 'out') for part in PLACES),
    'zeros', 'height', 'width', 'rows', 'columns', 'tiles', 'block',
)  # fmt: skip
Vectors = list[ir.Value]
Square = Sequence[Sequence[ir.Value]]


def map_to_points(code: Code, d: Sequence[ir.Value]) -> Vectors:
    """Of six numbers of a patch: B^T d."""

    def add(x: ir.Value, factor: float, y: ir.Value) -> ir.Value:
        return code.multiply_add(x, code.vector(factor), y)

    near, far, pairs = NEAR**2, FAR**2, []
    for point, other in ((NEAR, far), (FAR, near)):
        even, odd = add(d[2], -other, d[4]), add(d[1], -other, d[3])
        pairs += [add(odd, point, even), add(odd, -point, even)]
    zero, infinity = (add(d[i + 2], -near - far, add(d[i], near * far, d[i + 4])) for i in (0, 1))
    return [zero, *pairs, infinity]


def weight_to_points(code: Code, g: Sequence[ir.Value]) -> Vectors:
    """Of three numbers of a filter: G g."""
    near, far, pairs = NEAR**2, FAR**2, []
    for point, other in ((NEAR, far), (FAR, near)):
        share = 1 / (2 * point**2 * (point**2 - other))
        even = code.multiply_add(g[2], code.vector(point**2 * share), code.to.fmul(g[0], code.vector(share)))
        pairs += [code.multiply_add(g[1], code.vector(p * share), even) for p in (point, -point)]
    return [code.to.fmul(g[0], code.vector(1 / (near * far))), *pairs, g[2]]


def from_points(code: Code, m: Sequence[ir.Value]) -> Vectors:
    """Four results of six products: A^T m."""
    to, results = code.to, []
    even, odd = ([add(m[i], m[i + 1]) for i in (1, 3)] for add in (to.fadd, to.fsub))
    for power in range(TILE):
        near, far = odd if power % 2 else even
        near = to.fmul(near, code.vector(NEAR**power))
        results.append(code.multiply_add(far, code.vector(FAR**power), near))
    return [to.fadd(m[0], results[0]), *results[1:-1], to.fadd(m[5], results[-1])]


def by_axes(transform: Callable[[Code, Sequence[ir.Value]], Vectors], code: Code, square: Square) -> Vectors:
    """A transform along both axes: the results row by row."""
    columns = [transform(code, column) for column in zip(*square, strict=True)]
    return [x for row in zip(*columns, strict=True) for x in transform(code, row)]


def square(side: int, item: Callable[[int, int], ir.Value]) -> Square:
    """Row by row."""
    return [[item(y, x) for x in range(side)] for y in range(side)]


def parts(code: Code, count: int, body: Callable[[ir.Value, int], None]) -> None:
    """`body` for vectors of `count` numbers, the last of which ends with them, given its start and its length."""
    length = min(count, code.lanes)

    def part(start: ir.Value, _: Vectors) -> Vectors:
        last = INT(count - length)
        body(code.to.select(code.to.icmp_signed('<', start, last), start, last), length)
        return []

    code.loop(INT(0), INT(count), code.lanes, part)


def matrix(ins: int, outs: int, lanes: int) -> int:
    """Numbers from a point's matrix of weights, (vectors of outputs, ins, lanes), to the next."""
    return filled_up([outs], lanes)[0] * ins + APART


def sizes(ins: int, outs: int, lanes: int) -> list[int]:
    """Numbers from tile to tile, and from point to point, of what goes into the products and of what comes out."""
    steps = filled_up([ins, min(outs, OUTS)], lanes)
    return [*steps, *(TILES * step + APART for step in steps)]


def memory(ins: int, outs: int, lanes: int) -> int:
    """Numbers that a thread needs: those of the products, and a patch or a pixel."""
    in_step, _, *matrices = sizes(ins, outs, lanes)
    return PATCH**2 * sum(matrices) + max(PATCH**2 * in_step, outs)


@compiled
def weight_kernel(ins: int, outs: int, lanes: int) -> Code:
    """Weights (outs, ins, 3, 3) at the points: see `matrix`."""
    code = Code(('weight', 'zeros', 'out'), lanes)
    to, count = code.to, min(ins, lanes)
    n_parts, n_vectors = -(-ins // lanes), -(-outs // lanes)

    def task(number: ir.Value) -> None:
        """A vector of outputs, and as many inputs; the last of these are done twice where they fill no vector."""
        vector, part = to.sdiv(number, INT(n_parts)), to.srem(number, INT(n_parts))
        first = to.select(to.icmp_signed('<', part, INT(n_parts - 1)), to.mul(part, INT(lanes)), INT(ins - count))

        def row(lane: int) -> ir.Value:
            out = to.add(to.mul(vector, INT(lanes)), INT(lane))
            there = code.at(code.pointer('weight'), code.offset((out, INT(ins * SIZE**2)), (first, INT(SIZE**2))))
            return to.select(to.icmp_signed('<', out, INT(outs)), there, code.pointer('zeros'))

        rows = [row(lane) for lane in range(lanes)]

        def transpose(place: ir.Value, count: int) -> None:
            columns = code.transposed([code.load(code.at(row, place), count) for row in rows])
            code.store_row(columns, code.at(code.memory, to.mul(place, INT(lanes))), count * lanes)

        parts(code, count * SIZE**2, transpose)

        def channel(i: ir.Value, _: Vectors) -> Vectors:
            def number(y: int, x: int) -> ir.Value:
                place = code.offset((i, INT(SIZE**2 * lanes)), (INT(SIZE * y + x), INT(lanes)))
                return code.load(code.at(code.memory, place), lanes)

            for point, value in enumerate(by_axes(weight_to_points, code, square(SIZE, number))):
                start = INT(point * matrix(ins, outs, lanes))
                place = code.offset((start,), (vector, INT(ins * lanes)), (to.add(first, i), INT(lanes)))
                code.store(value, code.at(code.pointer('out'), place))
            return []

        code.loop(INT(0), INT(count), 1, channel)

    code.tasks(INT(n_parts * n_vectors), task)
    return code


@compiled
def kernel(ins: int, outs: int, lanes: int) -> Code:
    """A convolution from and to these numbers of channels; numbers below 0 in it are multiplied by `factor`."""
    code = Code(NAMES, lanes)
    to, given = code.to, code.given
    n_rows, n_columns = BLOCKS[lanes]
    in_step, out_step, in_matrix, out_matrix = sizes(ins, outs, lanes)
    patches = code.memory
    products = code.at(patches, INT(PATCH**2 * in_matrix))
    spare = code.at(products, INT(PATCH**2 * out_matrix))  # a patch, or one pixel
    share = code.spread(to.bitcast(to.trunc(given['share'], ir.IntType(32)), FLOAT))

    def corner(first: ir.Value, i: ir.Value) -> Vectors:
        """Image, top and left of tile i of a block; the last tile fills up the last block."""
        number, last = to.add(first, i), to.sub(given['tiles'], INT(1))
        number = to.select(to.icmp_signed('<', number, last), number, last)
        line, column = to.sdiv(number, given['columns']), to.srem(number, given['columns'])
        image, row = to.sdiv(line, given['rows']), to.srem(line, given['rows'])
        return [image, to.mul(row, INT(TILE)), to.mul(column, INT(TILE))]

    def in_image(y: ir.Value, x: ir.Value) -> ir.Value:
        pairs = (y, given['height']), (x, given['width'])
        return to.and_(*(to.icmp_unsigned('<', *pair) for pair in pairs))

    def pixel(name: str, image: ir.Value, y: ir.Value, x: ir.Value) -> ir.Value:
        places = zip((image, y, x), (given[name + part] for part in PLACES[1:]), strict=True)
        return code.at(code.pointer(name), code.offset(*places))

    def bordered(image: ir.Value, top: ir.Value, left: ir.Value) -> None:
        """A patch that is not all in the image, with zeros around that, to spare memory."""

        def copy(n: ir.Value, _: Vectors) -> Vectors:
            y, x = to.add(top, to.sdiv(n, INT(PATCH))), to.add(left, to.srem(n, INT(PATCH)))
            source = to.select(in_image(y, x), pixel('x', image, y, x), code.pointer('zeros'))
            target = code.at(spare, to.mul(n, INT(in_step)))
            parts(code, ins, lambda c, count: code.store(code.load(code.at(source, c), count), code.at(target, c)))
            return []

        code.loop(INT(0), INT(PATCH**2), 1, copy)

    def read(first: ir.Value, i: ir.Value, _: Vectors) -> Vectors:
        """The patch of tile i of a block to the points."""
        image, *ends = corner(first, i)
        start = [to.sub(place, INT(SIZE // 2)) for place in ends]
        inside = to.and_(in_image(*start), in_image(*(to.add(place, INT(PATCH - 1)) for place in start)))
        with to.if_then(to.not_(inside), likely=False):
            bordered(image, *start)
        patch = to.select(inside, pixel('x', image, *start), spare)
        row, column = (
            to.select(inside, given[name], INT(step))
            for name, step in (('x_row', PATCH * in_step), ('x_pixel', in_step))
        )

        def part(channel: ir.Value, count: int) -> None:
            def values(y: int, x: int) -> ir.Value:
                place = code.offset((INT(y), row), (INT(x), column), (channel,))
                return code.padded(code.load(code.at(patch, place), count), lanes)

            place = code.offset((i, INT(in_step)), (channel,))
            for point, value in enumerate(by_axes(map_to_points, code, square(PATCH, values))):
                code.store(value, code.at(patches, to.add(place, INT(point * in_matrix))))

        parts(code, ins, part)
        return []

    def multiply(start: ir.Value, n_vectors: int, point: ir.Value, _: Vectors) -> Vectors:
        """The products at a point with vectors of weights from `start` on."""

        def columns(count: int, j: ir.Value, _: Vectors) -> Vectors:
            place = code.offset((point, INT(matrix(ins, outs, lanes))), (to.add(start, j), INT(ins * lanes)))
            weights = [code.at(code.pointer('weight'), to.add(place, INT(n * ins * lanes))) for n in range(count)]

            def rows(tile: ir.Value, _: Vectors) -> Vectors:
                row = code.at(patches, code.offset((point, INT(in_matrix)), (tile, INT(in_step))))
                values = [code.at(row, INT(n * in_step)) for n in range(n_rows)]
                zeros = [code.vector(0)] * (n_rows * count)
                found = product(code, values, weights, INT(lanes), INT(ins), zeros)
                place = code.offset((point, INT(out_matrix)), (tile, INT(out_step)), (j, INT(lanes)))
                for n in range(n_rows):
                    target = code.at(products, to.add(place, INT(n * out_step)))
                    code.store_row(found[n * count : (n + 1) * count], target, count * lanes)
                return []

            code.loop(INT(0), given['block'], n_rows, rows)
            return []

        whole = n_vectors // n_columns * n_columns
        code.loop(INT(0), INT(whole), n_columns, partial(columns, n_columns))
        if whole < n_vectors:
            columns(n_vectors - whole, INT(whole), [])
        return []

    def write(start: ir.Value, width: int, first: ir.Value, i: ir.Value, _: Vectors) -> Vectors:
        """`width` channels from `start` on of what tile i of a block gives."""
        image, top, left = corner(first, i)

        def pixels(name: str) -> Vectors:
            """Pointers to those of the tile, where the image ends to spare memory."""
            places = [(to.add(top, INT(y)), to.add(left, INT(x))) for y in range(TILE) for x in range(TILE)]
            return [to.select(in_image(*place), pixel(name, image, *place), spare) for place in places]

        targets, others = pixels('out'), pixels('plus')

        def part(channel: ir.Value, count: int) -> None:
            here = to.add(start, channel)
            place = code.offset((i, INT(out_step)), (channel,))
            bias = code.padded(code.load(code.at(code.pointer('bias'), here), count), lanes)

            def values(y: int, x: int) -> ir.Value:
                point = INT((PATCH * y + x) * out_matrix)
                return code.load(code.at(products, to.add(place, point)), lanes)

            found = by_axes(from_points, code, square(PATCH, values))
            for value, target, other in zip(found, targets, others, strict=True):
                value = to.fadd(value, bias)
                positive = to.fcmp_ordered('>', value, code.vector(0))
                value = to.select(positive, value, to.fmul(value, code.spread(code.factor)))
                plus = code.padded(code.load(code.at(other, here), count), lanes)
                value = code.multiply_add(value, share, plus)
                code.store(code.part(value, 0, count), code.at(target, here))

        parts(code, width, part)
        return []

    def block(number: ir.Value) -> None:
        first = to.mul(number, given['block'])
        code.loop(INT(0), given['block'], 1, partial(read, first))

        def channels(width: int, start: ir.Value, _: Vectors) -> Vectors:
            vectors = partial(multiply, to.sdiv(start, INT(lanes)), -(-width // lanes))
            code.loop(INT(0), INT(PATCH**2), 1, vectors)
            code.loop(INT(0), given['block'], 1, partial(write, start, width, first))
            return []

        rest = outs % OUTS
        code.loop(INT(0), INT(outs - rest), OUTS, partial(channels, OUTS))
        if rest:
            channels(rest, INT(outs - rest), [])

    blocks = to.sdiv(to.add(given['tiles'], to.sub(given['block'], INT(1))), given['block'])
    code.tasks(blocks, block)
    return code


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int, slope: float, plus: Tensor | None, factor: float
) -> Tensor:
    """See `fused_conv.forward`, for 3x3 weights and no dilation."""
    (n, ins, height, width), n_outs, vector = x.shape, len(weight), lanes()
    rows, columns = -(-height // TILE), -(-width // TILE)
    out = torch.empty(n, n_outs, height, width, memory_format=torch.channels_last, dtype=x.dtype)
    zeros = x.new_zeros(max(ins, n_outs, vector * SIZE**2))
    weight, bias = weight.contiguous(), zeros if bias is None else bias.contiguous()
    plus = plus if plus is None or plus.stride(1) == 1 else plus.contiguous(memory_format=torch.channels_last)
    n_tiles = n * rows * columns
    # Many threads with few tiles take smaller blocks, so that they end at nearly the same time.
    block = TILES if n_tiles > 8 * TILES * torch.get_num_threads() else TILES // 2
    (bits,) = struct.unpack('i', struct.pack('f', 1 if plus is None else factor))

    def places(tensor: Tensor | None, first: int = 0) -> tuple[int, ...]:
        """A map from channel `first` on as `PLACES` has it; zeros without one."""
        if tensor is None:
            return zeros.data_ptr(), 0, 0, 0
        image, _, row, pixel = tensor.stride()
        return address(tensor, first), image, row, pixel

    def address(tensor: Tensor, number: int) -> int:
        return tensor.data_ptr() + number * tensor.element_size()

    for start in range(0, n_outs, MOST_OUTS):
        outs = min(MOST_OUTS, n_outs - start)
        at_points = x.new_empty(PATCH**2 * matrix(ins, outs, vector))
        weights = address(weight, start * ins * SIZE**2), zeros, at_points
        weight_kernel(ins, outs, vector)(weights, SIZE**2 * vector**2, 0.0)
        given = [
            at_points, address(bias, start), bits,
            *places(x), *places(plus, start), *places(out, start), zeros, height, width, rows, columns, n_tiles, block,
        ]  # fmt: skip
        kernel(ins, outs, vector)(given, memory(ins, outs, vector), slope)
    return out
