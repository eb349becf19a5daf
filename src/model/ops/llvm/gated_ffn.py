"""The gated feed-forward network on a CPU without gradients: see `GatedFFN`, whose form in LLVM this is."""

from functools import partial

import torch
from llvmlite import ir
from torch import Tensor

from model.ops.fast import operation
from model.ops.llvm.code import INT, Code, lanes
from model.ops.llvm.fused_linear import gelu
from model.ops.llvm.kernel_cache import compiled
from model.ops.llvm.planes import Finish, Tiles, Vectors, call, divisor
from model.ops.llvm.product import BLOCKS

SIZE = 3  # side of the depthwise convolution


@compiled
def kernel(channels: int, hidden: int, lanes: int) -> Code:
    """See `gated_ffn`: a few hidden channels at a time, from the first projection to sums of the last one."""
    code = Tiles(('scale', 'shift', 'project_in', 'depthwise', 'project_out', 'out'), lanes, SIZE // 2)
    to, few = code.to, divisor(hidden, BLOCKS[lanes][0])
    project_in, depthwise, project_out = (code.pointer(name) for name in ('project_in', 'depthwise', 'project_out'))
    mask, normed, projected = 0, 1, 1 + channels
    values, gated, sums = (projected + i * few for i in (1, 2, 3))

    def clear(i: ir.Value, _: Vectors) -> Vectors:
        code.lines(
            code.inner, 1, lambda places: code.store(code.vector(0), code.plane(to.add(i, INT(sums)), places[0]))
        )
        return []

    def part(first: ir.Value, _: Vectors) -> Vectors:
        def half(number: int, target: int, finish: Finish) -> None:
            row = to.add(first, INT(number * hidden))
            weight = code.at(project_in, to.mul(row, INT(channels)))
            code.linear(weight, channels, normed, projected, (channels, few), code.whole)
            weight = code.at(depthwise, to.mul(row, INT(SIZE**2)))
            code.depthwise(weight, SIZE, projected, target, few, finish=finish)

        half(1, values, lambda i, place, x: x)
        half(0, gated, lambda i, place, x: to.fmul(gelu(code, x), code.value(values, i, place)))
        before = partial(code.value, sums)
        code.linear(code.at(project_out, first), hidden, gated, sums, (few, channels), code.inner, before)
        return []

    def tile() -> None:
        code.read('x', channels, normed, SIZE // 2, mask)
        code.norm('scale', 'shift', channels, normed, mask, code.whole)
        code.loop(INT(0), INT(channels), 1, clear)
        code.loop(INT(0), INT(hidden), few, part)
        code.write('out', channels, sums, 'x')

    code.tiles(tile)
    return code


@operation('gated_ffn')
def gated_ffn(
    x: Tensor, scale: Tensor, shift: Tensor, epsilon: float, project_in: Tensor, depthwise: Tensor, project_out: Tensor
) -> Tensor:
    """See `GatedFFN`."""
    channels, hidden = project_out.shape[:2]
    out = torch.empty_like(x, memory_format=torch.channels_last)
    planes = 1 + 2 * channels + 3 * divisor(hidden, BLOCKS[lanes()][0])
    weights = [weight.contiguous() for weight in (scale, shift, project_in, depthwise, project_out)]
    call(kernel(channels, hidden, lanes()), x, SIZE // 2, planes, [*weights, out], factor=epsilon)
    return out
