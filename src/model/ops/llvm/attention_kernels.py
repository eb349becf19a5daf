"""The kernels of `llvm.cached_attention`: softmax attention in registers, and its gradients.

A vector holds one channel of as many queries as it has lanes. With their queries and sums in registers, keys and values
are read number by number from the first cache, and no logit is ever written. For the gradients the queries of a vector
have their rows of the map, and of the gradient by the logits, in the cache; no more of these is ever there.
"""

from functools import partial, reduce

from llvmlite import ir

from model.ops.llvm.attention_code import AttentionCode, Sums
from model.ops.llvm.code import FLOAT, INT, Code, filled_up
from model.ops.llvm.kernel_cache import compiled

AT_ONCE = 64  # keys, whose powers are in the cache
MOST = 2**80  # sum of powers, which times values up to 2^40 have their place in float32
MOST_FOR_GRADIENTS = 2**32  # whose square is divided by


@compiled
def kernel(d: int, e: int, biases: str, lanes: int) -> Code:
    """Attention of queries and keys of `d` channels and values of `e`: see `AttentionCode`."""
    code = AttentionCode(('q', 'k', 'v', 'out'), d, e, biases, lanes)
    to, given = code.to, code.given
    powers = code.memory
    code.packed = code.at(powers, INT(AT_ONCE * lanes))

    def attend(task: ir.Value) -> None:
        """A window and a head; the heads of one window follow one another, while its tokens are in the cache."""
        code.begin(to.sdiv(task, given['heads']), to.srem(task, given['heads']))

        def queries(i: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
            first, tokens = code.queries(i)
            query = [to.fmul(x, code.to_base_2) for x in code.by_channel('q', tokens, d)]
            bias_row = code.biases_of(first)

            def add(start: ir.Value, first: ir.Value, sums: Sums) -> Sums:
                """Powers of 2 of some keys from the first one on, and then those times values."""
                left = to.sub(given['keys'], first)
                stop = to.add(first, to.select(to.icmp_signed('<', left, INT(AT_ONCE)), left, INT(AT_ONCE)))

                def power_of(j: ir.Value) -> ir.Value:
                    return code.at(powers, to.mul(to.sub(j, first), INT(lanes)))

                def weigh(keys: list[ir.Value], sums: Sums) -> Sums:
                    found = [code.exp2(logit) for logit in code.logits(query, keys, bias_row, start)]
                    for j, power in zip(keys, found, strict=True):
                        code.store(power, power_of(j))
                    return [reduce(to.fadd, found, *sums)]

                def multiply(j: ir.Value, sums: Sums) -> Sums:
                    power, values = code.load(power_of(j), lanes), (code.number(code.row(j), d + i) for i in range(e))
                    return [code.multiply_add(power, *x) for x in zip(values, sums, strict=True)]

                total = code.over_keys(weigh, sums[:1], (first, stop))
                return [*total, *code.loop(first, stop, 1, multiply, sums[1:])]

            zeros = [code.vector(0)] * (e + 1)
            total, *weighted = code.in_range(
                lambda start: code.loop(INT(0), given['keys'], AT_ONCE, partial(add, start), zeros),
                query,
                bias_row,
                MOST,
            )
            share = to.fdiv(code.vector(1), total)
            for n, result in zip(tokens, code.transposed([to.fmul(x, share) for x in weighted]), strict=True):
                code.store(result, code.token('out', n))
            return []

        code.loop(INT(0), given['queries'], lanes, queries)

    code.tasks(to.mul(given['windows'], given['heads']), attend)
    return code


@compiled
def gradient_kernel(d: int, e: int, biases: str, lanes: int) -> Code:
    """Gradients of the attention that `kernel` computes.

    A task is a head and a part of the windows, which come one after the other and share what a bias has gathered.
    With w = 2^logit, s the sum of w over the keys, p = w / s, g the gradient by the result and h = g v^T, the gradient
    by the logits is w (h / s - sum(w h) / s^2), and that by the values the sum of w g / s over the queries.
    """
    tensors = ('q', 'k', 'v', 'grad', 'grad_q', 'grad_k', 'grad_v')
    others = ('grad_biases', 'between_parts') if biases else ()
    code = AttentionCode(tensors, d, e, biases, lanes, (*others, 'parts'))
    to, given, zero = code.to, code.given, code.vector(0)
    widths = filled_up((d, e), lanes)  # of rows of whole vectors
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

    def queries(part: ir.Value, i: ir.Value) -> list[ir.Value]:
        first, tokens = code.queries(i)
        rows = [code.load(code.token('q', n), d) for n in tokens]
        query = [to.fmul(x, code.to_base_2) for x in code.transposed(rows)]
        by_results = [code.load(code.token('grad', n), e) for n in tokens]
        # 0 for queries that come again in a vector before this one, which then takes their place.
        counted = to.fcmp_ordered('>=', code.numbers(), code.spread(to.sitofp(to.sub(i, first), FLOAT)))
        grad = [to.select(counted, x, zero) for x in code.transposed(by_results)]
        bias_row = code.biases_of(first)

        def weigh(start: ir.Value, keys: list[ir.Value], found: Sums) -> Sums:
            total, weighted = found
            powers = [code.exp2(logit) for logit in code.logits(query, keys, bias_row, start)]
            products = code.products(grad, keys, d, [zero] * len(keys))
            for j, power, product in zip(keys, powers, products, strict=True):
                for vector, place in zip((power, product), pair(j), strict=True):
                    code.store(vector, place)
                total, weighted = to.fadd(total, power), code.multiply_add(power, product, weighted)
            return [total, weighted]

        total, weighted = code.in_range(
            lambda start: code.over_keys(partial(weigh, start), [zero] * 2), query, bias_row, MOST_FOR_GRADIENTS
        )
        share = to.fdiv(code.vector(1), total)
        mean = to.fmul(to.fmul(weighted, share), share)
        shares = to.select(counted, share, zero)
        for n, (row, by_result) in enumerate(zip(rows, by_results, strict=True)):
            place = query_row(INT(n))
            code.store(code.padded(row, widths[0]), place)
            share_of = code.spread(to.extract_element(shares, INT(n)), e)
            code.store(code.padded(to.fmul(by_result, share_of), widths[1]), code.at(place, INT(widths[0])))
        if biases:
            of_part = code.at(code.pointer('grad_biases'), to.mul(part, given['between_parts']))
            grad_bias = code.row_of(first, of_part)

        def spread(keys: list[ir.Value], found: Sums) -> Sums:
            """Add what the logits of these keys come to in the gradients by biases and queries."""
            for j in keys:
                power, place = pair(j)
                by_logit = to.fsub(to.fmul(code.load(place, lanes), share), mean)
                by_logit = to.fmul(by_logit, code.load(power, lanes))
                code.store(by_logit, place)
                if biases:
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
                by_logits, powers = ([code.spread(to.load(code.at(pair(j)[i], n))) for j in keys] for i in (1, 0))
                factors = []
                for c in columns:
                    row = code.load(code.at(query_row(n), INT(c)), lanes)
                    factors += [(x, row) for x in (by_logits if c < widths[0] else powers)]
                return [code.multiply_add(*x, total) for x, total in zip(factors, totals, strict=True)]

            totals = code.loop(INT(0), INT(lanes), 1, add, [code.load(place, lanes) for place in places])
            for total, place in zip(totals, places, strict=True):
                code.store(total, place)
            return []

        found = [to.fmul(x, scale) for x in code.over_keys(spread, [zero] * d)]
        code.over_keys(gather, [])
        for n, result in zip(tokens, code.transposed(found), strict=True):
            code.store(result, code.token('grad_q', n))
        return []

    def attend(task: ir.Value) -> None:
        head, part = to.sdiv(task, given['parts']), to.srem(task, given['parts'])
        first, stop = code.part_of(given['windows'], part)

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
            last = to.sub(given['queries'], INT(1))
            last = to.sub(last, to.srem(last, INT(lanes)))
            code.loop(INT(0), given['queries'], lanes, lambda i, _: queries(part, to.sub(last, i)))
            code.loop(INT(0), given['keys'], 1, write)
            return []

        code.loop(first, stop, 1, window)

    code.tasks(to.mul(given['heads'], given['parts']), attend)
    return code
