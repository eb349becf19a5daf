"""PNG: written row by row, so that no image need be held, and read where it has 16 bits, which Pillow reduces to 8.

Follows the PNG specification, third edition (https://www.w3.org/TR/png-3/): chunks in section 5, filters in section 9.
"""

import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from io import BytesIO
from itertools import chain
from types import MappingProxyType
from typing import BinaryIO

import numpy as np

SIGNATURE = b'\x89PNG\r\n\x1a\n'
HEAD_BYTES = 25  # signature, length and name of IHDR, width, height, bit depth
CHANNELS = {0: 1, 2: 3, 4: 2, 6: 4}  # colour type -> channels: grey, RGB, grey + alpha, RGBA
COLOR_TYPES = {channels: color_type for color_type, channels in CHANNELS.items()}
NONE, SUB, UP, AVERAGE, PAETH = range(5)
ROWS = 64  # packed at a time
CHUNK_BYTES = 2**16  # written at a time, or more
DEFLATE_RATIO = 1032  # deflate never packs more bytes into one
# Section 8.1: first row and column, and steps, of the pixels that each pass holds.
ADAM7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
# Section 11.3.6.2: what becomes of a frame of an animation before the next one is drawn, and how it is drawn.
KEPT, CLEARED, RESTORED = range(3)
REPLACING, OVER = range(2)
TOO_SHORT = 'the PNG file holds less image data than its header declares'
ONE_PASS = ((0, 0, 1, 1),)
FRAMES = (b'IDAT', b'acTL', b'fcTL', b'fdAT')  # chunks with pixels, and what arranges them into an animation
COLORS = {b'cICP': 4, b'cHRM': 32, b'gAMA': 4, b'sRGB': 1, b'mDCV': 24, b'cLLI': 8}  # what colours mean, and its bytes


def is_png16(head: bytes) -> bool:
    """Whether a file that starts with `head` (HEAD_BYTES or more) is a PNG with 16 bits a channel."""
    return head[:8] == SIGNATURE and head[12:16] == b'IHDR' and head[24:25] == b'\x10'


def read_png16(data: bytes) -> np.ndarray:
    """Decodes a 16-bit PNG file.

    Returns:
        (H, W, C) uint16 in [0, 65535]; C is 1 grey, 2 grey and alpha, 3 RGB, 4 RGBA. A transparent colour (tRNS)
        becomes an alpha channel of 0 and 65535.

    Raises:
        ValueError: the file is damaged, cut short, or not a 16-bit PNG.
    """
    header, key, packed = b'', None, []
    for name, body in chunks_of(BytesIO(data)):
        if name == b'IHDR':
            header = body
        elif name == b'tRNS':
            key = np.frombuffer(body, '>u2')
        elif name == b'IDAT':
            packed.append(body)
    height, width, channels, interlaced = _shape(header)
    passes = ADAM7 if interlaced else ONE_PASS
    shapes = [(*sides, channels) for sides in _pass_sides(height, width, passes)]
    parts = list(_reduced_images(b''.join(packed), shapes))
    if not interlaced:
        image = parts[0].astype(np.uint16)
    else:
        image = np.empty((height, width, channels), np.uint16)
        for (y, x, down, right), part in zip(passes, parts, strict=True):
            image[y::down, x::right] = part
    return image if key is None else _with_alpha(image, key)


def check_whole(file: BinaryIO) -> None:
    """Make sure that a PNG file of at most 8 bits a channel lacks no rows, which Pillow would make black.

    Raises:
        ValueError: it does.
    """
    unpacker, left = zlib.decompressobj(), 0
    file.seek(len(SIGNATURE))
    while len(head := file.read(8)) == 8:
        length, name = struct.unpack('>I4s', head)
        end = file.tell() + length
        if name == b'IHDR':
            left = _filtered_bytes(file.read(13))
        while name == b'IDAT' and left > 0 and (packed := file.read(min(CHUNK_BYTES, end - file.tell()))):
            while packed and left > 0:
                left -= len(unpacker.decompress(packed, CHUNK_BYTES))
                packed = unpacker.unconsumed_tail
        file.seek(end + 4)
    if left > len(unpacker.flush()):
        raise ValueError(TOO_SHORT)


def _filtered_bytes(header: bytes) -> int:
    """How many bytes of filtered rows an image has that the IHDR chunk declares."""
    width, height, depth, color_type, _, _, interlaced = struct.unpack('>IIBBBBB', header)
    bits = depth * CHANNELS.get(color_type, 1)  # a palette has one channel
    sides = _pass_sides(height, width, ADAM7 if interlaced else ONE_PASS)
    return sum(h * (1 + -(-w * bits // 8)) for h, w in sides if w)  # without columns there are no rows either


def _pass_sides(height: int, width: int, passes: Sequence[tuple[int, int, int, int]]) -> list[tuple[int, int]]:
    """Rows and columns of the reduced image of each pass."""
    return [(len(range(y, height, down)), len(range(x, width, right))) for y, x, down, right in passes]


def read_chunks(file: BinaryIO) -> tuple[dict[bytes, bytes], bytes]:
    """What a PNG file holds besides its pixels, as far as it is whole; checksums are not verified.

    Returns:
        The statements on colours (`COLORS`) that stand before the pixels, and a file that has all chunks but FRAMES if
        there are any after the pixels, otherwise nothing.
    """
    file.seek(len(SIGNATURE))
    colors, kept, late, pixels_seen = {}, [SIGNATURE], False, False
    while len(head := file.read(8)) == 8:
        length, name = struct.unpack('>I4s', head)
        if name in FRAMES:
            pixels_seen |= name == b'IDAT'
            file.seek(length + 4, 1)
            continue
        body = file.read(length + 4)[:length]
        if len(body) < length:
            break
        kept.append(chunk(name, body))
        if name == b'IEND':
            break
        late |= pixels_seen
        if COLORS.get(name) == length and not pixels_seen:
            colors[name] = body
    return colors, b''.join(kept) if late else b''


def encode_png(
    rows: Iterable[np.ndarray],
    height: int,
    icc: bytes | None = None,
    chunks: Mapping[bytes, bytes] = MappingProxyType({}),
) -> Iterator[bytes]:
    """A PNG file in pieces, from rows of an image that come in pieces; packed for speed, not for size.

    Args:
        rows: uint8 or uint16 (some, W) or (some, W, C) from top to bottom, `height` in all; C = 1 grey, 2 grey and
            alpha, 3 RGB, 4 RGBA.
        icc: a colour profile to put in.
        chunks: others to put before the pixels, by name.
    """
    blocks = _blocks(rows)
    first = next(blocks)
    yield _head(first, height, icc, chunks)
    for packed in _packed(chain([first], blocks)):
        yield chunk(b'IDAT', packed)
    yield chunk(b'IEND', b'')


def encode_apng(
    frames: Iterable[tuple[np.ndarray, float]],
    count: int,
    plays: int,
    icc: bytes | None = None,
    chunks: Mapping[bytes, bytes] = MappingProxyType({}),
) -> Iterator[bytes]:
    """An animated PNG file in pieces (section 11.3.6), each of whose frames replaces the one before it.

    Args:
        frames: each as it is seen, all of one shape and type, as of `encode_png`, and for how many milliseconds.
        count: how many there are.
        plays: how often they are shown, 0 for ever.
        icc, chunks: as of `encode_png`.
    """
    number = 0  # in the sequence of all fcTL and fdAT chunks
    for at, (pixels, duration) in enumerate(frames):
        height, width = pixels.shape[:2]
        if at == 0:
            (first, *_) = _blocks([pixels[:1]])
            yield _head(first, height, icc, {b'acTL': struct.pack('>II', count, plays), **chunks})
        delay = Fraction(min(duration / 1000, 65535)).limit_denominator(1000)
        delay = delay if delay.numerator < 2**16 else Fraction(round(delay))
        place = number, width, height, 0, 0, delay.numerator, delay.denominator
        yield chunk(b'fcTL', struct.pack('>IIIIIHHBB', *place, KEPT, REPLACING))
        number += 1
        for packed in _packed(_blocks([pixels])):
            if at == 0:
                yield chunk(b'IDAT', packed)
            else:
                yield chunk(b'fdAT', struct.pack('>I', number) + packed)
                number += 1
    yield chunk(b'IEND', b'')


def _head(block: np.ndarray, height: int, icc: bytes | None, chunks: Mapping[bytes, bytes]) -> bytes:
    """What stands before the pixels, of which `block` are some rows."""
    _, width, channels = block.shape
    shape = width, height, 8 * block.itemsize, COLOR_TYPES[channels], 0, 0, 0
    parts = [SIGNATURE, chunk(b'IHDR', struct.pack('>IIBBBBB', *shape))]
    if icc is not None:
        parts.append(chunk(b'iCCP', b'ICC profile\0\0' + zlib.compress(icc)))
    return b''.join(parts + [chunk(name, body) for name, body in chunks.items()])


def _packed(blocks: Iterable[np.ndarray]) -> Iterator[bytes]:
    """The rows of an image filtered and packed, in pieces of CHUNK_BYTES or more."""
    packer, packed, above = zlib.compressobj(1), b'', np.zeros(0, np.uint8)
    for block in blocks:
        pixels = np.ascontiguousarray(block, block.dtype.newbyteorder('>')).reshape(len(block), -1).view(np.uint8)
        above = above if len(above) else np.zeros_like(pixels[0])
        filtered = np.empty((len(pixels), 1 + len(above)), np.uint8)
        filtered[:, 0] = UP
        np.subtract(pixels[0], above, out=filtered[0, 1:])
        np.subtract(pixels[1:], pixels[:-1], out=filtered[1:, 1:])
        above = pixels[-1].copy()
        packed += packer.compress(filtered.data)
        if len(packed) > CHUNK_BYTES:
            yield packed
            packed = b''
    yield packed + packer.flush()


def _blocks(rows: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """The rows again, (some, W, C) and few at a time."""
    for piece in rows:
        piece = piece[..., None] if piece.ndim == 2 else piece
        if piece.dtype not in (np.uint8, np.uint16) or piece.shape[2:] not in ((1,), (2,), (3,), (4,)):
            raise ValueError(f'a PNG takes uint8 or uint16 (H, W) or (H, W, 1 to 4), not {piece.dtype} {piece.shape}')
        if piece.size == 0:
            raise ValueError(f'a PNG has pixels, and {piece.shape} has none')
        for first in range(0, len(piece), ROWS):
            yield piece[first : first + ROWS]


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack('>I', len(body)) + name + body + struct.pack('>I', zlib.crc32(name + body))


def chunks_of(file: BinaryIO) -> Iterator[tuple[bytes, bytes]]:
    """Name and body of every chunk before IEND, lengths and checksums verified."""
    file.seek(0)
    if file.read(len(SIGNATURE)) != SIGNATURE:
        raise ValueError('no PNG signature')
    while len(head := file.read(8)) == 8:
        length, name = struct.unpack('>I4s', head)
        body, crc = file.read(length), file.read(4)
        if len(crc) < 4:
            break
        if zlib.crc32(body, zlib.crc32(name)) != int.from_bytes(crc, 'big'):
            raise ValueError(f'the checksum of PNG chunk {name!r} is wrong')
        if name == b'IEND':
            return
        yield name, body
    raise ValueError('the PNG file ends early')


def _shape(header: bytes) -> tuple[int, int, int, bool]:
    """Height, width and channels that the IHDR chunk declares, and whether the image is interlaced."""
    if len(header) != 13:
        raise ValueError('the PNG header is missing or has a wrong length')
    width, height, depth, color_type, compression, filtering, interlace = struct.unpack('>IIBBBBB', header)
    if depth != 16 or color_type not in CHANNELS or (compression, filtering) != (0, 0) or interlace > 1:
        raise ValueError(f'the PNG header declares depth {depth}, colour type {color_type}, not a valid 16-bit image')
    if not (0 < width < 2**31 and 0 < height < 2**31):
        raise ValueError(f'the PNG header declares {width} x {height} pixels')
    return height, width, CHANNELS[color_type], interlace == 1


def _reduced_images(packed: bytes, shapes: Sequence[tuple[int, int, int]]) -> Iterator[np.ndarray]:
    """Images of these shapes (H, W, C), one behind the other in the packed data, big-endian uint16."""
    sizes = [h * (1 + 2 * c * w) if w else 0 for h, w, c in shapes]  # without columns there are no rows either
    data, end = _inflate(packed, sum(sizes)), 0
    for (height, width, channels), size in zip(shapes, sizes, strict=True):
        start, end = end, end + size
        if not size:
            yield np.empty((height, width, channels), '>u2')
            continue
        rows = data[start:end].reshape(height, -1)
        yield _unfilter(rows[:, 0], rows[:, 1:].reshape(height, width, 2 * channels)).view('>u2')


def _inflate(packed: bytes, size: int) -> np.ndarray:
    """The first `size` bytes, uint8; never takes more memory than they do, or than the file's size allows."""
    if size > DEFLATE_RATIO * len(packed):
        raise ValueError(TOO_SHORT)
    try:
        data = zlib.decompressobj().decompress(packed, size)
    except zlib.error as error:
        raise ValueError(f'the image data of the PNG file is damaged ({error})') from error
    if len(data) < size:
        raise ValueError(TOO_SHORT)
    return np.frombuffer(data, np.uint8)


def _unfilter(filters: np.ndarray, filtered: np.ndarray) -> np.ndarray:
    """Undoes the row filters: (H,) filter types and (H, W, bytes a pixel) uint8 to (H, W, bytes a pixel) uint8.

    A pixel depends on its left, upper and upper left neighbours, so each anti-diagonal is computed at once from the two
    before it. None, Sub and Up are Paeth with the neighbours they ignore set to 0.
    """
    if filters.max() > PAETH:
        raise ValueError(f'the PNG file uses the unknown filter type {filters.max()}')
    height, width, step = filtered.shape
    pixels = filtered.reshape(-1, step).copy()
    by_row = filters.repeat(step).reshape(height, step)
    use_left = -np.isin(by_row, (SUB, AVERAGE, PAETH)).astype(np.int16)
    use_up = -np.isin(by_row, (UP, AVERAGE, PAETH)).astype(np.int16)
    use_corner = -(by_row == PAETH).astype(np.int16)
    average = by_row == AVERAGE
    # Entry r + 1 holds row r; entry 0 and rows not begun stay 0, as the specification wants outside the image.
    current, previous, before = np.zeros((3, height + 1, step), np.int16)
    for diagonal in range(height + width - 1):
        first, last = max(0, diagonal - width + 1), min(height - 1, diagonal)
        here, above = slice(first + 1, last + 2), slice(first, last + 1)
        a = previous[here] & use_left[above]
        b = previous[above] & use_up[above]
        c = before[above] & use_corner[above]
        prediction = np.where(average[above], (a + b) >> 1, _paeth(a, b, c))
        # In row-major order the next pixel of an anti-diagonal lies width - 1 further (a single one if width is 1).
        start, stop = diagonal + first * (width - 1), diagonal + last * (width - 1) + 1
        values = pixels[start : stop : max(1, width - 1)]
        values += prediction.astype(np.uint8)
        current[here] = values
        current, previous, before = before, current, previous
    return pixels.reshape(height, width, step)


def _paeth(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Whichever of left `a`, up `b` and upper left `c` is nearest to a + b - c; ties go in that order."""
    to_a, to_b = b - c, a - c
    to_c = np.abs(to_a + to_b)
    to_a, to_b = np.abs(to_a), np.abs(to_b)
    return np.where((to_a <= to_b) & (to_a <= to_c), a, np.where(to_b <= to_c, b, c))


def _with_alpha(image: np.ndarray, key: np.ndarray) -> np.ndarray:
    if key.size != image.shape[2] or key.size not in (1, 3):
        raise ValueError('the tRNS chunk of the PNG file does not fit its colour type')
    alpha = np.where((image == key).all(axis=2, keepdims=True), 0, 65535).astype(np.uint16)
    return np.concatenate((image, alpha), axis=2)
