"""TIFF: written, and read where Pillow does not, or not with all bits: files of 16 bits a channel above all."""

import struct
import zlib
from collections.abc import Iterable, Iterator
from functools import lru_cache
from io import BytesIO
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, TiffTags
from PIL.TiffImagePlugin import ImageFileDirectory_v2
from tifffile import COMPRESSION, EXTRASAMPLE, PHOTOMETRIC, PLANARCONFIG, PREDICTOR, SAMPLEFORMAT, TiffFile, TiffPage

from data.profile import fits
from data.source import Source, swaps_sides, upright, xmp_orientation
from error import UserError

COLORS = {PHOTOMETRIC.MINISWHITE: 1, PHOTOMETRIC.MINISBLACK: 1, PHOTOMETRIC.RGB: 3}  # channels
PLANES, WEBP = PLANARCONFIG.SEPARATE, COMPRESSION.WEBP
UNSIGNED = {SAMPLEFORMAT.UINT, SAMPLEFORMAT.VOID}
MOST_CHANNELS = 8  # with those that are dropped
STRIP_BYTES = 2**18  # before packing
HEADER = 8  # bytes
PLAIN, MULTIPLIED = 30, 58  # bytes a pixel while an image is read, measured
ORIENTATION, XMP = ExifTags.Base.Orientation, ExifTags.Base.XMLPacket
IPTC, ICC = ExifTags.Base.IPTCNAA, ExifTags.Base.InterColorProfile


def open_tiff(path: Path, file: BinaryIO, number: int = 0) -> Source:
    """A page of the file `path`, open as `file`; its pixels are grey or RGB, with or without alpha, of 8 or 16 bits.

    Raises:
        ValueError: damaged. What it gives raises it too, for other kinds of pixels, and `UserError` where imagecodecs
            is needed.
    """
    tif = _opened(file)
    page = tif.pages[number]
    assert isinstance(page, TiffPage)
    tags = {code: page.tags[code].value for code in (ORIENTATION, XMP, ICC) if code in page.tags}
    orientation = tags.get(ORIENTATION) or xmp_orientation(tags.get(XMP, b''))
    sides = page.imagelength, page.imagewidth
    height, width = sides[::-1] if swaps_sides(orientation) else sides

    def read() -> np.ndarray:
        return upright(_read(path, tif, page), orientation)

    pixel_bytes = MULTIPLIED if EXTRASAMPLE.ASSOCALPHA in page.extrasamples else PLAIN
    return Source(height, width, read, pixel_bytes, page.dtype == np.uint16, len(tif.pages), tags.get(ICC))


@lru_cache(maxsize=1)
def _opened(file: BinaryIO) -> TiffFile:
    """The same one for all pages of a file: to find a page it has to go through those before it, once."""
    file.seek(0)
    return TiffFile(file)


def first_tags(file: BinaryIO) -> dict[int, object]:
    """The tags of the first page of an open file."""
    page = _opened(file).pages[0]
    assert isinstance(page, TiffPage)
    return {tag.code: tag.value for tag in page.tags}


def _read(path: Path, tif: TiffFile, page: TiffPage) -> np.ndarray:
    if reason := _why_not(page):
        raise ValueError(reason)
    # tifffile fills up a tile cut short between two rows without a word.
    ends = map(sum, zip(page.dataoffsets, page.databytecounts, strict=True))
    if max(ends) > tif.filehandle.size:
        raise ValueError('the file ends early')
    try:
        samples = page.asarray()
    except ValueError as error:
        if 'imagecodecs' not in str(error):
            raise
        raise UserError(
            f'{path} is packed by {_name(page.compression)}, which takes imagecodecs to read: pip install imagecodecs, '
            'or save it again without compression.'
        ) from error
    height, width, channels = page.imagelength, page.imagewidth, page.samplesperpixel
    planar = page.planarconfig == PLANES
    samples = samples.reshape(channels, height, width) if planar else samples.reshape(height, width, channels)
    samples = np.moveaxis(samples, 0, 2) if planar else samples
    samples = samples.astype(samples.dtype.newbyteorder('='))
    colors = COLORS[PHOTOMETRIC(page.photometric)]
    if page.photometric == PHOTOMETRIC.MINISWHITE:
        samples[..., :1] = ~samples[..., :1]
    for place, kind in enumerate(page.extrasamples, colors):
        if kind in (EXTRASAMPLE.ASSOCALPHA, EXTRASAMPLE.UNASSALPHA):
            samples = samples[..., [*range(colors), place]]
            return _unmultiply(samples) if kind == EXTRASAMPLE.ASSOCALPHA else samples
    return samples[..., :colors]


def _why_not(page: TiffPage) -> str | None:
    """What keeps an image from being read."""
    kind, bits = page.dtype, page.bitspersample
    if kind is not None and kind.kind in 'fc':
        return f'its pixels are floats ({kind}), of which no one knows what is white; 8 or 16 bits a channel are read'
    if kind is not None and kind.kind == 'i':
        return f'its pixels are signed integers ({kind}); 8 or 16 bits a channel, unsigned, are read'
    if kind not in (np.uint8, np.uint16) or bits != 8 * kind.itemsize:
        return f'it has {bits} bits a channel; 8 or 16 are read'
    if page.photometric not in COLORS:
        return f'its colours are {_name(page.photometric)}, in a form that is not read; grey and RGB are'
    if page.imagedepth != 1:
        return f'it is a volume of {page.imagedepth} layers, not an image'
    if page.samplesperpixel > MOST_CHANNELS:
        return f'it has {page.samplesperpixel} channels; at most {MOST_CHANNELS} are read'
    return None


def _name(number: int) -> str:
    """Of a value of one of tifffile's enumerations, or of one that they do not know."""
    return getattr(number, 'name', str(number))


def _unmultiply(samples: np.ndarray) -> np.ndarray:
    """Divides the colours of (H, W, C) by the alpha they were multiplied with."""
    peak = np.iinfo(samples.dtype).max
    alpha = samples[..., -1:].astype(np.uint32)
    color = (samples[..., :-1].astype(np.uint32) * peak + alpha // 2) // np.maximum(alpha, 1)
    return np.concatenate((np.minimum(color, peak), alpha), axis=2).astype(samples.dtype)


def encode_tiff(
    pages: Iterable[tuple[np.ndarray, bytes | None]],
    count: int,
    exif: Image.Exif,
    xmp: bytes = b'',
    iptc: bytes = b'',
) -> Iterator[bytes]:
    """A TIFF file in pieces, packed by deflate after horizontal differences (TIFF 6.0, section 14).

    Args:
        pages: uint8 or uint16 (H, W) or (H, W, C); C = 1 grey, 2 grey and alpha, 3 RGB, 4 RGBA; each with
            its colour profile, which is left out where it does not fit.
        count: how many there are; all together have less than 4 GB.
        exif: tags that the first page is to have besides those of its pixels.
        xmp, iptc: an XMP packet and IPTC data to put into it.
    """
    place = 0
    for number, (samples, icc) in enumerate(pages):
        samples = samples[..., None] if samples.ndim == 2 else samples
        own = icc if fits(icc, samples.shape[2] < 3) else None
        about = (exif, xmp, iptc) if number == 0 else (Image.Exif(), b'', b'')
        head, strips = _encode_page(samples, *about, own, place)
        end = place + len(head) + sum(map(len, strips))
        filling = end % 2  # a directory begins at an even place
        if number < count - 1:
            head = _with_next(head, end + filling, first=number == 0)
        yield head
        yield from strips
        yield bytes(filling)
        place = end + filling


def _with_next(head: bytes, place: int, first: bool) -> bytes:
    """A page's directory, which says where the next one is."""
    begin = HEADER if first else 0
    after = begin + 2 + 12 * struct.unpack_from('<H', head, begin)[0]
    return head[:after] + struct.pack('<I', place) + head[after + 4 :]


def _encode_page(
    samples: np.ndarray, exif: Image.Exif, xmp: bytes, iptc: bytes, icc: bytes | None, place: int
) -> tuple[bytes, list[bytes]]:
    """The directory of a page that begins at a place in the file, at 0 with the file's header, and its pixels."""
    height, width, channels = samples.shape
    rows = max(1, STRIP_BYTES // (width * channels * samples.itemsize))
    strips = [_packed(samples[top : top + rows]) for top in range(0, height, rows)]
    tags = ImageFileDirectory_v2()
    for tag, value in exif.items():
        tags[tag] = value
    for directory in (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo):
        if own := exif.get_ifd(directory):
            tags[directory] = own
    base = ExifTags.Base
    sizes = [len(strip) for strip in strips]
    tags[base.ImageWidth], tags[base.ImageLength] = width, height
    tags[base.BitsPerSample] = (8 * samples.itemsize,) * channels
    tags[base.Compression], tags[base.Predictor] = COMPRESSION.ADOBE_DEFLATE, PREDICTOR.HORIZONTAL
    tags[base.PhotometricInterpretation] = PHOTOMETRIC.RGB if channels > 2 else PHOTOMETRIC.MINISBLACK
    tags[base.SamplesPerPixel], tags[base.RowsPerStrip] = channels, rows
    tags.tagtype[base.StripOffsets] = tags.tagtype[base.StripByteCounts] = TiffTags.LONG
    tags[base.StripOffsets] = tuple(accumulate(sizes[:-1], initial=0))  # from the end of the tags on
    tags[base.StripByteCounts] = tuple(sizes)
    if channels in (2, 4):
        tags[base.ExtraSamples] = EXTRASAMPLE.UNASSALPHA
    for tag, data in ((XMP, xmp), (IPTC, iptc), (ICC, icc)):
        if data:
            tags.tagtype[tag] = TiffTags.BYTE if tag == XMP else TiffTags.UNDEFINED
            tags[tag] = data
    if place:
        return tags.tobytes(place), strips
    head = BytesIO()
    tags.save(head)
    return head.getvalue(), strips


def _packed(strip: np.ndarray) -> bytes:
    """(rows, W, C) as a strip of the file."""
    differences = strip.astype(strip.dtype.newbyteorder('<'))
    differences[:, 1:] -= strip[:, :-1]
    return zlib.compress(differences.tobytes(), 1)
