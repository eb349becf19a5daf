"""Results as files: the formats, what each can hold, and the metadata in them."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data.image import eight_bits, in_strips, is_grey
from data.png import encode_apng, encode_png
from data.profile import fits
from error import UserError
from photo.metadata import MOST, Metadata
from system.files import write_atomic

log = logging.getLogger('frugalsr')

SUFFIXES = {
    '.png': 'png', '.jpg': 'jpg', '.jpeg': 'jpg', '.webp': 'webp', '.tif': 'tif', '.tiff': 'tif', '.gif': 'gif'
}  # fmt: skip
SIDES = {'png': 2**31 - 1, 'tif': 2**31 - 1, 'jpg': 65_500, 'gif': 65_535, 'webp': 16_383}  # most pixels of a side
TIFF_BYTES = 2**32 - 2**24  # of pixels; offsets have 32 bits
ANIMATED = ('png', 'webp', 'gif')
XMP_IN_PNG = b'XML:com.adobe.xmp\0\0\0\0\0'  # XMP specification, part 3, section 1.1.5
MOST_PLAYS = 2**16 - 1  # that a WebP file can say, and a GIF file beside the first one
COLOURS = 255  # of a GIF image, beside the transparent one


@dataclass(frozen=True)
class Format:
    """How results are written.

    Attributes:
        name: png, jpg, webp, tif, gif, or same: as the source, of which BMP becomes PNG; None: TIFF for files of
            several pages and PNG for others.
        quality: of JPEG and WebP, 1 to 100.
        background: what stands behind transparent pixels in JPEG, RGB.
    """

    name: str | None = None
    quality: int = 95
    background: tuple[int, int, int] = (255, 255, 255)

    def of(self, source: Path, pages: bool = False) -> str:
        """The name of the format of a result; `pages` tells that the source has several."""
        if self.name == 'same':
            return SUFFIXES.get(source.suffix.lower(), 'png')
        return self.name or ('tif' if pages else 'png')


@dataclass(frozen=True)
class Colours:
    """What a file says of its colours: a profile, and PNG chunks by name."""

    icc: bytes | None
    chunks: Mapping[bytes, bytes]

    def fitting(self, grey: bool) -> bytes | None:
        """The profile, if it is one for such images."""
        return self.icc if fits(self.icc, grey) else None

    def lost_in(self, name: str, grey: bool) -> bool:
        """Whether a format cannot say of an image's colours what its file says.

        GIF has no profiles, WebP no grey images, and only PNG has chunks. By its third edition, section 4.3, cICP comes
        before a profile, and a profile and sRGB come before the others.
        """
        if name == 'png':
            return False
        icc = self.fitting(grey) is not None
        chunks = b'cICP' in self.chunks or (self.chunks and not icc and b'sRGB' not in self.chunks)
        return bool(chunks) or (icc and (name == 'gif' or (name == 'webp' and grey)))


def check_size(name: str, sizes: Sequence[tuple[int, int]]) -> None:
    """Refuse a result of images (height, width) that its format cannot hold.

    Raises:
        UserError: it cannot, and others can.
    """
    side, (height, width) = max((max(size), size) for size in sizes)
    if side > SIDES[name]:
        able = ', '.join(other for other, most in SIDES.items() if side <= most)
        raise UserError(
            f'{width}x{height} pixels do not fit into {name}, whose sides have at most {SIDES[name]:,}: choose another '
            f'format, of {able}.'
        )
    if name == 'tif' and sum(map(prod, sizes)) * 8 > TIFF_BYTES:
        raise UserError(f'{width}x{height} pixels may not fit into the 4 GB of a TIFF file: choose the format png.')


def keeps(name: str, plays: int | None) -> bool:
    """Whether a format holds the images of an animation, shown so often, or all pages."""
    return name in ('tif', *ANIMATED) if plays is not None else name == 'tif'


def write_result(
    pieces: Iterable[tuple[np.ndarray, float]],
    path: Path,
    name: str,
    heights: Sequence[int],
    plays: int | None,
    colours: Colours,
    metadata: Metadata,
    format: Format,
) -> None:
    """Write one image or several as a file, whole or not at all.

    A PNG file of one image is written as its rows come, PNG and TIFF files of several as the images come, others from
    all of them. PNG and TIFF keep 16 bits, others are rounded to 8; where a format has no alpha, the background takes
    its place. GIF has 256 colours. A colour profile that does not fit the colours is left out; what else a format
    cannot keep is said.

    Args:
        pieces: rows (some, W) or (some, W, 2 to 4) of uint8 or uint16, image after image, each with the milliseconds
            that its image is shown.
        path: the file.
        name: of the format, for several images one that `keeps` them.
        heights: of the images.
        plays: how often an animation is shown, 0 for ever; None: the images are pages.
        colours, metadata: what the file says besides.
        format: how it is written.

    Raises:
        WriteError: the file cannot be written; an older one stays as it was. Errors of `pieces` pass through.
    """
    pieces, count = iter(pieces), len(heights)
    first = next(pieces)
    _say_losses(first[0], path, name, colours)
    pieces = chain([first], pieces)
    images = _gather(pieces, heights)
    content: memoryview | Iterator[bytes]
    if name == 'png':
        says = _png_says(first[0], colours, metadata)
        if count == 1:
            content = encode_png((rows for rows, _ in pieces), heights[0], *says)
        else:
            content = encode_apng(images, count, plays or 0, *says)
    elif name == 'tif':
        content = _tiff((samples for samples, _ in images), count, colours, metadata)
    else:
        content = _encode(images, plays, path, name, colours, metadata, format)
    write_atomic(path, content)


def _say_losses(samples: np.ndarray, path: Path, name: str, colours: Colours) -> None:
    """Log what a format cannot keep."""
    if colours.lost_in(name, is_grey(samples)):
        log.warning('%s: %s cannot keep all that the file says of its colours.', path, name)
    if name == 'gif':
        log.info('%s: gif has 256 colours an image, to which others are reduced.', path)
    elif samples.dtype != np.uint8 and name not in ('png', 'tif'):
        log.info('%s: %s has 8 bits a channel, to which 16 are rounded.', path, name)


def _png_says(samples: np.ndarray, colours: Colours, metadata: Metadata) -> tuple[bytes | None, dict[bytes, bytes]]:
    """The profile and the chunks of a PNG file."""
    chunks = {**colours.chunks, b'eXIf': metadata.exif.tobytes()[6:]}
    return colours.fitting(is_grey(samples)), chunks | ({b'iTXt': XMP_IN_PNG + metadata.xmp} if metadata.xmp else {})


def _tiff(pages: Iterable[np.ndarray], count: int, colours: Colours, metadata: Metadata) -> Iterator[bytes]:
    from data.tiff import encode_tiff  # tifffile is rarely needed

    return encode_tiff(pages, count, metadata.exif, metadata.xmp, metadata.iptc, colours.icc)


def _gather(pieces: Iterator[tuple[np.ndarray, float]], heights: Sequence[int]) -> Iterator[tuple[np.ndarray, float]]:
    """Whole images, whose memory is in use from the start, so that tiles are chosen with it in mind."""
    for height in heights:
        rows, duration = next(pieces)
        samples, done = rows, len(rows)
        if done < height:
            samples = np.full((height, *rows.shape[1:]), 1, rows.dtype)
            samples[:done] = rows
        while done < height:
            rows, _ = next(pieces)
            samples[done : done + len(rows)] = rows
            done += len(rows)
        yield samples, duration


def over(samples: np.ndarray, background: tuple[int, int, int]) -> np.ndarray:
    """(H, W, 2 or 4) uint8 before a background: (H, W, 3), or (H, W) where all is grey."""
    grey = samples.shape[2] == 2 and len(set(background)) == 1
    behind = np.array(background[:1] if grey else background, np.uint32)

    def seen(rows: np.ndarray) -> np.ndarray:
        alpha = rows[..., -1:].astype(np.uint32)
        return ((rows[..., :-1] * alpha + behind * (255 - alpha) + 127) // 255).astype(np.uint8)

    found = in_strips(seen, samples)
    return found[..., 0] if grey else found


def _encode(
    images: Iterable[tuple[np.ndarray, float]],
    plays: int | None,
    path: Path,
    name: str,
    colours: Colours,
    metadata: Metadata,
    format: Format,
) -> memoryview:
    """A JPEG, WebP or GIF file."""
    frames, durations = zip(*((eight_bits(samples), round(duration)) for samples, duration in images), strict=True)
    options: dict[str, Any] = {}
    if len(frames) > 1:
        options = {'save_all': True, 'duration': durations}
        if name == 'webp':
            options['loop'] = plays and min(plays, MOST_PLAYS)
        elif plays != 1:  # a GIF file says how often after the first time
            options['loop'] = plays and min(plays - 1, MOST_PLAYS)
    if name == 'jpg':
        frames = [over(each, format.background) if each.shape[2:] in ((2,), (4,)) else each for each in frames]
        options |= _jpeg_options(metadata, format.quality, path)
    elif name == 'webp':
        options |= {'quality': format.quality, 'exact': True, 'exif': metadata.exif.tobytes()}
        options |= {'xmp': metadata.xmp} if metadata.xmp else {}
    else:
        options['comment'] = metadata.made.encode()
    pictures = [Image.fromarray(samples) for samples in frames]
    if name == 'gif':
        pictures = [_palette_image(picture) for picture in pictures]
        if any(picture.getextrema()[1] == COLOURS for picture in pictures):  # each is taken away before the next one
            options |= {'transparency': COLOURS, 'disposal': 2, 'optimize': False}  # which would number them anew
    grey = is_grey(frames[0])
    if not (name == 'gif' or (name == 'webp' and grey)):
        options['icc_profile'] = colours.fitting(grey)
    stream = BytesIO()
    pictures[0].save(stream, {'jpg': 'JPEG'}.get(name, name.upper()), append_images=pictures[1:], **options)
    return stream.getbuffer()


def _jpeg_options(metadata: Metadata, quality: int, path: Path) -> dict[str, object]:
    """What Pillow is to put into a JPEG file."""
    parts = {'EXIF': metadata.exif.tobytes(), 'XMP': metadata.xmp, 'IPTC': metadata.iptc}
    for kind, data in parts.items():
        if len(data) > MOST:
            log.warning('%s: JPEG has no room for %d bytes of %s data, which is not kept.', path, len(data), kind)
            parts[kind] = _noted(metadata) if kind == 'EXIF' else b''
    options: dict[str, object] = {'quality': quality, 'exif': parts['EXIF']}
    # Colours in full resolution from the quality on at which it shows.
    options['subsampling'] = 0 if quality >= 90 else 2
    if parts['XMP']:
        options['xmp'] = parts['XMP']
    if parts['IPTC']:
        options['extra'] = photoshop_segment(parts['IPTC'])
    return options


def photoshop_segment(iptc: bytes) -> bytes:
    """IPTC data as the segment APP13 of a JPEG file (Adobe Photoshop file formats, "Image resource blocks")."""
    block = b'8BIM\x04\x04\0\0' + len(iptc).to_bytes(4, 'big') + iptc + bytes(len(iptc) % 2)
    body = b'Photoshop 3.0\0' + block
    return b'\xff\xed' + (len(body) + 2).to_bytes(2, 'big') + body


def _palette_image(image: Image.Image) -> Image.Image:
    """An image of at most 256 colours, dithered where it has more; what is less than half opaque is transparent."""
    colour = image.convert('RGB')
    few = colour.quantize(COLOURS)
    indexed = colour.quantize(palette=few, dither=Image.Dither.FLOYDSTEINBERG)
    indexed.putpalette(bytes(few.getpalette() or ()).ljust(3 * (COLOURS + 1), b'\0'))
    if image.has_transparency_data:
        indexed.paste(COLOURS, mask=Image.fromarray(np.asarray(image.getchannel('A')) < 128))
    return indexed


def _noted(metadata: Metadata) -> bytes:
    """EXIF data that say nothing but how the image was made."""
    exif = Image.Exif()
    for tag in (0x000B, 0x0112):
        exif[tag] = metadata.exif[tag]
    return exif.tobytes()
