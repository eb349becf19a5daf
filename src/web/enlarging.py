"""An image file enlarged into another file: what the page of app.py does, without the page."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path

import numpy as np

import api
from data.frames import read_frames, read_series
from data.image import Photo
from error import UserError
from model import Model
from model.tiles.tiling import Report
from photo.choice import Weights
from photo.engine import resized
from photo.metadata import read_metadata
from photo.targets import MADE
from photo.writing import Colours, Format, Piece, check_size, keeps, write_result
from system.machine import best_device
from system.numerics import set_numerics
from web.comparing import Comparison, compare

FORMATS = {'PNG': 'png', 'JPEG': 'jpg', 'WebP': 'webp', 'TIFF': 'tif'}  # as photo.writing calls them


class Stopped(Exception):
    """The visitor does not want the image any more."""


@dataclass(frozen=True)
class Result:
    """The enlarged image, a sentence about it, and what shows it beside the original."""

    image: Path
    about: str
    shown: Comparison


@lru_cache(maxsize=2)
def load(weights: Weights, cpu: bool) -> Model:
    """The network with its weights, which repeats its results to the bit on a CPU, as `main.py` has it."""
    device = 'cpu' if cpu else best_device()
    set_numerics(seed=1, deterministic=device == 'cpu', tf32=False)
    return api.load(weights.file or weights.name, device, scale=weights.scale).model


def enlarge(
    image: Path,
    weights: Weights,
    scale: int,
    folder: Path,
    format: str,
    progress: Report,
    stop: Callable[[], bool],
    *,
    max_pixels: int,
    cpu: bool,
) -> Result:
    """Enlarge an image file into a folder, with all its images where the format holds them.

    Args:
        image: the file.
        weights: what enlarges it.
        scale: factor of the result, at most that of the weights; one below is reached by bicubic.
        folder: where the result goes, and what shows it.
        format: of the result, a key of FORMATS.
        progress: is told how many tiles are done, and how many there are.
        stop: is asked after each tile whether to end.
        max_pixels: of the result, millions.
        cpu: leave the GPU alone.

    Raises:
        UserError: no image, or a damaged one, or the result would have more than `max_pixels` million pixels or more
            than the format holds; nothing was written.
        Stopped: `stop` said so; nothing was written.
    """
    series, name = read_series(image), FORMATS[format]
    sizes = series.sizes if keeps(name, series.plays) else series.sizes[:1]
    new, count = [(scale * height, scale * width) for height, width in sizes], len(sizes)
    check_pixels(image, sizes, scale, max_pixels)
    try:
        check_size(name, new)
    except UserError as error:
        raise UserError(f'{image}: {error}') from error
    model = load(weights, cpu)
    start = time.perf_counter()
    frames = read_frames(image)
    photo, duration = next(frames)

    def whole(photo: Photo, number: int) -> np.ndarray:
        def report(done: int, total: int) -> None:
            if stop():
                raise Stopped
            progress(number * total + done, count * total)

        return np.concatenate(list(resized([model], photo, new[number], report=report)))

    first = whole(photo, 0)

    def results() -> Iterator[Piece]:
        yield Piece(first, colours, duration)
        for number, (other, shown) in zip(range(1, count), frames, strict=False):
            yield Piece(whole(other, number), Colours(other.icc, other.chunks), shown)

    result = folder / f'{image.stem}_x{scale}.{name}'
    metadata = read_metadata(image).adapted(len(first), first.shape[1], f'{MADE} {weights.stem}')
    colours = Colours(photo.icc, photo.chunks)
    heights = [height for height, _ in new]
    write_result(results(), result, name, heights, series.plays, metadata, Format(name))
    seconds = time.perf_counter() - start
    (height, width), images = sizes[0], f', {count} images,' if count > 1 else ''
    change = f'{width}x{height} to {first.shape[1]}x{first.shape[0]} pixels{images}'
    smaller = '' if weights.scale == scale else ', made smaller'
    about = f'{change} in {seconds:.1f} s by {weights.title}{smaller}, {result.stat().st_size / 1000:,.0f} kB'
    if count < len(series.sizes):
        about += f'; only the first of {len(series.sizes)} images in the file, as {format} holds one'
    if colours.lost_in(name, photo.grey):
        about += f'; without its colour profile, which {format} cannot hold: choose PNG for exact colours'
    return Result(result, about, compare(photo, first, folder))


def check_pixels(image: Path, sizes: tuple[tuple[int, int], ...], scale: int, max_pixels: int) -> None:
    """Make sure that images of these sizes may be enlarged.

    Raises:
        UserError: the result would have too many pixels.
    """
    pixels = sum(map(prod, sizes)) * scale**2 / 1e6
    if pixels > max_pixels:
        height, width = sizes[0]
        times = f'{len(sizes)} images of ' if len(sizes) > 1 else ''
        raise UserError(
            f'{image} has {times}{width}x{height} pixels, which x{scale} makes {pixels:,.1f} million; '
            f'at most {max_pixels} million are allowed: give a smaller image.'
        )
