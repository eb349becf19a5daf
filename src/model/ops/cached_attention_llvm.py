"""Softmax attention on a CPU in registers: see `cached_attention` and `table_attention`, whose forms without gradients
these are.

A vector holds one channel of as many queries as it has lanes. With their queries and sums in registers, keys and values
are read number by number from the first cache, and no logit is ever written.
"""

import math
from functools import cache

import torch
from llvmlite import ir
from torch import Tensor

from model.ops.cached_attention import LOG2_E
from model.ops.llvm import BIT, INT, Code, Kernel, lanes

KEYS = 8  # at once
NAMES = (
    'counter', 'q', 'k', 'v', 'out', 'biases', 'kinds', 'by_key', 'by_query', 'windows', 'heads', 'queries', 'keys',
    'q_window', 'q_token', 'q_head', 'k_window', 'k_token', 'k_head', 'v_window', 'v_token', 'v_head',
    'bias_head', 'bias_kind',
)  # fmt: skip


@cache
def kernel(d: int, e: int, biased: bool, lanes: int) -> Kernel:
    """Attention of queries and keys of `d` channels and values of `e`.

    The bias of query i and key j is at `by_key[j] + by_query[i]` among those of its head and kind, where the queries
    of a vector follow one another. A last vector that would not be full takes queries again that came before.
    """
    code = Code(NAMES, lanes)
    to, given = code.to, code.given
    tensors = {name: code.pointer(name) for name in ('q', 'k', 'v', 'out', 'biases')}
    integers = {name: code.pointer(name, INT) for name in ('counter', 'kinds', 'by_key', 'by_query')}

    def integer(name: str, i: ir.Value) -> ir.Value:
        return to.load(code.at(integers[name], i))

    def channel(row: ir.Value, i: int) -> ir.Value:
        return code.spread(to.load(code.at(row, INT(i))))

    def attend(task: ir.Value) -> None:
        """A window and a head; the windows of one head follow one another, since they share biases."""
        window, head = to.srem(task, given['windows']), to.sdiv(task, given['windows'])

        def token(name: str, i: ir.Value) -> ir.Value:
            steps = (given[f'{name}_{axis}'] for axis in ('window', 'token', 'head'))
            return code.at(tensors[name], code.offset(*zip((window, i, head), steps, strict=True)))

        def row(j: ir.Value) -> ir.Value:
            return code.at(code.memory, to.mul(j, INT(d + e)))

        def pack(j: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
            """Key and value of a token beside each other."""
            code.store(code.load(token('k', j), d), row(j))
            code.store(code.load(token('v', j), e), code.at(row(j), INT(d)))
            return []

        code.loop(INT(0), given['keys'], 1, pack)
        if biased:
            places = (head, given['bias_head']), (integer('kinds', window), given['bias_kind'])
            biases = code.at(tensors['biases'], code.offset(*places))
        factor = code.spread(to.fmul(code.factor, ir.FloatType()(LOG2_E)))
        last = to.sub(given['queries'], INT(lanes))

        def queries(i: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
            first = to.select(to.icmp_signed('<', i, last), i, last)
            tokens = [to.add(first, INT(lane)) for lane in range(lanes)]
            query = [to.fmul(x, factor) for x in code.transposed([code.load(token('q', n), d) for n in tokens])]
            bias = code.at(biases, integer('by_query', first)) if biased else None

            def logit(j: ir.Value, start: ir.Value) -> ir.Value:
                """To base 2, plus `start`."""
                if biased:
                    start = code.multiply_add(
                        code.load(code.at(bias, integer('by_key', j)), lanes), code.vector(LOG2_E), start
                    )
                for i, x in enumerate(query):
                    start = code.multiply_add(x, channel(row(j), i), start)
                return start

            def sums(start: ir.Value) -> list[ir.Value]:
                """Of the powers of 2 over all keys, and of those times values."""

                def add(count: int, j: ir.Value, found: list[ir.Value]) -> list[ir.Value]:
                    keys = [to.add(j, INT(n)) for n in range(count)]
                    for j, power in zip(keys, [code.exp2(logit(j, start)) for j in keys], strict=True):
                        total = to.fadd(found[0], power)
                        values = (channel(row(j), d + i) for i in range(e))
                        found = [total, *(code.multiply_add(power, *x) for x in zip(values, found[1:], strict=True))]
                    return found

                whole = to.sub(given['keys'], to.srem(given['keys'], INT(KEYS)))
                found = [code.vector(0)] * (e + 1)
                found = code.loop(INT(0), whole, KEYS, lambda j, found: add(KEYS, j, found), found)
                return code.loop(whole, given['keys'], 1, lambda j, found: add(1, j, found), found)

            def greatest(j: ir.Value, found: list[ir.Value]) -> list[ir.Value]:
                return [code.select_greater(logit(j, code.vector(0)), found[0])]

            # The greatest logit of a query is subtracted only where powers of 2 without that were out of range.
            before, once, again, end = to.block, *(to.append_basic_block() for _ in range(3))
            to.branch(once)
            to.position_at_end(once)
            start, is_first = to.phi(code.vector_type), to.phi(BIT)
            total, *weighted = sums(start)
            in_range = to.and_(
                to.fcmp_ordered('>', total, code.vector(2**-32)), to.fcmp_ordered('<', total, code.vector(2**32))
            )
            all_lanes = ir.IntType(lanes)
            safe = to.icmp_signed('==', to.bitcast(in_range, all_lanes), all_lanes(-1))
            to.cbranch(to.or_(safe, to.not_(is_first)), end, again)
            to.position_at_end(again)
            (most,) = code.loop(INT(0), given['keys'], 1, greatest, [code.vector(-math.inf)])
            subtracted = to.select(in_range, code.vector(0), to.fsub(code.vector(0), most))
            for block, value, first_time in ((before, code.vector(0), 1), (to.block, subtracted, 0)):
                start.add_incoming(value, block)
                is_first.add_incoming(BIT(first_time), block)
            to.branch(once)
            to.position_at_end(end)

            share = to.fdiv(code.vector(1), total)
            for n, result in zip(tokens, code.transposed([to.fmul(x, share) for x in weighted]), strict=True):
                place = code.offset((window, given['queries'], given['heads'], INT(e)), (n, given['heads'], INT(e)))
                code.store(result, code.at(tensors['out'], to.add(place, to.mul(head, INT(e)))))
            return []

        code.loop(INT(0), given['queries'], lanes, queries)

    code.tasks(integers['counter'], to.mul(given['windows'], given['heads']), attend)
    return Kernel(code)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    biases: Tensor | None,
    kinds: Tensor,
    by_key: Tensor,
    by_query: Tensor,
) -> Tensor:
    """See `kernel`; `biases` are (heads, kinds, ...)."""
    windows, queries, heads, d = q.shape
    keys, e = k.shape[1], v.shape[3]
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    out = q.new_empty(windows, queries, heads, e)
    counter = torch.zeros(1, dtype=torch.int64)
    tensors = [counter, q, k, v, out, 0 if biases is None else biases, kinds, by_key, by_query]
    strides = [*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *([0, 0] if biases is None else biases.stride()[:2])]
    run = kernel(d, e, biases is not None, lanes())
    run([*tensors, windows, heads, queries, keys, *strides], keys * (d + e), scale)
    return out


def without_gradients(q: Tensor, k: Tensor, v: Tensor, masks: Tensor | None, kinds: Tensor, scale: float) -> Tensor:
    """See `cached_attention`. Masks whose memory has query after query are used as they are, others are copied."""
    queries = torch.arange(q.shape[1])
    by_key = torch.arange(k.shape[1]) * q.shape[1]
    return attend(q, k, v, scale, None if masks is None else masks.mT.contiguous(), kinds, by_key, queries)


def by_rows(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    """See `table_attention`, for `bias` (heads, size, size, size, size) of square windows, read where it is."""
    by_query, by_key = (
        (torch.arange(bias.shape[y]).view(-1, 1) * bias.stride(y) + torch.arange(bias.shape[y]) * bias.stride(y + 1))
        for y in (1, 3)
    )
    return attend(q, k, v, scale, bias.unsqueeze(1), torch.zeros(len(q), dtype=torch.int64), by_key, by_query)
