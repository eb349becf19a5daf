import copy
import math
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from error import UserError
from model import NETWORKS, build
from model.esc import (
    ConvAttention,
    FactorisedKernel,
    LargeKernel,
    WindowAttention,
    average_orientations,
    recognise,
    recognise_fp,
)
from tests.conftest import numbers, some_norm

SMALL = {
    'n_feats': 12, 'n_resgroups': 1, 'n_resblocks': 2, 'n_heads': 2, 'window_size': 4, 'kernel_size': 5,
    'kernel_feats': 4,
}  # fmt: skip
NAMES = ['ESC', 'ESC-FP']


def small(name: str, **settings: object) -> nn.Module:
    """A network in which every weight counts."""
    torch.manual_seed(0)
    net = build(name, 2, **{**SMALL, **settings}).double().eval()
    with torch.no_grad():
        for p in net.parameters():
            p += 0.1 * torch.randn_like(p)
    return net


def plain_conv(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """(C, H, W) and (C', C, k, k) to (C', H, W) in loops, zeros outside the image."""
    _, height, width = x.shape
    reach = kernel.shape[-1] // 2
    out = np.zeros((len(kernel), height, width))
    for i, j, dy, dx in product(range(height), range(width), *[range(-reach, reach + 1)] * 2):
        if 0 <= i + dy < height and 0 <= j + dx < width:
            out[:, i, j] += kernel[:, :, dy + reach, dx + reach] @ x[:, i + dy, j + dx]
    return out


def plain_dynamic(x: np.ndarray, layers: nn.Sequential) -> np.ndarray:
    """Depthwise kernels (C, C, 3, 3), zero between different channels, from the means of an image (C, H, W)."""
    _, first, _, last = layers
    hidden = first.weight[:, :, 0, 0].numpy() @ x.mean((1, 2)) + first.bias.numpy()
    hidden = np.array([h * (1 + math.erf(h / math.sqrt(2))) / 2 for h in hidden])
    values = last.weight[:, :, 0, 0].numpy() @ hidden + last.bias.numpy()
    kernel = np.zeros((len(x), len(x), 3, 3))
    for channel, row, column in product(range(len(x)), range(3), range(3)):
        kernel[channel, channel, row, column] = values[channel * 9 + row * 3 + column]
    return kernel


def test_orientations_are_averaged() -> None:
    kernel = numbers(2, 3, 5, 5)
    turned = [np.rot90(k, i, (2, 3)) for k in (kernel.numpy(), kernel.numpy()[..., ::-1]) for i in range(4)]
    np.testing.assert_allclose(average_orientations(kernel).numpy(), np.mean(turned, 0), rtol=0, atol=1e-14)


@torch.no_grad()
def test_large_kernel_equals_plain_loops() -> None:
    torch.manual_seed(0)
    layer, x, kernel = LargeKernel(4).double(), numbers(2, 4, 6, 7), numbers(4, 4, 5, 5, seed=2)
    torch.testing.assert_close(layer(x, kernel), F.conv2d(x, kernel, padding=2))  # the image's own kernels start at 0
    for p in layer.dwc_proj[-1].parameters():
        nn.init.normal_(p)
    found = layer(x, kernel).numpy()
    for image, result in zip(x.numpy(), found, strict=True):
        expected = plain_conv(image, kernel.numpy()) + plain_conv(image, plain_dynamic(image, layer.dwc_proj))
        np.testing.assert_allclose(result, expected, rtol=0, atol=1e-12)


@torch.no_grad()
def test_factorised_kernel_equals_plain_loops() -> None:
    torch.manual_seed(0)
    layer, x = FactorisedKernel(4).double(), numbers(2, 4, 6, 7)
    channel, spatial = numbers(4, 4, 1, 1, seed=2), numbers(4, 1, 5, 5, seed=3)
    found = layer(x, channel, spatial).numpy()
    alone = np.eye(4)[..., None, None] * spatial.numpy()
    for image, result in zip(x.numpy(), found, strict=True):
        mixed = plain_conv(image, channel.numpy())
        expected = plain_conv(mixed, alone) + plain_conv(mixed, plain_dynamic(image, layer.proj))
        np.testing.assert_allclose(result, expected, rtol=0, atol=1e-12)


@torch.no_grad()
def test_first_channels_pass_the_large_kernel() -> None:
    torch.manual_seed(0)
    layer, x, kernel = ConvAttention(6, 4, LargeKernel(4)).double(), numbers(2, 6, 5, 5), numbers(4, 4, 3, 3)
    expected = layer.aggr(torch.cat((layer.plk(x[:, :4], kernel), x[:, 4:]), 1))
    torch.testing.assert_close(layer(x, (kernel,)), expected)


def reflected(i: int, size: int) -> int:
    """Where index `i` lands, one step at a time, turning at the first and the last of `size`."""
    at, step = 0, 1
    for _ in range(i):
        step = -step if not 0 <= at + step < size else step
        at += step if 0 <= at + step < size else 0
    return at


def plain_attention(x: np.ndarray, layer: WindowAttention) -> np.ndarray:
    """Of one image (C, H, W), in loops."""
    size, heads = layer.window_size, layer.n_heads
    channels, height, width = x.shape
    table = layer.relative_position_bias.numpy().reshape(heads, 2 * size - 1, 2 * size - 1)
    weight, bias = layer.to_qkv.weight[:, :, 0, 0].numpy(), layer.to_qkv.bias.numpy()

    def qkv(i: int, j: int) -> np.ndarray:
        return (weight @ x[:, reflected(i, height), reflected(j, width)] + bias).reshape(3, heads, -1)

    out = np.zeros_like(x)
    for i, j in product(range(height), range(width)):
        top, left = i // size * size, j // size * size
        query = qkv(i, j)[0]
        keys = [(a, b) for a in range(top, top + size) for b in range(left, left + size)]
        for head in range(heads):
            logits = [
                query[head] @ qkv(a, b)[1, head] / math.sqrt(channels // heads)
                + table[head, a - i + size - 1, b - j + size - 1]
                for a, b in keys
            ]
            share = np.exp(logits) / np.exp(logits).sum()
            value = sum(s * qkv(a, b)[2, head] for s, (a, b) in zip(share, keys, strict=True))
            out[head * len(value) : (head + 1) * len(value), i, j] = value
    out = np.tensordot(layer.to_out.weight[:, :, 0, 0].numpy(), out, 1)
    return out + layer.to_out.bias.numpy()[:, None, None]


@pytest.mark.parametrize('large', [False, True])  # as windows are attended on a CPU that are small, and that are large
@pytest.mark.parametrize('size', [(6, 5), (1, 2)])
@torch.no_grad()
def test_window_attention_equals_plain_loops(
    size: tuple[int, int], large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if large:
        monkeypatch.setattr('model.blocks.windows.CACHED_LOGITS', 0)
    torch.manual_seed(0)
    layer, x = WindowAttention(4, 2, 4).double(), numbers(2, 4, *size)
    nn.init.normal_(layer.relative_position_bias)
    norm = some_norm(4)
    found = layer(x, norm) - x
    for image, result in zip(norm(x).numpy(), found.numpy(), strict=True):
        np.testing.assert_allclose(result, plain_attention(image, layer), rtol=0, atol=1e-12)


@torch.no_grad()
def test_windows_of_the_paper_without_and_with_gradients() -> None:
    """32x32 pixels, which only evaluation on a CPU attends without an array of all pairs."""
    torch.manual_seed(0)
    layer, x = WindowAttention(8, 2, 32).double(), numbers(1, 8, 40, 33)
    nn.init.normal_(layer.relative_position_bias)
    norm = some_norm(8)
    found = layer(x, norm)
    with torch.enable_grad():
        torch.testing.assert_close(found, layer(x, norm), rtol=0, atol=1e-12)


@pytest.mark.parametrize('name', NAMES)
@torch.no_grad()
def test_order_within_a_block(name: str) -> None:
    net, x = small(name), numbers(1, 12, 8, 8)
    block, kernels = net.blocks[0], net.kernels()
    y = block.proj(block.ln_proj(x))  # in place of x
    y = block.attn(y, block.ln_attn)
    for i in range(2):
        normed = block.lns[i](y)
        assert torch.equal(normed, y) == (name == 'ESC')
        y = y + block.pconvs[i](block.convffns[i](normed), kernels)
    torch.testing.assert_close(block(x, kernels), x + block.conv_out(block.ln_out(y)))


@pytest.mark.parametrize('name', NAMES)
@torch.no_grad()
def test_the_enlarged_image_is_added(name: str) -> None:
    net, x = small(name), numbers(1, 3, 5, 6)
    for p in net.to_img.parameters():
        nn.init.zeros_(p)
    if name == 'ESC':
        expected = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    else:  # cubic convolution with a = -0.75 at 0.25 and 0.75 between two pixels; the edge pixel repeated
        near, next_to = 1.25 * 0.25**3 - 2.25 * 0.25**2 + 1, 1.25 * 0.75**3 - 2.25 * 0.75**2 + 1
        far, farther = (-0.75 * (d**3 - 5 * d**2 + 8 * d - 4) for d in (1.25, 1.75))

        def enlarged(rows: Tensor) -> Tensor:
            n = len(rows)
            found = []
            for i in range(n):
                for side in (-1, 1):
                    taps = {i - side: far, i: near, i + side: next_to, i + 2 * side: farther}
                    found.append(sum(w * rows[min(max(k, 0), n - 1)] for k, w in taps.items()))
            return torch.stack(found)

        expected = torch.stack([enlarged(enlarged(plane).t()).t() for plane in x[0]]).unsqueeze(0)
    torch.testing.assert_close(net(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize('name', NAMES)
@torch.no_grad()
def test_nothing_is_kept_of_weights_that_change(name: str) -> None:
    """In place, as by an optimiser, and in a copy, as of a weight average."""
    net, x = small(name), numbers(1, 3, 6, 7)
    first, copied = net(x), copy.deepcopy(net)
    assert torch.equal(copied(x), first)
    for key, p in net.named_parameters():
        if key.startswith(('plk_', 'lk_')) or key.endswith('relative_position_bias'):
            before = net(x)
            p += torch.randn_like(p)
            assert not torch.allclose(net(x), before), key
    assert torch.equal(copied(x), first)
    fresh = small(name)
    fresh.load_state_dict(net.state_dict())
    assert torch.equal(fresh(x), net(x))


def test_kernels_start_orthogonal() -> None:
    torch.manual_seed(0)
    esc, fp = build('ESC', 2), build('ESC-FP', 2)
    for kernel in (esc.plk_filter, fp.lk_spatial):
        rows = kernel.detach().flatten(1)
        torch.testing.assert_close(rows @ rows.t(), torch.eye(16), rtol=0, atol=1e-5)
    assert 0.8 < fp.lk_channel.std().item() < 1.2
    assert esc.blocks[0].attn.relative_position_bias.std().item() == pytest.approx(0.001, rel=0.1)


@pytest.mark.parametrize('name', NAMES)
def test_settings_that_do_not_fit_are_refused(name: str) -> None:
    with pytest.raises(UserError, match='--kernel_size 4 has no pixel in its middle: choose an odd number'):
        build(name, 2, kernel_size=4)
    with pytest.raises(UserError, match='--net kernel_feats=65: choose from 4 to'):
        build(name, 2, kernel_feats=65)
    with pytest.raises(UserError, match='--n_heads 5 does not divide'):
        build(name, 2, n_heads=5)


@pytest.mark.parametrize('name', [*NAMES, 'ESC-light'])
def test_recognises_its_weights(name: str) -> None:
    with torch.device('meta'):
        published, other = build(name, 3).state_dict(), build(name, 4, **SMALL, mlp_ratio=1.5).state_dict()
    mine, others = (recognise_fp, recognise) if name == 'ESC-FP' else (recognise, recognise_fp)
    assert mine(published) == {
        'scale': 3, 'n_feats': 48 if name == 'ESC-FP' else 64, 'n_resgroups': 3 if name == 'ESC-light' else 5,
        'n_resblocks': 5, 'n_heads': 3 if name == 'ESC-FP' else 4, 'window_size': 32, 'mlp_ratio': 1.25,
        'kernel_size': 13, 'kernel_feats': 16,
    }  # fmt: skip
    assert mine(other) == {'scale': 4, **SMALL, 'mlp_ratio': 1.5}
    assert others(published) is None


def test_recognises_no_other_weights() -> None:
    with torch.device('meta'):
        for name in NETWORKS.keys() - {'ESC', 'ESC-light', 'ESC-FP'}:
            state = build(name, 2).state_dict()
            assert recognise(state) is None
            assert recognise_fp(state) is None
