import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import ExifTags, Image, ImageFile

from data.image import Photo, bytes_to_read, read_photo, write_png
from error import UserError
from model import Model
from model.tiles.tiling import Tiler
from photo.demo import enlarge_folder
from photo.engine import check_fits, enlarged
from tests.conftest import ROOT, picture, slow
from tests.data.test_profile import cmyk_profile

RNG = np.random.default_rng(0)


@pytest.mark.parametrize('scale', [2, 3])
@pytest.mark.parametrize('dtype', [np.uint8, np.uint16])
def test_alpha_in_parts_is_alpha_as_a_whole(scale, dtype):
    peak = np.iinfo(dtype).max
    color = RNG.integers(0, peak, (70, 40, 3), endpoint=True).astype(dtype)
    alpha = RNG.integers(1, peak, (70, 40), endpoint=True).astype(dtype)
    model = Model('Bicubic', scale, tiler=Tiler(24, 8, 2))
    parts = list(enlarged(model, Photo(color, alpha, grey=False)))
    assert len(parts) > 3
    sr = np.concatenate(parts)
    plain = Model('Bicubic', scale).upscale(alpha[..., None].repeat(3, 2))
    assert np.array_equal(sr[..., 3], plain[..., 0])
    assert np.abs(sr[..., :3].astype(int) - Model('Bicubic', scale).upscale(color)).max() <= 1


def test_grey_stays_grey():
    grey = RNG.integers(0, 256, (9, 8, 1)).astype(np.uint8)
    (rows,) = enlarged(Model('Bicubic', 2), Photo(grey.repeat(3, 2), None, grey=True))
    assert rows.shape == (18, 16)


@pytest.mark.parametrize('dtype', [np.uint8, np.uint16])
def test_grey_with_alpha_stays_grey(tmp_path, dtype):
    """As enlarged by a network that makes colours of it; with its grey profile."""
    peak, icc = np.iinfo(dtype).max, bytes(16) + b'GRAY' + bytes(108)
    pixels = RNG.integers(0, peak, (9, 8, 2), endpoint=True).astype(dtype)
    write_png(tmp_path / 'photos' / 'a.png', pixels, icc)
    model = Model('EDSR-baseline', 2, n_feats=4, n_resblocks=1)
    enlarge_folder(model, tmp_path / 'photos', tmp_path / 'out')
    path = tmp_path / 'out' / 'a_x2_SR.png'
    photo = read_photo(path)
    assert photo.grey
    assert (photo.icc, photo.color.dtype) == (icc, dtype)
    assert path.read_bytes()[25] == 4  # PNG's colour type of grey and alpha
    bicubic = Model('Bicubic', 2).upscale(pixels[..., [1, 1, 1]])[..., 0]
    assert np.array_equal(photo.alpha, bicubic)


def test_what_a_png_file_says_of_its_colours_is_kept(tmp_path):
    chunks = {b'cICP': bytes((12, 13, 0, 1)), b'gAMA': (45455).to_bytes(4, 'big')}
    write_png(tmp_path / 'photos' / 'a.png', np.zeros((5, 6, 3), np.uint8), chunks=chunks)
    enlarge_folder(Model('Bicubic', 2), tmp_path / 'photos', tmp_path / 'out')
    assert read_photo(tmp_path / 'out' / 'a_x2_SR.png').chunks == chunks


def test_animations_move_and_pipes_are_told(tmp_path, messages):
    frames = [Image.new('RGB', (6, 5), colour) for colour in ('red', 'green', 'blue')]
    (tmp_path / 'photos').mkdir()
    frames[0].save(tmp_path / 'photos' / 'a.webp', save_all=True, append_images=frames[1:], lossless=True)
    os.mkfifo(tmp_path / 'photos' / 'b.png')
    (tmp_path / 'photos' / '.DS_Store').write_bytes(b'')
    enlarge_folder(Model('Bicubic', 2), tmp_path / 'photos', tmp_path / 'out')
    assert 'Left out, no image files of a known kind: b.png' in messages
    with Image.open(tmp_path / 'out' / 'a_x2_SR.png') as image:
        assert image.n_frames == 3
    assert [path.name for path in (tmp_path / 'out').iterdir()] == ['a_x2_SR.png']


def test_an_image_too_large_to_be_read_within_the_limit_is_named(tmp_path):
    write_png(tmp_path / 'a.png', np.zeros((50, 60, 3), np.uint8))
    check_fits(tmp_path / 'a.png', 10**12)
    with pytest.raises(UserError, match=r'a\.png: .* larger --max_memory'):
        check_fits(tmp_path / 'a.png', 10**6)


MEMORY = """
import sys
sys.path.insert(0, {source!r})
from system.allocator import tune_malloc
tune_malloc()
from system import memory
{setup}
before = memory.start_peak('cpu')
{work}
print(memory.peak('cpu') - before)
"""


def taken(setup: str, work: str) -> int:
    """Bytes that a piece of a program takes, in a process of its own."""
    program = MEMORY.format(source=str(ROOT / 'src'), setup=setup, work=work)
    done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def save(path: Path, pixels: np.ndarray, *, deep: bool = False, mode: str = 'RGB', turned: bool = False, **options):
    """Pixels (H, W, 4) as a file: with 16 bits, in a mode of Pillow, or stored on their side."""
    if deep and path.suffix == '.png':
        write_png(path, pixels.astype(np.uint16) * 257)
    elif deep:
        tifffile.imwrite(path, pixels.astype(np.uint16) * 257, photometric='rgb', **options)
    else:
        images = [Image.fromarray(np.roll(pixels, 99 * i, 0)) for i in range(3 if 'save_all' in options else 1)]
        images = [image.quantize(16) if mode == 'P' else image.convert(mode) for image in images]
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = 6 if turned else 1
        images[0].save(path, exif=exif, append_images=images[1:], **options)


FINE = {'progressive': True, 'subsampling': 0, 'quality': 50}
KINDS = {
    'grey.png': {'mode': 'L'},
    'rgb.jpg': {},
    'progressive.jpg': FINE,
    'turned.jpg': {'turned': True},
    'rgb.png': {'compress_level': 1},
    'cmyk.jpg': FINE | {'mode': 'CMYK'},
    'profile.jpg': {'mode': 'CMYK', 'icc_profile': cmyk_profile()},
    'turned.webp': {'turned': True, 'method': 0},
    'palette.png': {'mode': 'P'},
    'clear.png': {'mode': 'RGBA', 'compress_level': 1},
    'clear.webp': {'mode': 'RGBA', 'lossless': True, 'method': 0},
    'moving.gif': {'mode': 'P', 'save_all': True},
    'moving.png': {'mode': 'RGBA', 'save_all': True, 'compress_level': 1},
    'moving.webp': {'mode': 'RGBA', 'save_all': True, 'turned': True, 'method': 0},
    'deep.png': {'deep': True},
    'deep.tif': {'deep': True, 'extrasamples': ['unassalpha'], 'compression': 'zlib'},
    'multiplied.tif': {'deep': True, 'extrasamples': ['assocalpha']},
    'rgb.tif': {},
}


@pytest.mark.skipif(sys.platform != 'linux', reason='by the figures of Linux')
@pytest.mark.parametrize('name', ['grey.png', 'progressive.jpg', 'turned.jpg', *slow(*list(KINDS)[4:], 'rgb.jpg')])
def test_reading_takes_no_more_than_is_said(tmp_path, monkeypatch, name):
    """Once a file was looked at, as it is before it is enlarged."""
    monkeypatch.setattr(ImageFile, 'MAXBLOCK', 2**24)  # which Pillow needs to write noise
    path, noise = tmp_path / name, RNG.integers(0, 256, (1500, 2000, 4)).astype(np.uint8)
    save(path, noise, **KINDS[name])
    setup = (
        'from pathlib import Path; import scipy.ndimage; from data.frames import read_frames, read_series; '
        f'from data.image import fill_hidden; path = Path({str(path)!r}); read_series(path)'
    )
    work = """
for photo, _ in read_frames(path):
    if photo.alpha is not None:
        fill_hidden(photo.color, photo.alpha)
    del photo
"""
    used, said = taken(setup, work), bytes_to_read(path)
    assert read_photo(path).color.nbytes < used
    assert used < said + 2**23  # the file, and what libraries take once


@pytest.mark.skipif(sys.platform != 'linux', reason='by the figures of Linux')
def test_a_limit_of_memory_is_held(tmp_path):
    """The image at x4 has 92 MB, as floats 369, and in one piece the network would take much more."""
    write_png(tmp_path / 'photos' / 'a.png', RNG.integers(0, 256, (1200, 1600, 3)).astype(np.uint8))
    write_png(tmp_path / 'first' / 'a.png', picture(0, 9, 9))  # after which all that is imported has its memory
    options = (
        f'--model EDSR-baseline --cpu --n_feats 32 --n_resblocks 1 --scale 4 --test_only --data_test Demo '
        f'--save_dir {tmp_path}/runs --pre_train {tmp_path}/net.pt'
    )
    setup = (
        'import torch, main; from model import build; '
        f"torch.save(build('EDSR-baseline', 4, n_feats=32, n_resblocks=1).state_dict(), {str(tmp_path / 'net.pt')!r}); "
        f"main.main('{options} --dir_demo {tmp_path}/first'.split()); "
        'used = memory.in_use("cpu") >> 20'
    )
    for more in (360, 480):
        limited = f'{options} --dir_demo {tmp_path}/photos --save demo --max_memory'
        work = f"main.main([*'{limited}'.split(), f'{{used + {more}}}M'])"
        assert taken(setup, work) <= more * 2**20
        (tmp_path / 'runs' / 'demo' / 'results-Demo' / 'a_x4_SR.png').unlink()


def test_an_image_that_does_not_fit_is_named_and_no_other_is_lost(tmp_path, monkeypatch):
    for i in range(5):
        write_png(tmp_path / 'photos' / f'{i}.png', np.full((9, 20 if i == 1 else 8, 3), 9, np.uint8))
    model = Model('Bicubic', 2)
    plain = model.rows

    def rows(image, report):
        if image.shape[1] == 20:
            raise UserError('too large.')
        yield from plain(image, report)

    monkeypatch.setattr(model, 'rows', rows)
    with pytest.raises(UserError, match=r'^1 of 5 images could not be enlarged: \S*1\.png: too large\.$'):
        enlarge_folder(model, tmp_path / 'photos', tmp_path / 'out')
    assert sorted(path.name for path in (tmp_path / 'out').iterdir()) == [f'{i}_x2_SR.png' for i in (0, 2, 3, 4)]


def test_memory_that_was_freed_counts_as_room(tmp_path):
    """The allocator keeps it, unless asked."""
    write_png(tmp_path / 'a.png', np.zeros((50, 60, 3), np.uint8))
    setup = 'import torch; from pathlib import Path; from photo.engine import check_fits; used = memory.in_use("cpu")'
    work = (
        'blocks = [torch.ones(2**20) for _ in range(50)]; last = torch.ones(9); del blocks; '
        f'check_fits(Path({str(tmp_path / "a.png")!r}), used + 2**26)'
    )
    assert taken(setup, work) > 2**27
