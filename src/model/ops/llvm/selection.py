"""The choice of the largest numbers of a row, for kernels on CPUs."""

from collections.abc import Callable, Sequence

from llvmlite import ir

from model.ops.llvm.code import BIT, INT, Code

WORD = ir.IntType(32)


def ordered(code: Code, x: ir.Value) -> ir.Value:
    """Integers in the order of the numbers of a vector; what is no number comes before all."""
    to = code.to
    bits = to.bitcast(to.fadd(x, code.vector(0)), code.integers(0).type)  # of -0 those of 0
    integers = to.xor(bits, to.and_(to.ashr(bits, code.integers(31)), code.integers(2**31 - 1)))
    return to.select(to.fcmp_ordered('ord', x, x), integers, code.integers(-(2**31)))


class Selection:
    """Writes the choice of the `count` largest integers of a row, of equal ones the first.

    Args:
        code: what is being written.
        row: pointer to the integers.
        entries: how many there are, a multiple of the lanes of a vector.
        count: how many are chosen, fewer than that.
    """

    def __init__(self, code: Code, row: ir.Value, entries: ir.Value, count: ir.Value) -> None:
        self.code, self.row, self.entries, self.count = code, row, entries, count
        self.bits = ir.IntType(code.lanes)

    def write(self, row: Callable[[ir.Value], Sequence[tuple[ir.Value, ir.Value]]]) -> None:
        """Put what belongs to the chosen integers together, in their order, and up to a vector of anything behind it.

        Args:
            row: gives, for a place in the row, vectors of what belongs to the integers there, each with the pointer to
                where the chosen ones go.
        """
        code, to = self.code, self.code.to
        limit = self._least()
        more_than = code.spread(limit)
        room = to.sub(self.count, self._how_many('>', limit))  # for integers that equal the limit

        def clear_last(_: ir.Value, found: list[ir.Value]) -> list[ir.Value]:
            last = to.lshr(self.bits(1 << (code.lanes - 1)), to.ctlz(found[0], BIT(0)))
            return [to.and_(found[0], to.not_(last))]

        def choose(j: ir.Value, found: list[ir.Value]) -> list[ir.Value]:
            place, room = found
            x = self._load(j)
            more, equal = (to.bitcast(to.icmp_signed(by, x, more_than), self.bits) for by in ('>', '=='))
            (equal,) = code.loop(room, to.zext(to.ctpop(equal), INT), 1, clear_last, [equal])
            bits = to.or_(more, equal)
            for vector, pointer in row(j):
                code.store(code.compress(vector, bits), code.at(pointer, place))
            chosen, of_equal = (to.zext(to.ctpop(x), INT) for x in (bits, equal))
            return [to.add(place, chosen), to.sub(room, of_equal)]

        code.loop(INT(0), self.entries, code.lanes, choose, [INT(0), room])

    def _load(self, j: ir.Value) -> ir.Value:
        return self.code.load(self.code.at(self.row, j), self.code.lanes)

    def _how_many(self, by: str, limit: ir.Value) -> ir.Value:
        """Integers are more (or as much as `by` says) than a limit."""
        code, to = self.code, self.code.to
        none, limits = code.integers(0), code.spread(limit)

        def add(j: ir.Value, found: list[ir.Value]) -> list[ir.Value]:
            return [to.sub(found[0], to.sext(to.icmp_signed(by, self._load(j), limits), none.type))]

        (found,) = code.loop(INT(0), self.entries, code.lanes, add, [none])
        return to.zext(code.fold(found, to.add), INT)

    def _least(self) -> ir.Value:
        """The least integer that is chosen, or one between it and the next: the range of both is halved until then."""
        code, to = self.code, self.code.to

        def join(by: str) -> Callable[[ir.Value, ir.Value], ir.Value]:
            return lambda x, y: to.select(to.icmp_signed(by, x, y), x, y)

        def bound(j: ir.Value, found: list[ir.Value]) -> list[ir.Value]:
            x = self._load(j)
            return [join(by)(x, y) for by, y in zip('<>', found, strict=True)]

        extremes = [code.integers(2**31 - 1), code.integers(-(2**31))]
        found = code.loop(INT(0), self.entries, code.lanes, bound, extremes)
        low, high = (to.sext(code.fold(x, join(by)), INT) for by, x in zip('<>', found, strict=True))

        def halve(found: list[ir.Value]) -> tuple[ir.Value, list[ir.Value]]:
            """`count` or more are `low` or more, fewer are `high` or more."""
            low, high = found
            middle = to.ashr(to.add(low, high), INT(1))
            above = self._how_many('>=', to.trunc(middle, WORD))
            enough = to.icmp_signed('>=', above, self.count)
            low, high = to.select(enough, middle, low), to.select(enough, high, middle)
            apart = to.icmp_signed('>', to.sub(high, low), INT(1))
            return to.and_(apart, to.icmp_signed('!=', above, self.count)), [low, high]

        return to.trunc(code.repeat(halve, [low, to.add(high, INT(1))])[0], WORD)
