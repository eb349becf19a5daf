"""PFT-light (CVPR 2025): attention within windows whose maps are handed on and narrowed to ever fewer keys.

Long, Zhou, Zhang, Gu, "Progressive Focused Transformer for Single Image Super-Resolution",
https://arxiv.org/abs/2503.20337. Official weights load with `strict=True`.

A layer multiplies its attention map by that of the layer before the last one, which has the same windows, and keeps the
largest entries of the product (figure 2): what several layers agree on. Later layers look at these keys alone.

Departures from the official code:
- It needs a kernel in CUDA, whose gradients by keys and values are added up by threads that overwrite each other and
  differ from run to run. Here they are exact.
- The product of two maps, made to sum to one, is the softmax of the sum of their logits, so these are handed on. The
  official code adds 1e-20 to each entry, which shows only where two maps have less than 1e-12 in common.
- Maps are in float32 under autocast too; those over all keys are not kept but made again (`progressive_attention`).
- An image smaller than its padding is mirrored again and again; the official code fails.
"""

import math
from collections.abc import Mapping
from itertools import chain, repeat

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.blocks.edsr import DirectUpsampler
from model.blocks.swin import Frame
from model.blocks.tokens import ConvFFN, TokenLinear, TokenNorm, flatten_image, unflatten_image
from model.blocks.windows import (
    Windows,
    check_window,
    hidden_width,
    init_linear,
    plain_and_shifted,
    register_positions,
    relative_position_bias_table,
)
from model.common import (
    NetworkSpec,
    at_least_float32,
    check_divides,
    check_numbers,
    check_odd,
    full_precision,
    how_many,
    stacked,
)
from model.ops.progressive_attention import Focus, progressive_attention


class WindowAttention(nn.Module):
    """Position table, which all heads share, and projection of the attention."""

    def __init__(self, n_feats: int, n_heads: int, window_size: int, topk: int) -> None:
        super().__init__()
        self.n_heads, self.topk = n_heads, topk
        self.relative_position_bias_table = relative_position_bias_table(window_size, 1)
        self.proj = TokenLinear(n_feats, n_feats)

    def forward(
        self, qkv: Tensor, around: Tensor, positions: Tensor, windows: Windows, focus: Focus, plus: Tensor | None = None
    ) -> tuple[Tensor, Focus]:
        """Pixels (N, H * W, 3 * C); GELU of `around` is added before the projection, `plus` behind, both (N, H * W, C).

        Returns (N, H * W, C) and what is handed on.
        """
        with full_precision(qkv):
            pixels = at_least_float32(qkv).view(-1, 3, self.n_heads, qkv.shape[2] // (3 * self.n_heads))
            table = self.relative_position_bias_table.flatten()
            q, k, v = pixels.unbind(1)
            out, focus = progressive_attention(q, k, v, table, positions, *windows[:4], focus, self.topk)
        return self.proj(out.view_as(around), gelu_summed=around, plus=plus), focus


class PositionalEncoding(nn.Module):
    """Locally-enhanced positional encoding (LePE): a depthwise convolution of the values, whose GELU comes later."""

    def __init__(self, n_feats: int, kernel_size: int) -> None:
        super().__init__()
        depthwise = nn.Conv2d(n_feats, n_feats, kernel_size, padding=kernel_size // 2, groups=n_feats)
        self.depthwise_conv = nn.Sequential(depthwise)

    def forward(self, x: Tensor) -> Tensor:
        return self.depthwise_conv(x)


class Layer(nn.Module):
    """Attention and feed-forward network, each with a norm before and its input added.

    The features inside the feed-forward network are not kept for the gradients but made again.
    """

    def __init__(self, n_feats: int, n_heads: int, window_size: int, topk: int, kernel_size: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = TokenNorm(n_feats)
        self.norm2 = TokenNorm(n_feats)
        self.wqkv = stacked(3, TokenLinear(n_feats, 3 * n_feats))
        self.v_LePE = PositionalEncoding(n_feats, kernel_size)
        self.attn_win = WindowAttention(n_feats, n_heads, window_size, topk)
        self.convffn = ConvFFN(n_feats, hidden, kernel_size)

    def forward(
        self, x: Tensor, height: int, width: int, positions: Tensor, windows: Windows, focus: Focus
    ) -> tuple[Tensor, Focus]:
        """Pixels (N, H * W, C), and what is handed on from layer to layer with the same windows."""
        qkv = self.wqkv(x, norm=self.norm1)
        v = unflatten_image(qkv.chunk(3, -1)[2], height, width)
        x, focus = self.attn_win(qkv, flatten_image(self.v_LePE(v)), positions, windows, focus, plus=x)
        x = checkpoint(self.feed_forward, x, height, width, use_reentrant=False, preserve_rng_state=False)
        return x, focus

    def feed_forward(self, x: Tensor, height: int, width: int) -> Tensor:
        return self.convffn(x, height, width, norm=self.norm2, plus=x)


class ResidualGroup(nn.Module):
    """The layers of a block, every second one with shifted windows."""

    def __init__(self, layers: list[Layer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(
        self, x: Tensor, height: int, width: int, positions: Tensor, windows: list[Windows], focus: list[Focus]
    ) -> Tensor:
        """Pixels (N, H * W, C); `focus` of the layers with windows as they are and shifted, which changes."""
        for i, layer in enumerate(self.layers):
            x, focus[i % 2] = layer(x, height, width, positions, windows[i % 2], focus[i % 2])
        return x


class PFT(Frame):
    """PFT, without settings the lightweight one of the paper.

    Args:
        scale: 2, 3 or 4.
        n_feats: feature channels.
        depths: layers of each block, with a dash between two.
        topk: entries of a row of its maps that each block keeps, if a row has more, with a dash between two; the last
            number holds for further blocks.
        n_heads: attention heads.
        window_size: pixels along a window's side.
        kernel_size: of the depthwise convolutions.
        mlp_ratio: channels inside the feed-forward networks, as a multiple of n_feats.

    Maps (N, 3, H, W) to (N, 3, scale * H, scale * W), each image on its own; black is 0, white is 1.

    Raises:
        UserError: heads do not divide the channels, an even kernel, or no numbers from 1 on with dashes.
    """

    relative_position_index_SA: Tensor

    def __init__(
        self,
        scale: int,
        n_feats: int = 52,
        depths: str = '2-4-6-6-6',
        topk: str = '1024-256-128-64-32',
        n_heads: int = 4,
        window_size: int = 32,
        kernel_size: int = 7,
        mlp_ratio: float = 1.0,
    ) -> None:
        check_divides('n_heads', n_heads, n_feats)
        check_odd('kernel_size', kernel_size)
        check_window(window_size)
        layers, kept = check_numbers('depths', depths), check_numbers('topk', topk)
        hidden = hidden_width(n_feats, mlp_ratio)
        groups = (
            ResidualGroup([Layer(n_feats, n_heads, window_size, most, kernel_size, hidden) for _ in range(depth)])
            for depth, most in zip(layers, chain(kept, repeat(kept[-1])), strict=False)
        )
        super().__init__(scale, n_feats, window_size, groups)
        register_positions(self, 'relative_position_index_SA', window_size)
        self.upsample = DirectUpsampler(scale, n_feats)
        self.apply(init_linear)

    def shared(self, x: Tensor) -> tuple[object, ...]:
        focus: list[Focus] = [None, None]
        return self.relative_position_index_SA, plain_and_shifted(x, self.multiple), focus


def recognise(state: Mapping[str, Tensor]) -> dict[str, object] | None:
    """Settings that the state dict of a PFT with the direct upsampler shows, not heads and `topk`; else None."""
    layer = 'layers.0.residual_group.layers.0.'
    own = ('v_LePE.depthwise_conv.0.weight', 'attn_win.relative_position_bias_table', 'convffn.fc1.weight')
    keys = ('conv_first.weight', 'upsample.0.weight', 'relative_position_index_SA', *(layer + key for key in own))
    if not all(key in state for key in keys) or 'conv_last.weight' in state:
        return None
    n_feats = len(state['conv_first.weight'])
    depths = [how_many(state, f'layers.{i}.residual_group.layers.') for i in range(how_many(state, 'layers.'))]
    return {
        'scale': math.isqrt(len(state['upsample.0.weight']) // 3),
        'n_feats': n_feats,
        'depths': '-'.join(map(str, depths)),
        'window_size': math.isqrt(len(state['relative_position_index_SA'])),
        'kernel_size': state[layer + own[0]].shape[-1],
        'mlp_ratio': len(state[layer + own[2]]) / n_feats,
    }


NETWORKS = {  # parameters and multiply-adds at a 1280x720 output, x2 / x3 / x4
    'PFT-light': NetworkSpec(
        PFT,
        (2, 3, 4),
        tiling_exact=False,
        upsampler_prefix='upsample.',
        checkpoint_blocks=(Layer,),
        recognise=recognise,
    ),
}
