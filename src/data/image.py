"""Image files in and out: what a photograph may look like on disk is dealt with here and nowhere else."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.ImageFile import ImageFile
from PIL.TiffImagePlugin import TiffImageFile

from data.limit import pillow_allows
from data.png import HEAD_BYTES, encode_png, is_png16, read_png16
from error import UserError
from system.files import write_atomic

SUFFIXES = ('.png', '.jpg', '.jpeg', '.bmp', '.tif', '.tiff', '.webp')
FORMATS = ('PNG', 'JPEG', 'BMP', 'TIFF', 'WEBP')
MODES = ('1', 'L', 'LA', 'La', 'P', 'PA', 'RGB', 'RGBA', 'CMYK', 'YCbCr')  # Pillow's pixel modes that convert to 8 bits
MAX_PIXELS = 2**28
OPAQUE, CONVERTED, WEBP, CLEAR, DEEP = 8, 13, 22, 40, 46  # bytes a pixel while an image is read, measured


@dataclass(frozen=True)
class Photo:
    """An upright image: `color` (H, W, 3) uint8 or uint16, `alpha` (H, W) of the same type or None if it has none.

    `grey` tells that the file had one colour channel, repeated three times in `color`; `icc` is its colour profile.
    """

    color: np.ndarray
    alpha: np.ndarray | None
    grey: bool
    icc: bytes | None = None


def find_images(folder: Path) -> list[Path]:
    """Image files (SUFFIXES, in any case) directly in `folder`, sorted by name; hidden files are left out.

    Raises:
        UserError: `folder` is not a folder.
    """
    if not folder.is_dir():
        raise UserError(f'{folder} is not a folder: check the path.')
    found = (path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and not path.name.startswith('.'))
    # A dangling link is kept, to be named when it is read.
    return sorted((path for path in found if not path.is_dir()), key=lambda path: path.name)


def read_photo(path: Path) -> Photo:
    """Reads the first frame of a PNG, JPEG, BMP, TIFF or WebP file, turned as its EXIF orientation says.

    PNG and TIFF with 16 bits a channel give uint16 in [0, 65535], everything else uint8 in [0, 255].

    Raises:
        UserError: the file is missing, damaged, larger than MAX_PIXELS, or holds something else, floats for example.
    """
    with _user_errors(path):
        samples, icc = _read_samples(path)
    return _as_photo(samples, icc)


def _as_photo(samples: np.ndarray, icc: bytes | None) -> Photo:
    """(H, W, C), where C is 1 grey, 2 grey and alpha, 3 RGB, 4 RGBA."""
    channels = samples.shape[2]
    grey = channels < 3
    color = samples[..., :1].repeat(3, axis=2) if grey else np.ascontiguousarray(samples[..., :3])
    alpha = np.ascontiguousarray(samples[..., -1]) if channels in (2, 4) else None
    return Photo(color, alpha, grey, icc)


def read_rgb(path: Path) -> np.ndarray:
    """Reads an image as contiguous (H, W, 3) uint8: grey repeated, alpha dropped, 16 bits rounded to 8.

    Raises:
        UserError: as in `read_photo`.
    """
    color = read_photo(path).color
    # 65535 = 255 * 257, and 257 is odd: adding half of it before the division rounds without ties.
    return color if color.dtype == np.uint8 else ((color.astype(np.uint32) + 128) // 257).astype(np.uint8)


def read_size(path: Path) -> tuple[int, int]:
    """Height and width of an image, upright, from its header alone: EXIF data stored after the pixels is not seen.

    Raises:
        UserError: as in `read_photo`, as far as the header tells.
    """
    with _user_errors(path), Image.open(path, formats=FORMATS) as image:
        width, height = image.size
        if isinstance(image, TiffImageFile):  # whose size Pillow may have turned already
            width, height = (image.tag_v2[tag] for tag in (ExifTags.Base.ImageWidth, ExifTags.Base.ImageLength))
        # Not image.getexif, for which Pillow decodes a PNG file that begins without EXIF data.
        turned = _orientation(lambda: Image.Image.getexif(image)) in (5, 6, 7, 8)
        return (width, height) if turned else (height, width)


def bytes_to_read(path: Path) -> int:
    """How much memory `read_photo` takes at most, and what a transparent image takes to be filled.

    Raises:
        UserError: as in `read_photo`, as far as the header tells.
    """
    height, width = read_size(path)
    with _user_errors(path), path.open('rb') as file:
        head = file.read(HEAD_BYTES)
        image = Image.open(file, formats=FORMATS)
        if is_png16(head) or _is_tif16(image):
            pixel = DEEP
        elif image.has_transparency_data:
            pixel = CLEAR
        else:
            pixel = WEBP if image.format == 'WEBP' else OPAQUE if image.mode in ('L', 'RGB') else CONVERTED
    return height * width * pixel


def from_pillow(image: Image.Image) -> Photo:
    """An image of Pillow as a photograph, turned as its EXIF orientation says; the image itself stays as it is.

    Raises:
        UserError: no pixels, others than of 8 bits a channel or 16 bits of grey, or a damaged file behind it.
    """
    try:
        if not image.width * image.height:
            raise ValueError('it is empty')
        deep = image.mode.startswith('I;16')
        samples = np.array(image).astype(np.uint16)[..., None] if deep else _samples_8bit(image)
        samples = _upright(samples, _orientation(image.getexif))
    except Exception as error:  # a file that is read only now may be damaged
        raise UserError(
            f'This image of Pillow cannot be used ({error}): convert it to RGB, RGBA, L or I;16.'
        ) from error
    return _as_photo(samples, image.info.get('icc_profile'))


def to_pillow(samples: np.ndarray, icc: bytes | None = None) -> Image.Image:
    """(H, W) or (H, W, 3) or (H, W, 4) uint8, or (H, W) uint16, as an image of Pillow: L, RGB, RGBA or I;16.

    The colour profile `icc` is left out where it is not one of the image's colour space, RGB or grey.
    """
    image = Image.fromarray(np.ascontiguousarray(samples))
    if fits(icc, grey=samples.ndim == 2):
        image.info['icc_profile'] = icc
    return image


def fits(icc: bytes | None, grey: bool) -> bool:
    """Whether a colour profile is one of grey images, or else of RGB images."""
    space = b'GRAY' if grey else b'RGB '
    return icc is not None and icc[16:20] == space  # ICC.1:2022, section 7.2: data colour space


def write_png(path: Path, image: np.ndarray, icc: bytes | None = None) -> None:
    """`write_rows` of a whole image."""
    write_rows([image], path, len(image), icc)


def write_rows(rows: Iterable[np.ndarray], path: Path, height: int, icc: bytes | None = None) -> None:
    """Writes uint8 or uint16 rows (some, W), (some, W, 3) or (some, W, 4), `height` in all, as PNG, whole or not.

    The colour profile `icc` is left out where it is not one of the image's colour space, RGB or grey.

    Raises:
        WriteError: the file cannot be written; an older one stays as it was. Errors of `rows` pass through.
    """
    rows = iter(rows)
    first = next(rows)
    kept = icc if fits(icc, grey=first.ndim == 2) else None
    write_atomic(path, encode_png(chain([first], rows), height, kept))


def fill_hidden(color: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Gives fully transparent pixels the colour of the nearest visible one.

    Their own colours are undefined, and would bleed into the visible ones when colour and alpha are upscaled apart.

    Args:
        color: (H, W, 3).
        alpha: (H, W), 0 is fully transparent.

    Returns:
        (H, W, 3); `color` itself if nothing or everything is transparent.
    """
    hidden = alpha == 0
    if hidden.all() or not hidden.any():
        return color
    from scipy.ndimage import distance_transform_edt  # takes a third of a second to import

    rows, columns = distance_transform_edt(hidden, return_distances=False, return_indices=True)
    return color[rows, columns]


@contextmanager
def _user_errors(path: Path) -> Iterator[None]:
    try:
        with pillow_allows(MAX_PIXELS):
            yield
    except FileNotFoundError as error:
        raise UserError(f'{path} does not exist: check the path.') from error
    except UnidentifiedImageError as error:
        found = f'{path} ({path.stat().st_size} bytes) is not an image that can be read'
        raise UserError(f'{found}: replace it by a PNG, JPEG, BMP, TIFF or WebP file.') from error
    except Exception as error:  # on a damaged file the decoders raise nearly anything
        reason = str(error) or type(error).__name__
        raise UserError(f'{path} cannot be read ({reason}): restore it, or save it again as PNG.') from error


def _read_samples(path: Path) -> tuple[np.ndarray, bytes | None]:
    """(H, W, C) uint8 or uint16, upright; C is 1 grey, 2 grey and alpha, 3 RGB, 4 RGBA; and the ICC profile."""
    with path.open('rb') as file:
        head = file.read(HEAD_BYTES)
        image = Image.open(file, formats=FORMATS)  # seeks to the start itself
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f'{image.width} x {image.height} pixels, at most {MAX_PIXELS} are allowed')
        if is_png16(head):
            samples = read_png16(path.read_bytes())
        elif _is_tif16(image):
            samples = _read_tif16(path)
        else:
            samples = _read_8bit(image)
        return _upright(samples, _orientation(image.getexif)), image.info.get('icc_profile')


def _is_tif16(image: Image.Image) -> bool:
    return isinstance(image, TiffImageFile) and 16 in image.tag_v2.get(ExifTags.Base.BitsPerSample, ())


def _read_8bit(image: ImageFile) -> np.ndarray:
    if image.mode == 'L' and 'transparency' in image.info:
        # Pillow widens the pixels of a 2- or 4-bit PNG to 8 bits, but not its transparent grey.
        image.info['transparency'] *= {'L;2': 85, 'L;4': 17}.get(str(image.tile[0][3]), 1)
    return _samples_8bit(image)


def _samples_8bit(image: Image.Image) -> np.ndarray:
    """(H, W, C) uint8, where C is 1 grey, 2 grey and alpha, 3 RGB, 4 RGBA."""
    if image.mode not in MODES:
        raise ValueError(f'pixels of type {image.mode} are not supported')
    grey = image.mode in ('1', 'L', 'LA', 'La')
    mode = ('L' if grey else 'RGB') + ('A' if image.has_transparency_data else '')
    samples = np.array(image if image.mode == mode else image.convert(mode))
    return samples[..., None] if samples.ndim == 2 else samples


def _read_tif16(path: Path) -> np.ndarray:
    from tifffile import EXTRASAMPLE, PHOTOMETRIC, PLANARCONFIG, TiffFile  # rarely needed

    with TiffFile(path) as tif:
        page = tif.pages.first
        colors = {PHOTOMETRIC.MINISBLACK: 1, PHOTOMETRIC.RGB: 3}.get(page.photometric)
        plain = page.dtype == np.uint16 and page.bitspersample == 16 and page.imagedepth == 1
        if colors is None or not plain or page.planarconfig != PLANARCONFIG.CONTIG:
            raise ValueError(f'TIFF pixels of type {page.dtype} {page.axes} are not supported')
        # tifffile fills up a tile cut short between two rows without a word.
        ends = map(sum, zip(page.dataoffsets, page.databytecounts, strict=True))
        if max(ends) > tif.filehandle.size:
            raise ValueError('the file ends early')
        samples = page.asarray().astype(np.uint16).reshape(page.imagelength, page.imagewidth, -1)
    extra = page.extrasamples[:1]
    if extra == (EXTRASAMPLE.ASSOCALPHA,):
        return _unmultiply(samples[..., : colors + 1])
    return samples[..., : colors + (extra == (EXTRASAMPLE.UNASSALPHA,))]


def _unmultiply(samples: np.ndarray) -> np.ndarray:
    """Divides the colours of (H, W, C) uint16 by the alpha they were multiplied with."""
    alpha = samples[..., -1:].astype(np.uint32)
    color = (samples[..., :-1].astype(np.uint32) * 65535 + alpha // 2) // np.maximum(alpha, 1)
    return np.concatenate((np.minimum(color, 65535), alpha), axis=2).astype(np.uint16)


def _orientation(getexif: Callable[[], Image.Exif]) -> int:
    """EXIF orientation, to be asked after loading: Pillow turns TIFF files itself and then reports 1."""
    with suppress(Exception):  # a damaged EXIF block is no reason to refuse the pixels
        return getexif().get(ExifTags.Base.Orientation, 1)
    return 1


def _upright(samples: np.ndarray, orientation: int) -> np.ndarray:
    """Undoes an EXIF orientation (1 to 8, Exif 2.32 section 4.6.4)."""
    if orientation in (5, 6, 7, 8):
        samples = samples.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        samples = samples[:, ::-1]
    return samples[::-1] if orientation in (3, 4, 7, 8) else samples
