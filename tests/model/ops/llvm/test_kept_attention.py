"""The kernel of progressive focused attention, against `focused` in float64, whose parts have tests of their own."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from model.ops import fast
from model.ops.kept_attention import Kept, attend, focused
from model.ops.llvm import kept_attention as kept_attention_llvm

CLOSE = 1e-5  # of the largest value
CASES = {  # windows, tokens, heads, channels of keys and of values, entries before (0: all tokens), entries kept
    'all keys': (2, 64, 2, 13, 13, 0, 64),
    'some of all keys': (2, 64, 3, 39, 13, 0, 32),
    'a long row': (1, 1024, 1, 26, 13, 0, 256),
    'keys from before': (2, 96, 2, 13, 13, 64, 64),
    'some of those before': (3, 96, 2, 7, 20, 64, 32),
    'few keys': (1, 160, 1, 16, 16, 32, 64),
}


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(params=[8, 16])
def lanes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(kept_attention_llvm, 'lanes', lambda: request.param)
    return request.param


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def operands(b: int, t: int, heads: int, d: int, e: int, entries: int, _: int) -> tuple:
    """Queries, keys and values with gaps in memory, biases, and what was kept before.

    Numbers are multiples of 1/16, of which logits in float32 have no rounding that would change what is kept.
    """
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) * 16).round() / 16

    q, k, v = (numbers(b, t, 2, heads, c)[:, :, 1] for c in (d, d, e))
    bias, before = numbers(t, t), None
    if entries:
        keys = torch.randn(b, t, heads, t, generator=generator).argsort(-1)[..., :entries].sort(-1)[0].short()
        before = Kept(numbers(b, t, heads, entries), keys)
    return q, k, v, bias, before


def wide(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, before: Kept | None) -> tuple:
    """In float64."""
    kept = before and Kept(before.logits.double(), before.keys)
    return *(x.double() for x in (q, k, v, bias)), kept


def check(found: Tensor, truth: Tensor) -> None:
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), truth, rtol=0, atol=CLOSE * float(truth.abs().max()))


@pytest.mark.parametrize('case', CASES)
def test_results_and_what_is_kept(case: str, lanes: int, threads: None) -> None:
    given, topk = operands(*CASES[case]), CASES[case][-1]
    truth, kept = focused(*wide(*given), topk)
    out, found = kept_attention_llvm.focused(*given, topk)
    check(out, truth)
    assert (found is None) == (kept is None)
    if kept is not None:
        assert found.keys.dtype == torch.int16
        assert torch.equal(found.keys, kept.keys.short())
        check(found.logits, kept.logits)


def test_the_kernel_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setattr(kept_attention_llvm, 'focused', lambda *given: called.append(given[-1]))
    given = operands(*CASES['all keys'])
    attend(*given, 32)
    monkeypatch.setattr(fast, 'wanted', False)
    attend(*given, 64)
    monkeypatch.setattr(fast, 'wanted', True)
    with torch.enable_grad():
        attend(*given, 64)
    attend(*given, 33)  # not a whole block
    attend(*wide(*given), 64)
    attend(*operands(1, 49, 1, 3, 3, 0, 49), 49)
    assert called == [32]


def test_the_first_of_equal_entries_are_kept(lanes: int) -> None:
    """Without queries logits are biases: whole numbers, each many times."""
    bias = torch.randint(-3, 3, (96, 96), generator=torch.Generator().manual_seed(1)).float() * 0.0625
    bias[5] = 0
    bias[5, ::2] = -0.0
    q = k = v = torch.zeros(1, 96, 1, 4)
    _, kept = kept_attention_llvm.focused(q, k, v, bias, None, 32)
    for row, found, logits in zip(
        bias.tolist(), kept.keys[0, :, 0].tolist(), kept.logits[0, :, 0].tolist(), strict=True
    ):
        assert found == sorted(sorted(range(96), key=lambda i: -row[i])[:32])
        assert logits == [row[i] for i in found]


def test_extreme_logits(lanes: int) -> None:
    """A row of one large logit, and one of only lowest ones, as shift masks and small floats have them."""
    bias = torch.full((64, 64), -100.0)
    bias[:, 7], bias[3] = 3e4, -3e38
    q = k = torch.zeros(1, 64, 1, 4)
    v = torch.randn(1, 64, 1, 4, generator=torch.Generator().manual_seed(0))
    out, kept = kept_attention_llvm.focused(q, k, v, bias, None, 32)
    assert torch.equal(out[0, 0], v[0, 7])
    torch.testing.assert_close(out[0, 3, 0], v[0, :32, 0].sum(0) / 64)  # of all 64 equal weights
    assert kept.keys[0, 0, 0].tolist() == [*range(32)]


def test_what_is_no_number_spoils_its_row_alone(lanes: int) -> None:
    q, k, v, bias, _ = operands(*CASES['some of all keys'])
    bias[3, 5] = float('nan')
    out, kept = kept_attention_llvm.focused(q, k, v, bias, None, 32)
    truth, expected = focused(q, k, v, bias, None, 32)
    assert out[:, 3].isnan().all()
    assert out.isnan().sum() == out[:, 3].numel() == truth.isnan().sum()
    assert torch.equal(kept.keys, expected.keys)
    assert not (kept.keys[:, 3] == 5).any()


def test_kept_logits_are_written_over() -> None:
    given = operands(*CASES['keys from before'])
    _, kept = kept_attention_llvm.focused(*given, 64)
    assert kept.logits.data_ptr() == given[-1].logits.data_ptr()
