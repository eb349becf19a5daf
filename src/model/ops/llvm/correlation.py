"""The correlations of HiT-SRF's windows on a CPU without gradients: see `hitsr.Correlation`.

Queries and values are read where they are. A window is a task or, where it has many pixels, some of its rows are, and
there are two kernels: one sums up cells and channels, the other one applies these sums to the pixels. A vector holds
channels, but where the position bias is applied, pixels.
"""

from collections.abc import Callable
from functools import partial

import torch
from llvmlite import ir
from torch import Tensor

from model.ops.fast import operation
from model.ops.llvm.code import INT, Code, filled_up, lanes
from model.ops.llvm.kernel_cache import compiled
from model.ops.llvm.planes import Vectors, divisor
from model.ops.llvm.product import BLOCKS, product

NAMES = (
    'qv', 'weight', 'shift', 'bias', 'cells', 'sums', 'out', 'count', 'height', 'width', 'out_height', 'out_width',
)  # fmt: skip
BLOCK = 16  # pixels whose biases stand together: a multiple of every number of lanes
WHOLE = 256  # pixels of a window that is one task
ROWS = {16: 8, 8: 4}  # lanes: pixels at once
VECTORS = 4  # of pixels to which the bias is applied at once, at most


def parts_of(window: int, cell: int) -> int:
    """Tasks of a window: one for each row of its cells, if it is large and these have whole blocks of pixels."""
    return 1 if window**2 <= WHOLE or window * cell % BLOCK else window // cell


def memory(half: int, window: int, cell: int, lanes: int) -> list[int]:
    """Numbers in a thread's memory: both maps, what the bias gives, by channels and by pixels, a window's cells, and a
    pixel that is not there."""
    (step,) = filled_up([half], lanes)
    pixels = VECTORS * lanes
    return [half * step, half * step, half * pixels, pixels * step, (window // cell) ** 2 * step, 2 * step]


@compiled
def kernel(half: int, heads: int, window: int, cell: int, sums_up: bool, applies: bool, lanes: int) -> Code:
    """Cells and channels summed up, and these sums applied, or one of both, with the sums in tensors in between."""
    code = Code(NAMES, lanes)
    to, given, channels, side = code.to, code.given, 2 * half, window // cell
    parts, per_head, n_rows = parts_of(window, cell), half // heads, ROWS[lanes]
    cell_rows, pixels, n_cells = side // parts, window**2 // parts, side**2
    (step,) = filled_up([half], lanes)
    most_rows, most_columns = BLOCKS[lanes]
    sums_at_once = most_rows * most_columns  # that stay in registers
    starts = [min(i, half - lanes) for i in range(0, half, lanes)]  # of vectors: the last one has some numbers again
    few_starts = [starts[i : i + most_columns] for i in range(0, len(starts), most_columns)]
    sizes = memory(half, window, cell, lanes)
    spatial, channel, by_channel, by_pixel, own_cells, spare = (
        code.at(code.memory, INT(sum(sizes[:i]))) for i in range(len(sizes))
    )
    qv, bias, out = (code.pointer(name) for name in ('qv', 'bias', 'out'))
    at_once = divisor(half, sums_at_once // len(few_starts[0]))
    n_vectors = divisor(pixels // lanes, min(VECTORS, sums_at_once // per_head))

    def task(number: ir.Value) -> None:
        owner, part = to.sdiv(number, INT(parts)), to.srem(number, INT(parts))
        across = to.sdiv(given['width'], INT(window))
        row, column = to.sdiv(owner, across), to.mul(to.srem(owner, across), INT(window))
        down = to.sdiv(given['height'], INT(window))
        image, top = to.sdiv(row, down), to.mul(to.srem(row, down), INT(window))
        cells, sums = own_cells, channel
        if not (sums_up and applies):
            cells = code.at(code.pointer('cells'), to.mul(owner, INT(n_cells * step)))
            sums = code.at(code.pointer('sums'), to.mul(owner, INT(parts * half * step)))

        def pixel(y: ir.Value, x: ir.Value) -> ir.Value:
            """Pointer to one of the window."""
            place = code.offset((image, given['height'], given['width']), (to.add(top, y), given['width']), (column,))
            return code.at(qv, to.mul(to.add(place, x), INT(channels)))

        def vectors(pointer: ir.Value) -> Vectors:
            return [code.load(code.at(pointer, INT(start)), lanes) for start in starts]

        def keep(found: Vectors, pointer: ir.Value) -> None:
            for start, x in zip(starts, found, strict=True):
                code.store(x, code.at(pointer, INT(start)))

        def sum_cells(row: ir.Value, _: Vectors) -> Vectors:
            def one(column: ir.Value, _: Vectors) -> Vectors:
                def line(i: ir.Value, total: Vectors) -> Vectors:
                    def add(j: ir.Value, total: Vectors) -> Vectors:
                        y, x = (to.add(to.mul(a, INT(cell)), b) for a, b in ((row, i), (column, j)))
                        place = to.add(to.mul(i, INT(cell)), j)
                        share = code.spread(to.load(code.at(code.pointer('weight'), place)))
                        values = vectors(code.at(pixel(y, x), INT(half)))
                        return [code.multiply_add(share, v, s) for v, s in zip(values, total, strict=True)]

                    return code.loop(INT(0), INT(cell), 1, add, total)

                shift = code.spread(to.load(code.pointer('shift')))
                found = code.loop(INT(0), INT(cell), 1, line, [shift] * len(starts))
                keep(found, code.at(cells, to.mul(code.offset((row, INT(side)), (column,)), INT(step))))
                return []

            return code.loop(INT(0), INT(side), 1, one)

        def sum_channels(v: ir.Value, _: Vectors) -> Vectors:
            """Values times queries, for some channels of the values from `v` on."""
            first = to.mul(part, INT(cell_rows * cell))
            target = code.at(sums, to.mul(part, INT(half * step)))
            for some in few_starts:

                def line(y: ir.Value, total: Vectors, some: list[int] = some) -> Vectors:
                    start = pixel(y, INT(0))
                    values = [code.at(start, to.add(v, INT(half + i))) for i in range(at_once)]
                    queries = [code.at(start, INT(s)) for s in some]
                    return product(code, values, queries, INT(channels), INT(window), total, INT(channels))

                zeros = [code.vector(0)] * (at_once * len(some))
                total = code.loop(first, to.add(first, INT(cell_rows * cell)), 1, line, zeros)
                for n, x in enumerate(total):
                    i, s = divmod(n, len(some))
                    code.store(x, code.at(target, code.offset((to.add(v, INT(i)), INT(step)), (INT(some[s]),))))
            return []

        def make_channel_map(i: ir.Value, _: Vectors) -> Vectors:
            """The mean over the pixels of the window."""
            row = to.mul(i, INT(step))

            def add(p: ir.Value, total: Vectors) -> Vectors:
                found = vectors(code.at(sums, to.add(row, to.mul(p, INT(half * step)))))
                return [to.fadd(x, y) for x, y in zip(total, found, strict=True)]

            total = code.loop(INT(0), INT(parts), 1, add, [code.vector(0)] * len(starts))
            keep([to.fmul(x, code.vector(1 / window**2)) for x in total], code.at(channel, row))
            return []

        def make_spatial_map() -> None:
            """Cells times cells, of channels of the same head, by the channels of a head."""
            for first in range(0, half, at_once):
                rows = [code.at(cells, INT(first + i)) for i in range(at_once)]
                for some in few_starts:
                    columns = [code.at(cells, INT(start)) for start in some]
                    zeros = [code.vector(0)] * (at_once * len(some))
                    found = product(code, rows, columns, INT(step), INT(n_cells), zeros, INT(step))
                    for n, x in enumerate(found):
                        i, s = divmod(n, len(some))
                        head = (first + i) // per_head
                        same = [(some[s] + lane) // per_head == head for lane in range(lanes)]
                        x = to.fmul(x, code.vector_type([one / per_head for one in same]))
                        code.store(x, code.at(spatial, INT((first + i) * step + some[s])))

        def of_bias(head: ir.Value, s: ir.Value, t: ir.Value) -> ir.Value:
            """Of pixels from `t` on, and cell s."""
            number = to.add(to.mul(head, INT(window**2 // BLOCK)), to.sdiv(t, INT(BLOCK)))
            place = code.offset((number, INT(n_cells * BLOCK)), (s, INT(BLOCK)), (to.srem(t, INT(BLOCK)),))
            return code.load(code.at(bias, place), lanes)

        def apply(t: ir.Value, _: Vectors) -> Vectors:
            """Both maps to a few vectors of pixels from `t` on, of those of the part."""
            first = to.add(to.mul(part, INT(pixels)), t)
            together = divisor(heads, sums_at_once // (per_head * n_vectors))

            def some_heads(h: ir.Value, _: Vectors) -> Vectors:
                def add(s: ir.Value, total: Vectors) -> Vectors:
                    found: Vectors = []
                    for i in range(together):
                        head = to.add(h, INT(i))
                        maps = [of_bias(head, s, to.add(first, INT(n * lanes))) for n in range(n_vectors)]
                        start = code.at(cells, code.offset((s, INT(step)), (head, INT(per_head))))
                        for c in range(per_head):
                            number = code.spread(to.load(code.at(start, INT(c))))
                            found += [code.multiply_add(number, x, total[len(found) + n]) for n, x in enumerate(maps)]
                    return found

                zeros = [code.vector(0)] * (together * per_head * n_vectors)
                total = code.loop(INT(0), INT(n_cells), 1, add, zeros)
                for n, x in enumerate(total):
                    c, v = divmod(n, n_vectors)
                    row = to.add(to.mul(h, INT(per_head)), INT(c))
                    code.store(x, code.at(by_channel, code.offset((row, INT(VECTORS * lanes)), (INT(v * lanes),))))
                return []

            code.loop(INT(0), INT(heads), together, some_heads)
            for v in range(n_vectors):
                for start in starts:
                    places = [INT(((start + i) * VECTORS + v) * lanes) for i in range(lanes)]
                    found = code.transposed([code.load(code.at(by_channel, place), lanes) for place in places])
                    for i, x in enumerate(found):
                        code.store(x, code.at(by_pixel, INT((v * lanes + i) * step + start)))

            def some_pixels(p: ir.Value, _: Vectors) -> Vectors:
                queries, targets = [], []
                for i in range(n_rows):
                    number = to.add(first, to.add(p, INT(i)))
                    y, x = to.sdiv(number, INT(window)), to.srem(number, INT(window))
                    queries.append(pixel(y, x))
                    y, x = to.add(top, y), to.add(column, x)
                    place = code.offset((image, given['out_height'], given['out_width']), (y, given['out_width']), (x,))
                    known = to.and_(
                        to.icmp_signed('<', y, given['out_height']), to.icmp_signed('<', x, given['out_width'])
                    )
                    targets.append(to.select(known, code.at(out, to.mul(place, INT(channels))), spare))
                values = [code.at(query, INT(half)) for query in queries]
                for some in few_starts:
                    begin = [
                        code.load(code.at(by_pixel, code.offset((to.add(p, INT(i)), INT(step)), (INT(s),))), lanes)
                        for i in range(n_rows)
                        for s in some
                    ]
                    zeros = [code.vector(0)] * len(begin)
                    for rows, matrix, start, behind in (
                        (queries, spatial, begin, 0),
                        (values, channel, zeros, half),
                    ):
                        columns = [code.at(matrix, INT(s)) for s in some]
                        found = product(code, rows, columns, INT(step), INT(half), start)
                        for n, x in enumerate(found):
                            i, s = divmod(n, len(some))
                            code.store(x, code.at(targets[i], INT(behind + some[s])))
                return []

            code.loop(INT(0), INT(n_vectors * lanes), n_rows, some_pixels)
            return []

        if sums_up:
            first = to.mul(part, INT(cell_rows))
            code.loop(first, to.add(first, INT(cell_rows)), 1, sum_cells)
            code.loop(INT(0), INT(half), at_once, sum_channels)
        if applies:
            code.loop(INT(0), INT(half), 1, make_channel_map)
            make_spatial_map()
            code.loop(INT(0), INT(pixels), n_vectors * lanes, apply)

    code.tasks(given['count'], task)
    return code


@operation('correlation')
def correlated(
    qv: Tensor, weight: Tensor, shift: Tensor, bias: Tensor, window: int, cell: int, height: int, width: int
) -> Tensor:
    """An operation with a name, by which its time is told from that of others."""
    n, channels, whole_height, whole_width = qv.shape
    half, vector = channels // 2, lanes()
    count, parts = n * whole_height * whole_width // window**2, parts_of(window, cell)
    (step,) = filled_up([half], vector)
    out = qv.new_empty(n, height * width, channels)
    tensors: list[int | Tensor] = [
        qv.contiguous(memory_format=torch.channels_last), weight.contiguous(), shift, bias.contiguous(),
        qv.new_empty(0 if parts == 1 else count * (window // cell) ** 2 * step),
        qv.new_empty(0 if parts == 1 else count * parts * half * step),
        out,
    ]  # fmt: skip
    given = [*tensors, count * parts, whole_height, whole_width, height, width]
    run = partial(kernel, half, len(bias), window, cell)
    size = sum(memory(half, window, cell, vector))
    for phase in [(True, True)] if parts == 1 else [(True, False), (False, True)]:
        run(*phase, vector)(given, size, 0.0)
    return out


def correlation(
    qv: Tensor,
    weight: Tensor,
    shift: Tensor,
    pos: Callable[[int], Tensor],
    window: int,
    cell: int,
    height: int,
    width: int,
) -> Tensor:
    """See `hitsr.Correlation.correlated`; `pos` is its position bias."""
    return correlated(qv, weight, shift, pos(BLOCK), window, cell, height, width)
