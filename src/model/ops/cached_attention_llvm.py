"""Softmax attention on a CPU in registers: see `cached_attention` and `table_attention`, whose kernels these are.

A vector holds one channel of as many queries as it has lanes. With their queries and sums in registers, keys and values
are read number by number from the first cache, and no logit is ever written. For the gradients a vector of queries has
its part of the map, and of the gradient by it, in the cache; no more of them is ever there.
"""

from collections.abc import Sequence
from functools import cache, partial
from typing import NamedTuple

import torch
from llvmlite import ir
from torch import Tensor

from model.ops.attention_code import AttentionCode, Sums
from model.ops.llvm import FLOAT, INT, Kernel, lanes

LINE = 16  # numbers of float32 that a line of a cache holds
TASKS = 2  # for each thread

@cache
def kernel(d: int, e: int, biased: bool, lanes: int) -> Kernel:
    """Attention of queries and keys of `d` channels and values of `e`."""
    code = AttentionCode(('q', 'k', 'v', 'out'), d, e, biased, lanes)
    to, given = code.to, code.given

    def attend(task: ir.Value) -> None:
        """A window and a head; the windows of one head follow one another, since they share biases."""
        code.begin(to.srem(task, given['windows']), to.sdiv(task, given['windows']))

        def queries(i: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
            first, tokens = code.queries(i)
            query = [to.fmul(x, code.to_base_2) for x in code.by_channel('q', tokens, d)]
            bias = code.biases_of(first) if biased else None

            def add(start: ir.Value, keys: list[ir.Value], sums: Sums) -> Sums:
                """Powers of 2, and those times values."""
                powers = [code.exp2(logit) for logit in code.logits(query, keys, bias, start)]
                for j, power in zip(keys, powers, strict=True):
                    values = (code.number(code.row(j), d + i) for i in range(e))
                    weighted = (code.multiply_add(power, *x) for x in zip(values, sums[1:], strict=True))
                    sums = [to.fadd(sums[0], power), *weighted]
                return sums

            zeros = [code.vector(0)] * (e + 1)
            total, *weighted = code.in_range(lambda start: code.over_keys(partial(add, start), zeros), query, bias)
            share = to.fdiv(code.vector(1), total)
            for n, result in zip(tokens, code.transposed([to.fmul(x, share) for x in weighted]), strict=True):
                code.store(result, code.token('out', n))
            return []

        code.loop(INT(0), given['queries'], lanes, queries)

    code.tasks(code.pointer('counter', INT), to.mul(given['windows'], given['heads']), attend)
    return Kernel(code)


@cache
def gradient_kernel(d: int, e: int, biased: bool, lanes: int) -> Kernel:
    """Gradients of the attention that `kernel` computes.

    A task is a head and a part of the windows, which come one after the other and share what a bias has gathered.
    With w = 2^logit, s the sum of w over the keys, p = w / s, g the gradient by the result and h = g v^T, the gradient
    by the logits is w (h / s - sum(w h) / s^2), and that by the values the sum of w g / s over the queries.
    """
    tensors = ('q', 'k', 'v', 'grad', 'grad_q', 'grad_k', 'grad_v')
    others = ('grad_biases', 'between_parts') if biased else ()
    code = AttentionCode(tensors, d, e, biased, lanes, (*others, 'parts'))
    to, given, zero = code.to, code.given, code.vector(0)
    widths = [-(-channels // lanes) * lanes for channels in (d, e)]  # of rows of whole vectors
    width = sum(widths)
    pairs = code.at(code.memory, INT(lanes * width))  # powers and gradients by logits, of the queries of a vector
    sums = code.at(pairs, to.mul(given['keys'], INT(2 * lanes)))  # gradients by keys and values
    code.packed = code.at(sums, to.mul(given['keys'], INT(width)))
    scale = code.spread(code.factor)

    def query_row(n: ir.Value) -> ir.Value:
        """A query of a vector, and the gradient by its result over the sum of its powers."""
        return code.at(code.memory, to.mul(n, INT(width)))

    def pair(j: ir.Value) -> tuple[ir.Value, ir.Value]:
        place = code.at(pairs, to.mul(j, INT(2 * lanes)))
        return place, code.at(place, INT(lanes))

    def sums_of(j: ir.Value) -> ir.Value:
        return code.at(sums, to.mul(j, INT(width)))

    def queries(part: ir.Value, i: ir.Value) -> None:
        first, tokens = code.queries(i)
        rows = [code.load(code.token('q', n), d) for n in tokens]
        query = [to.fmul(x, code.to_base_2) for x in code.transposed(rows)]
        by_results = [code.load(code.token('grad', n), e) for n in tokens]
        # 0 for queries that come again in a vector before this one, which then takes their place.
        counted = to.fcmp_ordered('>=', code.numbers(), code.spread(to.sitofp(to.sub(i, first), FLOAT)))
        grad = [to.select(counted, x, zero) for x in code.transposed(by_results)]
        bias = code.biases_of(first) if biased else None

        def weigh(start: ir.Value, keys: list[ir.Value], found: Sums) -> Sums:
            total, weighted = found
            powers = [code.exp2(logit) for logit in code.logits(query, keys, bias, start)]
            products = code.products(grad, keys, d, [zero] * len(keys))
            for j, power, product in zip(keys, powers, products, strict=True):
                for vector, place in zip((power, product), pair(j), strict=True):
                    code.store(vector, place)
                total, weighted = to.fadd(total, power), code.multiply_add(power, product, weighted)
            return [total, weighted]

        total, weighted = code.in_range(lambda start: code.over_keys(partial(weigh, start), [zero] * 2), query, bias)
        share = to.fdiv(code.vector(1), total)
        mean = to.fmul(to.fmul(weighted, share), share)
        shares = to.select(counted, share, zero)
        for n, (row, by_result) in enumerate(zip(rows, by_results, strict=True)):
            place = query_row(INT(n))
            code.store(code.padded(row, widths[0]), place)
            share_of = code.spread(to.extract_element(shares, INT(n)), e)
            code.store(code.padded(to.fmul(by_result, share_of), widths[1]), code.at(place, INT(widths[0])))
        if biased:
            of_part = code.at(code.pointer('grad_biases'), to.mul(part, given['between_parts']))
            grad_bias = code.biases_of(first, of_part)

        def spread(keys: list[ir.Value], found: Sums) -> Sums:
            """Add what the logits of these keys come to in the gradients by biases and queries."""
            for j in keys:
                power, place = pair(j)
                by_logit = to.fsub(to.fmul(code.load(place, lanes), share), mean)
                by_logit = to.fmul(by_logit, code.load(power, lanes))
                code.store(by_logit, place)
                if biased:
                    at_bias = code.at(grad_bias, code.integer('by_key', j))
                    code.store(to.fadd(code.load(at_bias, lanes), by_logit), at_bias)
                factors = (code.number(code.row(j), i) for i in range(d))
                found = [code.multiply_add(by_logit, *x) for x in zip(factors, found, strict=True)]
            return found

        def gather(keys: list[ir.Value], _: Sums) -> Sums:
            """Add the gradients by these keys and their values. A vector holds the channels of one."""
            columns = range(0, width, lanes)
            places = [code.at(sums_of(j), INT(c)) for c in columns for j in keys]

            def add(n: ir.Value, totals: Sums) -> Sums:
                powers, by_logits = zip(*([code.spread(to.load(code.at(x, n))) for x in pair(j)] for j in keys))
                rows = [code.load(code.at(query_row(n), INT(c)), lanes) for c in columns]
                factors = [(x, row) for c, row in zip(columns, rows) for x in (powers if c >= widths[0] else by_logits)]
                return [code.multiply_add(*x, total) for x, total in zip(factors, totals, strict=True)]

            totals = code.loop(INT(0), INT(lanes), 1, add, [code.load(place, lanes) for place in places])
            for total, place in zip(totals, places, strict=True):
                code.store(total, place)
            return []

        found = [to.fmul(x, scale) for x in code.over_keys(spread, [zero] * d)]
        code.over_keys(gather, [])
        for n, result in zip(tokens, code.transposed(found), strict=True):
            code.store(result, code.token('grad_q', n))

    def attend(task: ir.Value) -> None:
        head, part = to.sdiv(task, given['parts']), to.srem(task, given['parts'])
        first, stop = (
            to.sdiv(to.mul(n, given['windows']), given['parts']) for n in (part, to.add(part, INT(1)))
        )

        def window(window: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
            code.begin(window, head)

            def clear(j: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
                for c in range(0, width, lanes):
                    code.store(zero, code.at(sums_of(j), INT(c)))
                return []

            def write(j: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
                by_key = to.fmul(code.load(sums_of(j), d), code.spread(code.factor, d))
                code.store(by_key, code.token('grad_k', j, 'keys'))
                code.store(code.load(code.at(sums_of(j), INT(widths[0])), e), code.token('grad_v', j, 'keys'))
                return []

            code.loop(INT(0), given['keys'], 1, clear)
            last = to.mul(to.sdiv(to.sub(given['queries'], INT(1)), INT(lanes)), INT(lanes))
            code.loop(INT(0), to.add(last, INT(1)), lanes, lambda i, _: queries(part, to.sub(last, i)) or [])
            code.loop(INT(0), given['keys'], 1, write)
            return []

        code.loop(first, stop, 1, window)

    code.tasks(code.pointer('counter', INT), to.mul(given['heads'], given['parts']), attend)
    return Kernel(code)


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
    """Biases (heads, kinds, ...), in which that of query i and key j is at `by_query[i] + by_key[j]`."""

    memory: Tensor
    by_query: Tensor
    by_key: Tensor


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
        counter, sizes = torch.zeros(1, dtype=torch.int64), (windows, queries, tensors[1].places.shape[1], self.heads)
        about: list[Tensor | int] = []
        if self.biases:
            biases, by_query, by_key = self.biases
            about = [self.kinds, by_key, by_query, *biases.stride()[:2], biases]
        given = [counter, *sizes, *about, *others, *(x for of in tensors for x in of)]
        made(given, -(-memory // LINE) * LINE, self.scale)

    def attend(self, q: Tokens, k: Tokens, v: Tokens, out: Tokens) -> None:
        """Write the result of `cached_attention` to `out`."""
        made = kernel(self.d, self.e, self.biases is not None, lanes())
        self.run(made, (q, k, v, out), k.places.shape[1] * (self.d + self.e))

    def differentiate(self, inputs: Sequence[Tokens], grad: Tokens, grads: Sequence[Tokens]) -> Tensor:
        """Write to `grads` the gradients by queries, keys and values, given that by the result; that by the masks."""
        (windows, _), keys = inputs[0].places.shape, inputs[1].places.shape[1]
        parts, others, by_biases = windows, [], torch.empty(1, 0, 0)
        if self.biases:
            parts = min(windows, -(-TASKS * torch.get_num_threads() // self.heads))
            by_biases = torch.zeros(parts, *self.biases.memory.shape)
            others = [by_biases, by_biases.stride(0)]
        width = sum(-(-channels // lanes()) * lanes() for channels in (self.d, self.e))
        memory = lanes() * width + keys * (2 * lanes() + width + self.d + self.e)
        made = gradient_kernel(self.d, self.e, self.biases is not None, lanes())
        self.run(made, (*inputs, grad, *grads), memory, [*others, parts])
        return by_biases.sum(0).mT


def without_gradients(q: Tensor, k: Tensor, v: Tensor, masks: Tensor | None, kinds: Tensor, scale: float) -> Tensor:
    """See `cached_attention`."""
    return attend(q, k, v, biases_of(masks), kinds, scale)


def attend(q: Tensor, k: Tensor, v: Tensor, biases: Biases | None, kinds: Tensor, scale: float) -> Tensor:
    out = q.new_empty(*q.shape[:3], v.shape[3])
    call = Call(*q.shape[2:], v.shape[3], biases, kinds, scale)
    call.attend(*map(tokens_of, (q, k, v, out)))
    return out


def gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, masks: Tensor | None, kinds: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `gradients` of `cached_attention`."""
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
    call = Call(*q.shape[2:], v.shape[3], biases_of(masks), kinds, scale)
    inputs = [tokens_of(x) for x in (q, k, v)]
    return *grads, call.differentiate(inputs, tokens_of(grad), [tokens_of(x) for x in grads])


def packed(qkv: Tensor, order: Tensor, masks: Tensor | None, kinds: Tensor, scale: float) -> Tensor:
    """See `packed_attention`."""
    _, _, heads, d = qkv.shape
    out = qkv.new_empty(len(qkv), heads, d)
    call = Call(heads, d, d, biases_of(masks), kinds, scale)
    call.attend(*(rows_of(x, order) for x in (*qkv.unbind(1), out)))
    return out


def packed_gradients(
    grad: Tensor, qkv: Tensor, order: Tensor, masks: Tensor | None, kinds: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """See `packed_gradients` of `cached_attention`."""
    _, _, heads, d = qkv.shape
    by_qkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    call = Call(heads, d, d, biases_of(masks), kinds, scale)
    inputs, grads = ([rows_of(x, order) for x in of.unbind(1)] for of in (qkv, by_qkv))
    return by_qkv, call.differentiate(inputs, rows_of(grad, order), grads)


def by_rows(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    """See `table_attention`, for `bias` (heads, size, size, size, size) of square windows, read where it is."""
    by_query, by_key = (
        (torch.arange(bias.shape[y]).view(-1, 1) * bias.stride(y) + torch.arange(bias.shape[y]) * bias.stride(y + 1))
        for y in (1, 3)
    )
    biases = Biases(bias.unsqueeze(1), by_query, by_key)
    return attend(q, k, v, biases, torch.zeros(len(q), dtype=torch.int64), scale)
