"""Attention on a CPU by kernels in LLVM, of the names of the plain functions in whose place these are."""

from collections.abc import Sequence
from math import isqrt
from typing import NamedTuple

import torch
from torch import Tensor

from model.ops.llvm.attention_kernels import AT_ONCE, gradient_kernel, kernel
from model.ops.llvm.code import CACHE_LINE, Kernel, filled_up, lanes

TASKS = 2  # for each thread
MOST_BIASES = 2**24  # numbers, 64 MB, that sums of parts take together, if one does not take more


class Tokens(NamedTuple):
    """Tokens of windows in memory: where each of them begins, (B, T) int64, and how far apart its heads are.

    The channels of a head follow one another.
    """

    memory: Tensor
    places: Tensor
    between_heads: int


def tokens_of(x: Tensor) -> Tokens:
    """Of a tensor (B, T, heads, d)."""
    x = x if x.stride(3) == 1 else x.contiguous()
    windows, tokens, between_heads, _ = x.stride()
    return Tokens(x, torch.arange(len(x))[:, None] * windows + torch.arange(x.shape[1]) * tokens, between_heads)


def rows_of(x: Tensor, order: Tensor) -> Tokens:
    """Of a tensor (B * T, heads, d) and which of its rows are tokens of a window (B, T)."""
    x = x if x.stride(2) == 1 else x.contiguous()
    return Tokens(x, order * x.stride(0), x.stride(1))


class Biases(NamedTuple):
    """Biases (heads, kinds, ...), in which that of query i and key j is at `by_query[i] + by_key[j]`.

    With areas of a window's tokens, (kinds, T) int32, `APART` is added between different ones.
    """

    memory: Tensor
    by_query: Tensor
    by_key: Tensor
    areas: Tensor | None = None


def biases_of(masks: Tensor | None) -> Biases | None:
    """Of masks (heads, kinds, T, S), which are copied if their memory has not query after query."""
    if masks is None:
        return None
    queries, keys = masks.shape[2:]
    return Biases(masks.mT.contiguous(), torch.arange(queries), torch.arange(keys) * queries)


class Call(NamedTuple):
    """What attention and its gradients are both given."""

    heads: int
    d: int
    e: int
    biases: Biases | None
    kinds: Tensor
    scale: float

    def run(self, made: Kernel, tensors: Sequence[Tokens], memory: int, others: Sequence[Tensor | int] = ()) -> None:
        """Run a kernel on `tensors`, the queries and keys first; `others` are what else it is given."""
        windows, queries = tensors[0].places.shape
        sizes = windows, queries, tensors[1].places.shape[1], self.heads
        about: list[Tensor | int] = []
        if self.biases:
            biases, by_query, by_key, areas = self.biases
            about = [self.kinds, by_key, by_query, *biases.stride()[:2], biases]
            about += [] if areas is None else [areas]
        given = [*sizes, *about, *others]
        for tokens in tensors:
            given += tokens
        made(given, -(-memory // CACHE_LINE) * CACHE_LINE, self.scale)

    def attend(self, q: Tokens, k: Tokens, v: Tokens, out: Tokens) -> None:
        """Write the result of `cached_attention` to `out`."""
        about = '' if self.biases is None else 'masks' if self.biases.areas is None else 'areas'
        made = kernel(self.d, self.e, about, lanes())
        self.run(made, (q, k, v, out), AT_ONCE * lanes() + k.places.shape[1] * (self.d + self.e))

    def differentiate(self, inputs: Sequence[Tokens], grad: Tokens, grads: Sequence[Tokens]) -> Tensor:
        """Write to `grads` the gradients by queries, keys and values, given that by the result; that by the masks."""
        (windows, _), keys = inputs[0].places.shape, inputs[1].places.shape[1]
        parts, by_biases = windows, torch.empty(1, 0, 0)
        others: list[Tensor | int] = []
        if self.biases:
            wanted, size = -(-TASKS * torch.get_num_threads() // self.heads), self.biases.memory.numel()
            parts = min(windows, wanted, max(1, MOST_BIASES // size))
            by_biases = torch.zeros(parts, *self.biases.memory.shape)
            others = [by_biases, by_biases.stride(0)]
        width = sum(filled_up((self.d, self.e), lanes()))
        memory = lanes() * width + keys * (2 * lanes() + width + self.d + self.e)
        made = gradient_kernel(self.d, self.e, 'masks' if self.biases else '', lanes())
        self.run(made, (*inputs, grad, *grads), memory, [*others, parts])
        return (by_biases.sum(0) if parts > 1 else by_biases[0]).mT


def without_gradients(q: Tensor, k: Tensor, v: Tensor, masks: Tensor | None, kinds: Tensor, scale: float) -> Tensor:
    """See `cached_attention`."""
    return attend(q, k, v, biases_of(masks), kinds, scale)


def attend(q: Tensor, k: Tensor, v: Tensor, biases: Biases | None, kinds: Tensor, scale: float) -> Tensor:
    """See `cached_attention`, for biases in any order."""
    out = q.new_empty(*q.shape[:3], v.shape[3])
    call = Call(q.shape[2], q.shape[3], v.shape[3], biases, kinds, scale)
    call.attend(*(tokens_of(x) for x in (q, k, v, out)))
    return out


def gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, masks: Tensor | None, kinds: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `gradients` of `cached_attention`."""
    by_q, by_k, by_v = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    inputs, found = ([tokens_of(x) for x in of] for of in ((q, k, v), (by_q, by_k, by_v)))
    call = Call(q.shape[2], q.shape[3], v.shape[3], biases_of(masks), kinds, scale)
    return by_q, by_k, by_v, call.differentiate(inputs, tokens_of(grad), found)


def packed(qkv: Tensor, order: Tensor, masks: Tensor | None, kinds: Tensor, scale: float) -> Tensor:
    """See `packed_attention`."""
    _, _, heads, d = qkv.shape
    out = qkv.new_empty(len(qkv), heads, d)
    call = Call(heads, d, d, biases_of(masks), kinds, scale)
    call.attend(*(rows_of(x, order) for x in (*qkv.unbind(1), out)))
    return out


def by_position(
    qkv: Tensor, order: Tensor, table: Tensor, positions: Tensor, areas: Tensor, kinds: Tensor, scale: float
) -> Tensor:
    """See `by_position` of `packed_attention`. In the table the queries of a vector follow one another."""
    _, _, heads, d = qkv.shape
    size = isqrt(areas.shape[1])
    place = torch.arange(size)
    by_query = (place[:, None] * (2 * size - 1) + place).flatten()
    memory = table.t().contiguous().unsqueeze(1).expand(-1, len(areas), -1)
    biases = Biases(memory, by_query, by_query.flip(0), areas if areas.any() else None)
    out = qkv.new_empty(len(qkv), heads, d)
    Call(heads, d, d, biases, kinds, scale).attend(*(rows_of(x, order) for x in (*qkv.unbind(1), out)))
    return out


def packed_gradients(
    grad: Tensor, qkv: Tensor, order: Tensor, masks: Tensor | None, kinds: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """See `packed_gradients` of `packed_attention`."""
    _, _, heads, d = qkv.shape
    by_qkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    call = Call(heads, d, d, biases_of(masks), kinds, scale)
    inputs, found = ([rows_of(x, order) for x in of.unbind(1)] for of in (qkv, by_qkv))
    return by_qkv, call.differentiate(inputs, rows_of(grad, order), found)


def by_rows(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    """See `table_attention`, for `bias` (heads, size, size, size, size) of square windows, read where it is."""
    by_query, by_key = (
        (torch.arange(bias.shape[y]).view(-1, 1) * bias.stride(y) + torch.arange(bias.shape[y]) * bias.stride(y + 1))
        for y in (1, 3)
    )
    biases = Biases(bias.unsqueeze(1), by_query, by_key)
    return attend(q, k, v, biases, torch.zeros(len(q), dtype=torch.int64), scale)
