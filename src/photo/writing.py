"""Results as files: the formats, what each can hold, and the metadata in them."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from data.gif import TRANSPARENT, encode_gif
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
MOST_PLAYS = 2**16 - 1  # that a WebP file can say
LONGEST = 655_350  # milliseconds that a GIF file can say


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


class Piece(NamedTuple):
    """Rows of an image of a file: (some, W) or (some, W, 2 to 4), uint8 or uint16.

    Attributes:
        colours: what is said of the image's colours.
        duration: milliseconds that the image is shown, 0 for pages.
    """

    rows: np.ndarray
    colours: Colours
    duration: float = 0.0


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
    pieces: Iterable[Piece],
    path: Path,
    name: str,
    heights: Sequence[int],
    plays: int | None,
    metadata: Metadata,
    format: Format,
) -> None:
    """Write one image or several as a file, whole or not at all.

    A PNG file of one image is written as its rows come, PNG, TIFF and GIF files of several as the images come, others
    from all of them. PNG and TIFF keep 16 bits, others are rounded to 8; where a format has no alpha, the background
    takes its place. GIF has 256 colours. A colour profile that does not fit the colours is left out; what else a
    format cannot keep is said. TIFF has the profile of each page, others that of the first image.

    Args:
        pieces: image after image.
        path: the file.
        name: of the format, for several images one that `keeps` them.
        heights: of the images.
        plays: how often an animation is shown, 0 for ever; None: the images are pages.
        metadata: what the file says besides.
        format: how it is written.

    Raises:
        WriteError: the file cannot be written; an older one stays as it was. Errors of `pieces` pass through.
    """
    pieces, count = iter(pieces), len(heights)
    first = next(pieces)
    _say_losses(first, path, name)
    pieces = chain([first], pieces)
    images = _gather(pieces, heights)
    content: memoryview | Iterator[bytes]
    if name == 'png':
        says = _png_says(first, metadata)
        if count == 1:
            content = encode_png((piece.rows for piece in pieces), heights[0], *says)
        else:
            content = encode_apng(((image.rows, image.duration) for image in images), count, plays or 0, *says)
    elif name == 'tif':
        content = _tiff(images, count, metadata)
    elif name == 'gif':
        content = encode_gif(_gif_images(images, path), plays if count > 1 else None, metadata.made.encode())
    else:
        content = _encode(images, plays, path, name, metadata, format)
    write_atomic(path, content)


def _say_losses(first: Piece, path: Path, name: str) -> None:
    """Log what a format cannot keep."""
    if first.colours.lost_in(name, is_grey(first.rows)):
        log.warning('%s: %s cannot keep all that the file says of its colours.', path, name)
    if name == 'gif':
        log.info('%s: gif has 256 colours an image, to which others are reduced.', path)
    elif first.rows.dtype != np.uint8 and name not in ('png', 'tif'):
        log.info('%s: %s has 8 bits a channel, to which 16 are rounded.', path, name)


def _png_says(first: Piece, metadata: Metadata) -> tuple[bytes | None, dict[bytes, bytes]]:
    """The profile and the chunks of a PNG file."""
    chunks = {**first.colours.chunks, b'eXIf': metadata.exif.tobytes()[6:]}
    chunks |= {b'iTXt': XMP_IN_PNG + metadata.xmp} if metadata.xmp else {}
    return first.colours.fitting(is_grey(first.rows)), chunks


def _tiff(images: Iterable[Piece], count: int, metadata: Metadata) -> Iterator[bytes]:
    from data.tiff import encode_tiff  # tifffile is rarely needed

    pages = ((image.rows, image.colours.icc) for image in images)
    return encode_tiff(pages, count, metadata.exif, metadata.xmp, metadata.iptc)


def _gather(pieces: Iterator[Piece], heights: Sequence[int]) -> Iterator[Piece]:
    """Whole images, whose memory is in use from the start, so that tiles are chosen with it in mind."""
    for height in heights:
        first = next(pieces)
        samples, done = first.rows, len(first.rows)
        if done < height:
            samples = np.full((height, *samples.shape[1:]), 1, samples.dtype)
            samples[:done] = first.rows
        while done < height:
            rows = next(pieces).rows
            samples[done : done + len(rows)] = rows
            done += len(rows)
        yield first._replace(rows=samples)


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
    images: Iterable[Piece], plays: int | None, path: Path, name: str, metadata: Metadata, format: Format
) -> memoryview:
    """A JPEG or WebP file."""
    shown = ((eight_bits(image.rows), image.colours, image.duration) for image in images)
    frames, colours, durations = map(list, zip(*shown, strict=True))
    options: dict[str, Any] = {}
    if len(frames) > 1:
        options = {'save_all': True, 'duration': durations, 'loop': plays and min(plays, MOST_PLAYS)}
    if name == 'jpg':
        frames = [over(each, format.background) if each.shape[2:] in ((2,), (4,)) else each for each in frames]
        options |= _jpeg_options(metadata, format.quality, path)
    else:
        options |= {'quality': format.quality, 'exact': True, 'exif': metadata.exif.tobytes()}
        options |= {'xmp': metadata.xmp} if metadata.xmp else {}
    grey = is_grey(frames[0])
    if name == 'jpg' or not grey:
        options['icc_profile'] = colours[0].fitting(grey)
    first, *others = map(Image.fromarray, frames)
    stream = BytesIO()
    first.save(stream, {'jpg': 'JPEG', 'webp': 'WEBP'}[name], append_images=others, **options)
    return stream.getbuffer()


def _gif_images(images: Iterable[Piece], path: Path) -> Iterator[tuple[Image.Image, int]]:
    """Images as `encode_gif` takes them; the log says if the animation takes another time than it should."""
    asked = given = 0.0
    for image in images:
        begin, asked = asked, asked + image.duration
        time = 10 * (round(asked / 10) - round(begin / 10))  # so that what is rounded does not add up
        time = min(max(time, 20 if image.duration > 10 else 0), LONGEST)  # browsers show 0.01 s as 0.1 s
        given += time
        yield _palette_image(Image.fromarray(eight_bits(image.rows))), time
    if abs(given - asked) > 10:
        log.info(
            '%s: gif shows an image for 0.01 s, or 0.02 to 655 s: its images take %.2f s, not %.2f.',
            path, given / 1000, asked / 1000,
        )  # fmt: skip


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
    few = colour.quantize(TRANSPARENT)
    indexed = colour.quantize(palette=few, dither=Image.Dither.FLOYDSTEINBERG)
    indexed.putpalette(bytes(few.getpalette() or ()).ljust(3 * (TRANSPARENT + 1), b'\0'))
    if image.has_transparency_data:
        indexed.paste(TRANSPARENT, mask=Image.fromarray(np.asarray(image.getchannel('A')) < 128))
    return indexed


def _noted(metadata: Metadata) -> bytes:
    """EXIF data that say nothing but how the image was made."""
    exif = Image.Exif()
    for tag in (0x000B, 0x0112):
        exif[tag] = metadata.exif[tag]
    return exif.tobytes()
