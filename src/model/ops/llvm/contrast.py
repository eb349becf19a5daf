"""Mean plus deviation of each channel on a CPU without gradients: see `blocks.pixels.contrast`."""

from llvmlite import ir
from torch import Tensor

from model.ops.fast import operation
from model.ops.llvm.code import INT, Code, lanes
from model.ops.llvm.kernel_cache import compiled
from model.ops.llvm.planes import pixels_in_order

AT_ONCE = 4  # vectors of channels
PIXELS = 1024  # of a part of an image


@compiled
def kernel(channels: int, lanes: int) -> Code:
    """Sums of squares of what pixels differ from the mean by, (N, parts, channels)."""
    code = Code(('x', 'x_pixel', 'means', 'squares', 'pixels', 'parts', 'count'), lanes)
    to, given = code.to, code.given

    def row(name: str, i: ir.Value, step: ir.Value, start: int) -> ir.Value:
        return code.at(code.pointer(name), code.offset((i, step), (INT(start),)))

    def part(number: ir.Value) -> None:
        image = to.sdiv(number, given['parts'])
        first, stop = code.part_of(given['pixels'], to.srem(number, given['parts']))

        def some(start: int) -> None:
            width = min(AT_ONCE * lanes, channels - start)
            means = code.load_row(row('means', image, INT(channels), start), width)

            def pixel(i: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
                there = code.offset((image, given['pixels']), (i,))
                values = code.load_row(row('x', there, given['x_pixel'], start), width)
                apart = [to.fsub(*pair) for pair in zip(values, means, strict=True)]
                return [code.multiply_add(x, x, total) for x, total in zip(apart, sums, strict=True)]

            sums = code.loop(first, stop, 1, pixel, [code.vector(0)] * len(means))
            code.store_row(sums, row('squares', number, INT(channels), start), width)

        for start in range(0, channels, AT_ONCE * lanes):
            some(start)

    code.tasks(given['count'], part)
    return code


@operation('contrast')
def contrast(x: Tensor) -> Tensor:
    """See `blocks.pixels.contrast`."""
    x, step = pixels_in_order(x)
    n, channels, *sides = x.shape
    pixels = sides[0] * sides[1]
    parts = -(-pixels // PIXELS)
    means, squares = x.mean((2, 3)).contiguous(), x.new_empty(n, parts, channels)
    kernel(channels, lanes())([x, step, means, squares, pixels, parts, n * parts], 0, 0.0)
    return (means + (squares.sum(1) / pixels).sqrt()).view(n, channels, 1, 1)
