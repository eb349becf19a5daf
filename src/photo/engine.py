"""Photographs enlarged one after the other: read ahead, tile by tile, written behind."""

import errno
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.image import Photo, as_photo, bytes_to_read, fill_hidden, read_photo
from data.imresize import resize
from error import UserError, WriteError
from model import Model
from model.tiles.tiling import Report, Tiler, out_of_memory, unreported
from photo.choice import Networks
from photo.metadata import read_metadata
from photo.plan import Job, about
from photo.writing import Format, write_result
from system import memory, parallel
from system.allocator import trim_heap
from system.background import Prefetcher, WorkerPool

log = logging.getLogger('frugalsr')

REACH = 4  # input pixels on each side that a bicubic enlargement depends on, with some to spare
MEMORY = 'memory ran out: bound the tiles by --max_memory, or in main.py by --chop and a smaller --chop_size.'
HELD = 4  # arrays of the result, 4 channels each, that there are while it is made at another size than a network's


@dataclass
class Outcome:
    """What became of jobs: how many were done, the faults of others, and how many were left on a full disk."""

    done: int
    failures: list[str]
    left: int = 0


def enlarge_photos(jobs: Sequence[Job], networks: Networks, format: Format, limit: int | None = None) -> Outcome:
    """Do jobs; what fails is told at the end, after the others are done, unless the disk is full.

    With several processes each has its share, and the first one the outcome of all. PNG files of a network's own
    size are written as their rows are made; beside the network's part of the memory there is the photograph, decoded,
    and if there is no `limit` the one after it. Other results are held whole.

    Args:
        jobs: what to do.
        networks: what enlarges.
        format: quality and background of the results.
        limit: bytes that the process may have in memory.
    """
    failures: dict[int, str] = {}
    ahead, full = Prefetcher(), False

    def read(index: int) -> Photo:
        return read_photo(jobs[index].source)

    def write(rows: Iterator[np.ndarray], job: Job, index: int, photo_icc: bytes | None, chunks: dict) -> None:
        nonlocal full
        try:
            metadata = read_metadata(job.source).adapted(*job.new, job.made)
            write_result(rows, job.target, job.format, job.new[0], photo_icc, chunks, metadata, format)
        except WriteError as error:
            failures[index] = str(error)
            full |= isinstance(error.__cause__, OSError) and error.__cause__.errno in (errno.ENOSPC, errno.EDQUOT)

    rounds, begun = list(parallel.rank_indices(len(jobs))), 0
    own_jobs = [jobs[own] for _, own in rounds if own is not None]
    with WorkerPool() as background, _bar(own_jobs) as bar:
        for first, own in rounds:
            if own is None or full:
                continue
            job, begun = jobs[own], begun + 1
            bar.set_description_str(f'Photograph {first + 1} of {len(jobs)}')
            end = bar.n + job.pixels / 1e6
            try:
                if limit is not None:
                    check_fits(job.source, limit, 0 if _streams(job) else 4 * HELD * math.prod(job.new))
                # Not while what the network takes is measured, with the first image.
                photo = read(own) if limit is not None or first == 0 else ahead(read, own, len(jobs))
                models = [networks(factor, job.lossy) for factor in job.steps]
                rows = resized(models, photo, job.new, bar.update)
                background.feed(rows, write, job, own, photo.icc, dict(photo.chunks))
            except UserError as error:
                failures[own] = str(error)
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                failures[own] = MEMORY
            finally:
                photo = None  # type: ignore[assignment]  # or it would stay while the next one is read
            bar.update(end - bar.n)
    trim_heap()  # what follows takes some of its own
    said: dict[int, str] = {}
    for part in parallel.gather(failures):
        said.update(part)
    begun, left = sum(parallel.gather(begun)), sum(parallel.gather(len(own_jobs) - begun))
    return Outcome(begun - len(said), [about(jobs[index].source, said[index]) for index in sorted(said)], left)


def raise_failures(failures: Sequence[str], left: int, count: int) -> None:
    """Name the photographs that were not enlarged, if there are any.

    Raises:
        UserError: there are some, of `count` in all; `left` of them were not begun since the disk was full.
    """
    said = [*failures]
    if left:
        said.append(f'The disk is full: {left} more were not begun; make room, and the same command goes on.')
    if said:
        raise UserError(f'{len(failures) + left} of {count} images could not be enlarged: {" ".join(said)}')


def _bar(jobs: Sequence[Job]) -> tqdm:
    """Of megapixels, on a terminal."""
    total = sum(job.pixels for job in jobs) / 1e6
    form = '{desc}: {percentage:3.0f}%|{bar}| {n:.1f} of {total:.1f} megapixels, {remaining} left'
    return parallel.progress((), 'Photographs', total=total, bar_format=form)


def _streams(job: Job) -> bool:
    """Whether a result is written as it is made."""
    factor = math.prod(job.steps)
    return job.format == 'png' and len(job.steps) == 1 and job.new == (job.old[0] * factor, job.old[1] * factor)


def check_fits(path: Path, limit: int, held: int = 0) -> None:
    """Make sure that an image can be read within a limit of what the process has in memory, in bytes.

    `held` is what its result takes besides.

    Raises:
        UserError: there is no room for it.
    """
    trim_heap()
    needs = (memory.in_use('cpu') or 0) + bytes_to_read(path) + held
    if needs > limit:
        raise UserError(
            f'{path}: with what the program takes itself, reading it takes up to {needs // 2**20 + 1}M; give a larger '
            '--max_memory.'
        )


def resized(
    models: Sequence[Model], photo: Photo, size: tuple[int, int], count: Callable[[float], object] = lambda _: None
) -> Iterator[np.ndarray]:
    """Rows, as of `enlarged`, of a photograph enlarged by each of the models and brought to a size by bicubic.

    `count` is told of the megapixels that the models have given.
    """

    def counted(rows: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        for piece in rows:
            count(len(piece) * piece.shape[1] / 1e6)
            yield piece

    for model in models[:-1]:
        photo = _with_samples(photo, np.concatenate(list(counted(enlarged(model, photo)))))
    height, width = photo.color.shape[:2]
    factor = models[-1].scale if models else 1
    if models:
        rows = counted(enlarged(models[-1], photo))
    else:
        color = photo.color if photo.alpha is None else fill_hidden(photo.color, photo.alpha)
        samples = replace(photo, color=color).samples
        rows = iter([samples[..., 0] if samples.shape[2] == 1 else samples])
    if (height * factor, width * factor) == size:
        yield from rows
    else:
        yield resize(np.concatenate(list(rows)), *size)


def _with_samples(photo: Photo, samples: np.ndarray) -> Photo:
    return as_photo(samples[..., None] if samples.ndim == 2 else samples, photo.icc, photo.chunks, photo.frames)


def enlarged(model: Model, photo: Photo, report: Report = unreported) -> Iterator[np.ndarray]:
    """Rows (some, W) or (some, W, 2 to 4) of a photograph enlarged, of its own channels and depth, from top to bottom.

    Alpha is enlarged apart from the colour and by bicubic: what is opaque stays opaque, which a network does not
    guarantee. `report` is told how many tiles of the colour are done and how many there are; what it raises ends the
    work.
    """
    if photo.alpha is None:
        for rows in model.rows(photo.color, report):
            yield rows[..., 1] if photo.grey else rows
        return
    plain, done = Model('Bicubic', model.scale, model.device, Tiler(512, 2 * REACH, 1)), 0
    for rows in model.rows(fill_hidden(photo.color, photo.alpha), report):
        first, done = done, done + len(rows)
        top = max(0, first // model.scale - REACH)
        alpha = photo.alpha[top : -(-done // model.scale) + REACH]
        alpha = plain.upscale(np.repeat(alpha[..., None], 3, -1))[first - top * model.scale :, :, :1]
        yield np.concatenate((rows[..., 1:2] if photo.grey else rows, alpha[: len(rows)]), -1)
