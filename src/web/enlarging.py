"""An image file enlarged into another file: what the page of app.py does, without the page."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

import api
from data.image import Photo, read_photo, read_size, to_pillow, write_png
from error import UserError
from model import Model
from model.tiles.tiling import Report
from photo.engine import enlarged
from system.files import write_atomic
from system.machine import best_device
from system.numerics import set_numerics
from web.choices import Choice
from web.comparing import Comparison, compare, eight_bits

QUALITY = 95  # of JPEG and WebP


@dataclass(frozen=True)
class Format:
    """A kind of image files: the end of their names, and pixels a side at most, by the format or its library."""

    suffix: str
    most: int


FORMATS = {'PNG': Format('.png', 2**31 - 1), 'JPEG': Format('.jpg', 65500), 'WebP': Format('.webp', 16383)}


class Stopped(Exception):
    """The visitor does not want the image any more."""


@dataclass(frozen=True)
class Result:
    """The enlarged image, a sentence about it, and what shows it beside the original."""

    image: Path
    about: str
    shown: Comparison


@lru_cache(maxsize=2)
def load(choice: Choice, cpu: bool) -> Model:
    """The network with its weights, which repeats its results to the bit on a CPU, as `main.py` has it."""
    device = 'cpu' if cpu else best_device()
    set_numerics(seed=1, deterministic=device == 'cpu', tf32=False)
    return api.load(choice.file or f'{choice.network}_x{choice.scale}', device).model


def enlarge(
    image: Path,
    choice: Choice,
    folder: Path,
    format: str,
    progress: Report,
    stop: Callable[[], bool],
    *,
    max_pixels: int,
    cpu: bool,
) -> Result:
    """Enlarge an image file into a folder.

    Args:
        image: the file.
        choice: what enlarges it.
        folder: where the result goes, and what shows it.
        format: of the result, a key of FORMATS. JPEG and WebP hold 8 bits a channel, JPEG no transparency.
        progress: is told how many tiles are done, and how many there are.
        stop: is asked after each tile whether to end.
        max_pixels: of the result, millions.
        cpu: leave the GPU alone.

    Raises:
        UserError: no image, or a damaged one, or the result would have more than `max_pixels` million pixels or more
            than the format holds; nothing was written.
        Stopped: `stop` said so; nothing was written.
    """
    (height, width), scale = read_size(image), choice.scale
    check_size(image, height, width, scale, format, max_pixels)

    def report(done: int, total: int) -> None:
        if stop():
            raise Stopped
        progress(done, total)

    photo = read_photo(image)
    model = load(choice, cpu)
    start = time.perf_counter()
    sr = np.concatenate(list(enlarged(model, photo, report)))
    seconds = time.perf_counter() - start
    result = folder / f'{image.stem}_x{scale}{FORMATS[format].suffix}'
    write(result, sr, photo, format)
    sizes = f'{width}x{height} to {sr.shape[1]}x{sr.shape[0]} pixels'
    about = f'{sizes} in {seconds:.1f} s by {choice}, {result.stat().st_size / 1000:,.0f} kB'
    if photo.frames > 1:
        about += f'; only the first of {photo.frames} images in the file'
    if loses_profile(photo, format):
        about += f'; without its colour profile, which {format} cannot hold: choose PNG for exact colours'
    return Result(result, about, compare(photo, sr, folder))


def check_size(image: Path, height: int, width: int, scale: int, format: str, max_pixels: int) -> None:
    """Make sure that an image of this size may be enlarged.

    Raises:
        UserError: the result would have too many pixels.
    """
    pixels = height * width * scale**2 / 1e6
    if pixels > max_pixels:
        raise UserError(
            f'{image} has {width}x{height} pixels, which x{scale} makes {pixels:,.1f} million; '
            f'at most {max_pixels} million are allowed: give a smaller image.'
        )
    if scale * max(height, width) > FORMATS[format].most:
        raise UserError(
            f'{image} would become {scale * width}x{scale * height} pixels; {format} holds at most '
            f'{FORMATS[format].most} a side: choose PNG.'
        )


def write(path: Path, sr: np.ndarray, photo: Photo, format: str) -> None:
    """Write an enlarged image as a file of the format, with the colour profile of the original."""
    if format == 'PNG':
        write_png(path, sr, photo.icc, photo.chunks)
        return
    image = to_pillow(eight_bits(sr), photo.icc)
    icc = None if loses_profile(photo, format) else image.info.get('icc_profile')
    options: dict[str, object] = {'quality': QUALITY}
    if format == 'JPEG':
        options['subsampling'] = 0  # or colours would have half the resolution
        image = opaque(image)
    content = BytesIO()
    image.save(content, format, icc_profile=icc, **options)
    write_atomic(path, content.getbuffer())


def loses_profile(photo: Photo, format: str) -> bool:
    """Whether a file of that format cannot say of its colours what the photograph says.

    WebP has no grey images, and only PNG has chunks. By its third edition, section 4.3, cICP comes before a profile,
    and a profile and sRGB come before the others.
    """
    if format == 'PNG':
        return False
    chunks = b'cICP' in photo.chunks or (photo.chunks and not photo.icc and b'sRGB' not in photo.chunks)
    return bool(chunks) or (format == 'WebP' and photo.grey and photo.icc is not None)


def opaque(image: Image.Image) -> Image.Image:
    """An image of Pillow on white, as pages and paper are, if it is transparent."""
    if not image.has_transparency_data:
        return image
    white = Image.new('RGBA', image.size, 'white')
    white.alpha_composite(image.convert('RGBA'))
    return white.convert('L' if image.mode == 'LA' else 'RGB')
