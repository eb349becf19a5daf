"""Single files enlarged with weights: pixels, formats, limits, progress, an end before the end."""

import re
import shutil
from io import BytesIO
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
from PIL import Image, ImageCms

import main
from data.image import read_photo, write_png
from data.imresize import resize, upscale_bicubic
from error import UserError
from model.tiles.tiling import Report, unreported
from photo.choice import BICUBIC as EVERY
from photo.choice import Weights
from tests.conftest import ROOT, picture
from web.enlarging import Result, Stopped, enlarge

X2 = Weights('LCoAN', 2, ROOT / 'models' / 'LCoAN-small_x2.pt')
BICUBIC = {weights.scale: weights for weights in EVERY}


class Told:
    """What is told of the progress."""

    def __init__(self) -> None:
        self.tiles: list[tuple[int, int]] = []

    def __call__(self, done: int, total: int) -> None:
        self.tiles.append((done, total))


def run(
    image: Path,
    weights: Weights,
    format: str = 'PNG',
    progress: Report = unreported,
    stop=lambda: False,
    scale: int | None = None,
) -> Result:
    scale = scale or weights.scale
    return enlarge(image, weights, scale, image.parent / 'own', format, progress, stop, max_pixels=1, cpu=True)


def pixels(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image).astype(int)


@pytest.fixture
def photo(tmp_path) -> Path:
    write_png(tmp_path / 'photo.png', picture(1, 20, 30))
    return tmp_path / 'photo.png'


def test_a_factor_below_that_of_the_weights(photo):
    """As of `enlarge.py`, whose engine it is: enlarged by 4, then made smaller by bicubic."""
    result = run(photo, BICUBIC[4], scale=3)
    exact = resize(upscale_bicubic(picture(1, 20, 30), 4), 60, 90)
    assert np.abs(pixels(result.image) - exact).mean() < 0.1  # as below
    assert result.image.name == 'photo_x3.png'
    assert 'to 90x60 pixels' in result.about
    assert 'by Bicubic_x4, made smaller' in result.about


def test_result_is_that_of_demo(tmp_path):
    colors = picture(2, 16, 700)  # two tiles
    alpha = np.full((16, 700), 40000, np.uint16)
    photos = {'plain': colors, 'grey': colors[..., 0], 'deep': np.dstack((colors * np.uint16(257), alpha))}
    for name, image in photos.items():
        write_png(tmp_path / 'photos' / f'{name}.png', image)
    options = ['--model', 'auto', '--pre_train', str(X2.file), '--test_only', '--data_test', 'Demo', '--cpu']
    options += ['--dir_demo', str(tmp_path / 'photos'), '--save_dir', str(tmp_path), '--save', 'demo']
    assert main.main(options) == 0
    for name, image in photos.items():
        told = Told()
        result = run(tmp_path / 'photos' / f'{name}.png', X2, progress=told)
        assert result.image == tmp_path / 'photos' / 'own' / f'{name}_x2.png'
        expected = tmp_path / 'demo' / 'results-Demo' / f'{name}_x2_SR.png'
        assert np.array_equal(pixels(result.image), pixels(expected))
        assert read_photo(result.image).color.dtype == image.dtype
        assert told.tiles == [(0, 2), (1, 2), (2, 2)]


def test_grey_with_alpha_is_grey_before_and_after_and_further_frames_are_told(tmp_path):
    icc = bytes(16) + b'GRAY' + bytes(108)
    write_png(tmp_path / 'grey.png', picture(2, 16, 20)[..., :2], icc)
    result = run(tmp_path / 'grey.png', X2)
    for file in (*result.shown.files, result.image):
        with Image.open(file) as image:
            assert image.mode == 'LA'
            assert image.info['icc_profile'] == icc
    assert 'images in the file' not in result.about
    frames = [Image.new('RGB', (6, 5), colour) for colour in ('red', 'green')]
    frames[0].save(tmp_path / 'frames.png', save_all=True, append_images=frames[1:])
    moving = run(tmp_path / 'frames.png', BICUBIC[2])
    with Image.open(moving.image) as image:
        assert image.n_frames == 2
    assert '6x5 to 12x10 pixels, 2 images, in' in moving.about
    still = run(tmp_path / 'frames.png', BICUBIC[2], 'JPEG')
    assert still.about.endswith('; only the first of 2 images in the file, as JPEG holds one')


def test_what_is_said_and_shown(photo):
    result = run(photo, BICUBIC[3])
    exact = upscale_bicubic(picture(1, 20, 30), 3)
    assert np.abs(pixels(result.image) - exact).mean() < 0.1  # MATLAB rounds between its two passes
    assert np.array_equal(pixels(result.shown.whole.after), pixels(result.image))
    size = round(result.image.stat().st_size / 1000)
    assert re.fullmatch(rf'30x20 to 90x60 pixels in \d+\.\d s by Bicubic_x3, {size} kB', result.about)


@pytest.mark.parametrize(('format', 'name', 'error'), [('JPEG', 'photo_x2.jpg', 3), ('WebP', 'photo_x2.webp', 6)])
def test_other_formats(photo, format, name, error):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes()
    smooth = np.dstack([np.add.outer(np.arange(20), 4 * np.arange(30))] * 2 + [np.full((20, 30), 90)]).astype(np.uint8)
    write_png(photo, smooth, profile)
    exact, result = run(photo, BICUBIC[2]), run(photo, BICUBIC[2], format)
    assert result.image.name == name
    with Image.open(result.image) as image:
        assert image.format == format.upper()
        assert image.info['icc_profile'] == profile
    assert np.abs(pixels(result.image) - pixels(exact.image)).max() <= error


def test_jpeg_keeps_the_resolution_of_colours(photo):
    red = np.zeros((20, 30, 3), np.uint8)
    red[:, ::2] = 255, 0, 0
    write_png(photo, red)
    with Image.open(run(photo, BICUBIC[2], 'JPEG').image) as image:
        assert [layer[1:3] for layer in image.layer] == [(1, 1)] * 3  # ITU T.81, B.2.2: sampling factors


@pytest.mark.parametrize('format', ['JPEG', 'WebP'])
def test_transparency(photo, format):
    alpha = np.zeros((20, 30), np.uint8)
    alpha[:, 15:] = 255
    write_png(photo, np.dstack((np.full((20, 30, 3), 60, np.uint8), alpha)))
    found = pixels(run(photo, BICUBIC[2], format).image)
    if format == 'JPEG':  # on white
        assert found.shape == (40, 60, 3)
        assert found[:, :20].min() >= 250
    else:
        assert found.shape == (40, 60, 4)
        assert found[:, :20, 3].max() == 0
    assert np.abs(found[:, 40:, :3] - 60).max() <= 4


@pytest.mark.parametrize('format', ['JPEG', 'WebP'])
def test_grey_and_16_bits(photo, format):
    write_png(photo, picture(1, 20, 30)[..., 0] * np.uint16(257))
    found = Image.open(BytesIO(run(photo, BICUBIC[2], format).image.read_bytes()))
    exact = upscale_bicubic(picture(1, 20, 30)[..., :1].repeat(3, 2), 2)[..., 0]
    assert np.abs(np.asarray(found.convert('L')).astype(int) - exact).mean() < 8
    assert found.mode == ('L' if format == 'JPEG' else 'RGB')


def refused(image: Path, weights: Weights = X2, format: str = 'PNG') -> str:
    with pytest.raises(UserError) as caught:
        run(image, weights, format)
    assert not (image.parent / 'own').exists()
    return str(caught.value)


def test_too_many_pixels(tmp_path):
    write_png(tmp_path / 'wide.png', np.zeros((1, 62500, 3), np.uint8))
    assert run(tmp_path / 'wide.png', BICUBIC[4]).image.exists()  # one million, which is allowed
    shutil.rmtree(tmp_path / 'own')
    write_png(tmp_path / 'wider.png', np.zeros((1, 70000, 3), np.uint8))
    said = refused(tmp_path / 'wider.png', BICUBIC[4])
    assert 'wider.png has 70000x1 pixels, which x4 makes 1.1 million; at most 1 million are allowed' in said


@pytest.mark.parametrize(('format', 'most'), [('JPEG', 65500), ('WebP', 16383)])
def test_more_pixels_a_side_than_the_format_holds(tmp_path, format, most):
    write_png(tmp_path / 'long.png', np.zeros((1, most // 4, 3), np.uint8))
    assert run(tmp_path / 'long.png', BICUBIC[4], format).image.exists()
    shutil.rmtree(tmp_path / 'own')
    write_png(tmp_path / 'long.png', np.zeros((1, most // 4 + 1, 3), np.uint8))
    said = refused(tmp_path / 'long.png', BICUBIC[4], format)
    assert f'at most {most:,}: choose another format, of png' in said
    assert 'long.png' in said


def test_stopped_work_leaves_nothing(tmp_path):
    write_png(tmp_path / 'wide.png', picture(2, 16, 700))
    told = Told()
    with pytest.raises(Stopped):
        run(tmp_path / 'wide.png', X2, progress=told, stop=lambda: len(told.tiles) == 2)
    assert told.tiles == [(0, 2), (1, 2)]
    assert [path.name for path in tmp_path.iterdir()] == ['wide.png']


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


def test_a_colour_profile_that_the_format_cannot_hold_is_told(photo):
    grey = bytes(16) + b'GRAY' + bytes(108)
    write_png(photo, picture(1, 20, 30)[..., 0], grey)
    assert 'profile' not in run(photo, BICUBIC[2]).about
    assert 'profile' not in run(photo, BICUBIC[2], 'JPEG').about
    result = run(photo, BICUBIC[2], 'WebP')
    assert 'without its colour profile, which WebP cannot hold' in result.about
    with Image.open(result.image) as image:
        assert 'icc_profile' not in image.info
    write_png(photo, picture(1, 20, 30), chunks={b'gAMA': (100000).to_bytes(4, 'big')})
    assert 'without its colour profile, which JPEG cannot hold' in run(photo, BICUBIC[2], 'JPEG').about
    assert 'profile' not in run(photo, BICUBIC[2]).about
    write_png(photo, picture(1, 20, 30), chunks={b'gAMA': (45455).to_bytes(4, 'big'), b'sRGB': b'\0'})
    assert 'profile' not in run(photo, BICUBIC[2], 'JPEG').about
