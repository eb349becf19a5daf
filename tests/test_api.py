"""The library's entrance: what goes in and comes out, and that pixels are those of the program."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from torch import nn

import api
import main
from api import load
from data.image import write_png
from error import UserError
from model import Model
from model.loading.weights import load_weights, read_weights
from system.numerics import exact_float32
from tests.conftest import ROOT, picture

FILE = ROOT / 'models' / 'ASID_x2.pt'


@pytest.fixture(scope='module')
def sr() -> api.Upscaler:
    return load(FILE, device='cpu')


def test_pixels_are_those_of_demo(tmp_path: Path, sr: api.Upscaler) -> None:
    colors = picture(2, 16, 530)  # two tiles
    alpha = np.random.default_rng(0).integers(0, 256, (16, 530), np.uint8)
    photos = {
        'rgb': colors,
        'grey': colors[..., 0],
        'clear': np.dstack((colors, alpha)),
        'deep': colors * np.uint16(257),
    }
    for name, image in photos.items():
        write_png(tmp_path / 'photos' / f'{name}.png', image)
    options = [
        '--model',
        'auto',
        '--pre_train',
        str(FILE),
        '--test_only',
        '--data_test',
        'Demo',
        '--cpu',
        '--save',
        'demo',
    ]
    assert main.main([*options, '--dir_demo', str(tmp_path / 'photos'), '--save_dir', str(tmp_path)]) == 0

    def demo(name: str) -> Image.Image:
        return Image.open(tmp_path / 'demo' / 'results-Demo' / f'{name}_x2_SR.png')

    for name, mode in {'rgb': 'RGB', 'grey': 'L', 'clear': 'RGBA'}.items():
        with Image.open(tmp_path / 'photos' / f'{name}.png') as image, demo(name) as expected:
            result = sr.upscale(image)
            assert result.mode == mode
            assert np.array_equal(np.asarray(result), np.asarray(expected))
    plain = sr.upscale(colors)
    assert plain.dtype == np.uint8
    assert np.array_equal(plain, np.asarray(demo('rgb')))
    deep = sr.upscale(photos['deep'])
    assert deep.dtype == np.uint16
    assert np.abs(deep / 257 - plain).max() <= 0.5  # the same values, rounded later


def test_a_whole_image_is_what_the_network_gives() -> None:
    model = Model('ASID', 2)
    load_weights(model.net, read_weights(FILE)[0], '')
    image = picture(3, 17, 12)
    sr = load(FILE, 'cpu', tiles=None)
    assert (sr.name, sr.scale, sr.model.tiler) == ('ASID', 2, None)
    assert np.array_equal(sr.upscale(image), model.upscale(image))
    x = torch.from_numpy(image).permute(2, 0, 1) / 255
    with torch.no_grad():
        expected = ((model.net(2 * x[None] - 1)[0] + 1) / 2).clamp(0, 1)  # ASID works in [-1, 1]
    assert torch.allclose(sr.upscale(x), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize('tiles', ['auto', 24, None])
def test_floats_are_the_same_before_they_are_rounded(dtype: torch.dtype, tiles: str | int | None) -> None:
    sr = load(FILE, 'cpu', tiles)
    images = np.stack([picture(seed, 30, 41) for seed in (0, 1)])
    expected = [sr.upscale(image) for image in images]
    batch = (torch.from_numpy(images).permute(0, 3, 1, 2) / 255).to(dtype)
    found = sr.upscale(batch)
    assert (found.dtype, found.shape) == (dtype, (2, 3, 60, 82))
    assert 0 <= found.min() <= found.max() <= 1
    apart = 0.5 if dtype != torch.bfloat16 else 4  # of 8 bits, which bfloat16 keeps to one in 256
    for image, one, other in zip(batch, found, expected, strict=True):
        pixels = one.permute(1, 2, 0).double().numpy() * 255
        assert np.abs(pixels - other).max() <= apart + 1e-3
        assert torch.equal(sr.upscale(image), one)


def test_a_result_can_be_learned_from_and_the_image_stays(sr: api.Upscaler) -> None:
    image = torch.rand(3, 8, 9, requires_grad=True)
    before = image.detach().clone()
    layer = nn.Conv2d(3, 1, 1)
    layer(sr.upscale(image)[None]).sum().backward()
    assert layer.weight.grad is not None
    assert image.grad is None
    assert torch.equal(image, before)


def test_settings_of_pytorch_stay(sr: api.Upscaler) -> None:
    before = torch.backends.cudnn.allow_tf32, torch.are_deterministic_algorithms_enabled(), torch.initial_seed()
    numbers = torch.get_rng_state()
    sr.upscale(picture(0, 8, 8))
    load('Bicubic_x2', 'cpu')
    load('ASID_x2', 'cpu')
    after = torch.backends.cudnn.allow_tf32, torch.are_deterministic_algorithms_enabled(), torch.initial_seed()
    assert after == before
    assert torch.equal(torch.get_rng_state(), numbers)  # those of the caller come as they would have


def test_an_image_of_pillow_is_turned_upright_and_keeps_its_profile() -> None:
    sr, colors = load('Bicubic_x2', 'cpu'), picture(0, 8, 12)
    image = Image.fromarray(colors)
    image.getexif()[0x0112] = 6  # shown turned to the right
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes()
    image.info['icc_profile'] = profile
    result = sr.upscale(image)
    assert np.array_equal(np.asarray(result), sr.upscale(np.rot90(colors, -1)))
    assert result.info['icc_profile'] == profile
    assert 'icc_profile' not in sr.upscale(image.convert('L')).info
    assert image.size == (12, 8)


@pytest.mark.parametrize(
    'mode, expected', [('1', 'L'), ('LA', 'LA'), ('P', 'RGB'), ('CMYK', 'RGB'), ('RGBA', 'RGBA'), ('I;16', 'I;16')]
)
def test_modes_of_pillow(mode: str, expected: str) -> None:
    sr = load('Bicubic_x3', 'cpu')
    image = Image.fromarray(np.full((4, 5), 51400, np.uint16)) if mode == 'I;16' else Image.new(mode, (5, 4))
    result = sr.upscale(image)
    assert (result.mode, result.size) == (expected, (15, 12))
    if mode == 'I;16':
        assert (np.asarray(result) == 51400).all()


TINY = np.zeros((4, 4, 3))


@pytest.mark.parametrize(
    'image, words',
    [
        (TINY.astype(np.float32), 'numpy array of float32 could only be guessed: give uint8 or uint16'),
        (TINY.astype(np.int64), 'numpy array of int64'),
        (TINY[..., 0].astype(np.uint8), r'shape \(4, 4\) is no RGB image: give \(H, W, 3\)'),
        (np.zeros((4, 4, 4), np.uint8), r'shape \(4, 4, 4\)'),
        (np.zeros((0, 4, 3), np.uint8), r'shape \(0, 4, 3\)'),
        (torch.zeros(3, 4, 4, dtype=torch.uint8), r'tensor of uint8 could only be guessed: give floats in \[0, 1\]'),
        (torch.zeros(4, 4, 3), r'shape \(4, 4, 3\) is no RGB image: give \(3, H, W\)'),
        (torch.zeros(0, 3, 4, 4), r'shape \(0, 3, 4, 4\)'),
        (torch.full((3, 4, 4), 1.5), r'from 1\.5 to 1\.5: give floats in \[0, 1\]'),
        (torch.full((3, 4, 4), -0.25), r'from -0\.25 to -0\.25'),
        (torch.full((3, 4, 4), torch.nan), 'from nan to nan'),
        (torch.linspace(0, 255, 48).view(3, 4, 4), 'from 0 to 255'),
        (Image.new('F', (4, 4)), 'image of Pillow cannot be used .*type F.*: convert it to RGB'),
        (Image.new('RGB', (0, 4)), 'image of Pillow cannot be used .*empty'),
        ([[0, 0, 0]], 'list is no image: give a numpy array, an image of Pillow or a tensor'),
        ('photo.png', 'str is no image'),
    ],
)
def test_what_is_no_image_is_refused(sr: api.Upscaler, image: object, words: str) -> None:
    with pytest.raises(UserError, match=words):
        sr.upscale(image)  # type: ignore[type-var]


def test_weights_by_path_and_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ('ASID_x2', 'ASID_x2.pt', str(FILE), FILE):
        found = load(name, 'cpu')
        assert (found.name, found.scale) == ('ASID', 2)
        assert repr(found) == '<ASID x2 on cpu>'
    bicubic = load('Bicubic_x4', torch.device('cpu'))
    assert (bicubic.name, bicubic.scale) == ('Bicubic', 4)
    torch.save({'weight': torch.zeros(1)}, 'mine_x2.pt')
    with pytest.raises(UserError, match=r'mine_x2\.pt: No network known here'):
        load('mine_x2.pt', 'cpu')
    with pytest.raises(
        UserError, match=r'VDSR_x2: no such file of weights here or in .*models, which holds .*ASID_x2\.pt'
    ):
        load('VDSR_x2', 'cpu')
    with pytest.raises(UserError, match='Bicubic cannot enlarge by 9'):
        load('Bicubic_x9', 'cpu')


@pytest.mark.parametrize('device', ['gpu', 'cpu:x', 'xla', None])
def test_a_device_that_is_not_there(device: str | None) -> None:
    with pytest.raises(UserError, match=f'device {device} cannot be used here: give auto or cpu'):
        load('Bicubic_x2', device)


def test_bicubic_at_another_scale_than_its_name_says():
    assert load('Bicubic_x2', scale=2).scale == 2
    with pytest.raises(UserError, match=r'Bicubic_x2 holds weights of Bicubic x2, not x4: leave the scale out'):
        load('Bicubic_x2', scale=4)


def test_weights_of_a_name_that_cannot_be():
    with pytest.raises(UserError, match='no such file of weights'):
        load('x' * 5000)


@pytest.mark.parametrize('tiles', [20, 0, -1, 'all', 3.5, True])
def test_tiles_that_cannot_be(tiles: object) -> None:
    with pytest.raises(UserError, match='give auto, None for whole images, or a side above 20 pixels'):
        load('Bicubic_x2', 'cpu', tiles)  # type: ignore[arg-type]


def test_within_the_block_float32_is_exact_on_a_gpu() -> None:
    """The switches are there without a GPU, too."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = True
    try:
        with pytest.raises(ValueError, match='within'), exact_float32(torch.device('cuda')):
            assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == (False, False)
            raise ValueError('within')
        assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == (before[0], True)
    finally:
        torch.backends.cudnn.allow_tf32 = before[1]


def test_importing_it_leaves_pillow_as_it_is():
    """The limit on pixels guards whoever else opens images in the process."""
    program = (
        'from PIL import Image; before = Image.MAX_IMAGE_PIXELS; import api; assert Image.MAX_IMAGE_PIXELS == before'
    )
    subprocess.run([sys.executable, '-c', program], env=os.environ | {'PYTHONPATH': str(ROOT / 'src')}, check=True)


@pytest.mark.parametrize('kind', ['array', 'Pillow', 'tensor'])
def test_a_result_that_is_not_finite_is_an_error(kind):
    """As integers nan becomes 0, which is black, and inf white."""
    upscaler = load('Bicubic_x2', device='cpu')
    upscaler.model.calls.upscale = lambda x: torch.full((len(x), 3, 2 * x.shape[2], 2 * x.shape[3]), torch.inf)
    array = picture(0, 8, 9)
    image = {'array': array, 'Pillow': Image.fromarray(array), 'tensor': torch.rand(3, 8, 9)}[kind]
    with pytest.raises(UserError, match=r'Bicubic x2 .* not finite'):
        upscaler.upscale(image)
