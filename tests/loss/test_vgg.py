"""The perceptual losses with random weights under the names of torchvision's file."""

import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from error import UserError
from loss.vgg import VGG

# The convolutions of torchvision's vgg19().features, which halve the image before some: number, channels in and out.
CONVOLUTIONS = [
    (0, 3, 64), (2, 64, 64), (5, 64, 128), (7, 128, 128), (10, 128, 256), (12, 256, 256), (14, 256, 256),
    (16, 256, 256), (19, 256, 512), (21, 512, 512), (23, 512, 512), (25, 512, 512), (28, 512, 512), (30, 512, 512),
    (32, 512, 512), (34, 512, 512),
]  # fmt: skip
AFTER_A_POOL = (5, 10, 19, 28)
LAST = {'VGG22': 7, 'VGG54': 34}
NAMES = pytest.mark.parametrize('name', ['VGG22', 'VGG54'])


@pytest.fixture(scope='module')
def state() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = {'classifier.6.bias': torch.zeros(3)}
    for number, before, after in CONVOLUTIONS:
        weight = torch.randn(after, before, 3, 3, generator=generator)
        found[f'features.{number}.weight'] = weight * math.sqrt(2 / (9 * before))
        found[f'features.{number}.bias'] = 0.1 * torch.randn(after, generator=generator)
    return found


@pytest.fixture(scope='module')
def file(state, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp('vgg') / 'vgg19-dcbb9e9d.pth'
    torch.save(state, path, _use_new_zipfile_serialization=False)  # as old as torchvision's
    return path


def plain(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    """Features of RGB in [0, 1]."""
    colours = zip(x.unbind(1), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=True)
    x = torch.stack([(plane - mean) / std for plane, mean, std in colours], 1)
    for number, _, _ in CONVOLUTIONS:
        if number in AFTER_A_POOL:
            x = x.unfold(2, 2, 2).unfold(3, 2, 2).amax((4, 5))
        x = F.conv2d(x, state[f'features.{number}.weight'], state[f'features.{number}.bias'], padding=1)
        if number == LAST[name]:
            return x
        x = x.clamp_min(0)
    raise AssertionError(name)


def images() -> tuple[Tensor, Tensor]:
    sr, hr = torch.rand(2, 2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return sr, hr


@NAMES
@pytest.mark.parametrize('black, white', [(0.0, 1.0), (0.0, 255.0), (-1.0, 1.0)])
def test_against_a_plain_version_in_every_range(name, black, white, state, file):
    sr, hr = images()
    expected = (plain(sr, state, name) - plain(hr, state, name)).square().mean().item()
    term = VGG(name, (black, white), 3, 32, file)
    found = term(*(black + (white - black) * x for x in (sr, hr))).item()
    assert found == pytest.approx(expected, rel=1e-3)
    assert expected > 0.001
    assert term(hr, hr).item() == 0


@NAMES
def test_gradient_goes_to_the_output_alone(name, state, file):
    sr, hr = (x.requires_grad_() for x in images())
    term = VGG(name, (0.0, 1.0), 3, 32, file)
    term(sr, hr).backward()
    assert hr.grad is None
    own, sr.grad = sr.grad, None
    (plain(sr, state, name) - plain(hr.detach(), state, name)).square().mean().backward()
    torch.testing.assert_close(own, sr.grad, rtol=1e-3, atol=1e-3 * sr.grad.abs().max().item())
    assert own.abs().max() > 0


@NAMES
def test_is_neither_trained_nor_saved_but_moves_with_the_rest(name, file):
    term = VGG(name, (0.0, 1.0), 3, 32, file)
    assert list(term.parameters()) == []
    assert term.state_dict() == {}
    assert {buffer.dtype for buffer in term.double().buffers()} == {torch.float64}


@pytest.mark.parametrize(
    'name, n_colors, patch_size, words',
    [
        ('VGG22', 1, 32, '--n_colors 1: VGG22'),
        ('VGG54', 3, 15, '--patch_size 15: VGG54 .* 16'),
        ('VGG22', 3, 1, '--patch_size 1: VGG22 .* 2'),
    ],
)
def test_patches_that_it_cannot_take(name, n_colors, patch_size, words, file):
    with pytest.raises(UserError, match=words):
        VGG(name, (0.0, 1.0), n_colors, patch_size, file)


def test_the_smallest_patches(file):
    sr, hr = torch.rand(2, 1, 3, 16, 16)
    assert VGG('VGG54', (0.0, 1.0), 3, 16, file)(sr, hr) > 0


@pytest.mark.parametrize(
    'content',
    [{}, [1, 2], {'features.0.weight': torch.zeros(64, 3, 5, 5)}, {'features.0.weight': 'x'}],
    ids=['empty', 'a list', 'another shape', 'no tensor'],
)
def test_a_file_of_something_else(content, tmp_path):
    torch.save(content, tmp_path / 'w.pth')
    with pytest.raises(UserError, match=r'--vgg .*w\.pth does not hold VGG19: no features\.0\.weight .*dcbb9e9d'):
        VGG('VGG22', (0.0, 1.0), 3, 32, tmp_path / 'w.pth')


def test_a_file_without_the_last_convolution(state, tmp_path):
    torch.save({key: value for key, value in state.items() if '.34.' not in key}, tmp_path / 'w.pth')
    with pytest.raises(UserError, match=r'no features\.34\.weight'):
        VGG('VGG54', (0.0, 1.0), 3, 32, tmp_path / 'w.pth')
    VGG('VGG22', (0.0, 1.0), 3, 32, tmp_path / 'w.pth')


def torchvision(get_state_dict) -> SimpleNamespace:
    """What stands in for torchvision.models."""
    weights = SimpleNamespace(get_state_dict=get_state_dict)
    return SimpleNamespace(VGG19_Weights=SimpleNamespace(IMAGENET1K_V1=weights))


def test_torchvision_is_asked_where_there_is_no_file(monkeypatch, state, file):
    monkeypatch.setitem(sys.modules, 'torchvision', SimpleNamespace())
    monkeypatch.setitem(sys.modules, 'torchvision.models', torchvision(lambda **_: state))
    sr, hr = images()
    own, downloaded = (VGG('VGG22', (0.0, 1.0), 3, 32, source)(sr, hr) for source in (file, None))
    assert own == downloaded


def test_without_file_and_torchvision(monkeypatch):
    monkeypatch.setitem(sys.modules, 'torchvision', None)
    monkeypatch.setitem(sys.modules, 'torchvision.models', None)
    with pytest.raises(UserError, match=r'VGG54.*torchvision.*--vgg\.$'):
        VGG('VGG54', (0.0, 1.0), 3, 32, None)


def test_a_download_that_fails(monkeypatch):
    def fail(**_: object) -> None:
        raise OSError('no route to host')

    monkeypatch.setitem(sys.modules, 'torchvision', SimpleNamespace())
    monkeypatch.setitem(sys.modules, 'torchvision.models', torchvision(fail))
    with pytest.raises(UserError, match=r'VGG22.*no route to host.*--vgg\.$'):
        VGG('VGG22', (0.0, 1.0), 3, 32, None)
