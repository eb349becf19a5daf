import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from error import UserError
from model import build, find
from model.nlsn import SparseAttention, buckets, n_buckets

# The directions of an attention are a multiple of 16 numbers; only then PyTorch draws the same ones for all attentions
# at once and for one after the other.
SMALL = {'n_resblocks': 9, 'n_feats': 8, 'reduction': 2, 'chunk_size': 8, 'n_hashes': 4}
MEAN = {f'{mean}_mean.{kind}' for mean in ('sub', 'add') for kind in ('weight', 'bias')}


def small(**settings: object) -> nn.Module:
    """A small NLSN in double precision, so that rounding decides nothing."""
    torch.manual_seed(0)
    net = build('NLSN', 2, **{**SMALL, **settings}).double()
    for module in net.modules():
        if isinstance(module, SparseAttention):
            module.conv_match[0].weight.data *= 8  # long queries, so that rounds differ in score
    return net


def images(*shape: int) -> Tensor:
    return torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


# The attention, against plain loops over pixels.


def plain_round(e: np.ndarray, directions: np.ndarray, size: int) -> list[tuple[list[int], np.ndarray, float]]:
    """One round of hashing: each pixel's key pixels, their weights, and the pixel's score."""
    length = len(e)
    codes = [int(np.argmax([*(pixel @ directions), *(-pixel @ directions)])) for pixel in e]
    order = sorted(range(length), key=lambda i: codes[i])
    missing = -length % size
    order += (order * size)[-missing:] if missing else []
    windows = [order[i : i + size] for i in range(0, len(order), size)]
    found: dict[int, tuple[list[int], np.ndarray, float]] = {}
    for i, window in enumerate(windows):
        keys = window + windows[i - 1] + windows[(i + 1) % len(windows)]
        for query in window:
            if query not in found:  # otherwise an appended copy
                logits = np.array([e[query] @ e[key] / max(np.linalg.norm(e[key]), 5e-5) for key in keys])
                score = float(np.log(np.exp(logits).sum()))
                found[query] = keys, np.exp(logits - score), score
    return [found[i] for i in range(length)]


def plain_attention(x: Tensor, state: dict[str, Tensor], name: str, directions: Tensor, size: int) -> Tensor:
    """What the attention finds for one image (C, H, W), all in loops; directions (dim, R, b / 2)."""

    def tokens(layer: str) -> np.ndarray:
        weight, bias = state[f'{name}.{layer}.0.weight'], state[f'{name}.{layer}.0.bias']
        y = F.conv2d(x[None], weight, bias, padding=weight.shape[-1] // 2)[0]
        return np.array([y[:, i, j].tolist() for i in range(y.shape[1]) for j in range(y.shape[2])])

    e, values = tokens('conv_match'), tokens('conv_assembly')
    rounds = [plain_round(e, directions[:, r].double().numpy(), size) for r in range(directions.shape[1])]
    out = np.zeros_like(values)
    for i in range(len(values)):
        scores = np.exp([pixels[i][2] for pixels in rounds])
        for pixels, share in zip(rounds, scores / scores.sum(), strict=True):
            keys, weights, _ = pixels[i]
            out[i] += share * (weights @ values[keys])
    return torch.from_numpy(out.T.reshape(x.shape))


def plain_nlsn(state: dict[str, Tensor], x: Tensor, res_scale: float) -> Tensor:
    """The small NLSN for one image (3, H, W): nine blocks, attention before the first and after the eighth."""

    def conv(x: Tensor, name: str) -> Tensor:
        weight = state[f'{name}.weight']
        return F.conv2d(x[None], weight, state[f'{name}.bias'], padding=weight.shape[-1] // 2)[0]

    length, size = x.shape[1] * x.shape[2], SMALL['chunk_size']
    half = max(math.ceil(length // size / 2), 1)
    generator = torch.Generator().manual_seed(0)
    head = x = conv(conv(x, 'sub_mean'), 'head.0')
    for i in range(11):
        if i in (0, 9):
            directions = torch.randn(1, 4, 4, half, generator=generator)[0]
            x = x + res_scale * plain_attention(x, state, f'body.{i}', directions, size)
        else:
            x = x + res_scale * conv(conv(x, f'body.{i}.body.0').relu(), f'body.{i}.body.2')
    x = conv(x, 'body.11') + head
    x = F.pixel_shuffle(conv(x, 'tail.0.0')[None], 2)[0]
    return conv(conv(x, 'tail.1'), 'add_mean')


# Five windows of which the last is filled up, two full ones, a single one, and fewer pixels than half a window.
@pytest.mark.parametrize('size', [(5, 7), (4, 4), (2, 4), (1, 3), (1, 1)])
@torch.no_grad()
def test_equals_plain_loops(size: tuple[int, int]) -> None:
    net = small(res_scale=0.5).eval()
    x = images(2, 3, *size)
    y = net(x)
    for image, result in zip(x, y, strict=True):
        assert torch.allclose(result, plain_nlsn(net.state_dict(), image, 0.5), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ('length', 'expected'),
    [(1, 2), (143, 2), (287, 2), (288, 2), (431, 2), (432, 4), (575, 4), (720, 6), (126 * 144, 126), (127 * 144, 128)],
)
def test_one_bucket_a_window_rounded_up_to_even(length: int, expected: int) -> None:
    assert n_buckets(length, 144) == expected


def test_never_more_than_128_buckets() -> None:
    assert n_buckets(1_000_000, 144) == 128
    net = small(chunk_size=1)
    assert net.eval().directions(images(1, 3, 20, 20)).shape == (2, 4, 4, 64)


def test_buckets_are_those_of_float32_under_autocast() -> None:
    torch.manual_seed(0)
    embedding, directions = torch.randn(1, 500, 4), torch.randn(4, 2, 8)
    with torch.autocast('cpu', torch.bfloat16):
        codes = buckets(embedding, directions)
        narrow = torch.einsum('nlc,crb->nrlb', embedding, directions)
    assert torch.equal(codes, buckets(embedding, directions))
    assert not torch.equal(codes, torch.cat((narrow, -narrow), -1).argmax(-1))  # what the cast is for


@pytest.mark.parametrize(
    ('n_resblocks', 'positions'), [(1, [0]), (7, [0]), (8, [0, 9]), (10, [0, 9]), (16, [0, 9, 18]), (17, [0, 9, 18])]
)
def test_attention_before_the_first_and_after_every_eighth_block(n_resblocks: int, positions: list[int]) -> None:
    net = small(n_resblocks=n_resblocks)
    assert [i for i, module in enumerate(net.body) if isinstance(module, SparseAttention)] == positions
    assert len(net.body) == n_resblocks + len(positions) + 1
    assert len(net.eval().directions(images(1, 3, 6, 7))) == len(positions)


# The random directions.


def test_the_paper_network_draws_what_the_official_code_draws() -> None:
    with torch.device('meta'):
        net = build('NLSN', 4).eval()
    generator = torch.Generator().manual_seed(0)
    expected = torch.stack([torch.randn(1, 64, 4, 2, generator=generator)[0] for _ in range(5)])
    assert torch.equal(net.directions(torch.empty(1, 3, 24, 20)), expected)
    torch.manual_seed(0)
    assert torch.equal(net.train().directions(torch.empty(1, 3, 24, 20)), expected)


@torch.no_grad()
def test_evaluation_leaves_the_random_numbers_alone_and_training_draws_afresh() -> None:
    net, x = small(), images(1, 3, 9, 9)
    state = torch.get_rng_state()
    assert torch.equal(net.eval()(x), net(x))
    assert torch.equal(state, torch.get_rng_state())
    first, second = net.train()(x), net(x)
    assert not torch.equal(first, second)
    torch.set_rng_state(state)
    assert torch.equal(net(x), first)


# Settings and weights.


@torch.no_grad()
def test_settings_reach_the_blocks() -> None:
    net = small(act='leaky_relu', dilation=True, res_scale=0.3)
    assert isinstance(net.body[1].body[1], nn.LeakyReLU)
    assert net.body[1].body[0].dilation == net.body[1].body[2].dilation == (2, 2)
    assert net.body[1].res_scale == net.body[0].res_scale == 0.3


def test_gradients_reach_everything_but_the_mean_colour() -> None:
    net = small().train()
    net(images(2, 3, 6, 7)).abs().mean().backward()
    assert {key for key, p in net.named_parameters() if p.grad is None} == MEAN
    assert all(p.grad.abs().max() > 0 for key, p in net.named_parameters() if key not in MEAN)


def test_reduction_divides_the_features() -> None:
    with pytest.raises(UserError, match=r'--reduction 3 does not divide --n_feats 8: choose a divisor\.'):
        small(reduction=3)


def test_images_of_other_channels_are_refused() -> None:
    for n_colors, other in ((3, 1), (1, 3)):
        with pytest.raises(UserError, match=f'images of {n_colors} channels'):
            small(n_colors=n_colors)(images(1, other, 4, 4))


@pytest.mark.parametrize('scale', [2, 3, 4, 8])
@pytest.mark.parametrize(
    'settings',
    [
        {},
        {'n_resblocks': 16, 'n_feats': 6, 'reduction': 3, 'rgb_range': 255},
        {'act': 'prelu', 'n_colors': 1, 'n_resblocks': 1},
        {'shift_mean': False},
    ],
)
def test_weights_show_their_settings(scale: int, settings: dict[str, object]) -> None:
    settings = {'n_resblocks': 9, 'n_feats': 8, 'reduction': 2, **settings}
    found = find('NLSN').recognise(build('NLSN', scale, **settings).state_dict())
    shown = {'shift_mean': True, 'n_colors': 3, 'rgb_range': 1, **settings, 'scale': scale}
    if not shown['shift_mean']:
        del shown['rgb_range']
    assert found == shown


def test_other_weights_are_not_recognised() -> None:
    recognise = find('NLSN').recognise
    blocks = {'n_resblocks': 1, 'n_feats': 8}
    others = [
        build('EDSR', 2, **blocks),
        build('RCAN', 2, n_resgroups=1, reduction=2, **blocks),
        build('LCoAN', 2, n_resgroups=1, **blocks),
    ]
    assert all(recognise(net.state_dict()) is None for net in others)
    assert recognise({}) is None
    state = small().state_dict()
    for key in state:  # parts of its own: whatever comes, no exception
        recognise({key: state[key]})
        recognise({other: value for other, value in state.items() if other != key})
