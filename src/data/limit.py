"""Pillow's limit on the pixels of an image, which is the process's and so belongs to whoever else uses Pillow."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

from PIL import Image

_lock = Lock()
_inside = 0
_theirs: int | None = None


@contextmanager
def pillow_allows(pixels: int) -> Iterator[None]:
    """Within this block, and meanwhile in other threads, Pillow's limit is so many pixels; then what it was before."""
    global _inside, _theirs
    with _lock:
        if not _inside:
            _theirs, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, pixels
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                Image.MAX_IMAGE_PIXELS = _theirs
