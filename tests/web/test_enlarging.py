"""Choices among weights, and single files enlarged with them."""

import re
import shutil
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

import main
from data.image import read_photo, write_png
from data.imresize import upscale_bicubic
from error import UserError
from system.files import read_torch
from tests.conftest import ROOT, picture
from web import enlarging
from web.enlarging import Choice, Result, enlarge, find_choices

WEIGHTS = ROOT / 'models' / 'LCoAN-small_x2.pt'
X2 = Choice('LCoAN', 2, WEIGHTS)
BICUBIC = [Choice('Bicubic', 2), Choice('Bicubic', 3), Choice('Bicubic', 4)]


def run(image: Path, choice: Choice, max_pixels: int = 1) -> Result:
    return enlarge(image, choice, image.parent / 'own', max_pixels, cpu=True)


def pixels(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image).astype(int)


@pytest.fixture
def photo(tmp_path) -> Path:
    write_png(tmp_path / 'photo.png', picture(1, 20, 30))
    return tmp_path / 'photo.png'


def test_choices_are_what_files_hold(tmp_path):
    shutil.copy(ROOT / 'models' / 'LCoAN-small_x4.pt', tmp_path / 'a.pt')
    save_file(read_torch(WEIGHTS), tmp_path / 'b.safetensors')
    (tmp_path / 'LCoAN_x3.pt').write_text('no weights')
    (tmp_path / 'README.md').write_text('no weights either')
    own = [Choice('LCoAN', 2, tmp_path / 'b.safetensors'), Choice('LCoAN', 4, tmp_path / 'a.pt')]
    assert find_choices(tmp_path) == own + BICUBIC
    assert [str(choice) for choice in own + BICUBIC[:1]] == [
        'LCoAN x2 (b.safetensors)',
        'LCoAN x4 (a.pt)',
        'Bicubic x2',
    ]


def test_choices_of_no_folder(tmp_path):
    with pytest.raises(UserError, match=r'--extend .*/none is not a folder'):
        find_choices(tmp_path / 'none')


def test_result_is_that_of_demo(tmp_path):
    colors = picture(2, 16, 700)  # two tiles
    alpha = np.full((16, 700), 40000, np.uint16)
    photos = {'plain': colors, 'grey': colors[..., 0], 'deep': np.dstack((colors * np.uint16(257), alpha))}
    for name, image in photos.items():
        write_png(tmp_path / 'photos' / f'{name}.png', image)
    options = ['--model', 'auto', '--pre_train', str(WEIGHTS), '--test_only', '--data_test', 'Demo', '--cpu']
    options += ['--dir_demo', str(tmp_path / 'photos'), '--save_dir', str(tmp_path), '--save', 'demo']
    assert main.main(options) == 0
    for name, image in photos.items():
        result = enlarge(tmp_path / 'photos' / f'{name}.png', X2, tmp_path / name, 1, cpu=True)
        assert result.image == tmp_path / name / f'{name}_x2.png'
        expected = tmp_path / 'demo' / 'results-Demo' / f'{name}_x2_SR.png'
        assert np.array_equal(pixels(result.image), pixels(expected))
        assert read_photo(result.image).color.dtype == image.dtype
        assert pixels(result.before).shape[:2] == pixels(result.after).shape[:2] == (32, 1400)


def test_grey_with_alpha_is_grey_before_and_after_and_further_frames_are_told(tmp_path):
    icc = bytes(16) + b'GRAY' + bytes(108)
    write_png(tmp_path / 'grey.png', picture(2, 16, 20)[..., :2], icc)
    result = run(tmp_path / 'grey.png', X2)
    for file in (result.before, result.after, result.image):
        with Image.open(file) as image:
            assert image.mode == 'LA'
            assert image.info['icc_profile'] == icc
    assert 'images in the file' not in result.about
    frames = [Image.new('RGB', (6, 5), colour) for colour in ('red', 'green')]
    frames[0].save(tmp_path / 'frames.png', save_all=True, append_images=frames[1:])
    assert run(tmp_path / 'frames.png', BICUBIC[0]).about.endswith('; only the first of 2 images in the file')


def test_before_and_after(photo):
    result = run(photo, BICUBIC[1])
    exact = upscale_bicubic(picture(1, 20, 30), 3)
    assert np.abs(pixels(result.image) - exact).mean() < 0.1  # MATLAB rounds between its two passes
    assert np.array_equal(pixels(result.after), pixels(result.image))
    inner = (slice(12, -12), slice(12, -12))  # at the border, Pillow follows another rule
    assert np.abs(pixels(result.before)[inner] - exact[inner]).max() <= 2
    size = round(result.image.stat().st_size / 1000)
    assert re.fullmatch(rf'30x20 to 90x60 pixels in \d+\.\d s by Bicubic x3, {size} kB', result.about)


def test_shown_at_a_size_that_a_browser_likes(photo, monkeypatch):
    monkeypatch.setattr(enlarging, 'SHOWN', 600)
    result = run(photo, BICUBIC[2])
    assert pixels(result.before).shape == pixels(result.after).shape == (20, 30, 3)
    assert pixels(result.image).shape == (80, 120, 3)
    assert np.abs(pixels(result.after) - picture(1, 20, 30)).mean() < 8


def test_16_bits_are_shown_with_8(tmp_path):
    deep = picture(3, 10, 10) * np.uint16(257)
    write_png(tmp_path / 'deep.png', deep)
    write_png(tmp_path / 'flat.png', picture(3, 10, 10))
    shown = [pixels(run(tmp_path / name, BICUBIC[0]).after) for name in ('deep.png', 'flat.png')]
    assert np.abs(shown[0] - shown[1]).max() <= 1


def refused(image: Path, choice: Choice = X2) -> str:
    with pytest.raises(UserError) as caught:
        run(image, choice)
    assert not (image.parent / 'own').exists()
    return str(caught.value)


def test_too_many_pixels(tmp_path):
    write_png(tmp_path / 'wide.png', np.zeros((1, 62500, 3), np.uint8))
    assert run(tmp_path / 'wide.png', BICUBIC[2]).image.exists()  # one million, which is allowed
    shutil.rmtree(tmp_path / 'own')
    write_png(tmp_path / 'wider.png', np.zeros((1, 70000, 3), np.uint8))
    said = refused(tmp_path / 'wider.png', BICUBIC[2])
    assert 'wider.png has 70000x1 pixels, which x4 makes 1.1 million; at most 1 million are allowed' in said


def test_header_of_a_bomb_is_enough(photo):
    content = photo.read_bytes()
    for side in (5000, 60000):
        header = content[12:16] + side.to_bytes(4, 'big') * 2 + content[24:29]
        photo.write_bytes(content[:12] + header + crc32(header).to_bytes(4, 'big') + content[33:])
        assert re.search(rf'photo.png .*({side}x{side}|{side**2}) pixels', refused(photo))


@pytest.mark.parametrize('name, content', [('text.png', b'no image'), ('empty.jpg', b''), ('cut.png', None)])
def test_bad_files(photo, name, content):
    bad = photo.with_name(name)
    bad.write_bytes(photo.read_bytes()[:-60] if content is None else content)
    assert name in refused(bad)
