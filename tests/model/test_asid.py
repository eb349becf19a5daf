import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from error import UserError
from model import NETWORKS, build
from model.asid import IDSABlock, SpatialAttention, recognise
from model.blocks.pixels import LayerNorm2d

SMALL = {'n_resgroups': 3, 'n_feats': 8, 'window_size': 4}
Pixel = tuple[int, int]


def small(**settings: int) -> nn.Module:
    torch.manual_seed(0)
    return build('ASID', 2, **{**SMALL, **settings}).double()


def images(*shape: int) -> Tensor:
    return torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 2 - 1


def pixels(height: int, width: int) -> list[Pixel]:
    return [(i, j) for i in range(height) for j in range(width)]


def plain_attention(x: Tensor, layer: SpatialAttention, weights: dict | None) -> tuple[Tensor, dict]:
    """What attention adds to one image (C, H, W), in loops; and each query's weight of each of its keys.

    Without `weights` the layer finds its own.
    """
    size, (channels, height, width) = layer.window_size, x.shape
    steps = (height // size, width // size)

    def group(pixel: Pixel) -> Pixel:
        if layer.strided:
            return pixel[0] % steps[0], pixel[1] % steps[1]
        return pixel[0] // size, pixel[1] // size

    def place(pixel: Pixel) -> Pixel:
        if layer.strided:
            return pixel[0] // steps[0], pixel[1] // steps[1]
        return pixel[0] % size, pixel[1] % size

    image = x.permute(1, 2, 0).numpy()
    image = (image - image.mean(-1, keepdims=True)) / np.sqrt(image.var(-1, keepdims=True) + 1e-5)
    image = image * layer.norm.weight.numpy() + layer.norm.bias.numpy()
    if weights is None:
        weights = {}
        table = layer.attn.rel_pos_bias.weight.numpy()[:, 0].reshape(2 * size - 1, 2 * size - 1)
        q, k, v = np.split(image @ layer.attn.to_qkv.weight.T.numpy(), 3, -1)
        for query in pixels(height, width):
            keys = [key for key in pixels(height, width) if group(key) == group(query)]
            logits = np.array([q[query] @ k[key] for key in keys]) / math.sqrt(channels)
            for i, key in enumerate(keys):
                down, right = (a - b + size - 1 for a, b in zip(place(query), place(key), strict=True))
                logits[i] += table[down, right]
            share = np.exp(logits) / np.exp(logits).sum()
            weights[query] = dict(zip(keys, share, strict=True))
    else:
        v = image @ layer.attn.to_v.weight.T.numpy()
    out = np.zeros_like(image)
    for query, shares in weights.items():
        out[query] = sum(share * v[key] for key, share in shares.items())
    return torch.from_numpy(out @ layer.attn.to_out[0].weight.T.numpy()).permute(2, 0, 1), weights


@pytest.mark.parametrize('strided', [False, True])
@torch.no_grad()
def test_attention_equals_plain_loops_and_is_shared(strided: bool) -> None:
    torch.manual_seed(0)
    first, later = (SpatialAttention(3, 4, strided, first).double() for first in (True, False))
    first.attn.to_qkv.weight *= 3  # a softmax far from uniform
    for layer in (first, later):
        nn.init.normal_(layer.norm.weight)
        nn.init.normal_(layer.norm.bias)
        nn.init.zeros_(layer.gfn.project_out.weight)  # attention alone
    x = images(2, 3, 8, 12)
    y, attention_map = first(x, None)
    z, same = later(y, attention_map)
    assert same is attention_map
    for image in range(2):
        added, weights = plain_attention(x[image], first, None)
        assert torch.allclose(y[image], x[image] + added, rtol=0, atol=1e-12)
        added, _ = plain_attention(y[image], later, weights)
        assert torch.allclose(z[image], y[image] + added, rtol=0, atol=1e-12)


@torch.no_grad()
def test_a_feed_forward_follows_the_attention() -> None:
    torch.manual_seed(0)
    layer, x = SpatialAttention(3, 4, False, True).double(), images(1, 3, 8, 8)
    out, _ = layer(x, None)
    y = x + plain_attention(x[0], layer, None)[0]
    assert torch.allclose(out, layer.gfn(y, LayerNorm2d(3, 1e-6).double()), rtol=0, atol=1e-12)


@torch.no_grad()
def test_block_sets_a_quarter_aside_at_each_stage() -> None:
    torch.manual_seed(0)
    block, x = IDSABlock(8, 4, first=True).double(), images(1, 8, 8, 8)
    out, maps = block(x, None)

    def attended(x: Tensor, stage: int) -> Tensor:
        local, across = getattr(block, f'SLA{stage}'), getattr(block, f'SGA{stage}')
        return across(local(x, None)[0], None)[0]

    loc1, rest1 = block.LB1(x).split((2, 6), 1)
    x1, y = block.pw1(torch.cat((attended(rest1, 1), loc1), 1)).split((2, 6), 1)
    loc2, rest2 = block.LB2(y).split((2, 4), 1)
    x2, y = block.pw2(torch.cat((attended(rest2, 2), loc2), 1)).split((2, 4), 1)
    loc3, rest3 = block.LB3(y).split((2, 2), 1)
    y = block.pw3(torch.cat((x1, x2, attended(rest3, 3), loc3), 1))
    assert torch.allclose(out, block.BlockC(y), rtol=0, atol=1e-12)
    flat = [attention_map for stage in maps for attention_map in stage]
    assert [tuple(attention_map.shape) for attention_map in flat] == [(4, 16, 16)] * 6
    assert all(torch.allclose(m.sum(-1), torch.ones(4, 16, dtype=m.dtype)) for m in flat)


def test_gradients_reach_every_parameter() -> None:
    net = small()
    net(images(2, 3, 17, 20)).abs().mean().backward()
    assert [key for key, p in net.named_parameters() if p.grad is None or not p.grad.abs().max() > 0] == []


def test_all_groups_train_the_shared_maps() -> None:
    net = small()
    for parameter in net.block0.res_end.parameters():  # what the first group attends to goes nowhere
        nn.init.zeros_(parameter)
    net(images(2, 3, 16, 16)).abs().mean().backward()
    for key, parameter in net.named_parameters():
        if key.endswith('to_qkv.weight'):
            q, k, v = parameter.grad.abs().amax(1).chunk(3)
            assert q.max() > 0
            assert k.max() > 0
            # Values shape the maps of the stages after them; the last attention has none after it.
            assert (v.max() > 0) == ('SGA3' not in key)


@pytest.mark.parametrize(
    ('size', 'padded'), [((1, 1), (16, 16)), ((16, 9), (16, 16)), ((17, 20), (20, 20)), ((3, 21), (16, 24))]
)
@torch.no_grad()
def test_pads_with_zeros(size: tuple[int, int], padded: tuple[int, int]) -> None:
    net, x = small().eval(), images(2, 3, *size)
    grown = torch.zeros(2, 3, *padded, dtype=x.dtype)
    grown[..., : size[0], : size[1]] = x
    assert torch.allclose(net(x), net(grown)[..., : 2 * size[0], : 2 * size[1]], rtol=0, atol=1e-12)


def test_works_on_quarters_of_the_channels() -> None:
    with pytest.raises(UserError, match='--n_feats 50 is not a multiple of 4'):
        build('ASID', 2, n_feats=50)


@pytest.mark.parametrize(
    ('name', 'scale', 'settings'),
    [
        ('ASID', 2, {}),
        ('ASIDd8', 3, {}),
        ('ASID', 4, SMALL),
        ('ASID', 2, {'n_resgroups': 1, 'n_feats': 4, 'window_size': 1}),
        ('ASID', 3, {'n_resgroups': 11, 'window_size': 5}),
    ],
)
def test_recognises_its_weights(name: str, scale: int, settings: dict[str, int]) -> None:
    with torch.device('meta'):
        state = build(name, scale, **settings).state_dict()
    defaults = {'n_feats': 48, 'n_resgroups': 8 if name == 'ASIDd8' else 3, 'window_size': 8}
    assert recognise(state) == {'scale': scale, **defaults, **settings}


def test_recognises_no_other_weights() -> None:
    with torch.device('meta'):
        for name in NETWORKS:
            if not name.startswith('ASID'):
                assert recognise(build(name, 2).state_dict()) is None
        state = build('ASID', 2).state_dict()
    assert recognise({}) is None
    assert recognise({key: state[key] for key in state if not key.startswith('up.')}) is None
    assert recognise({key: state[key] for key in state if 'rel_pos_bias' not in key}) is None
