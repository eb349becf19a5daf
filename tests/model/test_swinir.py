import numpy as np
import pytest
import torch
from torch import Tensor, nn

from error import UserError
from model import NETWORKS, build
from model.blocks.windows import relative_positions, window_attention, window_partition
from model.swinir import Layer, SwinIR, nominal_masks, recognise

SMALL = {'n_feats': 12, 'n_resgroups': 2, 'n_resblocks': 2, 'n_heads': 3, 'window_size': 4}


def small(**settings: object) -> nn.Module:
    """A small SwinIR in double precision, so that rounding decides nothing."""
    torch.manual_seed(0)
    return build('SwinIR-light', 2, **{**SMALL, **settings}).double()


def images(*shape: int) -> Tensor:
    return torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


# Attention within windows, against plain loops over pixels.


def neighbours(y: int, x: int, height: int, width: int, size: int, shift: int) -> list[tuple[int, int]]:
    """Pixels that (y, x) attends to: of its window, without those that come from the opposite border of the image."""

    def same(a: int, b: int, side: int) -> bool:
        return (a - shift) % side // size == (b - shift) % side // size and (a < shift) == (b < shift)

    return [(i, j) for i in range(height) for j in range(width) if same(y, i, height) and same(x, j, width)]


def plain_window_attention(qkv: np.ndarray, table: np.ndarray, size: int, shift: int) -> np.ndarray:
    """(H, W, 3 * C) and a position table ((2 * size - 1)^2, heads) to (H, W, C)."""
    height, width, channels = qkv.shape
    heads = table.shape[1]
    d = channels // 3 // heads
    q, k, v = qkv.reshape(height, width, 3, heads, d).transpose(2, 3, 0, 1, 4)
    out = np.zeros((height, width, heads, d))
    for y in range(height):
        for x in range(width):
            keys = neighbours(y, x, height, width, size, shift)
            for head in range(heads):
                logits = [
                    q[head, y, x] @ k[head, i, j] / d**0.5
                    + table[(y - i + size - 1) * (2 * size - 1) + (x - j + size - 1), head]
                    for i, j in keys
                ]
                weights = np.exp(logits) / np.exp(logits).sum()
                out[y, x, head] = sum(w * v[head, i, j] for w, (i, j) in zip(weights, keys, strict=True))
    return out.reshape(height, width, -1)


@pytest.mark.parametrize('shift', [0, 2])
# One window, one row, one column of windows, and all four kinds of them, some more than once.
@pytest.mark.parametrize('size', [(4, 4), (4, 12), (8, 4), (12, 8)])
def test_window_attention_equals_plain_loops(size: tuple[int, int], shift: int) -> None:
    torch.manual_seed(0)
    qkv = torch.randn(2, *size, 18, dtype=torch.float64)
    table = torch.randn(49, 3, dtype=torch.float64)
    windows = window_partition(qkv.permute(0, 3, 1, 2), 4, shift)
    out = window_attention(qkv.flatten(1, 2), table, relative_positions(4), windows)
    for image in range(2):
        plain = plain_window_attention(qkv[image].numpy(), table.numpy(), 4, shift)
        assert np.abs(out[image].numpy().reshape(plain.shape) - plain).max() < 1e-12


def test_relative_positions_by_hand() -> None:
    # A window of 2x2, query minus key; rows and columns of the table are -1, 0, 1.
    expected = [[4, 3, 1, 0], [5, 4, 2, 1], [7, 6, 4, 3], [8, 7, 5, 4]]
    assert relative_positions(2).tolist() == expected


def test_every_second_layer_of_a_block_is_shifted() -> None:
    net = small(n_resblocks=3).eval()
    firsts = []
    for layer in net.modules():
        if isinstance(layer, Layer):
            layer.register_forward_pre_hook(lambda module, given: firsts.append(given[1].order[0].item()))
    net(images(1, 3, 8, 12))
    # The pixel that the first window starts with: (0, 0), or (2, 2) after a shift by half a window.
    assert firsts == [0, 2 * 12 + 2, 0, 0, 2 * 12 + 2, 0]


# Sizes and the masks in the weights.


@pytest.mark.parametrize('size', [(1, 1), (1, 7), (3, 5), (8, 9)])
@torch.no_grad()
def test_pads_by_the_mirror_image_and_only_where_needed(size: tuple[int, int]) -> None:
    net = small().eval()
    x = images(1, 3, *size)
    padding = ((0, 0), (0, 0), *((0, -side % 4) for side in size))
    padded = torch.from_numpy(np.pad(x.numpy(), padding, mode='symmetric'))
    assert torch.allclose(net(x), net(padded)[..., : 2 * size[0], : 2 * size[1]], rtol=0, atol=1e-12)


def test_the_stored_masks_are_those_of_the_nominal_input() -> None:
    masks = nominal_masks(8)
    assert masks.shape == (64, 64, 64)
    for window in (0, 6, 7, 13, 55, 56, 62, 63):
        for query in (0, 3, 4, 35, 36, 63):
            y, x = window // 8 * 8 + query // 8, window % 8 * 8 + query % 8
            inside = {
                ((i - 4) % 64 % 8) * 8 + (j - 4) % 64 % 8
                for i, j in neighbours((y + 4) % 64, (x + 4) % 64, 64, 64, 8, 4)
            }
            expected = [0.0 if key in inside else -100.0 for key in range(64)]
            assert masks[window, query].tolist() == expected


@torch.no_grad()
def test_the_stored_masks_are_never_read() -> None:
    net = small().eval()
    x = images(1, 3, 64, 64)
    before = net(x)
    for key, buffer in net.named_buffers():
        if key.endswith('attn_mask'):
            buffer.fill_(torch.nan)
    assert torch.equal(net(x), before)


# Stochastic depth.


def test_stochastic_depth_rises_linearly() -> None:
    rates = [m.drop_path for m in SwinIR(2).modules() if isinstance(m, Layer)]
    assert rates == pytest.approx([0.1 * i / 23 for i in range(24)])


def test_stochastic_depth_leaves_out_whole_images_in_training_only() -> None:
    layer = Layer(4, 2, 4, 8, drop_path=0.25, shifted=False).double()
    x, result = images(4000, 2, 4), images(4000, 2, 4) + 1

    def branch(plus: Tensor | None) -> Tensor:
        return result if plus is None else plus + result

    assert torch.equal(layer.eval().add(x, branch), x + result)
    torch.manual_seed(0)
    out = layer.train().add(x, branch)
    kept = out[:, 0, 0] > x[:, 0, 0]
    assert 0.72 < kept.double().mean() < 0.78
    assert torch.allclose(out, x + result / 0.75 * kept.view(-1, 1, 1))
    torch.manual_seed(0)
    assert torch.equal(layer.add(x, branch), out)  # drawn from the global generator


def test_a_dropped_branch_leaves_its_input() -> None:
    layer = Layer(12, 3, 4, 24, drop_path=0.9, shifted=False).double().train()
    x = images(40, 16, 12)
    torch.manual_seed(0)
    out = layer(x, window_partition(torch.empty(40, 12, 4, 4), 4, 0))
    same = (out == x).all(-1).all(-1)
    assert 20 < same.sum() < 40  # both branches dropped: 0.81 of the images


def test_without_stochastic_depth_training_equals_evaluation() -> None:
    net = small(drop_path=0.0)
    x = images(2, 3, 5, 6)
    assert torch.equal(net.train()(x), net.eval()(x))


# Training, settings, weights.


def test_gradients_reach_every_parameter() -> None:
    net = small(drop_path=0.0).train()
    net(images(2, 3, 9, 10)).abs().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in net.parameters())


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'n_heads': 5}, '--n_heads 5 does not divide --n_feats 12'),
        ({'drop_path': 1.0}, '--drop_path 1.0 is a probability'),
        ({'drop_path': -0.1}, '--drop_path -0.1 is a probability'),
    ],
)
def test_refuses_what_cannot_be(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        small(**settings)


@pytest.mark.parametrize('window_size', [4, 7, 16])
@pytest.mark.parametrize('scale', [2, 3, 4])
def test_recognises_its_settings(scale: int, window_size: int) -> None:
    settings = {'n_feats': 20, 'n_resgroups': 3, 'n_resblocks': 1, 'n_heads': 5, 'mlp_ratio': 1.5}
    with torch.device('meta'):
        net = build('SwinIR-light', scale, window_size=window_size, **settings)
        found = recognise(net.state_dict())
        assert found == {'scale': scale, 'window_size': window_size, **settings}
        again = SwinIR(**found)
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in net.state_dict().items()}


def test_recognises_no_other_network() -> None:
    state = small().state_dict()
    assert recognise(state) is not None
    for name in NETWORKS.keys() - {'SwinIR-light'}:
        with torch.device('meta'):
            assert recognise(build(name, 2).state_dict()) is None
        assert NETWORKS[name].recognise(state) is None
    assert recognise({}) is None
    assert recognise({key: value for key, value in state.items() if not key.startswith('upsample.')}) is None
    assert recognise({**state, 'conv_last.weight': torch.empty(3, 64, 3, 3)}) is None  # the classical SwinIR
