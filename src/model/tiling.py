"""Run a network on an image of any size, tile by tile, in bounded memory.

Image and result stay on the host. Along each axis the tiles are equal, overlap by at least what was asked, and are
spread evenly. Of an overlap only the central `RAMP` input pixels are cross-faded and the rest belongs to the nearer
tile alone: with an overlap of at least twice the reach of the network plus `RAMP`, the result is the untiled one up to
rounding, and with less no hard seam shows. Only without an overlap are tiles cut hard.
"""

import logging
from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from torch import Tensor

RAMP = 2
SMALLEST_STEP = 16

Function = Callable[[Tensor], Tensor]

log = logging.getLogger('frugalsr')


def split(length: int, size: int, overlap: int) -> tuple[int, list[int]]:
    """Cover an axis of `length` >= 1 pixels with the fewest equal tiles of at most `size` pixels.

    Returns the tile side and the first pixel of every tile. Neighbours share at least `overlap` pixels
    (0 <= overlap < size), the last tile ends where the axis ends.
    """
    if length <= size:
        return length, [0]
    count = -(-(length - overlap) // (size - overlap))
    side = -(-(length + (count - 1) * overlap) // count)
    return side, [i * (length - side) // (count - 1) for i in range(count)]


class Tiler:
    """Super-resolve images by tiles of at most `size` x `size` input pixels, at most `batch` of them at a time.

    Neighbouring tiles share at least `overlap` input pixels. When memory runs out, first the batch and then the tile
    is halved and the image is started again; later images start with what fitted.

    Raises ValueError unless 0 <= overlap < size and batch >= 1.
    """

    def __init__(self, size: int, overlap: int, batch: int) -> None:
        if not 0 <= overlap < size:
            raise ValueError(f'tiles of {size} pixels cannot overlap by {overlap}: need 0 <= overlap < size')
        if batch < 1:
            raise ValueError(f'the number of tiles a call is {batch}: need at least 1')
        self.size = size
        self.overlap = overlap
        self.batch = batch

    @torch.no_grad()
    def __call__(self, run: Function, image: Tensor, scale: int, finish: Function) -> Tensor:
        """Return the (C', H*scale, W*scale) result for a (C, H, W) image, H and W >= 1, both on the host.

        `run` maps a batch of tiles (n, C, h, w), on the host and in the dtype and value range of the image, to
        (n, C', h*scale, w*scale) on any device; all tiles of an image have one shape. `finish` turns float32 rows
        (C', some, W*scale), in the value range of `run`, into as many final rows; it may work in place. It is given
        all rows once, from top to bottom, and its dtype is that of the result: beside this result the host holds
        about one row of tiles as floats.

        Raises the out-of-memory error of `run` if even one smallest tile does not fit; other errors pass through.
        """
        while True:
            try:
                return self._attempt(run, image, scale, finish)
            except RuntimeError as error:
                if not out_of_memory(error) or not self._shrink(*image.shape[-2:]):
                    raise
            # Only here, past the handler, is the traceback gone and with it the tensors of the failed attempt.
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _attempt(self, run: Function, image: Tensor, scale: int, finish: Function) -> Tensor:
        height = image.shape[-2]
        side, tops = split(height, self.size, self.overlap)
        bands = (self._band(run, image.narrow(-2, top, side), scale) for top in tops)
        return _concatenate(map(finish, _merge(bands, side, tops, scale, dim=-2)), height * scale, dim=-2)

    def _band(self, run: Function, band: Tensor, scale: int) -> Tensor:
        width = band.shape[-1]
        side, lefts = split(width, self.size, self.overlap)
        tiles = _run_batches(run, [band.narrow(-1, left, side) for left in lefts], self.batch)
        return _concatenate(_merge(tiles, side, lefts, scale, dim=-1), width * scale, dim=-1)

    def _shrink(self, height: int, width: int) -> bool:
        """Halve what the image really used, which may be less than what was allowed; False if nothing is left."""
        tile_height, _ = split(height, self.size, self.overlap)
        tile_width, lefts = split(width, self.size, self.overlap)
        side, batch = max(tile_height, tile_width), min(self.batch, len(lefts))
        smallest = self.overlap + SMALLEST_STEP
        if batch > 1:
            self.batch = batch // 2
        elif side > smallest:
            self.size = max(side // 2, smallest)
        else:
            return False
        log.warning('Out of memory: from now on tiles have at most %d pixels a side, %d a call.', self.size, self.batch)
        return True


class MeanTiler(Tiler):
    """Square tiles of one size at fixed steps, the last ones moved back, and the plain mean where they overlap.

    So OmniSR and ASID are tested by their authors. The tile side is that of `size`, or the shorter side of a smaller
    image. When memory runs out, only the number of tiles a call is halved, since the size is part of the protocol.
    The whole result is held as floats.
    """

    def _attempt(self, run: Function, image: Tensor, scale: int, finish: Function) -> Tensor:
        height, width = image.shape[-2:]
        side = min(self.size, height, width)
        corners = [(y, x) for y in self._starts(height, side) for x in self._starts(width, side)]
        tiles = _run_batches(run, [image[:, y : y + side, x : x + side] for y, x in corners], self.batch)
        total, counts = torch.empty(0), torch.zeros(1, height * scale, width * scale)
        for (y, x), tile in zip(corners, tiles, strict=True):
            if not total.numel():
                total = torch.zeros(tile.shape[0], height * scale, width * scale)
            rows, columns = (slice(start * scale, (start + side) * scale) for start in (y, x))
            total[:, rows, columns] += tile
            counts[:, rows, columns] += 1
        return finish(total.div_(counts))

    def _starts(self, length: int, side: int) -> list[int]:
        step = side - self.overlap if side > self.overlap else -(-side // 2)
        return [*range(0, length - side, step), length - side]

    def _shrink(self, height: int, width: int) -> bool:
        if self.batch == 1:
            return False
        self.batch //= 2
        log.warning('Out of memory: from now on at most %d tiles a call.', self.batch)
        return True


def _run_batches(run: Function, tiles: list[Tensor], batch: int) -> Iterator[Tensor]:
    for first in range(0, len(tiles), batch):
        # A copy even where none is needed: it is faded in place, and `run` may own or have frozen what it returns.
        yield from run(torch.stack(tiles[first : first + batch])).to('cpu', torch.float32, copy=True)


def _seams(side: int, starts: list[int]) -> Iterator[tuple[int, int]]:
    """Where each tile begins to give way to the next, and over how many pixels; the last one ends without a fade."""
    for left, right in pairwise(starts):
        shared = left + side - right
        ramp = min(RAMP, shared)
        yield right + (shared - ramp) // 2, ramp
    yield starts[-1] + side, 0


def _merge(tiles: Iterator[Tensor], side: int, starts: list[int], scale: int, dim: int) -> Iterator[Tensor]:
    """Turn overlapping tiles into pieces that follow each other along `dim`; fades the tiles in place."""
    cut, tail = 0, None
    for start, (seam, ramp) in zip(starts, _seams(side, starts), strict=True):
        tile = next(tiles)
        if tail is not None:
            _fade_in(tile.narrow(dim, (cut - start) * scale, tail.shape[dim]), tail, dim)
        tail = tile.narrow(dim, (seam - start) * scale, ramp * scale).clone()
        yield tile.narrow(dim, (cut - start) * scale, (seam - cut) * scale)
        cut = seam
        # It may be a whole row of tiles, which nothing should hold while the next one is computed.
        del tile


def _fade_in(new: Tensor, old: Tensor, dim: int) -> None:
    steps = new.shape[dim]
    weight = (torch.arange(steps) + 0.5) / max(steps, 1)
    # `lerp` leaves equal values as they are, to the bit; normalised weights would not.
    new.copy_(old.lerp(new, weight if dim == -1 else weight[:, None]))


def _concatenate(pieces: Iterator[Tensor], length: int, dim: int) -> Tensor:
    """`torch.cat` of non-empty (C, H, W) pieces, `length` in all, that never holds more than one of them.

    The result lies in memory as images do, (H, W, C), so that it becomes one without a copy.
    """
    result, filled = torch.empty(0), 0
    for piece in pieces:
        if not filled:
            shape = list(piece.shape)
            shape[dim] = length
            channels, height, width = shape
            result = piece.new_empty(height, width, channels).permute(2, 0, 1)
        steps = piece.shape[dim]
        result.narrow(dim, filled, steps).copy_(piece)
        filled += steps
        del piece
    return result


def out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out, of the device or of the host."""
    # The allocator of the CPU raises a plain RuntimeError; its wording depends on the platform.
    said = str(error)
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or 'not enough memory' in said or "can't allocate memory" in said
