"""The dynamic convolution on a CPU without gradients: see `dynamic_conv_in_strips`, whose form in LLVM this is.

A vector holds one channel of as many pixels as it has lanes. A kernel value of all of them is made in a register from
the hidden features, which are in others, meets the channels of its group, and is forgotten.
"""

from functools import cache

import torch
from llvmlite import ir
from torch import Tensor

from model.ops.llvm import INT, Kernel, lanes
from model.ops.planes_llvm import Planes, Vectors, call


@cache
def kernel(channels: int, hidden: int, groups: int, size: int, lanes: int) -> Kernel:
    code = Planes(('x', 'hidden', 'weight', 'bias', 'out'), lanes, size // 2)
    weight, bias = code.pointer('weight'), code.pointer('bias')
    xs, features, results = 0, channels, channels + hidden
    per_group = channels // groups

    def group(g: ir.Value, _: Vectors) -> Vectors:
        def pixels(places: list[ir.Value]) -> None:
            (place,) = places
            values = [code.load(code.plane(features + i, place), lanes) for i in range(hidden)]
            own = code.to.mul(g, INT(per_group))

            def row(i: ir.Value, sums: Vectors) -> Vectors:
                near = [code.around(code.to.add(own, INT(xs + c)), place, i, size) for c in range(per_group)]
                first = code.offset((g, INT(size**2)), (i, INT(size)))
                for j in range(size):
                    tap = code.to.add(first, INT(j))
                    factors = code.at(weight, code.to.mul(tap, INT(hidden)))
                    total = code.number(bias, tap)
                    for n, value in enumerate(values):
                        total = code.multiply_add(code.number(factors, n), value, total)
                    sums = [code.multiply_add(total, x[j], y) for x, y in zip(near, sums, strict=True)]
                return sums

            found = code.loop(INT(0), INT(size), 1, row, [code.vector(0)] * per_group)
            for c, x in enumerate(found):
                code.store(x, code.plane(code.to.add(own, INT(results + c)), place))

        code.lines(code.inner, 1, pixels)
        return []

    def tile() -> None:
        code.read('x', channels, xs, size // 2)
        code.read('hidden', hidden, features, 0)
        code.loop(INT(0), INT(groups), 1, group)
        code.write('out', channels, results)

    code.tiles(tile)
    return Kernel(code)


def dynamic_conv_in_strips(x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, size: int) -> Tensor:
    """See there."""
    groups = len(weight) // size**2
    x, hidden = (t.contiguous(memory_format=torch.channels_last) for t in (x, hidden))
    out = torch.empty_like(x)
    channels, features = x.shape[1], hidden.shape[1]
    run = kernel(channels, features, groups, size, lanes())
    call(run, x, size // 2, 2 * channels + features, [x, hidden, weight.contiguous(), bias.contiguous(), out])
    return out
