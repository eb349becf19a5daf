"""What image files say of themselves: orientation wherever it is stored, how many images there are, colours."""

import os
import socket
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import ExifTags, Image

from checkpoint import start_screen
from data.image import bytes_to_read, find_images, read_photo, read_size, write_png
from data.source import reading
from error import UserError

RGB = np.random.default_rng(0).integers(0, 256, (5, 7, 3)).astype(np.uint8)
DEEP = RGB.astype(np.uint16) * 257
TURNED = np.rot90(RGB, -1)  # what orientation 6 asks for
XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


def exif(orientation: int = 6) -> bytes:
    block = Image.Exif()
    block[ExifTags.Base.Orientation] = orientation
    return block.tobytes()


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack('>I', len(body)) + name + body + struct.pack('>I', zlib.crc32(name + body))


EXIF_CHUNK = chunk(b'eXIf', exif().removeprefix(b'Exif\0\0'))
XMP_CHUNK = chunk(b'iTXt', b'XML:com.adobe.xmp\0\0\0\0\0' + XMP)


def with_chunks(path: Path, before: bytes = b'', after: bytes = b'') -> Path:
    """Put chunks into a PNG file, before and after its pixels."""
    content = path.read_bytes()
    path.write_bytes(content[:33] + before + content[33:-12] + after + content[-12:])
    return path


def logging_to(capsys):
    """Log as the program does, and give what tells what was logged since it was asked last."""
    start_screen()
    return lambda: capsys.readouterr().out


@pytest.mark.parametrize('image', [RGB, DEEP])
@pytest.mark.parametrize('extra', [EXIF_CHUNK, XMP_CHUNK])
@pytest.mark.parametrize('place', ['before', 'after'])
def test_orientation_in_png(tmp_path, image, extra, place):
    write_png(tmp_path / 'x.png', image)
    path = with_chunks(tmp_path / 'x.png', **{place: extra})
    assert read_size(path) == (7, 5)
    np.testing.assert_array_equal(read_photo(path).color, np.rot90(image, -1))


def test_orientation_in_exif_before_that_in_xmp(tmp_path):
    write_png(tmp_path / 'x.png', RGB)
    path = with_chunks(tmp_path / 'x.png', XMP_CHUNK, chunk(b'eXIf', exif(1).removeprefix(b'Exif\0\0')))
    assert read_size(path) == (5, 7)
    np.testing.assert_array_equal(read_photo(path).color, RGB)


@pytest.mark.parametrize('name', ['x.jpg', 'x.webp', 'x.tif', 'deflated.tif', 'deep.tif'])
def test_orientation_in_xmp_alone(tmp_path, name):
    path = tmp_path / name
    if name == 'deep.tif':
        tifffile.imwrite(path, DEEP, photometric='rgb', extratags=[(700, 'B', len(XMP), XMP, True)])
    elif path.suffix == '.tif':
        packing = 'tiff_adobe_deflate' if name == 'deflated.tif' else None
        Image.fromarray(RGB).save(path, compression=packing, tiffinfo={700: XMP})
    else:
        Image.fromarray(RGB).save(path, xmp=XMP, quality=95, lossless=True)
    assert read_size(path) == (7, 5)
    found = read_photo(path).color
    if path.suffix == '.jpg':
        with Image.open(path) as image:
            np.testing.assert_array_equal(found, np.rot90(np.asarray(image), -1))
    else:
        np.testing.assert_array_equal(found, np.rot90(DEEP if name == 'deep.tif' else RGB, -1))


@pytest.mark.parametrize('block', [b'II', b'no exif at all', b'MM\0*\0\0\0\xff'])
def test_damaged_exif_is_named_with_its_file_and_ignored(tmp_path, capsys, block):
    said = logging_to(capsys)
    for name in ('one.png', 'two.png'):
        write_png(tmp_path / name, RGB)
        path = with_chunks(tmp_path / name, chunk(b'eXIf', block))
        np.testing.assert_array_equal(read_photo(path).color, RGB)
        (line,) = said().splitlines()
        assert line.startswith(f'{path}: ')
        assert 'EXIF' in line
        read_photo(path)
        read_size(path)
        assert said() == ''  # it was said


def test_damaged_exif_in_jpeg_is_named_with_its_file(tmp_path, capsys):
    said = logging_to(capsys)
    for name in ('one.jpg', 'two.jpg'):
        path = tmp_path / name
        Image.fromarray(RGB).save(path, exif=b'Exif\0\0MM\0*\0\0\0\x08\0\x05')
        read_photo(path)
        lines = said().splitlines()
        assert lines
        assert all(line.startswith(f'{path}: ') for line in lines)


FRAMES = [Image.fromarray(RGB), Image.fromarray(255 - RGB), Image.fromarray(RGB // 2)]


@pytest.mark.parametrize('name', ['x.png', 'x.tif', 'x.webp', 'deep.tif'])
def test_further_frames_are_told(tmp_path, capsys, name):
    said = logging_to(capsys)
    path = tmp_path / name
    if name == 'deep.tif':
        tifffile.imwrite(path, np.stack([DEEP, DEEP // 2, DEEP // 3]), photometric='rgb')
    else:
        FRAMES[0].save(path, save_all=True, append_images=FRAMES[1:], lossless=True)
    photo = read_photo(path)
    np.testing.assert_array_equal(photo.color, DEEP if name == 'deep.tif' else RGB)
    assert said() == f'{path}: only the first of its 3 images is read\n'


@pytest.mark.parametrize('suffix', ['png', 'jpg', 'bmp', 'tif', 'webp'])
def test_one_frame_is_nothing_to_tell(tmp_path, capsys, suffix):
    said = logging_to(capsys)
    FRAMES[0].save(tmp_path / f'x.{suffix}')
    read_photo(tmp_path / f'x.{suffix}')
    assert said() == ''


def test_a_damaged_second_page_is_told(tmp_path, capsys):
    said = logging_to(capsys)
    path = tmp_path / 'x.tif'
    FRAMES[0].save(path, save_all=True, append_images=FRAMES[1:])
    with Image.open(path) as image:
        image.seek(1)
        second = image.tag_v2._offset
    content = bytearray(path.read_bytes())
    content[second : second + 400] = b'\xff' * len(content[second : second + 400])
    path.write_bytes(content)
    np.testing.assert_array_equal(read_photo(path).color, RGB)
    assert str(path) in said()


COLORS = {
    b'gAMA': struct.pack('>I', 45455),
    b'cHRM': struct.pack('>8I', 31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000),
    b'cICP': bytes((12, 13, 0, 1)),  # Display P3
}


@pytest.mark.parametrize('image', [RGB, RGB[..., 0], DEEP])
def test_statements_on_colours_are_kept(tmp_path, image):
    write_png(tmp_path / 'x.png', image)
    extra = b''.join(chunk(name, body) for name, body in COLORS.items())
    photo = read_photo(with_chunks(tmp_path / 'x.png', extra))
    write_png(tmp_path / 'y.png', image, photo.icc, photo.chunks)
    assert extra in (tmp_path / 'y.png').read_bytes()
    with Image.open(tmp_path / 'y.png') as written:
        assert written.info['gamma'] == 0.45455
        assert written.info['chromaticity'] == (0.3127, 0.329, 0.68, 0.32, 0.265, 0.69, 0.15, 0.06)


def test_statements_of_a_wrong_length_are_not_kept(tmp_path):
    write_png(tmp_path / 'x.png', RGB)
    assert not read_photo(with_chunks(tmp_path / 'x.png', chunk(b'cICP', b'abcde'))).chunks


def test_pipes_and_sockets_are_no_images(tmp_path, monkeypatch):
    write_png(tmp_path / 'a.png', RGB)
    os.mkfifo(tmp_path / 'b.png')
    (tmp_path / 'c.png').symlink_to('b.png')
    (tmp_path / 'd.png').symlink_to('/dev/zero')
    monkeypatch.chdir(tmp_path)  # the path of a socket must be short
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind('e.png')
        assert [path.name for path in find_images(tmp_path)] == ['a.png']


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack('>I', len(body)) + name + body + struct.pack('>I', zlib.crc32(name + body))


def png_of_rows(rows: int, height: int, width: int, kind: tuple[int, int], interlaced: bool, value: int) -> bytes:
    """A PNG file that declares (height, width) pixels of this depth and colour type, and holds so many bytes of them.

    `rows` counts rows as in an image that is not interlaced; all filters are none.
    """
    depth, color_type = kind
    row = b'\0' + bytes([value]) * -(-width * depth * {0: 1, 2: 3, 3: 1, 6: 4}[color_type] // 8)
    header = struct.pack('>IIBBBBB', width, height, depth, color_type, 0, 0, interlaced)
    palette = chunk(b'PLTE', bytes(range(1, 13))) if color_type == 3 else b''
    pixels = chunk(b'IDAT', zlib.compress(rows * row))
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + palette + pixels + chunk(b'IEND', b'')


@pytest.mark.parametrize('kind', [(8, 2), (8, 0), (8, 6), (1, 0), (2, 3)])
@pytest.mark.parametrize(('rows', 'interlaced'), [(10, False), (22, False), (9, True)])
def test_rows_that_a_png_lacks_are_not_black(tmp_path, kind, rows, interlaced):
    """Its data are a whole stream of too few rows, which Pillow takes for an image."""
    path, width = tmp_path / 'x.png', 1 if interlaced else 37
    path.write_bytes(png_of_rows(rows, 23, width, kind, interlaced, 0 if kind == (2, 3) else 85))
    with pytest.raises(UserError, match=r'x.png cannot be read \(the PNG file holds less image data than its header'):
        read_photo(path)


@pytest.mark.parametrize('kind', [(8, 2), (8, 0), (8, 6), (1, 0), (2, 3)])
@pytest.mark.parametrize('end', [0, 12])
def test_a_black_png_is_whole(tmp_path, kind, end):
    """Without its last chunk too."""
    path, data = tmp_path / 'x.png', png_of_rows(23, 23, 37, kind, False, 0)
    path.write_bytes(data[: len(data) - end])
    assert read_photo(path).color.shape == (23, 37, 3)


def test_an_interlaced_png_is_whole(tmp_path):
    path = tmp_path / 'x.png'  # of one column: of the passes 1, 3, 5 and 7 alone, each row of its own
    path.write_bytes(png_of_rows(23, 23, 1, (8, 2), True, 85))
    assert (read_photo(path).color == 85).all()


def test_a_reason_is_cut_short(tmp_path):
    """Decoders may put what they found in a damaged file into their errors."""
    with (
        pytest.raises(UserError, match=r'^\S+x.tif cannot be read \(tags 1 1 .* \.\.\.\): restore it') as caught,
        reading(tmp_path / 'x.tif'),
    ):
        raise ValueError('tags' + 5000 * ' 1')
    assert len(str(caught.value)) < len(str(tmp_path)) + 300


def test_an_image_with_too_many_pixels_is_refused_before_it_is_decoded(tmp_path):
    path = tmp_path / 'x.tif'
    tifffile.imwrite(path, DEEP, photometric='rgb')
    content = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as tif:
        for code in (256, 257):  # width and height
            at = tif.pages.first.tags[code].valueoffset
            content[at : at + 4] = struct.pack('<I', 20_000)
    path.write_bytes(content)
    for read in (read_photo, read_size, bytes_to_read):
        with pytest.raises(UserError, match='20000 x 20000 pixels, at most'):
            read(path)
