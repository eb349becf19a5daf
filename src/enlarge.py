"""--data_test Demo: folders of photographs, whatever they are, enlarged."""

import logging
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data.image import Photo, bytes_to_read, fill_hidden, find_images, read_photo, read_rgb, write_rows
from data.outputs import output_names
from error import UserError, WriteError
from model import Model
from model.tiles.tiling import Tiler, out_of_memory
from report.page import Saved
from system import memory, parallel
from system.allocator import trim_heap
from system.background import Prefetcher, WorkerPool
from system.files import some

log = logging.getLogger('frugalsr')

REACH = 4  # input pixels on each side that a bicubic enlargement depends on, with some to spare


def enlarge_folder(model: Model, source: Path, target: Path, limit: int | None = None) -> None:
    """Enlarge every image of a folder; what fails is named at the end, after the others are done.

    With several processes each has its share. Images are written as their rows are made; beside the network's part of
    the memory there is the image, decoded, and if there is no `limit` the one after it.

    Raises:
        UserError: no folder, no images in it, or some that could not be read, enlarged or written.
    """
    files = find_photos(source)
    names, ahead = output_names(files), Prefetcher()
    failures: dict[int, str] = {}
    start = time.perf_counter()

    def read(index: int) -> Photo:
        return read_photo(files[index])

    def write(rows: Iterator[np.ndarray], index: int, height: int, *about: Any) -> None:
        try:
            write_rows(rows, target / f'{names[index]}_x{model.scale}_SR.png', height, *about)
        except WriteError as error:
            failures[index] = str(error)

    with WorkerPool() as background:
        for first, own in parallel.progress(list(parallel.rank_indices(len(files))), source.name):
            if own is None:
                continue
            try:
                if limit is not None:
                    check_fits(files[own], limit)
                # Not while what the network takes is measured, with the first image.
                photo = read(own) if limit is not None or first == 0 else ahead(read, own, len(files))
                height = len(photo.color) * model.scale
                background.feed(enlarged(model, photo), write, own, height, photo.icc, photo.chunks)
            except UserError as error:
                failures[own] = str(error)
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                failures[own] = 'memory ran out: give --chop, or a smaller --chop_size.'
            finally:
                photo = None  # type: ignore[assignment]  # or it would stay while the next one is read
    trim_heap()  # what follows takes some of its own
    failures = {index: said for own in parallel.gather(failures) for index, said in own.items()}
    seconds = (time.perf_counter() - start) / len(files)
    log.info('Enlarged by %d, %.2f s an image: %d in %s', model.scale, seconds, len(files) - len(failures), target)
    if others := [path for path in source.iterdir() if path not in files]:
        log.info('Left out, no image files of a known kind: %s', some(sorted(path.name for path in others)))
    if failures:
        said = ' '.join(_about(files[index], failures[index]) for index in sorted(failures))
        raise UserError(f'{len(failures)} of {len(files)} images could not be enlarged: {said}')


def find_photos(source: Path) -> list[Path]:
    """The images of a folder.

    Raises:
        UserError: no folder, or no images in it.
    """
    if not source.is_dir():
        raise UserError(f'--dir_demo {source} is not a folder: give a folder of images.')
    files = find_images(source)
    if not files:
        raise UserError(f'--dir_demo {source} holds no images: expected png, jpg, bmp, tif or webp files.')
    return files


def _about(file: Path, said: str) -> str:
    return said if str(file) in said else f'{file}: {said}'


def check_fits(path: Path, limit: int) -> None:
    """Make sure that an image can be read within a limit of what the process has in memory, in bytes.

    Raises:
        UserError: there is no room for it.
    """
    trim_heap()
    needs = (memory.in_use('cpu') or 0) + bytes_to_read(path)
    if needs > limit:
        raise UserError(
            f'{path}: with what the program takes itself, reading it takes up to {needs // 2**20 + 1}M; give a larger '
            '--max_memory.'
        )


def saved_photos(source: Path, target: Path, scale: int) -> list[Saved]:
    """Those of the images of a folder whose enlargement is in `target`."""
    files = find_images(source) if source.is_dir() else []
    images = [
        Saved(name, target / f'{name}_x{scale}_SR.png', scale, partial(read_rgb, file))
        for name, file in zip(output_names(files), files, strict=True)
    ]
    there = set(target.iterdir()) if target.is_dir() else set()
    return [image for image in images if image.file in there]


def enlarged(model: Model, photo: Photo) -> Iterator[np.ndarray]:
    """Rows (some, W) or (some, W, 2 to 4) of a photograph enlarged, of its own channels and depth, from top to bottom.

    Alpha is enlarged apart from the colour and by bicubic: what is opaque stays opaque, which a network does not
    guarantee.
    """
    if photo.alpha is None:
        for rows in model.rows(photo.color):
            yield rows[..., 1] if photo.grey else rows
        return
    plain, done = Model('Bicubic', model.scale, model.device, Tiler(512, 2 * REACH, 1)), 0
    for rows in model.rows(fill_hidden(photo.color, photo.alpha)):
        first, done = done, done + len(rows)
        top = max(0, first // model.scale - REACH)
        alpha = photo.alpha[top : -(-done // model.scale) + REACH]
        alpha = plain.upscale(np.repeat(alpha[..., None], 3, -1))[first - top * model.scale :, :, :1]
        yield np.concatenate((rows[..., 1:2] if photo.grey else rows, alpha[: len(rows)]), -1)
