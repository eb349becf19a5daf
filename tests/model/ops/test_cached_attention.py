from functools import partial

import pytest
import torch
from torch import Tensor

from model.ops import cached_attention
from model.ops.cached_attention import cached_attention as attend
from tests.conftest import kept_for_gradients

WINDOWS, TOKENS, HEADS, CHANNELS = 5, 6, 2, 3
KINDS = torch.tensor([0, 1, 1, 0, 2])


def inputs(masked: bool) -> list[Tensor]:
    """Queries, keys and values, in memory that they share, and the masks of three kinds of windows."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(WINDOWS, TOKENS, 3, HEADS, CHANNELS)] + [(HEADS, 3, TOKENS, TOKENS)] * masked
    qkv, *masks = (torch.randn(s, dtype=torch.float64, generator=generator).requires_grad_() for s in shapes)
    return [*qkv.unbind(2), *masks]


def plain(q: Tensor, k: Tensor, v: Tensor, masks: Tensor | None, kinds: Tensor, scale: float) -> Tensor:
    logits = scale * torch.einsum('bqhd,bkhd->bhqk', q, k)
    weights = (logits if masks is None else logits + masks[:, kinds].transpose(0, 1)).softmax(-1)
    return torch.einsum('bhqk,bkhd->bqhd', weights, v)


@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize('at_once', [1, 2, WINDOWS, 9])
def test_results_and_gradients(at_once: int, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cached_attention, 'CACHED_LOGITS', at_once * TOKENS**2)
    tensors = inputs(masked)
    arguments = (*tensors, *[None] * (not masked), KINDS, 0.7)
    found, truth = attend(*arguments), plain(*arguments)
    torch.testing.assert_close(found, truth, rtol=0, atol=1e-12)
    with torch.no_grad():
        assert torch.equal(attend(*arguments), found)
    seed = torch.randn(found.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        torch.autograd.grad(found, tensors, seed), torch.autograd.grad(truth, tensors, seed), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize('at_once', [1, 2, 9])
def test_keys_and_values_of_other_sizes(at_once: int, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four keys for six queries, the same ones for all windows, and values of five channels."""
    monkeypatch.setattr(cached_attention, 'CACHED_LOGITS', at_once * TOKENS * 4)
    generator = torch.Generator().manual_seed(0)
    shapes = [(WINDOWS, TOKENS, HEADS, 3), (1, 4, HEADS, 3), (1, 4, HEADS, 5)] + [(HEADS, 3, TOKENS, 4)] * masked
    tensors = [torch.randn(s, dtype=torch.float64, generator=generator).requires_grad_() for s in shapes]
    q, k, v, *masks = tensors
    arguments = (q, k.expand(WINDOWS, -1, -1, -1), v.expand(WINDOWS, -1, -1, -1), *(masks or [None]), KINDS, 0.7)
    found, truth = attend(*arguments), plain(*arguments)
    torch.testing.assert_close(found, truth, rtol=0, atol=1e-12)
    gradients = torch.autograd.grad(found.square().sum(), tensors)
    torch.testing.assert_close(gradients, torch.autograd.grad(truth.square().sum(), tensors), rtol=0, atol=1e-11)


@pytest.mark.parametrize('kind', [0, 1, 2])
@pytest.mark.parametrize('offset', [-1e5, -1e3, -95.0, -60.0, 60.0, 95.0, 1e3, 1e5])
def test_logits_that_are_all_large_or_small(offset: float, kind: int) -> None:
    *qkv, masks = inputs(True)
    offsets = torch.zeros_like(masks)
    offsets[1, kind] = offset
    tensors = [tensor.detach().float().requires_grad_() for tensor in (*qkv, masks + offsets)]
    found, truth = attend(*tensors, KINDS, 0.7), plain(*qkv, masks, KINDS, 0.7)  # which an offset does not change
    close = partial(torch.testing.assert_close, rtol=0, atol=2e-7 * max(abs(offset), 20))
    close(found.double(), truth)
    gradients = torch.autograd.grad(found.square().sum(), tensors)
    close([x.double() for x in gradients], list(torch.autograd.grad(truth.square().sum(), [*qkv, masks])))


@pytest.mark.parametrize('factor', [1e-20, 1e20])
@pytest.mark.parametrize('offset', [-20.0, 20.0])
def test_values_near_the_ends_of_float32(factor: float, offset: float) -> None:
    *qkv, masks = (tensor.detach() for tensor in inputs(True))
    q, k, v, shifted = (tensor.float() for tensor in (*qkv, masks + offset))
    found = attend(q, k, factor * v, shifted, KINDS, 0.7) / factor
    torch.testing.assert_close(found.double(), plain(*qkv, masks, KINDS, 0.7), rtol=0, atol=1e-5)


def test_large_logits() -> None:
    q, k, v = inputs(False)
    found = attend(1e3 * q, 1e3 * k, v, None, KINDS, 1.0)
    best = torch.einsum('bqhd,bkhd->bhqk', q, k).argmax(-1)  # all the weight is on one key
    expected = torch.stack([v[b, best[b, h], h] for b in range(WINDOWS) for h in range(HEADS)])
    torch.testing.assert_close(found.transpose(1, 2).flatten(0, 1), expected, rtol=0, atol=1e-9)


def test_no_map_is_kept_for_the_gradients() -> None:
    kept = kept_for_gradients(lambda: attend(*inputs(True), KINDS, 1.0))
    rows = WINDOWS * TOKENS * HEADS
    masks = HEADS * 3 * TOKENS**2
    assert sorted(tensor.numel() for tensor in kept) == sorted([WINDOWS, rows, rows, *[rows * CHANNELS] * 3, masks])
