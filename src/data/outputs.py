"""Names of output images: those that other programs made, found by the images they belong to, and our own."""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from data.image import find_images
from error import UserError
from system.files import some

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
    """A name of its own for every file: its stem, or its stem and suffix where several share a stem."""
    stems = Counter(path.stem for path in files)
    names: dict[str, None] = {}
    for path in files:
        name = path.stem if stems[path.stem] == 1 else path.name
        while name in names:
            name += '_'
        names[name] = None
    return list(names)
