"""The choice of the largest numbers of a row, for kernels on CPUs."""

from collections.abc import Callable, Sequence

from llvmlite import ir

from model.ops.llvm.code import BIT, FLOAT, INT, WORD, Code

BLOCK = 32  # integers that are counted in a step
GUESSES = 8  # by interpolation, before the range is halved


def ordered(code: Code, x: ir.Value) -> ir.Value:
    """Integers in the order of the numbers of a vector; what is no number comes before all."""
    to = code.to
    bits = to.bitcast(to.fadd(x, code.vector(0)), code.integers(0).type)  # of -0 those of 0
    return to.select(to.fcmp_ordered('ord', x, x), turned(code, bits), code.integers(-(2**31)))


def turned(code: Code, bits: ir.Value) -> ir.Value:
    """Bits of numbers as integers in the order of the numbers, and back; of a vector or of one."""
    to, kind = code.to, bits.type
    shift, rest = (code.integers(31), code.integers(2**31 - 1)) if kind != WORD else (WORD(31), WORD(2**31 - 1))
    return to.xor(bits, to.and_(to.ashr(bits, shift), rest))


class Selection:
    """Writes the choice of the `count` largest integers of a row, of equal ones the first.

    Args:
        code: what is being written.
        row: pointer to integers that `ordered` gave.
        entries: how many there are, a multiple of `BLOCK`.
        count: how many are chosen, fewer than that.
        least, greatest: of the integers.
    """

    def __init__(
        self, code: Code, row: ir.Value, entries: ir.Value, count: ir.Value, least: ir.Value, greatest: ir.Value
    ) -> None:
        self.code, self.row, self.entries, self.count = code, row, entries, count
        self.least, self.greatest = least, greatest
        self.bits = ir.IntType(code.lanes)

    def write(
        self, row: Callable[[ir.Value], Sequence[tuple[ir.Value, ir.Value]]], marks: ir.Value | None = None
    ) -> None:
        """Put what belongs to the chosen integers together, in their order, and up to a vector of anything behind it.

        Args:
            row: gives, for a place in the row, vectors of what belongs to the integers there, each with the pointer to
                where the chosen ones go.
            marks: pointer to bytes for a bit of each integer, which says whether it is chosen.
        """
        code, to = self.code, self.code.to
        limit, room = self._limit()
        limits = code.spread(limit)

        def clear_last(_: ir.Value, found: list[ir.Value]) -> list[ir.Value]:
            last = to.lshr(self.bits(1 << (code.lanes - 1)), to.ctlz(found[0], BIT(0)))
            return [to.and_(found[0], to.not_(last))]

        def choose(j: ir.Value, found: list[ir.Value]) -> list[ir.Value]:
            place, room = found
            x = code.load(code.at(self.row, j), code.lanes)
            more, equal = (to.bitcast(to.icmp_signed(by, x, limits), self.bits) for by in ('>', '=='))
            (equal,) = code.loop(room, to.zext(to.ctpop(equal), INT), 1, clear_last, [equal])
            bits = to.or_(more, equal)
            if marks:
                to.store(bits, code.at(to.bitcast(marks, self.bits.as_pointer()), to.sdiv(j, INT(code.lanes))), align=1)
            for vector, pointer in row(j):
                code.store(code.compress(vector, bits), code.at(pointer, place))
            chosen, of_equal = (to.zext(to.ctpop(x), INT) for x in (bits, equal))
            return [to.add(place, chosen), to.sub(room, of_equal)]

        code.loop(INT(0), self.entries, code.lanes, choose, [INT(0), room])

    def _how_many(self, limit: ir.Value) -> ir.Value:
        """Integers that are a limit or more."""
        code, to = self.code, self.code.to
        none, limits = code.integers(0), code.spread(limit)
        steps = range(0, BLOCK, code.lanes)

        def add(j: ir.Value, found: list[ir.Value]) -> list[ir.Value]:
            vectors = [code.load(code.at(self.row, to.add(j, INT(step))), code.lanes) for step in steps]
            return [
                to.sub(total, to.sext(to.icmp_signed('>=', x, limits), none.type))
                for total, x in zip(found, vectors, strict=True)
            ]

        first, *others = code.loop(INT(0), self.entries, BLOCK, add, [none] * len(steps))
        for other in others:
            first = to.add(first, other)
        return to.zext(code.fold(first, to.add), INT)

    def _limit(self) -> tuple[ir.Value, ir.Value]:
        """What all integers above it are chosen with, and how many of those that equal it.

        `low` and `high` enclose it: `count` or more integers are `low` or more, fewer are `high` or more. The next one
        to be tried lies where these numbers, if they fell evenly from one to the other, would pass `count`; an end that
        stays as it is twice in a row is taken for half as far from `count` (the Illinois algorithm).
        """
        code, to = self.code, self.code.to

        def distance(number: ir.Value) -> ir.Value:
            return to.sitofp(to.sub(number, self.count), FLOAT)

        def number_of(integer: ir.Value) -> ir.Value:
            return to.bitcast(turned(code, to.trunc(integer, WORD)), FLOAT)

        def narrow(found: list[ir.Value]) -> tuple[ir.Value, list[ir.Value]]:
            low, high, of_low, of_high, above, turn, side = found
            first, last = number_of(low), number_of(high)
            share = to.fdiv(of_low, to.fsub(of_low, of_high))
            guess = to.fadd(first, to.fmul(to.fsub(last, first), share))
            guess = to.sext(turned(code, to.bitcast(guess, WORD)), INT)
            inside = to.and_(to.icmp_signed('>', guess, low), to.icmp_signed('<', guess, high))
            early = to.icmp_signed('<', turn, INT(GUESSES))
            middle = to.select(to.and_(inside, early), guess, to.ashr(to.add(low, high), INT(1)))
            number = self._how_many(to.trunc(middle, WORD))
            enough, exact = (to.icmp_signed(by, number, self.count) for by in ('>=', '=='))
            this = to.zext(enough, INT)
            half = to.select(to.icmp_signed('==', this, side), FLOAT(0.5), FLOAT(1))
            found = [
                to.select(enough, middle, low),
                to.select(enough, high, middle),
                to.select(enough, distance(number), to.fmul(of_low, half)),
                to.select(enough, to.fmul(of_high, half), distance(number)),
                to.select(enough, above, number),
                to.add(turn, INT(1)),
                this,
            ]
            # All that are `middle` or more, and none of those that equal the one below it.
            found[0] = to.select(exact, to.sub(middle, INT(1)), found[0])
            found[4] = to.select(exact, number, found[4])
            apart = to.icmp_signed('>', to.sub(found[1], found[0]), INT(1))
            return to.and_(apart, to.not_(exact)), found

        low, high = to.sext(self.least, INT), to.add(to.sext(self.greatest, INT), INT(1))
        start = [low, high, distance(self.entries), distance(INT(0)), INT(0), INT(0), INT(2)]
        limit, _, _, _, above, *_ = code.repeat(narrow, start)
        return to.trunc(limit, WORD), to.sub(self.count, above)
