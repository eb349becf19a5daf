"""Blocks of DLGSANet, OmniSR, ASID and BSRN by kernels, against the same in float64, which are PyTorch's operations."""

import math
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from measure.speed import by_kind, clocked
from model import asid, bsrn, build, omnisr
from model.blocks.pixels import ChannelAttention, GatedFFN, LayerNorm2d, LocalBlock, attention_cell
from model.dlgsanet import DynamicLocalAttention, SparseGlobalAttention
from model.ops import fast
from model.ops.llvm import (
    channel_attention,
    dynamic_conv,
    fused_linear,
    gated_ffn,
    local_block,
    planes,
    separable_distillation,
    window_attention,
    window_channel_attention,
)
from tests.conftest import numbers, slow, some_norm

pytestmark = pytest.mark.usefixtures('no_gradients')
KERNELS = (
    channel_attention, dynamic_conv, gated_ffn, fused_linear, local_block, separable_distillation, window_attention,
    window_channel_attention,
)  # fmt: skip

CLOSE = 1e-5  # of the largest value
WINDOW = 3  # pixels a side, of which an image holds whole ones


class Convolutional(LocalBlock):
    """Called as the others are."""

    def forward(self, x: Tensor, norm: LayerNorm2d) -> Tensor:
        del norm
        return super().forward(x)


class Distilled(bsrn.ESDB):
    """Likewise."""

    def forward(self, x: Tensor, norm: LayerNorm2d) -> Tensor:
        del norm
        return self.distilled(x)


class Shared(nn.Module):
    """ASID's attention of the first group, and then that of another one with the same map."""

    def __init__(self, n_feats: int, window_size: int, strided: bool) -> None:
        super().__init__()
        self.first, self.other = asid.WindowAttention(n_feats, window_size), asid.SharedAttention(n_feats)
        self.window_size, self.strided = window_size, strided

    def forward(self, x: Tensor, norm: LayerNorm2d) -> Tensor:
        cells = asid.Cells(attention_cell(x, self.window_size, self.strided), self.strided)
        x, attention_map = self.first(x, norm, None, cells)
        return self.other(x, norm, attention_map, cells)[0]


BLOCKS: dict[str, tuple[int, Callable[[int], nn.Module]]] = {
    'FFN': (12, lambda c: GatedFFN(c, 20)),
    'FFN of primes': (5, lambda c: GatedFFN(c, 7)),
    'local': (18, lambda c: DynamicLocalAttention(c, 6, 7)),
    'local 5x5, a group a channel': (4, lambda c: DynamicLocalAttention(c, 1, 5)),
    'local 1x1, one group': (6, lambda c: DynamicLocalAttention(c, 6, 1)),
    'global': (12, lambda c: SparseGlobalAttention(c, 3, 5)),
    'global, 5 channels a head': (10, lambda c: SparseGlobalAttention(c, 2, 40)),
    'convolutional': (12, Convolutional),
    'convolutional, of a prime': (5, Convolutional),
    'distillation': (12, Distilled),
    'distillation, of a prime': (5, Distilled),
    'window channels': (16, lambda c: ChannelAttention(c, 1, WINDOW, strided=False)),
    'window channels, strided': (10, lambda c: ChannelAttention(c, 2, WINDOW, strided=True)),
    'window channels, many': (51, lambda c: ChannelAttention(c, 3, WINDOW, strided=True)),
    'window pixels': (16, lambda c: omnisr.WindowAttention(c, 2, WINDOW, strided=False)),
    'window pixels, strided': (15, lambda c: omnisr.WindowAttention(c, 3, WINDOW, strided=True)),
    'window map': (12, lambda c: Shared(c, WINDOW, strided=False)),
    'window map, strided': (7, lambda c: Shared(c, WINDOW, strided=True)),
}
KINDS = [
    'FFN',
    'local',
    'global',
    'convolutional',
    'distillation',
    'window channels, strided',
    'window pixels',
    'window map',
]
OPERATIONS = [
    'gated_ffn',
    'local_attention',
    'channel_attention_sums',
    'local_block',
    'separable_distillation',
    'window_channel_attention',
    'window_attention',
    'window_attention_map',
]
SIZES = [(2, 9, 11), (1, 1, 1), (1, 3, 2), (1, 33, 37)]  # images, height, width: smaller than kernels, several tiles


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the modules whose kernels are called; none of these may fail."""
    found: list[str] = []
    by_kernel = fast.by_kernel

    def noted(module: str, *arguments: Any) -> Any:
        found.append(module)
        return by_kernel(module, *arguments)

    monkeypatch.setattr(fast, 'by_kernel', noted)
    monkeypatch.setattr(fast, 'failed', set())
    yield found
    assert not fast.failed


def make(name: str, *size: int) -> tuple[nn.Module, LayerNorm2d, Tensor]:
    """A block, the norm before it, and maps of a number of images, height and width, or of so many windows."""
    torch.manual_seed(0)
    channels, block = BLOCKS[name]
    images, *sides = size
    height, width = (side * WINDOW if name.startswith('window') else side for side in sides)
    return block(channels).eval(), some_norm(channels).float(), numbers(images, channels, height, width).float() + 0.5


def plain(block: nn.Module, norm: nn.Module, x: Tensor) -> Tensor:
    return deepcopy(block).double()(x.double(), deepcopy(norm).double())


@pytest.fixture
def no_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """No map that a kernel reads may be copied for it."""

    def same(x: Tensor) -> tuple[Tensor, int]:
        assert planes.pixel_step(x)
        return x, planes.pixel_step(x)

    for module in (planes, window_attention):
        monkeypatch.setattr(module, 'pixels_in_order', same)


def check(found: Tensor, truth: Tensor) -> None:
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), truth, rtol=0, atol=CLOSE * float(truth.abs().max()))


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('name', BLOCKS)
def test_equals_the_plain_form(name: str, size: tuple[int, ...], lanes: int, calls: list[str]) -> None:
    block, norm, x = make(name, *size)
    found = block(x, norm)
    check(found, plain(block, norm, x))
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert len(calls) == (3 if name.startswith('window map') else 1)


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('name', BLOCKS)
@pytest.mark.usefixtures('no_copies')
def test_channels_of_larger_maps(name: str, size: tuple[int, ...], lanes: int) -> None:
    """They are read where they are, and what is beside them is not."""
    block, norm, x = make(name, *size)
    truth = plain(block, norm, x)
    wide = F.pad(x, (0, 0, 0, 0, 3, 5), value=math.nan).to(memory_format=torch.channels_last)
    found = block(wide[:, 3:-5], norm)
    check(found, truth)
    assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.usefixtures('no_copies')
def test_asid_copies_no_maps() -> None:
    net = build('ASID', 2, n_feats=16).eval()
    x = numbers(1, 3, 24, 32).float()
    with torch.profiler.profile(record_shapes=True) as profiler:
        net(x)
    joined = [event.input_shapes for event in profiler.events() if event.name == 'aten::cat']
    assert not any(len(shape) == 4 for shapes in joined for shape in shapes)


def test_which_maps_have_pixels_in_order() -> None:
    maps = numbers(2, 6, 4, 5).to(memory_format=torch.channels_last)
    for x, step in (
        (maps, 6), (maps[:, 1:4], 6), (maps[:1, :, :1, :1], 6), (maps[..., :1], 30), (maps[:, :, :2], 0),
        (maps[..., 1:], 0), (maps[..., ::2], 0), (maps[:, ::2], 0), (maps[:, :1].expand(-1, 6, -1, -1), 0),
        (maps.contiguous(), 0), (maps.mT, 0), (maps[:, :, :1], 0), (maps[:1, :, :1], 6),
    ):  # fmt: skip
        assert planes.pixel_step(x) == step
        found, apart = planes.pixels_in_order(x)
        assert torch.equal(found, x)
        assert (found is x) == (step > 0)
        assert apart == planes.pixel_step(found) == (step or x.shape[1])


@pytest.mark.parametrize('name', KINDS)
def test_tiles_of_a_few_columns(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planes, 'ROWS', 4)
    monkeypatch.setattr(planes, 'VALUES', 500)
    block, norm, x = make(name, 2, 13, 21)
    check(block(x, norm), plain(block, norm, x))


@pytest.mark.parametrize('name', KINDS)
def test_results_repeat_themselves(name: str) -> None:
    """To the bit: in another call, with other threads, of an image by itself, and from maps in other memory."""
    block, norm, x = make(name, 3, 33, 9)
    first = block(x, norm)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(block(x, norm), first)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(block(x[1:2], norm), first[1:2])
    turned = x.contiguous(memory_format=torch.channels_last)
    assert turned.stride() != x.stride()
    assert torch.equal(block(turned, norm), first)


@pytest.mark.parametrize('value', [math.nan, math.inf])
@pytest.mark.parametrize('name', KINDS)
def test_what_is_not_finite_spreads_as_far_as_in_the_plain_form(name: str, value: float, lanes: int) -> None:
    block, norm, x = make(name, 2, 33, 20)
    x[0, 2, 17, 0] = value
    found, truth = block(x, norm), plain(block, norm, x)
    assert truth.isnan().any() and not truth.isnan().all()
    assert torch.equal(found.isnan(), truth.isnan())


def test_a_kernel_value_that_is_not_a_number_meets_what_is_outside_the_image() -> None:
    block, norm, x = make('local', 1, 2, 3)
    block.conv.conv2[0].bias[0] = math.nan  # of the upper left tap of the first group
    found = block(x, norm)
    assert torch.equal(found.isnan(), plain(block, norm, x).isnan()) and found.isnan().all()


@pytest.mark.parametrize('name', KINDS)
def test_other_calls_take_the_plain_form(name: str, calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    block, norm, x = make(name, 1, 9, 8)
    truth = plain(block, norm, x)
    with torch.autocast('cpu', torch.bfloat16):
        assert (block(x, norm) - truth).abs().max() > 1e-3
    with torch.enable_grad():
        check(block(x, norm).detach(), truth)
    assert set(calls) <= {'llvm.fused_linear', 'llvm.depthwise', 'llvm.small_products'}  # parts that have gradients
    calls.clear()
    with monkeypatch.context() as patch:
        patch.setattr(fast, 'wanted', False)
        check(block(x, norm), truth)
    with monkeypatch.context() as patch:
        patch.setattr(fast, 'is_installed', lambda package: False)
        check(block(x, norm), truth)
    with monkeypatch.context() as patch:
        patch.setattr(torch.jit, 'is_tracing', lambda: True)
        check(block(x, norm), truth)
    assert not calls
    check(block(x, norm), truth)
    assert calls


@pytest.mark.parametrize(
    ('name', 'size'), [('DLGSANet-tiny', (9, 50)), *slow(('DLGSANet-light', (70, 21)), ('DLGSANet', (50, 13)))]
)
def test_a_whole_network_gives_the_same_with_kernels_and_without(
    name: str, size: tuple[int, int], calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    net, x = build(name, 4).eval(), numbers(1, 3, *size).float().sigmoid()
    found = net(x)
    of_blocks = [call for call in calls if call != 'llvm.fused_conv']
    assert len(of_blocks) == 4 * sum(type(module) is DynamicLocalAttention for module in net.modules())
    monkeypatch.setattr(fast, 'wanted', False)
    torch.testing.assert_close(found, net(x), rtol=0, atol=CLOSE)


def test_bsrn_gives_the_same_with_kernels_and_without(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net, x = build('BSRN', 4).eval(), numbers(2, 3, 17, 50).float().sigmoid()
    found = net(x)
    assert calls.count('llvm.separable_distillation') == calls.count('llvm.contrast') == 8
    monkeypatch.setattr(fast, 'wanted', False)
    torch.testing.assert_close(found, net(x), rtol=0, atol=CLOSE)


@pytest.mark.parametrize(('name', 'size'), [('ASID', (9, 50)), *slow(('OmniSR', (70, 21)))])
def test_networks_with_windows_give_the_same_with_kernels_and_without(
    name: str, size: tuple[int, int], calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    net, x = build(name, 4).eval(), numbers(2, 3, *size).float().sigmoid()
    found = net(x)
    assert {'llvm.gated_ffn', 'llvm.window_channel_attention', 'llvm.window_attention'} <= set(calls)
    monkeypatch.setattr(fast, 'wanted', False)
    torch.testing.assert_close(found, net(x), rtol=0, atol=CLOSE)


def test_their_time_is_told_by_name() -> None:
    for name, operation in zip(KINDS, OPERATIONS, strict=True):
        block, norm, x = make(name, 1, 9, 8)
        assert f'frugalsr::{operation}' in clocked(lambda: block(x, norm))  # noqa: B023
    block, norm, x = make('FFN', 1, 9, 8)
    assert by_kind(lambda: block(x, norm), 'cpu')['convolution'] > 0
