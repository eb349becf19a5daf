"""An image file that is being read: what it says of itself, and what is said of it, which always names the file."""

import logging
import re
import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import UnidentifiedImageError

from error import UserError

log = logging.getLogger('frugalsr')

_being_read: ContextVar[Path | None] = ContextVar('file', default=None)


@dataclass(frozen=True)
class Source:
    """An open image file.

    Attributes:
        height: of the upright image, in pixels.
        width: of it.
        read: gives its pixels, upright: (H, W, C) uint8 or uint16, where C is 1 grey, 2 grey and alpha, 3 RGB, 4 RGBA.
        pixel_bytes: memory that this takes at most, bytes a pixel.
        deep: whether these have 16 bits.
        frames: how many images the file holds, of which this is one.
        icc: the colour profile of these pixels.
        chunks: other statements on their colours, PNG chunks by name.
    """

    height: int
    width: int
    read: Callable[[], np.ndarray]
    pixel_bytes: int
    deep: bool = False
    frames: int = 1
    icc: bytes | None = None
    chunks: Mapping[bytes, bytes] = field(default_factory=dict)


def upright(samples: np.ndarray, orientation: int) -> np.ndarray:
    """Undoes an EXIF orientation (1 to 8, Exif 2.32 section 4.6.4) of (H, W, C)."""
    if swaps_sides(orientation):
        samples = samples.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        samples = samples[:, ::-1]
    return samples[::-1] if orientation in (3, 4, 7, 8) else samples


def swaps_sides(orientation: int) -> bool:
    """Whether the stored rows are the columns of the upright image."""
    return orientation in (5, 6, 7, 8)


def xmp_orientation(xmp: bytes) -> int:
    """The orientation that XMP data states, 1 if none."""
    found = re.search(rb'tiff:Orientation(?:="|>)([1-8])', xmp)
    return int(found[1]) if found else 1


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Within this block `path` is read: errors become a `UserError` that names it, and so do notes and warnings."""
    token = _being_read.set(path)
    try:
        if path.exists() and not path.is_file():  # such as a pipe, from which nothing may ever come
            raise UserError(f'{path} is not a file: give an image file.')
        yield
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f'{path} does not exist: check the path.') from error
    except PermissionError as error:
        raise UserError(f'{path} cannot be read ({error.strerror}): check its permissions.') from error
    except UnidentifiedImageError as error:
        found = f'{path} ({path.stat().st_size} bytes) is not an image that can be read'
        raise UserError(f'{found}: replace it by a PNG, JPEG, BMP, TIFF, WebP or GIF file.') from error
    except Exception as error:  # on a damaged file the decoders raise nearly anything
        reason = textwrap.shorten(str(error), 200, placeholder=' ...') or type(error).__name__
        raise UserError(f'{path} cannot be read ({reason}): restore it, or save it again as PNG.') from error
    finally:
        _being_read.reset(token)


def note(message: str) -> None:
    """Log what the user should know of the file that is being read: once, as it may be read many times."""
    path = _being_read.get()
    if path is None:
        log.warning('An image: %s', message)
    else:
        _note(path, message)


@lru_cache(maxsize=10_000)
def _note(path: Path, message: str) -> None:
    log.warning('%s: %s', path, message)


def name_warnings() -> None:
    """Have Pillow and tifffile, whose warnings name no file, warn by `note` while one is read."""
    warnings.filterwarnings('always', module=r'PIL\.')  # or only the first file of several would be named
    warnings.showwarning = _show_warning
    for name in ('tifffile', 'PIL.TiffImagePlugin'):
        logging.getLogger(name).addFilter(_is_of_no_file)


_show_elsewhere = warnings.showwarning


def _show_warning(message: Warning | str, *about, **more) -> None:
    if _being_read.get() is None:
        _show_elsewhere(message, *about, **more)
    else:
        note(str(message))


def _is_of_no_file(record: logging.LogRecord) -> bool:
    if _being_read.get() is None or record.levelno < logging.WARNING:
        return True
    note(record.getMessage())
    return False
