"""The PNG codec against the specification, spelled out byte by byte below, and against Pillow."""

import struct
import tracemalloc
import zlib
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from data.png import encode_png, is_png16, read_png16

SIGNATURE = b'\x89PNG\r\n\x1a\n'
CHANNELS = {0: 1, 2: 3, 4: 2, 6: 4}


def written(image: np.ndarray, parts: int = 1) -> bytes:
    return b''.join(encode_png(np.array_split(image, parts), len(image)))


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack('>I', len(body)) + name + body + struct.pack('>I', zlib.crc32(name + body))


def png(width, height, color_type, rows: bytes, extra=b'', depth=16, interlace=0, parts=1) -> bytes:
    header = struct.pack('>IIBBBBB', width, height, depth, color_type, 0, 0, interlace)
    packed = zlib.compress(rows)
    cut = -(-len(packed) // parts)
    data = b''.join(chunk(b'IDAT', packed[i : i + cut]) for i in range(0, len(packed), cut))
    return SIGNATURE + chunk(b'IHDR', header) + extra + data + chunk(b'IEND', b'')


def predict(kind: int, a: int, b: int, c: int) -> int:
    """PNG specification, table 9.1."""
    if kind == 4:
        p = a + b - c
        pa, pb, pc = abs(p - a), abs(p - b), abs(p - c)
        if pa <= pb and pa <= pc:
            return a
        return b if pb <= pc else c
    return (0, a, b, (a + b) // 2)[kind]


def reconstruct(rows: bytes, height: int, row_bytes: int, step: int) -> list[list[int]]:
    """PNG specification, section 9.2, one byte at a time."""
    image, above = [], [0] * row_bytes
    for r in range(height):
        kind, *line = rows[r * (row_bytes + 1) : (r + 1) * (row_bytes + 1)]
        for i in range(row_bytes):
            a = line[i - step] if i >= step else 0
            c = above[i - step] if i >= step else 0
            line[i] = (line[i] + predict(kind, a, above[i], c)) % 256
        image.append(line)
        above = line
    return image


def random_rows(rng, kinds, row_bytes: int) -> bytes:
    return b''.join(bytes([kind]) + rng.bytes(row_bytes) for kind in kinds)


@pytest.mark.parametrize('color_type', CHANNELS)
@pytest.mark.parametrize('shape', [(1, 1), (1, 9), (9, 1), (2, 2), (7, 13), (13, 7), (12, 12)])
@pytest.mark.parametrize('kind', [0, 1, 2, 3, 4, 'mixed'])
def test_reading_follows_the_specification(color_type, shape, kind):
    height, width = shape
    rng = np.random.default_rng(height * 100 + width)
    channels = CHANNELS[color_type]
    kinds = rng.integers(0, 5, height) if kind == 'mixed' else [kind] * height
    rows = random_rows(rng, kinds, 2 * width * channels)
    expected = np.array(reconstruct(rows, height, 2 * width * channels, 2 * channels), np.uint8)
    expected = expected.view('>u2').reshape(height, width, channels)
    image = read_png16(png(width, height, color_type, rows, parts=3))
    assert image.dtype == np.uint16
    np.testing.assert_array_equal(image, expected)


# PNG specification, section 8.1: the pass that each pixel of a square of 8 x 8 belongs to.
PASSES = ('16462646', '77777777', '56565656', '77777777', '36463646', '77777777', '56565656', '77777777')


@pytest.mark.parametrize('color_type', CHANNELS)
@pytest.mark.parametrize('shape', [(1, 1), (1, 9), (9, 1), (3, 2), (5, 4), (8, 8), (7, 13), (20, 17)])
def test_reading_interlaced_files(color_type, shape):
    height, width = shape
    rng = np.random.default_rng(height * 100 + width)
    channels = CHANNELS[color_type]
    expected = np.zeros((height, width, channels), np.uint16)
    packed = b''
    for number in '1234567':
        places = [(y, x) for y in range(height) for x in range(width) if PASSES[y % 8][x % 8] == number]
        count, row_bytes = len({y for y, _ in places}), 2 * channels * len({x for _, x in places})
        rows = random_rows(rng, rng.integers(0, 5, count), row_bytes)
        pixels = b''.join(map(bytes, reconstruct(rows, count, row_bytes, 2 * channels)))
        for place, values in zip(places, np.frombuffer(pixels, '>u2').reshape(-1, channels), strict=True):
            expected[place] = values
        packed += rows
    np.testing.assert_array_equal(read_png16(png(width, height, color_type, packed, interlace=1)), expected)
    if len(packed) > 10:
        with pytest.raises(ValueError, match='less image data'):
            read_png16(png(width, height, color_type, packed[:-1], interlace=1))


@pytest.mark.parametrize('shape', [(1, 1), (1, 8), (8, 1), (5, 9, 1), (5, 9, 2), (5, 9, 3), (9, 5, 4)])
@pytest.mark.parametrize('parts', [1, 2])
def test_written_files_read_back(shape, parts):
    image = np.random.default_rng(0).integers(0, 65536, shape).astype(np.uint16)
    data = written(image, min(parts, len(image)))
    assert is_png16(data[:32])
    np.testing.assert_array_equal(read_png16(data).reshape(shape), image)


def test_pillow_reads_what_is_written():
    image = np.random.default_rng(1).integers(0, 65536, (6, 11)).astype(np.uint16)
    np.testing.assert_array_equal(np.asarray(Image.open(BytesIO(written(image)))), image)
    color = np.repeat(image[..., None], 3, axis=2)
    np.testing.assert_array_equal(np.asarray(Image.open(BytesIO(written(color)))), color >> 8)


@pytest.mark.parametrize(
    ('shape', 'mode'), [((7, 9), 'L'), ((7, 9, 3), 'RGB'), ((200, 5, 4), 'RGBA'), ((1, 1, 3), 'RGB')]
)
@pytest.mark.parametrize('parts', [1, 3])
def test_pillow_reads_8_bits_written_in_parts(shape, mode, parts):
    image = np.random.default_rng(1).integers(0, 256, shape).astype(np.uint8)
    with Image.open(BytesIO(written(image, min(parts, len(image))))) as found:
        assert found.mode == mode
        np.testing.assert_array_equal(np.asarray(found), image)


def test_a_large_image_is_packed_a_few_rows_at_a_time():
    """What is held beside the file is much smaller than the image: here at most 64 rows of 4,096, several times."""
    image = np.random.default_rng(1).integers(0, 256, (4096, 512, 3)).astype(np.uint8)
    tracemalloc.start()
    for piece in encode_png([image], 4096):
        assert len(piece) < 200_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < image.nbytes / 4


def test_what_pillow_writes_is_read():
    image = np.random.default_rng(2).integers(0, 65536, (31, 17)).astype(np.uint16)
    buffer = BytesIO()
    Image.fromarray(image).save(buffer, 'PNG')
    np.testing.assert_array_equal(read_png16(buffer.getvalue())[..., 0], image)


@pytest.mark.parametrize('shape', [(4,), (4, 4, 5), (4, 0)])
def test_writing_refuses_other_shapes(shape):
    with pytest.raises(ValueError, match='a PNG'):
        written(np.zeros(shape, np.uint16))


def test_writing_refuses_other_types():
    with pytest.raises(ValueError, match='a PNG takes'):
        written(np.zeros((4, 4), np.float32))


@pytest.mark.parametrize(('color_type', 'key'), [(0, [7]), (2, [7, 8, 9])])
def test_transparent_colour_becomes_alpha(color_type, key):
    image = np.full((2, 3, len(key)), 7, '>u2')
    image[1, 2] = key
    image[0] = 8
    rows = b''.join(b'\0' + row.tobytes() for row in image)
    read = read_png16(png(3, 2, color_type, rows, chunk(b'tRNS', struct.pack(f'>{len(key)}H', *key))))
    np.testing.assert_array_equal(read[..., :-1], image)
    np.testing.assert_array_equal(read[..., -1] == 0, (image == key).all(axis=2))
    assert set(np.unique(read[..., -1])) == {0, 65535}


@pytest.mark.parametrize(('depth', 'expected'), [(8, False), (16, True)])
def test_is_png16(depth, expected):
    assert is_png16(png(1, 1, 2, bytes(7), depth=depth)) is expected


@pytest.mark.parametrize('head', [b'', SIGNATURE, b'\xff\xd8\xff' + bytes(30)])
def test_is_png16_of_other_files(head):
    assert not is_png16(head)


def test_every_cut_is_noticed():
    data = written(np.arange(12, dtype=np.uint16).reshape(3, 4))
    for size in range(len(data) - 1):
        with pytest.raises(ValueError):
            read_png16(data[:size])


def test_every_flipped_bit_is_noticed():
    data = written(np.arange(4, dtype=np.uint16).reshape(2, 2))
    iend = len(data) - 12
    for i in range(iend):
        with pytest.raises(ValueError):
            read_png16(data[:i] + bytes([data[i] ^ 4]) + data[i + 1 :])


@pytest.mark.parametrize(
    ('data', 'message'),
    [
        (b'', 'signature'),
        (png(1, 1, 2, bytes(7), interlace=2), 'valid'),
        (png(1, 1, 3, bytes(7)), 'colour type 3'),
        (png(1, 1, 2, bytes(4), depth=8), 'depth 8'),
        (png(0, 1, 2, bytes(7)), '0 x 1'),
        (png(2**31 - 1, 2**31 - 1, 6, bytes(9)), 'less image data'),
        (png(5, 5, 2, bytes(9)), 'less image data'),
        (png(1, 1, 2, b'\5' + bytes(6)), 'filter type 5'),
        (png(1, 1, 2, bytes(7), chunk(b'tRNS', b'\0\1')), 'tRNS'),
        (png(1, 1, 4, bytes(5), chunk(b'tRNS', b'\0\1\0\1')), 'tRNS'),
        (SIGNATURE + chunk(b'IDAT', zlib.compress(bytes(7))) + chunk(b'IEND', b''), 'header'),
    ],
)
def test_invalid_files(data, message):
    with pytest.raises(ValueError, match=message):
        read_png16(data)


def test_damaged_stream():
    header = chunk(b'IHDR', struct.pack('>IIBBBBB', 1, 1, 16, 2, 0, 0, 0))
    with pytest.raises(ValueError, match='damaged'):
        read_png16(SIGNATURE + header + chunk(b'IDAT', b'no zlib stream') + chunk(b'IEND', b''))


def test_surplus_data_is_not_decompressed():
    bomb = png(1, 1, 2, bytes(7) + bytes(2**24))
    np.testing.assert_array_equal(read_png16(bomb), np.zeros((1, 1, 3)))
