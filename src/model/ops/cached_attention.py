"""Softmax attention on a CPU, for many windows of few channels: maps are made a few at a time, and none is kept.

A kernel of `llvm.cached_attention` makes no maps at all, where llvmlite is installed, and another one the gradients.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.ops.fast import by_llvm, has_llvm, operation

CACHED_LOGITS = 2**20  # that a CPU's cache holds: 4 MB in float32, twice that in the backward pass
LOG2_E = 1 / math.log(2)
MOST_CHANNELS = 40  # of a head, that a kernel takes
LEAST_QUERIES = 16  # of a window, that fill a vector of a kernel


def at_once(q: Tensor, k: Tensor) -> int:
    """How many of the windows of `q` (B, T, heads, d) and `k` (B, S, heads, d) have maps that the cache holds."""
    return min(len(q), CACHED_LOGITS // (q.shape[1] * k.shape[1]))


def heads_of(kinds: Tensor, q: Tensor, k: Tensor, *others: Tensor) -> Iterator[tuple[int, Tensor, tuple[Tensor, ...]]]:
    """Head by head the parts (b, ., .) of tensors (B, ., heads, .), of b windows at once, and the kinds of these."""
    b, tensors = at_once(q, k), (q, k, *others)
    for part, *parts in zip(kinds.split(b), *(x.split(b) for x in tensors), strict=True):
        for head, of_head in enumerate(zip(*(x.unbind(2) for x in parts), strict=True)):
            yield head, part, of_head


class Logits:
    """Logits (b, T, S) to base 2 of parts of queries and keys (B, ., heads, d), by turns in the same memory.

    PyTorch finds powers of 2 faster than those of e.
    """

    def __init__(self, q: Tensor, k: Tensor, masks: Tensor | None, scale: float) -> None:
        self.memory = q.new_empty(at_once(q, k), q.shape[1], k.shape[1])
        self.masks = None if masks is None else (masks * LOG2_E).unbind()
        self.scale = scale * LOG2_E

    def __call__(self, head: int, kinds: Tensor, query: Tensor, key: Tensor) -> Tensor:
        logits = self.memory[: len(query)]
        if self.masks is None:
            return logits.baddbmm_(query, key.mT, beta=0, alpha=self.scale)
        torch.index_select(self.masks[head], 0, kinds, out=logits)
        return logits.baddbmm_(query, key.mT, alpha=self.scale)


def in_range(sums: Tensor) -> bool:
    """Whether sums of powers of 2 show that all that count are far from the ends of float32, 2^-126 and 2^128."""
    least, greatest = sums.aminmax()
    return float(least) > 2**-32 and float(greatest) < 2**32


def forward(
    q: Tensor, k: Tensor, v: Tensor, masks: Tensor | None, kinds: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See `cached_attention`; also the sum of each row's powers of 2, and what was subtracted before, (B, T, heads, 1).

    The greatest logit of a row is subtracted only after powers without that have been out of range.
    """
    logits_of, out = Logits(q, k, masks, scale), q.new_empty(*q.shape[:3], v.shape[3])
    sums, greatest = (q.new_zeros(*q.shape[:3], 1) for _ in range(2))
    subtract = False
    for head, part, (query, key, value, result, total, most) in heads_of(kinds, q, k, v, out, sums, greatest):
        if not subtract:
            powers = logits_of(head, part, query, key).exp2_()
            subtract = not in_range(torch.sum(powers, -1, keepdim=True, out=total))
        if subtract:
            logits = logits_of(head, part, query, key)
            powers = logits.sub_(torch.amax(logits, -1, keepdim=True, out=most)).exp2_()
            torch.sum(powers, -1, keepdim=True, out=total)
        torch.div(value.mT @ powers.mT, total.mT, out=result.mT)
    return out, sums, greatest


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    masks: Tensor | None,
    kinds: Tensor,
    scale: float,
    sums: Tensor,
    greatest: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `gradients`, given also what `forward` found of each row. The maps are made again.

    Products are written with the T x S matrix on the right, where they are wide and fast.
    """
    logits_of, (by_q, by_k, by_v) = Logits(q, k, masks, scale), (torch.empty_like(x) for x in (q, k, v))
    memory = torch.empty_like(logits_of.memory)
    grad_masks = q.new_empty(0) if masks is None else torch.zeros_like(masks)
    parts = heads_of(kinds, q, k, v, sums, greatest, grad / sums, by_q, by_k, by_v)
    for head, part, (query, key, value, total, most, by_sums, *found) in parts:
        powers, by_logits = logits_of(head, part, query, key).sub_(most).exp2_(), memory[: len(query)]
        found[2].copy_((by_sums.mT @ powers).mT)
        torch.bmm(by_sums, value.mT, out=by_logits).mul_(powers)
        by_logits.addcmul_(powers, by_logits.sum(-1, keepdim=True) / total, value=-1)
        found[0].copy_((key.mT @ by_logits.mT).mT * scale)
        found[1].copy_((query.mT @ by_logits).mT * scale)
        if masks is not None:
            grad_masks[head].index_add_(0, part, by_logits)
    return by_q, by_k, by_v, grad_masks


class CachedAttention(torch.autograd.Function):
    """See `cached_attention`."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, masks: Tensor | None, kinds: Tensor, scale: float) -> Tensor:
        rows: list[Tensor] = []
        if is_for_kernel(q, q.shape[1], max(q.shape[3], v.shape[3])):
            out = fast_without_gradients(q, k, v, masks, kinds, scale)
        else:
            out, *rows = forward(q, k, v, masks, kinds, scale)
        ctx.save_for_backward(q, k, v, masks, kinds, *rows)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, masks, kinds, *rows = ctx.saved_tensors
        if rows:
            *grads, grad_masks = backward(grad, q, k, v, masks, kinds, ctx.scale, *rows)
        else:
            *grads, grad_masks = fast_gradients(grad, q, k, v, masks, kinds, ctx.scale)
        return *grads, None if masks is None else grad_masks, None, None


def cached_attention(q: Tensor, k: Tensor, v: Tensor, masks: Tensor | None, kinds: Tensor, scale: float) -> Tensor:
    """softmax(scale * q k^T + mask) v for each window and head: (B, T, heads, e). It can be differentiated once.

    Args:
        q, k, v: (B, T, heads, d), (B, S, heads, d) and (B, S, heads, e), float32 or float64, with B of 1 or more and
            T * S of at most `CACHED_LOGITS`.
        masks: (heads, kinds, T, S) or None.
        kinds: (B,) int64, which of the masks is a window's.
        scale: factor of the products.
    """
    if torch.is_grad_enabled():
        return CachedAttention.apply(q, k, v, masks, kinds, scale)
    fast = is_for_kernel(q, q.shape[1], max(q.shape[3], v.shape[3]))
    return (fast_without_gradients if fast else without_gradients)(q, k, v, masks, kinds, scale)


def is_for_kernel(like: Tensor, tokens: int, channels: int) -> bool:
    """Whether a kernel computes the attention of windows with so many queries, and so many channels a head."""
    return like.dtype == torch.float32 and tokens >= LEAST_QUERIES and channels <= MOST_CHANNELS and has_llvm(like)


def without_gradients(q: Tensor, k: Tensor, v: Tensor, masks: Tensor | None, kinds: Tensor, scale: float) -> Tensor:
    """See `cached_attention`."""
    return forward(q, k, v, masks, kinds, scale)[0]


@operation('cached_attention')
def fast_without_gradients(
    q: Tensor, k: Tensor, v: Tensor, masks: Tensor | None, kinds: Tensor, scale: float
) -> Tensor:
    """An operation with a name, by which its time is told from that of others."""
    return by_llvm('cached_attention', without_gradients, q, k, v, masks, kinds, scale)


def gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, masks: Tensor | None, kinds: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """By q, k, v and masks (which is empty without masks), given the gradient by the result of `cached_attention`."""
    _, *rows = forward(q, k, v, masks, kinds, scale)
    return backward(grad, q, k, v, masks, kinds, scale, *rows)


@operation('cached_attention_gradients')
def fast_gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, masks: Tensor | None, kinds: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `fast_without_gradients`."""
    return by_llvm('cached_attention', gradients, grad, q, k, v, masks, kinds, scale)
