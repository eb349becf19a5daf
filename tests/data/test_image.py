"""Image files of every kind, made with Pillow and tifffile, and the ways in which they can be broken."""

import errno
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import ExifTags, Image, ImageCms
from PIL.ImageFile import ImageFile

import data.formats
from data.image import bytes_to_read, fill_hidden, find_images, read_photo, read_rgb, read_size, write_png
from data.png import encode_png
from error import UserError, WriteError

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (5, 7, 3)).astype(np.uint8)
RGBA = RNG.integers(0, 256, (5, 7, 4)).astype(np.uint8)
RGBA16 = RNG.integers(0, 65536, (5, 7, 4)).astype(np.uint16)

UPRIGHT = {
    1: lambda image: image,
    2: np.fliplr,
    3: lambda image: np.rot90(image, 2),
    4: np.flipud,
    5: lambda image: np.swapaxes(image, 0, 1),
    6: lambda image: np.rot90(image, -1),
    7: lambda image: np.rot90(np.swapaxes(image, 0, 1), 2),
    8: lambda image: np.rot90(image, 1),
}


def saved(path: Path, image, **options) -> Path:
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path, **options)
    return path


def exif(orientation: int) -> Image.Exif:
    block = Image.Exif()
    block[ExifTags.Base.Orientation] = orientation
    return block


def png_with(data: bytes, name: bytes, body: bytes) -> bytes:
    """The PNG file `data` with one more chunk after IHDR."""
    extra = struct.pack('>I', len(body)) + name + body + struct.pack('>I', zlib.crc32(name + body))
    return data[:33] + extra + data[33:]


def test_find_images(tmp_path):
    for name in ('b.png', 'a.JPG', 'c.TiFf', 'd.webp', '.hidden.png', 'notes.txt', 'png'):
        (tmp_path / name).touch()
    (tmp_path / 'folder.png').mkdir()
    assert [path.name for path in find_images(tmp_path)] == ['a.JPG', 'b.png', 'c.TiFf', 'd.webp']


def test_find_images_without_folder(tmp_path):
    with pytest.raises(UserError, match='nowhere'):
        find_images(tmp_path / 'nowhere')


@pytest.mark.parametrize('suffix', ['png', 'bmp', 'tif', 'tiff'])
@pytest.mark.parametrize('shape', [(1, 1), (1, 9), (9, 1), (5, 7)])
def test_rgb_and_grey(tmp_path, suffix, shape):
    image = RNG.integers(0, 256, (*shape, 3)).astype(np.uint8)
    photo = read_photo(saved(tmp_path / f'x.{suffix}', image))
    np.testing.assert_array_equal(photo.color, image)
    assert (photo.alpha, photo.grey, photo.color.dtype) == (None, False, np.uint8)
    photo = read_photo(saved(tmp_path / f'x.{suffix}', image[..., 0]))
    np.testing.assert_array_equal(photo.color, image[..., [0, 0, 0]])
    assert (photo.alpha, photo.grey, photo.color.dtype) == (None, True, np.uint8)


@pytest.mark.parametrize('suffix', ['png', 'tif', 'webp'])
def test_rgba(tmp_path, suffix):
    photo = read_photo(saved(tmp_path / f'x.{suffix}', RGBA, lossless=True, exact=True))
    np.testing.assert_array_equal(photo.color, RGBA[..., :3])
    np.testing.assert_array_equal(photo.alpha, RGBA[..., 3])
    assert not photo.grey


@pytest.mark.parametrize('suffix', ['png', 'tif'])
def test_grey_and_alpha(tmp_path, suffix):
    photo = read_photo(saved(tmp_path / f'x.{suffix}', RGBA[..., :2].copy()))
    np.testing.assert_array_equal(photo.color, RGBA[..., [0, 0, 0]])
    np.testing.assert_array_equal(photo.alpha, RGBA[..., 1])
    assert photo.grey


@pytest.mark.parametrize('suffix', ['png', 'bmp', 'tif'])
def test_one_bit(tmp_path, suffix):
    bits = RGB[..., 0] > 127
    photo = read_photo(saved(tmp_path / f'x.{suffix}', Image.fromarray(bits)))
    np.testing.assert_array_equal(photo.color, np.where(bits[..., None], 255, 0).repeat(3, axis=2))
    assert photo.grey
    assert photo.color.dtype == np.uint8


@pytest.mark.parametrize('transparency', [None, 2, bytes([0, 50, 100])])
def test_palette(tmp_path, transparency):
    colors = np.array([(10, 20, 30), (40, 50, 60), (70, 80, 90), (1, 2, 3)], np.uint8)
    indices = RNG.integers(0, 4, (5, 7)).astype(np.uint8)
    image = Image.fromarray(indices)
    image.putpalette(colors.tobytes())
    path = saved(tmp_path / 'x.png', image, **({} if transparency is None else {'transparency': transparency}))
    photo = read_photo(path)
    np.testing.assert_array_equal(photo.color, colors[indices])
    np.testing.assert_array_equal(read_rgb(path), colors[indices])
    assert not photo.grey
    if transparency is None:
        assert photo.alpha is None
    else:
        alphas = (255, 255, 0, 255) if transparency == 2 else (0, 50, 100, 255)
        np.testing.assert_array_equal(photo.alpha, np.array(alphas)[indices])


def test_transparent_colour(tmp_path):
    photo = read_photo(saved(tmp_path / 'x.png', RGB, transparency=tuple(int(v) for v in RGB[2, 3])))
    np.testing.assert_array_equal(photo.color, RGB)
    np.testing.assert_array_equal(photo.alpha, np.where(np.equal(RGB, RGB[2, 3]).all(axis=2), 0, 255))


@pytest.mark.parametrize('bits', [1, 2, 4, 8])
def test_transparent_grey(tmp_path, bits):
    """A grey PNG of two pixels, 0 and 1, whose tRNS chunk makes 1 transparent."""
    row = np.packbits(np.array([0] * (2 * bits - 1) + [1], np.uint8)[: 2 * bits])
    header = struct.pack('>IIBBBBB', 2, 1, bits, 0, 0, 0, 0)
    path = tmp_path / 'x.png'
    data = b'\x89PNG\r\n\x1a\n'
    for name, body in ((b'IHDR', header), (b'tRNS', b'\0\1'), (b'IDAT', zlib.compress(b'\0' + row.tobytes()))):
        data += struct.pack('>I', len(body)) + name + body + struct.pack('>I', zlib.crc32(name + body))
    path.write_bytes(data + b'\0\0\0\0IEND\xaeB`\x82')
    photo = read_photo(path)
    np.testing.assert_array_equal(photo.color[..., 0], [[0, 255 // (2**bits - 1)]])
    np.testing.assert_array_equal(photo.alpha, [[255, 0]])
    assert photo.grey


@pytest.mark.parametrize(('suffix', 'options'), [('jpg', {'quality': 95}), ('webp', {'quality': 90})])
def test_lossy(tmp_path, suffix, options):
    rows, columns = np.mgrid[:40, :60]
    image = np.stack((rows * 4, columns * 3, rows + columns), axis=2).astype(np.uint8)
    path = saved(tmp_path / f'x.{suffix}', image, **options)
    np.testing.assert_array_equal(read_rgb(path), np.asarray(Image.open(path)))
    assert np.abs(read_rgb(path).astype(int) - image).mean() < 4


def test_grey_jpeg(tmp_path):
    path = saved(tmp_path / 'x.jpeg', RGB[..., 0])
    photo = read_photo(path)
    np.testing.assert_array_equal(photo.color[..., 1], np.asarray(Image.open(path)))
    assert photo.grey


def test_cmyk_jpeg(tmp_path):
    path = saved(tmp_path / 'x.jpg', Image.new('CMYK', (8, 8), (0, 255, 255, 0)), quality=100)
    photo = read_photo(path)
    assert np.abs(photo.color.astype(int) - (255, 0, 0)).max() <= 3
    assert (photo.alpha, photo.grey) == (None, False)


def test_suffix_does_not_decide(tmp_path):
    saved(tmp_path / 'x.png', RGB).rename(tmp_path / 'x.jpg')
    np.testing.assert_array_equal(read_rgb(tmp_path / 'x.jpg'), RGB)


@pytest.mark.parametrize('suffix', ['png', 'tif', 'webp'])
def test_first_frame(tmp_path, suffix):
    more = [Image.fromarray(255 - RGB)]
    path = saved(tmp_path / f'x.{suffix}', RGB, save_all=True, append_images=more, lossless=True)
    np.testing.assert_array_equal(read_rgb(path), RGB)


@pytest.mark.parametrize('channels', [None, 1, 2, 3, 4])
def test_png16(tmp_path, channels):
    image = RGBA16[..., 0] if channels is None else RGBA16[..., :channels]
    (tmp_path / 'x.png').write_bytes(b''.join(encode_png([image], len(image))))
    check_16bit(read_photo(tmp_path / 'x.png'), channels or 1)


@pytest.mark.parametrize('channels', [1, 3, 4])
@pytest.mark.parametrize('compression', [None, 'zlib'])
@pytest.mark.parametrize('byteorder', ['<', '>'])
def test_tif16(tmp_path, channels, compression, byteorder):
    image = RGBA16[..., 0] if channels == 1 else RGBA16[..., :channels]
    kind = 'minisblack' if channels == 1 else 'rgb'
    extra = ['unassalpha'] if channels == 4 else None
    options = {'photometric': kind, 'extrasamples': extra, 'compression': compression, 'byteorder': byteorder}
    tifffile.imwrite(tmp_path / 'x.tif', image, **options)
    check_16bit(read_photo(tmp_path / 'x.tif'), channels)


def check_16bit(photo, channels):
    color = RGBA16[..., [0, 0, 0]] if channels < 3 else RGBA16[..., :3]
    np.testing.assert_array_equal(photo.color, color)
    assert photo.color.dtype == np.uint16
    assert photo.grey is (channels < 3)
    if channels in (2, 4):
        np.testing.assert_array_equal(photo.alpha, RGBA16[..., channels - 1])
        assert photo.alpha.dtype == np.uint16
    else:
        assert photo.alpha is None


def test_tif16_first_page_and_single_pixel(tmp_path):
    tifffile.imwrite(tmp_path / 'x.tif', RGBA16[:2, ..., 0], photometric='minisblack')
    tifffile.imwrite(tmp_path / 'pages.tif', np.stack((RGBA16[..., 0], RGBA16[..., 1])), photometric='minisblack')
    tifffile.imwrite(tmp_path / 'one.tif', RGBA16[:1, :1, :3], photometric='rgb')
    np.testing.assert_array_equal(read_photo(tmp_path / 'pages.tif').color[..., 0], RGBA16[..., 0])
    np.testing.assert_array_equal(read_photo(tmp_path / 'one.tif').color, RGBA16[:1, :1, :3])


def test_tif16_multiplied_by_alpha(tmp_path):
    color, alpha = np.array([[[60000, 30000, 500], [9, 9, 9]]]), np.array([[[32768], [0]]])
    stored = np.concatenate((np.round(color * alpha / 65535), alpha), axis=2).astype(np.uint16)
    tifffile.imwrite(tmp_path / 'x.tif', stored, photometric='rgb', extrasamples=['assocalpha'])
    photo = read_photo(tmp_path / 'x.tif')
    assert np.abs(photo.color[0, 0].astype(int) - color[0, 0]).max() <= 1
    np.testing.assert_array_equal(photo.alpha, alpha[..., 0])


@pytest.mark.parametrize('orientation', range(1, 9))
def test_orientation(tmp_path, orientation):
    for name, image in (('x.png', RGB), ('grey.png', RGB[..., 0]), ('x.tif', RGB)):
        read = read_rgb(saved(tmp_path / name, image, exif=exif(orientation)))
        expected = RGB if image is RGB else RGB[..., [0, 0, 0]]
        np.testing.assert_array_equal(read, UPRIGHT[orientation](expected))
        assert read.flags.c_contiguous
    for name in ('x.png', 'x.webp', 'x.tif'):
        photo = read_photo(saved(tmp_path / name, RGBA, exif=exif(orientation), lossless=True, exact=True))
        np.testing.assert_array_equal(photo.color, UPRIGHT[orientation](RGBA[..., :3]))
        np.testing.assert_array_equal(photo.alpha, UPRIGHT[orientation](RGBA[..., 3]))
    stored = np.asarray(Image.open(saved(tmp_path / 'plain.jpg', RGB)))
    path = saved(tmp_path / 'x.jpg', RGB, exif=exif(orientation))
    np.testing.assert_array_equal(read_rgb(path), UPRIGHT[orientation](stored))
    path = saved(tmp_path / 'deflated.tif', RGB, exif=exif(orientation), compression='tiff_adobe_deflate')
    np.testing.assert_array_equal(read_rgb(path), UPRIGHT[orientation](RGB))


@pytest.mark.parametrize('orientation', range(1, 9))
def test_orientation_16bit(tmp_path, orientation):
    block = exif(orientation).tobytes().removeprefix(b'Exif\0\0')
    (tmp_path / 'x.png').write_bytes(png_with(b''.join(encode_png([RGBA16], len(RGBA16))), b'eXIf', block))
    tag = (ExifTags.Base.Orientation, 'H', 1, orientation, True)
    tifffile.imwrite(tmp_path / 'x.tif', RGBA16, photometric='rgb', extrasamples=['unassalpha'], extratags=[tag])
    for name in ('x.png', 'x.tif'):
        photo = read_photo(tmp_path / name)
        np.testing.assert_array_equal(photo.color, UPRIGHT[orientation](RGBA16[..., :3]))
        np.testing.assert_array_equal(photo.alpha, UPRIGHT[orientation](RGBA16[..., 3]))


def test_orientation_stored_after_the_pixels(tmp_path):
    block = exif(6).tobytes().removeprefix(b'Exif\0\0')
    chunk = struct.pack('>I', len(block)) + b'eXIf' + block + struct.pack('>I', zlib.crc32(b'eXIf' + block))
    for image in (RGBA, RGBA16):
        write_png(tmp_path / 'x.png', image)
        data = (tmp_path / 'x.png').read_bytes()
        (tmp_path / 'x.png').write_bytes(data[:-12] + chunk + data[-12:])
        np.testing.assert_array_equal(read_photo(tmp_path / 'x.png').alpha, np.rot90(image[..., 3], -1))


@pytest.mark.parametrize('orientation', [None, *range(1, 9)])
def test_read_size(tmp_path, orientation):
    """Five rows of seven pixels, or seven of five where the orientation (5 to 8) swaps them."""
    options = {} if orientation is None else {'exif': exif(orientation)}
    deflated = {'compression': 'tiff_adobe_deflate'}
    paths = [saved(tmp_path / f'x.{suffix}', RGB, **options) for suffix in ('png', 'jpg', 'tif', 'webp')]
    paths += [saved(tmp_path / 'x.tiff', RGB, **options, **deflated), tmp_path / '16.png', tmp_path / '16.tif']
    data = b''.join(encode_png([RGBA16], len(RGBA16)))
    if orientation is not None:
        data = png_with(data, b'eXIf', options['exif'].tobytes().removeprefix(b'Exif\0\0'))
    paths[-2].write_bytes(data)
    tag = (ExifTags.Base.Orientation, 'H', 1, orientation or 1, True)
    tifffile.imwrite(paths[-1], RGBA16[..., :3], photometric='rgb', extratags=[tag])
    for path in paths:
        assert read_size(path) == ((7, 5) if orientation in (5, 6, 7, 8) else (5, 7)), path
    assert read_size(saved(tmp_path / 'x.bmp', RGB)) == (5, 7)


def test_read_size_needs_the_header_alone(tmp_path, monkeypatch):
    path = saved(tmp_path / 'x.png', RNG.integers(0, 256, (40, 50, 3)).astype(np.uint8))
    path.write_bytes(path.read_bytes()[:100])
    monkeypatch.setattr(ImageFile, 'load', lambda *_: pytest.fail('the pixels were decoded'))
    assert read_size(path) == (40, 50)


def test_read_size_of_no_image(tmp_path):
    (tmp_path / 'x.png').write_text('text')
    for name in ('x.png', 'missing.png'):
        with pytest.raises(UserError, match=name):
            read_size(tmp_path / name)


def test_read_rgb_rounds_16_bits(tmp_path):
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    write_png(tmp_path / 'x.png', values)
    expected = np.round(values / 257).astype(np.uint8)[..., None].repeat(3, axis=2)
    np.testing.assert_array_equal(read_rgb(tmp_path / 'x.png'), expected)


@pytest.mark.parametrize('image', [RGB, RGB[..., 0], RGBA, RGBA16[..., :3], RGBA16[..., 0], RGBA16])
def test_read_rgb_layout(tmp_path, image):
    write_png(tmp_path / 'x.png', image)
    read = read_rgb(tmp_path / 'x.png')
    assert (read.dtype, read.shape) == (np.uint8, (5, 7, 3))
    assert read.flags.c_contiguous
    assert read.flags.writeable


def refused(path: Path):
    for read in (read_photo, read_rgb):
        with pytest.raises(UserError) as caught:
            read(path)
        assert str(path) in str(caught.value)
        assert '\n' not in str(caught.value)


@pytest.mark.parametrize('name', ['x.png', 'x.jpg', 'x.bmp', 'x.tif', 'x.webp', 'x16.png', 'x16.tif', 'deflated16.tif'])
@pytest.mark.parametrize('kept', [0.05, 0.3, 0.6, 0.9])
def test_truncated(tmp_path, name, kept):
    path = tmp_path / name
    image = RNG.integers(0, 65536, (40, 50, 3)).astype(np.uint16)
    if path.suffix == '.tif' and '16' in name:
        tifffile.imwrite(path, image, photometric='rgb', compression='zlib' if 'deflated' in name else None)
    else:
        saved(path, (image >> 8).astype(np.uint8)) if '16' not in name else write_png(path, image)
    read_photo(path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    refused(path)


def test_truncated_between_the_rows_of_a_tile(tmp_path):
    path = tmp_path / 'x.tif'
    image = RNG.integers(0, 65536, (24, 20, 3)).astype(np.uint16)
    tifffile.imwrite(path, image, photometric='rgb', tile=(16, 16))
    np.testing.assert_array_equal(read_photo(path).color, image)
    path.write_bytes(path.read_bytes()[: -14 * 16 * 6])
    refused(path)


@pytest.mark.parametrize('suffix', ['png', 'jpg', 'bmp', 'tif', 'webp'])
@pytest.mark.parametrize('content', [b'', b'\0', b'this is a text, not an image\n' * 9, bytes(1000)])
def test_not_an_image(tmp_path, suffix, content):
    path = tmp_path / f'x.{suffix}'
    path.write_bytes(content)
    refused(path)


@pytest.mark.parametrize('image', [RGB, RGBA16])
def test_damaged_png(tmp_path, image):
    path = tmp_path / 'x.png'
    write_png(path, image)
    data = bytearray(path.read_bytes())
    data[50] ^= 1
    path.write_bytes(data)
    refused(path)


def test_missing_file_and_folder(tmp_path):
    refused(tmp_path / 'missing.png')
    (tmp_path / 'folder.png').mkdir()
    refused(tmp_path / 'folder.png')


@pytest.mark.filterwarnings('ignore::PIL.Image.DecompressionBombWarning')
def test_bomb(tmp_path, monkeypatch):
    path = saved(tmp_path / 'x.png', np.zeros((30, 11), np.uint8))
    read_photo(path)
    monkeypatch.setattr(data.formats, 'MAX_PIXELS', 300)
    refused(path)


def test_large_photographs_are_allowed():
    assert data.formats.MAX_PIXELS > 200_000_000


@pytest.mark.filterwarnings('error::PIL.Image.DecompressionBombWarning')
@pytest.mark.parametrize('suffix', ['png', 'jpg', 'bmp', 'tif', 'webp'])
def test_the_limit_of_pillow_is_left_to_others(tmp_path, monkeypatch, suffix):
    """Who sets it for images of their own can still read theirs with it, and ours are read whatever it is."""
    path = saved(tmp_path / f'x.{suffix}', np.full((30, 31, 3), 77, np.uint8))
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 300)
    assert read_photo(path).color.shape == (30, 31, 3)
    assert read_size(path) == (30, 31)
    assert bytes_to_read(path) > 0
    assert Image.MAX_IMAGE_PIXELS == 300
    with pytest.raises(Image.DecompressionBombError):
        Image.open(path)


@pytest.mark.parametrize('image', [RGB, RGB[..., 0], RGBA, RGB[::-1, ::2], np.zeros((1, 1), np.uint8)])
def test_write_png(tmp_path, image):
    write_png(tmp_path / 'x.png', image)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / 'x.png')), image)
    assert [path.name for path in tmp_path.iterdir()] == ['x.png']


@pytest.mark.parametrize('image', [RGBA16[..., 0], RGBA16[..., :3], RGBA16])
def test_write_png_16bit(tmp_path, image):
    write_png(tmp_path / 'x.png', image)
    photo = read_photo(tmp_path / 'x.png')
    np.testing.assert_array_equal(photo.color, image[..., :3] if image.ndim == 3 else image[..., None].repeat(3, 2))
    assert (photo.alpha is not None) == (image.shape[2:] == (4,))


def test_write_png_gives_ordinary_permissions(tmp_path):
    write_png(tmp_path / 'x.png', RGB)
    (tmp_path / 'y').touch()
    assert (tmp_path / 'x.png').stat().st_mode == (tmp_path / 'y').stat().st_mode


@pytest.mark.parametrize('shape', [(4,), (4, 4, 5), (4, 4, 3, 1)])
@pytest.mark.parametrize('dtype', [np.uint8, np.uint16])
def test_write_png_refuses_other_shapes(tmp_path, shape, dtype):
    with pytest.raises(ValueError, match='a PNG takes'):
        write_png(tmp_path / 'x.png', np.zeros(shape, dtype))


def test_write_png_refuses_floats(tmp_path):
    with pytest.raises(ValueError, match='a PNG takes'):
        write_png(tmp_path / 'x.png', np.zeros((4, 4)))


def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    def fail(_):
        raise OSError(errno.ENOSPC, 'No space left on device')

    path = tmp_path / 'x.png'
    write_png(path, RGB)
    monkeypatch.setattr(os, 'fsync', fail)
    with pytest.raises(WriteError, match=r'x\.png.*No space left'):
        write_png(path, 255 - RGB)
    np.testing.assert_array_equal(read_rgb(path), RGB)
    assert list(tmp_path.iterdir()) == [path]


def test_fill_hidden_takes_the_nearest_visible_colour():
    alpha = np.where(RNG.random((9, 11)) < 0.3, 200, 0).astype(np.uint8)
    color = RNG.integers(0, 256, (9, 11, 3)).astype(np.uint8)
    filled = fill_hidden(color, alpha)
    visible = np.argwhere(alpha > 0)
    for r in range(9):
        for c in range(11):
            distances = ((visible - (r, c)) ** 2).sum(axis=1)
            nearest = visible[distances == distances.min()]
            assert any((filled[r, c] == color[i, j]).all() for i, j in nearest)
    np.testing.assert_array_equal(filled[alpha > 0], color[alpha > 0])
    assert filled.dtype == color.dtype


@pytest.mark.parametrize('value', [0, 1, 255])
def test_fill_hidden_without_contrast(value):
    assert fill_hidden(RGB, np.full((5, 7), value, np.uint8)) is RGB


def test_dangling_link_is_found_and_named(tmp_path):
    (tmp_path / 'gone.png').symlink_to(tmp_path / 'nowhere.png')
    (path,) = find_images(tmp_path)
    with pytest.raises(UserError, match=r'gone\.png does not exist'):
        read_rgb(path)


def profile(space: bytes, size: int = 200) -> bytes:
    """Bytes with the header fields of an ICC profile that matter here."""
    return bytes(16) + space + bytes(range(size))


@pytest.mark.parametrize('dtype', [np.uint8, np.uint16])
def test_colour_profile_is_kept(tmp_path, dtype):
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes()
    write_png(tmp_path / 'a.png', np.full((3, 4, 3), 7, dtype), icc)
    assert read_photo(tmp_path / 'a.png').icc == icc
    assert (read_photo(tmp_path / 'a.png').color == 7).all()
    with Image.open(tmp_path / 'a.png') as image:
        image.load()
        assert image.info['icc_profile'] == icc
    Image.new('RGB', (4, 4)).save(tmp_path / 'b.jpg', icc_profile=icc)
    assert read_photo(tmp_path / 'b.jpg').icc == icc


@pytest.mark.parametrize('shape, space', [((3, 4), b'RGB '), ((3, 4, 3), b'GRAY'), ((3, 4, 4), b'CMYK')])
def test_profile_of_another_colour_space_is_left_out(tmp_path, shape, space):
    write_png(tmp_path / 'a.png', np.zeros(shape, np.uint8), profile(space))
    assert b'iCCP' not in (tmp_path / 'a.png').read_bytes()
