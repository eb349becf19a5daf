"""Which files are enlarged, and where their results go."""

import glob
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from data.image import find_images
from error import UserError
from photo.metadata import made_by
from photo.writing import SUFFIXES, Format

MADE = 'FrugalSR'  # begins the note of how a result was made
FIELDS = ('stem', 'name', 'scale', 'width', 'height')
OTHERS = ('.bmp', '.heic', '.avif', '.jxl', '.jp2')  # images that are not written


@dataclass(frozen=True)
class Source:
    """A photograph: its path, and the folder below the one that was given in which it was found."""

    path: Path
    below: Path = Path()


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
    if not found.strip('. ') or '/' in found or '\\' in found or set(named) - set(FIELDS):
        raise UserError(f'--name {pattern}: give a name without folders, of text and {fields}.')
    return pattern


def find_sources(given: Sequence[str], recursive: bool, output: Path | None) -> tuple[list[Source], int]:
    """The photographs that paths and patterns name, and how many results of this program were left out.

    Folders give the images in them, with `recursive` those in their folders too; what is in `output` is left out where
    that is such a folder. Results of this program are left out, unless one is all that is named.

    Raises:
        UserError: a path that does not exist, or a folder without images.
    """
    paths = [path for text in given for path in _expanded(text)]
    if len(paths) == 1 and not paths[0].is_dir():
        return [Source(paths[0])], 0
    found: dict[Path, Source] = {}
    for path in paths:
        for source in _images(path, recursive, output) if path.is_dir() else [Source(path)]:
            found.setdefault(source.path.absolute(), source)
    sources = [source for source in found.values() if not made_by(source.path).startswith(MADE)]
    return sources, len(found) - len(sources)


def _images(top: Path, recursive: bool, output: Path | None) -> list[Source]:
    found = [
        Source(file, folder.relative_to(top))
        for folder in _folders(top, recursive, output)
        for file in find_images(folder)
    ]
    if not found:
        deeper = '' if recursive else '; -r looks into its folders too'
        raise UserError(f'{top} holds no images: expected png, jpg, bmp, tif, webp or gif files{deeper}.')
    return found


def _expanded(text: str) -> list[Path]:
    path = Path(text).expanduser()
    if path.exists() or path.is_symlink():  # a dangling link is named when it is read
        return [path]
    if matches := sorted(glob.glob(str(path), recursive=True)):  # noqa: PTH207  # of the whole path
        return [Path(match) for match in matches]
    raise UserError(f'{path} does not exist: check the path.')


def _folders(top: Path, recursive: bool, output: Path | None) -> Iterable[Path]:
    """`top`, and with `recursive` the folders below it, but for hidden ones and `output`."""
    yield top
    if not recursive:
        return
    for folder in sorted(path for path in top.iterdir() if path.is_dir() and not path.is_symlink()):
        if not folder.name.startswith('.') and (output is None or folder.resolve() != output.resolve()):
            yield from _folders(folder, recursive, output)


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
