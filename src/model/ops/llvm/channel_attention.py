"""The attention between channels of DLGSANet on a CPU without gradients: see `SparseGlobalAttention`.

One kernel makes queries, keys and values of a tile, and sums over its pixels; queries and keys are then forgotten. From
the sums of the tiles of a window PyTorch makes maps. Another kernel weights values.
"""

from collections.abc import Callable, Sequence

import torch
from llvmlite import ir
from torch import Tensor

from model.ops.fast import operation
from model.ops.llvm.code import INT, Code, lanes
from model.ops.llvm.kernel_cache import compiled
from model.ops.llvm.planes import Tiles, Vectors, call, divisor, most_of_tile

SIZE = 3  # side of the depthwise convolution
SIDES = {16: 4, 8: 2}  # lanes: queries, and keys, whose products are summed in registers


@compiled
def sums_kernel(channels: int, heads: int, lanes: int) -> Code:
    """Values of a tile, and sums over its pixels of the products of queries and keys, and of the squares of both."""
    names = 'scale', 'shift', 'project_in', 'depthwise', 'values', 'products', 'squares'
    code = Tiles(names, lanes, SIZE // 2)
    to, per_head = code.to, channels // heads
    used = 'project_in', 'depthwise', 'products', 'squares'
    project_in, depthwise, products, squares = (code.pointer(name) for name in used)
    mask, normed, projected, filtered = 0, 1, 1 + channels, 1 + 2 * channels

    def project(part: int, target: int) -> None:
        weight = code.at(project_in, INT(part * channels**2))
        code.linear(weight, channels, normed, projected, (channels, channels), code.whole)
        code.depthwise(code.at(depthwise, INT(part * channels * SIZE**2)), SIZE, projected, target, channels)

    def summed(first: Vectors, second: Vectors) -> Vectors:
        """Sums of the products of the planes of either, or of their squares if there is no second."""

        def row(i: ir.Value, sums: Vectors) -> Vectors:
            def vector(j: ir.Value, sums: Vectors) -> Vectors:
                place, inside = code.offset((i, code.width), (j,)), code.inside(j)
                left, right = (
                    [to.select(inside, code.load(code.plane(x, place), lanes), code.vector(0)) for x in planes]
                    for planes in (first, second)
                )
                pairs = [(x, y) for x in left for y in right] or [(x, x) for x in left]
                return [code.multiply_add(*pair, total) for pair, total in zip(pairs, sums, strict=True)]

            return code.loop(INT(0), code.columns, lanes, vector, sums)

        zeros = [code.vector(0)] * (len(first) * (len(second) or 1))
        return [code.sum(x) for x in code.loop(INT(0), code.rows, 1, row, zeros)]

    def in_turn(start: ir.Value, count: int) -> Vectors:
        return [to.add(start, INT(i)) for i in range(count)]

    few = divisor(per_head, SIDES[lanes])

    def head(h: ir.Value, _: Vectors) -> Vectors:
        def queries(i: ir.Value, _: Vectors) -> Vectors:
            def keys(j: ir.Value, _: Vectors) -> Vectors:
                own = code.offset((h, INT(per_head)), (INT(filtered),))
                found = summed(in_turn(to.add(own, i), few), in_turn(to.add(to.add(own, INT(channels)), j), few))
                first = code.offset(
                    (code.tile, INT(channels * per_head)), (h, INT(per_head**2)), (i, INT(per_head)), (j,)
                )
                for n, x in enumerate(found):
                    to.store(x, code.at(products, to.add(first, INT(n // few * per_head + n % few))))
                return []

            code.loop(INT(0), INT(per_head), few, keys)
            return []

        code.loop(INT(0), INT(per_head), few, queries)
        return []

    def square(i: ir.Value, _: Vectors) -> Vectors:
        first = code.offset((code.tile, INT(2 * channels)), (i,))
        for n, x in enumerate(summed(in_turn(to.add(i, INT(filtered)), few), [])):
            to.store(x, code.at(squares, to.add(first, INT(n))))
        return []

    def tile() -> None:
        code.read('x', channels, normed, SIZE // 2, mask)
        code.norm('scale', 'shift', channels, normed, mask, code.whole)
        project(2, filtered)
        code.write('values', channels, filtered)
        project(0, filtered)
        project(1, filtered + channels)
        code.loop(INT(0), INT(heads), 1, head)
        code.loop(INT(0), INT(2 * channels), few, square)

    code.tiles(tile)
    return code


@compiled
def mix_kernel(channels: int, lanes: int) -> Code:
    """What a tile's map makes of the values, plus the input."""
    code = Tiles(('values', 'maps', 'out'), lanes, 0)

    def tile() -> None:
        weight = code.at(code.pointer('maps'), code.to.mul(code.tile, INT(channels**2)))
        code.read('values', channels, 0, 0)
        code.linear(weight, channels, 0, channels, (channels, channels), code.whole)
        code.write('out', channels, channels, 'x')

    code.tiles(tile)
    return code


@operation('channel_attention_sums')
def sums_of_tiles(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    epsilon: float,
    project_in: Tensor,
    depthwise: Tensor,
    heads: int,
    rows: Sequence[int],
    columns: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Values (N, C, H, W), products (T, heads, C / heads, C / heads), squares (T, 2, heads, C / heads) of T tiles."""
    channels = x.shape[1]
    values, per_head = torch.empty_like(x, memory_format=torch.channels_last), channels // heads
    n_tiles = len(x) * (len(rows) - 1) * (len(columns) - 1)
    products = x.new_empty(n_tiles, heads, per_head, per_head)
    squares = x.new_empty(n_tiles, 2, heads, per_head)
    tensors = [scale, shift, project_in, depthwise, values, products, squares]
    call(sums_kernel(channels, heads, lanes()), x, SIZE // 2, 1 + 4 * channels, tensors, (rows, columns), epsilon)
    return values, products, squares


@operation('channel_attention_mix')
def mixed_tiles(x: Tensor, values: Tensor, maps: Tensor, rows: Sequence[int], columns: Sequence[int]) -> Tensor:
    """Maps (T, C, C) of the tiles times their values, plus x."""
    channels, out = x.shape[1], torch.empty_like(x, memory_format=torch.channels_last)
    call(mix_kernel(channels, lanes()), x, 0, 2 * channels, [values, maps, out], (rows, columns))
    return out


def channel_attention(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    epsilon: float,
    project_in: Tensor,
    depthwise: Tensor,
    heads: int,
    layout: Callable[..., tuple[list[slice], list[slice], Tensor]],
    from_sums: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """See `SparseGlobalAttention`, also for the last two."""
    rows, columns, inside = layout(x, *most_of_tile(x.shape[1]))
    grid = [[*(part.start for part in parts), parts[-1].stop] for parts in (rows, columns)]
    scale, shift, project_in, depthwise = (weight.contiguous() for weight in (scale, shift, project_in, depthwise))
    values, *sums = sums_of_tiles(x, scale, shift, epsilon, project_in, depthwise, heads, grid[0], grid[1])
    products, squares = (t.unflatten(0, (-1, len(x))) for t in sums)
    maps = from_sums(products, squares, inside)
    return mixed_tiles(x, values, maps.flatten(0, 1).mT.contiguous(), grid[0], grid[1])
