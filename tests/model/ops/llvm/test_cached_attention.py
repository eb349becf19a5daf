import logging
import math
import os

import pytest
import torch
from torch import Tensor

from measure.speed import by_kind, clocked
from model.blocks.windows import (
    attention,
    biased_attention,
    relative_positions,
    window_attention,
    window_partition,
)
from model.ops import fast
from model.ops.cached_attention import cached_attention as attend
from model.ops.llvm import cached_attention as cached_attention_llvm
from tests.model.ops.conftest import Call, functions

pytestmark = pytest.mark.usefixtures('no_gradients')
KERNELS = (cached_attention_llvm,)
CALLED = tuple((cached_attention_llvm, name) for name in ('without_gradients', 'by_rows', 'by_position'))

CLOSE = 1e-5  # of the largest value
CASES = {  # windows, queries, keys, heads, channels of keys and of values, kinds of masks
    'SwinIR-light': (5, 64, 64, 6, 10, 10, 2),
    'ATD-light': (3, 256, 256, 2, 12, 12, 3),
    'without masks': (4, 128, 128, 4, 12, 12, 0),
    'odd': (3, 71, 53, 2, 7, 5, 3),
    'one key': (2, 16, 1, 1, 1, 1, 1),
    'few keys': (2, 17, 3, 1, 3, 20, 0),
}


def inputs(
    windows: int, queries: int, keys: int, heads: int, d: int, e: int, kinds: int
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """Queries, keys and values with gaps in memory, masks, and the kinds of the windows."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(windows, t, 2, heads, c, generator=generator)[:, :, 1]
        for t, c in ((queries, d), (keys, d), (keys, e))
    )
    masks = torch.randn(heads, kinds, queries, keys, generator=generator) if kinds else None
    return q, k, v, masks, torch.arange(windows) % max(1, kinds)


def plain(q: Tensor, k: Tensor, v: Tensor, masks: Tensor | None, kinds: Tensor, scale: float) -> Tensor:
    q, k, v = (x.double() for x in (q, k, v))
    logits = scale * torch.einsum('bqhd,bkhd->bhqk', q, k)
    weights = (logits if masks is None else logits + masks.double()[:, kinds].transpose(0, 1)).softmax(-1)
    return torch.einsum('bhqk,bkhd->bqhd', weights, v)


def check(found: Tensor, truth: Tensor) -> None:
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), truth, rtol=0, atol=CLOSE * float(truth.abs().max()))


@pytest.mark.parametrize('case', CASES)
def test_equals_the_plain_form(case: str, lanes: int, calls: list[Call]) -> None:
    arguments = (*inputs(*CASES[case]), 0.7)
    check(attend(*arguments), plain(*arguments))
    assert functions(calls) == ['without_gradients']


def test_masks_in_either_order_of_memory() -> None:
    q, k, v, masks, kinds = inputs(*CASES['odd'])
    assert masks is not None
    turned = masks.mT.contiguous().mT
    assert turned.stride() != masks.stride()
    assert torch.equal(attend(q, k, v, turned, kinds, 0.7), attend(q, k, v, masks, kinds, 0.7))


def test_keys_that_all_windows_share() -> None:
    q, k, v, masks, kinds = inputs(*CASES['odd'])
    k, v = (x[:1].expand(len(q), -1, -1, -1) for x in (k, v))
    check(attend(q, k, v, masks, kinds, 0.7), plain(q, k, v, masks, kinds, 0.7))


@pytest.mark.parametrize('offset', [-1e5, -95.0, -30.0, 30.0, 95.0, 1e5])
def test_logits_that_are_all_large_or_small(offset: float, lanes: int) -> None:
    q, k, v, masks, kinds = inputs(*CASES['odd'])
    assert masks is not None
    offsets = torch.zeros_like(masks)
    offsets[1, 2, 20:40] = offset  # of some queries, which it does not change
    found, truth = attend(q, k, v, masks + offsets, kinds, 0.7), plain(q, k, v, masks, kinds, 0.7)
    torch.testing.assert_close(found.double(), truth, rtol=0, atol=2e-7 * max(abs(offset), 50))


def test_keys_that_are_masked_out() -> None:
    q, k, v, masks, kinds = inputs(*CASES['odd'])
    assert masks is not None
    masks[:, 1, :, 10:] = -math.inf
    v[1, 10:] = 1e30
    check(attend(q, k, v, masks, kinds, 0.7)[1:2], plain(q, k, v, masks, kinds, 0.7)[1:2])


@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_in_its_row(value: float, lanes: int) -> None:
    q, k, v, masks, kinds = inputs(*CASES['odd'])
    found = attend(q, k, v, masks, kinds, 0.7)
    q[1, 30, 1] = value
    spoilt, truth = attend(q, k, v, masks, kinds, 0.7), plain(q, k, v, masks, kinds, 0.7)
    assert torch.equal(spoilt.isnan(), truth.isnan()) and truth[1, 30, 1].isnan().all()
    assert torch.equal(spoilt[~spoilt.isnan()], found[~spoilt.isnan()])


def test_a_row_without_any_key_is_not_a_number() -> None:
    q, k, v, masks, kinds = inputs(*CASES['odd'])
    assert masks is not None
    masks[0, 0, 5] = -math.inf
    found = attend(q, k, v, masks, kinds, 0.7)
    assert found[0, 5, 0].isnan().all() and found.isnan().sum() == 5


def test_results_repeat_themselves(lanes: int) -> None:
    """To the bit: in another call, with other threads, and of a window by itself."""
    q, k, v, masks, kinds = inputs(*CASES['SwinIR-light'])
    first = attend(q, k, v, masks, kinds, 0.7)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(attend(q, k, v, masks, kinds, 0.7), first)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(attend(q[3:4], k[3:4], v[3:4], masks, kinds[3:4], 0.7), first[3:4])


@pytest.mark.parametrize('offset', [0.0, 95.0])
def test_biases_read_from_a_table(
    offset: float, lanes: int, calls: list[Call], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the query and key at (y, x) and (y', x') stand at (y' - y, x' - x) from the middle."""
    monkeypatch.setattr('model.blocks.windows.CACHED_LOGITS', 1)
    size, heads = 16, 2
    q, k, v, *_ = inputs(2, size**2, size**2, heads, 6, 6, 0)
    table = torch.randn(heads, 2 * size - 1, 2 * size - 1, generator=torch.Generator().manual_seed(1)) + offset
    y, x = torch.arange(size).repeat_interleave(size), torch.arange(size).repeat(size)
    masks = table[:, y - y[:, None] + size - 1, x - x[:, None] + size - 1].unsqueeze(1)
    truth = plain(q, k, v, masks, torch.zeros(2, dtype=torch.int64), 6**-0.5).flatten(2)
    found = biased_attention(q, k, v, table)
    torch.testing.assert_close(found.double(), truth, rtol=0, atol=2e-7 * max(offset, 20))
    assert functions(calls) == ['by_rows']


@pytest.mark.parametrize('shift', [0, 8])
@pytest.mark.parametrize('sides', [(16, 16), (16, 48), (32, 32)])
def test_biases_by_position_in_shifted_windows(
    sides: tuple[int, int], shift: int, lanes: int, calls: list[Call]
) -> None:
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(2, sides[0] * sides[1], 2 * 3 * 7, generator=generator)
    table, windows = torch.randn(31**2, 2, generator=generator), window_partition(torch.empty(2, 1, *sides), 16, shift)
    positions = relative_positions(16)
    found = window_attention(qkv, table, positions, windows)
    assert functions(calls) == ['by_position']
    check(found, window_attention(qkv.double(), table.double(), positions, windows))
    assert functions(calls) == ['by_position']


def test_other_calls_take_the_plain_form(calls: list[Call], monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, masks, kinds = inputs(*CASES['odd'])
    truth = plain(q, k, v, masks, kinds, 0.7)
    doubled = [x.double() for x in (q, k, v)]
    torch.testing.assert_close(attend(*doubled, masks.double(), kinds, 0.7), truth, rtol=0, atol=1e-12)
    check(attend(q[:, :15], k, v, None, kinds, 0.7), plain(q[:, :15], k, v, None, kinds, 0.7))
    monkeypatch.setattr(fast, 'wanted', True)
    monkeypatch.setenv('FRUGALSR_KERNELS', 'auto')  # both as they were afterwards
    fast.leave_out_kernels()
    check(attend(q, k, v, masks, kinds, 0.7), truth)
    assert os.environ['FRUGALSR_KERNELS'] == 'off'
    fast.wanted = True
    with monkeypatch.context() as patch:
        patch.setattr(fast, 'is_installed', lambda package: False)
        check(attend(q, k, v, masks, kinds, 0.7), truth)
    with monkeypatch.context() as patch:
        patch.setattr(torch.jit, 'is_tracing', lambda: True)
        check(attention(q, k, v), plain(q, k, v, None, kinds, 7**-0.5).flatten(2))
    assert not calls
    check(attend(q, k, v, masks, kinds, 0.7), truth)
    assert calls


def test_a_kernel_that_fails_is_left_out(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    tried = []

    def fails(*arguments: object) -> Tensor:
        tried.append(arguments)
        raise RuntimeError('no such processor')

    monkeypatch.setattr(cached_attention_llvm, 'without_gradients', fails)
    monkeypatch.setattr(fast, 'failed', set())
    arguments = (*inputs(*CASES['odd']), 0.7)
    with caplog.at_level(logging.WARNING, 'frugalsr'):
        for _ in range(2):
            check(attend(*arguments), plain(*arguments))
    assert len(tried) == 1
    assert caplog.messages == ['The cached attention runs without llvmlite, slower: RuntimeError: no such processor']


def test_its_time_is_told_by_name() -> None:
    arguments = (*inputs(*CASES['odd']), 0.7)
    assert 'frugalsr::cached_attention' in clocked(lambda: attend(*arguments))
    assert by_kind(lambda: attend(*arguments), 'cpu')['matrix product'] > 0
