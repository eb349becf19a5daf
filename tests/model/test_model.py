import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from error import UserError
from model import NETWORKS, Model, build
from model.bicubic import Bicubic
from model.common import rgb_to_ycbcr
from model.tiles.autotile import AutoTiler
from model.tiles.tiling import Tiler
from tests.conftest import ROOT, picture

SMALL = {
    'EDSR': {'n_resblocks': 1, 'n_feats': 12},
    'LCoAN': {'n_resgroups': 2, 'n_resblocks': 1, 'n_feats': 12, 'n_clusters': 4, 'window_size': 16},
}
WHITE = {'EDSR': 255, 'LCoAN': 1}


def small(name: str, scale: int = 2, **options: object) -> Model:
    """A small network with random weights, in the wrapper."""
    torch.manual_seed(0)
    model = Model(name, scale, **{**SMALL[name], **options})
    for key, buffer in model.net.named_buffers():
        if key.endswith('initted'):
            buffer.fill_(True)
    return model


@torch.no_grad()
def blank(model: Model) -> Model:
    """All weights zero but the mean colour's: what the network gives is that colour."""
    for parameter in model.net.parameters():
        if parameter.requires_grad:
            parameter.zero_()
    return model


@torch.no_grad()
def nearest(model: Model) -> Model:
    """Weights by hand with which a network repeats pixels, at scale 2 or 3."""
    net = blank(model).net
    for channel in range(model.n_colors):
        net.head[0].weight[channel, channel, 1, 1] = 1
        net.tail[0][0].weight[channel * model.scale**2 : (channel + 1) * model.scale**2, channel, 1, 1] = 1
        net.tail[1].weight[channel, channel, 1, 1] = 1
    return model


def repeat(image: np.ndarray, scale: int) -> np.ndarray:
    return image.repeat(scale, 0).repeat(scale, 1)


def noise(dtype: type, *shape: int) -> np.ndarray:
    image = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)
    image.flat[:2] = 0, np.iinfo(dtype).max
    return image


def seen_by(module: nn.Module) -> list[Tensor]:
    """Collects what is fed to a module from now on."""
    inputs: list[Tensor] = []
    module.register_forward_pre_hook(lambda _, args: inputs.append(args[0].clone()))
    return inputs


def luma_and_chroma(image: np.ndarray) -> Tensor:
    return rgb_to_ycbcr(torch.from_numpy(image).permute(2, 0, 1)[None].double() / 255) * 255


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    return 10 * np.log10(255**2 / np.mean((one.astype(float) - other) ** 2))


# Against the recorded networks.


@pytest.mark.parametrize('scale', [2, 3, 4])
@pytest.mark.slow
def test_the_reference_check_passes(shared: Path, scale: int) -> None:
    """Every output, loss and gradient that was recorded of the official networks; of others there are none here."""
    command = [sys.executable, '-B', shared / 'reference' / 'check.py', '--build', 'tests.known:build']
    command += ['--sys-path', 'src', '--scale', str(scale), '--threads', '1']
    environment = os.environ | {'PYTHONDONTWRITEBYTECODE': '1'}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [(line.split()[0], line.split()[-1]) for line in done.stdout.splitlines() if f' x{scale} ' in line]
    assert {result for _, result in rows} <= {'PASS', 'SKIP'}
    assert {name for name, result in rows if result == 'PASS'} == set(NETWORKS) - {'Bicubic'}
    assert not {name for name, result in rows if result == 'SKIP'} & set(NETWORKS)


# Building.


def test_unknown_network_names_the_known() -> None:
    with pytest.raises(UserError, match=r"'VDSR': choose one of .*EDSR, EDSR-baseline, .*LCoAN, ASID"):
        build('VDSR', 2)


def test_unsupported_scale_names_the_supported() -> None:
    with pytest.raises(UserError, match=r'EDSR cannot enlarge by 5: choose one of 2, 3, 4, 8\.'):
        build('EDSR', 5)


def test_unknown_setting_names_the_settings() -> None:
    with pytest.raises(UserError, match=r"EDSR has no setting 'n_hashes' .*n_resblocks, n_feats, res_scale"):
        build('EDSR', 2, n_hashes=1)
    with pytest.raises(UserError, match=r"Bicubic has no setting 'n_feats' \(it has no settings\)"):
        build('Bicubic', 2, n_feats=8)


def test_a_setting_wins_over_that_of_the_variant() -> None:
    with torch.device('meta'):
        assert build('EDSR-baseline', 2, n_feats=5).head[0].weight.shape == (5, 3, 3, 3)


# Values in and out.


@pytest.mark.parametrize('scale', [2, 3, 4])
def test_bicubic_keeps_every_constant_value(scale: int) -> None:
    model = Model('Bicubic', scale)
    for value in range(256):
        sr = model.upscale(np.full((2, 3, 3), value, np.uint8))
        assert sr.shape == (2 * scale, 3 * scale, 3)
        assert sr.dtype == np.uint8
        assert (sr == value).all()
    for value in [0, 1, 255, 256, 257, 32767, 32768, 50001, 65534, 65535]:
        sr = model.upscale(np.full((2, 3, 3), value, np.uint16))
        assert sr.dtype == np.uint16
        assert (sr == value).all()


@pytest.mark.parametrize('name', ['EDSR', 'LCoAN'])
@pytest.mark.parametrize('dtype', [np.uint8, np.uint16])
@pytest.mark.parametrize('scale', [2, 3])
@pytest.mark.parametrize('ensemble', [False, True])
@pytest.mark.parametrize('tiler', [None, Tiler(9, 4, 3)])
def test_a_network_that_repeats_pixels_repeats_them_exactly(
    name: str, dtype: type, scale: int, ensemble: bool, tiler: Tiler | None
) -> None:
    model = nearest(small(name, scale, ensemble=ensemble, tiler=tiler))
    image = noise(dtype, 13, 20, 3)
    sr = model.upscale(image)
    assert sr.dtype == dtype
    assert np.array_equal(sr, repeat(image, scale))


def test_any_memory_layout_of_the_image() -> None:
    model, image = nearest(small('EDSR')), noise(np.uint8, 6, 9, 3)
    view = image[::-1, ::2]
    assert np.array_equal(model.upscale(view), repeat(view, 2))
    assert model.upscale(view).flags.c_contiguous


@pytest.mark.parametrize('tiler', [None, Tiler(24, 4, 2)])
def test_images_are_continued_by_reflection(tiler: Tiler | None) -> None:
    """LCoAN, which attends across the whole image, shows it."""
    image = noise(np.uint8, 21, 24, 3)
    whole = small('LCoAN').upscale(np.pad(image, ((0, 11), (0, 8), (0, 0)), mode='reflect'))
    found = small('LCoAN', tiler=tiler, pad_to=16).upscale(image)
    assert np.array_equal(found, whole[:42, :48])
    assert not np.array_equal(found, small('LCoAN').upscale(image))


def test_overshoot_is_clipped() -> None:
    image = np.zeros((8, 8, 3), np.uint8)
    image[:, 4:] = 255
    float_sr = Bicubic(2)(torch.from_numpy(image).permute(2, 0, 1)[None].double())
    assert float_sr.min() < -5
    assert float_sr.max() > 260
    sr = Model('Bicubic', 2).upscale(image)
    assert np.array_equal(sr, float_sr[0].permute(1, 2, 0).round().clamp(0, 255).numpy())


@pytest.mark.parametrize(
    ('name', 'options', 'white'),
    [('EDSR', {}, 255), ('EDSR', {'rgb_range': 1}, 1), ('LCoAN', {}, 1), ('LCoAN', {'rgb_range': 255}, 255)],
)
def test_the_network_sees_the_range_it_was_made_for(name: str, options: dict[str, float], white: float) -> None:
    model = blank(small(name, **options))
    inputs = seen_by(model.net)
    for dtype in (np.uint8, np.uint16):
        for part in (0, 1):
            sr = model.upscale(np.full((2, 3, 3), part * np.iinfo(dtype).max, dtype))
            assert torch.equal(inputs.pop(), torch.full((1, 3, 2, 3), float(part * white)))
            # Its answer, the mean colour of DIV2K in its range, is turned back from that range.
            top = np.iinfo(dtype).max
            assert sr[0, 0].tolist() == [round(0.4488 * top), round(0.4371 * top), round(0.4040 * top)]


@pytest.mark.parametrize('rgb_range', [None, 1, 100])
@pytest.mark.parametrize('name', ['EDSR', 'LCoAN'])
def test_training_feeds_the_network_in_its_range(name: str, rgb_range: float | None) -> None:
    model = small(name, **({} if rgb_range is None else {'rgb_range': rgb_range})).eval()
    white = WHITE[name] if rgb_range is None else rgb_range
    lr = torch.from_numpy(noise(np.uint8, 2, 3, 6, 5))
    with torch.no_grad():
        expected = model.net(lr.float() / 255 * white)
        assert torch.allclose(model(lr), expected, rtol=0, atol=1e-5 * white)
    assert torch.allclose(model.to_range(lr), lr.float() / 255 * white, rtol=1e-6)


@pytest.mark.parametrize('dtype', [torch.float32, torch.uint16, torch.int64])
def test_training_takes_nothing_whose_range_is_to_be_guessed(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=rf'takes uint8 images in \[0, 255\], not {str(dtype).partition(".")[2]}: '):
        small('EDSR')(torch.ones(1, 3, 4, 4, dtype=dtype))


@pytest.mark.parametrize('compiled', [False, True])
def test_a_state_dict_holds_every_tensor_once(compiled: bool) -> None:
    model = small('LCoAN', compiled=compiled)
    expected = {f'net.{key}' for key in build('LCoAN', 2, **SMALL['LCoAN']).state_dict()}
    assert set(model.state_dict()) == expected
    model.calls.train = nn.Sequential(model.calls.train)  # as DistributedDataParallel puts itself around a network
    assert set(model.state_dict()) == expected
    assert len(list(model.parameters())) == len(list(model.net.parameters()))


def test_upscaling_is_evaluation() -> None:
    model = small('LCoAN').train()
    before = {key: value.clone() for key, value in model.net.state_dict().items()}
    image = picture(0, 12, 10)
    assert np.array_equal(model.upscale(image), model.upscale(image))
    assert all(torch.equal(value, before[key]) for key, value in model.net.state_dict().items())


# One colour.


@pytest.mark.parametrize('name', ['EDSR', 'LCoAN'])
@pytest.mark.parametrize('ensemble', [False, True])
def test_a_luma_network_takes_the_chroma_from_bicubic(name: str, ensemble: bool) -> None:
    model = nearest(small(name, 3, n_colors=1, ensemble=ensemble))
    inputs = seen_by(model.net)
    image = np.random.default_rng(0).integers(100, 156, (7, 9, 3), np.uint8)  # nothing to clip
    lr, sr = luma_and_chroma(image), luma_and_chroma(model.upscale(image))
    assert torch.allclose(inputs[0][0].double(), lr[0, :1] / 255 * WHITE[name], rtol=1e-5)
    luma = lr[:, :1].repeat_interleave(3, -1).repeat_interleave(3, -2)
    # The result is rounded to 8-bit RGB: half a grey level in each colour.
    assert (sr[:, :1] - luma).abs().max() < 0.5
    assert (sr[:, 1:] - Bicubic(3)(lr[:, 1:])).abs().max() < 0.5


def test_a_luma_network_is_trained_on_luma() -> None:
    model = small('EDSR', n_colors=1)
    lr = torch.from_numpy(noise(np.uint8, 2, 3, 6, 5))
    luma = (lr.double() * torch.tensor([65.481, 128.553, 24.966]).double().view(3, 1, 1) / 255).sum(1, keepdim=True)
    assert torch.allclose(model.to_range(lr).double(), luma + 16, rtol=1e-6)
    assert model(lr).shape == (2, 1, 12, 10)


# Tiles, self-ensemble, half precision.


@pytest.mark.parametrize('ensemble', [False, True])
def test_tiles_that_overlap_enough_give_the_whole_image(ensemble: bool) -> None:
    # Reach in input pixels: head 1, block 2, body 1, upsampler 1, last convolution 1/2.
    image = picture(0, 50, 63)
    whole = small('EDSR', ensemble=ensemble)
    tiled = small('EDSR', ensemble=ensemble, tiler=Tiler(24, 2 * 6 + 2, 4))
    inputs = seen_by(tiled.net)
    expected, sr = whole.upscale(image).astype(int), tiled.upscale(image)
    assert np.abs(sr - expected).max() <= 1  # where rounding tips over
    assert (sr != expected).mean() < 1e-3
    sizes = [x.shape for x in inputs]
    assert len(sizes) > 4
    assert all(max(height, width) <= 24 for _, _, height, width in sizes)
    assert {n for n, *_ in sizes} <= ({4, 8, 12, 16} if ensemble else {1, 2, 3, 4})


def test_self_ensemble_is_the_mean_of_eight_results() -> None:
    image = picture(0, 11, 14)
    single, ensemble = small('EDSR'), small('EDSR', ensemble=True)
    x = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    total = torch.zeros(22, 28, 3)
    with torch.no_grad():
        for turns in range(4):
            for mirror in ([], [3]):
                y = single.net(x.rot90(turns, (2, 3)).flip(mirror)).flip(mirror).rot90(-turns, (2, 3))
                total += y[0].permute(1, 2, 0)
    expected = (total / 8).round().clamp(0, 255).numpy()
    assert np.abs(ensemble.upscale(image) - expected).max() <= 1
    assert np.abs(single.upscale(image) - expected).max() > 5


@pytest.mark.parametrize('name', ['EDSR', 'LCoAN'])
def test_half_precision_costs_next_to_nothing(name: str) -> None:
    # On smooth shades, where repeated pixels score well enough for small errors to count.
    y, x = np.mgrid[:48, :64]
    hr = np.stack([128 + 90 * np.sin(x / 13 + y / 17 + c) for c in range(3)], 2).round().astype(np.uint8)
    lr = hr[::2, ::2]
    single, half = nearest(small(name)), nearest(small(name, half=True))
    inputs = seen_by(half.net.tail)
    scores = psnr(single.upscale(lr), hr), psnr(half.upscale(lr), hr)
    assert [x.dtype for x in inputs] == [torch.bfloat16]
    assert scores[0] > 25
    assert abs(scores[0] - scores[1]) < 0.1


@pytest.mark.parametrize('auto', [False, True])
def test_tiles_are_compiled_once(monkeypatch: pytest.MonkeyPatch, auto: bool) -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list) -> object:
        graphs.append(graph)
        return graph.forward

    compile_ = torch.compile
    monkeypatch.setattr(torch, 'compile', lambda net: compile_(net, backend=backend))
    torch.compiler.reset()
    tiler = AutoTiler(8, 1, 'cpu', fixed=True) if auto else Tiler(24, 8, 1, fixed=True)
    model, plain = (small('EDSR', tiler=tiler, compiled=compiled) for compiled in (True, False))
    for height, width in ((40, 50), (24, 24), (9, 70), (200, 30)):
        image = picture(0, height, width)
        assert np.array_equal(model.upscale(image), plain.upscale(image))
    assert len(graphs) == 1


def test_bicubic_is_never_in_half_precision() -> None:
    """All that it computes is pixels, of which bfloat16 keeps 8 bits."""
    image = (picture(1, 20, 24).astype(np.uint16) * 257) ^ 77
    single, half = (Model('Bicubic', 4, half=half).upscale(image) for half in (False, True))
    assert np.array_equal(single, half)


def test_no_copy_of_a_weight_is_kept_in_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA graph would go on with the copy of its first calls after that has been freed."""
    model, seen = Model('EDSR', 2, half=True, **SMALL['EDSR']), []

    def upscale(x: Tensor) -> Tensor:
        seen.append((torch.is_autocast_enabled('cpu'), torch.is_autocast_cache_enabled()))
        return model.net(x)

    monkeypatch.setattr(model.calls, 'upscale', upscale)
    model.upscale(picture(0, 9, 8))
    assert {*seen} == {(True, False)}


@pytest.mark.parametrize(
    ('wanted', 'device', 'said'), [(True, 'cpu', True), (False, 'cpu', False), (True, 'meta', False)]
)
def test_half_precision_where_kernels_are_in_float32_is_said_to_be_slower(
    wanted: bool, device: str, said: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr('model.wants_llvm', lambda: wanted)
    with caplog.at_level(logging.INFO, 'frugalsr'):
        Model('EDSR-baseline', 2, device, half=True)
    assert bool(caplog.messages) == said
