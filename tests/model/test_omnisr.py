"""OmniSR, and the blocks in model.blocks that it shares with ASID, against plain loops over pixels."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from error import UserError
from model import NETWORKS, build
from model.blocks.pixels import ESA, ChannelAttention, GatedFFN, LayerNorm2d, LocalBlock
from model.common import zero_pad
from model.omnisr import WindowAttention, recognise
from tests.conftest import some_norm

SMALL = {'n_resgroups': 2, 'n_feats': 8, 'n_heads': 2, 'window_size': 4}
Pixel = tuple[int, int]


def small(scale: int = 2, **settings: int) -> nn.Module:
    torch.manual_seed(0)
    return build('OmniSR', scale, **{**SMALL, **settings}).double()


def images(*shape: int) -> Tensor:
    return torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 2 - 1


def pixels(height: int, width: int) -> list[Pixel]:
    return [(i, j) for i in range(height) for j in range(width)]


def pointwise(x: np.ndarray, weight: Tensor) -> np.ndarray:
    """A matrix (out, in, ...) times every pixel of (H, W, in)."""
    return x @ weight.flatten(1).T.numpy()


def channels_last(x: Tensor) -> np.ndarray:
    return x.movedim(-3, -1).numpy()


def channels_first(x: np.ndarray) -> Tensor:
    return torch.from_numpy(x).movedim(-1, -3)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


# Attention between pixels.


@pytest.mark.parametrize('strided', [False, True])
@torch.no_grad()
def test_window_attention_equals_plain_loops(strided: bool) -> None:
    size, height, width, heads, dim = 4, 8, 12, 2, 3
    torch.manual_seed(0)
    layer = WindowAttention(heads * dim, heads, size, strided).double()
    layer.to_qkv.weight *= 3  # a softmax far from uniform
    table = layer.rel_pos_bias.weight.numpy()
    steps = (height // size, width // size)

    def group(pixel: Pixel) -> Pixel:
        return (pixel[0] % steps[0], pixel[1] % steps[1]) if strided else (pixel[0] // size, pixel[1] // size)

    def place(pixel: Pixel) -> Pixel:
        return (pixel[0] // steps[0], pixel[1] // steps[1]) if strided else (pixel[0] % size, pixel[1] % size)

    norm, x = some_norm(heads * dim), images(2, heads * dim, height, width)
    out = channels_last(layer(x, norm) - x)
    for image, found in zip(channels_last(norm(x)), out, strict=True):
        qkv = pointwise(image, layer.to_qkv.weight).reshape(height, width, 3, heads, dim)
        mixed = np.zeros((height, width, heads, dim))
        for query in pixels(height, width):
            keys = [key for key in pixels(height, width) if group(key) == group(query)]
            assert len(keys) == size**2
            for head in range(heads):
                logits = []
                for key in keys:
                    down, right = (a - b + size - 1 for a, b in zip(place(query), place(key), strict=True))
                    product = qkv[query][0, head] @ qkv[key][1, head]
                    logits.append(product / math.sqrt(dim) + table[down * (2 * size - 1) + right, head])
                weights = softmax(np.array(logits))
                mixed[query][head] = sum(w * qkv[key][2, head] for w, key in zip(weights, keys, strict=True))
        expected = pointwise(mixed.reshape(height, width, -1), layer.to_out[0].weight)
        assert np.abs(found - expected).max() < 1e-12


# Attention between channels.


@pytest.mark.parametrize('heads', [1, 2])
@pytest.mark.parametrize('strided', [False, True])
@torch.no_grad()
def test_channel_attention_equals_plain_loops(strided: bool, heads: int) -> None:
    size, height, width, channels = 4, 8, 12, 6
    torch.manual_seed(0)
    layer = ChannelAttention(channels, heads, size, strided).double()
    layer.temperature.copy_(torch.arange(1, heads + 1).view(-1, 1, 1) * 3)
    norm, x = some_norm(channels), images(2, channels, height, width)
    out = channels_last(layer(x, norm) - x)
    for image, found in zip(channels_last(norm(x)), out, strict=True):
        qkv = channels_first(pointwise(image, layer.qkv.weight))
        qkv = channels_last(F.conv2d(qkv, layer.qkv_dwconv.weight, padding=1, groups=3 * channels))
        mixed = np.zeros((height, width, heads, channels // heads))
        groups: dict[Pixel, list[Pixel]] = {}
        for i, j in pixels(height, width):
            groups.setdefault((i % size, j % size) if strided else (i // size, j // size), []).append((i, j))
        for members in groups.values():
            tokens = np.array([qkv[pixel] for pixel in members]).reshape(len(members), 3, heads, -1)
            for head in range(heads):
                q, k, v = (tokens[:, part, head].T for part in range(3))
                q, k = (a / np.linalg.norm(a, axis=1, keepdims=True) for a in (q, k))
                result = softmax(q @ k.T * layer.temperature[head].item()) @ v
                for pixel, values in zip(members, result.T, strict=True):
                    mixed[pixel][head] = values
        expected = pointwise(mixed.reshape(height, width, -1), layer.project_out.weight)
        assert np.abs(found - expected).max() < 1e-12


def test_channel_attention_survives_a_blank_image() -> None:
    layer, x = ChannelAttention(8, 2, 4, strided=True), torch.zeros(1, 8, 4, 4, requires_grad=True)
    y = layer(x, LayerNorm2d(8, 1e-5))
    assert torch.equal(y, torch.zeros(1, 8, 4, 4))
    y.sum().backward()
    assert x.grad.isfinite().all()


# The other blocks.


@pytest.mark.parametrize('eps', [1e-5, 0.1])
@torch.no_grad()
def test_pixel_norm(eps: float) -> None:
    norm, x = LayerNorm2d(5, eps).double(), images(2, 5, 3, 4)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    out = norm(x)
    assert out.is_contiguous(memory_format=torch.channels_last)
    for pixel, found in zip(channels_last(x).reshape(-1, 5), channels_last(out).reshape(-1, 5), strict=True):
        unit = (pixel - pixel.mean()) / np.sqrt(pixel.var() + eps)
        assert np.abs(found - unit * norm.weight.numpy() - norm.bias.numpy()).max() < 1e-12


@torch.no_grad()
def test_feed_forward_is_the_same_in_either_memory() -> None:
    torch.manual_seed(0)
    layer, norm, x = GatedFFN(6, 6).double(), some_norm(6), images(2, 6, 5, 7)
    other = x.contiguous(memory_format=torch.channels_last)
    assert torch.allclose(layer(x, norm), layer(other, norm), rtol=0, atol=1e-14)


def gelu(x: np.ndarray) -> np.ndarray:
    return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


@torch.no_grad()
def test_local_block_gates_its_channels_by_their_means() -> None:
    torch.manual_seed(0)
    block, x = LocalBlock(8).double(), images(2, 8, 5, 6)
    out = channels_last(block(x))
    first, _, depthwise, _, excitation, last = block.fn
    for image, found in zip(channels_last(x), out, strict=True):
        y = channels_first(gelu(pointwise(image, first.weight) + first.bias.numpy()))
        y = gelu(channels_last(F.conv2d(y, depthwise.weight, depthwise.bias, padding=1, groups=8)))
        hidden = excitation.gate[1].weight.numpy() @ y.mean((0, 1))
        assert hidden.shape == (2,)
        factor = sigmoid(excitation.gate[3].weight.numpy() @ (hidden * sigmoid(hidden)))
        y = pointwise(y * factor, last.weight) + last.bias.numpy()
        assert np.abs(found - image - y).max() < 1e-12


def enlarged(low: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear interpolation between pixel centres, edges repeated: (h, w, C) to (height, width, C)."""
    out = np.zeros((height, width, low.shape[-1]))
    for pixel in pixels(height, width):
        for corner in pixels(2, 2):
            index, share = [], 1.0
            for i, size, old, step in zip(pixel, (height, width), low.shape[:2], corner, strict=True):
                position = min(max((i + 0.5) * old / size - 0.5, 0), old - 1)
                index.append(min(int(position) + step, old - 1))
                share *= position % 1 if step else 1 - position % 1
            out[pixel] += share * low[tuple(index)]
    return out


@pytest.mark.parametrize('size', [(ESA.AT_LEAST, ESA.AT_LEAST), (33, 27)])
@torch.no_grad()
def test_spatial_gate(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    gate, x = ESA(8).double(), images(2, 8, *size)
    skip = gate.conv1(x)
    strided = channels_last(F.conv2d(skip, gate.conv2.weight, gate.conv2.bias, stride=2))[1]
    rows, columns = ((n - 7) // 3 + 1 for n in strided.shape[:2])
    pooled = [[strided[3 * i : 3 * i + 7, 3 * j : 3 * j + 7].max((0, 1)) for j in range(columns)] for i in range(rows)]
    low = channels_last(gate.conv3(channels_first(np.array(pooled)).unsqueeze(0))[0])
    logits = gate.conv4(channels_first(enlarged(low, *size)) + gate.conv_f(skip)[1:])[0]
    assert torch.allclose(gate(x)[1], x[1] / (1 + (-logits).exp()), rtol=0, atol=1e-12)


def test_spatial_gate_has_sixteen_channels_or_a_quarter() -> None:
    assert [len(ESA(n).conv1.weight) for n in (8, 48, 64, 128)] == [16, 16, 16, 32]


# The network.


@pytest.mark.parametrize(
    ('size', 'padded'), [((1, 1), (16, 16)), ((16, 9), (16, 16)), ((17, 20), (20, 20)), ((3, 21), (16, 24))]
)
@torch.no_grad()
def test_pads_with_zeros(size: tuple[int, int], padded: tuple[int, int]) -> None:
    x = images(2, 3, *size)
    grown = torch.zeros(2, 3, *padded, dtype=x.dtype)
    grown[..., : size[0], : size[1]] = x
    assert torch.equal(zero_pad(x, 4, ESA.AT_LEAST), grown)
    net = small().eval()
    assert torch.allclose(net(x), net(grown)[..., : 2 * size[0], : 2 * size[1]], rtol=0, atol=1e-12)


def test_gradients_reach_every_parameter() -> None:
    net = small()
    net(images(2, 3, 17, 20)).abs().mean().backward()
    assert [key for key, p in net.named_parameters() if p.grad is None or not p.grad.abs().max() > 0] == []


def test_heads_divide_the_channels() -> None:
    with pytest.raises(UserError, match='--n_heads 5 does not divide --n_feats 64: choose a divisor'):
        build('OmniSR', 2, n_heads=5)


@pytest.mark.parametrize(
    ('scale', 'settings'),
    [(2, {}), (3, SMALL), (4, {'n_resgroups': 11, 'n_feats': 12, 'n_heads': 3, 'window_size': 5}), (2, {'n_heads': 1})],
)
def test_recognises_its_weights(scale: int, settings: dict[str, int]) -> None:
    with torch.device('meta'):
        state = build('OmniSR', scale, **settings).state_dict()
    defaults = {'n_feats': 64, 'n_resgroups': 5, 'n_heads': 4, 'window_size': 8}
    assert recognise(state) == {'scale': scale, **defaults, **settings}


def test_recognises_no_other_weights() -> None:
    with torch.device('meta'):
        for name in NETWORKS:
            if name != 'OmniSR':
                assert recognise(build(name, 2).state_dict()) is None
        state = build('OmniSR', 2).state_dict()
    assert recognise({}) is None
    assert recognise({key: state[key] for key in state if not key.startswith('up.')}) is None
    assert recognise({key: state[key] for key in state if 'rel_pos_bias' not in key}) is None
