"""What is to be done with each photograph, and what is done already."""

import hashlib
import json
import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path

from data.frames import Series, read_series
from data.source import reading
from error import UserError
from photo.choice import Networks
from photo.metadata import is_lossy, made_by
from photo.size import Size, steps
from photo.targets import MADE, Place, Source
from photo.writing import Format, check_size, keeps
from system.files import folded, identity, is_there, some

log = logging.getLogger('frugalsr')

KEYS = re.compile(r' (\w{8})-(\w{8})$')  # digests of a photograph and of its path, at the end of a note


@dataclass(frozen=True)
class Part:
    """An image of a photograph's file; most have one.

    Attributes:
        old: height and width, upright.
        new: of its result.
        steps: factors of the networks that enlarge it, one after the other.
    """

    old: tuple[int, int]
    new: tuple[int, int]
    steps: tuple[int, ...]

    @property
    def pixels(self) -> int:
        """Those that its networks give, for the time it takes."""
        total, factor = 0, 1
        for step in self.steps:
            factor *= step
            total += prod(self.old) * factor**2
        return total or prod(self.new)


@dataclass(frozen=True)
class Job:
    """A photograph and its result.

    Attributes:
        source: the file.
        target: the file of the result.
        parts: the images of it that are enlarged.
        plays: of an animation, as of `data.frames.Series`.
        lossy: whether the file was compressed with loss.
        format: of the result.
        how: it is made, in ASCII: the weights, and a digest of what else has a say in its pixels.
    """

    source: Path
    target: Path
    parts: tuple[Part, ...]
    plays: int | None
    lossy: bool
    format: str
    how: str

    @cached_property
    def made(self) -> str:
        """How it is made, for its metadata, with digests of the photograph, whose file is read for that, and its path.

        Raises:
            UserError: the file cannot be read.
        """
        return f'{self.how} {_content(self.source)}-{_digest(os.fsencode(self.source.resolve()), 8)}'

    @property
    def new(self) -> tuple[int, int]:
        """Height and width of the result, or of its first image."""
        return self.parts[0].new

    @property
    def pixels(self) -> int:
        """Those that its networks give."""
        return sum(part.pixels for part in self.parts)


@dataclass
class Plan:
    """Jobs to be done, how many are done already, and the faults of others, each with its file."""

    jobs: list[Job] = field(default_factory=list)
    done: int = 0
    failures: list[str] = field(default_factory=list)


def make_plan(
    sources: Sequence[Source], size: Size, place: Place, format: Format, networks: Networks, settings: str, again: bool
) -> Plan:
    """Jobs for all sources that need one.

    Args:
        sources: the photographs.
        size: how large their results are to be.
        place: where they go.
        format: how they are written.
        networks: what enlarges them.
        settings: what else has a say in the pixels.
        again: make also what is done already, and replace files that this program did not make.

    Raises:
        UserError: two results have one name, or a result would replace a photograph; nothing was done.
    """
    plan, jobs, refused = Plan(), [], set()
    for source in sources:
        try:
            jobs.append(_make_job(source, size, place, format, networks, settings))
        except UserError as error:
            plan.failures.append(about(source.path, str(error)))
            refused.add(identity(source.path))
    firsts = [(job.source.name, job.parts[0]) for job in jobs]
    smaller = [name for name, part in firsts if not part.steps and part.new != part.old]
    if smaller:
        log.info('Larger than %s already, and made smaller by bicubic: %s', size, some(smaller))
    _check_targets(jobs)
    closed = {folder for folder in {job.target.parent for job in jobs} if not _may_write(folder)}
    for job in jobs:
        made = '' if again or not is_there(job.target) else made_by(job.target)
        try:
            done, other = bool(made) and _is_done(made, job), _is_of_another(made, job)
        except UserError as error:
            plan.failures.append(about(job.source, str(error)))
            continue
        foreign = not (again or made.startswith(MADE)) and is_there(job.target)
        if identity(job.target) in refused - {None}:
            plan.failures.append(
                f'{job.source}: its result would replace {job.target}, which was given too and cannot be enlarged: '
                'give another --name or -o.'
            )
        elif done:
            plan.done += 1
        elif foreign or other:
            whose = 'not made by this program' if foreign else 'made from another photograph'
            plan.failures.append(
                f'{job.source}: {job.target} is there and was {whose}; --again replaces it, another --name or -o '
                'keeps it.'
            )
        elif job.target.parent in closed:
            plan.failures.append(
                f'{job.source}: {job.target.parent} is no folder that can be written to: give another -o.'
            )
        else:
            plan.jobs.append(job)
    return plan


def _may_write(folder: Path) -> bool:
    """Whether files can be made in a folder, or it can be made."""
    there = next(path for path in (folder, *folder.absolute().parents) if is_there(path))
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def about(path: Path, said: str) -> str:
    """A sentence that names a file."""
    return said if str(path) in said else f'{path}: {said}'


def _make_job(source: Source, size: Size, place: Place, format: Format, networks: Networks, settings: str) -> Job:
    series, lossy = read_series(source.path), is_lossy(source.path)
    name = format.of(source.path, pages=len(series.sizes) > 1 and series.plays is None)
    parts = [_part(old, size, networks.scales(lossy)) for old in kept_sizes(source.path, series, name)]
    check_size(name, [part.new for part in parts])
    old, new = parts[0].old, parts[0].new
    scale = f'{size.scale or max(new[0] / old[0], new[1] / old[1]):.4g}'
    target = place.of(source, name, format, {'scale': scale, 'width': new[1], 'height': new[0]})
    weights = [each for chain in dict.fromkeys(part.steps for part in parts) for each in networks.chain(chain, lossy)]
    digests = [networks.digest(each) for each in weights]
    said = json.dumps([[part.new for part in parts], digests, settings, name, format.quality, format.background])
    names = ' '.join(dict.fromkeys(each.stem for each in weights)) or 'bicubic'
    names = names.encode('ascii', 'backslashreplace').decode()  # EXIF has no other letters
    how = f'{MADE} {names} {_digest(said.encode(), 12)}'
    return Job(source.path, target, tuple(parts), series.plays, lossy, name, how)


def _digest(content: bytes, letters: int) -> str:
    return hashlib.sha256(content).hexdigest()[:letters]


def _content(path: Path) -> str:
    """A digest of a photograph's file."""
    found = hashlib.sha256()
    with reading(path), path.open('rb') as file:
        while part := file.read(2**20):
            found.update(part)
    return found.hexdigest()[:8]


def _is_done(made: str, job: Job) -> bool:
    """Whether a file was made as a job would make it, from the same photograph, wherever that was."""
    same = made.rpartition('-')[0] == job.made.rpartition('-')[0]
    return same and job.target.stat().st_mtime_ns >= job.source.stat().st_mtime_ns


def _is_of_another(made: str, job: Job) -> bool:
    """Whether a result was made from a file with another content at another place."""
    there = KEYS.search(made)
    here = KEYS.search(job.made) if there else None
    return bool(there and here and all(one != other for one, other in zip(there.groups(), here.groups(), strict=True)))


def _part(old: tuple[int, int], size: Size, scales: Sequence[int]) -> Part:
    new = size.of(*old)
    return Part(old, new, steps(old, new, scales))


def kept_sizes(path: Path, series: Series, name: str) -> tuple[tuple[int, int], ...]:
    """The sizes of the images of a file that a result of a format keeps; the log says what it does not."""
    several = len(series.sizes) > 1
    if several and not keeps(name, series.plays):
        able = 'tif keeps all' if series.plays is None else 'png, webp and gif keep the animation'
        log.warning('%s: %s has one image, the first of its %d; %s.', path, name, len(series.sizes), able)
        return series.sizes[:1]
    if several and name == 'tif' and series.plays is not None:
        log.warning('%s: tif keeps its %d images, but not how long each is shown.', path, len(series.sizes))
    return series.sizes


def _check_targets(jobs: list[Job]) -> None:
    """Refuse results that would replace a photograph, or another name of its file, or one another."""
    sources = {identity(job.source) for job in jobs} - {None}
    taken: dict[str, Path] = {}
    for job in jobs:
        if identity(job.target) in sources:
            raise UserError(
                f'The result of {job.source} would replace the photograph {job.target}: give another --name or -o.'
            )
        key = folded(str(job.target.absolute()))
        if key in taken:
            raise UserError(
                f'{taken[key]} and {job.source} would both become {job.target}: give --name {{name}}_x{{scale}}, '
                '-r with -o, or each an -o of its own.'
            )
        taken[key] = job.source
