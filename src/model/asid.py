"""ASID (AAAI 2025): attention maps that the first group computes and all groups share.

Park, Soh, Cho, "Efficient Attention-Sharing Information Distillation Transformer for Lightweight Single Image
Super-Resolution", https://arxiv.org/abs/2501.15774. Official weights load with `strict=True`.

A block attends to fewer and fewer channels: at each of three stages a quarter of them is finished and set aside
(information distillation), and of the rest another quarter goes through a convolutional local block only. Attention
between pixels is local, within 8x8 windows, and then global, among 64 pixels spread over the image. The first group
computes these six maps; each later group multiplies them with values of its own (attention sharing). Attention between
channels ends a block and is never shared.

Departures from the official code:
- An image is padded to 16 pixels a side at least, with zeros as in all its padding; the official spatial gate fails
  below 9 pixels a side, where padding to multiples of 8 gives no more than 8.
- `window_size` is in force in all attentions; the official attention between pixels has 8 hard-coded.
- The options that the official code reads and ignores are left out.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from error import UserError
from model.blocks.edsr import DirectUpsampler
from model.blocks.pixels import (
    ESA,
    ChannelAttention,
    GatedFFN,
    LayerNorm2d,
    LocalBlock,
    PointwiseConv,
    attention_cell,
    to_map,
    to_tokens,
)
from model.blocks.windows import check_window, look_up_bias, relative_positions
from model.common import NetworkSpec, check_images, conv, how_many, in_channels_last, stacked, zero_pad
from model.ops.fast import float32_by_llvm
from model.ops.fused_linear import Norm, fused_linear
from model.ops.layer_norm import layer_norm
from model.ops.small_products import small_products


class StageMaps(NamedTuple):
    """Softmaxed maps of one stage, (N * windows, queries, keys); None before there are any."""

    local: Tensor | None
    across: Tensor | None


class Cells(NamedTuple):
    """How pixels are grouped: see `to_tokens`."""

    cell: tuple[int, int]
    strided: bool


def mix(x: Tensor, norm: Norm, attention_map: Tensor, to_v: Tensor, to_out: Tensor, cells: Cells) -> Tensor:
    """Maps plus their values, weighted by the map (B, T, T) and projected: both matrices (C, C) in one."""

    def window_attention_mix(x: Tensor, *_: object) -> Tensor:
        tokens = to_tokens(x, *cells)
        values = fused_linear(tokens, [(weight, None)], norm=norm)
        return to_map(tokens + small_products(attention_map, values), x, *cells)

    weight = to_out @ to_v
    around = norm.weight, norm.bias, norm.eps
    return float32_by_llvm('window_attention', window_attention_mix, x, *around, weight, attention_map, *cells)


class WindowAttention(nn.Module):
    """Single-head attention between the pixels of a window; gives its attention map too, for later blocks to share."""

    def __init__(self, n_feats: int, window_size: int) -> None:
        super().__init__()
        self.window_size = window_size
        self.to_qkv = stacked(3, nn.Linear(n_feats, 3 * n_feats, bias=False))
        self.to_out = nn.Sequential(nn.Linear(n_feats, n_feats, bias=False))
        self.rel_pos_bias = nn.Embedding((2 * window_size - 1) ** 2, 1)

    def forward(self, x: Tensor, norm: Norm, _: None, cells: Cells) -> tuple[Tensor, Tensor]:
        """Maps (N, C, H, W) plus the attention to what `norm` makes of them, and its map (B, T, T)."""

        def window_attention_map(x: Tensor, *_: object) -> Tensor:
            normed = layer_norm(to_tokens(x, *cells), norm.weight, norm.bias, norm.eps)
            products = F.linear(normed, weight)
            logits = torch.baddbmm(bias, products, normed.transpose(1, 2), alpha=len(keys) ** -0.5)
            return logits.softmax(-1)

        queries, keys, values = self.to_qkv.weight.chunk(3)
        bias = look_up_bias(self.rel_pos_bias.weight, relative_positions(self.window_size, x.device))
        weight = keys.t() @ queries  # q and k meet in their product alone: one matrix for both
        around = norm.weight, norm.bias, norm.eps
        attention_map = float32_by_llvm('window_attention', window_attention_map, x, *around, weight, bias, *cells)
        return mix(x, norm, attention_map, values, self.to_out.get_parameter('0.weight'), cells), attention_map


class SharedAttention(nn.Module):
    """Attention with the map of an earlier block: values and a projection, no queries and keys."""

    def __init__(self, n_feats: int) -> None:
        super().__init__()
        self.to_v = nn.Linear(n_feats, n_feats, bias=False)
        self.to_out = nn.Sequential(nn.Linear(n_feats, n_feats, bias=False))

    def forward(self, x: Tensor, norm: Norm, attention_map: Tensor, cells: Cells) -> tuple[Tensor, Tensor]:
        to_out = self.to_out.get_parameter('0.weight')
        return mix(x, norm, attention_map, self.to_v.weight, to_out, cells), attention_map


class SpatialAttention(nn.Module):
    """Attention between pixels, local (SLA) or global (`strided`, SGA), and a gated FFN, each plus its input."""

    def __init__(self, n_feats: int, window_size: int, strided: bool, first: bool) -> None:
        super().__init__()
        self.window_size, self.strided = window_size, strided
        self.norm = LayerNorm2d(n_feats, 1e-5)
        self.attn = WindowAttention(n_feats, window_size) if first else SharedAttention(n_feats)
        self.cnorm = LayerNorm2d(n_feats, 1e-6)
        self.gfn = GatedFFN(n_feats, n_feats)

    def forward(self, x: Tensor, attention_map: Tensor | None) -> tuple[Tensor, Tensor]:
        cells = Cells(attention_cell(x, self.window_size, self.strided), self.strided)
        x, attention_map = self.attn(x, self.norm, attention_map, cells)
        return self.gfn(x, self.cnorm), attention_map


class LB(nn.Module):
    """Local block."""

    def __init__(self, n_feats: int) -> None:
        super().__init__()
        self.net = LocalBlock(n_feats)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class BlockC(nn.Module):
    """Attention between channels, local and then global, each with a gated FFN."""

    def __init__(self, n_feats: int, window_size: int) -> None:
        super().__init__()
        self.canorm1, self.canorm2 = (LayerNorm2d(n_feats, 1e-6) for _ in range(2))
        self.cttn1, self.cttn2 = (ChannelAttention(n_feats, 1, window_size, strided) for strided in (False, True))
        self.cnorm1, self.cnorm2 = (LayerNorm2d(n_feats, 1e-6) for _ in range(2))
        self.gfn1, self.gfn2 = (GatedFFN(n_feats, n_feats) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.cttn1(x, self.canorm1)
        x = self.gfn1(x, self.cnorm1)
        x = self.cttn2(x, self.canorm2)
        return self.gfn2(x, self.cnorm2)


class IDSABlock(nn.Module):
    """Information distillation in three stages, on all, three quarters and half of the channels."""

    def __init__(self, n_feats: int, window_size: int, first: bool) -> None:
        super().__init__()
        quarter = n_feats // 4
        self.quarter = quarter
        self.LB1, self.LB2, self.LB3 = (LB(i * quarter) for i in (4, 3, 2))
        self.SLA1, self.SLA2, self.SLA3 = (SpatialAttention(i * quarter, window_size, False, first) for i in (3, 2, 1))
        self.SGA1, self.SGA2, self.SGA3 = (SpatialAttention(i * quarter, window_size, True, first) for i in (3, 2, 1))
        self.BlockC = BlockC(n_feats, window_size)
        self.pw1, self.pw2, self.pw3 = (PointwiseConv(i * quarter, i * quarter) for i in (4, 3, 4))

    def forward(self, x: Tensor, maps: Sequence[StageMaps] | None) -> tuple[Tensor, list[StageMaps]]:
        given = maps or [StageMaps(None, None)] * 3
        x, kept, maps1 = self.stage(self.LB1(x), self.SLA1, self.SGA1, given[0])
        x1, x = self.distil(self.pw1(x, beside=[kept]))
        x, kept, maps2 = self.stage(self.LB2(x), self.SLA2, self.SGA2, given[1])
        x2, x = self.distil(self.pw2(x, beside=[kept]))
        x, kept, maps3 = self.stage(self.LB3(x), self.SLA3, self.SGA3, given[2])
        return self.BlockC(self.pw3(x1, beside=[x2, x, kept])), [maps1, maps2, maps3]

    def stage(
        self, x: Tensor, local: nn.Module, across: nn.Module, maps: StageMaps
    ) -> tuple[Tensor, Tensor, StageMaps]:
        """Attention for all but the first quarter, and that quarter, which comes after these from here on."""
        kept, x = self.distil(x)
        x, local_map = local(x, maps.local)
        x, across_map = across(x, maps.across)
        return x, kept, StageMaps(local_map, across_map)

    def distil(self, x: Tensor) -> tuple[Tensor, ...]:
        """A quarter of n_feats, and the rest."""
        return x.split((self.quarter, x.shape[1] - self.quarter), 1)


class Group(nn.Module):
    """A block and a 1x1 convolution, plus the input, and the spatial gate on the sum.

    The official names and their order differ between the first group and the others.
    """

    def __init__(self, n_feats: int, window_size: int, first: bool) -> None:
        super().__init__()
        block = IDSABlock(n_feats, window_size, first)
        if first:
            self.res_end = PointwiseConv(n_feats, n_feats)
        self.residual_layer = nn.Sequential(block) if first else block
        if not first:
            self.res_end = PointwiseConv(n_feats, n_feats)
        self.esa = ESA(n_feats)

    def forward(self, x: Tensor, maps: Sequence[StageMaps] | None) -> tuple[Tensor, list[StageMaps]]:
        block = self.residual_layer[0] if isinstance(self.residual_layer, nn.Sequential) else self.residual_layer
        out, found = block(x, maps)
        return self.esa(self.res_end(out, plus=x)), found


class ASID(nn.Module):
    """ASID, without settings the one of the paper with three groups.

    Args:
        scale: 2, 3 or 4.
        n_feats: feature channels.
        n_resgroups: groups, of one block each.
        window_size: side of the windows, and of the grid that attention across the image takes its pixels from.

    Maps (N, 3, H, W) in [-1, 1] to (N, 3, scale * H, scale * W), each image on its own.
    """

    def __init__(self, scale: int, n_feats: int = 48, n_resgroups: int = 3, window_size: int = 8) -> None:
        super().__init__()
        if n_feats % 4:
            raise UserError(f'--n_feats {n_feats} is not a multiple of 4: ASID works on quarters, choose one.')
        check_window(window_size)
        self.scale, self.window_size = scale, window_size
        self.groups = [f'block{i}' for i in range(n_resgroups)]
        for i, name in enumerate(self.groups):
            self.add_module(name, Group(n_feats, window_size, first=i == 0))
        self.input = conv(3, n_feats, 3)
        self.output = conv(n_feats, n_feats, 3)
        self.up = DirectUpsampler(scale, n_feats)

    def forward(self, x: Tensor) -> Tensor:
        check_images(x)
        height, width = x.shape[2:]
        x = in_channels_last(zero_pad(x, self.window_size, ESA.AT_LEAST))
        head = self.input(x)
        x, maps = head, None
        for name in self.groups:
            x, maps = getattr(self, name)(x, maps)
        x = self.up(self.output(x, plus=head))
        return x[..., : self.scale * height, : self.scale * width]


def recognise(state: Mapping[str, Tensor]) -> dict[str, object] | None:
    """Scale and all settings of ASID's weights; None for those of another network."""
    bias = state.get('block0.residual_layer.0.SLA1.attn.rel_pos_bias.weight')
    up = state.get('up.0.weight')
    if bias is None or up is None:
        return None
    return {
        'scale': math.isqrt(len(up) // 3),
        'n_feats': up.shape[1],
        'n_resgroups': how_many(state, 'block'),
        'window_size': (math.isqrt(len(bias)) + 1) // 2,
    }


NETWORKS = {  # parameters and multiply-adds at a 1280x720 output, x2 / x3 / x4
    'ASID': NetworkSpec(  # 298k 74.1G / 304k 34.0G / 313k 19.8G
        ASID,
        (2, 3, 4),
        value_range=(-1, 1),
        tiling_exact=False,
        upsampler_prefix='up.',
        checkpoint_blocks=(IDSABlock,),
        recognise=recognise,
    ),
    'ASIDd8': NetworkSpec(  # 732k 182G / 739k 82.6G / 748k 47.4G
        ASID,
        (2, 3, 4),
        {'n_resgroups': 8},
        (-1, 1),
        tiling_exact=False,
        upsampler_prefix='up.',
        checkpoint_blocks=(IDSABlock,),
        recognise=recognise,
    ),
}
