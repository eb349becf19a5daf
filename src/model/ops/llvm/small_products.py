"""Products of many small matrices on a CPU: see `small_products`, whose form in LLVM this is.

A task is a pair of matrices. The second one is put into the cache as rows of whole vectors.
"""

from llvmlite import ir
from torch import Tensor

from model.ops.llvm.code import INT, Code, filled_up, lanes
from model.ops.llvm.kernel_cache import compiled
from model.ops.llvm.product import BLOCKS, product

NAMES = ('x', 'x_step', 'x_row', 'x_column', 'y', 'y_step', 'y_row', 'out', 'count', 'rows', 'between')
Vectors = list[ir.Value]


@compiled
def kernel(columns: int, turned: bool, lanes: int) -> Code:
    """Products with matrices of so many columns, whose numbers in a column follow one another where they are `turned`.

    Rows of others follow one another. Given are numbers of `rows`, and of those `between` the two, columns and rows.
    """
    code = Code(NAMES, lanes)
    to, given = code.to, code.given
    n_rows, n_columns = BLOCKS[lanes]
    (width,) = filled_up([columns], lanes)
    step = width + (width // lanes + 1) % 2 * lanes  # an odd number of vectors, as the first cache keeps few of others
    packed = code.memory

    def pack(matrix: ir.Value) -> None:
        def turn(column: ir.Value, count: int) -> None:
            """Numbers of `count` columns, as many rows at a time as a vector holds; the last ones again."""

            def some(k: ir.Value, _: Vectors) -> Vectors:
                last = to.sub(given['between'], INT(lanes))
                k = to.select(to.icmp_signed('<', k, last), k, last)
                starts = [to.mul(to.add(column, INT(c)), given['y_row']) for c in range(count)]
                found = code.transposed([code.load(code.at(matrix, to.add(start, k)), lanes) for start in starts])
                for i, vector in enumerate(found):
                    place = code.offset((to.add(k, INT(i)), INT(step)), (column,))
                    code.store(vector, code.at(packed, place))
                return []

            code.loop(INT(0), given['between'], lanes, some)

        def row(k: ir.Value, _: Vectors) -> Vectors:
            found = code.load_row(code.at(matrix, to.mul(k, given['y_row'])), columns)
            code.store_row(found, code.at(packed, to.mul(k, INT(step))), width)
            return []

        if turned:
            for column in range(0, columns, lanes):
                turn(INT(column), min(lanes, columns - column))
        else:
            code.loop(INT(0), given['between'], 1, row)

    def task(number: ir.Value) -> None:
        x, y, out = (
            code.at(code.pointer(name), to.mul(number, size))
            for name, size in (
                ('x', given['x_step']),
                ('y', given['y_step']),
                ('out', to.mul(given['rows'], INT(columns))),
            )
        )
        pack(y)

        def multiply(first: ir.Value, column: int) -> None:
            count = min(n_columns, (width - column) // lanes)
            last = to.sub(given['rows'], INT(1))
            numbers = [to.add(first, INT(r)) for r in range(n_rows)]
            numbers = [to.select(to.icmp_signed('<', number, last), number, last) for number in numbers]
            rows = [code.at(x, to.mul(number, given['x_row'])) for number in numbers]
            starts = [code.at(packed, INT(column + v * lanes)) for v in range(count)]
            zeros = [code.vector(0)] * (n_rows * count)
            found = product(code, rows, starts, INT(step), given['between'], zeros, given['x_column'])
            for r, number in enumerate(numbers):
                target = code.at(out, to.add(to.mul(number, INT(columns)), INT(column)))
                code.store_row(found[r * count : (r + 1) * count], target, min(columns - column, count * lanes))

        def some(first: ir.Value, _: Vectors) -> Vectors:
            for column in range(0, width, n_columns * lanes):
                multiply(first, column)
            return []

        code.loop(INT(0), given['rows'], n_rows, some)

    code.tasks(given['count'], task)
    return code


def products(x: Tensor, y: Tensor) -> Tensor:
    """See `small_products.products`."""
    (count, rows, between), columns, vector = x.shape, y.shape[2], lanes()
    turned = y.stride(2) != 1 and y.stride(1) == 1 and between >= vector
    y = y if turned or y.stride(2) == 1 else y.contiguous()
    out = x.new_empty(count, rows, columns)
    given: list[int | Tensor] = [
        x, *x.stride(), y, y.stride(0), y.stride(2 if turned else 1), out,
        count, rows, between,
    ]  # fmt: skip
    (width,) = filled_up([columns], vector)
    kernel(columns, turned, vector)(given, (between + 1) * (width + vector), 0.0)
    return out
