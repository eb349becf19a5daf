"""Softmax attention on a CPU, for many windows of few channels: maps are made a few at a time, and none is kept."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CACHED_LOGITS = 2**20  # that a CPU's cache holds: 4 MB in float32, twice that in the backward pass
LOG2_E = 1 / math.log(2)


def at_once(q: Tensor) -> int:
    """How many of the windows of `q` (B, T, heads, d) have maps that the cache holds."""
    b, t, _, _ = q.shape
    return min(b, CACHED_LOGITS // t**2)


def heads_of(*tensors: Tensor) -> Iterator[tuple[int, list[Tensor]]]:
    """Head by head the parts (b, T, d) of tensors (B, T, heads, d), of b windows at once."""
    for parts in zip(*(x.split(at_once(tensors[0])) for x in tensors), strict=True):
        for head in range(parts[0].shape[2]):
            yield head, [x[:, :, head] for x in parts]


class Maps:
    """Maps (b, T, T) of parts of the queries (B, T, heads, d), by turns in the same memory.

    Rows are not yet divided by their sums. Powers are of 2, which PyTorch finds faster than those of e.
    """

    def __init__(self, q: Tensor, mask: Tensor | None, scale: float) -> None:
        _, t, heads, _ = q.shape
        self.memory = q.new_empty(at_once(q), t, t)
        self.masks = [q.new_zeros(())] * heads if mask is None else (mask * LOG2_E).unbind()
        self.scale = scale * LOG2_E

    def __call__(self, head: int, query: Tensor, key: Tensor) -> Tensor:
        logits = self.memory[: len(query)]
        torch.baddbmm(self.masks[head], query, key.mT, alpha=self.scale, out=logits)
        return logits.sub_(logits.amax(-1, keepdim=True)).exp2_()


class CachedAttention(torch.autograd.Function):
    """See `cached_attention`. The backward pass makes the maps again.

    Products are written with the T x T matrix on the right, where they are wide and fast.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        maps, out = Maps(q, mask, scale), torch.empty_like(q)
        for head, (query, key, value, result) in heads_of(q, k, v, out):
            weights = maps(head, query, key)
            torch.div((value.mT @ weights.mT).mT, weights.sum(-1, keepdim=True), out=result)
        ctx.save_for_backward(q, k, v, mask)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mask = ctx.saved_tensors
        maps, grads = Maps(q, mask, ctx.scale), [torch.empty_like(x) for x in (q, k, v)]
        memory = torch.empty_like(maps.memory)
        grad_mask = None if mask is None else torch.zeros_like(mask)
        for head, (query, key, value, by_result, *found) in heads_of(q, k, v, grad, *grads):
            weights, by_logits = maps(head, query, key), memory[: len(query)]
            weights.div_(weights.sum(-1, keepdim=True))
            found[2].copy_((by_result.mT @ weights).mT)
            torch.bmm(by_result, value.mT, out=by_logits)  # so far by the weights
            by_logits.mul_(weights)
            by_logits.addcmul_(weights, by_logits.sum(-1, keepdim=True), value=-1)
            found[0].copy_((key.mT @ by_logits.mT).mT * ctx.scale)
            found[1].copy_((query.mT @ by_logits).mT * ctx.scale)
            if grad_mask is not None:
                grad_mask[head] += by_logits.sum(0)
        return *grads, grad_mask, None


def cached_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """softmax(scale * q k^T + mask) v for each window and head: (B, T, heads, d). It can be differentiated once.

    Args:
        q, k, v: (B, T, heads, d), float32 or float64, with B of 1 or more and T^2 of at most `CACHED_LOGITS`.
        mask: (heads, T, T) or None.
        scale: factor of the products.
    """
    return CachedAttention.apply(q, k, v, mask, scale)
