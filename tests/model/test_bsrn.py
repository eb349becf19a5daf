"""BSRN against plain layers, and images too small for its spatial gate."""

import math
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from error import UserError
from model import NETWORKS, build
from model.bsrn import BlueprintESA, BSConv, recognise
from tests.conftest import numbers

SMALL = {'n_resblocks': 1, 'n_feats': 8}


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


@torch.no_grad()
def test_a_blueprint_convolution_is_a_product_of_two() -> None:
    """Its kernels are one 3x3 kernel each, times a factor for every channel of the input."""
    torch.manual_seed(0)
    layer, x = BSConv(3, 4).double(), numbers(2, 3, 5, 6)
    weight = layer.dw.weight * layer.pw.weight
    assert weight.shape == (4, 3, 3, 3)
    torch.testing.assert_close(layer(x), F.conv2d(x, weight, layer.dw.bias, padding=1), rtol=0, atol=1e-12)


@pytest.mark.parametrize('size', [(15, 15), (33, 27)])
@torch.no_grad()
def test_spatial_gate(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    gate, x = BlueprintESA(8).double(), numbers(2, 8, *size)
    skip = gate.conv1(x)
    strided = F.conv2d(gate.conv2.pw(skip), gate.conv2.dw.weight, gate.conv2.dw.bias, stride=2, groups=2)
    assert strided.shape[2:] == tuple((n - 1) // 2 for n in size)
    low = strided.unfold(2, 7, 3).unfold(3, 7, 3).amax((-2, -1))
    low = gate.conv3_(gelu(gate.conv3(gelu(gate.conv_max(low)))))
    low = F.interpolate(low, size=size, mode='bilinear', align_corners=False)
    expected = x / (1 + torch.exp(-gate.conv4(low + gate.conv_f(skip))))
    torch.testing.assert_close(gate(x), expected, rtol=0, atol=1e-12)


@torch.no_grad()
def test_a_block_keeps_half_before_it_refines() -> None:
    torch.manual_seed(0)
    block, x = build('BSRN', 2, **SMALL).double().B1, numbers(2, 8, 16, 17)
    parts, rest = [], x
    for i in (1, 2, 3):
        parts.append(gelu(getattr(block, f'c{i}_d')(rest)))
        rest = gelu(getattr(block, f'c{i}_r')(rest) + rest)
    parts.append(gelu(block.c4(rest)))
    assert [part.shape[1] for part in parts] == [4, 4, 4, 4]
    expected = x + block.cca(block.esa(block.c5(torch.cat(parts, 1))))
    torch.testing.assert_close(block(x), expected, rtol=0, atol=1e-12)


def test_single_precision_in_maps_that_are_large_enough_for_kernels() -> None:
    torch.manual_seed(0)
    net = build('BSRN', 2, **SMALL)
    x = numbers(2, 3, 23, 26).float()

    def found(net: nn.Module, x: Tensor) -> list[Tensor]:
        out = net(x)
        gradients = torch.autograd.grad(out.square().sum(), net.parameters())
        with torch.no_grad():
            return [net(x), out.detach(), *gradients]

    truth = found(deepcopy(net).double(), x.double())
    scale = max(float(part.abs().max()) for part in truth[2:])
    for i, (part, expected) in enumerate(zip(found(net, x), truth, strict=True)):
        close = 1e-5 * (scale if i > 1 else float(expected.abs().max()))
        torch.testing.assert_close(part.double(), expected, rtol=0, atol=close)


@pytest.mark.parametrize(('size', 'padded'), [((1, 1), (15, 15)), ((20, 9), (20, 15)), ((14, 16), (15, 16))])
@torch.no_grad()
def test_pads_small_images_with_zeros(size: tuple[int, int], padded: tuple[int, int]) -> None:
    torch.manual_seed(0)
    net, x = build('BSRN', 2, **SMALL).double().eval(), numbers(2, 3, *size)
    grown = torch.zeros(2, 3, *padded, dtype=x.dtype)
    grown[..., : size[0], : size[1]] = x
    expected = net(grown)[..., : 2 * size[0], : 2 * size[1]]
    torch.testing.assert_close(net(x), expected, rtol=0, atol=1e-12)


def test_half_of_the_channels_is_one_at_least() -> None:
    with pytest.raises(UserError, match='--n_feats 1: half of them is kept at every step, so choose 2 or more'):
        build('BSRN', 2, n_feats=1)


@pytest.mark.parametrize(
    ('scale', 'settings'), [(2, {}), (3, {'n_resblocks': 12}), (4, {'n_resblocks': 1, 'n_feats': 5})]
)
def test_recognises_its_weights(scale: int, settings: dict[str, int]) -> None:
    with torch.device('meta'):
        state = build('BSRN', scale, **settings).state_dict()
    assert recognise(state) == {'scale': scale, 'n_resblocks': 8, 'n_feats': 64, **settings}


def test_recognises_no_other_weights() -> None:
    with torch.device('meta'):
        for name in NETWORKS:
            if name != 'BSRN':
                assert recognise(build(name, 2).state_dict()) is None
        state = build('BSRN', 2).state_dict()
    assert recognise({}) is None
    assert recognise({key: state[key] for key in state if not key.startswith('upsampler.')}) is None
