"""The official archives of the image sets, and how they are unpacked: into EDSR's folders and nowhere else."""

import re
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from data.image import SUFFIXES
from error import UserError, WriteError
from system.files import rename, some

DIV2K = 'https://data.vision.ee.ethz.ch/cvl/DIV2K'
EDSR = 'https://cv.snu.ac.kr/research/EDSR'

# Checksum, and size in bytes where it is published too.
# sha256: TensorFlow Datasets, tensorflow_datasets/url_checksums/div2k.txt.
# md5: torchSR (github.com/Coloquinte/torchSR), torchsr/datasets/{div2k,flickr2k,benchmarks}.py.
PUBLISHED: Mapping[str, tuple[str, int | None]] = {
    'DIV2K_train_HR.zip': ('sha256:9d0b9c463f6e35b6c62cc6a930ee2224f670b34c1df841a57670f9acf0f6c335', 3530603713),
    'DIV2K_train_LR_bicubic_X2.zip': (
        'sha256:a53a424317575838dadce4bcd97cf7b744d6855f43740ed5f0245af3cf4bd850',
        925390592,
    ),
    'DIV2K_train_LR_bicubic_X3.zip': ('md5:ad80b9fe40c049a07a8a6c51bfab3b6d', None),
    'DIV2K_train_LR_bicubic_X4.zip': ('md5:76c43ec4155851901ebbe8339846d93d', None),
    'DIV2K_valid_HR.zip': ('sha256:20dd31fd84d777bc1cf5d6b7654a3f569c0aec74458ae094122ad1d0489900fc', 448993893),
    'DIV2K_valid_LR_bicubic_X2.zip': (
        'sha256:60eed9875c697df51204aa579e2a699e1d5215095788a097ff54dd17e2664d57',
        117763600,
    ),
    'DIV2K_valid_LR_bicubic_X3.zip': ('md5:18b1d310f9f88c13618c287927b29898', None),
    'DIV2K_valid_LR_bicubic_X4.zip': ('md5:21962de700c8d368c6ff83314480eff0', None),
    'Flickr2K.tar': ('md5:5d3f39443d5e9489bff8963f8f26cb03', None),
    'benchmark.tar': ('md5:4ace41d33c2384b97e6b320cd0afd6ba', None),
}

FOLDERS = re.compile(r'(.*[/_])?(HR|LR_bicubic/X\d+)')  # what EDSR calls the folders of its images

Member = tuple[str, bool, Callable[[Path], object]]  # name, whether file or folder, and how to unpack it


@dataclass(frozen=True)
class Archive:
    """An official archive.

    Attributes:
        site: the address of its folder.
        name: of its file.
        checksum: of its file, `<algorithm of hashlib>:<hexadecimal digest>`.
        size: of its file in bytes, where it is published.
        into: where it is unpacked, below the data folder.
        images: the folders it is there for, below the data folder, and how many images they have.
    """

    site: str
    name: str
    checksum: str
    size: int | None
    into: str
    images: Mapping[str, int]


def archives(name: str, factors: Sequence[int]) -> list[Archive]:
    """The official archives of DIV2K, Flickr2K or benchmark, with LR where there is an archive of it."""
    if name == 'Flickr2K':
        return [_archive(EDSR, 'Flickr2K.tar', '', {'Flickr2K/Flickr2K_HR': 2650})]
    if name == 'benchmark':
        counts = {'Set5': 5, 'Set14': 14, 'B100': 100, 'Urban100': 100}
        return [_archive(EDSR, 'benchmark.tar', '', {f'benchmark/{key}/HR': count for key, count in counts.items()})]
    found = []
    for part, count in (('DIV2K_train', 800), ('DIV2K_valid', 100)):
        found.append(_archive(DIV2K, f'{part}_HR.zip', 'DIV2K', {f'DIV2K/{part}_HR': count}))
        for factor in factors:
            if (file := f'{part}_LR_bicubic_X{factor}.zip') in PUBLISHED:
                found.append(_archive(DIV2K, file, 'DIV2K', {f'DIV2K/{part}_LR_bicubic/X{factor}': count}))
    return found


def _archive(site: str, name: str, into: str, images: Mapping[str, int]) -> Archive:
    return Archive(site, name, *PUBLISHED[name], into, images)


def unpack(archive: Path, into: Path) -> list[Path]:
    """Unpack the images in HR and LR_bicubic/X<scale> folders of a zip or tar archive.

    They are unpacked aside, and their folders then renamed, HR last: a folder that is there is whole, and so is the set
    whose HR is there. Folders that have images already stay as they are; anything else in the archive is left out.

    Returns:
        The folders that are new.

    Raises:
        UserError: a name that leads out of the folder, a link or a device in the archive, which is refused as a whole;
            or a damaged archive.
        WriteError: the disk is full or the folder cannot be written.
    """
    aside = into / f'.{archive.name}.unpacked'
    with _user_errors(archive, into):
        try:
            _remove(aside)  # of a run that was killed
            aside.mkdir(parents=True)
            _unpack_all(archive, aside)
            return _move(aside, into)
        finally:
            _remove(aside)


def has_images(folder: Path) -> bool:
    """Whether an image is in a folder, which need not exist."""
    return folder.is_dir() and any(_is_image(path.name) for path in folder.iterdir())


def check_free(folder: Path) -> None:
    """Make sure that nothing stands where a folder of images is to go; an empty folder does not.

    Raises:
        UserError: something does.
    """
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            raise UserError(f'{path} is a file, where images are to go: remove it, and repeat the command.')
    there = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if there or folder.is_symlink():
        what = f'holds no images, but {some(there)}' if there else 'is a link'
        raise UserError(f'{folder} {what}: remove it, and repeat the command.')


def _unpack_all(archive: Path, aside: Path) -> None:
    with tqdm(desc=f'Unpacking {archive.name}', unit=' files', leave=False, disable=None) as bar:
        for name, ordinary, extract in _members(archive):
            _check(archive, name, ordinary)
            path = PurePosixPath(name)
            if not name.endswith('/') and _is_image(path.name) and FOLDERS.fullmatch(str(path.parent)):
                extract(aside)
                bar.update()


def _members(archive: Path) -> Iterator[Member]:
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as opened:
            for info in opened.infolist():
                kind = stat.S_IFMT(info.external_attr >> 16)  # 0 where it was not packed on Unix
                ordinary = kind in (0, stat.S_IFREG, stat.S_IFDIR)
                yield info.filename, ordinary, partial(opened.extract, info)
    else:
        with tarfile.open(archive, 'r:') as tar:
            # Python's own guard as well; its first releases of 3.10 and 3.11 lack it.
            tar.extraction_filter = getattr(tarfile, 'data_filter', lambda member, path: member)
            for member in tar:
                ordinary = member.isreg() or member.isdir()
                name = member.name + '/' * member.isdir()
                yield name, ordinary, partial(tar.extract, member)


def _check(archive: Path, name: str, ordinary: bool) -> None:
    """Refuse what could write outside the folder, on any system."""
    fault = None
    if not ordinary:
        fault = 'is a link or a device'
    elif '..' in re.split(r'[/\\]', name):
        fault = 'leads out of the folder'
    elif re.match(r'[/\\]|[A-Za-z]:', name):
        fault = 'has an absolute name'
    elif '\\' in name or not name.isprintable():
        fault = 'has a name that is not portable'
    if fault:
        raise UserError(f'{archive} was not unpacked, since {name!r} in it {fault}: fetch it from another place.')


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not name.startswith('.')  # macOS packs ._0001.png beside 0001.png


def _move(aside: Path, into: Path) -> list[Path]:
    folders = {path.parent for path in aside.rglob('*') if path.is_file()}
    new = []
    for folder in sorted(folders, key=lambda folder: (folder.name.endswith('HR'), folder)):
        target = into / folder.relative_to(aside)
        if not has_images(target):
            check_free(target)
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.is_dir():
                target.rmdir()
            rename(folder, target)
            new.append(target)
    return new


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


@contextmanager
def _user_errors(archive: Path, into: Path) -> Iterator[None]:
    try:
        yield
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise UserError(f'{archive} is no whole zip or tar archive ({error}): remove it and run this again.') from error
    except OSError as error:
        raise WriteError(
            f'{archive} could not be unpacked into {into} ({error.strerror or error}): make room or name another '
            'folder with --dir_data, and run this again.'
        ) from error
