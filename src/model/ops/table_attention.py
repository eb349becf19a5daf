"""Softmax attention on a CPU, without gradients, within windows of very many pixels with a position bias.

One map of a window of 32x32 pixels fills a cache by itself. Here a few queries of all heads are taken at a time, and
their biases are copied from a small table, so that no array of all pairs is ever written. A kernel of
`llvm.cached_attention` reads them there, where llvmlite is installed.
"""

import torch
from torch import Tensor

from model.ops.cached_attention import CACHED_LOGITS, LEAST_QUERIES, LOG2_E, in_range, is_for_kernel
from model.ops.fast import by_llvm, operation


def table_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    """softmax(scale * q k^T + bias) v for each window and head: (B, T, heads, d).

    Args:
        q, k, v: (B, T, heads, d), float32 or float64.
        bias: of the same type, (heads, size, size, size, size), which reshaped is (heads, T, T); a view of something
            smaller.
        scale: factor of the products.
    """
    rows_are_vectors = bias.stride(2) == 1 and bias.shape[2] % LEAST_QUERIES == 0
    return (fast_by_rows if rows_are_vectors and is_for_kernel(q, *q.shape[1::2]) else by_rows)(q, k, v, bias, scale)


@operation('table_attention')
def fast_by_rows(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    """An operation with a name, by which its time is told from that of others."""
    return by_llvm('cached_attention', by_rows, q, k, v, bias, scale)


def by_rows(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    """See `table_attention`."""
    _, t, heads, _ = q.shape
    per_row = t // bias.shape[1]
    rows = min(max(1, CACHED_LOGITS // (2 * heads * per_row * t)), bias.shape[1])
    memory, out = q.new_empty(heads, rows * per_row, t), torch.empty_like(q)
    for query, key, value, result in zip(*(x.transpose(1, 2) for x in (q, k, v, out)), strict=True):
        parts = zip(query.split(rows * per_row, 1), bias.split(rows, 1), result.split(rows * per_row, 1), strict=True)
        for part, biases, found in parts:
            powers = logits(memory, part, key, biases, scale).exp2_()
            sums = powers.sum(-1, keepdim=True)
            if not in_range(sums):
                powers = logits(memory, part, key, biases, scale)
                powers = powers.sub_(powers.amax(-1, keepdim=True)).exp2_()
                sums = powers.sum(-1, keepdim=True)
            torch.div(powers @ value, sums, out=found)
    return out


def logits(memory: Tensor, q: Tensor, k: Tensor, bias: Tensor, scale: float) -> Tensor:
    """To base 2, (heads, queries, T), in `memory` from its beginning."""
    found = memory[:, : q.shape[1]]
    found.view(bias.shape).copy_(bias)
    return found.baddbmm_(q, k.mT, beta=LOG2_E, alpha=scale * LOG2_E)
