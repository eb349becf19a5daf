"""Image files enlarged one at a time, with any weights of a folder: what the page of app.py does, without the page."""

import logging
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

import api
from data.image import Photo, read_photo, read_size, write_png
from error import UserError
from model import Model
from model.loading.detect import recognise
from model.loading.weights import read_weights
from photo.engine import enlarged
from system.machine import best_device
from system.numerics import set_numerics

log = logging.getLogger('frugalsr')

SHOWN = 2_000_000  # pixels before and after are shown with, at most


@dataclass(frozen=True)
class Choice:
    """A network at a scale, and the file of its weights; None if it has none."""

    network: str
    scale: int
    file: Path | None = None

    @property
    def weights(self) -> str:
        """The name of the file."""
        return self.file.name if self.file else 'none'

    def __str__(self) -> str:
        return f'{self.network} x{self.scale}' + (f' ({self.weights})' if self.file else '')


@dataclass(frozen=True)
class Result:
    """Files that show an image before and after at one size, the enlarged image, and a sentence about it."""

    before: Path
    after: Path
    image: Path
    about: str


def find_choices(folder: Path) -> list[Choice]:
    """What the files of weights in `folder` hold, by network, scale and name, and bicubic after them.

    Raises:
        UserError: `folder` is not a folder.
    """
    if not folder.is_dir():
        raise UserError(f'--extend {folder} is not a folder: give a folder of weights.')
    found = []
    for file in sorted(folder.glob('*')):
        if file.suffix in ('.pt', '.pth', '.safetensors'):
            try:
                state, _, description = read_weights(file)
                network = recognise(state, description)
                found.append(Choice(network.name, network.scale, file))
            except UserError as error:
                log.warning('%s is left out: %s', file, error)
    found.sort(key=lambda choice: (choice.network, choice.scale))
    return found + [Choice('Bicubic', scale) for scale in (2, 3, 4)]


@lru_cache(maxsize=2)
def load(choice: Choice, cpu: bool) -> Model:
    """The network with its weights, which repeats its results to the bit on a CPU, as `main.py` has it."""
    device = 'cpu' if cpu else best_device()
    set_numerics(seed=1, deterministic=device == 'cpu', tf32=False)
    return api.load(choice.file or f'{choice.network}_x{choice.scale}', device).model


def enlarge(image: Path, choice: Choice, folder: Path, max_pixels: int, cpu: bool) -> Result:
    """Enlarge an image file into a folder.

    Raises:
        UserError: no image, or a damaged one, or the result would have more than `max_pixels` million pixels.
    """
    (height, width), scale = read_size(image), choice.scale
    pixels = height * width * scale**2 / 1e6
    if pixels > max_pixels:
        raise UserError(
            f'{image} has {width}x{height} pixels, which x{scale} makes {pixels:,.1f} million; '
            f'at most {max_pixels} million are allowed: give a smaller image.'
        )
    photo = read_photo(image)
    model = load(choice, cpu)
    start = time.perf_counter()
    sr = np.concatenate(list(enlarged(model, photo)))
    seconds = time.perf_counter() - start
    result = folder / f'{image.stem}_x{scale}.png'
    write_png(result, sr, photo.icc, photo.chunks)
    sizes = f'{width}x{height} to {sr.shape[1]}x{sr.shape[0]} pixels'
    about = f'{sizes} in {seconds:.1f} s by {choice}, {result.stat().st_size / 1000:,.0f} kB'
    if photo.frames > 1:
        about += f'; only the first of {photo.frames} images in the file'
    return Result(*preview(photo, sr, folder), result, about)


def preview(photo: Photo, sr: np.ndarray, folder: Path) -> tuple[Path, Path]:
    """Write an image, enlarged by bicubic interpolation, and its enlargement, both at a size that a browser likes."""
    lr = photo.samples.squeeze(2) if photo.samples.shape[2] == 1 else photo.samples
    height, width = sr.shape[:2]
    share = min(1, (SHOWN / (height * width)) ** 0.5)
    size = (max(1, round(width * share)), max(1, round(height * share)))
    before, after = folder / 'before.png', folder / 'after.png'
    for file, pixels in ((before, lr), (after, sr)):
        eight = pixels if pixels.dtype == np.uint8 else (pixels // 257).astype(np.uint8)
        shown = np.asarray(Image.fromarray(eight).resize(size, Image.Resampling.BICUBIC))
        write_png(file, shown, photo.icc, photo.chunks)
    return before, after
