"""Decoded copies of images, so that training reads a crop without decoding the whole file."""

import io
from contextlib import suppress
from pathlib import Path

import numpy as np

from data.image import read_rgb
from error import WriteError
from system.files import is_there, write_atomic


class DecodedCache:
    """One uint8 array file per image, memory-mapped anew at each reading: a map kept open would hold a file handle.

    A copy carries its source's size and modification time in its name, so a changed source is decoded again.

    Args:
        folder: where the copies are kept; made when the first one is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, source: Path) -> Path:
        """Where the copy of `source`, as it is now, is kept."""
        stat = source.stat()
        return self.folder / f'{source.name}.{stat.st_size}-{stat.st_mtime_ns}.npy'

    def write(self, source: Path) -> None:
        """Decode `source` unless its copy is there; copies of its older versions are removed.

        Raises:
            UserError: the image cannot be read.
            WriteError: the folder cannot be written.
        """
        path = self.path(source)
        if is_there(path):
            return
        content = io.BytesIO()
        np.save(content, read_rgb(source), allow_pickle=False)
        self.remove(source)
        write_atomic(path, content.getbuffer())

    def remove(self, source: Path) -> None:
        """Delete every copy of `source`.

        Raises:
            WriteError: the folder cannot be written.
        """
        for old in self.folder.glob('*.npy'):
            if old.name.rsplit('.', 2)[0] == source.name:
                try:
                    old.unlink(missing_ok=True)
                except OSError as error:
                    raise WriteError(f'{old} could not be removed ({error.strerror or error}).') from error

    def read(self, source: Path) -> np.ndarray:
        """(H, W, 3) uint8, memory-mapped where there is a copy, decoded otherwise."""
        with suppress(OSError, ValueError, EOFError):  # no copy, or a damaged one
            return np.load(self.path(source), mmap_mode='r', allow_pickle=False)
        return read_rgb(source)
