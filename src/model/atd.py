"""ATD and ATD-light (CVPR 2024): window attention beside a dictionary of tokens that adapts to the image.

Zhang, Li, Zhou, Zhao, Gu, "Transcending the Limit of Local Window: Advanced Super-Resolution Transformer with Adaptive
Token Dictionary", https://arxiv.org/abs/2401.08209. Official weights load with `strict=True`.

Every block learns a dictionary of tokens. A layer adds three attentions: of each pixel to the dictionary (TDCA), among
pixels that look at the same token, wherever they are (AC-MSA), and within shifted windows (SW-MSA). The map of the
first says which token a pixel belongs to, and is also what refines the dictionary by the image for the next layer.

Departures from the official code:
- The sort by category is stable, so that results do not depend on the device.
- An image smaller than its padding is mirrored again and again; the official code fails.
- The similarity to the dictionary, which decides the category, and the refinement are in float32 under autocast.
- Windows with the same shift mask are attended together, so that no mask grows with the image.

A second network of the same name and authors, "ATD: Improved Transformer with Adaptive Token Dictionary for Image
Restoration" (https://arxiv.org/abs/2603.02581), has other layers; `recognise_v2` knows its weights.
"""

import math
from collections.abc import Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.blocks.edsr import DirectUpsampler, Upsampler
from model.blocks.swin import Frame
from model.blocks.tokens import (
    ConvFFN,
    TokenLinear,
    TokenNorm,
    inverse_of,
    stable_order,
    take_rows,
)
from model.blocks.windows import (
    Windows,
    attention,
    check_window,
    hidden_width,
    init_linear,
    plain_and_shifted,
    relative_position_bias_table,
    relative_positions,
    window_attention,
)
from model.common import (
    Float32Conv,
    NetworkSpec,
    at_least_float32,
    check_divides,
    check_odd,
    conv,
    full_precision,
    how_many,
    stacked,
)
from model.ops.cached_attention import is_for_kernel
from model.ops.packed_attention import packed_attention
from model.ops.token_dictionary import Reading, read_tokens, refine_tokens

MAX_LOGIT_SCALE = math.log(100)
UPSAMPLER_FEATS = 64  # channels of the classical upsampler


class DictionaryAttention(nn.Module):
    """Token dictionary cross-attention: each pixel attends to the tokens, by cosines in few channels."""

    def __init__(self, n_feats: int, n_tokens: int, reduced_dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((n_tokens,), 0.5))
        self.wq = TokenLinear(n_feats, reduced_dim)
        self.wk = TokenLinear(n_feats, reduced_dim)
        self.wv = TokenLinear(n_feats, n_feats)

    def forward(self, x: Tensor, tokens: Tensor, norm: TokenNorm, qkv: TokenLinear) -> Reading:
        """Pixels (N, L, C), normalised first, and tokens (N, M, C)."""
        with full_precision(x):
            factor = 1 + self.scale.clamp(0, 1) * math.log(len(self.scale))
            keys = F.normalize(self.wk(at_least_float32(tokens)), dim=-1) * factor.unsqueeze(-1)
        linear, query = ((layer.weight, layer.bias) for layer in (qkv, self.wq))
        return read_tokens(x, norm, linear, query, keys, self.wv(tokens))


class CategoryAttention(nn.Module):
    """Adaptive category-based attention: pixels sorted by category and cut into groups, attention within a group.

    Groups ignore where a category ends. A last group that is not full takes as many of the last pixels a second time
    (mirrored in the official code, but the order of the keys changes nothing).
    """

    def __init__(self, n_feats: int, n_heads: int, category_size: int) -> None:
        super().__init__()
        self.n_heads, self.category_size = n_heads, category_size
        self.logit_scale = nn.Parameter(torch.full((1, 1), math.log(10)))
        self.proj = TokenLinear(n_feats, n_feats)

    def forward(self, qkv: Tensor, category: Tensor, plus: Tensor | None = None) -> Tensor:
        """(N, L, 3 * C) and the categories (N, L) int64 to (N, L, C), like `plus`, which is added."""
        n, length, channels = qkv.shape
        size = min(length, self.category_size)
        d = channels // (3 * self.n_heads)
        order = stable_order(category)
        factor = self.logit_scale.clamp(max=MAX_LOGIT_SCALE).exp()
        if length % size == 0 and not torch.is_grad_enabled() and is_for_kernel(qkv, size, d):
            groups = (order + torch.arange(n).view(-1, 1) * length).view(-1, size)
            rows, kinds = qkv.reshape(-1, 3, self.n_heads, d), torch.zeros(len(groups), dtype=torch.int64)
            out = packed_attention(rows, groups, None, kinds, float(factor))
            return self.proj(out.view(n, length, -1), plus=plus)
        tail = order[:, length - -length % size :]
        rows = take_rows(qkv, torch.cat((order, tail), 1))
        q, k, v = rows.view(-1, size, 3, self.n_heads, d).unbind(2)
        out = attention((q * factor).to(v.dtype), k, v, scale=1.0)
        return self.proj(take_rows(out.reshape(n, -1, channels // 3), inverse_of(order)), plus=plus)


class WindowAttention(nn.Module):
    """Position table and projection of the shifted-window attention."""

    def __init__(self, n_feats: int, n_heads: int, window_size: int) -> None:
        super().__init__()
        self.relative_position_bias_table = relative_position_bias_table(window_size, n_heads)
        self.proj = TokenLinear(n_feats, n_feats)

    def forward(self, qkv: Tensor, positions: Tensor, windows: Windows, plus: Tensor) -> Tensor:
        out = window_attention(qkv, self.relative_position_bias_table, positions, windows)
        return self.proj(out, plus=plus)


class Layer(nn.Module):
    """Three attentions that share queries, keys and values, the feed-forward network, and the tokens' refinement.

    The features inside the feed-forward network are not kept for the gradients but made again.
    """

    def __init__(
        self,
        n_feats: int,
        n_heads: int,
        window_size: int,
        category_size: int,
        n_tokens: int,
        reduced_dim: int,
        kernel_size: int,
        mlp_ratio: float,
        refines: bool,
    ) -> None:
        super().__init__()
        self.refines = refines
        if refines:
            self.sigma = nn.Parameter(torch.zeros(n_tokens, 1))
        self.norm1 = TokenNorm(n_feats)
        self.norm2 = TokenNorm(n_feats)
        if refines:
            self.norm3 = nn.InstanceNorm1d(n_tokens, affine=True)
        self.wqkv = stacked(3, TokenLinear(n_feats, 3 * n_feats))
        self.attn_win = WindowAttention(n_feats, n_heads, window_size)
        self.attn_atd = DictionaryAttention(n_feats, n_tokens, reduced_dim)
        self.attn_aca = CategoryAttention(n_feats, n_heads, category_size)
        self.convffn = ConvFFN(n_feats, hidden_width(n_feats, mlp_ratio), kernel_size)

    def forward(
        self, x: Tensor, tokens: Tensor, height: int, width: int, positions: Tensor, windows: Windows
    ) -> tuple[Tensor, Tensor]:
        """Pixels (N, H * W, C) and tokens (N, M, C), both to new ones."""
        qkv, x, similarity, category = self.attn_atd(x, tokens, self.norm1, self.wqkv)
        x = self.attn_win(qkv, positions, windows, plus=x)
        x = self.attn_aca(qkv, category, plus=x)
        x = checkpoint(self.feed_forward, x, height, width, use_reentrant=False, preserve_rng_state=False)
        return x, self.refine(tokens, similarity, x) if self.refines else tokens

    def feed_forward(self, x: Tensor, height: int, width: int) -> Tensor:
        return self.convffn(x, height, width, norm=self.norm2, plus=x)

    def refine(self, tokens: Tensor, similarity: Tensor, x: Tensor) -> Tensor:
        """Adaptive token refinement: tokens (N, M, C) move towards the pixels (N, L, C) that are similar to them."""
        return refine_tokens(tokens, similarity, x, self.norm3, self.sigma.sigmoid())


class ResidualGroup(nn.Module):
    """The layers of a block and their dictionary, which starts afresh for every image."""

    def __init__(self, layers: list[Layer], n_tokens: int, n_feats: int) -> None:
        super().__init__()
        self.td = nn.Parameter(torch.randn(n_tokens, n_feats))
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, height: int, width: int, positions: Tensor, windows: list[Windows]) -> Tensor:
        """Pixels (N, H * W, C); every second layer has shifted windows."""
        tokens = self.td.expand(x.shape[0], -1, -1)
        for i, layer in enumerate(self.layers):
            x, tokens = layer(x, tokens, height, width, positions, windows[i % 2])
        return x


class ATD(Frame):
    """ATD, without settings the large one of the paper.

    Args:
        scale: 2, 3 or 4.
        n_feats: feature channels.
        n_resgroups: blocks.
        n_resblocks: layers a block.
        n_heads: heads of the window and the category attention.
        window_size: pixels along a window's side.
        category_size: pixels a group of the category attention.
        n_tokens: tokens of a dictionary.
        reduced_dim: channels in which pixels and tokens are compared.
        kernel_size: of the depthwise convolutions.
        mlp_ratio: channels inside the feed-forward networks, as a multiple of n_feats.
        direct_upsampler: one convolution to all pixels of the output (ATD-light), else the classical upsampler.

    Maps (N, 3, H, W) to (N, 3, scale * H, scale * W), each image on its own; black is 0, white is 1.

    Raises:
        UserError: heads do not divide the channels, an even kernel.
    """

    relative_position_index_SA: Tensor

    def __init__(
        self,
        scale: int,
        n_feats: int = 210,
        n_resgroups: int = 6,
        n_resblocks: int = 6,
        n_heads: int = 6,
        window_size: int = 16,
        category_size: int = 256,
        n_tokens: int = 128,
        reduced_dim: int = 20,
        kernel_size: int = 5,
        mlp_ratio: float = 2.0,
        direct_upsampler: bool = False,
    ) -> None:
        check_divides('n_heads', n_heads, n_feats)
        check_odd('kernel_size', kernel_size)
        check_window(window_size)

        def group() -> ResidualGroup:
            layers = [
                Layer(
                    n_feats,
                    n_heads,
                    window_size,
                    category_size,
                    n_tokens,
                    reduced_dim,
                    kernel_size,
                    mlp_ratio,
                    refines=i < n_resblocks - 1,
                )
                for i in range(n_resblocks)
            ]
            return ResidualGroup(layers, n_tokens, n_feats)

        super().__init__(scale, n_feats, window_size, (group() for _ in range(n_resgroups)))
        self.register_buffer('relative_position_index_SA', relative_positions(window_size))
        before: nn.Module
        upsample: nn.Module
        last: nn.Module
        if direct_upsampler:
            before, upsample, last = nn.Identity(), DirectUpsampler(scale, n_feats), nn.Identity()
        else:
            before = nn.Sequential(conv(n_feats, UPSAMPLER_FEATS, 3), nn.LeakyReLU())
            upsample, last = Upsampler(scale, UPSAMPLER_FEATS), Float32Conv(UPSAMPLER_FEATS, 3, 3)
        self.conv_before_upsample, self.upsample, self.conv_last = before, upsample, last
        self.apply(init_linear)

    def shared(self, x: Tensor) -> tuple[object, ...]:
        return self.relative_position_index_SA, plain_and_shifted(x, self.multiple)

    def enlarge(self, x: Tensor) -> Tensor:
        return self.conv_last(self.upsample(self.conv_before_upsample(x)))


def recognise(state: Mapping[str, Tensor]) -> dict[str, object] | None:
    """Settings that the state dict of an ATD shows, all but `category_size`; None for another network."""
    group = 'layers.0.residual_group.'
    own = ('attn_atd.wq.weight', 'attn_aca.logit_scale', 'convffn.fc1.weight', 'convffn.dwconv.depthwise_conv.0.weight')
    table = f'{group}layers.0.attn_win.relative_position_bias_table'
    keys = ['upsample.0.weight', 'relative_position_index_SA', f'{group}td', table]
    if not all(key in state for key in (*keys, *(f'{group}layers.0.{key}' for key in own))):
        return None
    outputs = len(state['upsample.0.weight'])
    direct = 'conv_last.weight' not in state
    if direct:
        scale = math.isqrt(outputs // 3)
    else:
        scale = 3 if outputs == 9 * UPSAMPLER_FEATS else 2 ** how_many(state, 'upsample.')
    reduced, _, hidden, kernel = (state[f'{group}layers.0.{key}'].shape for key in own)
    n_tokens, n_feats = state[f'{group}td'].shape
    return {
        'scale': scale,
        'n_feats': n_feats,
        'n_resgroups': how_many(state, 'layers.'),
        'n_resblocks': how_many(state, f'{group}layers.'),
        'n_heads': state[table].shape[1],
        'window_size': math.isqrt(len(state['relative_position_index_SA'])),
        'n_tokens': n_tokens,
        'reduced_dim': reduced[0],
        'kernel_size': kernel[-1],
        'mlp_ratio': hidden[0] / n_feats,
        'direct_upsampler': direct,
    }


def recognise_v2(state: Mapping[str, Tensor]) -> bool:
    """Whether these are weights of the second ATD (arXiv 2603.02581), which is another network.

    Its layers hand a pixel's category to the feed-forward network through a linear layer `fc_td`, which the first ATD
    does not have; they neither refine the tokens (no `sigma`, no `norm3`) nor learn an `attn_aca.logit_scale`. This is
    from public code with that network's settings; its weights were not seen. The published sizes differ too (216
    channels, 4 heads and 512 tokens; light: 3 heads and 128 tokens), but the first ATD could be built in these sizes.
    """
    return any('.attn_atd.' in key for key in state) and any(key.endswith('.fc_td.weight') for key in state)


SCALES = (2, 3, 4)
LIGHT = {
    'n_feats': 48,
    'n_resgroups': 4,
    'n_heads': 4,
    'category_size': 128,
    'n_tokens': 64,
    'reduced_dim': 8,
    'kernel_size': 7,
    'mlp_ratio': 1.0,
    'direct_upsampler': True,
}
network = partial(
    NetworkSpec,
    ATD,
    SCALES,
    tiling_exact=False,
    upsampler_prefix='upsample.',
    checkpoint_blocks=(Layer,),
    recognise=recognise,
)

NETWORKS = {  # parameters and multiply-adds at a 1280x720 output, x2 / x3 / x4
    'ATD': network(),  # 20.1M 6.47T / 20.3M 2.87T / 20.3M 1.73T
    'ATD-light': network(LIGHT),  # 753K 376G / 760K 166G / 769K 99.0G
}
