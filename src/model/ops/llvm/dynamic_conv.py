"""The dynamic convolution on a CPU without gradients, and what is around it: see `DynamicLocalAttention`.

A vector holds one channel of as many pixels as it has lanes. A kernel value of all of them is made in a register from
the hidden features, which are in others, meets the channels of its group, and is forgotten.
"""

import torch
from llvmlite import ir
from torch import Tensor

from model.ops.fast import operation
from model.ops.llvm.code import INT, Code, lanes
from model.ops.llvm.kernel_cache import compiled
from model.ops.llvm.planes import Tiles, Vectors, call

WEIGHTS = (
    'scale', 'shift', 'project_in', 'project_out', 'squeeze', 'squeeze_bias', 'depthwise', 'depthwise_bias',
    'kernels', 'kernels_bias',
)  # fmt: skip


@compiled
def kernel(channels: int, hidden: int, groups: int, size: int, lanes: int) -> Code:
    border = size // 2
    code = Tiles(('out', *WEIGHTS), lanes, border)
    to, pointers = code.to, {name: code.pointer(name) for name in WEIGHTS}
    mask, first, second, squeezed, features = 0, 1, 1 + channels, 1 + 2 * channels, 1 + 2 * channels + hidden

    def bias_inside(i: ir.Value, place: ir.Value) -> ir.Value:
        return to.fmul(code.number(pointers['squeeze_bias'], i), code.load(code.plane(mask, place), lanes))

    def bias(i: ir.Value, place: ir.Value) -> ir.Value:
        return code.number(pointers['depthwise_bias'], i)

    def group(g: ir.Value, _: Vectors) -> Vectors:
        per_group = channels // groups
        planes = [to.add(to.mul(g, INT(per_group)), INT(c)) for c in range(per_group)]

        def pixels(places: Vectors) -> None:
            (place,) = places
            values = [code.load(code.plane(features + i, place), lanes) for i in range(hidden)]

            def row(i: ir.Value, sums: Vectors) -> Vectors:
                near = [code.around(to.add(plane, INT(second)), place, i, size) for plane in planes]
                for j in range(size):
                    tap = code.offset((g, INT(size**2)), (i, INT(size)), (INT(j),))
                    factors = code.at(pointers['kernels'], to.mul(tap, INT(hidden)))
                    value = code.number(pointers['kernels_bias'], tap)
                    for n, x in enumerate(values):
                        value = code.multiply_add(code.number(factors, n), x, value)
                    sums = [code.multiply_add(value, x[j], total) for x, total in zip(near, sums, strict=True)]
                return sums

            found = code.loop(INT(0), INT(size), 1, row, [code.vector(0)] * per_group)
            for plane, x in zip(planes, found, strict=True):
                code.store(x, code.plane(to.add(plane, INT(first)), place))

        code.lines(code.inner, 1, pixels)
        return []

    def tile() -> None:
        code.read('x', channels, first, border, mask)
        code.norm('scale', 'shift', channels, first, mask, code.whole)
        code.linear(pointers['project_in'], channels, first, second, (channels, channels), code.whole)
        code.linear(pointers['squeeze'], channels, second, squeezed, (channels, hidden), code.whole, bias_inside)
        code.depthwise(pointers['depthwise'], size, squeezed, features, hidden, bias)
        code.loop(INT(0), INT(groups), 1, group)
        code.linear(pointers['project_out'], channels, first, second, (channels, channels), code.inner)
        code.write('out', channels, second, 'x')

    code.tiles(tile)
    return code


@operation('local_attention')
def local_attention(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    epsilon: float,
    project_in: Tensor,
    project_out: Tensor,
    squeeze: Tensor,
    squeeze_bias: Tensor,
    depthwise: Tensor,
    depthwise_bias: Tensor,
    kernels: Tensor,
    kernels_bias: Tensor,
) -> Tensor:
    """See `DynamicLocalAttention`."""
    channels, hidden, size = x.shape[1], len(depthwise), depthwise.shape[-1]
    out = torch.empty_like(x, memory_format=torch.channels_last)
    given = (
        scale, shift, project_in, project_out, squeeze, squeeze_bias, depthwise, depthwise_bias, kernels, kernels_bias,
    )  # fmt: skip
    run = kernel(channels, hidden, len(kernels) // size**2, size, lanes())
    weights = [weight.contiguous() for weight in given]
    call(run, x, size // 2, 1 + 2 * (channels + hidden), [out, *weights], factor=epsilon)
    return out
