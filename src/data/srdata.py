"""Paired images of a set: HR cropped to a multiple of the scale, LR from its file or made by MATLAB's bicubic."""

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.cache import DecodedCache
from data.image import read_rgb, read_size, write_png
from data.imresize import Border, shrink
from data.sets import ImageSet
from error import UserError, WriteError

log = logging.getLogger('frugalsr')


class SRData:
    """The images of one set at one scale.

    Args:
        images: the files.
        scale: factor between HR and LR.
        border: what the bicubic assumes beyond the edge when LR is made.
        cached: keep decoded copies beside the images (EDSR's `--ext sep`).
    """

    def __init__(self, images: ImageSet, scale: int, border: Border = 'mirror', cached: bool = False) -> None:
        self.name, self.channels, self.names = images.name, images.channels, images.names
        self.scale, self.border = scale, border
        self._hr = list(images.hr)
        self._lr = [
            None if folder is None else folder / f'X{scale}' / f'{path.stem}x{scale}.png'
            for path, folder in zip(images.hr, images.lr, strict=True)
        ]
        self._made: dict[int, np.ndarray] = {}
        self._caches: dict[Path, DecodedCache] = {}
        if cached:
            for path in [*self._hr, *filter(None, self._lr)]:
                self._caches.setdefault(path.parent, DecodedCache(cache_folder(path.parent)))

    def __len__(self) -> int:
        return len(self._hr)

    def hr(self, index: int) -> np.ndarray:
        """(H, W, 3) uint8, H and W multiples of the scale."""
        image = self._read(self._hr[index])
        height, width = (n - n % self.scale for n in image.shape[:2])
        return image[:height, :width]

    def lr(self, index: int) -> np.ndarray:
        """(H / scale, W / scale, 3) uint8."""
        path = self._lr[index]
        if index in self._made or path is None:
            return self._in_memory(index)
        return self._read(path)

    def prepare(self, workers: int = 1, renew_cache: bool = False) -> None:
        """Check the LR files there are, make those that are missing, decode what is to be cached.

        LR is kept as `X<scale>/<name>x<scale>.png`, or in memory where that folder cannot be written.

        Raises:
            UserError: an image cannot be read, is smaller than the scale, or an LR file has the wrong size.
        """
        missing = []
        for index, (hr, lr) in enumerate(zip(self._hr, self._lr, strict=True)):
            if lr is not None and lr.is_file():
                self._check_size(hr, lr)
            else:
                missing.append(index)
        with ThreadPoolExecutor(max(1, workers)) as pool:
            self._each(pool, self._make_lr, missing, f'Making LR of {self.name} x{self.scale}')
            if self._caches:
                self._fill_caches(pool, renew_cache)

    def _fill_caches(self, pool: ThreadPoolExecutor, renew: bool) -> None:
        files = [path for path in [*self._hr, *filter(None, self._lr)] if path.is_file()]
        if renew:
            for path in files:
                self._caches[path.parent].remove(path)
        todo = [path for path in files if not self._caches[path.parent].path(path).exists()]
        try:
            self._each(pool, lambda path: self._caches[path.parent].write(path), todo, f'Decoding {self.name}')
        except WriteError as error:
            log.warning('Images of %s are decoded whenever they are read: %s', self.name, error)

    def _each(self, pool: ThreadPoolExecutor, work: Callable, items: Sequence, title: str) -> None:
        disable = None if items else True  # None: shown on a terminal only
        for _ in tqdm(pool.map(work, items), title, len(items), leave=False, disable=disable):
            pass

    def _read(self, path: Path) -> np.ndarray:
        cache = self._caches.get(path.parent)
        return read_rgb(path) if cache is None else cache.read(path)

    def _make_lr(self, index: int) -> None:
        path = self._lr[index]
        image = self._in_memory(index)
        if path is None:
            return
        try:
            write_png(path, image)
        except WriteError as error:
            self._warn_unwritable(path.parent, error)
        else:
            del self._made[index]

    def _in_memory(self, index: int) -> np.ndarray:
        if index not in self._made:
            hr = self._read(self._hr[index])
            if min(hr.shape[:2]) < self.scale:
                height, width = hr.shape[:2]
                raise UserError(f'{self._hr[index]} has {width}x{height} pixels, too few for x{self.scale}: remove it.')
            self._made[index] = shrink(hr, self.scale, self.border)
        return self._made[index]

    def _warn_unwritable(self, folder: Path, error: Exception) -> None:
        with _warning:
            if folder not in _warned:
                _warned.add(folder)
                log.warning('LR images of %s x%d are kept in memory: %s', self.name, self.scale, error)

    def _check_size(self, hr: Path, lr: Path) -> None:
        expected = tuple(n // self.scale for n in read_size(hr))
        found = read_size(lr)
        if found != expected:
            raise UserError(
                f'{lr} is {found[1]}x{found[0]} pixels, but {hr} shrunk by {self.scale} is '
                f'{expected[1]}x{expected[0]}: remove the LR file and it is made again.'
            )


_warning = threading.Lock()
_warned: set[Path] = set()


def cache_folder(folder: Path) -> Path:
    """Where EDSR keeps decoded copies of a folder's images: `bin` beside `HR` and `LR_bicubic`."""
    if folder.parent.name.endswith('LR_bicubic'):
        return folder.parent.parent / 'bin' / folder.parent.name / folder.name
    return folder.parent / 'bin' / folder.name
