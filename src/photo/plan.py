"""What is to be done with each photograph, and what is done already."""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data.image import read_size
from error import UserError
from photo.choice import Networks
from photo.metadata import is_lossy, made_by
from photo.size import Size, steps
from photo.targets import MADE, Place, Source
from photo.writing import Format, check_size
from system.files import some

log = logging.getLogger('frugalsr')


@dataclass(frozen=True)
class Job:
    """A photograph and its result.

    Attributes:
        source: the file.
        target: the file of the result.
        old: height and width of the photograph, upright.
        new: of the result.
        steps: factors of the networks that enlarge it, one after the other.
        lossy: whether the file was compressed with loss.
        format: of the result.
        made: how it is made, for its metadata: the weights, and a digest of all that has a say in its pixels.
    """

    source: Path
    target: Path
    old: tuple[int, int]
    new: tuple[int, int]
    steps: tuple[int, ...]
    lossy: bool
    format: str
    made: str

    @property
    def pixels(self) -> int:
        """Those that its networks give, for the time it takes."""
        height, width = self.old
        total, factor = 0, 1
        for step in self.steps:
            factor *= step
            total += height * width * factor**2
        return total or self.new[0] * self.new[1]


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
    plan, jobs = Plan(), []
    for source in sources:
        try:
            jobs.append(_make_job(source, size, place, format, networks, settings))
        except UserError as error:
            plan.failures.append(about(source.path, str(error)))
    smaller = [job.source.name for job in jobs if not job.steps and job.new != job.old]
    if smaller:
        log.info('Larger than %s already, and made smaller by bicubic: %s', size, some(smaller))
    _check_targets(jobs)
    for job in jobs:
        if again or not job.target.exists():
            plan.jobs.append(job)
            continue
        made = made_by(job.target)
        if made == job.made and job.target.stat().st_mtime_ns >= job.source.stat().st_mtime_ns:
            plan.done += 1
        elif made.startswith(MADE):
            plan.jobs.append(job)
        else:
            plan.failures.append(
                f'{job.source}: {job.target} is there and was not made by this program; --again replaces it, another '
                '--name or -o keeps it.'
            )
    return plan


def about(path: Path, said: str) -> str:
    """A sentence that names a file."""
    return said if str(path) in said else f'{path}: {said}'


def _make_job(source: Source, size: Size, place: Place, format: Format, networks: Networks, settings: str) -> Job:
    old, lossy = read_size(source.path), is_lossy(source.path)
    new = size.of(*old)
    factors = steps(old, new, networks.scales)
    scale = f'{size.scale or max(new[0] / old[0], new[1] / old[1]):.4g}'
    target = place.of(source, format, {'scale': scale, 'width': new[1], 'height': new[0]})
    name = format.of(source.path)
    check_size(name, *new)
    weights = [networks.best(factor, lossy) for factor in factors]
    digests = [networks.digest(factor, lossy) for factor in factors]
    said = json.dumps([new, digests, settings, name, format.quality, format.background])
    names = ' '.join(each.file.stem for each in weights) or 'bicubic'
    made = f'{MADE} {names} {hashlib.sha256(said.encode()).hexdigest()[:12]}'
    return Job(source.path, target, old, new, factors, lossy, name, made)


def _check_targets(jobs: list[Job]) -> None:
    """Refuse results that would replace a photograph, or one another."""
    sources = {job.source.resolve() for job in jobs}
    taken: dict[str, Path] = {}
    for job in jobs:
        if job.target.resolve() in sources:
            raise UserError(
                f'The result of {job.source} would replace the photograph {job.target}: give another --name or -o.'
            )
        key = str(job.target.absolute()).lower()  # some file systems take both for one
        if key in taken:
            raise UserError(
                f'{taken[key]} and {job.source} would both become {job.target}: give --name {{name}}_x{{scale}}, '
                'or -r with -o.'
            )
        taken[key] = job.source
