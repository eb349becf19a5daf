"""Results as files: the formats, what each can hold, and the metadata in them."""

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from itertools import chain
from pathlib import Path

import numpy as np
from PIL import Image

from data.png import encode_png
from data.profile import fits
from error import UserError
from photo.metadata import MOST, Metadata
from system.files import write_atomic

log = logging.getLogger('frugalsr')

SUFFIXES = {'.png': 'png', '.jpg': 'jpg', '.jpeg': 'jpg', '.webp': 'webp', '.tif': 'tif', '.tiff': 'tif'}
SIDES = {'png': 2**31 - 1, 'tif': 2**31 - 1, 'jpg': 65_500, 'webp': 16_383}  # most pixels of a side
TIFF_BYTES = 2**32 - 2**24  # of pixels; offsets have 32 bits
XMP_IN_PNG = b'XML:com.adobe.xmp\0\0\0\0\0'  # XMP specification, part 3, section 1.1.5


@dataclass(frozen=True)
class Format:
    """How results are written.

    Attributes:
        name: png, jpg, webp, tif, or same: as the source, of which BMP becomes PNG.
        quality: of JPEG and WebP, 1 to 100.
        background: what stands behind transparent pixels in JPEG, RGB.
    """

    name: str = 'png'
    quality: int = 95
    background: tuple[int, int, int] = (255, 255, 255)

    def of(self, source: Path) -> str:
        """The name of the format of a result."""
        return SUFFIXES.get(source.suffix.lower(), 'png') if self.name == 'same' else self.name


def check_size(name: str, height: int, width: int) -> None:
    """Refuse a result that its format cannot hold.

    Raises:
        UserError: it cannot, and others can.
    """
    if max(height, width) > SIDES[name]:
        able = ', '.join(other for other, most in SIDES.items() if max(height, width) <= most)
        raise UserError(
            f'{width}x{height} pixels do not fit into {name}, whose sides have at most {SIDES[name]:,}: give --format '
            f'with one of {able}.'
        )
    if name == 'tif' and height * width * 8 > TIFF_BYTES:
        raise UserError(f'{width}x{height} pixels may not fit into the 4 GB of a TIFF file: give --format png.')


def write_result(
    rows: Iterable[np.ndarray],
    path: Path,
    name: str,
    height: int,
    icc: bytes | None,
    chunks: Mapping[bytes, bytes],
    metadata: Metadata,
    format: Format,
) -> None:
    """Write rows (some, W) or (some, W, 2 to 4) of uint8 or uint16, `height` in all, as a file, whole or not at all.

    PNG is written as its rows come, others from the whole image. PNG and TIFF keep 16 bits, others are rounded to 8;
    where a format has no alpha, the background takes its place. A colour profile that does not fit the colours is left
    out; other statements on colours, PNG chunks, have a place in PNG alone.

    Raises:
        WriteError: the file cannot be written; an older one stays as it was. Errors of `rows` pass through.
    """
    rows = iter(rows)
    first = next(rows)
    grey = first.ndim < 3 or first.shape[2] < 3
    icc = icc if fits(icc, grey) else None
    if name == 'png':
        more = {b'eXIf': metadata.exif.tobytes()[6:]} | ({b'iTXt': XMP_IN_PNG + metadata.xmp} if metadata.xmp else {})
        write_atomic(path, encode_png(chain([first], rows), height, icc, {**chunks, **more}))
        return
    samples = _gather(first, rows, height)
    if chunks and icc is None:
        log.warning('%s: what the PNG file says of its colours without a profile is not kept in %s.', path, name)
    if name == 'tif':
        from data.tiff import encode_tiff  # tifffile is rarely needed

        write_atomic(path, encode_tiff(samples, metadata.exif, metadata.xmp, icc))
        return
    if samples.dtype != np.uint8:
        log.info('%s: %s has 8 bits a channel, to which 16 are rounded.', path, name)
        samples = ((samples.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if name == 'jpg' and samples.ndim == 3 and samples.shape[2] in (2, 4):
        samples = over(samples, format.background)
        icc = icc if fits(icc, samples.ndim < 3) else None
    write_atomic(path, _encode(samples, name, format.quality, icc, metadata, path))


def _gather(first: np.ndarray, rows: Iterator[np.ndarray], height: int) -> np.ndarray:
    """All rows in one array, whose memory is in use from the start, so that tiles are chosen with it in mind."""
    samples, done = np.full((height, *first.shape[1:]), 1, first.dtype), 0
    for piece in chain([first], rows):
        samples[done : done + len(piece)] = piece
        done += len(piece)
    return samples


def over(samples: np.ndarray, background: tuple[int, int, int]) -> np.ndarray:
    """(H, W, 2 or 4) uint8 before a background: (H, W, 3), or (H, W) where all is grey."""
    alpha = samples[..., -1:].astype(np.uint32)
    grey = samples.shape[2] == 2 and len(set(background)) == 1
    behind = np.array(background[:1] if grey else background, np.uint32)
    seen = (samples[..., :-1] * alpha + behind * (255 - alpha) + 127) // 255
    return seen.astype(np.uint8)[..., 0] if grey else seen.astype(np.uint8)


def _encode(
    samples: np.ndarray, name: str, quality: int, icc: bytes | None, metadata: Metadata, path: Path
) -> memoryview:
    """A JPEG or WebP file."""
    image, stream = Image.fromarray(samples), BytesIO()
    exif, xmp = metadata.exif.tobytes(), metadata.xmp
    if name == 'jpg':
        for kind, data in (('EXIF', exif), ('XMP', xmp)):
            if len(data) > MOST:
                log.warning('%s: JPEG has no room for %d bytes of %s data, which is not kept.', path, len(data), kind)
        exif = exif if len(exif) <= MOST else _noted(metadata)
        xmp = xmp if len(xmp) <= MOST else b''
    options = {'exif': exif, 'xmp': xmp} if xmp else {'exif': exif}
    if name == 'jpg':  # colours in full resolution from the quality on at which it shows
        image.save(stream, 'JPEG', quality=quality, subsampling=0 if quality >= 90 else 2, icc_profile=icc, **options)
    else:
        image.save(stream, 'WEBP', quality=quality, exact=True, icc_profile=icc, **options)
    return stream.getbuffer()


def _noted(metadata: Metadata) -> bytes:
    """EXIF data that say nothing but how the image was made."""
    exif = Image.Exif()
    for tag in (0x000B, 0x0112):
        exif[tag] = metadata.exif[tag]
    return exif.tobytes()
