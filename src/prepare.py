"""Get the image sets: download, unpack into EDSR's folders, make the LR images that are missing, check those given.

And the weights of the authors: python src/prepare.py weights list.
"""

from __future__ import annotations

import logging
import os
import sys
from argparse import ArgumentTypeError, Namespace
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from error import UserError, WriteError, exit_status, run_program
from options import kinds
from options.table import ROOT
from system.files import lock_file

if TYPE_CHECKING:
    from data.download.archive import Archive
    from data.imresize import Border
    from data.sets import ImageSet

log = logging.getLogger('frugalsr')


@dataclass(frozen=True)
class Difference:
    """How many pixels of an LR file are not those of the exact bicubic, and by how much at most."""

    path: Path
    pixels: int
    of: int
    largest: int


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 1 if --check found a difference, 2 for an error the user can fix, 130 for Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv

    def work() -> int:
        if argv[:1] == ['weights']:
            return get_weights(build_weights_parser().parse_args(argv[1:]))
        return run(build_parser().parse_args(argv))

    return exit_status(work, '--debug' in argv)


def build_parser() -> kinds.Parser:
    """The options."""
    parser = kinds.Parser(
        prog='prepare.py',
        usage='DIV2K|Flickr2K|benchmark [options]',
        description='Get a set of images: what is missing is downloaded, and LR that no archive has is made. The '
        'weights of the authors of networks: prepare.py weights --help.',
    )
    parser.add_argument('set', choices=('DIV2K', 'Flickr2K', 'benchmark'), help='which; benchmark: Set5, Set14, ...')
    parser.add_argument(
        '--dir_data', metavar='FOLDER', type=kinds.folder, default=ROOT / 'dataset', help='where the sets go'
    )
    parser.add_argument('--scale', metavar='N+N', type=scales, default='2+3+4', help='factors of the LR images')
    parser.add_argument(
        '--check', action='store_true', help='compare the LR files there are with the exact bicubic; change nothing'
    )
    parser.add_argument(
        '--mirror', metavar='URL', type=site, help='folder on the web that has the archives, instead of the official'
    )
    parser.add_argument(
        '--lr_border', choices=('mirror', 'clamp'), default='mirror', help='border of the bicubic that makes missing LR'
    )
    parser.add_argument(
        '--n_threads',
        metavar='N',
        type=kinds.count,
        default=min(6, os.cpu_count() or 1),
        help='images worked on at once',
    )
    parser.add_argument('--debug', action='store_true', help='show the traceback of an error')
    return parser


def build_weights_parser() -> kinds.Parser:
    """The options of `prepare.py weights`."""
    parser = kinds.Parser(
        prog='prepare.py weights',
        usage='list|NAME ... [options]',
        description="Get the authors' own weights of networks, as they are, each with a card beside it; list: which "
        'there are, where, and under which licence.',
    )
    parser.add_argument(
        'names', metavar='NAME', nargs='+', help='such as IMDN_x2; a network alone: at every scale; list: all names'
    )
    parser.add_argument(
        '--extend',
        metavar='FOLDER',
        type=kinds.folder,
        default=ROOT / 'models',
        help='where they go, and are looked up',
    )
    parser.add_argument('--debug', action='store_true', help='show the traceback of an error')
    return parser


def get_weights(args: Namespace) -> int:
    """List the weights of authors, or get some of them; returns the exit status.

    Raises:
        UserError: unknown names, or some that could not be had, after the others are there.
    """
    from checkpoint import start_screen
    from data.download.weights import fetch_official, find_official, listing
    from model.loading.weights import read_weights

    if args.names == ['list']:
        print(listing(args.extend))
        return 0
    start_screen()
    faults = []
    for official in find_official(args.names):
        try:
            fetch_official(official, args.extend, read_weights)
        except WriteError:
            raise
        except UserError as error:
            faults.append(str(error))
    if faults:
        raise UserError(' '.join(faults))
    return 0


def scales(text: str) -> list[int]:
    """Factors joined by '+'."""
    found = kinds.scales(text)
    return sorted(set(found)) if isinstance(found, list) else [found]


def site(text: str) -> str:
    """An address of the web."""
    if not text.startswith(('http://', 'https://')):
        raise ArgumentTypeError(f'{text!r} does not start with http:// or https://')
    return text.rstrip('/')


def run(args: Namespace) -> int:
    """Check, or get what is missing; returns the exit status."""
    from checkpoint import start_screen
    from data.download.archive import archives

    start_screen()
    if args.check:
        return check(args)
    for archive in archives(args.set, args.scale):
        get(archive, args.dir_data, args.mirror)
    for images in find_sets(args.set, args.dir_data):
        for scale in args.scale:
            make_lr(images, scale, args)
    log.info('%s is ready in %s', args.set, args.dir_data)
    return 0


def get(archive: Archive, dir_data: Path, mirror: str | None) -> None:
    """Download and unpack an archive unless its images are there.

    Raises:
        UserError: no connection, no room, or not the archive it should be; or another process is at it.
    """
    from data.download.archive import check_free, has_images, unpack
    from data.download.fetch import fetch, verify

    if not missing(archive, dir_data):
        return
    path, fetched = dir_data / archive.name, dir_data / f'.{archive.name}.fetched'
    folders = [dir_data / name for name in archive.images]
    with alone(archive, dir_data):
        for folder in folders:
            if not has_images(folder):
                check_free(folder)
        if path.is_file():
            log.info('Using %s', path)
            verify(path, archive.checksum)
        else:
            url = f'{mirror or archive.site}/{archive.name}'
            log.info('Fetching %s', url)
            fetch(url, path, archive.checksum, archive.size)
            fetched.write_text(version(path))  # so that a later run removes it too, if this one ends early
        for folder in unpack(path, dir_data / archive.into):
            log.info('Unpacked %s', folder)
        if absent := [folder for folder in folders if not has_images(folder)]:
            raise UserError(f'{path} has no images for {absent[0]}: remove it and name another place with --mirror.')
        if fetched.is_file():
            if fetched.read_text() == version(path):
                path.unlink()
            fetched.unlink()


def version(path: Path) -> str:
    """What changes where a file is replaced by another one."""
    found = path.stat()
    return f'{found.st_size} {found.st_mtime_ns}'


@contextmanager
def alone(archive: Archive, dir_data: Path) -> Iterator[None]:
    """Within this block no other process gets the archive into this folder."""
    place = dir_data / f'.{archive.name}.lock'
    try:
        dir_data.mkdir(parents=True, exist_ok=True)
        file = place.open('a')
    except OSError as error:
        raise WriteError(
            f'{dir_data} cannot be written ({error.strerror}): name another folder with --dir_data.'
        ) from error
    with file:
        try:
            lock_file(file)
        except (BlockingIOError, PermissionError) as error:
            raise UserError(
                f'Another process gets {archive.name} into {dir_data}: wait for it, and repeat the command.'
            ) from error
        except OSError as error:
            log.info('%s cannot be locked (%s): let no other process get the same.', place, error.strerror)
        try:
            yield
        finally:
            with suppress(OSError):  # as of Windows, where it is open
                place.unlink()


def missing(archive: Archive, dir_data: Path) -> list[Path]:
    """The folders of an archive that have no image; those that lack some are left as they are, with a warning."""
    from data.image import find_images

    absent = []
    for name, expected in archive.images.items():
        folder = dir_data / name
        found = len(find_images(folder)) if folder.is_dir() else 0
        if not found:
            absent.append(folder)
        elif found < expected:
            log.warning('%s has %d of %d images: remove it if all are to be fetched', folder, found, expected)
    return absent


def find_sets(name: str, dir_data: Path) -> list[ImageSet]:
    """The set, or every set in the benchmark folder."""
    from data.sets import find_set

    names, folder = [name], dir_data / 'benchmark'
    if name == 'benchmark':
        names = sorted(path.parent.name for path in folder.glob('*/HR') if path.is_dir())
        if not names:
            raise UserError(f'No set in {folder}: leave out --check to fetch the sets, or name another --dir_data.')
    return [find_set(name, dir_data, folder) for name in names]


def lr_files(images: ImageSet, scale: int) -> list[Path]:
    """Where the LR image of each image is, or would be.

    Raises:
        UserError: as `find_lr`.
    """
    from data.lr import find_lr

    return [path for path in find_lr(images, scale) if path is not None]


def make_lr(images: ImageSet, scale: int, args: Namespace) -> None:
    """Make the LR images that are missing.

    Raises:
        UserError: an image is damaged, an LR image has the wrong size, or the folder cannot be written.
    """
    from data.srdata import SRData
    from system.files import is_there

    SRData(images, scale, args.lr_border).prepare(args.n_threads)
    left = [path for path in lr_files(images, scale) if not is_there(path)]
    if left:
        raise UserError(f'{left[0]} could not be written: make its folder writable, or name another --dir_data.')


def check(args: Namespace) -> int:
    """Compare the LR files with the exact bicubic; returns 0 if all are equal, else 1.

    Raises:
        UserError: no LR files, or an image that cannot be read.
    """
    from system.files import is_there

    checked, equal = 0, True
    for images in find_sets(args.set, args.dir_data):
        for scale in args.scale:
            pairs = [pair for pair in zip(images.hr, lr_files(images, scale), strict=True) if is_there(pair[1])]
            title = f'{images.name} x{scale}: {len(pairs)} of {len(images.hr)} LR files there'
            checked += len(pairs)
            if pairs:
                border, found = best_border(pairs, scale, args.n_threads)
                equal &= not any(difference.pixels for difference in found)
                title += f', {report(found, border)}'
            log.info('%s', title)
    if not checked:
        raise UserError(f'No LR files of {args.set} in {args.dir_data}: leave out --check to get or make them.')
    return 0 if equal else 1


def best_border(pairs: Sequence[tuple[Path, Path]], scale: int, workers: int) -> tuple[Border, list[Difference]]:
    """The differences of (HR, LR) files under the border rule that leaves fewer: older MATLABs had another."""
    mirror = differences(pairs, scale, 'mirror', workers)
    if not any(difference.pixels for difference in mirror):
        return 'mirror', mirror
    clamp = differences(pairs, scale, 'clamp', workers)
    fewer = sum(d.pixels for d in clamp) < sum(d.pixels for d in mirror)
    return ('clamp', clamp) if fewer else ('mirror', mirror)


def differences(pairs: Sequence[tuple[Path, Path]], scale: int, border: Border, workers: int) -> list[Difference]:
    """Those of (HR, LR) files under one border rule."""
    from tqdm import tqdm

    with ThreadPoolExecutor(workers) as pool:
        found = pool.map(lambda pair: compare(pair[0], pair[1], scale, border), pairs)
        return list(tqdm(found, f'Checking x{scale} ({border})', len(pairs), leave=False, disable=None))


def compare(hr: Path, lr: Path, scale: int, border: Border) -> Difference:
    """An LR file against the exact bicubic of its HR; one of another size differs everywhere.

    Raises:
        UserError: an image cannot be read, or HR is smaller than the scale.
    """
    import numpy as np

    from data.image import read_rgb
    from data.imresize import shrink

    try:
        exact = shrink(read_rgb(hr), scale, border)
    except ValueError as error:
        raise UserError(f'{hr}: {error}; remove it.') from error
    given = read_rgb(lr)
    pixels = exact.shape[0] * exact.shape[1]
    if given.shape != exact.shape:
        return Difference(lr, pixels, pixels, 255)
    apart = np.abs(exact.astype(np.int16) - given).max(axis=-1)
    return Difference(lr, int(np.count_nonzero(apart)), pixels, int(apart.max()))


def report(found: Sequence[Difference], border: str) -> str:
    """What the differences of a set come to, and its worst three files."""
    worst = sorted((d for d in found if d.pixels), key=lambda d: (-d.pixels, d.path))
    if not worst:
        return f'all equal to the exact bicubic (border {border})'
    pixels, of = sum(d.pixels for d in worst), sum(d.of for d in found)
    names = ', '.join(f'{d.path.name} ({d.pixels:,} pixels, by up to {d.largest})' for d in worst[:3])
    return (
        f'{len(worst)} differ from the exact bicubic (border {border}) in {pixels:,} of {of:,} pixels '
        f'({100 * pixels / of:.2g} %); worst: {names}'
    )


if __name__ == '__main__':
    run_program(main)
