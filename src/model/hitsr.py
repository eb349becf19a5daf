"""HiT-SRF (ECCV 2024): windows from 4x4 to 64x64 pixels by turns, in which tokens and channels are correlated.

Zhang, Zhang, Yu, "HiT-SR: Hierarchical Transformer for Efficient Image Super-Resolution",
https://arxiv.org/abs/2407.05878. Official weights load with `strict=True`.

The windows grow from layer to layer of a block. A layer correlates tokens with cells of its window, each a weighted sum
of pixels, of which there are 8x8 whatever the size of the window (spatial self-correlation, S-SC), and channels with
channels (C-SC). There is no softmax, and both cost as much a token in a large window as in a small one. This is the
variant made from SRFormer, of three in the paper.

Without a softmax products can be taken in another order: (q v^T + b) v, the map of queries and cells times the cells,
is q (v^T v) + b v, of which the first part has matrices of the channels of a head alone.

Departures from the official code:
- Features are continued to whole windows by reflection as there, a side of any size by its reflection again and again;
  the official code fails below 17 pixels.
- The position bias is averaged over the cells before it is spread over the window, not after that, for which the
  official code holds a table of 4096 x 4096 x 6 numbers.
- Correlations are in float32 under autocast, since nothing bounds them.
"""

import math
from collections.abc import Mapping
from itertools import cycle, islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from error import UserError
from model.blocks.edsr import DirectUpsampler
from model.blocks.pixels import PointwiseConv, to_map, to_tokens
from model.blocks.swin import Frame
from model.blocks.tokens import ConvFFN, TokenLinear, TokenNorm, flatten_image, unflatten_image
from model.blocks.windows import MOST_WINDOW, hidden_width, init_linear
from model.common import (
    NetworkSpec,
    at_least_float32,
    check_least,
    check_numbers,
    conv,
    full_precision,
    how_many,
    reflect_pad,
    shape_of,
    stacked,
)
from model.ops.fast import float32_by_llvm
from model.ops.small_products import small_products

SLOPE = 0.2  # of the LeakyReLUs
REDUCTION = 5  # of the channels in the convolutions that make queries and values
POSITION_FEATS = 3  # channels of the network of the position bias
FEWEST, MOST, MOST_OF_HEAD = 16, 64, 12  # channels of queries, and of those of a head, that a kernel takes


class DualFeatures(nn.Module):
    """Dual feature extraction: queries and values, what is seen around a pixel times what is in it."""

    def __init__(self, n_feats: int) -> None:
        super().__init__()
        few = n_feats // REDUCTION
        act = nn.LeakyReLU(SLOPE)
        first, last = PointwiseConv(n_feats, few), stacked(2, PointwiseConv(few, n_feats))
        self.conv = nn.Sequential(first, act, conv(few, few, 3), act, last)
        self.linear = stacked(2, PointwiseConv(n_feats, n_feats))

    def forward(self, x: Tensor) -> Tensor:
        first, _, around, _, last = self.conv
        return last(around(first(x, slope=SLOPE), slope=SLOPE)) * self.linear(x)


class PositionBias(nn.Module):
    """What a small network makes of the offset of a query from a key, as means over the keys of a cell.

    Args:
        n_heads: heads.
        window: pixels along the side of a window.
        cell: pixels along the side of a cell.
    """

    def __init__(self, n_heads: int, window: int, cell: int) -> None:
        super().__init__()
        self.window, self.cell = window, cell
        feats = POSITION_FEATS
        self.pos_proj = nn.Linear(2, feats)
        self.pos1, self.pos2, self.pos3 = (
            nn.Sequential(nn.LayerNorm(feats), nn.ReLU(), nn.Linear(feats, out)) for out in (feats, feats, n_heads)
        )
        self.kept: dict[int | None, tuple[Tensor, Tensor]] = {}

    def forward(self, block: int | None = None) -> Tensor:
        """The bias (heads, pixels, cells) of a window, or by blocks of pixels (heads, pixels / block, cells, block).

        It does not depend on an image. Without gradients a CPU makes it once for weights of the same values, which
        keeps 48 MB in the published network. (To compare values on a GPU the host would wait for it, and a CUDA graph
        would hold the bias of old weights.)
        """
        weights = [weight.flatten() for weight in self.parameters()]
        traced = torch.jit.is_tracing() or torch.compiler.is_compiling()
        if torch.is_grad_enabled() or traced or not weights[0].is_cpu:
            return self.make(block)
        values = torch.cat(weights)
        kept = self.kept.get(block)
        if kept is None or kept[0].dtype != values.dtype or not torch.equal(kept[0], values):
            kept = self.kept[block] = values, self.make(block)
        return kept[1]

    def make(self, block: int | None = None) -> Tensor:
        """See `forward`."""
        weight = self.pos_proj.weight
        side = torch.arange(1 - self.window, self.window, dtype=weight.dtype, device=weight.device)
        offsets = torch.stack(torch.meshgrid(side, side, indexing='ij'), -1)
        table = self.pos3(self.pos2(self.pos1(self.pos_proj(offsets)))).permute(2, 0, 1)
        means = F.avg_pool2d(table.unsqueeze(0), self.cell, 1).squeeze(0)  # ONNX pools batches alone
        # Of a cell further right the offsets are smaller by its side.
        of_cells = means.unfold(1, self.window, self.cell).unfold(2, self.window, self.cell).flip(1, 2)
        bias = of_cells.permute(0, 3, 4, 1, 2).flatten(3, 4).flatten(1, 2)
        return bias.unflatten(1, (-1, block)).mT.contiguous() if block else bias


class Correlation(nn.Module):
    """Spatial-channel correlation within windows."""

    def __init__(self, n_feats: int, n_heads: int, window: int, base: int) -> None:
        super().__init__()
        self.n_heads, self.window, self.cell = n_heads, window, max(window // base, 1)
        self.qv = DualFeatures(n_feats)
        self.proj = TokenLinear(n_feats, n_feats)
        self.spatial_linear = nn.Linear(self.cell**2, 1)
        self.pos = PositionBias(n_heads, window, self.cell)

    def forward(self, x: Tensor, **behind: Any) -> Tensor:
        """(N, C, H, W) to tokens (N, H * W, C), with what `fused_linear` takes behind."""
        height, width = x.shape[2:]
        qv = self.qv(reflect_pad(x, self.window))
        with full_precision(x):
            out = self.correlated(at_least_float32(qv), height, width)
        return self.proj(out, **behind)

    def correlated(self, qv: Tensor, height: int, width: int) -> Tensor:
        """Both correlations of what is given to `correlate`, (N, height * width, C): those pixels that are wanted."""

        def correlation(qv: Tensor, *_: object) -> Tensor:
            return flatten_image(self.correlate(qv)[:, :, :height, :width])

        half, cells = self.proj.in_features // 2, self.spatial_linear  # a plain number in a trace too
        per_head, rest = divmod(half, self.n_heads)
        fits = FEWEST <= half <= MOST and per_head <= MOST_OF_HEAD and not rest and self.window % 4 == 0
        if not fits:
            return correlation(qv)
        given = cells.weight, cells.bias, self.pos, self.window, self.cell, height, width
        return float32_by_llvm('correlation', correlation, qv, *given)

    def correlate(self, qv: Tensor) -> Tensor:
        """Queries and values (N, C, H, W), of whole windows, to both correlations of the same shape."""
        half = qv.shape[1] // 2
        cells = to_tokens(self.reduce(qv[:, half:]), (self.window // self.cell,) * 2, strided=False)
        windows = to_tokens(qv, (self.window,) * 2, strided=False)
        q, v = windows.tensor_split(2, -1)
        channel = small_products(v, small_products(v.mT, q) / q.shape[1])
        out = torch.cat((self.spatial(q, cells), channel), -1)
        return to_map(out, qv, (self.window,) * 2, strided=False)

    def reduce(self, v: Tensor) -> Tensor:
        """Values (N, C / 2, H, W) to weighted sums of each cell, (N, C / 2, H / cell, W / cell)."""
        if self.cell == 1:
            return v * self.spatial_linear.weight + self.spatial_linear.bias
        half = self.proj.in_features // 2
        weight = self.spatial_linear.weight.view(1, 1, self.cell, self.cell).expand(half, -1, -1, -1)
        return F.conv2d(v, weight, self.spatial_linear.bias.expand(half), stride=self.cell, groups=half)

    def spatial(self, q: Tensor, cells: Tensor) -> Tensor:
        """What (q v^T / d + bias) v is for each head: queries (B, T, C / 2), cells (B, S, C / 2) to (B, T, C / 2)."""
        n, n_cells, half = cells.shape
        d = half // self.n_heads
        head = torch.arange(half, device=q.device) // d
        same = (head[:, None] == head).to(q.dtype) / d
        by_head = cells.view(n, n_cells, self.n_heads, d).permute(2, 1, 0, 3).reshape(self.n_heads, n_cells, n * d)
        from_bias = small_products(self.pos(), by_head).view(self.n_heads, -1, n, d).permute(2, 1, 0, 3)
        return small_products(q, small_products(cells.mT, cells) * same) + from_bias.reshape(q.shape)


class Layer(nn.Module):
    """Hierarchical transformer layer: correlation and feed-forward network, each with a norm behind, plus the input."""

    def __init__(self, n_feats: int, n_heads: int, window: int, base: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = TokenNorm(n_feats)
        self.correlation = Correlation(n_feats, n_heads, window, base)
        self.norm2 = TokenNorm(n_feats)
        self.mlp = ConvFFN(n_feats, hidden, 5)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """Tokens (N, H * W, C) to the same shape."""
        x = self.correlation(unflatten_image(x, height, width), norm_after=self.norm1, plus=x)
        return self.mlp(x, height, width, norm_after=self.norm2, plus=x)


class ResidualGroup(nn.Module):
    """The layers of a hierarchical transformer block."""

    def __init__(self, layers: list[Layer]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(layers)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        for layer in self.blocks:
            x = layer(x, height, width)
        return x


class HiTSRF(Frame):
    """HiT-SRF, without settings the one of the paper.

    Args:
        scale: 2, 3 or 4.
        n_feats: feature channels.
        n_resgroups: blocks.
        n_resblocks: layers a block.
        n_heads: heads of the spatial correlation.
        n_cells: cells along the side of a window, or its pixels where it has fewer.
        window_sizes: pixels along the sides of windows with a dash between two; each layer of a block takes the next
            one, and after the last the first again.
        mlp_ratio: channels inside the feed-forward networks, as a multiple of n_feats.

    Maps (N, 3, H, W) to (N, 3, scale * H, scale * W), each image on its own; black is 0, white is 1.

    Raises:
        UserError: heads do not divide half of the channels, windows that are no multiple of the cells or too large.
    """

    def __init__(
        self,
        scale: int,
        n_feats: int = 60,
        n_resgroups: int = 4,
        n_resblocks: int = 6,
        n_heads: int = 6,
        n_cells: int = 8,
        window_sizes: str = '4-8-16-32-48-64',
        mlp_ratio: float = 2.0,
    ) -> None:
        check_least('n_cells', n_cells, 1)
        if n_feats < REDUCTION:
            raise UserError(f'--n_feats {n_feats}: a fifth of them makes the queries, so choose 5 or more.')
        if n_feats % (2 * n_heads):
            raise UserError(f'--n_heads {n_heads}: twice that does not divide --n_feats {n_feats}; choose another.')
        windows = check_windows(window_sizes, n_cells)
        hidden = hidden_width(n_feats, mlp_ratio)
        sides = list(islice(cycle(windows), n_resblocks))
        groups = (
            ResidualGroup([Layer(n_feats, n_heads, window, n_cells, hidden) for window in sides])
            for _ in range(n_resgroups)
        )
        super().__init__(scale, n_feats, 1, groups)
        self.upsample = DirectUpsampler(scale, n_feats)
        self.apply(init_linear)


def check_windows(text: str, cells: int) -> tuple[int, ...]:
    """Sides of windows as typed, each of at most `cells` pixels or a multiple of that."""
    windows = check_numbers('window_sizes', text)
    for window in windows:
        if window > cells and window % cells:
            raise UserError(f'--net window_sizes={text}: {window} is no multiple of n_cells {cells}; choose one.')
        if window * min(window, cells) > MOST_WINDOW**2:  # square root of the entries of its bias
            raise UserError(
                f'--net window_sizes={text}: {window} with n_cells {cells} would fill the memory; choose less.'
            )
    return windows


def recognise(state: Mapping[str, Tensor]) -> dict[str, object] | None:
    """Scale and settings that the state dict of a HiT-SRF shows; None for another network.

    Of windows it shows how many pixels a cell has. Only where these are not the paper's `window_sizes` are given, as if
    cells were those of the paper, 8 in a window.
    """
    group = 'layers.0.residual_group.blocks.'
    keys = (
        'conv_first.weight',
        'upsample.0.weight',
        f'{group}0.correlation.pos.pos3.2.weight',
        f'{group}0.mlp.fc1.weight',
    )
    first, upsampler, heads, hidden = (shape_of(state, key) for key in keys)
    n_blocks = how_many(state, group)
    cells = [shape_of(state, f'{group}{i}.correlation.spatial_linear.weight') for i in range(n_blocks)]
    if not (first and upsampler and heads and hidden and all(cells)):
        return None
    sides = [math.isqrt(shape[1]) for shape in cells]
    found: dict[str, object] = {
        'scale': math.isqrt(upsampler[0] // 3),
        'n_feats': first[0],
        'n_resgroups': how_many(state, 'layers.'),
        'n_resblocks': n_blocks,
        'n_heads': heads[0],
        'mlp_ratio': hidden[0] / first[0],
    }
    return found if sides == [1, 1, 2, 4, 6, 8] else found | {'window_sizes': '-'.join(str(8 * side) for side in sides)}


NETWORKS = {  # parameters and multiply-adds at a 1280x720 output, x2 / x3 / x4: 847K 219G / 855K 98.5G / 866K 56.2G
    'HiT-SRF': NetworkSpec(  # float16 overflows with the weights of the recorded outputs
        HiTSRF,
        (2, 3, 4),
        tiling_exact=False,
        upsampler_prefix='upsample.',
        checkpoint_blocks=(Layer,),
        recognise=recognise,
    )
}
