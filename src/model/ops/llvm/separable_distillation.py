"""What BSRN's blocks keep at each of their steps, on a CPU without gradients: see `ESDB.distilled`.

A step is one kernel: the layer of what is kept, and the blueprint convolution with what stands behind it.
"""

from collections.abc import Sequence
from functools import partial

import torch
from llvmlite import ir
from torch import Tensor

from model.ops.fast import operation
from model.ops.llvm.code import INT, Code, lanes
from model.ops.llvm.fused_linear import gelu
from model.ops.llvm.kernel_cache import compiled
from model.ops.llvm.planes import Tiles, call, cuts, most_of_tile

SIZE = 3  # side of the depthwise convolution
OF_STEP = 5  # weights: of what is kept, and its bias; pointwise and depthwise of the convolution, and its bias


@compiled
def kernel(channels: int, kept: int, width: int, last: bool, lanes: int) -> Code:
    """A step from maps `x` to those of `width` `parts` from `first` on and, but for the last one, maps `refined`."""
    names = 'keep', 'keep_bias', 'pointwise', 'depthwise', 'depthwise_bias', 'refined', 'parts', 'first'
    code = Tiles(names, lanes, SIZE // 2)
    to, outs = code.to, kept if last else channels
    given, found, projected = (1 + i * channels for i in range(3))  # behind a plane that is written over

    def bias(name: str, i: ir.Value, _: ir.Value) -> ir.Value:
        return code.number(code.pointer(name), i)

    def keep() -> None:
        code.write('parts', kept, found, of=(width, code.given['first']))

    def tile() -> None:
        here = to.add(code.width, INT(1))  # how much later a pixel is in planes with a border

        def active(i: ir.Value, place: ir.Value, x: ir.Value) -> ir.Value:
            return gelu(code, x)

        def refine(i: ir.Value, place: ir.Value, x: ir.Value) -> ir.Value:
            return gelu(code, to.fadd(x, code.value(given, i, to.add(place, here))))

        code.read('x', channels, given, SIZE // 2)
        if not last:
            start, sizes = partial(bias, 'keep_bias'), (channels, kept)
            code.linear(code.pointer('keep'), channels, given, found, sizes, code.inner, start, active, here)
            keep()
        code.linear(code.pointer('pointwise'), channels, given, projected, (channels, outs), code.whole)
        start, finish = partial(bias, 'depthwise_bias'), active if last else refine
        code.depthwise(code.pointer('depthwise'), SIZE, projected, found, outs, start, finish)
        if last:
            keep()
        else:
            code.write('refined', channels, found)

    code.tiles(tile)
    return code


@operation('separable_distillation')
def distil(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Given the weights of all steps, of which the last one has none for what it keeps."""
    n, channels, height, width = x.shape
    steps, kept = len(weights) // OF_STEP, len(weights[-1])
    parts = torch.empty(n, (1 + steps) * kept, height, width, memory_format=torch.channels_last, dtype=x.dtype)
    rest, none = x, x.new_empty(0)
    rows, columns = most_of_tile(2 * channels)
    grid = cuts(height, rows), cuts(width, columns)
    for i in range(steps + 1):
        last = i == steps
        own = [weight.contiguous() for weight in weights[OF_STEP * i : OF_STEP * (i + 1)]]
        refined = none if last else torch.empty_like(rest, memory_format=torch.channels_last)
        run = kernel(channels, kept, parts.shape[1], last, lanes())
        given: list[Tensor | int] = [*[none] * (OF_STEP - len(own)), *own, refined, parts, i * kept]
        call(run, rest, SIZE // 2, 1 + 3 * channels, given, grid)
        rest = refined
    return parts


def separable_distillation(x: Tensor, *weights: Tensor) -> Tensor:
    """See `ESDB.distilled`."""
    return distil(x, weights)
