from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model.ops.dynamic_conv
from error import UserError
from model import build
from model.dlgsanet import (
    TLC_SIZES,
    DynamicLocalAttention,
    Norm,
    SparseGlobalAttention,
    cells,
    recognise,
    windows,
)
from tests.conftest import kept_for_gradients, numbers, some_norm

SMALL = {
    'n_feats': 12,
    'n_resgroups': 2,
    'n_resblocks': 3,
    'n_heads': 3,
    'group_channels': 4,
    'kernel_size': 5,
    'mlp_ratio': 3,
}


def small(scale: int = 2, **settings: object) -> nn.Module:
    torch.manual_seed(0)
    return build('DLGSANet', scale, **{**SMALL, **settings}).double()


# The kernels of every pixel.


def test_kernels_of_every_pixel_are_not_kept_for_the_gradients() -> None:
    attention, norm, x = DynamicLocalAttention(8, 4, 5).double(), some_norm(8), numbers(2, 8, 5, 4)
    kept = kept_for_gradients(lambda: attention(x, norm))
    assert max(tensor.numel() for tensor in kept) == x.numel() < attention.conv(x).numel()


def test_kernels_of_the_image_are_never_there_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    class Largest(TorchDispatchMode):
        found = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            sizes = [t.untyped_storage().nbytes() // t.itemsize for t in tree_leaves(result) if isinstance(t, Tensor)]
            self.found = max([self.found, *sizes])
            return result

    monkeypatch.setattr(model.ops.dynamic_conv, 'STRIP', 3 * 2 * 25 * 16)  # three rows
    attention, norm, x = DynamicLocalAttention(8, 4, 5).double(), some_norm(8), numbers(2, 8, 16, 16)
    with torch.no_grad(), Largest() as largest:
        found = attention(x, norm)
    assert largest.found < attention.conv(x).numel() / 2
    assert torch.allclose(found, attention(x, norm), rtol=0, atol=1e-12)


@pytest.mark.parametrize(('group', 'row', 'column'), [(0, 0, 0), (1, 3, 3), (2, 1, 5)])
@torch.no_grad()
def test_kernels_are_laid_out_by_group_row_and_column(group: int, row: int, column: int) -> None:
    attention = DynamicLocalAttention(6, 2, 7).double()
    for layer in (attention.conv0, attention.conv1):
        layer.weight.copy_(torch.eye(6).view(6, 6, 1, 1))
    kernels = attention.conv.conv2[0]
    kernels.weight.zero_()
    kernels.bias.zero_()
    kernels.bias[49 * group + 7 * row + column] = 1
    norm, x = some_norm(6), numbers(1, 6, 5, 4)
    expected = x.clone()
    shifted = F.pad(norm(x), [3] * 4)[:, :, row : row + 5, column : column + 4]
    expected[:, 2 * group : 2 * group + 2] += shifted[:, 2 * group : 2 * group + 2]
    assert torch.equal(attention(x, norm), expected)


# The attention between channels and its windows.


@pytest.mark.parametrize(
    ('length', 'size', 'starts'),
    [
        (4, 4, [0]),
        (1, 1, [0]),
        (5, 4, [0, 1]),
        (8, 4, [0, 4]),
        (9, 4, [0, 3, 5]),
        (10, 4, [0, 3, 6]),
        (101, 96, [0, 5]),
        (320, 48, [0, 46, 92, 138, 184, 230, 272]),
    ],
)
def test_windows_worked_out_by_hand(length: int, size: int, starts: list[int]) -> None:
    assert [(window.start, window.stop) for window in windows(length, size)] == [(i, i + size) for i in starts]


@pytest.mark.parametrize('size', [1, 2, 3, 5, 8])
def test_windows_cover_every_position(size: int) -> None:
    for length in range(size, 40):
        found = windows(length, size)
        assert {i for window in found for i in range(length)[window]} == set(range(length))
        assert all(window.start >= 0 and window.stop <= length for window in found)


@pytest.mark.parametrize('size', [1, 2, 3, 5, 8])
def test_cells_make_up_the_windows(size: int) -> None:
    for length in range(size, 40):
        pieces, inside = cells(length, size, torch.empty(0))
        assert [i for piece in pieces for i in range(length)[piece]] == list(range(length))
        for window, row in zip(windows(length, size), inside.tolist(), strict=True):
            own = [i for piece, is_inside in zip(pieces, row, strict=True) if is_inside for i in range(length)[piece]]
            assert own == list(range(length))[window]


def plain_attention(qkv: np.ndarray, temperature: list[float], size: int) -> np.ndarray:
    """One image (3 * C, H, W) to (C, H, W): every window by itself, averaged pixel by pixel."""
    _, height, width = qkv.shape
    channels, heads = len(qkv) // 3, len(temperature)
    dim = channels // heads
    total, count = np.zeros((channels, height, width)), np.zeros((height, width))

    def starts(length: int, k: int) -> list[int]:
        n = (length - 1) // k + 1
        step = 0 if n == 1 else int(np.ceil((length - k) / (n - 1) - 1e-8))
        return [length - k if i == n - 1 else i * step for i in range(n)]

    h, w = min(size, height), min(size, width)
    for top, left in product(starts(height, h), starts(width, w)):
        window = qkv[:, top : top + h, left : left + w]
        for channel in range(channels):
            head = channel // dim
            q = window[channel] / np.linalg.norm(window[channel])
            for other in range(head * dim, head * dim + dim):
                k = window[channels + other] / np.linalg.norm(window[channels + other])
                weight = max((q * k).sum() * temperature[head], 0)
                total[channel, top : top + h, left : left + w] += weight * window[2 * channels + other]
        count[top : top + h, left : left + w] += 1
    return total / count


@pytest.mark.parametrize('size', [(7, 9), (13, 5), (3, 11), (1, 7), (4, 5), (1, 1)])
@torch.no_grad()
def test_attention_in_windows_equals_plain_loops(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    attention = SparseGlobalAttention(6, 2, 5).double().eval()
    attention.temperature.copy_(torch.tensor([1.5, -0.75]).view(2, 1, 1))
    norm, x = some_norm(6), numbers(2, 6, *size)
    qkv = F.conv2d(norm(x), attention.qkv.weight)
    qkv = F.conv2d(qkv, attention.qkv_dwconv.weight, padding=1, groups=18)
    for train, window in [(False, 5), (True, 99)]:
        averaged = np.stack([plain_attention(image, [1.5, -0.75], window) for image in qkv.numpy()])
        expected = x + F.conv2d(torch.from_numpy(averaged), attention.project_out.weight)
        assert torch.allclose(attention.train(train)(x, norm), expected, rtol=0, atol=1e-12)


def test_gradients_of_attention_in_windows() -> None:
    torch.manual_seed(0)
    attention = SparseGlobalAttention(4, 2, 3).double().eval()
    norm, x = some_norm(4), numbers(1, 4, 4, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: attention(x, norm), x)


@torch.no_grad()
def test_norms_over_pixels_do_not_suffer_from_half_precision() -> None:
    attention = SparseGlobalAttention(4, 1, 64)
    nn.init.eye_(attention.project_out.weight.flatten(1))
    # The norm of 64 x 64 such pixels, 128000, is beyond float16.
    part = torch.full((1, 4096, 12), 2000.0)
    with torch.autocast('cpu', torch.float16):
        maps = attention.maps([part.half()], torch.ones(1, 1))
    assert maps.dtype == torch.float32
    assert maps.flatten().tolist() == pytest.approx([1.0] * 16, rel=1e-4)


def test_norm_is_over_channels() -> None:
    norm = Norm(5).double()
    nn.init.normal_(norm.body.weight)
    nn.init.normal_(norm.body.bias)
    x = numbers(2, 5, 3, 4) * 1e-2  # so that eps counts
    expected = F.layer_norm(x.permute(0, 2, 3, 1), (5,), norm.body.weight, norm.body.bias, 1e-5).permute(0, 3, 1, 2)
    assert torch.allclose(norm(x), expected, rtol=0, atol=1e-12)


# The network.


@pytest.mark.parametrize(('scale', 'size'), [(2, 96), (3, 72), (4, 48)])
def test_windows_are_those_of_the_paper(scale: int, size: int) -> None:
    assert TLC_SIZES[scale] == size
    for net, expected in [(small(scale), size), (small(scale, tlc_size=7), 7)]:
        sizes = {module.tlc_size for module in net.modules() if isinstance(module, SparseGlobalAttention)}
        assert sizes == {expected}


@torch.no_grad()
def test_windows_are_for_evaluation_only() -> None:
    narrow, wide = small(tlc_size=5), small(tlc_size=99)
    x = numbers(2, 3, 9, 6)
    assert torch.equal(narrow.train()(x), wide.train()(x))
    assert torch.equal(wide.eval()(x), wide.train()(x))
    assert (narrow.eval()(x) - narrow.train()(x)).abs().max() > 1e-4


def test_gradients_reach_every_parameter() -> None:
    net = small(n_resgroups=1, n_resblocks=1)
    for train in (True, False):
        net.zero_grad()
        net.train(train)(numbers(2, 3, 6, 7)).abs().mean().backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in net.parameters())


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'n_heads': 5}, '--n_heads 5 does not divide --n_feats 12: choose a divisor.'),
        ({'group_channels': 7}, '--group_channels 7 does not divide --n_feats 12: choose a divisor.'),
        ({'kernel_size': 4}, '--kernel_size 4 has no pixel in its middle: choose an odd number.'),
        ({'n_feats': 3}, '--n_feats 3: the kernels are made from a quarter of them, so choose 4 or more.'),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(UserError) as error:
        small(**settings)
    assert str(error.value) == message


@pytest.mark.parametrize('scale', [2, 3, 4])
@pytest.mark.parametrize('settings', [{}, SMALL, {**SMALL, 'n_resgroups': 1, 'n_resblocks': 1, 'kernel_size': 1}])
def test_recognises_its_own_weights(scale: int, settings: dict[str, int]) -> None:
    with torch.device('meta'):
        state = build('DLGSANet-tiny', scale, **settings).state_dict()
    tiny = {'n_feats': 48, 'n_resgroups': 3, 'n_resblocks': 3}
    defaults = {'n_heads': 6, 'group_channels': 6, 'kernel_size': 7, 'mlp_ratio': 2}
    assert recognise(state) == {'scale': scale, **tiny, **defaults, **settings}


def test_recognises_nothing_else() -> None:
    with torch.device('meta'):
        state = small().state_dict()
        others = [build(name, 2).state_dict() for name in ('EDSR', 'LCoAN')]
    assert [recognise(other) for other in others] == [None, None]
    assert recognise({}) is None
    assert recognise({key: value for key, value in state.items() if not key.startswith('upsample.')}) is None
    assert recognise({key: value for key, value in state.items() if '.body.0.' not in key}) is None


@pytest.mark.parametrize('pixels', [3, 8, 19])
def test_sums_over_pixels_by_products_beside_each_other(monkeypatch: pytest.MonkeyPatch, pixels: int) -> None:
    """As on a GPU."""
    monkeypatch.setattr(model.dlgsanet, 'PIXELS', 8)
    attention, part = SparseGlobalAttention(6, 3, 48).double(), numbers(2, pixels, 18)
    found = model.dlgsanet.from_gram(model.dlgsanet.gram_matrix(part[..., :12]), 3)
    for one, other in zip(found, attention.sums(part), strict=True):
        assert one.shape == other.shape
        assert (one - other).abs().max() < 1e-12
