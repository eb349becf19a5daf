"""The kernel of progressive focused attention, against its plain form in float64, which has tests of its own."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from model.blocks.windows import relative_positions, shift_areas
from model.ops import fast
from model.ops.llvm import progressive_attention as kernels
from model.ops.progressive_attention import Kept, Whole, attend, joined, listed, progressive_attention
from tests.model.ops.conftest import Call, x86_alone

pytestmark = pytest.mark.usefixtures('no_gradients')
KERNELS = (kernels,)
CALLED = ((kernels, 'attend'),)

CLOSE = 1e-5  # of the largest value
CASES = {  # side of a window, heads, channels of keys and of values, entries before (0: all tokens), entries kept
    'all keys': (8, 2, 13, 16, 0, 64),
    'some of all keys': (8, 3, 39, 16, 0, 32),
    'a long row': (32, 1, 26, 16, 0, 256),
    'keys from before': (24, 2, 13, 13, 64, 64),
    'some of those before': (16, 2, 7, 20, 64, 32),
    'few keys': (8, 1, 16, 16, 32, 64),
}
COUNTS = [2, 1]  # windows within the image, and in its corner


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def operands(side: int, heads: int, d: int, e: int, entries: int, topk: int) -> tuple:
    """Queries, keys and values with gaps in memory, biases, areas, what was kept before, and how many are kept.

    Numbers are multiples of 1/16, and where some are chosen 1/sqrt(e) is one of 1/4: logits in float32 have no
    rounding that would change what is kept.
    """
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) * 16).round() / 16

    b, t = sum(COUNTS), side**2
    q, k, v = (numbers(b * t, 2, heads, c)[:, 1] for c in (d, d, e))
    order = torch.randperm(b * t, generator=generator)
    table, before = numbers((2 * side - 1) ** 2), None
    if entries:
        keys = torch.randn(b, t, heads, t, generator=generator).argsort(-1)[..., :entries].sort(-1)[0].short()
        before = [Kept(numbers(b, t, heads, entries), keys)]
    areas = shift_areas(side, side // 2 - 1)[[0, 3]]
    return q, k, v, table, relative_positions(side), order, order.argsort(), areas, COUNTS, before, topk


def wide(q: Tensor, k: Tensor, v: Tensor, table: Tensor, *others) -> tuple:
    """In float64."""
    *same, before, topk = others
    before = before and [Kept(x.logits.double(), x.keys) for x in before]
    return *(x.double() for x in (q, k, v, table)), *same, before, topk


def check(found: Tensor, truth: Tensor) -> None:
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), truth, rtol=0, atol=CLOSE * float(truth.abs().max()))


@pytest.mark.parametrize('case', CASES)
def test_results_and_what_is_kept(case: str, lanes: int, threads: None) -> None:
    given = operands(*CASES[case])
    truth, expected = attend(*wide(*given))
    out, found = kernels.attend(*given)
    check(out, truth)
    assert (found is None) == (expected is None)
    if found:
        kept, expected = listed(joined(found)), joined(expected)
        assert kept.keys.dtype == torch.int16
        assert torch.equal(kept.keys, expected.keys.short())
        check(kept.logits, expected.logits)


@pytest.mark.parametrize(
    ('side', 'kept'),
    [
        (8, (64, 64, 64, 50, 32, 32)),  # keeps no whole block in between, which the plain form does
        (32, (1024, 256, 256, 128, 64, 64)),  # keys as marks, then as numbers
        (24, (192, 160, 96)),  # so many numbers that they have no room where the marks were
        (16, (96, 50)),  # the plain form gets marks
    ],
)
def test_layer_after_layer(side: int, kept: tuple[int, ...], lanes: int) -> None:
    """With all that is handed on."""
    layers = [(*operands(side, 1, 16, 16, 0, topk)[:9], topk) for topk in kept]
    focus = truth = None
    for *given, topk in layers:
        out, focus = progressive_attention(*given, focus, topk)
        doubled = [x.double() for x in given[:4]]
        expected, truth = progressive_attention(*doubled, *given[4:], truth, topk)
        check(out, expected)
        assert isinstance(focus, Whole) == isinstance(truth, Whole)
        if isinstance(focus, list):
            assert torch.equal(listed(joined(focus)).keys, joined(truth).keys)


def test_the_kernel_is_called(calls: list[Call], monkeypatch: pytest.MonkeyPatch) -> None:
    def run(side: int, topk: int, double: bool = False) -> None:
        given = operands(side, 2, 4, 4, 0, topk)
        progressive_attention(*(wide(*given) if double else given))

    run(8, 32)
    assert len(calls) == 1
    monkeypatch.setattr(fast, 'wanted', False)
    run(8, 64)
    monkeypatch.setattr(fast, 'wanted', True)
    with torch.enable_grad():
        run(8, 64)
    run(8, 33)  # not a whole block
    run(8, 64, double=True)
    run(7, 49)
    assert len(calls) == 1


def alone(bias_of: Tensor, count: int) -> Kept:
    """What is kept of logits that are nothing but those of before, (T, K), in a window of 8x8 tokens."""
    nothing, order = torch.zeros(64, 1, 4), torch.arange(64)
    entries = bias_of.shape[1]
    before = [Kept(bias_of.view(1, 64, 1, entries).clone(), torch.arange(entries).short().expand(1, 64, 1, entries))]
    areas = torch.zeros(1, 64, dtype=torch.int32)
    given = nothing, nothing, nothing, torch.zeros(225), relative_positions(8), order, order, areas, [1], before
    _, kept = kernels.attend(*given, count)
    return kept[0]


def test_the_first_of_equal_entries_are_kept(lanes: int) -> None:
    """Whole numbers, each many times."""
    logits = torch.randint(-3, 3, (64, 64), generator=torch.Generator().manual_seed(1)).float() * 0.0625
    logits[5] = 0
    logits[5, ::2] = -0.0
    kept = alone(logits, 32)
    for row, found, values in zip(
        logits.tolist(), kept.keys[0, :, 0].tolist(), kept.logits[0, :, 0].tolist(), strict=True
    ):
        assert found == sorted(sorted(range(64), key=lambda i: -row[i])[:32])
        assert values == [row[i] for i in found]


@pytest.mark.parametrize('scale', [1e-30, 1e-3, 1, 1e4, 1e36])
def test_rows_of_every_shape_are_narrowed(scale: float, lanes: int) -> None:
    """Even, normal, with a long tail up or down, in two heaps, and with one or some lowest or highest outlier."""
    generator = torch.Generator().manual_seed(2)
    normal = torch.randn(64, 64, generator=generator)
    normal[8:16] = normal[8:16].exp() ** 3
    normal[16:24] = -(normal[16:24].exp() ** 3)
    normal[24:32, ::2] -= 100
    normal[32:40, 7] = 3e4
    normal[40:48, 3:60] = -3e2
    normal[48:56, 9] = float('-inf')
    normal[56] = torch.arange(64)
    normal *= scale
    truth = normal.sort(dim=-1, descending=True, stable=True)[1][:, :32].sort(-1)[0]
    assert torch.equal(alone(normal, 32).keys[0, :, 0], truth.short())


@x86_alone
def test_of_subnormal_logits_the_first_are_kept(lanes: int) -> None:
    kept = alone(1e-39 * torch.randn(64, 64, generator=torch.Generator().manual_seed(2)), 32)
    assert kept.keys[0, :, 0].tolist() == [[*range(32)]] * 64


def test_extreme_logits(lanes: int) -> None:
    """A row of one large bias, and one of only lowest ones, as shift masks and small floats have them."""
    q, k, v, _, positions, order, inverse, *_ = operands(8, 1, 4, 4, 0, 64)
    table, areas = torch.full((225,), -100.0), torch.arange(64, dtype=torch.int32).view(1, 64)  # each pixel has its own
    table[0] = 3e4  # of the first query and the last key
    out, kept = kernels.attend(q * 0, k, v, table, positions, order, inverse, areas, [3], None, 32)
    assert torch.equal(out[order[0], 0], v[order[63], 0])
    torch.testing.assert_close(out[order[3], 0], v[order[3], 0])  # all others are 100 less
    assert listed(kept[0]).keys[0, 3, 0].tolist() == [*range(32)]


def test_what_is_no_number_spoils_its_row_alone(lanes: int) -> None:
    given = operands(8, 2, 16, 16, 0, 32)
    rows = given[5].view(3, 64)[:, 3]
    given[0][rows, :, 0] = float('nan')
    out, found = kernels.attend(*given)
    truth, expected = attend(*given)
    assert out[rows].isnan().all()
    assert out.isnan().sum() == out[rows].numel() == truth.isnan().sum()
    assert torch.equal(listed(joined(found)).keys[:, :3], joined(expected).keys[:, :3])
    assert all(len(set(row)) == 32 for row in listed(joined(found)).keys[:, 3].flatten(0, 1).tolist())


def test_what_is_kept_takes_the_place_of_what_was() -> None:
    *given, _, _ = operands(16, 2, 16, 16, 0, 64)
    _, first = kernels.attend(*given, None, 64)
    place, size = first[0].logits.data_ptr(), first[0].logits.untyped_storage().nbytes()
    _, second = kernels.attend(*given, first, 32)
    assert second[0].logits.data_ptr() == place
    assert second[0].logits.untyped_storage().nbytes() == size
