"""The correlations of HiT-SRF's windows by kernels, against the same in float64, which are PyTorch's operations."""

from copy import deepcopy

import pytest
import torch

from measure.speed import by_kind, clocked
from model import build
from model.blocks.tokens import flatten_image
from model.common import reflect_pad
from model.hitsr import Correlation
from model.ops import fast
from model.ops.llvm import correlation
from tests.conftest import numbers
from tests.model.ops.conftest import Call, functions

pytestmark = pytest.mark.usefixtures('no_gradients')
KERNELS = (correlation,)
CALLED = [(correlation, 'correlated')]
CLOSE = 2e-6  # of the largest value

# Channels, heads, pixels along a window, and cells: a vector of queries, two that share numbers, three; cells of one
# pixel, and of several; a window in one task, and in eight; one whose rows of cells are no whole blocks of pixels.
KINDS = [(32, 2, 4, 8), (60, 6, 8, 8), (36, 3, 16, 8), (96, 4, 24, 8), (60, 6, 32, 8), (40, 4, 20, 5), (34, 17, 12, 4)]


def make(channels: int, heads: int, window: int, cells: int) -> Correlation:
    torch.manual_seed(0)
    module = Correlation(channels, heads, window, cells).eval()
    for p in module.parameters():
        p.add_(torch.randn_like(p), alpha=0.3)
    return module


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('size', [(1, 1, 1), (2, 23, 37)])
def test_kernels_give_what_operations_give(
    kind: tuple[int, int, int, int], size: tuple[int, int, int], lanes: int, calls: list[Call]
) -> None:
    n, height, width = size
    module = make(*kind)
    qv = reflect_pad(numbers(n, kind[0], height, width).float().contiguous(memory_format=torch.channels_last), kind[2])
    found = module.correlated(qv, height, width)
    assert functions(calls) == ['correlated']
    truth = flatten_image(deepcopy(module).double().correlate(qv.double())[:, :, :height, :width])
    assert found.shape == truth.shape
    assert (found - truth).abs().max() <= CLOSE * truth.abs().max()


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('window', [8, 32])
def test_any_number_of_threads_gives_the_same(window: int, memory_format: torch.memory_format) -> None:
    module, qv = make(60, 6, window, 8), numbers(1, 60, 64, 64).float()
    found, threads = module.correlated(qv, 64, 50), torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(module.correlated(qv.contiguous(memory_format=memory_format), 64, 50), found)
    finally:
        torch.set_num_threads(threads)


# Few channels, many, many of a head, windows of no whole blocks of pixels.
@pytest.mark.parametrize('kind', [(24, 2, 8, 8), (132, 6, 8, 8), (60, 2, 8, 8), (60, 6, 6, 8)])
def test_others_are_left_to_operations(kind: tuple[int, int, int, int], calls: list[Call]) -> None:
    module, qv = make(*kind), numbers(1, kind[0], 3 * kind[2], kind[2]).float()
    truth = flatten_image(deepcopy(module).double().correlate(qv.double()))
    assert (module.correlated(qv, 3 * kind[2], kind[2]) - truth).abs().max() <= CLOSE * truth.abs().max()
    assert not calls


def test_another_type_is_left_to_operations(calls: list[Call]) -> None:
    module, x = make(60, 6, 8, 8).double(), numbers(1, 60, 8, 8)
    assert module(x).dtype == torch.float64
    assert not calls
    assert list(module.pos.kept) == [None]  # the one of operations, made once


def test_where_kernels_fail_operations_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    module, qv = make(60, 6, 8, 8), numbers(1, 60, 8, 8).float()
    monkeypatch.setattr(fast, 'failed', {'llvm.correlation'})
    truth = flatten_image(deepcopy(module).double().correlate(qv.double()))
    assert (module.correlated(qv, 8, 8) - truth).abs().max() <= CLOSE * truth.abs().max()
    assert list(module.pos.kept) == [None]  # the bias of operations alone, which is large


def test_under_autocast_they_are_in_float32(calls: list[Call]) -> None:
    module, x = make(60, 6, 8, 8), numbers(1, 60, 8, 8).float()
    with torch.autocast('cpu', torch.bfloat16):
        found = module(x)
    assert functions(calls) == ['correlated']
    assert calls[0].first.dtype == torch.float32
    assert (found - module(x)).abs().max() <= 0.05 * found.abs().max()


def test_the_bias_follows_its_weights() -> None:
    module, qv = make(60, 6, 8, 8), numbers(1, 60, 8, 8).float()
    before = module.correlated(qv, 8, 8)
    assert torch.equal(module.correlated(qv, 8, 8), before)
    module.pos.pos_proj.weight.data.mul_(2)
    truth = flatten_image(deepcopy(module).double().correlate(qv.double()))
    assert (before - truth).abs().max() > 0.01 * truth.abs().max()
    assert (module.correlated(qv, 8, 8) - truth).abs().max() <= CLOSE * truth.abs().max()


def test_with_gradients_operations_are_used(calls: list[Call]) -> None:
    module, qv = make(60, 6, 8, 8), numbers(1, 60, 8, 16).float().requires_grad_()
    with torch.enable_grad():
        module.correlated(qv, 8, 16).sum().backward()
    assert qv.grad is not None
    assert not calls


def test_a_network_gives_the_same_with_kernels_and_without(calls: list[Call], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net, x = build('HiT-SRF', 4).eval(), numbers(2, 3, 17, 33).float().sigmoid()
    found = net(x)
    assert len(calls) == 24
    monkeypatch.setattr(fast, 'wanted', False)
    torch.testing.assert_close(found, net(x), rtol=0, atol=1e-5)


def test_their_time_is_told_by_name() -> None:
    module, qv = make(60, 6, 8, 8), numbers(1, 60, 8, 8).float()
    assert 'frugalsr::correlation' in clocked(lambda: module.correlated(qv, 8, 8))
    assert by_kind(lambda: module.correlated(qv, 8, 8), 'cpu')['matrix product'] > 0
