"""Paired images of a set: HR cropped to a multiple of the scale, LR from its file or made by MATLAB's bicubic."""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data.cache import DecodedCache
from data.degradation import Degradation
from data.image import read_rgb, read_size, write_png
from data.imresize import Border, shrink
from data.sets import ImageSet
from error import UserError, WriteError
from system.files import sweep, write_atomic

log = logging.getLogger('frugalsr')


class SRData:
    """The images of one set at one scale.

    Args:
        images: the files.
        scale: factor between HR and LR.
        border: what the bicubic assumes beyond the edge when LR is made.
        cached: keep decoded copies beside the images (EDSR's `--ext sep`).
        shave: pixels at each border that no score counts; None: the scale, and by EDSR's convention for RGB 6 more.
        skip_bad: `prepare` passes over images that cannot be used; reading them raises `UserError`.
        degradation: what is done to the LR images that `lr` gives, each always alike.
    """

    def __init__(
        self,
        images: ImageSet,
        scale: int,
        border: Border = 'mirror',
        cached: bool = False,
        shave: int | None = None,
        skip_bad: bool = False,
        degradation: Degradation | None = None,
    ) -> None:
        self.skip_bad, self.degradation = skip_bad, degradation
        self.name, self.channels, self.names = images.name, images.channels, images.names
        self.scale, self.border = scale, border
        self.shave = scale + (6 if self.channels == 'RGB' else 0) if shave is None else shave
        self.lr_border: Border | None = None  # known once LR is found or made that is not of unknown origin
        self._hr = list(images.hr)
        self._lr = images.lr_files(scale)
        self._made: dict[int, np.ndarray] = {}
        self._bad: dict[int, str] = {}  # what is wrong with an image
        self._unwritten: dict[str, WriteError] = {}  # what is done without, and why
        self._caches: dict[Path, DecodedCache] = {}
        if cached:
            for hr, lr in zip(self._hr, self._lr, strict=True):
                for path in (hr, lr) if lr else ():  # an image without an LR folder lies where nothing may be written
                    self._caches.setdefault(path.parent, DecodedCache(cache_folder(path.parent)))

    def __len__(self) -> int:
        return len(self._hr)

    def hr(self, index: int) -> np.ndarray:
        """(H, W, 3) uint8, H and W multiples of the scale."""
        self._check_usable(index)
        image = self._read(self._hr[index])
        height, width = (n - n % self.scale for n in image.shape[:2])
        return image[:height, :width]

    def lr(self, index: int) -> np.ndarray:
        """(H / scale, W / scale, 3) uint8."""
        self._check_usable(index)
        path = self._lr[index]
        lr = self._in_memory(index) if index in self._made or path is None else self._read(path)
        return self.degradation.of_image(lr, self.hr(index), self.names[index]) if self.degradation else lr

    def areas(self) -> list[int]:
        """Pixels of each HR image; 0 for those that cannot be used."""
        return [0 if index in self._bad else math.prod(read_size(path)) for index, path in enumerate(self._hr)]

    def protocol(self) -> dict[str, Any]:
        """What scores are measured on: channels, pixels left out at each border, how LR was made."""
        found = {'channels': self.channels, 'shave': self.shave, 'lr_border': self.lr_border}
        return found | ({'degradation': self.degradation.text} if self.degradation else {})

    def _check_usable(self, index: int) -> None:
        if index in self._bad:
            raise UserError(self._bad[index])

    def prepare(self, workers: int = 1, renew_cache: bool = False) -> None:
        """Check the LR files there are, make those that are missing, decode what is to be cached.

        LR is kept as `X<scale>/<name>x<scale>.png`, or in memory where that folder cannot be written.

        Raises:
            UserError: an image cannot be read, is smaller than the scale, or an LR file has the wrong size.
        """
        missing = []
        for index, (hr, lr) in enumerate(zip(self._hr, self._lr, strict=True)):
            if lr is not None and lr.is_file():
                with self._excused(index):
                    self._check_size(hr, lr)
            else:
                missing.append(index)
        with ThreadPoolExecutor(max(1, workers)) as pool:
            self._make_missing(pool, missing)
            if self._caches:
                self._fill_caches(pool, renew_cache)
        if self._bad:
            found = ' '.join(self._bad[index] for index in sorted(self._bad)[:3])
            log.warning('%d of %d images of %s cannot be used: %s', len(self._bad), len(self), self.name, found)
        if self._unwritten:
            what, reason = ' and '.join(self._unwritten), next(iter(self._unwritten.values()))
            log.warning('%s x%d: %s: %s', self.name, self.scale, what, reason)

    @contextmanager
    def _excused(self, index: int) -> Iterator[None]:
        """Within this block an image that cannot be used is noted, where that is no reason to stop."""
        try:
            yield
        except WriteError:
            raise
        except UserError as error:
            if not self.skip_bad:
                raise
            self._bad[index] = str(error)

    def _make_missing(self, pool: ThreadPoolExecutor, missing: Sequence[int]) -> None:
        incomplete = {path.parent for index in missing if (path := self._lr[index])}
        for folder in incomplete:
            sweep(folder)
        self.lr_border = self.border
        for folder in dict.fromkeys(path.parent for path in self._lr if path is not None):
            self._note_border(folder, folder in incomplete)
        errors = [error for error in self._each(pool, self._make_lr, missing, f'Making LR of {self.name}') if error]
        if errors:
            self._unwritten['LR images are kept in memory'] = errors[0]

    def _note_border(self, folder: Path, making: bool) -> None:
        """LR images made here have a note of their border beside them, so that no other is taken for it."""
        note = folder / '.lr_border'
        if note.is_file():
            if (border := note.read_text().strip()) != self.border:
                raise UserError(f'The LR images in {folder} have --lr_border {border}: give that, or remove it.')
        elif any(folder.glob('*.png')):
            if making and self.border != 'mirror':
                raise UserError(
                    f'{folder} holds LR images of unknown border, but not all: complete it, or leave out --lr_border.'
                )
            self.lr_border = None
        elif making:
            with suppress(WriteError):  # the images will say so
                write_atomic(note, f'{self.border}\n'.encode())

    def _fill_caches(self, pool: ThreadPoolExecutor, renew: bool) -> None:
        files = [
            (index, path)
            for paths in (self._hr, self._lr)
            for index, path in enumerate(paths)
            if path and path.parent in self._caches and path.is_file() and index not in self._bad
        ]

        def decode(item: tuple[int, Path]) -> None:
            with self._excused(item[0]):
                self._caches[item[1].parent].write(item[1])

        try:
            if renew:
                for _, path in files:
                    self._caches[path.parent].remove(path)
            todo = [item for item in files if not self._caches[item[1].parent].path(item[1]).exists()]
            for folder in {self._caches[path.parent].folder for _, path in todo}:
                sweep(folder)
            self._each(pool, decode, todo, f'Decoding {self.name}')
        except WriteError as error:
            self._unwritten['images are decoded whenever they are read'] = error

    def _each(self, pool: ThreadPoolExecutor, work: Callable, items: Sequence, title: str) -> list:
        disable = None if items else True  # None: shown on a terminal only
        return list(tqdm(pool.map(work, items), title, len(items), leave=False, disable=disable))

    def _read(self, path: Path) -> np.ndarray:
        cache = self._caches.get(path.parent)
        return read_rgb(path) if cache is None else cache.read(path)

    def _make_lr(self, index: int) -> WriteError | None:
        path = self._lr[index]
        with self._excused(index):
            image = self._in_memory(index)
            if path is not None:
                try:
                    write_png(path, image)
                except WriteError as error:
                    return error
                del self._made[index]
        return None

    def _in_memory(self, index: int) -> np.ndarray:
        if index not in self._made:
            hr = self._read(self._hr[index])
            self._check_large_enough(self._hr[index], *hr.shape[:2])
            self._made[index] = shrink(hr, self.scale, self.border)
        return self._made[index]

    def _check_large_enough(self, path: Path, height: int, width: int) -> None:
        if min(height, width) < self.scale:
            raise UserError(f'{path} has {width}x{height} pixels, too few for x{self.scale}: remove it.')

    def _check_size(self, hr: Path, lr: Path) -> None:
        height, width = read_size(hr)
        self._check_large_enough(hr, height, width)
        expected, found = (height // self.scale, width // self.scale), read_size(lr)
        if found != expected:
            raise UserError(
                f'{lr} is {found[1]}x{found[0]} pixels, but {hr} shrunk by {self.scale} is '
                f'{expected[1]}x{expected[0]}: remove the LR file and it is made again.'
            )


def cache_folder(folder: Path) -> Path:
    """Where decoded copies of a folder's images are kept: as in EDSR in `bin` beside `HR` and `LR_bicubic`."""
    if folder.parent.name.endswith('LR_bicubic'):
        return folder.parent.parent / 'bin' / folder.parent.name / folder.name
    return folder.parent / 'bin' / folder.name if folder.name.endswith('HR') else folder / 'bin' / folder.name
