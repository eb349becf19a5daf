"""Animated PNG, read: Pillow draws frames over others as if alpha were one more colour.

Follows the PNG specification, third edition (https://www.w3.org/TR/png-3/), section 11.3.6.
"""

import struct
from collections.abc import Iterator
from io import BytesIO
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from data.image import rgba_of
from data.png import FRAMES, KEPT, OVER, REPLACING, RESTORED, SIGNATURE, chunk, chunks_of

ROWS = 64  # drawn at a time


class Drawn(NamedTuple):
    """Where and how a frame is drawn, as its fcTL chunk says."""

    number: int
    width: int
    height: int
    left: int
    top: int
    numerator: int
    denominator: int
    after: int
    how: int


def read_apng(file: BinaryIO) -> Iterator[tuple[np.ndarray, float]]:
    """The frames of an animated PNG file as they are seen, (H, W, 4) uint8, each with its milliseconds.

    Raises:
        ValueError: the file is damaged.
    """
    canvas = np.zeros((0, 0, 4), np.uint8)
    for header, drawn, still in _frames(file):
        if not canvas.size:
            width, height = struct.unpack_from('>II', header)
            canvas = np.zeros((height, width, 4), np.uint8)
        area = canvas[drawn.top : drawn.top + drawn.height, drawn.left : drawn.left + drawn.width]
        if area.shape[:2] != (drawn.height, drawn.width) or drawn.after > RESTORED or drawn.how > OVER:
            raise ValueError('a frame of the PNG file is drawn outside its image, or in no way that there is')
        before = area.copy() if drawn.after == RESTORED else 0
        _draw(still, area, drawn.how)
        del still  # it takes as much memory as the frame, if it could not be packed
        yield canvas.copy(), 1000 * drawn.numerator / (drawn.denominator or 100)
        if drawn.after != KEPT:
            area[:] = before


def _draw(still: bytes, area: np.ndarray, how: int) -> None:
    """Draw a PNG file on pixels (H, W, 4)."""
    with Image.open(BytesIO(still), formats=('PNG',)) as image:
        own = rgba_of(image)
    for top in range(0, len(area), ROWS):
        upper, lower = own[top : top + ROWS], area[top : top + ROWS]
        lower[:] = upper if how == REPLACING else over(upper, lower)


def over(upper: np.ndarray, lower: np.ndarray) -> np.ndarray:
    """Pixels (H, W, 4) in front of others."""
    return np.asarray(Image.alpha_composite(*map(Image.fromarray, (lower, upper))))


def _frames(file: BinaryIO) -> Iterator[tuple[bytes, Drawn, bytes]]:
    """The header of an animation, and each of its frames as a file of its own."""
    header, control = b'', b''
    common: list[bytes] = []
    packed: list[bytes] = []
    fault = None
    try:
        for name, body in chunks_of(file):
            if name == b'fcTL':
                if control:
                    yield _frame(header, common, control, packed)
                control, packed = body, []
            elif name == b'IHDR':
                header = body
            elif name not in FRAMES:
                common.append(chunk(name, body))
            elif name == b'fdAT' or (name == b'IDAT' and control):  # without, it is of a still image that is no frame
                packed.append(body[4:] if name == b'fdAT' else body)
    except ValueError as error:  # the last frame may be whole all the same
        fault = error
    if control:
        yield _frame(header, common, control, packed)
    if fault:
        raise fault


def _frame(header: bytes, common: list[bytes], control: bytes, packed: list[bytes]) -> tuple[bytes, Drawn, bytes]:
    drawn, pixels = Drawn(*struct.unpack('>IIIIIHHBB', control)), b''.join(packed)
    packed.clear()
    size = struct.pack('>II', drawn.width, drawn.height)
    parts = (chunk(b'IHDR', size + header[8:]), *common, chunk(b'IDAT', pixels), chunk(b'IEND', b''))
    return header, drawn, b''.join((SIGNATURE, *parts))
