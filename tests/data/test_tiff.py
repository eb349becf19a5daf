"""TIFF files of 16 bits a channel and of other forms that Pillow does not read."""

import subprocess
import sys

import numpy as np
import pytest
import tifffile
from PIL import Image

from data.image import read_photo, read_size
from error import UserError
from tests.conftest import ROOT

RNG = np.random.default_rng(0)
RGBA16 = RNG.integers(0, 65536, (5, 7, 4)).astype(np.uint16)


def check(photo, color: np.ndarray, alpha: np.ndarray | None = None):
    np.testing.assert_array_equal(photo.color, color)
    assert photo.color.dtype == color.dtype
    assert (photo.alpha is None) == (alpha is None)
    if alpha is not None:
        np.testing.assert_array_equal(photo.alpha, alpha)


@pytest.mark.parametrize('byteorder', ['<', '>'])
def test_planes(tmp_path, byteorder):
    path = tmp_path / 'x.tif'
    options = {'photometric': 'rgb', 'planarconfig': 'separate', 'byteorder': byteorder}
    tifffile.imwrite(path, np.moveaxis(RGBA16[..., :3], 2, 0), **options)
    check(read_photo(path), RGBA16[..., :3])
    tifffile.imwrite(path, np.moveaxis(RGBA16, 2, 0), extrasamples=['unassalpha'], **options)
    check(read_photo(path), RGBA16[..., :3], RGBA16[..., 3])
    assert read_size(path) == (5, 7)


@pytest.mark.parametrize('bigtiff', [False, True])
def test_grey_and_alpha(tmp_path, bigtiff):
    path = tmp_path / 'x.tif'
    options = {'photometric': 'minisblack', 'extrasamples': ['unassalpha'], 'planarconfig': 'contig'}
    tifffile.imwrite(path, RGBA16[..., :2], bigtiff=bigtiff, **options)
    photo = read_photo(path)
    check(photo, RGBA16[..., [0, 0, 0]], RGBA16[..., 1])
    assert photo.grey
    assert read_size(path) == (5, 7)


@pytest.mark.parametrize('compression', [None, 'zlib'])
@pytest.mark.parametrize('channels', [2, 4])
def test_alpha_of_8_bits_in_planes(tmp_path, compression, channels):
    """Pillow refuses it, takes another alpha, or leaves colours multiplied by it."""
    path, pixels = tmp_path / 'x.tif', (RGBA16[..., 4 - channels :] >> 8).astype(np.uint8)
    color, alpha = pixels[..., [0, 0, 0] if channels == 2 else [0, 1, 2]], pixels[..., -1]
    options = {'photometric': 'minisblack' if channels == 2 else 'rgb', 'planarconfig': 'separate'}
    options |= {'compression': compression}
    tifffile.imwrite(path, np.moveaxis(pixels, 2, 0), extrasamples=['unassalpha'], **options)
    check(read_photo(path), color, alpha)
    multiplied = np.round(pixels * (pixels[..., -1:] / 255)).astype(np.uint8)
    multiplied[..., -1] = alpha
    tifffile.imwrite(path, np.moveaxis(multiplied, 2, 0), extrasamples=['assocalpha'], **options)
    visible = alpha > 100
    assert np.abs(read_photo(path).color.astype(int) - color)[visible].max() <= 1
    np.testing.assert_array_equal(read_photo(path).alpha, alpha)


def test_alpha_is_not_always_the_first_of_the_other_channels(tmp_path):
    path, pixels = tmp_path / 'x.tif', RGBA16[..., [0, 1, 2, 0, 3]]
    extra = ['unspecified', 'unassalpha']
    tifffile.imwrite(path, pixels, photometric='rgb', extrasamples=extra, planarconfig='contig')
    check(read_photo(path), RGBA16[..., :3], RGBA16[..., 3])


def test_webp_in_tiff(tmp_path):
    path, pixels = tmp_path / 'x.tif', np.full((32, 48, 3), (200, 100, 50), np.uint8)
    tifffile.imwrite(path, pixels, photometric='rgb', compression='webp', compressionargs={'level': 100})
    assert np.abs(read_photo(path).color.astype(int) - pixels).max() <= 3


def test_white_is_zero(tmp_path):
    tifffile.imwrite(tmp_path / 'x.tif', RGBA16[..., 0], photometric='miniswhite')
    check(read_photo(tmp_path / 'x.tif'), 65535 - RGBA16[..., [0, 0, 0]])


def test_orientation_where_pillow_opens_nothing(tmp_path):
    turned = np.rot90(RGBA16[..., :2], -1)
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    options = {'photometric': 'minisblack', 'extrasamples': ['unassalpha'], 'planarconfig': 'contig'}
    for name, tag in (('tag', (274, 'H', 1, 6, True)), ('xmp', (700, 'B', len(xmp), xmp, True))):
        path = tmp_path / f'{name}.tif'
        tifffile.imwrite(path, RGBA16[..., :2], extratags=[tag], **options)
        assert read_size(path) == (7, 5)
        check(read_photo(path), turned[..., [0, 0, 0]], turned[..., 1])


@pytest.mark.parametrize(
    ('dtype', 'options', 'reason'),
    [
        (np.float32, {'photometric': 'minisblack'}, r'floats \(float32\)'),
        (np.float32, {'photometric': 'rgb'}, r'floats \(float32\)'),
        (np.float16, {'photometric': 'rgb'}, r'floats \(float16\)'),
        (np.uint32, {'photometric': 'rgb'}, '32 bits a channel'),
        (np.uint32, {'photometric': 'minisblack'}, '32 bits a channel'),
        (np.int32, {'photometric': 'minisblack'}, r'signed integers \(int32\)'),
        (np.int16, {'photometric': 'minisblack'}, r'signed integers \(int16\)'),
        (np.int8, {'photometric': 'minisblack'}, r'signed integers \(int8\)'),
        (np.uint16, {'photometric': 'separated'}, 'colours are SEPARATED'),
        (np.uint16, {'photometric': 'cielab'}, 'colours are CIELAB'),
    ],
)
def test_what_is_not_read_is_refused_with_its_reason(tmp_path, dtype, options, reason):
    path, kind = tmp_path / 'x.tif', options['photometric']
    image = {'minisblack': RGBA16[..., 0], 'separated': RGBA16}.get(kind, RGBA16[..., :3])
    tifffile.imwrite(path, image.astype(dtype), planarconfig=None if image.ndim == 2 else 'contig', **options)
    assert read_size(path) == (5, 7)
    with pytest.raises(UserError, match=rf'x\.tif cannot be read \(.*{reason}.*\): restore it, or save it again'):
        read_photo(path)


def test_lzw(tmp_path):
    """Written by libtiff, read by imagecodecs."""
    Image.fromarray(RGBA16[..., 0]).save(tmp_path / 'x.tif', compression='tiff_lzw')
    check(read_photo(tmp_path / 'x.tif'), RGBA16[..., [0, 0, 0]])


def test_lzw_without_imagecodecs_says_what_to_install(tmp_path):
    path = tmp_path / 'x.tif'
    Image.fromarray(RGBA16[..., 0]).save(path, compression='tiff_lzw')
    program = (
        "import sys; sys.modules['imagecodecs'] = None; sys.path.insert(0, 'src')\n"
        'from pathlib import Path; from data.image import read_photo, read_size; from error import UserError\n'
        f'path = Path({str(path)!r})\n'
        'print(read_size(path))\n'
        'try: read_photo(path)\n'
        'except UserError as error: print(error)'
    )
    done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, check=True, cwd=ROOT)
    size, message = done.stdout.splitlines()
    assert size == '(5, 7)'
    assert message.startswith(f'{path} is packed by LZW')
    assert 'pip install imagecodecs' in message
