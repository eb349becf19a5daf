"""What image files say besides their pixels: EXIF (2.32), XMP and IPTC data of a photograph, adapted to its result."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.ExifTags import IFD, Base
from PIL.TiffImagePlugin import TiffImageFile

from data.formats import MAX_PIXELS, identify, png_chunks
from data.limit import pillow_allows
from data.source import note, reading

# Of the first directory: how the pixels of a TIFF file or a thumbnail are stored, which is not how the result's are.
STORAGE = {
    Base.NewSubfileType, Base.SubfileType, Base.ImageWidth, Base.ImageLength, Base.BitsPerSample, Base.Compression,
    Base.PhotometricInterpretation, Base.FillOrder, Base.StripOffsets, Base.SamplesPerPixel, Base.RowsPerStrip,
    Base.StripByteCounts, Base.MinSampleValue, Base.MaxSampleValue, Base.PlanarConfiguration, Base.Predictor,
    Base.ColorMap, Base.TileWidth, Base.TileLength, Base.TileOffsets, Base.TileByteCounts, Base.SubIFDs,
    Base.ExtraSamples, Base.SampleFormat, Base.SMinSampleValue, Base.SMaxSampleValue, Base.JPEGTables,
    Base.JpegIFOffset, Base.JpegIFByteCount, Base.YCbCrCoefficients, Base.YCbCrSubSampling, Base.YCbCrPositioning,
    Base.ReferenceBlackWhite, Base.TransferFunction, Base.XMLPacket, Base.InterColorProfile, Base.ImageResources,
    Base.IPTCNAA, Base.Orientation, Base.ProcessingSoftware,
    33550, 33922, 34264,  # GeoTIFF: how large a pixel is, and where it lies
    37724,  # the layers of a Photoshop file
}  # fmt: skip
ANY_PIXELS = 2**62  # of a file that is not decoded
SIZES = (Base.ExifImageWidth, Base.ExifImageHeight)
SHAPES = ('{"shape"', 'ImageJ=')  # begin descriptions by tifffile and ImageJ, from which they read sizes
MOST = 65_000  # bytes of EXIF, XMP or IPTC data that a JPEG file has room for
IPTC = 0x0404  # the image resource of Photoshop that holds IPTC data in a JPEG file


@dataclass(frozen=True)
class Metadata:
    """Metadata of a file.

    Attributes:
        exif: of it, with all that belongs to it, thumbnails left out.
        xmp: an XMP packet, or nothing.
        iptc: IPTC-IIM data, or nothing.
    """

    exif: Image.Exif
    xmp: bytes = b''
    iptc: bytes = b''

    @property
    def made(self) -> str:
        """How the file was made, as `adapted` notes it."""
        return str(self.exif.get(Base.ProcessingSoftware, ''))

    def adapted(self, height: int, width: int, made: str) -> 'Metadata':
        """As they hold for an upright image of that size; `made` says how it was made."""
        exif = Image.Exif()
        for tag, value in self.exif.items():
            exif[tag] = value
        for directory in (IFD.Exif, IFD.GPSInfo):
            exif.get_ifd(directory).update(self.exif.get_ifd(directory))
        if exif.get_ifd(IFD.Exif):
            exif.get_ifd(IFD.Exif).update(zip(SIZES, (width, height), strict=True))
        exif[Base.Orientation] = 1
        exif[Base.ProcessingSoftware] = made
        return Metadata(exif, _adapted_xmp(self.xmp, height, width), self.iptc)


def read_metadata(path: Path) -> Metadata:
    """The metadata of an image file; none where they are damaged, which the log says.

    Raises:
        UserError: the file is missing or no image.
    """
    with reading(path), pillow_allows(MAX_PIXELS), path.open('rb') as file:
        image = identify(file)
        if image is None:
            note('its EXIF data is not kept: it is a TIFF file of a rare kind')
            return Metadata(Image.Exif())
        try:
            if image.format == 'PNG':
                png_chunks(image, file)
            if isinstance(image, TiffImageFile):
                xmp, iptc = (image.tag_v2.get(tag, b'') for tag in (Base.XMLPacket, Base.IPTCNAA))
                iptc = iptc if isinstance(iptc, bytes) else b''  # numbers are in an order that nobody can tell
            else:
                xmp, iptc = image.info.get('xmp'), image.info.get('photoshop', {}).get(IPTC, b'')
            return Metadata(_plain(Image.Image.getexif(image)), bytes(xmp or b''), iptc)
        except Exception as error:  # Pillow raises nearly anything
            note(f'its EXIF data is damaged ({error}) and not kept')
            return Metadata(Image.Exif())


class _Latin(str):
    """Text of a file as Pillow has it, every byte a letter of Latin-1, that is written with the same bytes."""

    def encode(self, *_: object) -> bytes:
        return str.encode(self, 'latin-1')


def _plain(exif: Image.Exif) -> Image.Exif:
    """A copy that needs the file no longer, without what cannot be written, which the log says."""
    copy, lost = Image.Exif(), []

    def take(directory: int | None, tags: Mapping[int, Any]) -> None:
        for tag, value in tags.items():
            kept = _Latin(value) if isinstance(value, str) else value
            if _can_be_written(directory, tag, kept):
                (copy if directory is None else copy.get_ifd(directory))[tag] = kept
            else:
                lost.append(tag)

    take(None, {tag: exif[tag] for tag in exif if tag not in STORAGE and tag not in (IFD.Exif, IFD.GPSInfo)})
    if str(copy.get(Base.ImageDescription, '')).startswith(SHAPES):
        del copy[Base.ImageDescription]
    for directory in (IFD.Exif, IFD.GPSInfo):
        if directory in exif:
            tags = dict(exif.get_ifd(directory))
            if IFD.Interop in tags:
                tags[IFD.Interop] = dict(exif.get_ifd(IFD.Interop))
            take(directory, tags)
    if lost:
        note(f'its EXIF tags {", ".join(map(str, sorted(lost)))} have values of a wrong kind and are not kept')
    return copy


def _can_be_written(directory: int | None, tag: int, value: Any) -> bool:
    """Whether Pillow, which takes values of other kinds than the tag's when it reads, takes this one when it writes."""
    alone = Image.Exif()
    (alone if directory is None else alone.get_ifd(directory))[tag] = value
    try:
        alone.tobytes()
    except Exception:  # it raises nearly anything
        return False
    return True


def _adapted_xmp(xmp: bytes, height: int, width: int) -> bytes:
    """XMP data with another size, upright and without thumbnails; a property is an attribute or an element."""
    values = {
        b'tiff:Orientation': 1, b'tiff:ImageWidth': width, b'tiff:ImageLength': height,
        b'exif:PixelXDimension': width, b'exif:PixelYDimension': height,
    }  # fmt: skip
    for name, value in values.items():
        xmp = re.sub(rb'(\b%s(?:\s*=\s*["\']|>)\s*)\d+' % name, rb'\g<1>%d' % value, xmp)
    return re.sub(rb'<(xmp|xap):Thumbnails\b.*?</\1:Thumbnails\s*>', b'', xmp, flags=re.DOTALL)


def made_by(path: Path) -> str:
    """How a file was made, as `adapted` noted it; nothing for other files, and for what is no image."""
    if not path.is_file():
        return ''
    try:
        with path.open('rb') as file, pillow_allows(ANY_PIXELS):
            image = identify(file)
            if image is None:
                from data.tiff import first_tags  # tifffile is rarely needed

                return str(first_tags(file).get(Base.ProcessingSoftware, ''))
            comment = image.info.get('comment', b'') if image.format == 'GIF' else b''
            return comment.decode() or str(Image.Image.getexif(image).get(Base.ProcessingSoftware, '')).rstrip('\0')
    except Exception:  # such as a damaged file, which will be named where it is read
        return ''


def is_lossy(path: Path) -> bool:
    """Whether a file is a JPEG file, or a WebP file that was compressed with loss."""
    with reading(path), path.open('rb') as file:
        head = file.read(12)
        if head[:4] != b'RIFF' or head[8:] != b'WEBP':
            return head[:3] == b'\xff\xd8\xff'
        while len(chunk := file.read(8)) == 8:
            name, size = chunk[:4], int.from_bytes(chunk[4:], 'little')
            if name == b'ANMF':  # a frame, whose own chunks follow its 16 bytes
                file.seek(16, 1)
                continue
            if name in (b'VP8 ', b'VP8L'):
                return name == b'VP8 '
            file.seek(size + size % 2, 1)
        return False
