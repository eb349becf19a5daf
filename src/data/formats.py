"""The formats of image files: which decoder reads what, and what a file says of its pixels."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, TiffImagePlugin, UnidentifiedImageError
from PIL.ImageFile import ImageFile
from PIL.TiffImagePlugin import TiffImageFile

from data.limit import pillow_allows
from data.png import HEAD_BYTES, check_whole, is_png16, read_chunks, read_png16
from data.profile import cmyk_to_rgb
from data.source import Source, note, reading, swaps_sides, upright

SUFFIXES = ('.png', '.jpg', '.jpeg', '.bmp', '.tif', '.tiff', '.webp', '.gif')
FORMATS = ('PNG', 'JPEG', 'BMP', 'TIFF', 'WEBP', 'GIF')
TIFF = (b'II*\0', b'MM\0*', b'II+\0', b'MM\0+')  # how such a file begins
MODES = ('1', 'L', 'LA', 'La', 'P', 'PA', 'RGB', 'RGBA', 'CMYK', 'YCbCr')  # of Pillow, that convert to 8 bits
SEVERAL = ('PNG', 'TIFF', 'WEBP', 'GIF')  # the other images of a JPEG file are none of its own: thumbnails, gain maps
MAX_PIXELS = 2**28
ROWS = 64  # taken from Pillow at a time
OPAQUE, CONVERTED, WEBP, CLEAR, ANIMATED, DEEP = 11, 13, 24, 26, 40, 58  # bytes a pixel while one is read, measured


@contextmanager
def open_image(path: Path) -> Iterator[Source]:
    """A PNG, JPEG, BMP, TIFF, WebP or GIF file, open within this block.

    Raises:
        UserError: the file is missing, damaged, larger than MAX_PIXELS, or holds something else, floats for example.
    """
    with reading(path), pillow_allows(MAX_PIXELS), path.open('rb') as file:
        yield source_of(path, file, identify(file))


def identify(file: BinaryIO) -> ImageFile | None:
    """An open file as Pillow has it; None: a TIFF file of a kind that it does not know.

    Raises:
        UnidentifiedImageError: it is no file of FORMATS.
    """
    try:
        return Image.open(file, formats=FORMATS)  # seeks to the start itself
    except UnidentifiedImageError:
        file.seek(0)
        if not file.read(4).startswith(TIFF):
            raise
        return None


def source_of(path: Path, file: BinaryIO, image: ImageFile | None, page: int = 0) -> Source:
    """An image of a file that was identified: the first one, or of a TIFF file any page.

    Raises:
        ValueError: it is larger than MAX_PIXELS, or what decoders raise.
    """
    if image is not None and page:
        image.seek(page)
    if image is None or _is_beyond_pillow(image):
        from data.tiff import open_tiff  # tifffile is rarely needed

        source = open_tiff(path, file, page)
    else:
        place = file.tell()
        file.seek(0)
        head = file.read(HEAD_BYTES)
        file.seek(place)
        source = _open_with_pillow(image, file, is_png16(head))
    if source.width * source.height > MAX_PIXELS:
        raise ValueError(f'{source.width} x {source.height} pixels, at most {MAX_PIXELS} are allowed')
    return source


def _is_beyond_pillow(image: ImageFile) -> bool:
    """Whether it is a TIFF file of which Pillow would not read all bits, or read wrong ones."""
    if not isinstance(image, TiffImageFile):
        return False
    from data.tiff import PLANES, UNSIGNED, WEBP

    tags = image.tag_v2
    planar_alpha = image.mode in ('LA', 'RGBA') and tags.get(TiffImagePlugin.PLANAR_CONFIGURATION) == PLANES
    signed = not {*tags.get(TiffImagePlugin.SAMPLEFORMAT, ())} <= UNSIGNED
    deep = 16 in tags.get(TiffImagePlugin.BITSPERSAMPLE, ())
    webp = tags.get(TiffImagePlugin.COMPRESSION) == WEBP
    return image.mode not in MODES or deep or signed or planar_alpha or webp


def _open_with_pillow(image: ImageFile, file: BinaryIO, deep: bool) -> Source:
    """A file that Pillow opened as `file`; `deep`: it is a PNG file of 16 bits a channel."""
    chunks = png_chunks(image, file) if image.format == 'PNG' else {}
    frames = _count_frames(image)
    orientation = orientation_of(image)
    width, height = image.size
    if isinstance(image, TiffImageFile):  # whose size Pillow may have turned already
        width, height = (image.tag_v2[tag] for tag in (ExifTags.Base.ImageWidth, ExifTags.Base.ImageLength))
        if ExifTags.Base.InterColorProfile not in image.tag_v2:
            image.info.pop('icc_profile', None)  # of the page before

    def read() -> np.ndarray:
        if deep:
            file.seek(0)
            return upright(read_png16(file.read()), orientation)
        widen_key(image)
        samples = samples_8bit(image)
        if image.format == 'PNG' and (image.info.get('interlace') or _ends_in_zeros(image)):
            check_whole(file)
        # Pillow has turned a TIFF file then, and says so.
        return upright(samples, orientation_of(image) if isinstance(image, TiffImageFile) else orientation)

    if swaps_sides(orientation):
        width, height = height, width
    icc = None if image.mode == 'CMYK' else image.info.get('icc_profile')
    animated = frames > 1 and not isinstance(image, TiffImageFile)
    pixel_bytes = DEEP if deep else ANIMATED if animated else _pixel_bytes(image)
    return Source(height, width, read, pixel_bytes, deep, frames, icc, chunks)


def png_chunks(image: ImageFile, file: BinaryIO) -> dict[bytes, bytes]:
    """What a PNG file that Pillow opened says of its colours, by chunk; the image is told what stands after the pixels.

    Pillow itself finds that only once it has decoded them.
    """
    place = file.tell()
    chunks, late = read_chunks(file)
    file.seek(place)
    if late:
        with suppress(Exception):  # what is damaged there does not touch the pixels
            image.info.update(Image.open(BytesIO(late), formats=('PNG',)).info)
    return chunks


def _ends_in_zeros(image: ImageFile) -> bool:
    """Whether the last row is what Pillow leaves of one that the file lacks."""
    return image.crop((0, image.height - 1, *image.size)).getbbox(alpha_only=False) is None


def _pixel_bytes(image: ImageFile) -> int:
    if image.has_transparency_data:
        return CLEAR
    return WEBP if image.format == 'WEBP' else OPAQUE if image.mode in ('L', 'RGB') else CONVERTED


def _count_frames(image: ImageFile) -> int:
    if image.format not in SEVERAL:
        return 1
    try:
        return getattr(image, 'n_frames', 1)
    except Exception:
        note('what follows the first image in it is damaged')
        image.seek(0)
        return 1


def orientation_of(image: Image.Image) -> int:
    """EXIF orientation of an image of Pillow, by EXIF or XMP data, as far as they are known without decoding it."""
    try:  # not image.getexif, for which Pillow decodes a PNG file that begins without EXIF data
        return Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except Exception as error:  # no reason to refuse the pixels
        note(f'its EXIF data is damaged ({error}), so it is taken as upright')
        return 1


def widen_key(image: ImageFile) -> None:
    """Pillow widens the pixels of a 2- or 4-bit PNG to 8 bits, but not its transparent grey."""
    if image.mode == 'L' and 'transparency' in image.info:
        image.info['transparency'] *= {'L;2': 85, 'L;4': 17}.get(str(image.tile[0][3]), 1)


def samples_8bit(image: Image.Image) -> np.ndarray:
    """Pixels of an image of Pillow, (H, W, C) uint8, where C is 1 grey, 2 grey and alpha, 3 RGB, 4 RGBA.

    Raises:
        ValueError: it has other pixels than those of MODES.
    """
    if image.mode not in MODES:
        raise ValueError(f'pixels of type {image.mode} are not supported')
    if image.mode == 'CMYK':
        return pixels_of(cmyk_to_rgb(image))
    grey = image.mode in ('1', 'L', 'LA', 'La')
    mode = ('L' if grey else 'RGB') + ('A' if image.has_transparency_data else '')
    samples = pixels_of(image if image.mode == mode else image.convert(mode))
    return samples[..., None] if samples.ndim == 2 else samples


def pixels_of(image: Image.Image) -> np.ndarray:
    """`np.array(image)`, some rows at a time: of what it hands over at once, Pillow makes two copies besides."""
    image.load()  # which turns a TIFF file
    width, height = image.size
    strips = [(0, top, width, min(top + ROWS, height)) for top in range(0, height, ROWS)]
    first = np.asarray(image.crop(strips[0]))
    samples = np.empty((height, *first.shape[1:]), first.dtype)
    for strip in strips:
        samples[strip[1] : strip[3]] = image.crop(strip)
    return samples
