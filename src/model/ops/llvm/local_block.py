"""The local block of OmniSR and ASID on a CPU without gradients: see `LocalBlock`, whose form in LLVM this is.

One kernel goes as far as the second GELU, a tile at a time, and sums up its result for the gate. The gate is then
multiplied into the last layer, which is another kernel.
"""

from functools import partial

import torch
import torch.nn.functional as F
from llvmlite import ir
from torch import Tensor

from model.ops.fast import operation
from model.ops.llvm.code import INT, Code, lanes
from model.ops.llvm.fused_linear import forward, gelu
from model.ops.llvm.kernel_cache import compiled
from model.ops.llvm.planes import Tiles, Vectors, call, cuts, most_of_tile

SIZE = 3  # side of the depthwise convolution


@compiled
def kernel(channels: int, lanes: int) -> Code:
    """What the gate meets of a tile, and the sum of each channel over its pixels."""
    names = 'project_in', 'bias', 'depthwise', 'depthwise_bias', 'out', 'sums'
    code = Tiles(names, lanes, SIZE // 2)
    to, pointers = code.to, {name: code.pointer(name) for name in names}
    mask, given, projected = 0, 1, 1 + channels

    def bias(name: str, i: ir.Value, _: ir.Value) -> ir.Value:
        return code.number(pointers[name], i)

    def add_up(i: ir.Value, _: Vectors) -> Vectors:
        def row(y: ir.Value, total: Vectors) -> Vectors:
            def vector(x: ir.Value, total: Vectors) -> Vectors:
                found = code.value(given, i, code.offset((y, code.width), (x,)))
                return [to.fadd(to.select(code.inside(x), found, code.vector(0)), *total)]

            return code.loop(INT(0), code.columns, lanes, vector, total)

        (total,) = code.loop(INT(0), code.rows, 1, row, [code.vector(0)])
        to.store(code.sum(total), code.at(pointers['sums'], code.offset((code.tile, INT(channels)), (i,))))
        return []

    def tile() -> None:
        code.read('x', channels, given, SIZE // 2, mask)
        code.linear(
            pointers['project_in'],
            channels,
            given,
            projected,
            (channels, channels),
            code.whole,
            partial(bias, 'bias'),
            lambda i, place, x: to.fmul(gelu(code, x), code.load(code.plane(mask, place), lanes)),
        )
        start, active = partial(bias, 'depthwise_bias'), lambda i, place, x: gelu(code, x)
        code.depthwise(pointers['depthwise'], SIZE, projected, given, channels, start, active)
        code.loop(INT(0), INT(channels), 1, add_up)
        code.write('out', channels, given)

    code.tiles(tile)
    return code


@operation('local_block')
def local_block(
    x: Tensor,
    project_in: Tensor,
    bias: Tensor,
    depthwise: Tensor,
    depthwise_bias: Tensor,
    squeeze: Tensor,
    excite: Tensor,
    project_out: Tensor,
    bias_out: Tensor,
) -> Tensor:
    """See `LocalBlock`."""
    n, channels, *sides = x.shape
    rows, columns = (cuts(side, most) for side, most in zip(sides, most_of_tile(channels), strict=True))
    inner = torch.empty_like(x, memory_format=torch.channels_last)
    sums = x.new_empty((len(rows) - 1) * (len(columns) - 1), n, channels)
    weights = [weight.contiguous() for weight in (project_in, bias, depthwise, depthwise_bias)]
    call(kernel(channels, lanes()), x, SIZE // 2, 1 + 2 * channels, [*weights, inner, sums], (rows, columns))
    means = sums.sum(0) / (sides[0] * sides[1])
    gates = F.linear(F.silu(F.linear(means, squeeze)), excite).sigmoid()
    layers = project_out.flatten(1) * gates.unsqueeze(1)

    inner, plus = (t.permute(0, 2, 3, 1).split(1) for t in (inner, x))  # each image has a layer of its own
    found = [
        forward(y, [layer], [bias_out], [], [], 0.0, None, False, None, 1.0, before, ())
        for y, layer, before in zip(inner, layers, plus, strict=True)
    ]
    return (found[0] if n == 1 else torch.cat(found)).permute(0, 3, 1, 2)
