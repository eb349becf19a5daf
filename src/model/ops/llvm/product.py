"""The matrix product of kernels for CPUs: a few rows of one matrix times a few vectors of another, in registers.

And what is written with it: linear layers of blocks of rows.
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from llvmlite import ir
from torch import Tensor

from model.ops.llvm.code import INT, Code

BLOCKS = {16: (12, 2), 8: (6, 2)}  # lanes: rows and vectors whose sums stay in the registers of AVX-512 and AVX2


class Rows(Code):
    """Code for rows of pixels, a block of them at a time; `count` is how many there are."""

    def __init__(self, names: Sequence[str], lanes: int) -> None:
        super().__init__(names, lanes)
        self.count = BLOCKS[lanes][0]

    def blocks(self, body: Callable[[], None]) -> None:
        """Write the rest: `body` for every block."""

        def block(task: ir.Value) -> None:
            self.first = self.to.mul(task, INT(self.count))
            body()

        tasks = self.to.sdiv(self.to.add(self.given['count'], INT(self.count - 1)), INT(self.count))
        self.tasks(tasks, block)

    def each(self, body: Callable[[ir.Value], None]) -> None:
        """`body` for every row of a block."""

        def row(i: ir.Value, _: Sequence[ir.Value]) -> list[ir.Value]:
            body(i)
            return []

        self.loop(INT(0), INT(self.count), 1, row)

    def row(self, pointer: ir.Value, step: int | ir.Value, i: ir.Value) -> ir.Value:
        """Row i of those that are `step` numbers apart."""
        return self.at(pointer, self.to.mul(i, INT(step) if isinstance(step, int) else step))

    def row_of(self, name: str, step: int | ir.Value, i: ir.Value) -> ir.Value:
        """Row i of the block in a tensor."""
        return self.row(self.pointer(name), step, self.number(i))

    def number(self, i: ir.Value) -> ir.Value:
        """Of row i of the block among all; behind the last one of all it is that one again."""
        here, last = self.to.add(self.first, i), self.to.sub(self.given['count'], INT(1))
        return self.to.select(self.to.icmp_signed('<', here, last), here, last)


def product(
    code: Code,
    rows: Sequence[ir.Value],
    columns: Sequence[ir.Value],
    step: ir.Value,
    count: ir.Value,
    sums: Sequence[ir.Value],
    row_step: ir.Value | None = None,
) -> list[ir.Value]:
    """Write the product of a few rows and a few vectors of columns: `sums` and, over all k, rows[k] * columns[k].

    Args:
        code: what is being written.
        rows: R pointers, each to `count` numbers that are `row_step` apart, or follow one another.
        columns: V pointers, each to `count` vectors that are `step` numbers apart.
        step, row_step: integers.
        count: an integer, 0 or more.
        sums: R * V vectors, those of the first row first. `BLOCKS` has numbers of both that are fast.

    Returns:
        R * V vectors in the same order.
    """

    def add(k: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
        place, of_row = code.to.mul(k, step), code.to.mul(k, row_step or INT(1))
        vectors = [code.load(code.at(column, place), code.lanes) for column in columns]
        numbers = [code.spread(code.to.load(code.at(row, of_row))) for row in rows]
        pairs = ((number, vector) for number in numbers for vector in vectors)
        return [code.multiply_add(*pair, total) for pair, total in zip(pairs, sums, strict=True)]

    return code.loop(INT(0), count, 1, add, sums)


def packed(weight: Tensor, bias: Tensor | None, lanes: int) -> Tensor:
    """A linear layer (O, K) as columns for `product`: (vectors, 1 + K, lanes), the bias first, filled up by zeros."""
    outs, ins = weight.shape
    rows = np.zeros((-(-outs // lanes) * lanes, 1 + ins), np.float32)  # NumPy takes half of the time here
    rows[:outs, 1:] = weight.detach().numpy()
    if bias is not None:
        rows[:outs, 0] = bias.detach().numpy()
    return torch.from_numpy(np.ascontiguousarray(rows.reshape(-1, lanes, 1 + ins).swapaxes(1, 2)))


def layer(
    code: Code,
    rows: Sequence[ir.Value],
    inputs: int,
    parameters: ir.Value,
    outputs: int,
    write: Callable[[ir.Value, int, list[ir.Value]], None],
    start: Callable[[ir.Value, int], list[ir.Value]] | None = None,
) -> None:
    """Write a linear layer of a few rows, some vectors of its outputs at a time.

    Args:
        code: what is being written.
        rows: pointers, to `inputs` numbers each.
        parameters: pointer to what `packed` gave.
        outputs: how many numbers each row gets.
        write: is given the number of the first vector, how many numbers of each row these vectors hold, and the
            vectors, those of the first row first.
        start: gives, for the first two of these, vectors that take the place of the bias.
    """
    at_once, step = BLOCKS[code.lanes][1], (1 + inputs) * code.lanes

    def some(numbers: int, j: ir.Value, _: Sequence[ir.Value]) -> list[ir.Value]:
        places = [code.to.add(j, INT(n)) for n in range(-(-numbers // code.lanes))]
        biases = [code.at(parameters, code.to.mul(place, INT(step))) for place in places]
        columns = [code.at(bias, INT(code.lanes)) for bias in biases]
        sums = start(j, numbers) if start else [code.load(bias, code.lanes) for bias in biases] * len(rows)
        write(j, numbers, product(code, rows, columns, INT(code.lanes), INT(inputs), sums))
        return []

    whole = outputs // (at_once * code.lanes) * at_once
    rest = outputs - whole * code.lanes
    code.loop(INT(0), INT(whole), at_once, partial(some, at_once * code.lanes))
    if rest:
        some(rest, INT(whole), [])
