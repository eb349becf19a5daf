"""Which files are enlarged, and where their results go."""

import glob
import logging
import string
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data.image import find_images
from error import UserError
from options.kinds import at_home
from photo.metadata import made_by
from photo.writing import SUFFIXES, Format
from system.files import identity, is_there, some

log = logging.getLogger('frugalsr')

MADE = 'FrugalSR'  # begins the note of how a result was made
FIELDS = ('stem', 'name', 'scale', 'width', 'height')
OTHERS = ('.bmp', '.heic', '.avif', '.jxl', '.jp2')  # images that are not written


@dataclass(frozen=True)
class Source:
    """A photograph: its path, and the folder below the one that was given in which it was found."""

    path: Path
    below: Path = Path()


@dataclass
class Besides:
    """What folders hold besides photographs.

    Attributes:
        others: how many files of other kinds, by suffix.
        failures: a sentence for each folder that cannot be read.
    """

    others: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Place:
    """Where results go.

    Attributes:
        name: pattern of their names, with `FIELDS`, without suffix.
        output: the folder, or the file; None: each beside its source.
        is_file: whether `output` is the file.
    """

    name: str = '{stem}_x{scale}'
    output: Path | None = None
    is_file: bool = False

    def of(self, source: Source, made: str, format: Format, fields: Mapping[str, object]) -> Path:
        """The file of a result, which is made in a format for `format`; `fields` are those that depend on its size."""
        if self.output and self.is_file:
            return self.output
        folder = self.output / source.below if self.output else source.path.parent
        stem = self.name.format(stem=source.path.stem, name=source.path.name, **fields)
        own = source.path.suffix if format.name == 'same' and source.path.suffix.lower() in SUFFIXES else ''
        return folder / (stem + (own or f'.{made}'))


def check_name(pattern: str) -> str:
    """A pattern of names.

    Raises:
        UserError: it is none, or names another folder.
    """
    fields = ', '.join(f'{{{field}}}' for field in FIELDS)
    try:
        found = pattern.format(**dict.fromkeys(FIELDS, 'x'))
        named = [field for _, field, _, _ in string.Formatter().parse(pattern) if field is not None]
    except (ValueError, KeyError, IndexError, AttributeError) as error:
        raise UserError(f'--name {pattern}: no pattern of names; it may have {fields}.') from error
    if sys.platform == 'win32' and (bad := sorted(set('<>:"|?*') & set(found))):
        raise UserError(f'--name {pattern}: no name can have {" ".join(bad)} in it; leave that out.')
    if not found.strip('. ') or '/' in found or '\\' in found or set(named) - set(FIELDS):
        raise UserError(f'--name {pattern}: give a name without folders, of text and {fields}.')
    return pattern


def find_sources(given: Sequence[str], recursive: bool, output: Path | None) -> tuple[list[Source], list[str]]:
    """The photographs that paths and patterns name, and a sentence for each folder that cannot be read.

    Folders give the images in them, with `recursive` those in their folders too; what is in `output` is left out where
    that is such a folder. Results of this program are left out, unless one is all that is named. The log says what is
    left out.

    Raises:
        UserError: a path that does not exist, or folders without images.
    """
    paths = [path for text in given for path in _expanded(text)]
    if len(paths) == 1 and not paths[0].is_dir():
        return [Source(paths[0])], []
    found: dict[Path, Source] = {}
    besides, bare = Besides(), []
    for path in paths:
        sources = _images(path, recursive, output, besides) if path.is_dir() else [Source(path)]
        bare += [] if sources else [str(path)]
        for source in sources:
            found.setdefault(source.path.absolute(), source)
    if others := [f'{number} {kind or "without suffix"}' for kind, number in besides.others.most_common()]:
        log.info('Left out, of kinds that are not read: %s', some(others))
    if not (found or besides.failures):
        deeper = '' if recursive else '; -r looks into its folders too'
        raise UserError(f'{some(bare)} holds no images: expected png, jpg, bmp, tif, webp or gif files{deeper}.')
    if bare:
        log.warning('Without images: %s', some(bare))
    sources = [source for source in found.values() if not made_by(source.path).startswith(MADE)]
    if results := len(found) - len(sources):
        log.info('Left out, results of an earlier run: %d', results)
    return sources, besides.failures


def _images(top: Path, recursive: bool, output: Path | None, besides: Besides) -> list[Source]:
    """The images of a folder, and what else is in it noted."""
    found = []
    for folder in _folders(top, recursive, output, besides):
        images = find_images(folder)
        found += [Source(file, folder.relative_to(top)) for file in images]
        others = {path for path in folder.iterdir() if path.is_file() and not path.name.startswith('.')} - {*images}
        besides.others.update(path.suffix.lower() for path in others)
    return found


def _expanded(text: str) -> list[Path]:
    plain = Path(text)  # whose name may begin with ~
    path = plain if is_there(plain) else at_home(text)
    if is_there(path):  # a dangling link is named when it is read
        return [path]
    if matches := sorted(glob.glob(str(path), recursive=True)):  # noqa: PTH207  # of the whole path
        return [Path(match) for match in matches]
    raise UserError(f'{path} does not exist: check the path.')


def _folders(top: Path, recursive: bool, output: Path | None, besides: Besides) -> Iterable[Path]:
    """`top`, and with `recursive` the folders below it, but for hidden ones, `output` and those that cannot be read."""
    try:
        inner = sorted(path for path in top.iterdir() if path.is_dir() and not _is_link(path))
    except OSError as error:
        besides.failures.append(f'{top} cannot be read ({error.strerror}): check its permissions.')
        return
    yield top
    for folder in inner if recursive else []:
        if not folder.name.startswith('.') and (output is None or identity(folder) != identity(output)):
            yield from _folders(folder, recursive, output, besides)


def _is_link(path: Path) -> bool:
    """Whether a folder leads elsewhere: a link, or a junction of Windows, which Python knows from 3.12 on."""
    return path.is_symlink() or getattr(path, 'is_junction', bool)()


def choose_place(output: Path | None, name: str, format: Format, sources: Sequence[Source]) -> tuple[Place, Format]:
    """Where results go, and their format: that of `output` where it is a file.

    Raises:
        UserError: a file for several photographs, or of another format.
    """
    if output is None or output.is_dir() or output.suffix.lower() not in (*SUFFIXES, *OTHERS):
        if output is not None and output.exists() and not output.is_dir():
            raise UserError(f'-o {output} is a file without the suffix of an image: give a folder, or a name as x.png.')
        return Place(name, output), format
    suffix = output.suffix.lower()
    if suffix in OTHERS:
        raise UserError(f'-o {output}: {suffix[1:]} is not written; give .png, .jpg, .webp, .tif or .gif.')
    if len(sources) != 1:
        raise UserError(f'-o {output} is one file for {len(sources)} photographs: give a folder.')
    own = SUFFIXES[suffix]
    if format.name and format.of(sources[0].path) != own:
        raise UserError(f'-o {output} is not {format.of(sources[0].path)}, as --format says: leave one of them out.')
    return Place(name, output, is_file=True), Format(own, format.quality, format.background)
