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


def heads_of(kinds: Tensor, *tensors: Tensor) -> Iterator[tuple[int, Tensor, tuple[Tensor, ...]]]:
    """Head by head the parts (b, T, d) of tensors (B, T, heads, d), of b windows at once, and the kinds of these."""
    b = at_once(tensors[0])
    for part, *parts in zip(kinds.split(b), *(x.split(b) for x in tensors), strict=True):
        for head, of_head in enumerate(zip(*(x.unbind(2) for x in parts), strict=True)):
            yield head, part, of_head


class Maps:
    """Maps (b, T, T) of parts of the queries (B, T, heads, d), by turns in the same memory.

    Rows are not yet divided by their sums. Powers are of 2, which PyTorch finds faster than those of e.
    """

    def __init__(self, q: Tensor, masks: Tensor | None, scale: float) -> None:
        self.memory = q.new_empty(at_once(q), q.shape[1], q.shape[1])
        self.masks = None if masks is None else (masks * LOG2_E).unbind()
        self.scale = scale * LOG2_E

    def __call__(self, head: int, kinds: Tensor, query: Tensor, key: Tensor) -> Tensor:
        logits = self.memory[: len(query)]
        if self.masks is None:
            logits.baddbmm_(query, key.mT, beta=0, alpha=self.scale)
        else:
            torch.index_select(self.masks[head], 0, kinds, out=logits)
            logits.baddbmm_(query, key.mT, alpha=self.scale)
        return logits.sub_(logits.amax(-1, keepdim=True)).exp2_()


def forward(q: Tensor, k: Tensor, v: Tensor, masks: Tensor | None, kinds: Tensor, scale: float) -> Tensor:
    """See `cached_attention`."""
    maps, out = Maps(q, masks, scale), torch.empty_like(q)
    for head, part, (query, key, value, result) in heads_of(kinds, q, k, v, out):
        weights = maps(head, part, query, key)
        torch.div(value.mT @ weights.mT, weights.sum(-1).unsqueeze(1), out=result.mT)
    return out


class CachedAttention(torch.autograd.Function):
    """See `cached_attention`. The backward pass makes the maps again.

    Products are written with the T x T matrix on the right, where they are wide and fast.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, masks: Tensor | None, kinds: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(q, k, v, masks, kinds)
        ctx.scale = scale
        return forward(q, k, v, masks, kinds, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, masks, kinds = ctx.saved_tensors
        maps, grads = Maps(q, masks, ctx.scale), [torch.empty_like(x) for x in (q, k, v)]
        memory = torch.empty_like(maps.memory)
        grad_masks = None if masks is None else torch.zeros_like(masks)
        for head, part, (query, key, value, by_result, *found) in heads_of(kinds, q, k, v, grad, *grads):
            weights, by_logits = maps(head, part, query, key), memory[: len(query)]
            weights.div_(weights.sum(-1, keepdim=True))
            found[2].copy_((by_result.mT @ weights).mT)
            torch.bmm(by_result, value.mT, out=by_logits)  # so far by the weights
            by_logits.mul_(weights)
            by_logits.addcmul_(weights, by_logits.sum(-1, keepdim=True), value=-1)
            found[0].copy_((key.mT @ by_logits.mT).mT * ctx.scale)
            found[1].copy_((query.mT @ by_logits).mT * ctx.scale)
            if grad_masks is not None:
                grad_masks[head].index_add_(0, part, by_logits)
        return *grads, grad_masks, None, None


def cached_attention(q: Tensor, k: Tensor, v: Tensor, masks: Tensor | None, kinds: Tensor, scale: float) -> Tensor:
    """softmax(scale * q k^T + mask) v for each window and head: (B, T, heads, d). It can be differentiated once.

    Args:
        q, k, v: (B, T, heads, d), float32 or float64, with B of 1 or more and T^2 of at most `CACHED_LOGITS`.
        masks: (heads, kinds, T, T) or None.
        kinds: (B,) int64, which of the masks is a window's.
        scale: factor of the products.
    """
    run = CachedAttention.apply if torch.is_grad_enabled() else forward
    return run(q, k, v, masks, kinds, scale)
