"""PNG with 16 bits a channel, which Pillow reduces to 8 bits.

Follows the PNG specification, third edition (https://www.w3.org/TR/png-3/): chunks in section 5, filters in section 9.
"""

import struct
import zlib
from collections.abc import Iterator

import numpy as np

SIGNATURE = b'\x89PNG\r\n\x1a\n'
HEAD_BYTES = 25  # signature, length and name of IHDR, width, height, bit depth
CHANNELS = {0: 1, 2: 3, 4: 2, 6: 4}  # colour type -> channels: grey, RGB, grey + alpha, RGBA
COLOR_TYPES = {channels: color_type for color_type, channels in CHANNELS.items()}
NONE, SUB, UP, AVERAGE, PAETH = range(5)
DEFLATE_RATIO = 1032  # deflate never packs more bytes into one


def is_png16(head: bytes) -> bool:
    """Whether a file that starts with `head` (HEAD_BYTES or more) is a PNG with 16 bits a channel."""
    return head[:8] == SIGNATURE and head[12:16] == b'IHDR' and head[24:25] == b'\x10'


def read_png16(data: bytes) -> np.ndarray:
    """Decodes a 16-bit PNG file.

    Returns:
        (H, W, C) uint16 in [0, 65535]; C is 1 grey, 2 grey and alpha, 3 RGB, 4 RGBA. A transparent colour (tRNS)
        becomes an alpha channel of 0 and 65535.

    Raises:
        ValueError: the file is damaged, cut short, interlaced, or not a 16-bit PNG.
    """
    header, key, packed = b'', None, []
    for name, body in _chunks(data):
        if name == b'IHDR':
            header = body
        elif name == b'tRNS':
            key = np.frombuffer(body, '>u2')
        elif name == b'IDAT':
            packed.append(body)
    height, width, channels = _shape(header)
    rows = _inflate(b''.join(packed), height, 1 + 2 * width * channels)
    pixels = _unfilter(rows[:, 0], rows[:, 1:].reshape(height, width, 2 * channels))
    image = pixels.view('>u2').astype(np.uint16)
    return image if key is None else _with_alpha(image, key)


def write_png16(image: np.ndarray) -> bytes:
    """Encodes (H, W) or (H, W, C) uint16, C = 1 grey, 2 grey and alpha, 3 RGB, 4 RGBA, as a PNG file."""
    if image.ndim == 2:
        image = image[..., None]
    if image.dtype != np.uint16 or image.ndim != 3 or image.shape[2] not in COLOR_TYPES or image.size == 0:
        raise ValueError(f'a 16-bit PNG takes uint16 (H, W) or (H, W, 1 to 4), not {image.dtype} {image.shape}')
    height, width, channels = image.shape
    pixels = image.astype('>u2').reshape(height, -1).view(np.uint8)
    rows = np.empty((height, 1 + pixels.shape[1]), np.uint8)
    rows[:, 0] = UP
    rows[0, 1:] = pixels[0]
    np.subtract(pixels[1:], pixels[:-1], out=rows[1:, 1:])
    header = struct.pack('>IIBBBBB', width, height, 16, COLOR_TYPES[channels], 0, 0, 0)
    return SIGNATURE + _chunk(b'IHDR', header) + _chunk(b'IDAT', zlib.compress(rows.data, 1)) + _chunk(b'IEND', b'')


def with_profile(png: bytes, icc: bytes) -> bytes:
    """A PNG file of any depth with an ICC profile added, behind its header as the PNG specification wants it."""
    end_of_header = len(SIGNATURE) + 25
    profile = _chunk(b'iCCP', b'ICC profile\0\0' + zlib.compress(icc))
    return png[:end_of_header] + profile + png[end_of_header:]


def _chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack('>I', len(body)) + name + body + struct.pack('>I', zlib.crc32(name + body))


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Name and body of every chunk before IEND, lengths and checksums verified."""
    if data[:8] != SIGNATURE:
        raise ValueError('no PNG signature')
    start = 8
    while start + 12 <= len(data):
        length = int.from_bytes(data[start : start + 4], 'big')
        end = start + 8 + length
        name, body, crc = data[start + 4 : start + 8], data[start + 8 : end], data[end : end + 4]
        if len(crc) < 4:
            break
        if zlib.crc32(body, zlib.crc32(name)) != int.from_bytes(crc, 'big'):
            raise ValueError(f'the checksum of PNG chunk {name!r} is wrong')
        if name == b'IEND':
            return
        yield name, body
        start = end + 4
    raise ValueError('the PNG file ends early')


def _shape(header: bytes) -> tuple[int, int, int]:
    """Height, width and channels that the IHDR chunk declares."""
    if len(header) != 13:
        raise ValueError('the PNG header is missing or has a wrong length')
    width, height, depth, color_type, compression, filtering, interlace = struct.unpack('>IIBBBBB', header)
    if interlace == 1:
        raise ValueError('16-bit PNG with Adam7 interlacing is not supported, save it without interlacing')
    if depth != 16 or color_type not in CHANNELS or (compression, filtering, interlace) != (0, 0, 0):
        raise ValueError(f'the PNG header declares depth {depth}, colour type {color_type}, not a valid 16-bit image')
    if not (0 < width < 2**31 and 0 < height < 2**31):
        raise ValueError(f'the PNG header declares {width} x {height} pixels')
    return height, width, CHANNELS[color_type]


def _inflate(packed: bytes, height: int, row_bytes: int) -> np.ndarray:
    """Filtered rows (height, row_bytes) uint8; never takes more memory than they do, or than the file's size allows."""
    size = height * row_bytes
    if size > DEFLATE_RATIO * len(packed):
        raise ValueError('the PNG file holds less image data than its header declares')
    try:
        data = zlib.decompressobj().decompress(packed, size)
    except zlib.error as error:
        raise ValueError(f'the image data of the PNG file is damaged ({error})') from error
    if len(data) < size:
        raise ValueError('the PNG file holds less image data than its header declares')
    return np.frombuffer(data, np.uint8).reshape(height, row_bytes)


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
