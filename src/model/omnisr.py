"""OmniSR (CVPR 2023): attention over pixels and over channels alternately, within windows and across the image.

Wang, Chen, Ni, Liu, Liu, "Omni Aggregation Networks for Lightweight Image Super-Resolution",
https://arxiv.org/abs/2304.10244. Official weights load with `strict=True`.

Each block aggregates at three ranges: a convolutional local block; self-attention within 8x8 windows, once over the
window's pixels and once over its channels (meso); the same two over pixels that lie spread over the whole image
(global). A spatial gate closes each group.

Departure from the official code: an image is padded to 16 pixels a side at least, with zeros as in all its padding; the
official spatial gate fails below 9 pixels a side, where padding to multiples of 8 gives no more than 8.
"""

import math
from collections import OrderedDict
from collections.abc import Mapping

from torch import Tensor, nn

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
from model.blocks.tokens import TokenLinear
from model.blocks.windows import check_window, look_up_bias, relative_positions, self_attention
from model.common import NetworkSpec, check_divides, check_images, conv, how_many, in_channels_last, stacked, zero_pad
from model.ops.fast import float32_by_llvm, is_for_llvm
from model.ops.fused_linear import Norm

TOKEN_EPS, MAP_EPS = 1e-5, 1e-6  # of the norms before attention over pixels, and of all others


class WindowAttention(nn.Module):
    """Multi-head attention between window_size x window_size pixels, contiguous or, strided, spread over the image."""

    def __init__(self, n_feats: int, n_heads: int, window_size: int, strided: bool) -> None:
        super().__init__()
        self.n_heads, self.window_size, self.strided = n_heads, window_size, strided
        self.to_qkv = stacked(3, TokenLinear(n_feats, 3 * n_feats, bias=False))
        self.to_out = nn.Sequential(TokenLinear(n_feats, n_feats, bias=False))
        self.rel_pos_bias = nn.Embedding((2 * window_size - 1) ** 2, n_heads)

    def forward(self, x: Tensor, norm: Norm) -> Tensor:
        """Maps (N, C, H, W), plus what is made of them normalised."""
        cell = attention_cell(x, self.window_size, self.strided)
        bias = look_up_bias(self.rel_pos_bias.weight, relative_positions(self.window_size, x.device))

        def window_attention(x: Tensor, *_: object) -> Tensor:
            tokens = to_tokens(x, cell, self.strided)
            qkv = self.to_qkv(tokens, norm=norm)
            out = self_attention(qkv, self.n_heads, bias.unsqueeze(1).to(qkv.dtype))
            return to_map(self.to_out[0](out, plus=tokens), x, cell, self.strided)

        if not is_for_llvm(x):
            return window_attention(x)
        weights = self.to_qkv.weight, bias, self.to_out.get_parameter('0.weight')
        around = norm.weight, norm.bias, norm.eps
        return float32_by_llvm('window_attention', window_attention, x, *around, *weights, cell, self.strided)


class Residual(nn.Module):
    """x + fn(norm(x))."""

    def __init__(self, n_feats: int, eps: float, fn: nn.Module) -> None:
        super().__init__()
        self.norm = LayerNorm2d(n_feats, eps)
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(x, self.norm)


class OSABlock(nn.Module):
    """Omni-scale aggregation: local, then within windows, then across the image."""

    def __init__(self, n_feats: int, n_heads: int, window_size: int) -> None:
        super().__init__()

        def pixels(strided: bool) -> nn.Module:
            return Residual(n_feats, TOKEN_EPS, WindowAttention(n_feats, n_heads, window_size, strided))

        def channels(strided: bool) -> nn.Module:
            return Residual(n_feats, MAP_EPS, ChannelAttention(n_feats, n_heads, window_size, strided))

        def ffn() -> nn.Module:
            return Residual(n_feats, MAP_EPS, GatedFFN(n_feats, n_feats))

        self.layer = nn.Sequential(
            OrderedDict(  # the numbers left out are rearrangements in the official code
                {
                    '0': LocalBlock(n_feats),
                    '2': pixels(strided=False),
                    '4': ffn(),
                    '5': channels(strided=False),
                    '6': ffn(),
                    '8': pixels(strided=True),
                    '10': ffn(),
                    '11': channels(strided=True),
                    '12': ffn(),
                }
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class OSAGroup(nn.Module):
    """A block and a 1x1 convolution, plus the input, and the spatial gate on the sum."""

    def __init__(self, n_feats: int, n_heads: int, window_size: int) -> None:
        super().__init__()
        self.residual_layer = nn.Sequential(OSABlock(n_feats, n_heads, window_size), PointwiseConv(n_feats, n_feats))
        self.esa = ESA(n_feats)

    def forward(self, x: Tensor) -> Tensor:
        block, last = self.residual_layer
        return self.esa(last(block(x), plus=x))


class OmniSR(nn.Module):
    """OmniSR, without settings the one of the paper.

    Args:
        scale: 2, 3 or 4.
        n_feats: feature channels.
        n_resgroups: groups, of one block each.
        n_heads: heads of all attentions.
        window_size: side of the windows, and of the grid that attention across the image takes its pixels from.

    Maps (N, 3, H, W) in [-1, 1] to (N, 3, scale * H, scale * W), each image on its own.
    """

    def __init__(
        self, scale: int, n_feats: int = 64, n_resgroups: int = 5, n_heads: int = 4, window_size: int = 8
    ) -> None:
        super().__init__()
        check_divides('n_heads', n_heads, n_feats)
        check_window(window_size)
        self.scale, self.window_size = scale, window_size
        self.residual_layer = nn.Sequential(*(OSAGroup(n_feats, n_heads, window_size) for _ in range(n_resgroups)))
        self.input = conv(3, n_feats, 3)
        self.output = conv(n_feats, n_feats, 3)
        self.up = DirectUpsampler(scale, n_feats)

    def forward(self, x: Tensor) -> Tensor:
        check_images(x)
        height, width = x.shape[2:]
        x = in_channels_last(zero_pad(x, self.window_size, ESA.AT_LEAST))
        x = self.input(x)
        x = self.output(self.residual_layer(x), plus=x)
        return self.up(x)[..., : self.scale * height, : self.scale * width]


def recognise(state: Mapping[str, Tensor]) -> dict[str, object] | None:
    """Scale and all settings of OmniSR's weights; None for those of another network."""
    bias = state.get('residual_layer.0.residual_layer.0.layer.2.fn.rel_pos_bias.weight')
    up = state.get('up.0.weight')
    if bias is None or up is None:
        return None
    return {
        'scale': math.isqrt(len(up) // 3),
        'n_feats': up.shape[1],
        'n_resgroups': how_many(state, 'residual_layer.'),
        'n_heads': bias.shape[1],
        'window_size': (math.isqrt(len(bias)) + 1) // 2,
    }


NETWORKS = {  # parameters and multiply-adds at a 1280x720 output, x2 / x3 / x4
    'OmniSR': NetworkSpec(  # 785k 194G / 793k 88.1G / 805k 50.7G
        OmniSR,
        (2, 3, 4),
        value_range=(-1, 1),
        tiling_exact=False,
        upsampler_prefix='up.',
        checkpoint_blocks=(OSABlock,),
        recognise=recognise,
    ),
}
