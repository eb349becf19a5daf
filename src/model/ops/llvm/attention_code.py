"""What attention on a CPU and its gradients are written with in LLVM: see `llvm.cached_attention`."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from llvmlite import ir

from model.ops.cached_attention import LOG2_E
from model.ops.llvm.code import BIT, FLOAT, INT, WORD, Code
from model.ops.progressive_attention import APART

KEYS = 8  # at once
LEAST = 2**-32  # sum of powers, of which those that are too small for float32 come to less than its rounding
GIVEN = ('windows', 'queries', 'keys', 'heads')
OF_BIASES = {  # by what there are
    '': (),
    'masks': ('kinds', 'by_key', 'by_query', 'between_heads', 'between_kinds', 'biases'),
    'areas': ('kinds', 'by_key', 'by_query', 'between_heads', 'between_kinds', 'biases', 'areas'),
}
Sums = list[ir.Value]


class BiasRow(NamedTuple):
    """What is added to the logits of the queries of a vector: `row` points to where those of the keys are found.

    With `areas`, a pointer to those of the keys, and the queries' `own`, less is added between different ones.
    """

    row: ir.Value
    areas: ir.Value | None
    own: ir.Value | None


class AttentionCode(Code):
    """What attention and its gradients are written with, for one window and head at a time.

    The bias of query i and key j is at `by_key[j] + by_query[i]` among those of its head and kind, where the queries
    of a vector follow one another. A window of a kind has the areas `areas[kind]` of its tokens. Of each tensor `name`
    a token is at `name_places[window, token]`, and its heads are `name_between_heads` apart.

    Args:
        tensors: names of tensors of tokens, among them q, k and v.
        d, e: channels of queries and keys, and of values.
        biases: '' for none, 'masks', or 'areas' for such with areas.
        others: names of what else is given.

    Attributes:
        packed: where keys and values lie beside each other, in a thread's memory.
    """

    def __init__(
        self,
        tensors: Sequence[str],
        d: int,
        e: int,
        biases: str,
        lanes: int,
        others: Sequence[str] = (),
    ) -> None:
        about = [f'{name}{what}' for name in tensors for what in ('', '_places', '_between_heads')]
        super().__init__((*GIVEN, *OF_BIASES[biases], *others, *about), lanes)
        self.d, self.e, self.biases = d, e, biases
        self.packed = self.memory
        self.to_base_2 = self.spread(self.to.fmul(self.factor, FLOAT(LOG2_E)))

    def integer(self, name: str, i: ir.Value) -> ir.Value:
        return self.to.load(self.at(self.pointer(name, INT), i))

    def number(self, row: ir.Value, i: int) -> ir.Value:
        """The number i of a row, in all lanes."""
        return self.spread(self.to.load(self.at(row, INT(i))))

    def begin(self, window: ir.Value, head: ir.Value) -> None:
        """Put keys and values of this window and head beside each other."""
        self.window, self.head = window, head

        def pack(j: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
            self.store(self.load(self.token('k', j, 'keys'), self.d), self.row(j))
            self.store(self.load(self.token('v', j, 'keys'), self.e), self.at(self.row(j), INT(self.d)))
            return []

        self.loop(INT(0), self.given['keys'], 1, pack)

    def token(self, name: str, i: ir.Value, count: str = 'queries') -> ir.Value:
        """Token i of one of the tensors, which has `count` of them."""
        place = self.integer(f'{name}_places', self.offset((self.window, self.given[count]), (i,)))
        of_head = self.offset((place,), (self.head, self.given[f'{name}_between_heads']))
        return self.at(self.pointer(name), of_head)

    def row(self, j: ir.Value) -> ir.Value:
        """Key j, and its value."""
        return self.at(self.packed, self.to.mul(j, INT(self.d + self.e)))

    def row_of(self, first: ir.Value, biases: ir.Value) -> ir.Value:
        """Where those of the queries from `first` on are in memory like that of the biases."""
        kind = self.integer('kinds', self.window)
        steps = (self.head, self.given['between_heads']), (kind, self.given['between_kinds'])
        return self.at(biases, self.offset(*steps, (self.integer('by_query', first),)))

    def biases_of(self, first: ir.Value) -> BiasRow | None:
        """Those of the queries from `first` on."""
        if not self.biases:
            return None
        row, areas, own = self.row_of(first, self.pointer('biases')), None, None
        if self.biases == 'areas':
            kind = self.integer('kinds', self.window)
            areas = self.at(self.pointer('areas', WORD), self.to.mul(kind, self.given['keys']))
            own = self.load(self.at(areas, first), self.lanes)
        return BiasRow(row, areas, own)

    def bias(self, biases: BiasRow, j: ir.Value) -> ir.Value:
        """Of the queries of a vector and key j."""
        found = self.load(self.at(biases.row, self.integer('by_key', j)), self.lanes)
        if biases.areas is None:
            return found
        apart = self.to.icmp_signed('!=', biases.own, self.spread(self.to.load(self.at(biases.areas, j))))
        return self.to.select(apart, self.to.fadd(found, self.vector(APART)), found)

    def queries(self, i: ir.Value) -> tuple[ir.Value, list[ir.Value]]:
        """The first of the queries of a vector and all of them; the last vector takes some again that came before."""
        last = self.to.sub(self.given['queries'], INT(self.lanes))
        first = self.to.select(self.to.icmp_signed('<', i, last), i, last)
        return first, [self.to.add(first, INT(lane)) for lane in range(self.lanes)]

    def by_channel(self, name: str, tokens: Sequence[ir.Value], count: int) -> list[ir.Value]:
        """Vectors of each channel of some tokens."""
        return self.transposed([self.load(self.token(name, n), count) for n in tokens])

    def products(self, x: Sequence[ir.Value], keys: Sequence[ir.Value], first: int, start: list[ir.Value]) -> Sums:
        """Products of vectors by channel with rows of some keys, from their number `first` on, plus `start`."""
        for i, channel in enumerate(x):
            factors = [self.number(self.row(j), first + i) for j in keys]
            start = [self.multiply_add(channel, *given) for given in zip(factors, start, strict=True)]
        return start

    def logits(
        self, query: Sequence[ir.Value], keys: Sequence[ir.Value], biases: BiasRow | None, start: ir.Value
    ) -> Sums:
        """To base 2, plus `start`, for queries that were multiplied by `to_base_2`."""
        found = [start] * len(keys)
        if biases:
            found = [self.multiply_add(self.bias(biases, j), self.vector(LOG2_E), start) for j in keys]
        return self.products(query, keys, 0, found)

    def over_keys(
        self,
        body: Callable[[list[ir.Value], list[ir.Value]], Sums],
        sums: Sums,
        span: tuple[ir.Value, ir.Value] | None = None,
    ) -> Sums:
        """Write `sums = body(keys, sums)` for all keys, or a `span` from one to before another, a few at once."""

        def few(count: int, j: ir.Value, sums: Sums) -> Sums:
            return body([self.to.add(j, INT(n)) for n in range(count)], sums)

        first, stop = span or (INT(0), self.given['keys'])
        whole = self.to.sub(stop, self.to.srem(self.to.sub(stop, first), INT(KEYS)))
        sums = self.loop(first, whole, KEYS, lambda j, sums: few(KEYS, j, sums), sums)
        return self.loop(whole, stop, 1, lambda j, sums: few(1, j, sums), sums)

    def in_range(
        self, sums: Callable[[ir.Value], Sums], query: Sequence[ir.Value], biases: BiasRow | None, most: float
    ) -> Sums:
        """`sums(start)`, the first of which are of powers of 2 of `logits`.

        The greatest logit of a query is subtracted only where powers of 2 without that were out of range: their sum
        below `LEAST` or above `most`.
        """

        def greater(keys: list[ir.Value], found: list[ir.Value]) -> list[ir.Value]:
            for logit in self.logits(query, keys, biases, self.vector(0)):
                found = [self.select_greater(logit, *found)]
            return found

        to = self.to
        before, once, again, end = to.block, *(to.append_basic_block() for _ in range(3))
        to.branch(once)
        to.position_at_end(once)
        start, is_first = to.phi(self.vector_type), to.phi(BIT)
        found = sums(start)
        in_range = to.and_(
            to.fcmp_ordered('>', found[0], self.vector(LEAST)), to.fcmp_ordered('<', found[0], self.vector(most))
        )
        all_lanes = ir.IntType(self.lanes)
        safe = to.icmp_signed('==', to.bitcast(in_range, all_lanes), all_lanes(-1))
        to.cbranch(to.or_(safe, to.not_(is_first)), end, again)
        to.position_at_end(again)
        (greatest,) = self.over_keys(greater, [self.vector(-math.inf)])
        subtracted = to.select(in_range, self.vector(0), to.fsub(self.vector(0), greatest))
        for block, value, first_time in ((before, self.vector(0), 1), (to.block, subtracted, 0)):
            start.add_incoming(value, block)
            is_first.add_incoming(BIT(first_time), block)
        to.branch(once)
        to.position_at_end(end)
        return found
