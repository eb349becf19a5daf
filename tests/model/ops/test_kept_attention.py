import math

import pytest
import torch
from torch import Tensor

from model.ops import kept_attention
from model.ops.kept_attention import best, kept_logits, kept_values, products, read
from tests.conftest import numbers

SHAPES = [(1, 32, 2, 13, 7), (3, 12, 2, 5, 12), (2, 7, 1, 16, 1)]  # windows, tokens, heads, channels, kept keys
shapes = pytest.mark.parametrize('shape', SHAPES)


def operands(b: int, t: int, heads: int, d: int, kept: int) -> tuple[list[Tensor], Tensor]:
    """Queries, keys, values (in memory that they share), bias and weights; and which keys are kept, in no order."""
    q, k, v = numbers(b, t, 3, heads, d, seed=1).unbind(2)
    keys = numbers(b, t, heads, t, seed=2).argsort(-1)[..., :kept].short()
    return [q, k, v, numbers(t, t, seed=3), numbers(b, t, heads, kept, seed=4)], keys


def gathered(rows: Tensor, keys: Tensor) -> Tensor:
    """The rows (B, T, heads, d) of the kept keys: (B, T, heads, K, d)."""
    b, _, heads, _ = keys.shape
    return rows[torch.arange(b).view(-1, 1, 1, 1), keys.long(), torch.arange(heads).view(-1, 1)]


def plain_logits(q: Tensor, k: Tensor, bias: Tensor, keys: Tensor) -> Tensor:
    queries = torch.arange(keys.shape[1]).view(-1, 1, 1)
    return (gathered(k, keys) * q.unsqueeze(-2)).sum(-1) + bias[queries, keys.long()]


def plain_values(weights: Tensor, v: Tensor, keys: Tensor) -> Tensor:
    return (gathered(v, keys) * weights.unsqueeze(-1)).sum(-2)


@shapes
@torch.no_grad()
def test_products_of_whole_windows(shape: tuple[int, ...]) -> None:
    (q, k, v, *_), _ = operands(*shape)
    found = products(q, k)
    for window, query, head, key in [(0, 0, 0, 0), (0, 6, 0, 3), (shape[0] - 1, shape[1] - 1, shape[2] - 1, 5)]:
        assert found[window, query, head, key].item() == pytest.approx(
            (q[window, query, head] @ k[window, key, head]).item()
        )
    assert torch.allclose(found, torch.einsum('bihd,bjhd->bihj', q, k), rtol=0, atol=1e-12)
    assert torch.allclose(read(found, v), torch.einsum('bihj,bjhd->bihd', found, v), rtol=0, atol=1e-10)


@shapes
def test_results_with_and_without_gradients(shape: tuple[int, ...]) -> None:
    (q, k, v, bias, weights), keys = operands(*shape)
    truths = plain_logits(q, k, bias, keys), plain_values(weights, v, keys)
    for enabled in (False, True):
        with torch.set_grad_enabled(enabled):
            for found, truth in zip(
                (kept_logits(q, k, bias, keys), kept_values(weights, v, keys)), truths, strict=True
            ):
                assert torch.allclose(found, truth, rtol=0, atol=1e-12)


@shapes
def test_gradients(shape: tuple[int, ...]) -> None:
    tensors, keys = operands(*shape)
    q, k, v, bias, weights = (x.clone().requires_grad_() for x in tensors)
    for found, truth, leaves in [
        (kept_logits(q, k, bias, keys), plain_logits(q, k, bias, keys), (q, k, bias)),
        (kept_values(weights, v, keys), plain_values(weights, v, keys), (weights, v)),
    ]:
        seed = numbers(*truth.shape, seed=9)
        for one, other in zip(*(torch.autograd.grad(x, leaves, seed) for x in (found, truth)), strict=True):
            assert torch.allclose(one, other, rtol=0, atol=1e-11)


@pytest.mark.parametrize('rows', [2, 512])
def test_the_best_of_each_row(rows: int, monkeypatch) -> None:
    monkeypatch.setattr(kept_attention, 'ROWS', rows)
    x = numbers(2, 3, 2, 50)
    found = best(x, 7)
    for row, places in zip(x.flatten(0, 2).tolist(), found.flatten(0, 2).tolist(), strict=True):
        assert places == sorted(sorted(range(50), key=lambda i: -row[i])[:7])


def test_the_first_of_equal_values_are_the_best() -> None:
    x = torch.tensor([[1.0, 2, 1, 3, 1, 1], [0.0, 0, 0, 0, 0, 0], [5.0, 4, 3, 2, 1, 0]])
    assert best(x, 4).tolist() == [[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3]]
    assert best(x, 3).tolist() == [[0, 1, 3], [0, 1, 2], [0, 1, 2]]


def test_what_is_no_number_is_not_among_the_best_unless_it_must() -> None:
    x = torch.tensor([[math.nan, 1, 2, 3], [math.nan, math.nan, math.nan, 1.0]])
    assert best(x, 2).tolist() == [[2, 3], [0, 3]]


@shapes
def test_forms_for_other_devices_are_the_same(shape: tuple[int, ...], monkeypatch) -> None:
    (q, k, v, bias, weights), keys = operands(*shape)
    monkeypatch.setattr(kept_attention, 'is_plain', lambda x: True)
    with torch.no_grad():
        assert torch.allclose(kept_logits(q, k, bias, keys), plain_logits(q, k, bias, keys), rtol=0, atol=1e-12)
        assert torch.allclose(kept_values(weights, v, keys), plain_values(weights, v, keys), rtol=0, atol=1e-12)
    assert best(bias, shape[4]).sort()[0].equal(bias.argsort(descending=True)[:, : shape[4]].sort()[0])
