"""Compiled kernels kept on disk: what one process has compiled, the next ones load.

They are in the user's folder for caches, or below FRUGALSR_CACHE of the environment; with FRUGALSR_CACHE=off none is
kept. Since they are run as code, they are taken only from a folder of this user in which nobody else may write. Where
there is none, each process compiles for itself.
"""

import logging
import os
import sys
import time
from collections.abc import Callable, Hashable
from contextlib import suppress
from functools import cache, wraps
from hashlib import sha256
from pathlib import Path
from tempfile import mkstemp

import llvmlite
import llvmlite.binding as llvm

from model.ops.llvm.code import Code, Kernel, host, object_file, openmp

DAYS = 30  # after its last use a kernel is removed
SUFFIX = '.kernel'

log = logging.getLogger('frugalsr')


def digest_of(folder: Path) -> str | None:
    """Of the source files in a folder and those in it, names and contents; None if there are none."""
    found, paths = sha256(), sorted(folder.rglob('*.py'))
    for path in paths:
        found.update(path.relative_to(folder).as_posix().encode() + b'\0' + sha256(path.read_bytes()).digest())
    return found.hexdigest() if paths else None


SOURCES = digest_of(Path(__file__).parent.parent)  # as they are when the first kernel is wanted, not edited later


def compiled(write: Callable[..., Code]) -> Callable[..., Kernel]:
    """Makes a function that writes code one that gives its kernel, the same one for the same arguments.

    The code may depend on nothing else but what stands in the source files of `model.ops`, and the CPU.
    """

    @cache
    @wraps(write)
    def kernel(*arguments: Hashable) -> Kernel:
        what = write.__module__, write.__qualname__, arguments
        by = SOURCES, llvmlite.__version__, llvm.llvm_version_info, llvm.get_process_triple(), host(), bool(openmp())
        path = place(sha256(repr((what, by)).encode()).hexdigest()) if SOURCES else None
        content = load(path) if path else None
        if content is None:
            content = object_file(write(*arguments))
            if path:
                store(path, content)
        return Kernel(content)

    return kernel


def place(name: str) -> Path | None:
    """Where a kernel of this name is kept, in a folder that is made as needed; None if there can be none."""
    folder = find_folder()
    if folder is None:
        return None
    try:
        folder.mkdir(0o700, parents=True, exist_ok=True)
        if is_private(folder.stat()):
            return folder / (name + SUFFIX)
        log.debug('Kernels are not kept: %s is not of this user alone.', folder)
    except OSError as error:
        log.debug('Kernels are not kept: %s', error)
    return None


def find_folder() -> Path | None:
    """The folder that the user names, else one where this system has its caches, unless there is no home."""
    chosen = os.environ.get('FRUGALSR_CACHE')
    if chosen:
        return None if chosen == 'off' else Path(chosen, 'kernels')
    try:
        if sys.platform == 'win32':
            caches = Path(os.environ['LOCALAPPDATA'])
        elif sys.platform == 'darwin':
            caches = Path.home() / 'Library/Caches'
        else:
            given = Path(os.environ.get('XDG_CACHE_HOME', ''))
            caches = given if given.is_absolute() else Path.home() / '.cache'  # as its specification says
    except (KeyError, RuntimeError):
        return None
    return caches / 'frugalsr/kernels' if caches.is_absolute() else None


def is_private(status: os.stat_result) -> bool:
    """Whether a file or folder is this user's and nobody else may write to it; on Windows modes say nothing of that."""
    return sys.platform == 'win32' or (status.st_uid == os.geteuid() and not status.st_mode & 0o022)


def checksum(path: Path, content: bytes) -> bytes:
    """What stands before the content of a file, so that one that is damaged, or another one's, is found out."""
    return sha256(path.name.encode() + content).digest()


def load(path: Path) -> bytes | None:
    """The content of a file, if it is there and whole; it is marked as used now."""
    try:
        with path.open('rb') as file:
            private = is_private(os.fstat(file.fileno()))
            found, content = file.read(sha256().digest_size), file.read()
    except OSError:
        return None
    if not private or found != checksum(path, content):
        log.debug('%s is damaged, or not of this user alone: the kernel is compiled again.', path)
        return None
    with suppress(OSError):
        os.utime(path)
    return content


def store(path: Path, content: bytes) -> None:
    """Write a file aside and rename it, if the disk takes it; after a crash it may be damaged, which `load` sees."""
    try:
        descriptor, name = mkstemp(SUFFIX, dir=path.parent)  # which nobody else may write to, whatever the umask
        aside = Path(name)
        try:
            with os.fdopen(descriptor, 'wb') as file:
                file.write(checksum(path, content) + content)
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
        sweep(path.parent)
    except OSError as error:
        log.debug('A kernel is not kept: %s', error)


@cache
def sweep(folder: Path) -> None:
    """Remove what has not been used for long, once a process."""
    for path in folder.glob(f'*{SUFFIX}'):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > DAYS * 24 * 60 * 60:
                path.unlink()
