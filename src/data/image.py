"""Image files in and out, as the program has them in memory."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import numpy as np
from PIL import Image
from PIL.ImageFile import ImageFile

from data.formats import SUFFIXES, open_image, orientation_of, pixels_of, samples_8bit, widen_key
from data.png import encode_png
from data.profile import fits
from data.source import note, upright
from error import UserError
from system.files import write_atomic

STRIP = 256  # rows


@dataclass(frozen=True)
class Photo:
    """An upright image: `color` (H, W, 3) uint8 or uint16, `alpha` (H, W) of the same type or None if it has none.

    `grey` tells that the file had one colour channel, repeated three times in `color`; `icc` is its colour profile, and
    `chunks` are other statements on its colours, PNG chunks by name.
    """

    color: np.ndarray
    alpha: np.ndarray | None
    grey: bool
    icc: bytes | None = None
    chunks: Mapping[bytes, bytes] = field(default_factory=dict)

    @property
    def samples(self) -> np.ndarray:
        """Its own channels: (H, W, C), where C is 1 grey, 2 grey and alpha, 3 RGB, 4 RGBA."""
        color = self.color[..., :1] if self.grey else self.color
        return color if self.alpha is None else np.dstack((color, self.alpha))


def find_images(folder: Path) -> list[Path]:
    """Image files (SUFFIXES, in any case) directly in `folder`, sorted by name.

    Hidden files are left out, and what is no file: folders, pipes, sockets, devices.

    Raises:
        UserError: `folder` is not a folder.
    """
    if not folder.is_dir():
        raise UserError(f'{folder} is not a folder: check the path.')
    found = (path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and not path.name.startswith('.'))
    # A dangling link is kept, to be named when it is read.
    return sorted((path for path in found if path.is_file() or not path.exists()), key=lambda path: path.name)


def read_photo(path: Path) -> Photo:
    """Reads the first image of a PNG, JPEG, BMP, TIFF, WebP or GIF file, turned as its EXIF orientation says.

    PNG and TIFF with 16 bits a channel give uint16 in [0, 65535], everything else uint8 in [0, 255]. CMYK becomes sRGB
    by its colour profile. Where there are more images, a warning says so.

    Raises:
        UserError: as `open_image`.
    """
    with open_image(path) as source:
        samples = source.read()
        if source.frames > 1:
            note(f'only the first of its {source.frames} images is read')
        return as_photo(samples, source.icc, source.chunks)


def as_photo(samples: np.ndarray, icc: bytes | None, chunks: Mapping[bytes, bytes] = MappingProxyType({})) -> Photo:
    """A photograph of samples (H, W, C), where C is 1 grey, 2 grey and alpha, 3 RGB, 4 RGBA."""
    channels = samples.shape[2]
    grey = channels < 3
    color = samples[..., :1].repeat(3, axis=2) if grey else np.ascontiguousarray(samples[..., :3])
    alpha = np.ascontiguousarray(samples[..., -1]) if channels in (2, 4) else None
    return Photo(color, alpha, grey, icc, chunks)


def read_rgb(path: Path) -> np.ndarray:
    """Reads an image as contiguous (H, W, 3) uint8: grey repeated, alpha dropped, 16 bits rounded to 8.

    Raises:
        UserError: as in `read_photo`.
    """
    return eight_bits(read_photo(path).color)


def eight_bits(samples: np.ndarray) -> np.ndarray:
    """uint8 as it is, uint16 rounded to uint8."""
    if samples.dtype == np.uint8:
        return samples
    # 65535 = 255 * 257, and 257 is odd: adding half of it before the division rounds without ties.
    return in_strips(lambda rows: ((rows.astype(np.uint32) + 128) // 257).astype(np.uint8), samples)


def in_strips(change: Callable[[np.ndarray], np.ndarray], samples: np.ndarray) -> np.ndarray:
    """What `change` makes of rows, some at a time, so that little memory is taken between."""
    return np.concatenate([change(samples[top : top + STRIP]) for top in range(0, max(len(samples), 1), STRIP)])


def read_size(path: Path) -> tuple[int, int]:
    """Height and width of an image as `read_photo` gives it; its pixels are not decoded.

    Raises:
        UserError: as `open_image`.
    """
    with open_image(path) as source:
        return source.height, source.width


def bytes_to_read(path: Path) -> int:
    """How much memory `read_photo` takes at most, and what a transparent image takes to be filled.

    Raises:
        UserError: as `open_image`.
    """
    with open_image(path) as source:
        return source.height * source.width * source.pixel_bytes


def rgba_of(image: ImageFile) -> np.ndarray:
    """(H, W, 4) uint8 of an image, or of the frame that is seen. Pillow itself makes white of most 16-bit grey."""
    if not image.mode.startswith('I;16'):
        widen_key(image)
        return pixels_of(image.convert('RGBA'))
    deep = np.array(image).astype(np.uint16)
    alpha = np.where(deep == image.info.get('transparency', -1), 0, 255).astype(np.uint8)
    return np.dstack([*[eight_bits(deep)] * 3, alpha])


def from_pillow(image: Image.Image) -> Photo:
    """An image of Pillow as a photograph, turned as its EXIF orientation says; the image itself stays as it is.

    Raises:
        UserError: no pixels, others than of 8 bits a channel or 16 bits of grey, or a damaged file behind it.
    """
    try:
        if not image.width * image.height:
            raise ValueError('it is empty')
        deep = image.mode.startswith('I;16')
        samples = np.array(image).astype(np.uint16)[..., None] if deep else samples_8bit(image)
        samples = upright(samples, orientation_of(image))
    except Exception as error:  # a file that is read only now may be damaged
        raise UserError(
            f'This image of Pillow cannot be used ({error}): convert it to RGB, RGBA, L or I;16.'
        ) from error
    return as_photo(samples, image.info.get('icc_profile'))


def to_pillow(samples: np.ndarray, icc: bytes | None = None) -> Image.Image:
    """(H, W) or (H, W, 2 to 4) uint8, or (H, W) uint16, as an image of Pillow: L, LA, RGB, RGBA or I;16.

    The colour profile `icc` is left out where it is not one of the image's colour space, RGB or grey.
    """
    image = Image.fromarray(np.ascontiguousarray(samples))
    if fits(icc, is_grey(samples)):
        image.info['icc_profile'] = icc
    return image


def is_grey(samples: np.ndarray) -> bool:
    """Whether (H, W) or (H, W, C) has no more than grey and alpha."""
    return samples.ndim < 3 or samples.shape[2] < 3


def write_png(
    path: Path, image: np.ndarray, icc: bytes | None = None, chunks: Mapping[bytes, bytes] = MappingProxyType({})
) -> None:
    """Writes (H, W) or (H, W, 1 to 4), uint8 or uint16, as a PNG file, whole or not at all.

    The colour profile `icc` is left out where it is not one of the image's colour space, RGB or grey; `chunks` are put
    in by name.

    Raises:
        WriteError: the file cannot be written; an older one stays as it was.
    """
    write_atomic(path, encode_png([image], len(image), icc if fits(icc, is_grey(image)) else None, chunks))


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
