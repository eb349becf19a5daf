"""Attention to kept keys on a CPU in registers: see `kept_attention.attend`, of which this is a form without gradients.

A query is done, from its logits to its result, before the next one: all of it stays in the first cache.
"""

from functools import cache

import torch
from llvmlite import ir
from torch import Tensor

from model.ops.cached_attention import LOG2_E
from model.ops.kept_attention import Kept
from model.ops.llvm.code import FLOAT, INT, Code, Kernel, filled_up, lanes
from model.ops.llvm.product import product
from model.ops.llvm.selection import WORD, Selection, ordered

SHORT = ir.IntType(16)
QUERIES = 128  # of a task
ROWS, VECTORS = 4, 2  # of queries and of keys, of which a whole window's logits are made at once
SUMS = 4  # in which values are added up, since every addition waits for the one before
NAMES = (
    'counter', 'q', 'k', 'v', 'out', 'bias', 'logits', 'keys', 'new_logits', 'new_keys', 'windows', 'heads', 'tokens',
    'entries', 'count', 'q_window', 'q_token', 'q_head', 'k_window', 'k_token', 'k_head', 'v_window', 'v_token',
    'v_head', 'bias_window', 'bias_token',
)  # fmt: skip


class Writer:
    """Writes the kernel of queries and keys with `d` channels and values with `e`.

    Args:
        whole: logits are of all keys; else they are added to those of the keys that were kept.
        narrow: `count` entries are kept; else all, with new logits.
    """

    def __init__(self, d: int, e: int, whole: bool, narrow: bool, lanes: int) -> None:
        self.d, self.e, self.whole, self.narrow = d, e, whole, narrow
        self.code = code = Code(NAMES, lanes)
        self.given, self.used = code.given, INT(0)
        self.tensors = {name: code.pointer(name) for name in ('q', 'k', 'v', 'out', 'bias', 'logits', 'new_logits')}
        self.tensors |= {name: code.pointer(name, SHORT) for name in ('keys', 'new_keys')}
        self.counter = code.pointer('counter', INT)
        self.key_width, self.value_width = filled_up((d, e), lanes)
        tokens, entries, chosen = (self.given[name] for name in ('tokens', 'entries', 'count'))
        chosen = code.to.add(chosen, INT(lanes))
        self.packed_keys = self.room(tokens, d if whole else self.key_width)
        self.packed_values = self.room(tokens, self.value_width)
        self.rows = self.room(entries, ROWS if whole else 1)  # of logits
        self.weights, self.orders, self.places = self.room(entries), self.room(entries), self.room(entries)
        self.chosen_logits, self.chosen_weights, self.chosen_keys = (self.room(chosen) for _ in range(3))
        self.orders, self.places, self.chosen_keys = (
            code.to.bitcast(x, WORD.as_pointer()) for x in (self.orders, self.places, self.chosen_keys)
        )

    def room(self, count: ir.Value, width: int = 1) -> ir.Value:
        """Memory of the thread."""
        place = self.code.at(self.code.memory, self.used)
        self.used = self.code.offset((self.used,), (count, INT(width)))
        return place

    def write(self) -> Code:
        """The whole of it."""
        to = self.code.to
        parts = to.sdiv(to.add(self.given['tokens'], INT(QUERIES - 1)), INT(QUERIES))
        count = self.code.offset((self.given['windows'], self.given['heads'], parts))
        self.code.tasks(self.counter, count, lambda task: self.attend(to.sdiv(task, parts), to.srem(task, parts)))
        return self.code

    def attend(self, pair: ir.Value, part: ir.Value) -> None:
        """Some queries of a window and a head."""
        to, tokens = self.code.to, self.given['tokens']
        self.window, self.head = to.sdiv(pair, self.given['heads']), to.srem(pair, self.given['heads'])
        self.code.loop(INT(0), tokens, 1, self.pack)
        first = to.mul(part, INT(QUERIES))
        end = to.add(first, INT(QUERIES))
        end = to.select(to.icmp_signed('<', end, tokens), end, tokens)

        def queries(i: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
            if self.whole:
                self.make_logits(i)
            for n in range(ROWS if self.whole else 1):
                query = to.add(i, INT(n))
                logits = self.code.at(self.rows, to.mul(self.given['entries'], INT(n)))
                if not self.whole:
                    logits = logits if self.narrow else self.entry('new_logits', query, 'entries')
                    self.add_logits(query, logits)
                self.finish(query, logits)
            return []

        self.code.loop(first, end, ROWS if self.whole else 1, queries)

    def token(self, name: str, i: ir.Value) -> ir.Value:
        """Query, key or value of a token."""
        steps = (self.given[f'{name}_{axis}'] for axis in ('window', 'token', 'head'))
        return self.code.at(self.tensors[name], self.code.offset(*zip((self.window, i, self.head), steps, strict=True)))

    def entry(self, name: str, i: ir.Value, length: str) -> ir.Value:
        """What a contiguous tensor (windows, tokens, heads, length) has of a query."""
        code, given = self.code, self.given
        row = code.offset((self.window, given['tokens'], given['heads']), (i, given['heads']), (self.head,))
        return code.at(self.tensors[name], code.to.mul(row, given[length]))

    def bias_of(self, i: ir.Value) -> ir.Value:
        steps = self.given['bias_window'], self.given['bias_token']
        return self.code.at(self.tensors['bias'], self.code.offset((self.window, steps[0]), (i, steps[1])))

    def pack(self, j: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
        """Put key and value of a token into whole vectors, keys of whole windows as columns of as many as fit."""
        code, to = self.code, self.code.to
        value = code.load_row(self.token('v', j), self.e)
        code.store_row(value, code.at(self.packed_values, to.mul(j, INT(self.value_width))), self.value_width)
        key = self.token('k', j)
        if self.whole:
            at_once = INT(VECTORS * code.lanes)
            before, lane = to.sub(j, to.srem(j, at_once)), to.srem(j, at_once)
            for i in range(self.d):
                place = code.offset((before, INT(self.d)), (INT(i), at_once), (lane,))
                to.store(to.load(code.at(key, INT(i))), code.at(self.packed_keys, place))
        else:
            place = code.at(self.packed_keys, to.mul(j, INT(self.key_width)))
            code.store_row(code.load_row(key, self.d), place, self.key_width)
        return []

    def make_logits(self, i: ir.Value) -> None:
        """Of `ROWS` queries from i on and all keys."""
        code, to = self.code, self.code.to
        tokens, queries = self.given['tokens'], [to.add(i, INT(n)) for n in range(ROWS)]
        pointers, biases = [self.token('q', n) for n in queries], [self.bias_of(n) for n in queries]

        def add(j: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
            steps = [to.add(j, INT(n * code.lanes)) for n in range(VECTORS)]
            first = code.at(self.packed_keys, to.mul(j, INT(self.d)))
            columns = [code.at(first, INT(n * code.lanes)) for n in range(VECTORS)]
            sums = [code.load(code.at(bias, step), code.lanes) for bias in biases for step in steps]
            found = product(code, pointers, columns, INT(VECTORS * code.lanes), INT(self.d), sums)
            for n, vector in enumerate(found):
                row = code.at(self.rows, to.mul(tokens, INT(n // VECTORS)))
                code.store(vector, code.at(row, steps[n % VECTORS]))
            return []

        code.loop(INT(0), tokens, VECTORS * code.lanes, add)

    def add_logits(self, i: ir.Value, target: ir.Value) -> None:
        """Of a query and its kept keys to those that it had."""
        code, to = self.code, self.code.to
        query, bias = code.load_row(self.token('q', i), self.d), self.bias_of(i)
        before, keys = self.entry('logits', i, 'entries'), self.entry('keys', i, 'entries')

        def product_with(key: ir.Value) -> ir.Value:
            """In lanes that are still to be summed up."""
            total = code.vector(0)
            for pair in zip(query, code.load_row(key, self.key_width), strict=True):
                total = code.multiply_add(*pair, total)
            return total

        def add(j: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
            numbers = [to.sext(to.load(code.at(keys, to.add(j, INT(n)))), INT) for n in range(code.lanes)]
            biases = code.vector(0)
            for n, number in enumerate(numbers):
                biases = to.insert_element(biases, to.load(code.at(bias, number)), INT(n))
            rows = [code.at(self.packed_keys, to.mul(number, INT(self.key_width))) for number in numbers]
            total = to.fadd(code.sums([product_with(row) for row in rows]), biases)
            code.store(to.fadd(total, code.load(code.at(before, j), code.lanes)), code.at(target, j))
            of_four_bytes = to.sext(code.load(code.at(keys, j), code.lanes), code.integers(0).type)
            code.store(of_four_bytes, code.at(self.places, j))
            return []

        code.loop(INT(0), self.given['entries'], code.lanes, add)

    def finish(self, i: ir.Value, logits: ir.Value) -> None:
        """Write the result of a query and what is kept of it."""
        code = self.code
        total = self.weigh(logits)
        if self.narrow:
            Selection(code, self.orders, self.given['entries'], self.given['count']).write(
                lambda j: self.belongings(logits, j)
            )
            self.keep(i)
        result = self.add_values()
        share = code.spread(code.to.fdiv(FLOAT(1), total))
        rows = code.offset((self.window, self.given['tokens']), (i,))
        place = code.offset((rows, self.given['heads'], INT(self.e)), (self.head, INT(self.e)))
        vectors = [code.to.fmul(x, share) for x in result]
        code.store_row(vectors, code.at(self.tensors['out'], place), self.e)

    def weigh(self, logits: ir.Value) -> ir.Value:
        """Make weights of logits; their sum."""
        code, to = self.code, self.code.to

        def greater(j: ir.Value, found: list[ir.Value]) -> list[ir.Value]:
            return [code.select_greater(code.load(code.at(logits, j), code.lanes), found[0])]

        lowest = code.vector(float('-inf'))
        (found,) = code.loop(INT(0), self.given['entries'], code.lanes, greater, [lowest])
        greatest = code.spread(code.fold(found, lambda x, y: to.select(to.fcmp_ordered('>', x, y), x, y)))

        def add(j: ir.Value, found: list[ir.Value]) -> list[ir.Value]:
            x = code.load(code.at(logits, j), code.lanes)
            weight = code.exp2(to.fmul(to.fsub(x, greatest), code.vector(LOG2_E)))
            code.store(weight, code.at(self.weights, j))
            if self.narrow:
                code.store(ordered(code, x), code.at(self.orders, j))
            return [to.fadd(weight, found[0])]

        return code.sum(code.loop(INT(0), self.given['entries'], code.lanes, add, [code.vector(0)])[0])

    def belongings(self, logits: ir.Value, j: ir.Value) -> list[tuple[ir.Value, ir.Value]]:
        """Logits, weights and keys from place j on, and where those go that are kept."""
        code, to = self.code, self.code.to
        if self.whole:
            keys = to.add(code.spread(to.trunc(j, WORD)), code.integers(0).type([*range(code.lanes)]))
        else:
            keys = code.load(code.at(self.places, j), code.lanes)
        logits, weights = (code.load(code.at(x, j), code.lanes) for x in (logits, self.weights))
        return [(logits, self.chosen_logits), (weights, self.chosen_weights), (keys, self.chosen_keys)]

    def keep(self, i: ir.Value) -> None:
        """Copy what was chosen of a query to where it stays."""
        code, to = self.code, self.code.to
        new_logits, new_keys = (self.entry(name, i, 'count') for name in ('new_logits', 'new_keys'))

        def copy(j: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
            code.store(code.load(code.at(self.chosen_logits, j), code.lanes), code.at(new_logits, j))
            keys = code.load(code.at(self.chosen_keys, j), code.lanes)
            code.store(to.trunc(keys, ir.VectorType(SHORT, code.lanes)), code.at(new_keys, j))
            return []

        code.loop(INT(0), self.given['count'], code.lanes, copy)

    def add_values(self) -> list[ir.Value]:
        """Weighted sums of values, vector by vector."""
        code, to = self.code, self.code.to
        weights = self.chosen_weights if self.narrow else self.weights
        keys = self.chosen_keys if self.narrow else None if self.whole else self.places
        width = self.value_width // code.lanes

        def add(j: ir.Value, found: list[ir.Value]) -> list[ir.Value]:
            sums = []
            for n in range(SUMS):
                place = to.add(j, INT(n))
                key = to.sext(to.load(code.at(keys, place)), INT) if keys else place
                weight = code.spread(to.load(code.at(weights, place)))
                value = code.load_row(code.at(self.packed_values, to.mul(key, INT(self.value_width))), self.value_width)
                sums += [code.multiply_add(weight, *x) for x in zip(value, found[n * width :][:width], strict=True)]
            return sums

        number = self.given['count' if self.narrow else 'entries']
        found = code.loop(INT(0), number, SUMS, add, [code.vector(0)] * (SUMS * width))
        while len(found) > width:
            half = len(found) // 2
            found = [to.fadd(x, y) for x, y in zip(found[:half], found[half:], strict=True)]
        return found


@cache
def kernel(d: int, e: int, whole: bool, narrow: bool, lanes: int) -> Kernel:
    """See `Writer`."""
    return Kernel(Writer(d, e, whole, narrow, lanes).write())


def focused(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, before: Kept | None, topk: int
) -> tuple[Tensor, Kept | None]:
    """See `kept_attention.attend`. Where all of `before` is kept, its logits are written over."""
    windows, tokens, heads, d = q.shape
    e = v.shape[3]
    entries = tokens if before is None else before[1].shape[3]
    narrow = topk < entries
    count = topk if narrow else entries
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    bias = bias if bias.stride(-1) == 1 else bias.contiguous()
    out = q.new_empty(windows, tokens, heads, e)
    kept = (
        Kept(*(q.new_empty(windows, tokens, heads, count, dtype=kind) for kind in (q.dtype, torch.int16)))
        if narrow
        else before
    )
    old, new = (x or (0, 0) for x in (before, kept))
    strides = [x for tensor in (q, k, v) for x in tensor.stride()[:3]]
    strides += [bias.stride(0) if bias.dim() == 3 else 0, bias.stride(-2)]
    counter = torch.zeros(1, dtype=torch.int64)
    size = lanes()
    memory = tokens * (d + e + 2 * size) + entries * (ROWS + 3) + 3 * (count + size)
    kernel(d, e, before is None, narrow, size)(
        [counter, q, k, v, out, bias, *old, *new, windows, heads, tokens, entries, count, *strides], memory, 1.0
    )
    return out, kept
