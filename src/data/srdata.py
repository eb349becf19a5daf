"""Paired images of a set: HR cropped to a multiple of the scale, LR from its file or made by MATLAB's bicubic."""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data.cache import DecodedCache
from data.degradation import Degradation
from data.image import read_rgb, read_size, write_png
from data.imresize import Border, shrink
from data.lr import Origin, find_lr, read_origin
from data.sets import ImageSet
from data.source import reading
from error import UserError, WriteError
from system.files import is_there, some, sweep

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

    Attributes:
        lr_made: how many LR images were made by this program, now or earlier; None: not known before `prepare`.
        lr_border: their border; None: there are none.
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
        self.lr_made: int | None = None
        self.lr_border: Border | None = None
        self._images, self._cached = images, cached
        self._hr = list(images.hr)
        self._lr: list[Path | None] = [None] * len(images.hr)  # until `prepare` looks for it
        self._made: dict[int, np.ndarray] = {}
        self._bad: dict[int, str] = {}  # what is wrong with an image
        self._unwritten: dict[str, WriteError] = {}  # what is done without, and why
        self._caches: dict[Path, DecodedCache] = {}

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
        found = {'channels': self.channels, 'shave': self.shave, 'lr_made': self.lr_made, 'lr_border': self.lr_border}
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
        self._lr = find_lr(self._images, self.scale)
        if self._cached:
            for hr, lr in zip(self._hr, self._lr, strict=True):
                for path in (hr, lr) if lr else ():  # an image without an LR folder lies where nothing may be written
                    self._caches.setdefault(path.parent, DecodedCache(cache_folder(path.parent)))
        with ThreadPoolExecutor(max(1, workers)) as pool:
            self._prepare_lr(pool)
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

    def _prepare_lr(self, pool: ThreadPoolExecutor) -> None:
        """Make the LR images that are missing, and those made here from an HR image that is another one now."""
        there = [index for index, lr in enumerate(self._lr) if lr and is_there(lr)]
        missing = sorted(set(range(len(self))) - set(there))
        found = dict(zip(there, self._each(pool, self._inspect, there, f'Checking LR of {self.name}'), strict=True))
        changed = [index for index, (_, is_old) in found.items() if is_old]
        origins = {self._lr[index]: origin for index, (origin, is_old) in found.items() if not is_old}
        self._check_border(origins, {path.parent for index in missing if (path := self._lr[index])})
        if changed:
            names = some([self.names[index] for index in changed])
            log.info('%s x%d: LR is made anew where its HR has changed: %s', self.name, self.scale, names)
        todo = sorted([*missing, *changed])
        if old := [path for path, origin in origins.items() if path and origin and not origin.hr]:
            log.warning(
                '%s: an older version made the LR there, and kept no record of what from: remove it if HR has changed.',
                some([*dict.fromkeys(str(path.parent) for path in old)]),
            )
        for folder in {path.parent for index in todo if (path := self._lr[index])}:
            sweep(folder)
        errors = [error for error in self._each(pool, self._make_lr, todo, f'Making LR of {self.name}') if error]
        if errors:
            self._unwritten['LR images are kept in memory'] = errors[0]
        made_now = {*todo} - self._bad.keys()
        made = made_now | {index for index, (origin, _) in found.items() if origin} - self._bad.keys()
        self.lr_made = len(made)
        self.lr_border = self.border if made else None
        now = f', {len(made_now)} of them now' if 0 < len(made_now) < len(made) else ''
        places = some([str(folder) for folder in dict.fromkeys(path.parent for path in self._lr if path)]) or 'memory'
        log.info('%s x%d: LR made: %d of %d%s; in %s', self.name, self.scale, self.lr_made, len(self), now, places)

    def _inspect(self, index: int) -> tuple[Origin | None, bool]:
        """What an LR file was made from, if it was made here, and whether that has changed."""
        hr, lr = self._hr[index], self._lr[index]
        assert lr is not None
        origin = read_origin(lr)
        with self._excused(index):
            with reading(hr):
                if origin and origin.has_changed(hr):
                    return origin, True
            self._check_size(hr, lr)
        return origin, False

    def _check_border(self, origins: Mapping[Path | None, Origin | None], incomplete: set[Path]) -> None:
        """LR images of another border are not taken for those that are wanted."""
        for path, origin in origins.items():
            assert path is not None
            if origin is not None and origin.border != self.border:
                raise UserError(
                    f'The LR images in {path.parent} have --lr_border {origin.border}: give that, or remove it.'
                )
            if origin is None and self.border != 'mirror' and path.parent in incomplete:
                raise UserError(
                    f'{path.parent} holds LR images of unknown border, but not all: complete it, or leave out '
                    '--lr_border.'
                )

    def _fill_caches(self, pool: ThreadPoolExecutor, renew: bool) -> None:
        files = [
            (index, path)
            for paths in (self._hr, self._lr)
            for index, path in enumerate(paths)
            if path and path.parent in self._caches and is_there(path) and index not in self._bad
        ]

        def decode(item: tuple[int, Path]) -> None:
            with self._excused(item[0]):
                self._caches[item[1].parent].write(item[1])

        try:
            if renew:
                for _, path in files:
                    self._caches[path.parent].remove(path)
            todo = [item for item in files if not is_there(self._caches[item[1].parent].path(item[1]))]
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
        hr, path = self._hr[index], self._lr[index]
        with self._excused(index):
            if path is None:
                self._in_memory(index)
                return None
            with reading(hr):
                origin = Origin.of(hr, self.border)  # before its pixels are read, in case it is just being replaced
            image = self._in_memory(index)
            try:
                write_png(path, image, chunks=origin.chunks())
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
