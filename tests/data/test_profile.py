"""CMYK images, by a colour profile made up here, whose colours are worked out with the formulae of CIELAB."""

import struct
from itertools import product

import numpy as np
import pytest
from PIL import Image

from checkpoint import start_screen
from data.image import read_photo, read_rgb, write_png

# L, a, b of paper and of full cyan, magenta, yellow and black; any two inks together are black.
INKS = {(0, 0, 0, 0): (100, 0, 0), (1, 0, 0, 0): (60, -20, -25), (0, 1, 0, 0): (50, 40, 0), (0, 0, 1, 0): (85, 0, 50),
        (0, 0, 0, 1): (15, 0, 0)}  # fmt: skip
XYZ_TO_SRGB = np.linalg.inv(  # linear, from the white point D50: the colour matrix of the sRGB profile
    [[0.4360747, 0.3850649, 0.1430804], [0.2225045, 0.7168786, 0.0606169], [0.0139322, 0.0971045, 0.7141733]]
)


def cmyk_profile() -> bytes:
    """An output profile of version 2 (ICC.1:2001-04) with a table of 2 x 2 x 2 x 2 colours, of type lut16."""
    table = b''
    for inks in product((0, 1), repeat=4):
        light, a, b = INKS.get(inks, (0, 0, 0))
        table += struct.pack('>3H', round(light / 100 * 0xFF00), (a + 128) * 256, (b + 128) * 256)
    ramp = struct.pack('>2H', 0, 0xFFFF)
    identity = struct.pack('>9i', *(np.eye(3, dtype=int).ravel() * 65536).tolist())
    lut = b'mft2\0\0\0\0' + bytes((4, 3, 2, 0)) + identity + struct.pack('>2H', 2, 2) + ramp * 4 + table + ramp * 3
    white = b'XYZ \0\0\0\0' + struct.pack('>3i', 0xF6D6, 0x10000, 0xD32D)
    text = b'desc\0\0\0\0' + struct.pack('>I', 5) + b'made\0' + bytes(78)
    tags = {b'desc': text, b'cprt': b'text\0\0\0\0none\0', b'wtpt': white, b'A2B0': lut}
    start, entries, body = 128 + 4 + 12 * len(tags), b'', b''
    for name, content in tags.items():
        content += bytes(-len(content) % 4)
        entries += name + struct.pack('>2I', start + len(body), len(content))
        body += content
    header = struct.pack('>I4sI4s4s4s', start + len(body), b'none', 0x02400000, b'prtr', b'CMYK', b'Lab ')
    header += bytes(12) + b'acsp' + bytes(28) + struct.pack('>3i', 0xF6D6, 0x10000, 0xD32D) + bytes(48)
    return header + struct.pack('>I', len(tags)) + entries + body


def srgb(light: float, a: float, b: float) -> np.ndarray:
    """CIELAB with the white point D50 as sRGB in [0, 255] (IEC 61966-2-1)."""
    fy = (light + 16) / 116
    f = np.array([fy + a / 500, fy, fy - b / 200])
    xyz = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * (0.9642, 1, 0.8249)
    linear = np.clip(XYZ_TO_SRGB @ xyz, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize('suffix', ['tif', 'jpg'])
@pytest.mark.parametrize('inks', INKS)
def test_cmyk_is_converted_by_its_profile(tmp_path, suffix, inks):
    path = tmp_path / f'x.{suffix}'
    image = Image.new('CMYK', (16, 8), tuple(255 * ink for ink in inks))
    image.save(path, icc_profile=cmyk_profile(), quality=100)
    photo = read_photo(path)
    assert np.abs(photo.color - srgb(*INKS[inks])).max() <= 3
    assert (photo.alpha, photo.grey, photo.icc) == (None, False, None)  # sRGB, as is what has no profile
    np.testing.assert_array_equal(read_rgb(path), photo.color)


def test_cmyk_with_a_damaged_profile_is_told(tmp_path, capsys):
    start_screen()
    Image.new('CMYK', (16, 8), (255, 0, 0, 0)).save(tmp_path / 'x.tif', icc_profile=cmyk_profile()[:200])
    np.testing.assert_array_equal(read_photo(tmp_path / 'x.tif').color[0, 0], (0, 255, 255))
    assert f'{tmp_path}/x.tif: its colour profile cannot be used' in capsys.readouterr().out


def test_a_grey_profile_is_kept_with_grey_and_alpha(tmp_path):
    icc = bytes(16) + b'GRAY' + bytes(108)
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 2)).astype(np.uint8)
    write_png(tmp_path / 'x.png', pixels, icc)
    assert b'iCCP' in (tmp_path / 'x.png').read_bytes()
    with Image.open(tmp_path / 'x.png') as image:
        assert image.mode == 'LA'
        assert image.info['icc_profile'] == icc
        np.testing.assert_array_equal(np.asarray(image), pixels)
