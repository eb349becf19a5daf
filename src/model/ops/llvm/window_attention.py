"""The attention between pixels of OmniSR and ASID on a CPU without gradients, with what is around it.

A group of pixels is read where it is in a map, normalised, attends, and is written, plus the input. A vector holds a
channel of as many pixels as it has lanes. Of a map of the attention a few columns are in the cache, a query each.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from llvmlite import ir
from torch import Tensor

from model.ops.cached_attention import LOG2_E
from model.ops.fast import operation
from model.ops.llvm.code import INT, Code, Kernel, filled_up, lanes
from model.ops.llvm.groups import Groups, groups_of
from model.ops.llvm.kernel_cache import compiled
from model.ops.llvm.planes import Planes, Vectors, divisor, pixels_in_order
from model.ops.llvm.product import BLOCKS, product

NAMES = 'zeros', 'count', 'bases', 'places', 'plane', 'x', 'x_pixel'
KEYS = {16: 8, 8: 4}  # lanes: rows of logits at once
NORMED = 4  # vectors that `Planes.norm` takes at once


class Group(Planes):
    """Code for a group of `size` pixels: see `llvm.groups`."""

    def __init__(self, names: Sequence[str], lanes: int, size: int) -> None:
        super().__init__((*NAMES, *names), lanes)
        self.size = size
        (self.row,) = filled_up([size], lanes)  # of a map of the attention
        self.whole = INT(self.row)
        self.count = divisor(self.row // lanes, BLOCKS[lanes][1])  # vectors of queries at once

    def each(self, body: Callable[[ir.Value], None]) -> None:
        """Write the rest: `body` for the number of every group."""

        def group(number: ir.Value) -> None:
            self.base = self.to.load(self.at(self.pointer('bases', INT), number))
            body(number)

        self.tasks(self.given['count'], group)

    def pixels(self, border: int, body: Callable[[ir.Value, Vectors, Vectors], None]) -> None:
        """See `Planes`. Those that fill up the last vector are some other one of the group, and not written."""
        to = self.to

        def vector(j: ir.Value, _: Vectors) -> Vectors:
            places = [self.to.add(j, INT(lane)) for lane in range(self.lanes)]
            inside = [to.icmp_signed('<', place, INT(self.size)) for place in places]
            numbers = []
            for place, known in zip(places, inside, strict=True):
                pixel = to.load(self.at(self.pointer('places', INT), to.select(known, place, INT(0))))
                numbers.append(to.add(self.base, pixel))
            body(j, numbers, inside)
            return []

        self.loop(INT(0), INT(self.size), self.lanes, vector)

    def queries(self, body: Callable[[Vectors], None]) -> None:
        """`body` for the places of a few vectors of queries at a time."""
        self.lines(self.whole, self.count, body)

    def from_on(self, first: ir.Value, count: int) -> Vectors:
        return [self.to.add(first, INT(i)) for i in range(count)]

    def softmax(
        self, queries: ir.Value, keys: ir.Value, channels: int, biases: ir.Value, places: Vectors, target: ir.Value
    ) -> Vectors:
        """Powers of 2 for a few vectors of queries, a row of `count` vectors a key, to `target`; 1 over their sums.

        Args:
            queries, keys: numbers of the first planes.
            channels: planes of each.
            biases: pointer to rows of biases, a row a key.
            places: of the queries.
        """
        to, few, step = self.to, divisor(self.size, KEYS[self.lanes]), self.count * self.lanes
        factor = self.vector(channels**-0.5 * LOG2_E)
        columns = [self.plane(queries, place) for place in places]
        zeros = [self.vector(0)] * (few * self.count)

        def row(j: ir.Value) -> Vectors:
            start = self.at(target, to.mul(j, INT(step)))
            return [self.at(start, INT(v * self.lanes)) for v in range(self.count)]

        def logits(first: ir.Value, most: Vectors) -> Vectors:
            numbers = self.from_on(first, few)
            rows = [self.plane(keys, j) for j in numbers]
            found = product(self, rows, columns, self.given['plane'], INT(channels), zeros, self.given['plane'])
            for r, j in enumerate(numbers):
                bias = self.at(biases, to.mul(j, INT(self.row)))
                for v, (place, pointer) in enumerate(zip(places, row(j), strict=True)):
                    x = to.fmul(self.load(self.at(bias, place), self.lanes), self.vector(LOG2_E))
                    x = self.multiply_add(found[r * self.count + v], factor, x)
                    self.store(x, pointer)
                    most = [self.select_greater(x, y) if i == v else y for i, y in enumerate(most)]
            return most

        most = self.loop(INT(0), INT(self.size), few, logits, [self.vector(-math.inf)] * self.count)

        def powers(j: ir.Value, sums: Vectors) -> Vectors:
            found = [self.exp2(to.fsub(self.load(x, self.lanes), y)) for x, y in zip(row(j), most, strict=True)]
            for x, pointer in zip(found, row(j), strict=True):
                self.store(x, pointer)
            return [to.fadd(*pair) for pair in zip(sums, found, strict=True)]

        sums = self.loop(INT(0), INT(self.size), 1, powers, [self.vector(0)] * self.count)
        return [to.fdiv(self.vector(1), total) for total in sums]

    def mix(
        self, values: ir.Value, channels: int, columns: Vectors, step: int, places: Vectors, target: ir.Value,
        shares: Vectors,
    ) -> None:  # fmt: skip
        """Weight planes from `values` on by `columns`, rows of which are `step` apart, to those from `target` on."""
        to, few = self.to, divisor(channels, BLOCKS[self.lanes][0])
        zeros = [self.vector(0)] * (few * self.count)

        def some(first: ir.Value, _: Vectors) -> Vectors:
            numbers = self.from_on(first, few)
            rows = [self.plane(to.add(values, i), INT(0)) for i in numbers]
            found = product(self, rows, columns, INT(step), INT(self.size), zeros)
            for i, x in enumerate(found):
                r, v = divmod(i, self.count)
                self.store(to.fmul(x, shares[v]), self.plane(to.add(target, numbers[r]), places[v]))
            return []

        self.loop(INT(0), INT(channels), few, some)


@compiled
def heads_kernel(channels: int, heads: int, size: int, lanes: int) -> Code:
    """Attention of several heads, projected, plus the input."""
    code = Group(('scale', 'shift', 'project_in', 'biases', 'project_out', 'out'), lanes, size)
    to, per_head, normed, query = code.to, channels // heads, 0, channels
    powers = code.plane(4 * channels, INT(0))
    columns = [code.at(powers, INT(v * lanes)) for v in range(code.count)]

    def head(h: ir.Value, _: Vectors) -> Vectors:
        first = to.mul(h, INT(per_head))
        q, k, v = (to.add(first, INT((i + 1) * channels)) for i in range(3))
        biases = code.at(code.pointer('biases'), to.mul(h, INT(size * code.row)))

        def queries(places: Vectors) -> None:
            shares = code.softmax(q, k, per_head, biases, places, powers)
            code.mix(v, per_head, columns, code.count * lanes, places, first, shares)

        code.queries(queries)
        return []

    def group(_: ir.Value) -> None:
        code.read('x', channels, normed, 0)
        code.prefetch_pixels('out', channels)
        code.norm('scale', 'shift', channels, normed, None, code.whole)
        weight = code.pointer('project_in')
        code.linear(weight, channels, normed, query, (channels, 3 * channels), code.whole)
        code.loop(INT(0), INT(heads), 1, head)
        code.linear(code.pointer('project_out'), channels, 0, query, (channels, channels), code.whole)
        code.write('out', channels, query, 'x')

    code.each(group)
    return code


@compiled
def map_kernel(channels: int, size: int, lanes: int) -> Code:
    """The map of one head."""
    code = Group(('scale', 'shift', 'weight', 'biases', 'out'), lanes, size)
    normed, query = 0, channels
    powers = code.plane(2 * channels, INT(0))

    def group(number: ir.Value) -> None:
        code.read('x', channels, normed, 0)
        code.norm('scale', 'shift', channels, normed, None, code.whole)
        code.linear(code.pointer('weight'), channels, normed, query, (channels, channels), code.whole)
        out = code.at(code.pointer('out'), code.to.mul(number, INT(size * code.row)))

        def queries(places: Vectors) -> None:
            shares = code.softmax(INT(query), INT(normed), channels, code.pointer('biases'), places, powers)

            def row(j: ir.Value, _: Vectors) -> Vectors:
                for v, (place, share) in enumerate(zip(places, shares, strict=True)):
                    x = code.load(code.at(powers, code.offset((j, INT(code.count * lanes)), (INT(v * lanes),))), lanes)
                    code.store(code.to.fmul(x, share), code.at(out, code.offset((j, INT(code.row)), (place,))))
                return []

            code.loop(INT(0), INT(size), 1, row)

        code.queries(queries)

    code.each(group)
    return code


@compiled
def mix_kernel(channels: int, size: int, lanes: int) -> Code:
    """What a given map makes of values, plus the input."""
    code = Group(('scale', 'shift', 'weight', 'maps', 'out'), lanes, size)
    normed, value, mixed = 0, channels, 2 * channels

    def group(number: ir.Value) -> None:
        code.read('x', channels, normed, 0)
        code.prefetch_pixels('out', channels)
        code.norm('scale', 'shift', channels, normed, None, code.whole)
        code.linear(code.pointer('weight'), channels, normed, value, (channels, channels), code.whole)
        given = code.at(code.pointer('maps'), code.to.mul(number, INT(size * code.row)))

        def queries(places: Vectors) -> None:
            columns = [code.at(given, place) for place in places]
            ones = [code.vector(1)] * code.count
            code.mix(INT(value), channels, columns, code.row, places, INT(mixed), ones)

        code.queries(queries)
        code.write('out', channels, mixed, 'x')

    code.each(group)
    return code


def padded(columns: Tensor, lanes: int) -> Tensor:
    """(..., T, T) with a column after the other, as rows of whole vectors."""
    rows = columns.mT
    return F.pad(rows, (0, -rows.shape[-1] % lanes)).contiguous()


def call(
    kernel: Kernel,
    x: Tensor,
    groups: Groups,
    planes: int,
    arguments: Sequence[Tensor],
    epsilon: float,
    lanes: int,
) -> None:
    """Run a kernel for groups of pixels of maps (N, C, H, W) that needs so many planes."""
    size = len(groups.places)
    plane = filled_up([size], NORMED * lanes)[0] + 16  # planes a power of 2 apart would drive each other from the cache
    geometry = x.new_zeros(x.shape[1]), len(groups.bases), *groups, plane, *pixels_in_order(x)
    kernel([*geometry, *arguments], planes * plane + size * BLOCKS[lanes][1] * lanes, epsilon)


@operation('window_attention')
def window_attention(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    epsilon: float,
    project_in: Tensor,
    biases: Tensor,
    project_out: Tensor,
    cell: Sequence[int],
    strided: bool,
) -> Tensor:
    """See `omnisr.WindowAttention`."""
    channels, (heads, size, _), vector = x.shape[1], biases.shape, lanes()
    out = torch.empty_like(x, memory_format=torch.channels_last)
    scale, shift, project_in, project_out = (t.contiguous() for t in (scale, shift, project_in, project_out))
    given = [scale, shift, project_in, padded(biases, vector), project_out, out]
    call(
        heads_kernel(channels, heads, size, vector),
        x,
        groups_like(x, cell, strided),
        4 * channels,
        given,
        epsilon,
        vector,
    )
    return out


@operation('window_attention_map')
def window_attention_map(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    epsilon: float,
    weight: Tensor,
    biases: Tensor,
    cell: Sequence[int],
    strided: bool,
) -> Tensor:
    """See `asid.WindowAttention`."""
    channels, size, vector = x.shape[1], biases.shape[-1], lanes()
    groups = groups_like(x, cell, strided)
    out = x.new_empty(len(groups.bases), size, filled_up([size], vector)[0])
    given = [*(t.contiguous() for t in (scale, shift, weight)), padded(biases, vector), out]
    call(map_kernel(channels, size, vector), x, groups, 2 * channels, given, epsilon, vector)
    return out[..., :size].mT


@operation('window_attention_mix')
def window_attention_mix(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    epsilon: float,
    weight: Tensor,
    maps: Tensor,
    cell: Sequence[int],
    strided: bool,
) -> Tensor:
    """See `asid.mix`."""
    channels, size, vector = x.shape[1], maps.shape[-1], lanes()
    (rows,) = filled_up([size], vector)
    if maps.stride() != (size * rows, 1, rows):
        maps = padded(maps, vector)
    out = torch.empty_like(x, memory_format=torch.channels_last)
    given = [*(t.contiguous() for t in (scale, shift, weight)), maps, out]
    call(mix_kernel(channels, size, vector), x, groups_like(x, cell, strided), 3 * channels, given, epsilon, vector)
    return out


def groups_like(x: Tensor, cell: Sequence[int], strided: bool) -> Groups:
    """Of maps (N, C, H, W)."""
    n, _, *sides = x.shape
    return groups_of(n, *sides, tuple(cell), strided)
