import pytest
import torch
from torch import Tensor

from model.ops import table_attention
from model.ops.table_attention import table_attention as attend

WINDOWS, SIZE, HEADS, CHANNELS = 2, 3, 2, 4
TOKENS = SIZE**2


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys and values, in memory that they share, and biases as windows of a table."""
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(WINDOWS, TOKENS, 3, HEADS, CHANNELS, dtype=torch.float64, generator=generator)
    table = torch.randn(HEADS, 2 * SIZE - 1, 2 * SIZE - 1, dtype=torch.float64, generator=generator)
    return *qkv.unbind(2), table.unfold(1, SIZE, 1).unfold(2, SIZE, 1)


def plain(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    logits = 0.7 * torch.einsum('bqhd,bkhd->bhqk', q, k) + bias.reshape(HEADS, TOKENS, TOKENS)
    return torch.einsum('bhqk,bkhd->bqhd', logits.softmax(-1), v)


@pytest.mark.parametrize('rows', [1, 2, 3, 9])  # of queries at once: not a divisor too, and more than there are
def test_equals_the_plain_form(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_attention, 'CACHED_LOGITS', 2 * HEADS * rows * SIZE * TOKENS)
    q, k, v, bias = inputs()
    before = bias.clone()
    torch.testing.assert_close(attend(q, k, v, bias, 0.7), plain(q, k, v, bias), rtol=0, atol=1e-12)
    assert torch.equal(bias, before)


@pytest.mark.parametrize('offset', [-1e5, -1e3, -95.0, -60.0, 60.0, 95.0, 1e3, 1e5])
def test_logits_that_are_all_large_or_small(offset: float) -> None:
    q, k, v, bias = inputs()
    found = attend(q.float(), k.float(), v.float(), (bias + offset).float(), 0.7)
    truth = plain(q, k, v, bias)  # which an offset does not change
    torch.testing.assert_close(found.double(), truth, rtol=0, atol=2e-7 * max(abs(offset), 20))
