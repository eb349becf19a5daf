"""TIFF files that Pillow does not read, or not with all their bits: those of 16 bits a channel above all."""

from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags
from tifffile import EXTRASAMPLE, PHOTOMETRIC, PLANARCONFIG, TiffFile, TiffPage

from data.source import Source, swaps_sides, upright, xmp_orientation
from error import UserError

SIGNATURES = (b'II*\0', b'MM\0*', b'II+\0', b'MM\0+')
COLORS = {PHOTOMETRIC.MINISWHITE: 1, PHOTOMETRIC.MINISBLACK: 1, PHOTOMETRIC.RGB: 3}  # channels
MOST_CHANNELS = 8  # with those that are dropped
DEEP = 46  # bytes a pixel while an image is read, measured
ORIENTATION, XMP, ICC = ExifTags.Base.Orientation, ExifTags.Base.XMLPacket, ExifTags.Base.InterColorProfile


def open_tiff(path: Path, file: BinaryIO) -> Source:
    """The file `path`, open as `file`, whose pixels are grey or RGB, with or without alpha, of 8 or 16 bits a channel.

    Raises:
        ValueError: damaged. What it gives raises it too, for other kinds of pixels, and `UserError` where imagecodecs
            is needed.
    """
    file.seek(0)
    tif = TiffFile(file)
    page = tif.pages.first
    assert isinstance(page, TiffPage)
    tags = {code: page.tags[code].value for code in (ORIENTATION, XMP, ICC) if code in page.tags}
    orientation = tags.get(ORIENTATION) or xmp_orientation(tags.get(XMP, b''))
    sides = page.imagelength, page.imagewidth
    height, width = sides[::-1] if swaps_sides(orientation) else sides

    def read() -> np.ndarray:
        return upright(_read(path, tif, page), orientation)

    return Source(height, width, read, DEEP, len(tif.pages), tags.get(ICC))


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
    planar = page.planarconfig == PLANARCONFIG.SEPARATE
    samples = samples.reshape(channels, height, width) if planar else samples.reshape(height, width, channels)
    samples = np.moveaxis(samples, 0, 2) if planar else samples
    samples = samples.astype(samples.dtype.newbyteorder('='))
    colors, extra = COLORS[PHOTOMETRIC(page.photometric)], page.extrasamples[:1]
    if page.photometric == PHOTOMETRIC.MINISWHITE:
        samples[..., :1] = ~samples[..., :1]
    if extra == (EXTRASAMPLE.ASSOCALPHA,):
        return _unmultiply(samples[..., : colors + 1])
    return samples[..., : colors + (extra == (EXTRASAMPLE.UNASSALPHA,))]


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
    if page.imagedepth != 1 or page.samplesperpixel > MOST_CHANNELS:
        return f'it has {page.samplesperpixel} channels and {page.imagedepth} layers; images of at most 4 are read'
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
