"""Gradients of attention by kernels, against PyTorch's of the plain form in float64."""

import logging
import math

import pytest
import torch
from torch import Tensor

from measure.speed import clocked
from model.blocks.windows import Windows, attention, self_attention, window_partition
from model.ops import fast
from model.ops.cached_attention import cached_attention as attend
from model.ops.llvm import cached_attention as cached_attention_llvm
from tests.conftest import kept_for_gradients
from tests.model.ops.conftest import Call, functions
from tests.model.ops.llvm.test_cached_attention import CASES, CLOSE, inputs, plain

KERNELS = (cached_attention_llvm,)
CALLED = tuple(
    (cached_attention_llvm, name) for name in ('without_gradients', 'gradients', 'packed', 'packed_gradients')
)
CASES = CASES | {'many channels': (2, 20, 19, 1, 35, 40, 1)}


def seed_for(found: Tensor) -> Tensor:
    """A gradient by a result."""
    return torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).to(found.dtype)


def found_and_true(
    q: Tensor, k: Tensor, v: Tensor, masks: Tensor | None, kinds: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients by all tensors, and what they are."""
    both = []
    for form, dtype in ((attend, torch.float32), (plain, torch.float64)):
        tensors = [x.detach().to(dtype).requires_grad_() for x in (q, k, v, masks) if x is not None]
        out = form(*tensors, *[None] * (masks is None), kinds, 0.7)
        both.append(list(torch.autograd.grad(out, tensors, seed_for(out))))
    return both[0], both[1]


def check(found: list[Tensor], truth: list[Tensor], close: float = CLOSE) -> None:
    for x, true in zip(found, truth, strict=True):
        assert x.dtype == torch.float32
        torch.testing.assert_close(x.double(), true, rtol=0, atol=close * max(float(true.abs().max()), 0.1))


@pytest.mark.parametrize('case', CASES)
def test_equal_those_of_the_plain_form(case: str, lanes: int, calls: list[Call]) -> None:
    check(*found_and_true(*inputs(*CASES[case])))
    assert functions(calls) == ['without_gradients', 'gradients']


def test_keys_that_all_windows_share() -> None:
    q, k, v, masks, kinds = inputs(*CASES['odd'])
    k, v = (x[:1].requires_grad_() for x in (k, v))
    out = attend(q, *(x.expand(len(q), -1, -1, -1) for x in (k, v)), masks, kinds, 0.7)
    doubled = [x.detach().double().requires_grad_() for x in (k, v)]
    truth = plain(q, *(x.expand(len(q), -1, -1, -1) for x in doubled), masks, kinds, 0.7)
    check(
        list(torch.autograd.grad(out, (k, v), seed_for(out))),
        list(torch.autograd.grad(truth, doubled, seed_for(truth))),
    )


@pytest.mark.parametrize('offset', [-1e5, -95.0, -30.0, 30.0, 95.0, 1e5])
def test_logits_that_are_all_large_or_small(offset: float, lanes: int) -> None:
    q, k, v, masks, kinds = inputs(*CASES['odd'])
    assert masks is not None
    offsets = torch.zeros_like(masks)
    offsets[1, 2, 20:40] = offset  # of some queries, which it does not change
    found, _ = found_and_true(q, k, v, masks + offsets, kinds)
    _, truth = found_and_true(q, k, v, masks, kinds)
    check(found, truth, 1e-6 * max(abs(offset), 10))


def test_keys_that_are_masked_out(lanes: int) -> None:
    q, k, v, masks, kinds = inputs(*CASES['odd'])
    assert masks is not None
    masks[:, 1, :, 10:] = -math.inf
    found, truth = found_and_true(q, k, v, masks, kinds)
    check(found, truth)
    assert not found[1][1, 10:].any() and not found[2][1, 10:].any()


def test_what_is_not_finite_stays_in_its_window_and_head() -> None:
    q, k, v, _, kinds = inputs(*CASES['odd'])
    before, _ = found_and_true(q, k, v, None, kinds)
    q[1, 30, 1] = math.nan
    for spoilt, found in zip(found_and_true(q, k, v, None, kinds)[0], before, strict=True):
        wrong = spoilt.isnan()
        assert wrong[1, :, 1].any() and not wrong[:, :, 0].any() and not wrong[::2].any()
        assert torch.equal(spoilt[~wrong], found[~wrong])


@pytest.mark.parametrize('case', ['SwinIR-light', 'without masks'])
def test_results_repeat_themselves(case: str, lanes: int) -> None:
    """To the bit, with the same number of threads; with others, too, but for sums over windows."""
    threads, first = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results = [found_and_true(*inputs(*CASES[case]))[0] for _ in range(3)]
            first.append(results[0])
            assert all(torch.equal(x, y) for other in results for x, y in zip(other, results[0], strict=True))
    finally:
        torch.set_num_threads(threads)
    for other in first:
        assert all(torch.equal(x, y) for x, y in zip(other[:3], first[0][:3], strict=True))
        torch.testing.assert_close(other, first[0])


def test_nothing_else_is_kept() -> None:
    *tensors, masks, kinds = (x.requires_grad_() if x.is_floating_point() else x for x in inputs(*CASES['odd']))
    kept = kept_for_gradients(lambda: attend(*tensors, masks, kinds, 1.0))
    assert sorted(x.numel() for x in kept) == sorted(x.numel() for x in (*tensors, masks, kinds))


def by_windows(qkv: Tensor, masks: Tensor | None, windows: Windows | None) -> Tensor:
    """`self_attention` of two heads, in plain operations."""
    b, t, channels = qkv.shape
    order = windows.order if windows else torch.arange(b * t)
    counts = windows.counts if windows else [b]
    kinds = torch.cat([torch.full((count,), i) for i, count in enumerate(counts)])
    q, k, v = qkv.flatten(0, 1)[order].view(b, t, 3, 2, channels // 6).unbind(2)
    out = torch.empty_like(qkv[..., : channels // 3]).flatten(0, 1)
    out = out.index_copy(0, order, plain(q, k, v, masks, kinds, (channels // 6) ** -0.5).flatten(0, 1).flatten(1))
    return out.view(b, t, -1)


@pytest.mark.parametrize('shifted', [True, False, None])
def test_tokens_that_are_read_where_they_are(shifted: bool | None, lanes: int, calls: list[Call]) -> None:
    check_tokens_in_windows(shifted)
    assert functions(calls) == ['packed', 'packed_gradients', 'packed']


def check_tokens_in_windows(shifted: bool | None) -> None:
    """Two images of 12x8 pixels in windows of 16, with a mask for each kind of window; or tokens as they stand."""
    generator = torch.Generator().manual_seed(0)
    windows = None if shifted is None else window_partition(torch.empty(2, 1, 12, 8), 4, 2 * shifted)
    kinds = len(windows.counts) if windows else 1
    given = torch.randn(12, 16, 30, generator=generator), torch.randn(2, kinds, 16, 16, generator=generator)
    both = []
    for form, dtype in ((self_attention, torch.float32), (by_windows, torch.float64)):
        qkv, masks = (x.to(dtype).requires_grad_() for x in given)
        out = form(qkv, *[2] * (dtype == torch.float32), masks, windows)
        both.append([out.detach(), *torch.autograd.grad(out, (qkv, masks), seed_for(out))])
    check(*both)
    with torch.no_grad():
        check([self_attention(given[0], 2, given[1], windows)], both[1][:1])


def test_other_calls_take_the_plain_form(calls: list[Call], monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, masks, kinds = inputs(*CASES['odd'])
    qkv = torch.randn(2, 16, 24, requires_grad=True)
    monkeypatch.setattr(fast, 'wanted', False)
    check(*found_and_true(q, k, v, masks, kinds))
    self_attention(qkv, 2).sum().backward()
    monkeypatch.setattr(fast, 'wanted', True)
    check(*found_and_true(q[:, :15], k, v, None, kinds))  # too few for a vector
    self_attention(qkv[:, :15], 2).sum().backward()
    doubled = [x.double().requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(lambda *x: attend(*(y[:, :4] for y in x), None, kinds, 0.7), doubled)
    with monkeypatch.context() as patch:
        patch.setattr(torch.jit, 'is_tracing', lambda: True)
        attention(*(x.requires_grad_() for x in (q, k, v))).sum().backward()
        self_attention(qkv, 2).sum().backward()
    assert not calls
    self_attention(qkv, 2).sum().backward()
    assert calls


def test_they_are_differentiated_once() -> None:
    q, k, v, *others = inputs(*CASES['few keys'])
    (found,) = torch.autograd.grad(attend(q.requires_grad_(), k, v, *others, 0.7).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match='once_differentiable'):
        found.sum().backward()


@pytest.mark.parametrize('packed', [False, True])
def test_a_kernel_that_fails_is_left_out(
    packed: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*arguments: object) -> Tensor:
        raise RuntimeError('no such processor')

    monkeypatch.setattr(cached_attention_llvm, 'packed_gradients' if packed else 'gradients', fails)
    monkeypatch.setattr(fast, 'failed', set())
    with caplog.at_level(logging.WARNING, 'frugalsr'):
        if packed:
            check_tokens_in_windows(True)
        else:
            check(*found_and_true(*inputs(*CASES['odd'])))
    assert caplog.messages == ['The cached attention runs without llvmlite, slower: RuntimeError: no such processor']


def test_their_time_is_told_by_name() -> None:
    q, k, v, masks, kinds = inputs(*CASES['odd'])
    operations = clocked(lambda: attend(q.requires_grad_(), k, v, masks, kinds, 0.7).sum().backward())
    assert {'frugalsr::cached_attention', 'frugalsr::cached_attention_gradients'} <= set(operations)
