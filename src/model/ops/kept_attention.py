"""Attention to the keys that each query has kept: plain, in other forms on a CPU, and in Triton on a GPU.

Queries, keys and values are (B, T, heads, d), of B windows with T tokens; `keys` (B, T, heads, K) says for each query
and head which K of the T keys were kept, none of them twice.
"""

import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from math import gcd
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.ops.fast import by_triton, is_exporting, is_for_triton

warnings.filterwarnings('ignore', 'Sparse CSR tensor support is in beta state')

LANES = 16  # channels that a CPU takes at once
IMAGES = 16  # that a 1x1 convolution is given, see `as_convolution`
ROWS = 512  # whose best are chosen at once, in a CPU's cache


def is_plain(x: Tensor) -> bool:
    """Whether `x` has to stay in operations that every device and every trace knows."""
    return not x.is_cpu or torch.jit.is_tracing() or torch.compiler.is_compiling()


def as_convolution(x: Tensor, kernels: Tensor, groups: int) -> Tensor:
    """(T, groups * C) and (groups * D, C) to (T, groups * D), group by group, without gradients.

    On a CPU oneDNN, which is behind convolutions, is up to four times as fast as the library for matrix products. With
    one thread PyTorch asks it for `IMAGES` images or more alone, so the rows are shared out among as many.
    """
    images = gcd(len(x), IMAGES)
    pixels = x.view(images, 1, len(x) // images, -1).permute(0, 3, 1, 2)  # channels_last
    return F.conv2d(pixels, kernels[..., None, None], groups=groups).permute(0, 2, 3, 1).reshape(len(x), -1)


def products(q: Tensor, k: Tensor) -> Tensor:
    """Products of all queries and keys of a window: (B, T, heads, d) twice to (B, T, heads, T)."""
    if is_plain(q) or torch.is_grad_enabled():
        return torch.einsum('bihd,bjhd->bihj', q, k)
    b, t, heads, d = q.shape
    q, k = (F.pad(x, (0, -d % LANES)) for x in (q, k))
    found = as_convolution(q.transpose(0, 1).reshape(t, -1), k.transpose(1, 2).flatten(0, 2), b * heads)
    return found.view(t, b, heads, t).transpose(0, 1)


def read(weights: Tensor, v: Tensor) -> Tensor:
    """Weighted sums of all values of a window: (B, T, heads, T) and (B, T, heads, d) to (B, T, heads, d)."""
    if is_plain(v) or torch.is_grad_enabled():
        return torch.einsum('bihj,bjhd->bihd', weights, v)
    b, t, heads, d = v.shape
    rows = weights.transpose(0, 1).reshape(t, -1)
    return as_convolution(rows, v.permute(0, 2, 3, 1).reshape(-1, t), b * heads).view(t, b, heads, d).transpose(0, 1)


def spread(values: Tensor, keys: Tensor) -> Tensor:
    """Values (B, T, heads, K) at their keys, among zeros: (B, T, heads, T)."""
    return values.new_zeros(*keys.shape[:-1], keys.shape[1]).scatter_(-1, keys.long(), values)


def rows_of(keys: Tensor) -> Tensor:
    """Where the kept keys are among the rows (B * T * heads, d) of a contiguous (B, T, heads, d), int32."""
    b, t, heads, _ = keys.shape
    first = torch.arange(b, dtype=torch.int32).view(-1, 1, 1, 1) * (t * heads)
    return torch.add(first + torch.arange(heads, dtype=torch.int32).view(-1, 1), keys, alpha=heads)


def logits_at(q: Tensor, k: Tensor, bias: Tensor | None, keys: Tensor) -> Tensor:
    """See `kept_logits`. On a CPU a product that is sampled at the entries of a sparse matrix."""
    b, t, heads, kept = keys.shape
    if is_plain(q):
        logits = products(q, k).gather(-1, keys.long())
    else:
        q, k = (F.pad(x, (0, -x.shape[-1] % LANES)).reshape(b * t * heads, -1) for x in (q, k))
        first = torch.arange(0, keys.numel() + 1, kept, dtype=torch.int32)
        where = torch.sparse_csr_tensor(
            first, rows_of(keys).flatten(), q.new_zeros(keys.numel()), (len(q), len(k)), check_invariants=False
        )
        logits = torch.sparse.sampled_addmm(where, q, k.T, beta=0.0).values().view(keys.shape)
    if bias is None:
        return logits
    return logits.add_(bias.unsqueeze(1).expand(b, -1, heads, -1).gather(-1, keys.long()))


def values_at(weights: Tensor, v: Tensor, keys: Tensor) -> Tensor:
    """See `kept_values`. On a CPU an embedding bag: the table has a row for each key and head, a bag is a query's."""
    if is_plain(v):
        return read(spread(weights, keys), v)
    table, bags = v.reshape(-1, v.shape[-1]), rows_of(keys).flatten(0, 2)
    return F.embedding_bag(bags, table, mode='sum', per_sample_weights=weights.reshape(bags.shape)).view(v.shape)


# torch.compile leaves these two as they are, and on the meta device their multiply-adds are those that Triton makes.


@torch.library.custom_op('frugalsr::logits_at', mutates_args=())
def fast_logits_at(q: Tensor, k: Tensor, bias: Tensor | None, keys: Tensor) -> Tensor:
    bias = None if bias is None else bias.contiguous()
    return by_triton('kept_attention', logits_at, q.contiguous(), k.contiguous(), bias, keys.contiguous())


@torch.library.custom_op('frugalsr::values_at', mutates_args=())
def fast_values_at(weights: Tensor, v: Tensor, keys: Tensor) -> Tensor:
    return by_triton('kept_attention', values_at, weights.contiguous(), v.contiguous(), keys.contiguous())


@fast_logits_at.register_fake
def _(q: Tensor, k: Tensor, bias: Tensor | None, keys: Tensor) -> Tensor:
    return q.new_empty(keys.shape)


@fast_values_at.register_fake
def _(weights: Tensor, v: Tensor, keys: Tensor) -> Tensor:
    return v.new_empty(v.shape)


def is_left_alone(x: Tensor) -> bool:
    """Whether PyTorch gets `fast_logits_at` and `fast_values_at` to see instead of the plain forms."""
    return is_for_triton(x) or x.is_meta or (torch.compiler.is_compiling() and not is_exporting())


class KeptLogits(torch.autograd.Function):
    """See `kept_logits`."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, bias: Tensor | None, keys: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, keys)
        return (fast_logits_at if is_left_alone(q) else logits_at)(q, k, bias, keys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, keys = ctx.saved_tensors
        by_q = (fast_values_at if is_left_alone(grad) else values_at)(grad, k, keys)
        whole = spread(grad, keys)
        by_bias = whole.sum((0, 2)) if ctx.needs_input_grad[2] else None
        return by_q, torch.einsum('bihj,bihd->bjhd', whole, q), by_bias, None


class KeptValues(torch.autograd.Function):
    """See `kept_values`."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, v: Tensor, keys: Tensor) -> Tensor:
        ctx.save_for_backward(weights, v, keys)
        return (fast_values_at if is_left_alone(v) else values_at)(weights, v, keys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weights, v, keys = ctx.saved_tensors
        by_weights = (fast_logits_at if is_left_alone(grad) else logits_at)(grad, v, None, keys)
        return by_weights, torch.einsum('bihj,bihd->bjhd', spread(weights, keys), grad), None


def kept_logits(q: Tensor, k: Tensor, bias: Tensor, keys: Tensor) -> Tensor:
    """Products of queries and kept keys, plus a bias: out[b, i, h, n] = q[b, i, h] . k[b, j, h] + bias[i, j], j = keys.

    Args:
        q, k: (B, T, heads, d), float32 or float64.
        bias: (T, T).
        keys: (B, T, heads, K), of an integer type.

    Returns:
        (B, T, heads, K). It can be differentiated once.
    """
    apart = torch.is_grad_enabled() or is_left_alone(q)  # a trace follows the plain form alone
    return KeptLogits.apply(q, k, bias, keys) if apart else logits_at(q, k, bias, keys)


def kept_values(weights: Tensor, v: Tensor, keys: Tensor) -> Tensor:
    """Weighted sums of the values of kept keys: out[b, i, h] = sum over n of weights[b, i, h, n] * v[b, keys, h].

    Args:
        weights: (B, T, heads, K), float32 or float64.
        v: (B, T, heads, d).
        keys: (B, T, heads, K), of an integer type.

    Returns:
        (B, T, heads, d). It can be differentiated once.
    """
    apart = torch.is_grad_enabled() or is_left_alone(v)
    return KeptValues.apply(weights, v, keys) if apart else values_at(weights, v, keys)


def best(x: Tensor, count: int) -> Tensor:
    """Where the `count` largest of each row of `x` (..., n) are: (..., count) int64.

    On a CPU in ascending order, in which what they point to is read faster, and by NumPy, which is four times as fast.
    """
    if is_plain(x):
        return x.topk(count, -1, sorted=False)[1]
    rows = x.reshape(-1, x.shape[-1]).numpy()
    found = np.empty((len(rows), count), np.int64)

    def choose(i: int) -> None:
        found[i : i + ROWS] = best_of_rows(rows[i : i + ROWS], count)

    list(pool(torch.get_num_threads()).map(choose, range(0, len(rows), ROWS)))
    return torch.from_numpy(found).view(*x.shape[:-1], count)


@cache
def pool(threads: int) -> ThreadPoolExecutor:
    """The threads for what PyTorch does not share out among its own."""
    return ThreadPoolExecutor(threads)


def best_of_rows(rows: np.ndarray, count: int) -> np.ndarray:
    """`best` of (R, n). Of equal values the first ones."""
    r, n = rows.shape
    taken = rows >= np.partition(rows, n - count)[:, n - count, None]
    found = np.flatnonzero(taken)
    if len(found) != r * count:  # the least one stands more often than there is room for, or is no number
        for i in np.flatnonzero(taken.sum(1) != count):
            taken[i] = False
            taken[i, np.argsort(-rows[i], kind='stable')[:count]] = True
        found = np.flatnonzero(taken)
    return found.reshape(r, count) - np.arange(0, r * n, n)[:, None]
