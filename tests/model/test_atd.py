import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from error import UserError
from model import NETWORKS, build
from model.atd import ATD, CategoryAttention, DictionaryAttention, Layer, recognise, recognise_v2
from model.blocks.tokens import TokenLinear, TokenNorm
from tests.conftest import kept_for_gradients

SMALL = {
    'n_feats': 12,
    'n_resgroups': 2,
    'n_resblocks': 3,
    'n_heads': 3,
    'window_size': 4,
    'category_size': 8,
    'n_tokens': 5,
    'reduced_dim': 3,
    'kernel_size': 3,
}


def small(**settings: object) -> nn.Module:
    """A small ATD in double precision, so that rounding decides nothing."""
    torch.manual_seed(0)
    return build('ATD', 2, **{**SMALL, **settings}).double()


def images(*shape: int) -> Tensor:
    return torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def softmax(x: np.ndarray) -> np.ndarray:
    return np.exp(x - x.max()) / np.exp(x - x.max()).sum()


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x)


def linear(layer: nn.Linear, x: np.ndarray) -> np.ndarray:
    return x @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()


def random_(module: nn.Module, deviation: float = 0.5) -> nn.Module:
    """The module in double precision, with parameters far from their initial values."""
    torch.manual_seed(0)
    for parameter in module.double().parameters():
        nn.init.normal_(parameter, std=deviation)
    return module


def test_features_of_the_feed_forward_network_are_not_kept_for_the_gradients() -> None:
    net = small(n_resgroups=1, mlp_ratio=20.0, direct_upsampler=True)
    kept = kept_for_gradients(lambda: net(images(1, 3, 12, 16)))
    assert max(tensor.numel() for tensor in kept) < 12 * 16 * 20 * SMALL['n_feats']


# The parts of a layer, against plain loops over pixels.


@torch.no_grad()
def test_dictionary_attention_equals_plain_loops() -> None:
    attention = random_(DictionaryAttention(6, 5, 3), 1.0)
    attention.scale.copy_(torch.tensor([-0.3, 0.2, 0.5, 1.0, 1.7], dtype=torch.float64))
    norm, qkv = random_(TokenNorm(6)), random_(TokenLinear(6, 4))
    x, tokens = torch.randn(2, 7, 6, dtype=torch.float64), torch.randn(2, 5, 6, dtype=torch.float64)
    found = attention(x, tokens, norm, qkv)
    for image in range(2):
        for pixel in range(7):
            given = x[image, pixel].numpy()
            normed = (given - given.mean()) / np.sqrt(given.var() + norm.eps)
            normed = normed * norm.weight.numpy() + norm.bias.numpy()
            assert np.abs(found.qkv[image, pixel].numpy() - linear(qkv, normed)).max() < 1e-12
            query = unit(linear(attention.wq, normed))
            logits = [
                query @ unit(linear(attention.wk, token)) * (1 + scale * math.log(5))
                for token, scale in zip(tokens[image].numpy(), (0, 0.2, 0.5, 1, 1), strict=True)
            ]
            weights = softmax(np.array(logits))
            assert np.abs(found.similarity[image, pixel].numpy() - weights).max() < 1e-12
            assert found.category[image, pixel] == np.argmax(weights)
            read = weights @ linear(attention.wv, tokens[image].numpy())
            assert np.abs(found.x[image, pixel].numpy() - given - read).max() < 1e-12


def plain_category_attention(qkv: np.ndarray, category: list[int], size: int, heads: int, factor: float) -> np.ndarray:
    """(L, 3 * C) and the categories of L pixels to (L, C), before the projection."""
    length, channels = qkv.shape
    order = sorted(range(length), key=lambda pixel: category[pixel])
    size = min(size, length)
    groups = [order[i : i + size] for i in range(0, length, size)]
    groups[-1] = groups[-1] + order[::-1][: size - len(groups[-1])]
    d = channels // 3 // heads
    q, k, v = qkv.reshape(length, 3, heads, d).transpose(1, 2, 0, 3)
    out = np.zeros((length, heads, d))
    for i, pixel in enumerate(order):
        group = groups[i // size]
        for head in range(heads):
            out[pixel, head] = softmax(q[head, pixel] @ k[head][group].T * factor) @ v[head][group]
    return out.reshape(length, -1)


# Whole groups; a last one with 5 of 8, and with 1; exactly one group; fewer pixels than a group, and a single one.
@pytest.mark.parametrize('length', [24, 29, 9, 8, 5, 1])
@torch.no_grad()
def test_category_attention_equals_plain_loops(length: int) -> None:
    attention = random_(CategoryAttention(6, 3, 8))
    attention.logit_scale.fill_(math.log(3))
    qkv = torch.randn(2, length, 18, dtype=torch.float64)
    category = torch.randint(3, (2, length))
    out = attention(qkv, category)
    for image in range(2):
        plain = plain_category_attention(qkv[image].numpy(), category[image].tolist(), 8, 3, 3.0)
        assert np.abs(out[image].numpy() - linear(attention.proj, plain)).max() < 1e-12


@torch.no_grad()
def test_category_attention_by_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, with as many pixels as whole groups have, against the other form in double precision."""
    attention = random_(CategoryAttention(24, 2, 32))
    qkv, category = torch.randn(2, 96, 72), torch.randint(3, (2, 96))
    truth = attention(qkv.double(), category)
    monkeypatch.setattr('model.atd.take_rows', None)  # is not needed
    found = attention.float()(qkv, category)
    torch.testing.assert_close(found.double(), truth, rtol=0, atol=1e-5 * float(truth.abs().max()))


def test_the_logit_scale_stops_at_a_hundred() -> None:
    attention = random_(CategoryAttention(6, 3, 8))
    qkv, category = images(1, 8, 18) / 10, torch.zeros(1, 8, dtype=torch.int64)
    with torch.no_grad():
        attention.logit_scale.fill_(6.0)
        plain = plain_category_attention(qkv[0].numpy(), [0] * 8, 8, 3, 100.0)
    out = attention(qkv, category)
    assert np.abs(out[0].detach().numpy() - linear(attention.proj, plain)).max() < 1e-12
    out.square().sum().backward()
    assert attention.logit_scale.grad.item() == 0


@torch.no_grad()
def test_refinement_equals_plain_loops() -> None:
    layer = random_(Layer(12, 3, 4, 8, 5, 3, 3, 2.0, refines=True))
    x, tokens = torch.randn(2, 9, 12, dtype=torch.float64), torch.randn(2, 5, 12, dtype=torch.float64)
    similarity = (0.01 * torch.randn(2, 9, 5, dtype=torch.float64)).softmax(-1)  # variance of the order of the eps
    out = layer.refine(tokens, similarity, x)
    for image in range(2):
        for token in range(5):
            row = similarity[image, :, token].numpy()
            norm = (row - row.mean()) / np.sqrt(row.var() + 1e-5) * layer.norm3.weight[token].item()
            keep = 1 / (1 + math.exp(-layer.sigma[token].item()))
            refined = keep * tokens[image, token].numpy() + (1 - keep) * softmax(norm) @ x[image].numpy()
            assert np.abs(out[image, token].numpy() - refined).max() < 1e-12


# The network.


@pytest.mark.parametrize('size', [(1, 1), (1, 7), (3, 5), (4, 9)])
@torch.no_grad()
def test_pads_by_the_mirror_image_and_only_where_needed(size: tuple[int, int]) -> None:
    net = small().eval()
    x = images(1, 3, *size)
    padding = ((0, 0), (0, 0), *((0, -side % 4) for side in size))
    padded = torch.from_numpy(np.pad(x.numpy(), padding, mode='symmetric'))
    assert torch.allclose(net(x), net(padded)[..., : 2 * size[0], : 2 * size[1]], rtol=0, atol=1e-12)


@pytest.mark.parametrize('settings', [{'category_size': 7}, {'category_size': 1000}, {'window_size': 3}])
@torch.no_grad()
def test_groups_need_not_be_full(settings: dict) -> None:
    net = small(**settings).eval()
    x = images(2, 3, 9, 10)
    alone = torch.cat([net(image) for image in x.split(1)])
    assert torch.allclose(net(x), alone, rtol=0, atol=1e-12)


def test_each_block_starts_with_its_own_dictionary_and_refines_it() -> None:
    net = small().eval()
    seen = []
    for block in net.layers:
        for layer in block.residual_group.layers:
            layer.attn_atd.register_forward_hook(lambda module, given, result: seen.append(given[1]))
    net(images(2, 3, 8, 8))
    for block, (first, second, third) in zip(net.layers, (seen[:3], seen[3:]), strict=True):
        assert torch.equal(first, block.residual_group.td.expand(2, -1, -1))
        assert not torch.equal(second[0], second[1])  # each image has its own
        assert not torch.equal(second, third)


def test_every_second_layer_of_a_block_is_shifted() -> None:
    net = small().eval()
    firsts = []
    for layer in net.modules():
        if isinstance(layer, Layer):
            layer.register_forward_pre_hook(lambda module, given: firsts.append(given[-1].order[0].item()))
    net(images(1, 3, 8, 12))
    # The pixel that the first window starts with: (0, 0), or (2, 2) after a shift by half a window.
    assert firsts == [0, 2 * 12 + 2, 0, 0, 2 * 12 + 2, 0]


def test_gradients_reach_what_the_paper_trains() -> None:
    net = small().train()
    net(images(2, 3, 9, 10)).abs().mean().backward()
    for key, parameter in net.named_parameters():
        if key.endswith('norm3.bias'):  # the same for all positions, over which a softmax follows
            assert parameter.grad.abs().max() < 1e-12
        else:
            assert parameter.grad.abs().max() > 1e-12, key


def test_similarity_and_refinement_keep_their_precision_under_autocast() -> None:
    torch.manual_seed(0)
    layer = Layer(12, 3, 4, 8, 5, 3, 3, 2.0, refines=True)
    x, tokens = torch.randn(1, 64, 12), torch.randn(1, 5, 12)
    given = x, tokens, layer.norm1, layer.wqkv
    similarity = layer.attn_atd(*given).similarity
    refined = layer.refine(tokens, similarity, x)
    with torch.autocast('cpu', torch.bfloat16):
        found = layer.attn_atd(*given)
        assert found.qkv.dtype is torch.bfloat16
        assert torch.equal(found.similarity, similarity)
        assert torch.equal(layer.refine(tokens, similarity, x), refined)


def test_starts_as_the_official_network() -> None:
    torch.manual_seed(0)
    layer = build('ATD', 2, **{**SMALL, 'n_feats': 120}).layers[0].residual_group.layers[0]
    assert layer.wqkv.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert layer.attn_win.relative_position_bias_table.std().item() == pytest.approx(0.02, rel=0.2)
    assert all(bias.abs().max() == 0 for bias in (layer.wqkv.bias, layer.convffn.fc2.bias, layer.sigma))
    assert layer.attn_aca.logit_scale.exp().item() == pytest.approx(10)
    assert layer.attn_atd.scale.tolist() == [0.5] * 5


# Settings and weights.


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'n_heads': 5}, '--n_heads 5 does not divide --n_feats 12'),
        ({'kernel_size': 4}, '--kernel_size 4 has no pixel in its middle'),
    ],
)
def test_refuses_what_cannot_be(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        small(**settings)


@pytest.mark.parametrize('direct_upsampler', [False, True])
@pytest.mark.parametrize('scale', [2, 3, 4])
def test_recognises_its_settings(scale: int, direct_upsampler: bool) -> None:
    settings = {**SMALL, 'n_resblocks': 1, 'kernel_size': 7, 'mlp_ratio': 1.5, 'direct_upsampler': direct_upsampler}
    with torch.device('meta'):
        net = build('ATD', scale, **settings)
        found = recognise(net.state_dict())
        assert found == {'scale': scale, **{key: v for key, v in settings.items() if key != 'category_size'}}
        again = ATD(**found)
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in net.state_dict().items()}


def test_recognises_no_other_network() -> None:
    state = small().state_dict()
    assert recognise(state) is not None
    for name in NETWORKS.keys() - {'ATD', 'ATD-light'}:
        with torch.device('meta'):
            assert recognise(build(name, 2).state_dict()) is None
        assert NETWORKS[name].recognise(state) is None
    assert recognise({}) is None
    assert recognise({key: value for key, value in state.items() if not key.startswith('upsample.')}) is None


def second_atd(**settings: object) -> dict[str, Tensor]:
    """A state dict with the names and shapes of the second ATD."""
    state: dict[str, Tensor] = {}
    with torch.device('meta'):
        for key, value in build('ATD', 2, n_resgroups=1, n_resblocks=2, **settings).state_dict().items():
            if key.endswith('attn_atd.scale'):
                state[key] = torch.empty(1)
            elif not key.endswith(('sigma', 'norm3.weight', 'norm3.bias', 'logit_scale')):
                state[key] = value
        for layer in range(2):
            state[f'layers.0.residual_group.layers.{layer}.fc_td.weight'] = torch.empty(16, 216)
            state[f'layers.0.residual_group.layers.{layer}.fc_td.bias'] = torch.empty(16)
    return state


def test_the_second_atd_is_told_apart() -> None:
    large = second_atd(n_feats=216, n_heads=4, n_tokens=512, reduced_dim=16)
    light = second_atd(n_feats=48, n_heads=3, n_tokens=128, reduced_dim=12, direct_upsampler=True)
    for state in (large, light):
        assert recognise_v2(state)
        assert recognise(state) is None
        assert not recognise_v2({key: value for key, value in state.items() if 'fc_td' not in key})
    for name in NETWORKS:
        with torch.device('meta'):
            assert not recognise_v2(build(name, 2).state_dict())
    with torch.device('meta'):  # the first ATD in sizes of the second
        first = build('ATD', 2, n_feats=48, n_heads=3, n_tokens=128, reduced_dim=12, direct_upsampler=True)
    assert not recognise_v2(first.state_dict())
    assert not recognise_v2({})
