"""What attention on a CPU and its gradients are written with in LLVM: see `llvm.cached_attention`."""

import math
from collections.abc import Callable, Sequence

from llvmlite import ir

from model.ops.cached_attention import LOG2_E
from model.ops.llvm.code import BIT, FLOAT, INT, Code

KEYS = 8  # at once
GIVEN = ('counter', 'windows', 'queries', 'keys', 'heads')
OF_BIASES = ('kinds', 'by_key', 'by_query', 'between_heads', 'between_kinds', 'biases')
Sums = list[ir.Value]


class AttentionCode(Code):
    """What attention and its gradients are written with, for one window and head at a time.

    The bias of query i and key j is at `by_key[j] + by_query[i]` among those of its head and kind, where the queries
    of a vector follow one another. Of each tensor `name` a token is at `name_places[window, token]`, and its heads are
    `name_between_heads` apart.

    Args:
        tensors: names of tensors of tokens, among them q, k and v.
        d, e: channels of queries and keys, and of values.
        biased: whether there are biases.
        others: names of what else is given.

    Attributes:
        packed: where keys and values lie beside each other, in a thread's memory.
    """

    def __init__(
        self, tensors: Sequence[str], d: int, e: int, biased: bool, lanes: int, others: Sequence[str] = ()
    ) -> None:
        about = (f'{name}{what}' for name in tensors for what in ('', '_places', '_between_heads'))
        super().__init__((*GIVEN, *(OF_BIASES if biased else ()), *others, *about), lanes)
        self.d, self.e, self.biased = d, e, biased
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

    def biases_of(self, first: ir.Value, memory: ir.Value | None = None) -> ir.Value:
        """Those of the queries from `first` on; or what is at their place in other memory."""
        kind = self.integer('kinds', self.window)
        steps = (self.head, self.given['between_heads']), (kind, self.given['between_kinds'])
        return self.at(memory or self.pointer('biases'), self.offset(*steps, (self.integer('by_query', first),)))

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

    def logits(self, query: Sequence[ir.Value], keys: Sequence[ir.Value], bias: ir.Value, start: ir.Value) -> Sums:
        """To base 2, plus `start`, for queries that were multiplied by `to_base_2`."""
        found = [start] * len(keys)
        if self.biased:
            places = (self.at(bias, self.integer('by_key', j)) for j in keys)
            found = [self.multiply_add(self.load(place, self.lanes), self.vector(LOG2_E), start) for place in places]
        return self.products(query, keys, 0, found)

    def over_keys(self, body: Callable[[list[ir.Value], list[ir.Value]], Sums], sums: Sums) -> Sums:
        """Write `sums = body(keys, sums)` for all keys, a few at once."""

        def few(count: int, j: ir.Value, sums: Sums) -> Sums:
            return body([self.to.add(j, INT(n)) for n in range(count)], sums)

        whole = self.to.sub(self.given['keys'], self.to.srem(self.given['keys'], INT(KEYS)))
        sums = self.loop(INT(0), whole, KEYS, lambda j, sums: few(KEYS, j, sums), sums)
        return self.loop(whole, self.given['keys'], 1, lambda j, sums: few(1, j, sums), sums)

    def in_range(self, sums: Callable[[ir.Value], Sums], query: Sequence[ir.Value], bias: ir.Value) -> Sums:
        """`sums(start)`, the first of which are of powers of 2 of `logits`.

        The greatest logit of a query is subtracted only where powers of 2 without that were out of range.
        """

        def greater(keys: list[ir.Value], most: list[ir.Value]) -> list[ir.Value]:
            for logit in self.logits(query, keys, bias, self.vector(0)):
                most = [self.select_greater(logit, *most)]
            return most

        to = self.to
        before, once, again, end = to.block, *(to.append_basic_block() for _ in range(3))
        to.branch(once)
        to.position_at_end(once)
        start, is_first = to.phi(self.vector_type), to.phi(BIT)
        found = sums(start)
        in_range = to.and_(
            to.fcmp_ordered('>', found[0], self.vector(2**-32)), to.fcmp_ordered('<', found[0], self.vector(2**32))
        )
        all_lanes = ir.IntType(self.lanes)
        safe = to.icmp_signed('==', to.bitcast(in_range, all_lanes), all_lanes(-1))
        to.cbranch(to.or_(safe, to.not_(is_first)), end, again)
        to.position_at_end(again)
        (most,) = self.over_keys(greater, [self.vector(-math.inf)])
        subtracted = to.select(in_range, self.vector(0), to.fsub(self.vector(0), most))
        for block, value, first_time in ((before, self.vector(0), 1), (to.block, subtracted, 0)):
            start.add_incoming(value, block)
            is_first.add_incoming(BIT(first_time), block)
        to.branch(once)
        to.position_at_end(end)
        return found
