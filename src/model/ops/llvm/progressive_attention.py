"""Progressive focused attention on a CPU in registers: a form of `progressive_attention.attend` without gradients.

A query, or a few of them, is done from its logits to its result before the next one: all of it stays in the first
cache. Biases are read in the position table, whose rows, turned round, lie as the keys do.
"""

from collections.abc import Sequence
from math import isqrt

import torch
import torch.nn.functional as F
from llvmlite import ir
from torch import Tensor

from model.ops.cached_attention import LOG2_E
from model.ops.llvm.code import CACHE_LINE, FLOAT, INT, WORD, Code, filled_up, lanes, size_of
from model.ops.llvm.kernel_cache import compiled
from model.ops.llvm.product import product
from model.ops.llvm.selection import Selection, ordered, turned
from model.ops.progressive_attention import APART, Kept, joined, listed

BYTE, SHORT = ir.IntType(8), ir.IntType(16)
ROWS, VECTORS = 4, 2  # of queries and of keys, of which a whole window's logits are made at once
AHEAD = 4  # queries from the one at hand to the one whose entries are brought into the cache
SUMS = 4  # in which values of a query are added up, since every addition waits for the one before
BITS = 22  # behind the point of 1 / side, which is exact enough for windows of up to `windows.MOST_WINDOW` a side
NAMES = (
    'q', 'k', 'v', 'out', 'order', 'table', 'areas', 'kinds', 'logits', 'keys', 'new_logits', 'new_keys',
    'windows', 'heads', 'tokens', 'side', 'entries', 'count', 'kept_window', 'kept_head', 'row', 'new_row', 'q_token',
    'q_head', 'k_token', 'k_head', 'v_token', 'v_head',
)  # fmt: skip


class Writer:
    """Writes the kernel of queries and keys with `d` channels and values with `e`.

    Args:
        whole: logits are of all keys; else they are added to those of the keys that were kept.
        narrow: `count` entries are kept; else all, with new logits.
        marked: keys are marks, old ones or, where logits are of all keys, new ones.
    """

    def __init__(self, d: int, e: int, whole: bool, narrow: bool, marked: bool, lanes: int) -> None:
        self.d, self.e, self.whole, self.narrow, self.marked = d, e, whole, narrow, marked
        self.code = code = Code(NAMES, lanes)
        self.given, self.used = code.given, INT(0)
        self.tensors = {name: code.pointer(name) for name in ('q', 'k', 'v', 'out', 'table', 'logits', 'new_logits')}
        self.tensors |= {name: code.pointer(name, BYTE) for name in ('keys', 'new_keys')}
        self.areas = code.pointer('areas', WORD)
        self.order, self.kinds = (code.pointer(name, INT) for name in ('order', 'kinds'))
        self.key_width, self.value_width = filled_up((d, e), lanes)
        tokens, entries, chosen = (self.given[name] for name in ('tokens', 'entries', 'count'))
        chosen = code.to.add(chosen, INT(lanes))
        self.rows = 1 if not whole else ROWS
        self.packed_keys = self.room(tokens, d if whole else self.key_width)
        self.packed_values = self.room(tokens, self.value_width)
        self.logits = self.room(entries, self.rows)
        self.weights = self.room(code.to.add(entries, INT(lanes)))  # behind the logits, whose last row may pass its end
        self.orders, self.steps = (self.words(entries) for _ in range(2))
        self.places = self.words(code.to.add(entries, INT(lanes)))
        self.chosen_logits, self.chosen_weights = (self.room(chosen) for _ in range(2))
        self.chosen_keys = self.words(chosen)

    @staticmethod
    def memory(d: int, e: int, tokens: int, entries: int, count: int, lanes: int) -> int:
        """Numbers of float32 that a thread needs."""
        return tokens * (d + e + 2 * lanes) + entries * (ROWS + 4) + 3 * count + 5 * lanes

    def room(self, count: ir.Value, width: int = 1) -> ir.Value:
        """Memory of the thread."""
        place = self.code.at(self.code.memory, self.used)
        self.used = self.code.offset((self.used,), (count, INT(width)))
        return place

    def words(self, count: ir.Value) -> ir.Value:
        """Memory of the thread for integers."""
        return self.code.to.bitcast(self.room(count), WORD.as_pointer())

    def write(self) -> Code:
        """The whole of it."""
        count = self.code.offset((self.given['windows'], self.given['heads']))
        self.code.tasks(count, self.attend)
        return self.code

    def attend(self, task: ir.Value) -> None:
        """All queries of a window and a head."""
        to, tokens = self.code.to, self.given['tokens']
        self.window, self.head = to.sdiv(task, self.given['heads']), to.srem(task, self.given['heads'])
        self.code.loop(INT(0), tokens, 1, self.pack)
        self.code.loop(INT(0), tokens, self.rows, self.some_of_all if self.whole else self.some_of_kept)

    def some_of_all(self, i: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
        """The results of `ROWS` queries from i on, of all keys."""
        to = self.code.to
        queries = [to.add(i, INT(n)) for n in range(ROWS)]
        rows = [self.code.at(self.logits, to.mul(self.given['entries'], INT(n))) for n in range(ROWS)]
        for query, row in zip(queries, rows, strict=True):  # one after the other: their ends are written over
            self.put_biases(query, row)
        greatest = self.add_products(queries, rows)
        if self.narrow:
            for given in zip(queries, rows, greatest, strict=True):
                self.finish_narrow(*given)
        else:
            totals = [self.weigh(row, found, row)[0] for row, found in zip(rows, greatest, strict=True)]
            self.put_values(queries, self.add_values(rows, None, self.given['entries']), totals)
        return []

    def some_of_kept(self, i: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
        """The result of query i, of the keys that it has kept."""
        logits = self.logits if self.narrow else self.entry('new_logits', i)
        greatest = self.add_logits(i, logits)
        if self.narrow:
            self.finish_narrow(i, logits, greatest)
        else:
            total, _ = self.weigh(logits, greatest, self.weights)
            self.put_values([i], self.add_values([self.weights], self.places, self.given['entries']), [total])
        return []

    def finish_narrow(self, i: ir.Value, logits: ir.Value, greatest: ir.Value) -> None:
        """Choose what is kept of a query, and write it and the result."""
        total, least = self.weigh(logits, greatest, self.weights)
        most = turned(self.code, self.code.to.bitcast(self.code.to.fadd(greatest, FLOAT(0)), WORD))
        selection = Selection(self.code, self.orders, self.given['entries'], self.given['count'], least, most)
        marks = self.entry('new_keys', i) if self.whole and self.marked else None
        selection.write(lambda j: self.belongings(logits, j), marks)
        self.keep(i)
        self.put_values([i], self.add_values([self.chosen_weights], self.chosen_keys, self.given['count']), [total])

    def place_of(self, i: ir.Value) -> ir.Value:
        """Where token i of the window stands among all."""
        return self.code.to.load(self.code.at(self.order, self.code.offset((self.window, self.given['tokens']), (i,))))

    def token(self, name: str, i: ir.Value) -> ir.Value:
        """The row of a token in queries, keys or values."""
        steps = [self.given[f'{name}_{what}'] for what in ('token', 'head')]
        return self.code.at(
            self.tensors[name], self.code.offset(*zip((self.place_of(i), self.head), steps, strict=True))
        )

    def entry(self, name: str, i: ir.Value) -> ir.Value:
        """What `logits` or `keys`, old or new, has of a query."""
        code, given = self.code, self.given
        row = given['new_row' if name.startswith('new') else 'row']
        offset = code.offset((self.window, given['kept_window']), (self.head, given['kept_head']), (i, row))
        if name.endswith('keys'):
            offset = code.to.mul(offset, INT(size_of(FLOAT)))
        return code.at(self.tensors[name], offset)

    def biases(self, i: ir.Value) -> ir.Value:
        """Those of a query: for the key at (y, x) at place y * (2 * side - 1) + x."""
        to, side = self.code.to, self.given['side']
        last = to.sub(side, INT(1))
        rows, columns = to.sub(last, to.sdiv(i, side)), to.sub(last, to.srem(i, side))
        return self.code.at(self.tensors['table'], self.code.offset((rows, to.add(side, last)), (columns,)))

    def pack(self, j: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
        """Put key, times the factor, and value of a token into whole vectors.

        Keys of whole windows are columns of as many tokens as fit.
        """
        code, to = self.code, self.code.to
        value = code.load_row(self.token('v', j), self.e)
        code.store_row(value, code.at(self.packed_values, to.mul(j, INT(self.value_width))), self.value_width)
        key = self.token('k', j)
        if self.whole:
            at_once = INT(VECTORS * code.lanes)
            before, lane = to.sub(j, to.srem(j, at_once)), to.srem(j, at_once)
            for i in range(self.d):
                place = code.offset((before, INT(self.d)), (INT(i), at_once), (lane,))
                number = to.fmul(to.load(code.at(key, INT(i))), code.factor)
                to.store(number, code.at(self.packed_keys, place))
        else:
            place, factor = code.at(self.packed_keys, to.mul(j, INT(self.key_width))), code.spread(code.factor)
            vectors = [to.fmul(x, factor) for x in code.load_row(key, self.d)]
            code.store_row(vectors, place, self.key_width)
        return []

    def put_biases(self, i: ir.Value, row: ir.Value) -> None:
        """Of a query and all keys, less those from another area; up to a vector behind the row is written too."""
        code, to, side = self.code, self.code.to, self.given['side']
        areas = code.at(self.areas, to.mul(to.load(code.at(self.kinds, self.window)), self.given['tokens']))
        own, biases = code.spread(to.load(code.at(areas, i))), self.biases(i)
        step = to.sub(to.add(side, side), INT(1))

        def line(y: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
            first, start = code.at(biases, to.mul(y, step)), to.mul(y, side)

            def put(x: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
                place = to.add(start, x)
                other = to.icmp_signed('!=', code.load(code.at(areas, place), code.lanes), own)
                less = to.select(other, code.vector(APART), code.vector(0))
                code.store(to.fadd(code.load(code.at(first, x), code.lanes), less), code.at(row, place))
                return []

            code.loop(INT(0), side, code.lanes, put)
            return []

        code.loop(INT(0), side, 1, line)

    def add_products(self, queries: Sequence[ir.Value], rows: Sequence[ir.Value]) -> list[ir.Value]:
        """Add those of queries and all keys to their logits; the greatest of each row."""
        code, to = self.code, self.code.to
        pointers = [self.token('q', n) for n in queries]

        def add(j: ir.Value, greatest: list[ir.Value]) -> list[ir.Value]:
            steps = [to.add(j, INT(n * code.lanes)) for n in range(VECTORS)]
            first = code.at(self.packed_keys, to.mul(j, INT(self.d)))
            columns = [code.at(first, INT(n * code.lanes)) for n in range(VECTORS)]
            places = [code.at(row, step) for row in rows for step in steps]
            sums = [code.load(place, code.lanes) for place in places]
            found = product(code, pointers, columns, INT(VECTORS * code.lanes), INT(self.d), sums)
            greatest = list(greatest)
            for n, (vector, place) in enumerate(zip(found, places, strict=True)):
                code.store(vector, place)
                greatest[n // VECTORS] = code.select_greater(vector, greatest[n // VECTORS])
            return greatest

        start = [code.vector(float('-inf'))] * len(rows)
        found = code.loop(INT(0), self.given['tokens'], VECTORS * code.lanes, add, start)
        return [self.greatest(vector) for vector in found]

    def greatest(self, vector: ir.Value) -> ir.Value:
        """Of all lanes."""
        return self.code.fold(vector, self.code.select_greater)

    def place_keys(self, i: ir.Value) -> None:
        """Put the kept keys of a query into the thread's memory, as integers."""
        code, to = self.code, self.code.to
        row, wide = self.entry('keys', i), code.integers(0).type
        if not self.marked:
            keys = to.bitcast(row, SHORT.as_pointer())

            def copy(j: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
                code.store(to.sext(code.load(code.at(keys, j), code.lanes), wide), code.at(self.places, j))
                return []

            code.loop(INT(0), self.given['entries'], code.lanes, copy)
            return
        marks = to.bitcast(row, ir.IntType(code.lanes).as_pointer())

        def add(j: ir.Value, found: list[ir.Value]) -> list[ir.Value]:
            bits = to.load(code.at(marks, to.sdiv(j, INT(code.lanes))), align=1)
            keys = to.add(code.spread(to.trunc(j, WORD)), wide([*range(code.lanes)]))
            code.store(code.compress(keys, bits), code.at(self.places, found[0]))
            return [to.add(found[0], to.zext(to.ctpop(bits), INT))]

        code.loop(INT(0), self.given['tokens'], code.lanes, add, [INT(0)])

    def prefetch_row(self, i: ir.Value) -> None:
        """Have what a later query has kept brought into the cache."""
        code, to = self.code, self.code.to
        row = self.entry('logits', to.add(i, INT(AHEAD)))

        def prefetch(j: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
            code.prefetch(code.at(row, j), 1)
            return []

        code.loop(INT(0), self.given['row'], CACHE_LINE, prefetch)

    def add_logits(self, i: ir.Value, target: ir.Value) -> ir.Value:
        """Of a query and its kept keys to those that it had; the greatest."""
        code, to, side = self.code, self.code.to, self.given['side']
        self.place_keys(i)
        self.prefetch_row(i)
        query, biases, before = code.load_row(self.token('q', i), self.d), self.biases(i), self.entry('logits', i)
        inverse = to.trunc(to.add(to.sdiv(INT(2**BITS), side), INT(1)), WORD)
        inverse, gap = code.spread(inverse), code.spread(to.trunc(to.sub(side, INT(1)), WORD))

        def product_with(key: ir.Value) -> ir.Value:
            """In lanes that are still to be summed up."""
            total = code.vector(0)
            for pair in zip(query, code.load_row(key, self.key_width), strict=True):
                total = code.multiply_add(*pair, total)
            return total

        def add(j: ir.Value, greatest: list[ir.Value]) -> list[ir.Value]:
            numbers = code.load(code.at(self.places, j), code.lanes)
            lines = to.lshr(to.mul(numbers, inverse), code.integers(BITS))
            code.store(to.add(numbers, to.mul(lines, gap)), code.at(self.steps, j))
            places, steps = (
                [to.sext(to.load(code.at(where, to.add(j, INT(n)))), INT) for n in range(code.lanes)]
                for where in (self.places, self.steps)
            )
            found = code.vector(0)
            for n, step in enumerate(steps):
                found = to.insert_element(found, to.load(code.at(biases, step)), INT(n))
            rows = [code.at(self.packed_keys, to.mul(place, INT(self.key_width))) for place in places]
            total = to.fadd(code.sums([product_with(row) for row in rows]), found)
            total = to.fadd(total, code.load(code.at(before, j), code.lanes))
            code.store(total, code.at(target, j))
            return [code.select_greater(total, greatest[0])]

        return self.greatest(code.loop(INT(0), self.given['entries'], code.lanes, add, [code.vector(float('-inf'))])[0])

    def weigh(self, logits: ir.Value, greatest: ir.Value, weights: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Make weights of logits; their sum, and the least of what is chosen by, which is made too where it is."""
        code, to = self.code, self.code.to
        most = code.spread(greatest)

        def add(j: ir.Value, found: list[ir.Value]) -> list[ir.Value]:
            total, least = found
            x = code.load(code.at(logits, j), code.lanes)
            weight = code.exp2(to.fmul(to.fsub(x, most), code.vector(LOG2_E)))
            code.store(weight, code.at(weights, j))
            if self.narrow:
                order = ordered(code, x)
                code.store(order, code.at(self.orders, j))
                least = to.select(to.icmp_signed('<', order, least), order, least)
            return [to.fadd(weight, total), least]

        start = [code.vector(0), code.integers(2**31 - 1)]
        total, least = code.loop(INT(0), self.given['entries'], code.lanes, add, start)
        return code.sum(total), code.fold(least, lambda x, y: to.select(to.icmp_signed('<', x, y), x, y))

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
        new_logits = self.entry('new_logits', i)
        new_keys = to.bitcast(self.entry('new_keys', i), SHORT.as_pointer())

        def copy(j: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
            code.store(code.load(code.at(self.chosen_logits, j), code.lanes), code.at(new_logits, j))
            if not (self.whole and self.marked):
                keys = code.load(code.at(self.chosen_keys, j), code.lanes)
                code.store(to.trunc(keys, ir.VectorType(SHORT, code.lanes)), code.at(new_keys, j))
            return []

        code.loop(INT(0), self.given['count'], code.lanes, copy)

    def add_values(self, rows: Sequence[ir.Value], keys: ir.Value | None, count: ir.Value) -> list[list[ir.Value]]:
        """Sums of `count` values, weighted by each row, vector by vector; of the first ones, or at these keys."""
        code, to = self.code, self.code.to
        width, sums = self.value_width // code.lanes, max(1, SUMS // len(rows))

        def add(j: ir.Value, found: list[ir.Value]) -> list[ir.Value]:
            found = list(found)
            for n in range(sums):
                place = to.add(j, INT(n))
                key = to.sext(to.load(code.at(keys, place)), INT) if keys else place
                value = code.load_row(code.at(self.packed_values, to.mul(key, INT(self.value_width))), self.value_width)
                for m, row in enumerate(rows):
                    weight, first = code.spread(to.load(code.at(row, place))), (m * sums + n) * width
                    for i, vector in enumerate(value, first):
                        found[i] = code.multiply_add(weight, vector, found[i])
            return found

        found = code.loop(INT(0), count, sums, add, [code.vector(0)] * (len(rows) * sums * width))
        totals = []
        for m in range(len(rows)):
            parts = found[m * sums * width :][: sums * width]
            while len(parts) > width:
                half = len(parts) // 2
                parts = [to.fadd(x, y) for x, y in zip(parts[:half], parts[half:], strict=True)]
            totals.append(parts)
        return totals

    def put_values(
        self, queries: Sequence[ir.Value], found: Sequence[Sequence[ir.Value]], totals: Sequence[ir.Value]
    ) -> None:
        """Write the results of queries, whose weights have these sums."""
        code, heads = self.code, self.given['heads']
        for i, vectors, total in zip(queries, found, totals, strict=True):
            share = code.spread(code.to.fdiv(FLOAT(1), total))
            place = code.offset((self.place_of(i), heads, INT(self.e)), (self.head, INT(self.e)))
            code.store_row([code.to.fmul(x, share) for x in vectors], code.at(self.tensors['out'], place), self.e)


@compiled
def kernel(d: int, e: int, whole: bool, narrow: bool, marked: bool, lanes: int) -> Code:
    """See `Writer`."""
    return Writer(d, e, whole, narrow, marked, lanes).write()


def views(rows: Tensor, count: int, marked: bool) -> Kept:
    """`count` logits in float32 at the start of each row (B, T, heads, width), and their keys behind them."""
    kind = torch.uint8 if marked else torch.int16
    size = rows.shape[1] // 8 if marked else count
    return Kept(rows[..., :count], rows.view(kind).narrow(-1, count * rows.itemsize // kind.itemsize, size))


def new_kept(shape: Sequence[int], count: int, marked: bool) -> Kept:
    """Room for `count` entries of rows (B, T, heads), the rows of a window and a head together."""
    windows, tokens, heads = shape
    width = count + (tokens // 32 if marked else count // 2)
    return views(torch.empty(windows, heads, tokens, width).transpose(1, 2), count, marked)


def in_rows(kept: Kept, count: int) -> Kept:
    """In memory as `new_kept` has it, with room for `count` logits and the numbers of their keys."""
    logits, keys = kept
    together = logits.untyped_storage().data_ptr() == keys.untyped_storage().data_ptr()
    if together and 3 * count <= 2 * logits.stride(1):
        return kept
    found = new_kept(logits.shape[:3], logits.shape[3], False)
    for new, old in zip(found, listed(kept), strict=True):
        new.copy_(old)
    return found


def narrowed(kept: Kept, count: int) -> Kept:
    """Room for `count` entries in shorter rows where more of them are; a row ends before the next one begins."""
    windows, tokens, heads, _ = kept.logits.shape
    width = 3 * count // 2
    by_window, _, by_head, _ = kept.logits.stride()
    return views(kept.logits.as_strided((windows, tokens, heads, width), (by_window, width, by_head, 1)), count, False)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    positions: Tensor,
    order: Tensor,
    inverse: Tensor,
    areas: Tensor,
    counts: Sequence[int],
    before: list[Kept] | None,
    topk: int,
) -> tuple[Tensor, list[Kept] | None]:
    """See `progressive_attention.attend`. What is kept takes the place of `before` in memory."""
    size = lanes()
    pixels, heads, d = q.shape
    e, tokens = v.shape[2], areas.shape[1]
    windows = pixels // tokens
    entries = before[0].logits.shape[3] if before else tokens
    narrow, count = topk < entries, min(topk, entries)
    old = in_rows(joined(before), count if narrow else 0) if before else None
    new = old
    if narrow:  # a bit for each token where that is less than two bytes for each entry
        new = narrowed(old, count) if old else new_kept((windows, tokens, heads), count, tokens // 8 < 2 * count)
    some = old or new
    marked = some is not None and some.keys.dtype == torch.uint8
    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
    out = q.new_empty(pixels, heads, e)
    turned_table = F.pad(table.flip(0), (0, size))
    areas = F.pad(areas.flatten(), (0, size))
    kinds = torch.repeat_interleave(torch.tensor(counts))
    by_window, new_row, by_head = new.logits.stride()[:3] if new else (0, 0, 0)
    rows = [by_window, by_head, old.logits.stride(1) if old else 0, new_row]
    pointers = [q, k, v, out, order.contiguous(), turned_table, areas, kinds]
    pointers += [*(old or (0, 0)), *(new or (0, 0))]
    strides = [x for tensor in (q, k, v) for x in tensor.stride()[:2]]
    numbers = [windows, heads, tokens, isqrt(tokens), entries, count, *rows, *strides]
    memory = Writer.memory(d, e, tokens, entries, count, size)
    kernel(d, e, not old, narrow, marked, size)([*pointers, *numbers], memory, e**-0.5)
    return out, [new] if new else None
