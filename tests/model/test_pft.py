import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from error import UserError
from model import NETWORKS, build
from model.blocks.windows import relative_positions, window_partition
from model.ops import progressive_attention
from model.ops.progressive_attention import Whole
from model.pft import PFT, Layer, WindowAttention, recognise
from tests.conftest import kept_for_gradients, numbers

SMALL = {
    'n_feats': 8,
    'depths': '2-2-2',
    'topk': '16-6-3',
    'n_heads': 2,
    'window_size': 4,
    'kernel_size': 3,
    'mlp_ratio': 1.5,
}


def small(**settings: object) -> nn.Module:
    """A small PFT in double precision, so that rounding decides nothing."""
    torch.manual_seed(0)
    return build('PFT-light', 2, **{**SMALL, **settings}).double()


def images(*shape: int) -> Tensor:
    return torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


# The attention, against the maps themselves, window by window and head by head.

CHANNELS, HEADS, SIZE, HEIGHT, WIDTH = 6, 2, 4, 8, 12


def attentions(topk: tuple[int, ...]) -> list[WindowAttention]:
    """Layers with the same windows, far from their initial values, whose results are not projected."""
    torch.manual_seed(0)
    layers = [WindowAttention(CHANNELS, HEADS, SIZE, count).double() for count in topk]
    for layer in layers:
        nn.init.normal_(layer.relative_position_bias_table)
        nn.init.eye_(layer.proj.weight)
        nn.init.zeros_(layer.proj.bias)
    return layers


def plain(layers: list[WindowAttention], qkvs: list[Tensor], shift: int) -> list[Tensor]:
    """As the official code multiplies maps: image (1, H * W, 3 * C) of each layer to (1, H * W, C).

    The image is rolled and cut as it is, each window's mask is made from where its pixels were, a map is a full matrix.
    """
    place = torch.arange(HEIGHT * WIDTH).view(HEIGHT, WIDTH).roll((-shift, -shift), (0, 1))
    results = [torch.zeros(HEIGHT * WIDTH, CHANNELS, dtype=torch.float64) for _ in layers]
    for top in range(0, HEIGHT, SIZE):
        for left in range(0, WIDTH, SIZE):
            pixels = place[top : top + SIZE, left : left + SIZE].flatten()
            y, x = pixels // WIDTH, pixels % WIDTH
            dy, dx = (torch.arange(SIZE**2) // SIZE, torch.arange(SIZE**2) % SIZE)
            index = (dy[:, None] - dy + SIZE - 1) * (2 * SIZE - 1) + dx[:, None] - dx + SIZE - 1
            # After a roll pixels are apart if another edge of the image lies between them than between neighbours.
            apart = ((y[:, None] - y).abs() >= SIZE) | ((x[:, None] - x).abs() >= SIZE)
            for head in range(HEADS):
                d, before, kept = CHANNELS // HEADS, None, torch.ones(SIZE**2, SIZE**2, dtype=torch.bool)
                for layer, qkv, result in zip(layers, qkvs, results, strict=True):
                    q, k, v = qkv[0, pixels].view(-1, 3, HEADS, d)[:, :, head].unbind(1)
                    logits = q @ k.T / d**0.5 + layer.relative_position_bias_table[:, 0][index]
                    if kept.all():
                        logits = logits - 100 * apart
                    weights = logits.masked_fill(~kept, -torch.inf).softmax(-1)
                    if before is not None:
                        weights = weights * before
                        weights = kept * (weights + 1e-20) / (weights.sum(-1, keepdim=True) + 1e-20)
                    if layer.topk < kept.sum(-1)[0]:
                        chosen = weights.masked_fill(~kept, -1).topk(layer.topk)[1]
                        kept = torch.zeros_like(kept).scatter(1, chosen, True)
                        weights = weights * kept
                    before = weights
                    result[pixels, head * d : (head + 1) * d] += weights @ v
    return results


@pytest.mark.parametrize('at_once', [1, 2**22])
@pytest.mark.parametrize('shift', [0, 2])
@pytest.mark.parametrize('topk', [(16, 16, 9, 9, 4, 4), (99, 99, 5), (6, 6, 2, 6), (3,), (16,)])
def test_maps_are_multiplied_and_narrowed(topk: tuple[int, ...], shift: int, at_once: int, monkeypatch) -> None:
    """Results, and gradients, which go through all the maps before."""
    monkeypatch.setattr(progressive_attention, 'AT_ONCE_CPU', at_once)
    layers, positions = attentions(topk), relative_positions(SIZE)
    windows = window_partition(numbers(1, 1, HEIGHT, WIDTH), SIZE, shift)
    lepe = torch.zeros(1, HEIGHT * WIDTH, CHANNELS, dtype=torch.float64)

    def run(qkvs: list[Tensor]) -> list[Tensor]:
        results, focus = [], None
        for layer, qkv in zip(layers, qkvs, strict=True):
            result, focus = layer(qkv, lepe, positions, windows, focus)
            results.append(result[0])
        return results

    qkvs = [numbers(1, HEIGHT * WIDTH, 3 * CHANNELS, seed=i) for i in range(len(topk))]
    leaves = [*[qkv.requires_grad_() for qkv in qkvs], *[layer.relative_position_bias_table for layer in layers]]
    found, truth = run(qkvs), plain(layers, qkvs, shift)
    with torch.no_grad():
        found_without = run(qkvs)
    for one, other, without in zip(found, truth, found_without, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-10)
        assert torch.allclose(without, other, rtol=0, atol=1e-10)
    seed = numbers(HEIGHT * WIDTH, CHANNELS, seed=99)
    gradients = (torch.autograd.grad((result[-1] * seed).sum(), leaves, allow_unused=True) for result in (found, truth))
    for one, other in zip(*gradients, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.allclose(one, other, rtol=0, atol=1e-9)


def test_what_is_added_before_the_projection() -> None:
    (layer,) = attentions((16,))
    windows = window_partition(numbers(1, 1, HEIGHT, WIDTH), SIZE, 2)
    qkv, lepe = numbers(1, HEIGHT * WIDTH, 3 * CHANNELS), numbers(1, HEIGHT * WIDTH, CHANNELS, seed=2)
    none = layer(qkv, torch.zeros_like(lepe), relative_positions(SIZE), windows, None)[0]
    found = layer(qkv, lepe, relative_positions(SIZE), windows, None)[0]
    assert torch.allclose(found, none + F.gelu(lepe), rtol=0, atol=1e-12)


# The network.


def test_only_layers_with_the_same_windows_hand_on_their_maps() -> None:
    net = small().eval()
    seen = []
    for layer in net.modules():
        if isinstance(layer, Layer):
            layer.register_forward_pre_hook(lambda module, given: seen.append((given[4].order[0].item(), given[5])))
            layer.register_forward_hook(lambda module, given, result: seen.append(result[1]))
    net(images(1, 3, 8, 12))
    given, made = seen[::2], seen[1::2]
    # The pixel that the first window starts with: (0, 0), or (2, 2) after a shift by half a window.
    assert [first for first, _ in given] == [0, 2 * 12 + 2] * 3
    assert [focus for _, focus in given[:2]] == [None, None]
    assert all(focus is made[i] for i, (_, focus) in enumerate(given[2:]))


def test_keys_are_narrowed_block_by_block() -> None:
    net = small().eval()
    widths = []
    for layer in net.modules():
        if isinstance(layer, Layer):
            layer.register_forward_hook(lambda module, given, result: widths.append(result[1]))
    net(images(1, 3, 8, 12))
    assert [None if isinstance(focus, Whole) else {kept.keys.shape[-1] for kept in focus} for focus in widths] == [
        None, None, {6}, {6}, {3}, {3},
    ]  # fmt: skip
    assert all(kept.keys.dtype is torch.int16 for focus in widths[2:] for kept in focus)


def test_maps_over_all_keys_are_not_kept_for_the_gradients() -> None:
    net = small(depths='4', topk='16')
    kept = kept_for_gradients(lambda: net(images(1, 3, 32, 32)))
    assert max(tensor.numel() for tensor in kept) < 32 * 32 * SMALL['n_heads'] * 16


def test_without_gradients_maps_are_given_up_one_by_one(monkeypatch) -> None:
    """Of several groups of windows, each when what follows from it is made."""
    monkeypatch.setattr(progressive_attention, 'AT_ONCE_CPU', 1)
    left = []
    function = progressive_attention.focused
    windows, positions = window_partition(numbers(1, 1, HEIGHT, WIDTH), SIZE, 0), relative_positions(SIZE)
    qkv, lepe = numbers(1, HEIGHT * WIDTH, 3 * CHANNELS), numbers(1, HEIGHT * WIDTH, CHANNELS)
    first, second = attentions((6, 3))
    for enabled, expected in ((False, [5, 4, 3, 2, 1, 0]), (True, [6] * 6)):
        with torch.set_grad_enabled(enabled):
            _, focus = first(qkv, lepe, positions, windows, None)
            left.clear()
            monkeypatch.setattr(
                progressive_attention, 'focused', lambda *given, kept=focus: left.append(len(kept)) or function(*given)
            )
            second(qkv, lepe, positions, windows, focus)
            monkeypatch.setattr(progressive_attention, 'focused', function)
        assert left == expected


@torch.no_grad()
def test_results_do_not_depend_on_how_many_windows_are_attended_at_once(monkeypatch) -> None:
    net, x = small().eval(), images(2, 3, 15, 22)
    expected = net(x)
    for at_once in (1, 3 * 2 * 16**2):
        monkeypatch.setattr(progressive_attention, 'AT_ONCE_CPU', at_once)
        assert torch.allclose(net(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize('size', [(1, 1), (1, 7), (3, 5), (4, 9)])
@torch.no_grad()
def test_pads_by_the_mirror_image_and_only_where_needed(size: tuple[int, int]) -> None:
    net = small().eval()
    x = images(1, 3, *size)
    padding = ((0, 0), (0, 0), *((0, -side % 4) for side in size))
    padded = torch.from_numpy(np.pad(x.numpy(), padding, mode='symmetric'))
    assert torch.allclose(net(x), net(padded)[..., : 2 * size[0], : 2 * size[1]], rtol=0, atol=1e-12)


def test_maps_keep_their_precision_under_autocast() -> None:
    (layer,) = attentions((5,))
    layer.float()
    windows, qkv = (
        window_partition(numbers(1, 1, HEIGHT, WIDTH).float(), SIZE, 2),
        numbers(1, HEIGHT * WIDTH, 18).float(),
    )
    lepe = torch.zeros(1, HEIGHT * WIDTH, CHANNELS)
    expected = layer(qkv, lepe, relative_positions(SIZE), windows, None)[1]
    with torch.autocast('cpu', torch.bfloat16):
        found = layer(qkv, lepe, relative_positions(SIZE), windows, None)[1]
    assert all(torch.equal(one.logits, other.logits) for one, other in zip(found, expected, strict=True))


def test_starts_as_the_official_network() -> None:
    torch.manual_seed(0)
    layer = build('PFT-light', 2).layers[0].residual_group.layers[0]
    assert layer.wqkv.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert layer.attn_win.relative_position_bias_table.std().item() == pytest.approx(0.02, rel=0.05)
    assert all(bias.abs().max() == 0 for bias in (layer.wqkv.bias, layer.convffn.fc2.bias, layer.attn_win.proj.bias))


# Settings and weights.


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'n_heads': 3}, '--n_heads 3 does not divide --n_feats 8'),
        ({'kernel_size': 4}, '--kernel_size 4 has no pixel in its middle'),
        ({'window_size': 65}, '--window_size 65 makes windows of 65x65 pixels'),
        ({'depths': ''}, '--net depths=: whole numbers from 1 on with a dash between two'),
        ({'topk': '16-0'}, '--net topk=16-0: whole numbers from 1 on with a dash between two'),
    ],
)
def test_refuses_what_cannot_be(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        small(**settings)


@pytest.mark.parametrize('scale', [2, 3, 4])
def test_recognises_its_settings(scale: int) -> None:
    with torch.device('meta'):
        net = build('PFT-light', scale, **SMALL)
        found = recognise(net.state_dict())
        assert found == {'scale': scale, **{key: v for key, v in SMALL.items() if key not in ('topk', 'n_heads')}}
        again = PFT(**found)
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in net.state_dict().items()}


def test_recognises_no_other_network() -> None:
    state = small().state_dict()
    assert recognise(state) is not None
    for name in NETWORKS.keys() - {'PFT-light'}:
        with torch.device('meta'):
            assert recognise(build(name, 2).state_dict()) is None
        assert NETWORKS[name].recognise(state) is None
    assert recognise({}) is None
    assert recognise({key: value for key, value in state.items() if not key.startswith('upsample.')}) is None
