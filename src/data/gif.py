"""GIF: written image by image. Pillow's own animations lose what has the colour of their background (Pillow #7207).

Follows GIF89a (https://www.w3.org/Graphics/GIF/spec-gif89a.txt).
"""

import struct
from collections.abc import Iterable, Iterator
from typing import Any

from PIL import Image
from PIL.GifImagePlugin import getdata

TRANSPARENT = 255  # the number of the colour that is none
MOST_PLAYS = 2**16  # that a file can say
COMMENT_BYTES = 255  # in a piece
TAKEN_AWAY = 2  # before the next one is shown


def encode_gif(images: Iterable[tuple[Image.Image, int]], plays: int | None, comment: bytes) -> Iterator[bytes]:
    """A GIF file in pieces.

    Args:
        images: all of one size, with palettes of 256 colours, of which the one of number TRANSPARENT is none; and for
            how many milliseconds each is shown, a multiple of 10 up to 655,350.
        plays: how often they are shown, 0 for ever; None: there is one only.
        comment: what the file says of itself.
    """
    for number, (image, duration) in enumerate(images):
        if number == 0:
            yield struct.pack('<6sHHBBB', b'GIF89a', *image.size, 0xF7, 0, 0) + bytes(image.getpalette() or ())
            if plays is not None and plays != 1:  # it says how often after the first time
                yield b'!\xff\x0bNETSCAPE2.0\x03\x01' + struct.pack('<HB', plays and min(plays, MOST_PLAYS) - 1, 0)
            yield b'!\xfe' + b''.join(_pieces(comment)) + b'\0'
        moves, clear = plays is not None, image.getextrema()[1] == TRANSPARENT
        says: dict[str, Any] = {'duration': duration, 'disposal': TAKEN_AWAY if moves else 0}
        if moves or clear:  # or Pillow takes an image away by leaving its first colour
            says['transparency'] = TRANSPARENT
        yield from getdata(image, include_color_table=number > 0, **says)
    yield b';'


def _pieces(text: bytes) -> Iterator[bytes]:
    for start in range(0, len(text), COMMENT_BYTES):
        piece = text[start : start + COMMENT_BYTES]
        yield bytes([len(piece)]) + piece
