"""Where the image sets are: EDSR's folders, the program's own benchmark folder, or any folder given by its path."""

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data.image import SUFFIXES, find_images
from error import UserError

Channels = Literal['Y', 'RGB']
Range = tuple[int, int]

BENCHMARKS = ('Set5', 'Set14', 'B100', 'Urban100')
SAMPLE = ('astronaut.png', 'camera.png', 'chelsea.png', 'coffee.png', 'rocket.jpg')


@dataclass(frozen=True)
class ImageSet:
    """The files of a set.

    Attributes:
        name: of the set.
        hr: high-resolution images, sorted by name within each folder.
        lr: for each of them the folder of its low-resolution image; None: it is kept in memory only.
        channels: what its scores are measured on by convention.
    """

    name: str
    hr: Sequence[Path]
    lr: Sequence[Path | None]
    channels: Channels = 'Y'

    def __getitem__(self, part: slice) -> 'ImageSet':
        return ImageSet(self.name, self.hr[part], self.lr[part], self.channels)

    @property
    def names(self) -> list[str]:
        """Names of the images, without suffix."""
        return [path.stem for path in self.hr]


@dataclass(frozen=True)
class Layout:
    """HR folders of a set with the LR folder of each, below the data folder."""

    folders: Sequence[tuple[str, str]]
    channels: Channels


LAYOUTS = {
    'DIV2K': Layout(
        (
            ('DIV2K/DIV2K_train_HR', 'DIV2K/DIV2K_train_LR_bicubic'),
            ('DIV2K/DIV2K_valid_HR', 'DIV2K/DIV2K_valid_LR_bicubic'),
        ),
        'RGB',
    ),
    'Flickr2K': Layout((('Flickr2K/Flickr2K_HR', 'Flickr2K/Flickr2K_LR_bicubic'),), 'RGB'),
}


def find_set(name: str, dir_data: Path, benchmark: Path, span: Range | None = None) -> ImageSet:
    """The files of one set.

    Args:
        name: 'DIV2K', 'Flickr2K', a benchmark, 'Sample', any other folder `<name>/HR` below `dir_data`, or a path to a
            folder of HR images.
        dir_data: the data folder.
        benchmark: the program's own folder of benchmarks, looked into last.
        span: first and last image of DIV2K, by the numbers in their names (without, counted from 1, its training and
            validation folder in this order); other sets are taken whole, as in EDSR.

    Raises:
        UserError: no such folder, no images in it, two images of one name, or a range beyond the set.
    """
    if name == 'Sample':
        return sample()
    if os.sep in name or '/' in name or name in ('.', '..'):
        return _from_folders(name, [_given(Path(name).expanduser())], 'Y')
    layout = LAYOUTS.get(name, Layout(((f'{name}/HR', f'{name}/LR_bicubic'),), 'Y'))
    roots = [dir_data / 'benchmark', dir_data, benchmark]
    for root in roots:
        folders = [(root / hr, root / lr) for hr, lr in layout.folders if (root / hr).is_dir()]
        if folders:
            found = _from_folders(name, folders, layout.channels)
            return _ranged(found, span) if name == 'DIV2K' and span else found
    tried = ', '.join(str(root / layout.folders[0][0]) for root in roots)
    there = ', '.join(sorted(path.name for path in dir_data.glob('[!.]*'))[:8]) if dir_data.is_dir() else ''
    state = f'which holds {there or "nothing"}' if dir_data.is_dir() else 'which does not exist'
    archives = name if name in LAYOUTS else 'benchmark' if name in BENCHMARKS else ''
    raise UserError(
        f'No set {name!r}: none of {tried} is a folder; --dir_data is {dir_data}, {state}; expected '
        f'<dir_data>/{layout.folders[0][0]}/*.png (LR beside it in {layout.folders[0][1]}/X<scale>, made when missing)'
        + (f'; python src/prepare.py {archives} gets it.' if archives else '.')
    )


def sample() -> ImageSet:
    """Photographs that scikit-image carries; nothing is written beside them."""
    spec = importlib.util.find_spec('skimage')
    if spec is None or spec.origin is None:
        raise UserError('The set Sample needs scikit-image: pip install -r requirements.txt.')
    files = [Path(spec.origin).parent / 'data' / name for name in SAMPLE]
    found = [path for path in files if path.is_file()]
    if not found:
        raise UserError(f'No photographs of the set Sample in {files[0].parent}: install scikit-image anew.')
    return ImageSet('Sample', found, [None] * len(found))


def _given(hr: Path) -> tuple[Path, Path]:
    """LR folder of an HR folder given by its path: beside one called HR or ..._HR, in any case, inside any other."""
    if hr.name.upper() == 'HR' or hr.name.upper().endswith('_HR'):
        return hr, hr.parent / (hr.name[:-2] + 'LR_bicubic')
    return hr, hr / 'LR_bicubic'


def _from_folders(name: str, folders: Sequence[tuple[Path, Path]], channels: Channels) -> ImageSet:
    hr: list[Path] = []
    lr: list[Path | None] = []
    for folder, lr_folder in folders:
        if not folder.is_dir():
            raise UserError(f'No folder {folder}: give the path of a folder of HR images.')
        seen = {path.stem for path in hr}  # DIV2K's validation images are often copied into the training folder
        files = [path for path in find_images(folder) if path.stem not in seen]
        hr += files
        lr += [lr_folder] * len(files)
    if not hr:
        looked = ', '.join(str(folder) for folder, _ in folders)
        raise UserError(f'No images of the set {name!r} in {looked}: expected files ending in {", ".join(SUFFIXES)}.')
    stems = [path.stem for path in hr]
    twice = sorted({stem for stem in stems if stems.count(stem) > 1}) if len(set(stems)) < len(stems) else []
    if twice:
        raise UserError(f'The set {name!r} has several images called {twice[0]!r}: give each a name of its own.')
    if '/' in name or os.sep in name or name in ('.', '..'):
        folder = Path(os.path.abspath(folders[0][0]))  # noqa: PTH100  a link keeps its own name
        name = folder.parent.name if folder.name == 'HR' else folder.name
    return ImageSet(name, hr, lr, channels)


def _ranged(images: ImageSet, span: Range) -> ImageSet:
    """The images of these numbers: those of their names, or where these are none, their places."""
    first, last = span
    folders = ', '.join(dict.fromkeys(str(path.parent) for path in images.hr))
    if all(path.stem.isdecimal() for path in images.hr):
        found = {int(hr.stem): (hr, lr) for hr, lr in zip(images.hr, images.lr, strict=True)}
        if missing := [number for number in range(first, last + 1) if number not in found]:
            raise UserError(
                f'--data_range {first}-{last}: {images.name} has no {missing[0]:04d} among the {len(images.hr)} images '
                f'in {folders}: fetch it by prepare.py, give ranges without it, or a folder of HR images by its path.'
            )
        hr, lr = zip(*(found[number] for number in range(first, last + 1)), strict=True)
        return ImageSet(images.name, [*hr], [*lr], images.channels)
    if last > len(images.hr):
        raise UserError(
            f'--data_range {first}-{last} reaches beyond {images.name}: {len(images.hr)} images are in {folders}.'
        )
    return images[first - 1 : last]
