"""Files of several images: the frames of GIF, animated PNG and WebP, the pages of TIFF."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags
from PIL.ImageFile import ImageFile
from PIL.TiffImagePlugin import TiffImageFile

from data.apng import read_apng
from data.formats import MAX_PIXELS, identify, orientation_of, source_of
from data.image import Photo, as_photo, rgba_of
from data.limit import pillow_allows
from data.png import HEAD_BYTES, is_png16
from data.source import Source, note, reading, upright

REDUCED = 1  # bit of NewSubfileType (TIFF 6.0, section 8): a smaller version of another page


@dataclass(frozen=True)
class Series:
    """The images of a file.

    Attributes:
        sizes: height and width of each, upright.
        plays: how often an animation is shown, 0 for ever; None for pages, and for a single image.
    """

    sizes: tuple[tuple[int, int], ...]
    plays: int | None = None


def read_series(path: Path) -> Series:
    """What a file says of its images; their pixels are not decoded.

    Raises:
        UserError: as `open_image`.
    """
    with reading(path), pillow_allows(MAX_PIXELS), path.open('rb') as file:
        image = identify(file)
        first = source_of(path, file, image)
        if image is not None and image.format == 'GIF' and not _is_whole_gif(file):
            note('it ends early: images may be missing')
        size = first.height, first.width
        if numbers := _animated(image, first):
            assert image is not None
            file.seek(0)
            if is_png16(file.read(HEAD_BYTES)):
                note('its images are read with 8 bits a channel')
            return Series((size,) * len(numbers), _plays(image))
        pages = (source_of(path, file, image, number) for number in _pages(image, first)[1:])
        return Series((size, *((page.height, page.width) for page in pages)))


def read_frames(path: Path) -> Iterator[tuple[Photo, float]]:
    """The images of a file as of `read_series`, each with the milliseconds that it is shown, 0 for pages.

    A frame of an animation is what is seen then, with alpha; it has 8 bits a channel.

    Raises:
        UserError: as `open_image`.
    """
    with reading(path):
        file = path.open('rb')
    with file:
        with reading(path), pillow_allows(MAX_PIXELS):
            image = identify(file)
            first = source_of(path, file, image)
            animated = _animated(image, first)
            numbers = animated or _pages(image, first)
            orientation = orientation_of(image) if image and animated else 1
            shown = _shown(image, file, animated) if image and animated else None
        for number in numbers:
            with reading(path), pillow_allows(MAX_PIXELS):
                if shown:
                    samples, duration = next(shown)
                    samples, page = upright(samples, orientation)[: first.height, : first.width], first
                else:
                    page = source_of(path, file, image, number) if number else first
                    samples, duration = page.read(), 0
                found = as_photo(samples, page.icc, page.chunks), float(duration)
            yield found


def _shown(image: ImageFile, file: BinaryIO, numbers: range) -> Iterator[tuple[np.ndarray, float]]:
    """The frames of an animation as they are seen, (H, W, 4) uint8, each with its milliseconds."""
    if image.format == 'PNG':
        yield from islice(read_apng(file), len(numbers))
        raise ValueError(f'it has fewer than its {len(numbers)} images')
    for number in numbers:
        image.seek(number)
        yield rgba_of(image), image.info.get('duration') or 0


def _is_whole_gif(file: BinaryIO) -> bool:
    """Whether a GIF file, which says nowhere how many images it has, ends with the mark of its end."""
    place = file.tell()
    file.seek(-1, os.SEEK_END)
    last = file.read(1)
    file.seek(place)
    return last == b';'


def _animated(image: ImageFile | None, first: Source) -> range | None:
    """The numbers of the frames, if a file is an animation."""
    if image is None or isinstance(image, TiffImageFile):
        return None
    begin = int(getattr(image, 'default_image', False))  # of a PNG file whose still image is no part of the animation
    return range(begin, first.frames) if first.frames - begin > 1 else None


def _pages(image: ImageFile | None, first: Source) -> list[int]:
    """The numbers of the pages, of a TIFF file the first one and those that are no smaller versions of others."""
    if image is None:
        return list(range(first.frames))
    found = [0]
    if not isinstance(image, TiffImageFile):
        return found
    for number in range(1, first.frames):
        image.seek(number)
        if not image.tag_v2.get(ExifTags.Base.NewSubfileType, 0) & REDUCED:
            found.append(number)
    image.seek(0)
    return found


def _plays(image: ImageFile) -> int:
    """How often an animation is shown; a GIF file says how often after the first time, or nothing for once."""
    loop = image.info.get('loop')
    if image.format == 'GIF':
        return 1 if loop is None else loop and loop + 1
    return loop or 0
