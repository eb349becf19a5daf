"""SwinIR (ICCVW 2021), the lightweight one: a residual network of Swin transformer layers.

Liang, Cao, Sun, Zhang, Van Gool, Timofte, "SwinIR: Image Restoration Using Swin Transformer",
https://arxiv.org/abs/2108.10257. Official weights load with `strict=True`.

Each layer attends within windows, in every second one shifted by half a window, and then mixes channels pixel by pixel.

Departures from the official code:
- Any size works: where a side is no multiple of the window, the image is padded inside by its mirror image, the edge
  pixel repeated. (The official test script does this outside, and adds a whole window even where none is needed.)
- The shift mask is made once a forward pass for the size at hand. The masks in the weights, one in every second layer
  for the nominal input of 64x64, are carried along and never read.
- Windows with the same shift mask are attended together, so that no mask grows with the image.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from error import UserError
from model.blocks.edsr import DirectUpsampler
from model.blocks.swin import Frame
from model.blocks.tokens import TokenLinear, TokenNorm
from model.blocks.windows import (
    Windows,
    check_window,
    hidden_width,
    init_linear,
    plain_and_shifted,
    relative_position_bias_table,
    relative_positions,
    shift_areas,
    window_attention,
)
from model.common import (
    NetworkSpec,
    check_divides,
    how_many,
    stacked,
)
from model.ops.fused_linear import Norm, fused_linear
from model.ops.progressive_attention import area_masks

NOMINAL_SIZE = 64  # of the input that the masks in the weights are for


class WindowAttention(nn.Module):
    """Multi-head self-attention within windows, with a relative position bias."""

    relative_position_index: Tensor

    def __init__(self, n_feats: int, n_heads: int, window_size: int) -> None:
        super().__init__()
        self.relative_position_bias_table = relative_position_bias_table(window_size, n_heads)
        self.register_buffer('relative_position_index', relative_positions(window_size))
        self.qkv = stacked(3, TokenLinear(n_feats, 3 * n_feats))
        self.proj = TokenLinear(n_feats, n_feats)

    def forward(self, x: Tensor, windows: Windows, norm: Norm, plus: Tensor | None) -> Tensor:
        table, positions = self.relative_position_bias_table, self.relative_position_index
        return self.proj(window_attention(self.qkv(x, norm=norm), table, positions, windows), plus=plus)


class MLP(nn.Module):
    """Linear layer, GELU, linear layer."""

    def __init__(self, n_feats: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = TokenLinear(n_feats, hidden)
        self.fc2 = TokenLinear(hidden, n_feats)

    def forward(self, x: Tensor, norm: Norm, plus: Tensor | None) -> Tensor:
        layers = [(layer.weight, layer.bias) for layer in (self.fc1, self.fc2)]
        return fused_linear(x, layers, norm=norm, gelu=True, plus=plus)


class Layer(nn.Module):
    """Swin transformer layer (figure 2b): attention and MLP, each with a norm before and its input added.

    In training a branch is left out with probability `drop_path`, for each image on its own (stochastic depth).
    """

    def __init__(
        self, n_feats: int, n_heads: int, window_size: int, hidden: int, drop_path: float, shifted: bool
    ) -> None:
        super().__init__()
        self.drop_path = drop_path
        if shifted:
            self.register_buffer('attn_mask', nominal_masks(window_size))
        self.norm1 = TokenNorm(n_feats)
        self.attn = WindowAttention(n_feats, n_heads, window_size)
        self.norm2 = TokenNorm(n_feats)
        self.mlp = MLP(n_feats, hidden)

    def forward(self, x: Tensor, windows: Windows) -> Tensor:
        x = self.add(x, partial(self.attn, x, windows, self.norm1))
        return self.add(x, partial(self.mlp, x, self.norm2))

    def add(self, x: Tensor, branch: Callable[..., Tensor]) -> Tensor:
        """x plus a branch (N, L, C), of which in training some of the N are zero and the others enlarged for it."""
        if not self.training or self.drop_path == 0:
            return branch(plus=x)
        keep = 1 - self.drop_path
        return x + branch(plus=None) * x.new_empty(len(x), 1, 1).bernoulli_(keep).div_(keep)


def nominal_masks(window_size: int) -> Tensor:
    """Shift masks (W, T, T) of all windows of the nominal input, as they are stored in the weights."""
    side = -(-NOMINAL_SIZE // window_size)
    last = torch.arange(side) == side - 1
    kind = 2 * last.long()[:, None] + last.long()
    return area_masks(shift_areas(window_size, window_size // 2), torch.float32)[kind.flatten()]


class ResidualGroup(nn.Module):
    """The layers of a residual Swin transformer block (RSTB), every second one with shifted windows."""

    def __init__(self, layers: list[Layer]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(layers)

    def forward(self, x: Tensor, height: int, width: int, windows: list[Windows]) -> Tensor:
        for i, layer in enumerate(self.blocks):
            x = layer(x, windows[i % 2])
        return x


class SwinIR(Frame):
    """SwinIR, without settings the lightweight one of the paper.

    Args:
        scale: 2, 3 or 4.
        n_feats: feature channels.
        n_resgroups: blocks.
        n_resblocks: layers a block.
        n_heads: attention heads.
        window_size: pixels along a window's side.
        mlp_ratio: channels inside the MLPs, as a multiple of n_feats.
        drop_path: probability to leave out a branch of the last layer in training; rises linearly from 0.

    Maps (N, 3, H, W) to (N, 3, scale * H, scale * W), each image on its own; black is 0, white is 1.

    Raises:
        UserError: heads do not divide the channels, a probability that is none.
    """

    def __init__(
        self,
        scale: int,
        n_feats: int = 60,
        n_resgroups: int = 4,
        n_resblocks: int = 6,
        n_heads: int = 6,
        window_size: int = 8,
        mlp_ratio: float = 2.0,
        drop_path: float = 0.1,
    ) -> None:
        check_divides('n_heads', n_heads, n_feats)
        if not 0 <= drop_path < 1:
            raise UserError(f'--drop_path {drop_path} is a probability: choose 0 or more and less than 1.')
        check_window(window_size)
        hidden = hidden_width(n_feats, mlp_ratio)
        rates = torch.linspace(0, drop_path, n_resgroups * n_resblocks, device='cpu').tolist()

        def group(rates: list[float]) -> ResidualGroup:
            shifts = (i % 2 == 1 for i in range(n_resblocks))
            layers = zip(rates, shifts, strict=True)
            return ResidualGroup([Layer(n_feats, n_heads, window_size, hidden, *about) for about in layers])

        groups = (group(rates[i * n_resblocks : (i + 1) * n_resblocks]) for i in range(n_resgroups))
        super().__init__(scale, n_feats, window_size, groups)
        self.upsample = DirectUpsampler(scale, n_feats)
        self.apply(init_linear)

    def shared(self, x: Tensor) -> tuple[object, ...]:
        return (plain_and_shifted(x, self.multiple),)


def recognise(state: Mapping[str, Tensor]) -> dict[str, object] | None:
    """Settings that the state dict of a SwinIR with the direct upsampler shows, all but `drop_path`; else None."""
    group = 'layers.0.residual_group.blocks.'
    keys = ('conv_first.weight', 'upsample.0.weight', f'{group}0.mlp.fc1.weight')
    index, table = (f'{group}0.attn.relative_position_{kind}' for kind in ('index', 'bias_table'))
    if not all(key in state for key in (*keys, index, table)) or 'conv_last.weight' in state:
        return None
    n_feats = len(state['conv_first.weight'])
    return {
        'scale': math.isqrt(len(state['upsample.0.weight']) // 3),
        'n_feats': n_feats,
        'n_resgroups': how_many(state, 'layers.'),
        'n_resblocks': how_many(state, group),
        'n_heads': state[table].shape[1],
        'window_size': math.isqrt(len(state[index])),
        'mlp_ratio': len(state[f'{group}0.mlp.fc1.weight']) / n_feats,
    }


NETWORKS = {  # parameters and multiply-adds at a 1280x720 output, x2 / x3 / x4: 910K 241G / 918K 109G / 930K 62.7G
    'SwinIR-light': NetworkSpec(
        SwinIR,
        (2, 3, 4),
        tiling_exact=False,
        upsampler_prefix='upsample.',
        checkpoint_blocks=(Layer,),
        recognise=recognise,
    )
}
