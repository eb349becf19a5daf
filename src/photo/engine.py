"""Photographs enlarged one after the other: read ahead, tile by tile, written behind."""

import errno
import logging
import math
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.formats import open_image
from data.frames import read_frames
from data.image import Photo, as_photo, bytes_to_read, fill_hidden
from data.imresize import resize
from error import UserError, WriteError, out_of_memory
from model import Model
from model.tiles.tiling import Report, Tiler, unreported
from photo.choice import Networks
from photo.metadata import read_metadata
from photo.plan import Job, Part, about
from photo.writing import Colours, Format, Piece, write_result
from system import memory, parallel
from system.allocator import trim_heap
from system.background import Prefetcher, WorkerPool

log = logging.getLogger('frugalsr')

REACH = 4  # input pixels on each side that a bicubic enlargement depends on, with some to spare
SEAM = 32  # input pixels beyond each border that a seamless enlargement is made with
MEMORY = 'memory ran out: bound the tiles by --max_memory, or in main.py by --chop and a smaller --chop_size.'
HELD = 4  # arrays of a result that there are at most while it is encoded
RESIZED = 3  # arrays of what the networks gave, while it is made smaller


@dataclass
class Outcome:
    """What became of jobs: how many were done, the faults of others, and how many were left on a full disk."""

    done: int
    failures: list[str]
    left: int = 0


def enlarge_photos(
    jobs: Sequence[Job], networks: Networks, format: Format, limit: int | None = None, seamless: bool = False
) -> Outcome:
    """Do jobs; what fails is told at the end, after the others are done, unless the disk is full.

    With several processes each has its share, and the first one the outcome of all. PNG files of a network's own
    size are written as their rows are made; beside the network's part of the memory there is the photograph, decoded,
    and if there is no `limit` the one after it. Other results are held whole.

    Args:
        jobs: what to do.
        networks: what enlarges.
        format: quality and background of the results.
        limit: bytes that the process may have in memory.
        seamless: as of `resized`.
    """
    failures: dict[int, str] = {}
    ahead, full = Prefetcher(), False

    def read(index: int) -> Iterator[tuple[Photo, float]]:
        frames = read_frames(jobs[index].source)
        return chain([next(frames)], frames)

    def write(results: Iterator[Piece], job: Job, index: int) -> None:
        nonlocal full
        try:
            metadata = read_metadata(job.source).adapted(*job.new, job.made)
            heights = [part.new[0] for part in job.parts]
            write_result(results, job.target, job.format, heights, job.plays, metadata, format)
        except WriteError as error:
            failures[index] = str(error)
            full |= isinstance(error.__cause__, OSError) and error.__cause__.errno in (errno.ENOSPC, errno.EDQUOT)
        except UserError as error:
            failures.setdefault(index, str(error))
        except Exception as error:  # nobody waits for this thread's; one of `results` is told where they are made, too
            place = traceback.extract_tb(error.__traceback__)[-1]
            said = f'{type(error).__name__}: {error}, in {Path(place.filename).name}, line {place.lineno}'
            failures.setdefault(index, MEMORY if out_of_memory(error) else f'{job.target} cannot be written ({said}).')

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
                    check_fits(job.source, limit, _held(job))
                # Not while what the network takes is measured, with the first image.
                frames = read(own) if limit is not None or first == 0 else ahead(read, own, len(jobs))
                results = results_of(job, frames, networks, seamless, bar)
                background.feed(results, write, job, own)
            except UserError as error:
                failures[own] = str(error)
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                failures[own] = MEMORY
            finally:
                frames = results = None  # type: ignore[assignment]  # or they would stay while the next one is read
            bar.update(end - bar.n)
    trim_heap()  # what follows takes some of its own
    said_of: dict[int, str] = {}
    for part in parallel.gather(failures):
        said_of.update(part)
    begun, left = sum(parallel.gather(begun)), sum(parallel.gather(len(own_jobs) - begun))
    return Outcome(begun - len(said_of), [about(jobs[index].source, said_of[index]) for index in sorted(said_of)], left)


def results_of(
    job: Job, frames: Iterator[tuple[Photo, float]], networks: Networks, seamless: bool, bar: tqdm
) -> Iterator[Piece]:
    """The results of a job, of all images of its file."""
    said = bar.desc

    def tell(done: int, total: int) -> None:
        bar.set_description_str(f'{said}, tile {min(done + 1, total)} of {total}')

    for part, (photo, duration) in zip(job.parts, frames, strict=False):
        colours = Colours(photo.icc, photo.chunks)
        for rows in resized(networks(part.steps, job.lossy), photo, part.new, seamless, tell, bar.update):
            yield Piece(rows, colours, duration)


def raise_failures(failures: Sequence[str], left: int, count: int) -> None:
    """Name the photographs that were not enlarged, if there are any, several one a line.

    Raises:
        UserError: there are some, of `count` in all; `left` of them were not begun since the disk was full.
    """
    said = [*failures]
    if left:
        said.append(f'The disk is full: {left} more were not begun; make room, and the same command goes on.')
    if said:
        named = f' {said[0]}' if len(said) == 1 else ''.join(f'\n  {each}' for each in said)
        raise UserError(f'{len(failures) + left} of {count} images could not be enlarged:{named}')


def _bar(jobs: Sequence[Job]) -> tqdm:
    """Of megapixels, on a terminal."""
    total = sum(job.pixels for job in jobs) / 1e6
    form = '{desc}: {percentage:3.0f}%|{bar}| {n:.1f} of {total:.1f} megapixels, {remaining} left'
    return parallel.progress((), 'Photographs', total=total, bar_format=form)


def _held(job: Job) -> int:
    """Bytes that results take beside the network; none where they are written as they are made."""
    streamed = len(job.parts) == 1 and job.format == 'png'

    def pixels(part: Part) -> int:
        before, given = (math.prod(part.old) * math.prod(steps) ** 2 for steps in (part.steps[:-1], part.steps))
        whole = tuple(side * math.prod(part.steps) for side in part.old)
        between = 2 * before if len(part.steps) > 1 else 0
        if part.new == whole and part.steps:
            return between + (0 if streamed else HELD * given)
        return between + RESIZED * given + 2 * math.prod(part.new)

    arrays = [*map(pixels, job.parts)]
    most = sum(arrays) if job.format == 'webp' else max(arrays)
    if not most:
        return 0
    with open_image(job.source) as source:
        return most * (8 if source.deep else 4)  # bytes of a pixel with alpha


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
    models: Sequence[Model],
    photo: Photo,
    size: tuple[int, int],
    seamless: bool = False,
    report: Report = unreported,
    count: Callable[[float], object] = lambda _: None,
) -> Iterator[np.ndarray]:
    """Rows, as of `enlarged`, of a photograph enlarged by each of the models and brought to a size by bicubic.

    Args:
        models: one after the other.
        photo: to be enlarged.
        size: height and width of the result.
        seamless: each border goes on at the opposite one, as of a texture that is laid out in tiles.
        report: as of `enlarged`, of each model.
        count: is told of the megapixels that the models have given.
    """

    def rows_of(model: Model) -> Iterator[np.ndarray]:
        for piece in enlarged_seamless(model, photo, report) if seamless else enlarged(model, photo, report):
            count(len(piece) * piece.shape[1] / 1e6)
            yield piece

    for model in models[:-1]:
        photo = _with_samples(photo, np.concatenate(list(rows_of(model))))
    height, width = photo.color.shape[:2]
    factor = models[-1].scale if models else 1
    if models:
        rows = rows_of(models[-1])
    else:
        color = photo.color if photo.alpha is None else fill_hidden(photo.color, photo.alpha)
        samples = replace(photo, color=color).samples
        rows = iter([samples[..., 0] if samples.shape[2] == 1 else samples])
    if (height * factor, width * factor) == size:
        yield from rows
    else:
        yield resize(np.concatenate(list(rows)), *size, 'wrap' if seamless else 'mirror')


def enlarged_seamless(model: Model, photo: Photo, report: Report = unreported) -> Iterator[np.ndarray]:
    """`enlarged`, of an image that goes on at each border with what is at the opposite one."""
    margin = ((SEAM, SEAM), (SEAM, SEAM), (0, 0))
    height, width = (model.scale * side for side in photo.color.shape[:2])
    first = done = SEAM * model.scale
    for rows in enlarged(model, _with_samples(photo, np.pad(photo.samples, margin, 'wrap')), report):
        inner = rows[max(0, done) : max(0, done + height), first : first + width]
        done -= len(rows)
        if len(inner):
            yield inner


def _with_samples(photo: Photo, samples: np.ndarray) -> Photo:
    return as_photo(samples[..., None] if samples.ndim == 2 else samples, photo.icc, photo.chunks)


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
