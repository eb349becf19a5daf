"""Tiles as large as memory allows."""

import logging
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.compiler import set_stance

from error import UserError
from model.tiles.tiling import SMALLEST_STEP, Function, Report, Tiler, unreported
from system import memory, parallel
from system.allocator import trim_heap

LARGEST = 512  # side of a tile; beyond it tiling costs next to nothing
UNKNOWN = 192  # side where the system does not tell how much memory there is
TRIED = (64, 128)  # sides of the squares that are measured
STEP = 8  # between sides to choose from
RESERVE = 2**26  # bytes for threads, and gaps between blocks
FIRST_CALL = 2**27  # bytes, or less: also what a process takes once
MARGIN = 1.5  # of what a network takes by its measurement
PART_OF_FREE = 0.8
HANDED_ON = 160  # finished rows, in rows of the input, under way to a file: `ROWS` of tiling ten times
MEGABYTE = 2**20

log = logging.getLogger('frugalsr')


class AutoTiler(Tiler):
    """Choose for each image the largest tiles, of at most 512 pixels a side, that memory has room for.

    What a network takes is measured once, in calls with two small squares, and grows with the number of pixels.

    Args:
        overlap, fixed: as of `Tiler`; where `fixed`, the tile of the first image stays.
        batch: tiles a call, at most.
        device: where the network runs, as PyTorch names it.
        limit: bytes that may be in use, on a CPU those that the process has in memory, else those of the device; None:
            four fifths of what is free may be taken, on a CPU by all processes together.
    """

    def __init__(self, overlap: int, batch: int, device: str, limit: int | None = None, fixed: bool = False) -> None:
        super().__init__(max(LARGEST, overlap + SMALLEST_STEP), overlap, batch, fixed)
        self.device, self.limit = device, limit
        if limit is not None and device == 'cuda':
            torch.cuda.set_per_process_memory_fraction(min(1.0, limit / torch.cuda.mem_get_info()[1]))
        self.most, self.largest = batch, self.size
        self.told = (0, 0)
        self.chosen = False  # for all images
        self.measured: list[int] = []  # bytes for the squares

    @torch.no_grad()
    def rows(
        self, upscale_tile: Function, image: Tensor, scale: int, finish: Function, report: Report = unreported
    ) -> Iterator[Tensor]:
        """As of `Tiler`.

        Raises:
            UserError: the smallest tiles exceed the limit, or the system does not tell what is in use.
        """
        if self.fixed or self.limit is not None or max(image.shape[-2:]) > TRIED[-1]:
            self._choose(upscale_tile, image, scale)
        yield from super().rows(upscale_tile, image, scale, finish, report)

    def _choose(self, upscale_tile: Function, image: Tensor, scale: int) -> None:
        trim_heap()
        if memory.in_use(self.device) is None:
            if self.limit is not None:
                raise UserError(
                    '--max_memory: this system does not tell what is in use; leave it out: tiles then have at most '
                    f'{UNKNOWN} pixels a side.'
                )
            self.size = min(self.largest, max(UNKNOWN, self.overlap + SMALLEST_STEP))
            return
        self.measured = self.measured or self._measure(upscale_tile, image)
        trim_heap()
        room = self._room()
        smallest = self.overlap + SMALLEST_STEP
        sides = [self.size] if self.chosen else [*range(self.largest, smallest, -STEP), smallest]
        self.chosen = self.fixed
        self.size = next((side for side in sides if self._takes(side, image, scale) <= room), sides[-1])
        takes = self._takes(self.size, image, scale)
        self._check_fits(takes, image)
        self.batch = max(1, min(self.most, room // max(takes, 1)))
        if (self.size, self.batch) != self.told:
            self.told = self.size, self.batch
            log.info('Tiles of at most %d pixels a side, %d a call.', self.size, self.batch)

    def _check_fits(self, takes: int, image: Tensor) -> None:
        if self.limit is not None and takes > (room := self._room()):
            height, width = image.shape[-2:]
            raise UserError(
                f'--max_memory {self.limit // MEGABYTE}M: {width}x{height} pixels need about '
                f'{(self.limit - room + takes) // MEGABYTE + 1}M in the smallest tiles; give more memory.'
            )

    def _shrink(self, height: int, width: int) -> bool:
        done = super()._shrink(height, width)
        self.largest, self.most = min(self.largest, self.size), min(self.most, self.batch)
        return done

    def _measure(self, upscale_tile: Function, image: Tensor) -> list[int]:
        """Bytes that a call takes with each of the squares."""
        taken: list[int] = []
        with set_stance('force_eager'):  # nothing is compiled for these
            for side in (TRIED[0], *TRIED):
                square = torch.randint(0, 256, (1, len(image), side, side), generator=torch.Generator().manual_seed(0))
                trim_heap()
                self._check_fits(taken[-1] * (side // TRIED[0]) ** 2 if taken else FIRST_CALL, image)
                before = memory.start_peak(self.device) or 0
                upscale_tile(square.to(image.dtype)).to('cpu', torch.float32, copy=True)
                taken.append((memory.peak(self.device) or 0) - before)
        return taken[1:]  # a first call also takes what a process takes once

    def _room(self) -> int:
        if self.limit is not None:
            return self.limit - RESERVE - (memory.in_use(self.device) or 0)
        share = parallel.world_size() if self.device == 'cpu' else 1
        return int(PART_OF_FREE * (memory.free(self.device) or 0) / share)

    def _takes(self, side: int, image: Tensor, scale: int) -> int:
        """Bytes for a call with tiles of an image, and on the host for a row of them."""
        channels, *size = image.shape
        height, width = (side, side) if self.fixed else (min(side, length) for length in size)
        (small, large), (few, many) = self.measured, (tried**2 for tried in TRIED)
        call = MARGIN * (small + max(large - small, 0) / (many - few) * (height * width - few))
        length = max(side, size[1]) if self.fixed else size[1]
        row = (4 * height + HANDED_ON * image.itemsize) * channels * length * scale**2
        return int(max(call, 0)) + (0 if self.device == 'cuda' else row)
