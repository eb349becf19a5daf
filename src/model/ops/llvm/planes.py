"""Chains of layers on maps in channels_last memory, a few pixels at a time, in a CPU's cache: written in LLVM.

They are read into planes, one a channel, so that a layer is a loop over one line of pixels, vector by vector. A tile of
the image has a border of the pixels around it, zeros outside the image. Its rows follow one another without gaps, and
no width wastes much of a vector: what stands at the border is anything, and not written. A filter reads at fixed
distances, and puts its result where the upper left of what it met was.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from itertools import pairwise, product
from typing import NamedTuple

import numpy as np
import torch
from llvmlite import ir
from torch import Tensor

from model.ops.llvm.code import FLOAT, INT, Code, Kernel
from model.ops.llvm.product import BLOCKS
from model.ops.llvm.product import product as multiply

GEOMETRY = ('zeros', 'tiles', 'count', 'height', 'width', 'plane', 'x', 'x_pixel')
ROWS = 16  # of a tile
AT_ONCE = 4  # rows of a filter
KEPT = 9  # numbers of a filter that stay in registers
VALUES = 2**16  # of a tile of a map
BEHIND = 96  # values that may be read behind the end of a plane: the vectors of a loop
Vectors = list[ir.Value]
Start = Callable[[ir.Value, ir.Value], ir.Value]  # of the number of a plane, and a place
Finish = Callable[[ir.Value, ir.Value, ir.Value], ir.Value]  # of these, and a vector


def divisor(count: int, most: int) -> int:
    """The greatest that is not above `most`."""
    return max(n for n in range(1, most + 1) if count % n == 0)


class Planes(Code):
    """Code for pixels whose planes are in the memory of a thread.

    Of what it is given `zeros` are as many numbers as a map has channels, `plane` says how far planes are apart, and
    `x_pixel` how far pixels of the map `x`, which may be some channels of a larger one; pixels of others follow one
    another.

    Attributes:
        next_row: pixels from one to the one below it, where rows of the map are written one after the other.
    """

    next_row: ir.Value | None = None

    def pixels(self, border: int, body: Callable[[ir.Value, Vectors, Vectors], None]) -> None:
        """`body` for every vector of pixels, and of `border` around them.

        It is given the place of the first one in a plane, the numbers of all in a map, and which of them there are.
        """
        raise NotImplementedError

    def in_map(self, tensor: str, step: int, numbers: Vectors) -> Vectors:
        """Pointers to pixels of a map, `step` numbers apart if it is not `x`."""
        apart = self.given['x_pixel'] if tensor == 'x' else INT(step)
        return [self.at(self.pointer(tensor), self.to.mul(number, apart)) for number in numbers]

    def plane(self, index: ir.Value | int, place: ir.Value) -> ir.Value:
        """Pointer to a place in a plane."""
        number = INT(index) if isinstance(index, int) else index
        return self.at(self.memory, self.offset((number, self.given['plane']), (place,)))

    def value(self, first: int, i: ir.Value, place: ir.Value) -> ir.Value:
        """A vector of plane `first` + i."""
        return self.load(self.plane(self.to.add(INT(first), i), place), self.lanes)

    def zero(self, *_: ir.Value) -> ir.Value:
        return self.vector(0)

    def number(self, pointer: ir.Value, offset: ir.Value | int) -> ir.Value:
        """A number in memory, in all lanes."""
        return self.spread(self.to.load(self.at(pointer, offset if isinstance(offset, ir.Value) else INT(offset))))

    def parts(self, channels: int, body: Callable[[ir.Value, int], None]) -> None:
        """`body` for the channels of a pixel, as many at a time as a vector holds: the first one, and how many."""
        rest = channels % self.lanes

        def whole(start: ir.Value, _: Vectors) -> Vectors:
            body(start, self.lanes)
            return []

        self.loop(INT(0), INT(channels - rest), self.lanes, whole)
        if rest:
            body(INT(channels - rest), rest)

    def read(self, tensor: str, channels: int, planes: int, border: int, mask: int | None = None) -> None:
        """The pixels and `border` around them into `planes`; into the plane `mask` 1 where the image is, 0 outside."""
        zeros = self.pointer('zeros')

        def vector(place: ir.Value, numbers: Vectors, inside: Vectors) -> None:
            there = zip(inside, self.in_map(tensor, channels, numbers), strict=True)
            pixels = [self.to.select(known, pixel, zeros) for known, pixel in there]

            def part(start: ir.Value, count: int) -> None:
                rows = [self.load(self.at(pixel, start), count) for pixel in pixels]
                for i, column in enumerate(self.transposed(rows)):
                    self.store(column, self.plane(self.offset((INT(planes + i),), (start,)), place))

            self.parts(channels, part)
            if mask is not None:
                ones = self.vector_type(ir.Undefined)
                for lane, known in enumerate(inside):
                    ones = self.to.insert_element(ones, self.to.uitofp(known, FLOAT), INT(lane))
                self.store(ones, self.plane(mask, place))

        self.pixels(border, vector)

    def prefetch_pixels(self, tensor: str, channels: int) -> None:
        """Have the pixels of a map brought into the cache while something else is done, to be written after that."""

        def vector(place: ir.Value, numbers: Vectors, inside: Vectors) -> None:
            for pixel in self.in_map(tensor, channels, numbers):
                self.prefetch(pixel, channels, written=True)

        self.pixels(0, vector)

    def write(
        self,
        tensor: str,
        channels: int,
        planes: int,
        plus: str | None = None,
        of: tuple[int, ir.Value] | None = None,
    ) -> None:
        """The pixels from `planes` to a map, plus what another map has there.

        The first `channels` numbers of the memory are written over. Pixels of the next row are prefetched.

        `of` says how many channels the map has, if these are not all of it, and which is the first of these.
        """
        step, first = of or (channels, INT(0))
        spare = self.memory  # to which pixels go that there are not

        def vector(place: ir.Value, numbers: Vectors, inside: Vectors) -> None:
            def pixels(pointers: Vectors) -> Vectors:
                return [self.to.select(*pair, spare) for pair in zip(inside, pointers, strict=True)]

            there = [self.at(pixel, first) for pixel in self.in_map(tensor, step, numbers)]
            if self.next_row is not None:
                below = self.to.mul(self.next_row, INT(step))
                for pixel in there:
                    self.prefetch(self.at(pixel, below), channels, written=True)
            targets = pixels(there)
            others = pixels(self.in_map(plus, channels, numbers)) if plus else []

            def part(start: ir.Value, count: int) -> None:
                rows = self.transposed([self.value(planes + i, start, place) for i in range(count)])
                if plus:
                    found = (self.load(self.at(pixel, start), count) for pixel in others)
                    rows = [self.to.fadd(row, other) for row, other in zip(rows, found, strict=True)]
                for row, pixel in zip(rows, targets, strict=True):
                    self.store(row, self.at(pixel, start))

            self.parts(channels, part)

        self.pixels(0, vector)

    def lines(self, length: ir.Value, count: int, body: Callable[[Vectors], None]) -> None:
        """`body` for every `count` vectors of the first pixels of a plane, given their places."""

        def vectors(place: ir.Value, _: Vectors) -> Vectors:
            body([self.to.add(place, INT(i * self.lanes)) for i in range(count)])
            return []

        self.loop(INT(0), length, count * self.lanes, vectors)

    def norm(self, scale: str, shift: str, channels: int, planes: int, mask: int | None, length: ir.Value) -> None:
        """Layer normalisation of each pixel over `channels`, in place; 0 outside the image, as a plane shows it."""
        to = self.to
        pointers, share = [self.pointer(name) for name in (scale, shift)], self.vector(1 / channels)
        epsilon = self.spread(self.factor)

        def vectors(places: Vectors) -> None:
            def over_channels(add: Callable[[int, ir.Value, ir.Value], ir.Value]) -> Vectors:
                """Means over the channels of what `add` adds up, given the number of a place, a value and the sum."""

                def channel(i: ir.Value, sums: Vectors) -> Vectors:
                    found = (self.load(self.plane(to.add(INT(planes), i), place), self.lanes) for place in places)
                    return [add(n, x, total) for n, (x, total) in enumerate(zip(found, sums, strict=True))]

                sums = self.loop(INT(0), INT(channels), 1, channel, [self.vector(0)] * len(places))
                return [to.fmul(total, share) for total in sums]

            means = over_channels(lambda n, x, total: to.fadd(total, x))

            def squares(n: int, x: ir.Value, total: ir.Value) -> ir.Value:
                centred = to.fsub(x, means[n])
                return self.multiply_add(centred, centred, total)

            factors = [
                to.fdiv(self.vector(1), self.sqrt(to.fadd(variance, epsilon))) for variance in over_channels(squares)
            ]
            ones = [self.vector(1)] * len(places)
            known = ones if mask is None else [self.load(self.plane(mask, place), self.lanes) for place in places]

            def channel(i: ir.Value, _: Vectors) -> Vectors:
                weight, bias = (self.number(pointer, i) for pointer in pointers)
                for place, mean, factor, inside in zip(places, means, factors, known, strict=True):
                    pointer = self.plane(to.add(INT(planes), i), place)
                    x = to.fmul(to.fsub(self.load(pointer, self.lanes), mean), factor)
                    self.store(self.multiply_add(x, weight, to.fmul(bias, inside)), pointer)
                return []

            self.loop(INT(0), INT(channels), 1, channel)

        self.lines(length, 4, vectors)

    def linear(
        self,
        weight: ir.Value,
        width: int,
        source: int,
        target: int,
        sizes: tuple[int, int],
        length: ir.Value,
        start: Start | None = None,
        finish: Finish = lambda i, place, x: x,
        behind: ir.Value | None = None,
    ) -> None:
        """Products of rows of `weight`, `width` numbers apart, and planes from `source` on, to those from `target` on.

        Args:
            sizes: planes that go in, and out.
            length: places, from the first on.
            start: what they are added to, of the number of a row, and a place.
            finish: what is stored, of these and the result.
            behind: by how many places what goes in is behind its result, if any.
        """
        most, vectors = BLOCKS[self.lanes]
        ins, outs = sizes
        count = divisor(outs, most)

        def pixels(places: Vectors) -> None:
            columns = [self.plane(source, self.to.add(place, behind or INT(0))) for place in places]

            def rows(first: ir.Value, _: Vectors) -> Vectors:
                numbers = [self.to.add(first, INT(i)) for i in range(count)]
                sums = [(start or self.zero)(i, place) for i in numbers for place in places]
                pointers = [self.at(weight, self.to.mul(i, INT(width))) for i in numbers]
                found = multiply(self, pointers, columns, self.given['plane'], INT(ins), sums)
                for i, x in enumerate(found):
                    number, place = numbers[i // vectors], places[i % vectors]
                    self.store(finish(number, place, x), self.plane(self.to.add(INT(target), number), place))
                return []

            self.loop(INT(0), INT(outs), count, rows)

        self.lines(length, vectors, pixels)


class Tiles(Planes):
    """Code for tiles of an image.

    Args:
        names: of arguments beyond `GEOMETRY`.
        border: pixels around a tile.

    Attributes:
        tile: the number of the tile.
        rows, columns: of its pixels.
        inner, whole: places in a plane before the end of its rows, without the border and with it.
    """

    def __init__(self, names: Sequence[str], lanes: int, border: int) -> None:
        super().__init__((*GEOMETRY, *names), lanes)
        self.border, self.next_row = border, self.given['width']

    def tiles(self, body: Callable[[], None]) -> None:
        """Write the rest: `body` for every tile."""

        def tile(number: ir.Value) -> None:
            row = self.at(self.pointer('tiles', INT), self.to.mul(number, INT(5)))
            self.tile = number
            self.image, self.top, self.left, self.rows, self.columns = (
                self.to.load(self.at(row, INT(i))) for i in range(5)
            )
            self.width = self.to.add(self.columns, INT(2 * self.border))  # of a row of a plane
            self.inner = self.to.mul(self.rows, self.width)
            self.whole = self.to.mul(self.to.add(self.rows, INT(2 * self.border)), self.width)
            body()

        self.tasks(self.given['count'], tile)

    def pixels(self, border: int, body: Callable[[ir.Value, Vectors, Vectors], None]) -> None:
        """See `Planes`: there are those in the tile or its border, and in the image."""
        to, given = self.to, self.given

        def row(i: ir.Value, _: Vectors) -> Vectors:
            y = to.add(self.top, to.sub(i, INT(border)))
            in_height = to.icmp_unsigned('<', y, given['height'])
            stop = to.add(self.columns, INT(2 * border))

            def vector(j: ir.Value, _: Vectors) -> Vectors:
                x = to.add(self.left, to.sub(j, INT(border)))
                first = self.offset((self.image, given['height'], given['width']), (y, given['width']), (x,))
                numbers, inside = [], []
                for lane in range(self.lanes):
                    numbers.append(to.add(first, INT(lane)))
                    in_width = to.icmp_unsigned('<', to.add(x, INT(lane)), given['width'])
                    in_tile = to.icmp_signed('<', to.add(j, INT(lane)), stop)
                    inside.append(to.and_(in_height, to.and_(in_width, in_tile)))
                body(to.add(to.mul(i, self.width), j), numbers, inside)
                return []

            self.loop(INT(0), stop, self.lanes, vector)
            return []

        self.loop(INT(0), to.add(self.rows, INT(2 * border)), 1, row)

    def inside(self, column: ir.Value) -> ir.Value:
        """Which numbers of a vector from a column of the tile on are in the tile."""
        left = self.spread(self.to.sitofp(self.to.sub(self.columns, column), FLOAT))
        return self.to.fcmp_ordered('<', self.numbers(), left)

    def around(self, plane: ir.Value | int, place: ir.Value, i: ir.Value | int, size: int) -> Vectors:
        """What row i of a filter of `size` meets, column by column."""
        row = self.offset((i if isinstance(i, ir.Value) else INT(i), self.width), (place,))
        first = self.plane(plane, row)
        return [self.load(self.at(first, INT(j)), self.lanes) for j in range(size)]

    def depthwise(
        self,
        weight: ir.Value,
        size: int,
        source: int,
        target: int,
        count: int,
        start: Start | None = None,
        finish: Finish = lambda i, place, x: x,
    ) -> None:
        """A convolution of `count` planes from `source` on, each by size x size numbers, to those from `target` on.

        Args:
            start: what it is added to, of the number of a plane, and a place.
            finish: what is stored, of these and the result; asked for again where rows meet, and gives the same, as it
                depends on the number of the plane and the place alone.
        """

        def channel(i: ir.Value, _: Vectors) -> Vectors:
            numbers, plane = self.at(weight, self.to.mul(i, INT(size**2))), self.to.add(i, INT(source))
            kept = [self.number(numbers, n) for n in range(size**2)] if size**2 <= KEPT else []

            def rows(count: int, y: ir.Value, _: Vectors) -> Vectors:
                """`count` rows at once, for which what they have in common is read once."""
                first = self.to.mul(y, self.width)

                def vector(x: ir.Value, _: Vectors) -> Vectors:
                    places = [self.offset((INT(row), self.width), (first,), (x,)) for row in range(count)]
                    sums = [(start or self.zero)(i, place) for place in places]
                    for row in range(count + size - 1):
                        near = self.around(plane, places[0], row, size)
                        for n in range(max(0, row - size + 1), min(count, row + 1)):
                            for column, x in enumerate(near):
                                number = (row - n) * size + column
                                factor = kept[number] if kept else self.number(numbers, number)
                                sums[n] = self.multiply_add(factor, x, sums[n])
                    for place, x in zip(places, sums, strict=True):
                        self.store(finish(i, place, x), self.plane(self.to.add(i, INT(target)), place))
                    return []

                self.loop(INT(0), self.columns, self.lanes, vector)
                return []

            whole = self.to.sub(self.rows, self.to.srem(self.rows, INT(AT_ONCE)))
            self.loop(INT(0), whole, AT_ONCE, partial(rows, AT_ONCE))
            self.loop(whole, self.rows, 1, partial(rows, 1))
            return []

        self.loop(INT(0), INT(count), 1, channel)


def most_of_tile(channels: int) -> tuple[int, int]:
    """Rows and columns of the largest tiles of `channels` that a cache holds well."""
    return ROWS, max(VALUES // (channels * ROWS), 1)


def cuts(length: int, most: int) -> tuple[int, ...]:
    """Where equal parts of at most `most` begin, and the end."""
    count = -(-length // most)
    return tuple(length * i // count for i in range(count + 1))


class Tiling(NamedTuple):
    """Image, top, left, height and width of every tile, (T, 5) int64, and where they are in memory."""

    tiles: np.ndarray
    address: int
    most: int  # pixels of a tile, with its border


@lru_cache(maxsize=16)
def tiling(n: int, rows: tuple[int, ...], columns: tuple[int, ...], border: int) -> Tiling:
    """Of `n` images, given where rows and columns of tiles begin, and the end."""
    places = product(pairwise(rows), pairwise(columns), range(n))
    tiles = np.array([(i, y, x, y_stop - y, x_stop - x) for (y, y_stop), (x, x_stop), i in places], np.int64)
    return Tiling(tiles, tiles.ctypes.data, int((tiles[:, 3:] + 2 * border).prod(1).max()))


def pixel_step(x: Tensor) -> int:
    """Numbers from each pixel of maps (N, C, H, W) to the next one; 0 if these differ, or channels are apart."""
    n, channels, height, width = x.shape
    images, channel, rows, pixels = x.stride()
    sides = (pixels, 1, width), (rows, width, height), (images, height * width, n)
    strides = [(stride, between) for stride, between, count in sides if count > 1]
    step = strides[0][0] if strides else channels
    same = all(stride == step * between for stride, between in strides)
    return step if same and step >= channels and (channel == 1 or channels == 1) else 0


def pixels_in_order(x: Tensor) -> tuple[Tensor, int]:
    """Maps with a `pixel_step`, `x` itself or a copy, and that step."""
    step = pixel_step(x)
    return (x, step) if step else (x.clone(memory_format=torch.channels_last), x.shape[1])


def call(
    kernel: Kernel,
    x: Tensor,
    border: int,
    planes: int,
    arguments: Sequence[Tensor | int],
    grid: tuple[Sequence[int], Sequence[int]] | None = None,
    factor: float = 0.0,
) -> None:
    """Run a kernel.

    Args:
        x: maps (N, C, H, W).
        border: pixels around a tile.
        planes: how many the kernel needs.
        arguments: those beyond `GEOMETRY`.
        grid: where rows and columns of tiles begin, and the ends of the map; without, they are of a size that is fast.
        factor: see `Code`.
    """
    n, channels, height, width = x.shape
    rows, columns = (tuple(x) for x in grid or map(cuts, (height, width), most_of_tile(channels)))
    found = tiling(n, rows, columns, border)
    size = max(found.most, channels) + 2 * border
    plane = (size + BEHIND) // 32 * 32 + 16  # planes a power of 2 apart would drive each other from the cache
    geometry = x.new_zeros(channels), found.address, len(found.tiles), height, width, plane, *pixels_in_order(x)
    kernel([*geometry, *arguments], planes * plane, factor)
