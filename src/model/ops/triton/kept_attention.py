"""Products of queries and kept keys, and sums of kept values, in Triton, for a GPU; `model.ops.kept_attention` chooses.

A program has the kept keys of one query and head, in blocks. It reads their rows where they are, which is in the cache
since the queries of a window share them, and sums in float32 or more, in an order that is always the same.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 128  # kept keys that a program reads at once

jit = triton.jit(do_not_specialize=['tokens'])  # compiled once for windows of all sizes


@triton.jit
def locate(
    keys, first, tokens, HEADS: tl.constexpr, CHANNELS: tl.constexpr, KEPT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Of a program's kept keys from `first` on: which they are, what of them exists, and where their rows are."""
    program = tl.program_id(0).to(tl.int64)  # (window * tokens + query) * heads + head; places can exceed 2**31
    place = first + tl.arange(0, ROWS)[:, None]
    channel = tl.arange(0, COLUMNS)[None, :]
    key = tl.load(keys + program * KEPT + place, place < KEPT, other=0).to(tl.int64)
    window = program // (HEADS * tokens)
    rows = ((window * tokens + key) * HEADS + program % HEADS) * CHANNELS + channel
    return place, key, rows, (place < KEPT) & (channel < CHANNELS)


@jit
def multiply(
    q, k, bias, keys, out, tokens,
    BIASED: tl.constexpr, HEADS: tl.constexpr, CHANNELS: tl.constexpr, KEPT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The products of a query and its kept keys, plus the bias of the pair."""
    program = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, COLUMNS)[None, :]
    query = tl.load(q + program * CHANNELS + channel, channel < CHANNELS, other=0.0).to(WIDE)
    for first in range(0, KEPT, ROWS):
        place, key, rows, exist = locate(keys, first, tokens, HEADS, CHANNELS, KEPT, ROWS, COLUMNS)
        logits = tl.sum(query * tl.load(k + rows, exist, other=0.0).to(WIDE), 1, keep_dims=True)
        if BIASED:
            row = program // HEADS % tokens
            logits += tl.load(bias + row * tokens + key, place < KEPT, other=0.0).to(WIDE)
        tl.store(out + program * KEPT + place, logits, place < KEPT)


@jit
def add_up(
    weights, v, keys, out, tokens,
    HEADS: tl.constexpr, CHANNELS: tl.constexpr, KEPT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The weighted sum of the values of a query's kept keys."""
    program = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, COLUMNS)[None, :]
    total = tl.zeros((1, COLUMNS), WIDE)
    for first in range(0, KEPT, ROWS):
        place, _, rows, exist = locate(keys, first, tokens, HEADS, CHANNELS, KEPT, ROWS, COLUMNS)
        weight = tl.load(weights + program * KEPT + place, place < KEPT, other=0.0).to(WIDE)
        total += tl.sum(weight * tl.load(v + rows, exist, other=0.0).to(WIDE), 0, keep_dims=True)
    tl.store(out + program * CHANNELS + channel, total, channel < CHANNELS)


def sizes(rows: Tensor, keys: Tensor) -> dict:
    """What kernels are compiled for, given rows (B, T, heads, d) and their keys (B, T, heads, K)."""
    heads, channels = rows.shape[2:]
    kept = keys.shape[-1]
    return {
        'HEADS': heads, 'CHANNELS': channels, 'KEPT': kept, 'ROWS': min(triton.next_power_of_2(kept), BLOCK),
        'COLUMNS': triton.next_power_of_2(channels), 'WIDE': tl.float64 if rows.dtype == torch.float64 else tl.float32,
    }  # fmt: skip


def logits_at(q: Tensor, k: Tensor, bias: Tensor | None, keys: Tensor) -> Tensor:
    """As `kept_attention.logits_at`, of contiguous tensors."""
    out, (windows, tokens, heads, _) = q.new_empty(keys.shape), keys.shape
    with torch.cuda.device_of(q):
        multiply[(windows * tokens * heads,)](
            q, k, q if bias is None else bias, keys, out, tokens, BIASED=bias is not None, **sizes(k, keys)
        )
    return out


def values_at(weights: Tensor, v: Tensor, keys: Tensor) -> Tensor:
    """As `kept_attention.values_at`, of contiguous tensors."""
    out, (windows, tokens, heads, _) = torch.empty_like(v), keys.shape
    with torch.cuda.device_of(v):
        add_up[(windows * tokens * heads,)](weights, v, keys, out, tokens, **sizes(v, keys))
    return out
