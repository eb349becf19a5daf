import pytest
import torch
from torch import Tensor

from model.blocks.windows import attention
from tests.conftest import numbers


@pytest.mark.parametrize('n_tokens', [1, 6])
# Which mask each of the five windows has; [] for none.
@pytest.mark.parametrize('masks_of', [[], [0, 0, 0, 0, 0], [0, 1, 1, 1, 1], [0, 0, 1, 2, 2]])
@pytest.mark.parametrize('scale', [None, 0.7])
def test_attention_is_a_mean_weighted_by_a_softmax(n_tokens: int, masks_of: list[int], scale: float | None) -> None:
    q, k, v = numbers(3, 5, n_tokens, 2, 5)
    masks = numbers(2, max(masks_of) + 1, n_tokens, n_tokens) if masks_of else None
    logits = torch.einsum('bqhd,bkhd->bhqk', q, k) * (5**-0.5 if scale is None else scale)
    weights = (logits if masks is None else logits + masks[:, masks_of].transpose(0, 1)).exp()
    expected = torch.einsum('bhqk,bkhd->bqhd', weights / weights.sum(-1, keepdim=True), v).flatten(2)
    counts = torch.tensor(masks_of).unique(return_counts=True)[1].tolist() if any(masks_of) else None
    torch.testing.assert_close(attention(q, k, v, masks, counts, scale), expected, rtol=0, atol=1e-12)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, masks, counts, scale)

    example = (q, k, v) if counts else (q[:1], k[:1], v[:1])  # with which any number of windows of one kind has to do
    traced = torch.jit.trace(attend, example)
    torch.testing.assert_close(traced(q, k, v), expected, rtol=0, atol=1e-12)
    masks = masks if masks is None else masks.bfloat16()
    half = attend(q.bfloat16(), k.bfloat16(), v.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), expected, rtol=0.1, atol=0.1)
