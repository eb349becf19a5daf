"""Layer normalisation, a 1x1 and a depthwise convolution on a CPU without gradients: see `normed_filter`."""

from functools import cache

import torch
from llvmlite import ir
from torch import Tensor

from model.ops.llvm import INT, Kernel, lanes
from model.ops.planes_llvm import Planes, Vectors, call

NAMES = ('x', 'scale', 'shift', 'project_in', 'depthwise', 'out')
SIZE = 3


@cache
def kernel(channels: int, parts: int, lanes: int) -> Kernel:
    code = Planes(NAMES, lanes, SIZE // 2)
    to = code.to
    mask, normed, projected, filtered = 0, 1, 1 + channels, 1 + 2 * channels
    project_in, depthwise = (code.pointer(name) for name in ('project_in', 'depthwise'))

    def tile() -> None:
        code.read('x', channels, normed, SIZE // 2, mask)
        code.norm('scale', 'shift', channels, normed, mask, code.whole)
        for part in range(parts):
            first = part * channels
            rows = code.at(project_in, INT(first * channels))
            code.linear(
                rows, channels, normed, projected, (channels, channels), code.whole, lambda *_: code.vector(0)
            )

            def channel(i: ir.Value, _: Vectors, first: int = first) -> Vectors:
                weight = code.at(depthwise, to.mul(to.add(i, INT(first)), INT(SIZE**2)))

                def pixels(places: list[ir.Value]) -> None:
                    found = code.filtered(weight, to.add(i, INT(projected)), places, SIZE, code.vector(0))
                    for place, x in zip(places, found, strict=True):
                        code.store(x, code.plane(to.add(i, INT(filtered)), place))

                code.lines(code.inner, 2, pixels)
                return []

            code.loop(INT(0), INT(channels), 1, channel)
            code.write('out', channels, filtered, total=parts * channels, first=first)

    code.tiles(tile)
    return Kernel(code)


def normed_filter(
    x: Tensor, scale: Tensor, shift: Tensor, epsilon: float, project_in: Tensor, depthwise: Tensor
) -> Tensor:
    """See there."""
    n, channels, height, width = x.shape
    x = x.contiguous(memory_format=torch.channels_last)
    out = x.new_empty(n, len(project_in), height, width).contiguous(memory_format=torch.channels_last)
    weights = [weight.contiguous() for weight in (scale, shift, project_in, depthwise)]
    run = kernel(channels, len(project_in) // channels, lanes())
    call(run, x, SIZE // 2, 1 + 3 * channels, [x, *weights, out], epsilon)
    return out
