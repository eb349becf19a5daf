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

from error import out_of_memory

RAMP = 2
ROWS = 16  # of the input, finished at a time
SMALLEST_STEP = 16

Function = Callable[[Tensor], Tensor]
Report = Callable[[int, int], None]

log = logging.getLogger('frugalsr')


def unreported(done: int, total: int) -> None:
    """Report to nobody that so many of all tiles are done."""


def split(length: int, size: int, overlap: int, fixed: bool = False) -> tuple[int, list[int]]:
    """Cover an axis of `length` >= 1 pixels with the fewest equal tiles of at most (if `fixed`, of) `size` pixels.

    Returns the tile side and the first pixel of every tile. Neighbours share at least `overlap` pixels
    (0 <= overlap < size), the last tile ends where the axis ends.
    """
    if length <= size:
        return length, [0]
    count = -(-(length - overlap) // (size - overlap))
    side = size if fixed else -(-(length + (count - 1) * overlap) // count)
    return side, [i * (length - side) // (count - 1) for i in range(count)]


class Tiler:
    """Super-resolve images by tiles of at most `size` x `size` input pixels, at most `batch` of them at a time.

    Neighbouring tiles share at least `overlap` input pixels. If `fixed`, all tiles have exactly `size` pixels a side,
    and a smaller image is continued by its mirror image; else they are as small as their number allows. When memory
    runs out, first the batch and then the tile is halved, and the image goes on where it stood; later images start
    with what fitted.

    Raises ValueError unless 0 <= overlap < size and batch >= 1.
    """

    def __init__(self, size: int, overlap: int, batch: int, fixed: bool = False) -> None:
        if not 0 <= overlap < size:
            raise ValueError(f'tiles of {size} pixels cannot overlap by {overlap}: need 0 <= overlap < size')
        if batch < 1:
            raise ValueError(f'the number of tiles a call is {batch}: need at least 1')
        self.size = size
        self.overlap = overlap
        self.batch = batch
        self.fixed = fixed

    @torch.no_grad()
    def __call__(self, upscale_tile: Function, image: Tensor, scale: int, finish: Function) -> Tensor:
        """Return the (C, H*scale, W*scale) result for a (C, H, W) image: the `rows` together."""
        return torch.cat([rows.clone() for rows in self.rows(upscale_tile, image, scale, finish)], -2)

    @torch.no_grad()
    def rows(
        self, upscale_tile: Function, image: Tensor, scale: int, finish: Function, report: Report = unreported
    ) -> Iterator[Tensor]:
        """Give the rows of the result for a (C, H, W) image, H and W >= 1, both on the host, from top to bottom.

        `upscale_tile` maps a batch of tiles (n, C, h, w), on the host and in the dtype and value range of the image, to
        (n, C, h*scale, w*scale) on any device; all tiles of an image have one shape. `finish` turns float32 rows
        (C, some, W*scale), in the value range of `upscale_tile`, into as many final rows; it may work in place. It is
        given all rows, from top to bottom, a few at a time, in memory that is used again for those that follow; beside
        them the host holds one row of tiles as floats. `report` is told how many tiles are done and how many there are,
        before the first and after each call; there are more of them after memory ran out. What it raises ends the work.

        Raises the out-of-memory error of `upscale_tile` if even one smallest tile does not fit; other errors pass
        through.
        """
        done, (height, width) = 0, image.shape[-2:]
        if self.fixed:
            image = _continue(image, max(height, self.size), max(width, self.size))
        tiles = total = 0

        def reporting(batch: Tensor) -> Tensor:
            nonlocal tiles
            results = upscale_tile(batch)
            tiles += len(batch)
            report(tiles, total)
            return results

        while done < height:
            total = tiles + self._tiles_from(image.shape[-2], image.shape[-1], done)
            report(tiles, total)
            try:
                for piece in self._pieces(reporting, image, scale, done):
                    if done == height:  # the rest is what a lower image was continued by
                        break
                    for rows in piece[:, : (height - done) * scale, : width * scale].split(ROWS * scale, -2):
                        finished = finish(rows)
                        done += rows.shape[-2] // scale
                        yield finished
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error) or not self._shrink(*image.shape[-2:]):
                    raise
            # Only here, past the handler, is the traceback gone and with it the tensors of the failed attempt.
            if done < height and torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _pieces(self, upscale_tile: Function, image: Tensor, scale: int, done: int) -> Iterator[Tensor]:
        """Float rows of the result from input row `done` on."""
        top = max(0, done - self.overlap // 2)
        image = image[:, top:]
        side, tops = self._split(image.shape[-2])
        return _merge(self._bands(upscale_tile, image, side, tops, scale), side, tops, scale, dim=-2, first=done - top)

    def _bands(
        self, upscale_tile: Function, image: Tensor, height: int, tops: list[int], scale: int
    ) -> Iterator[Tensor]:
        """Rows of tiles, each in the memory of the one before it: large blocks that come and go leave gaps."""
        channels, _, width = image.shape
        # In memory as images lie, (H, W, C), so that it becomes one without a copy.
        band = torch.empty(height * scale, width * scale, channels).permute(2, 0, 1)
        side, lefts = self._split(width)
        for top in tops:
            tiles = [image[:, top : top + height, left : left + side] for left in lefts]
            filled = 0
            for piece in _merge(_run_batches(upscale_tile, tiles, self.batch), side, lefts, scale, dim=-1):
                band[..., filled : filled + piece.shape[-1]] = piece
                filled += piece.shape[-1]
                del piece
            yield band

    def _split(self, length: int) -> tuple[int, list[int]]:
        return split(length, self.size, self.overlap, self.fixed)

    def _tiles_from(self, height: int, width: int, done: int) -> int:
        """Tiles of an image from input row `done` on."""
        tops, lefts = (self._split(length)[1] for length in (height - max(0, done - self.overlap // 2), width))
        return len(tops) * len(lefts)

    def _shrink(self, height: int, width: int) -> bool:
        """Halve what the image really used, which may be less than what was allowed; False if nothing is left."""
        tile_height, _ = self._split(height)
        tile_width, lefts = self._split(width)
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
    """

    def _pieces(self, upscale_tile: Function, image: Tensor, scale: int, done: int) -> Iterator[Tensor]:
        height, width = image.shape[-2:]
        side = min(self.size, height, width)
        lefts, tops = (self._starts(length, side) for length in (width, height))
        counts = _covered(tops, side, height)[:, None] * _covered(lefts, side, width)
        counts = counts.repeat_interleave(scale, -1)
        shared = torch.zeros(1, 0, 1)  # the rows that the tiles above reached too
        for top, below in pairwise([*(top for top in tops if top + side > done), height]):
            tiles = _run_batches(
                upscale_tile, [image[:, top : top + side, left : left + side] for left in lefts], self.batch
            )
            band = _sum(tiles, lefts, width * scale, scale)
            band[:, : shared.shape[1]] += shared
            skip = max(0, done - top)
            if top + skip < below:
                rows = counts[top + skip : below].repeat_interleave(scale, 0)
                yield band[:, skip * scale : (below - top) * scale] / rows
            shared = band[:, (below - top) * scale :].clone()

    def _tiles_from(self, height: int, width: int, done: int) -> int:
        side = min(self.size, height, width)
        return sum(top + side > done for top in self._starts(height, side)) * len(self._starts(width, side))

    def _starts(self, length: int, side: int) -> list[int]:
        step = side - self.overlap if side > self.overlap else -(-side // 2)
        return [*range(0, length - side, step), length - side]

    def _shrink(self, height: int, width: int) -> bool:
        if self.batch == 1:
            return False
        self.batch //= 2
        log.warning('Out of memory: from now on at most %d tiles a call.', self.batch)
        return True


def _run_batches(upscale_tile: Function, tiles: list[Tensor], batch: int) -> Iterator[Tensor]:
    """The results of the tiles on the host; on CUDA each call is under way while those of the one before it come."""
    coming: Callable[[], Tensor] | None = None
    for first in range(0, len(tiles), batch):
        results = upscale_tile(torch.stack(tiles[first : first + batch]))
        if not results.is_cuda:
            # A copy even where none is needed: it is faded in place, and what `upscale_tile` returns may be its own.
            yield from results.to('cpu', torch.float32, copy=True)
            continue
        before, coming = coming, _bring(results)
        del results
        if before:
            yield from before()
    if coming:
        yield from coming()


def _bring(results: Tensor) -> Callable[[], Tensor]:
    """Begin to copy from CUDA to the host, beside what is computed next; what is returned waits for the copy."""
    where, host = results.device, torch.empty(results.shape, pin_memory=True)
    stream = torch.cuda.Stream(where)
    stream.wait_stream(torch.cuda.current_stream(where))
    with torch.cuda.stream(stream):
        host.copy_(results, non_blocking=True)
        done = stream.record_event()
    results.record_stream(stream)

    def wait() -> Tensor:
        done.synchronize()
        return host

    return wait


def _continue(image: Tensor, height: int, width: int) -> Tensor:
    """(C, H, W) continued by its mirror image to `height` and `width`."""
    for dim, length in ((-2, height), (-1, width)):
        have = image.shape[dim]
        index = torch.arange(length) % (2 * have)
        image = image.index_select(dim, torch.minimum(index, 2 * have - 1 - index)) if have < length else image
    return image


def _covered(starts: list[int], side: int, length: int) -> Tensor:
    """How many tiles cover each pixel of an axis."""
    pixels = torch.arange(length)
    return sum(((start <= pixels) & (pixels < start + side)).float() for start in starts)  # type: ignore[return-value]


def _sum(tiles: Iterator[Tensor], lefts: list[int], width: int, scale: int) -> Tensor:
    """A row of tiles added up: (C, height of a tile, width)."""
    total = torch.zeros(0)
    for left, tile in zip(lefts, tiles, strict=True):
        total = total if total.numel() else torch.zeros(*tile.shape[:2], width)
        total[..., left * scale : left * scale + tile.shape[-1]] += tile
    return total


def _seams(side: int, starts: list[int]) -> Iterator[tuple[int, int]]:
    """Where each tile begins to give way to the next, and over how many pixels; the last one ends without a fade."""
    for left, right in pairwise(starts):
        shared = left + side - right
        ramp = min(RAMP, shared)
        yield right + (shared - ramp) // 2, ramp
    yield starts[-1] + side, 0


def _merge(
    tiles: Iterator[Tensor], side: int, starts: list[int], scale: int, dim: int, first: int = 0
) -> Iterator[Tensor]:
    """Turn overlapping tiles into pieces that follow each other along `dim` from `first` on; fades tiles in place."""
    cut, tail = first, None
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
