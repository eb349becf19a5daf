"""LR images of a set: which files they are, and which of them this program made, from what.

An LR image that is made here says so in a text chunk of its PNG file, with the border of the bicubic and the HR file as
it was. An image without it was given by the user.
"""

import json
import zlib
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from PIL import Image

from data.formats import MAX_PIXELS
from data.image import find_images
from data.imresize import Border
from data.limit import pillow_allows
from data.sets import ImageSet
from error import UserError
from system.files import some

KEY = 'FrugalSR LR'
OLD_NOTE = '.lr_border'  # beside images that were made before they said so themselves


@dataclass(frozen=True)
class Origin:
    """What an LR image was made from.

    Attributes:
        border: what the bicubic assumed beyond the edge.
        hr: size of the HR file in bytes, its modification time in ns, and its CRC-32; None: unknown.
    """

    border: Border
    hr: tuple[int, int, int] | None = None

    @classmethod
    def of(cls, hr: Path, border: Border) -> 'Origin':
        """That of an image that is made now."""
        stat = hr.stat()
        return cls(border, (stat.st_size, stat.st_mtime_ns, zlib.crc32(hr.read_bytes())))

    def chunks(self) -> dict[bytes, bytes]:
        """As chunks of a PNG file."""
        text = json.dumps({'border': self.border, 'hr': self.hr})
        return {b'tEXt': f'{KEY}\0{text}'.encode()}

    def has_changed(self, hr: Path) -> bool:
        """Whether the HR file is another one now; a copy of the same bytes is not."""
        if self.hr is None:
            return False
        size, time, checksum = self.hr
        stat = hr.stat()
        return stat.st_size != size or (stat.st_mtime_ns != time and zlib.crc32(hr.read_bytes()) != checksum)


def read_origin(lr: Path) -> Origin | None:
    """What an LR image was made from; None: it was not made here."""
    with (
        suppress(Exception),
        pillow_allows(MAX_PIXELS),
        Image.open(lr, formats=('PNG',)) as image,
    ):  # damage is noticed when it is read
        said = json.loads(image.info[KEY])
        return Origin(said['border'], tuple(said['hr']))
    with suppress(OSError):
        return Origin(cast(Border, (lr.parent / OLD_NOTE).read_text().strip()))
    return None


def find_lr(images: ImageSet, scale: int) -> list[Path | None]:
    """Where the LR image of each image is, or is to be made; None: nowhere.

    It is called `X<scale>/<name>x<scale>` and any known suffix, below the LR folder of the set. All but the name may be
    upper or lower case.

    Raises:
        UserError: several files belong to one image; or an image has none, and there are some that belong to no image.
    """
    found: dict[Path, Path | None] = {}
    for folder in dict.fromkeys(images.lr):
        hr = [path for path, own in zip(images.hr, images.lr, strict=True) if own == folder]
        found |= dict.fromkeys(hr) if folder is None else _find_in(folder, hr, scale)
    return [found[path] for path in images.hr]


def _find_in(folder: Path, hr: Sequence[Path], scale: int) -> dict[Path, Path]:
    """The LR images of one LR folder."""
    above = _any_case(folder)
    below = [path for parent in above for path in _any_case(parent / f'X{scale}')]
    home = below[0] if below else (above[0] if above else folder) / f'X{scale}'
    files = [file for path in below for file in find_images(path)]
    ending, named = f'x{scale}', defaultdict(list)
    for file in files:
        if file.stem.lower().endswith(ending):
            named[file.stem[: -len(ending)]].append(file)
    for path in hr:
        if len(several := named[path.stem]) > 1:
            raise UserError(f'{path} has several LR images ({some([*map(str, several)])}): leave the right one.')
    found = {path: named[path.stem][0] if named[path.stem] else home / f'{path.stem}{ending}.png' for path in hr}
    names, own = {path.stem for path in hr}, set(found.values())
    doubtful = [file for file in files if file.stem in names and file not in own]
    if any(not named[path.stem] for path in hr):
        names |= {file.stem for parent in {path.parent for path in hr} for file in find_images(parent)}
        own |= {file for name in names for file in named[name]}
        doubtful = [file for path in (*above, *below) for file in find_images(path) if file not in own]
    if strange := [str(file) for file in doubtful if read_origin(file) is None]:
        raise UserError(
            f'No HR image goes by the name of {some(strange)}: the LR of {hr[0].name} is called '
            f'{home / hr[0].stem}{ending}.png (or jpg, bmp, tif, webp, gif); rename LR, and move away what is none.'
        )
    return found


def _any_case(path: Path) -> list[Path]:
    """Folders of this name, in upper or lower case, the exact one first."""
    if not path.parent.is_dir():
        return []
    found = [other for other in path.parent.iterdir() if other.name.lower() == path.name.lower() and other.is_dir()]
    return sorted(found, key=lambda other: (other != path, other.name))
