"""Names of output images: those that other programs made, found by the images they belong to, and our own."""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from data.image import find_images
from error import UserError
from system.files import folded, some, write_atomic

KINDS = ('SR', 'LR', 'HR', 'attention')  # of our own images, `<name>_x<scale>_<kind>.png`
SOURCE = '.source'  # a note, beside images, of the folder that they were made from

# What may follow a name: a scale such as 'x2', then nothing or a character that is neither letter nor digit.
SUFFIX = re.compile(r'(x\d+)?(?![^\W_])', re.IGNORECASE)


def match_outputs(folder: Path, names: Sequence[str]) -> dict[str, Path]:
    """Finds for every name the image in `folder` that carries it, whatever suffix its program added.

    names: file stems of the HR images, such as 'baby' or 'img_001'. 'baby' takes 'baby.png', 'babyx2.png',
    'baby_x4_SR.png' and 'baby-LCoAN.bmp', but not 'babyface.png'; a file belongs to the longest name that fits. Of
    several files for one name the only one ending in '_SR' wins, as LR and HR often lie beside it.
    Returns a path for every name, in the order of `names`.
    Raises UserError if the folder or its images are missing, a name has no file, or the choice is not clear.
    """
    if not folder.is_dir():
        raise UserError(f'{folder} is not a folder: name the folder that holds the images to score.')
    files = find_images(folder)
    if not files:
        raise UserError(f'{folder} holds no images: name the folder that holds the images to score.')
    candidates = defaultdict(list)
    for file in files:
        candidates[_owner(file.stem, names)].append(file)
    missing = [name for name in names if name not in candidates]
    if missing:
        raise UserError(
            f'{folder} has no image for {len(missing)} of {len(names)} names ({some(missing)}); it holds '
            f'{some([file.name for file in files])}; name every image after its HR image, as in {missing[0]}_SR.png.'
        )
    return {name: _choose(name, candidates[name]) for name in names}


def _owner(stem: str, names: Sequence[str]) -> str | None:
    """The longest name that `stem` carries."""
    fitting = (name for name in names if stem.startswith(name) and SUFFIX.match(stem[len(name) :]))
    return max(fitting, key=len, default=None)


def _choose(name: str, files: list[Path]) -> Path:
    preferred = [file for file in files if file.stem.endswith('_SR')] if len(files) > 1 else files
    if len(preferred) != 1:
        raise UserError(
            f'{files[0].parent} has {len(files)} images for {name} ({some([file.name for file in files])}); '
            'leave one, or let exactly one end in _SR.'
        )
    return preferred[0]


def output_names(files: Sequence[Path]) -> list[str]:
    """A name of its own for every file: its stem, or its stem and suffix where several share a stem.

    Names that are `folded` to the same count as one.
    """
    stems = Counter(folded(path.stem) for path in files)
    names: dict[str, str] = {}
    for path in files:
        name = path.stem if stems[folded(path.stem)] == 1 else path.name
        while folded(name) in names:
            name += '_'
        names[folded(name)] = name
    return list(names.values())


def claim(folder: Path, source: Path, reset: bool) -> None:
    """Make a folder the one of images made from those in `source`; with `reset` those made before are deleted.

    Raises:
        UserError: it holds images that were made from another folder, which new ones of the same names would replace.
        WriteError: the folder cannot be written.
    """
    note, own = folder / SOURCE, os.fsencode(source.resolve())
    before = note.read_bytes() if note.is_file() else b''
    made = [path for kind in KINDS for path in folder.glob(f'*_x*_{kind}.png')]
    if made and not reset and before != own:
        origin = os.fsdecode(before) or 'a folder that is not known'
        raise UserError(
            f'{folder} holds images made from {origin}, not from {source}: --reset deletes them, another --save keeps '
            'them.'
        )
    if reset:
        try:
            for path in made:
                path.unlink()
        except OSError as error:
            raise UserError(f'{error.filename} could not be deleted ({error.strerror}): see to it.') from error
    write_atomic(note, own)
