"""Decoded copies of images, so that training reads a crop without decoding the whole file."""

import contextlib
import io
from pathlib import Path

import numpy as np

from data.image import read_rgb
from files import write_atomic


class DecodedCache:
    """One uint8 array file per image, opened memory-mapped.

    A copy carries its source's size and modification time in its name, so a changed source is decoded again.

    Args:
        folder: where the copies are kept; made when the first one is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[Path, np.ndarray] = {}

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
        if path.exists():
            return
        content = io.BytesIO()
        np.save(content, read_rgb(source), allow_pickle=False)
        self.remove(source)
        write_atomic(path, content.getbuffer())

    def remove(self, source: Path) -> None:
        """Delete every copy of `source`."""
        for old in self.folder.glob('*.npy'):
            if old.name.rsplit('.', 2)[0] == source.name:
                old.unlink(missing_ok=True)

    def read(self, source: Path) -> np.ndarray:
        """(H, W, 3) uint8, memory-mapped where there is a copy, decoded otherwise."""
        if source not in self._open:
            with contextlib.suppress(FileNotFoundError, ValueError):
                self._open[source] = np.load(self.path(source), mmap_mode='r', allow_pickle=False)
        return self._open[source] if source in self._open else read_rgb(source)
