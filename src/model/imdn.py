"""IMDN (ACM MM 2019): blocks that keep a part of their channels at every step, and weigh channels by their contrast.

Hui, Gao, Yang, Wang, "Lightweight Image Super-Resolution with Information Multi-distillation Network",
https://arxiv.org/abs/1909.11856. Official weights load with `strict=True`.

Departure from the official code: the gradient of a deviation of 0 is 0, not NaN (`ContrastAttention`).
"""

import math
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from error import UserError
from model.blocks.edsr import DirectUpsampler
from model.blocks.pixels import ContrastAttention, join_outputs
from model.common import NetworkSpec, activated, check_images, conv, how_many, in_fast_memory


def leaky_relu() -> nn.Module:
    """Of the slope that all of the network has."""
    return nn.LeakyReLU(0.05, inplace=True)


class IMDB(nn.Module):
    """Information multi-distillation block (figure 3): each of three convolutions keeps a quarter of the channels.

    The next one refines the others. What was kept, and what a fourth convolution makes of the rest, are weighed and
    mixed, plus the input.
    """

    def __init__(self, n_feats: int) -> None:
        super().__init__()
        kept = n_feats // 4
        self.sizes = (kept, n_feats - kept)
        self.c1 = conv(n_feats, n_feats, 3)
        self.c2 = conv(n_feats - kept, n_feats, 3)
        self.c3 = conv(n_feats - kept, n_feats, 3)
        self.c4 = conv(n_feats - kept, kept, 3)
        self.act = leaky_relu()
        self.c5 = conv(4 * kept, n_feats, 1)
        self.cca = ContrastAttention(4 * kept)

    def forward(self, x: Tensor) -> Tensor:
        parts, rest = [], x
        for layer in (self.c1, self.c2, self.c3):
            part, rest = activated(layer, self.act, rest).split(self.sizes, 1)
            parts.append(part)
        parts.append(self.c4(rest))
        return self.c5(self.cca(torch.cat(parts, 1)), plus=x)


class IMDN(nn.Module):
    """IMDN of figure 2, without settings the one of the paper.

    Args:
        scale: 2, 3 or 4.
        n_resblocks: blocks, whose outputs are all joined at the end.
        n_feats: feature channels.

    Maps (N, 3, H, W) in [0, 1] to (N, 3, scale * H, scale * W), each image on its own.

    Raises:
        UserError: fewer than 4 feature channels.
    """

    def __init__(self, scale: int, n_resblocks: int = 6, n_feats: int = 64) -> None:
        super().__init__()
        if n_feats < 4:
            raise UserError(f'--n_feats {n_feats}: a quarter of them is kept at every step, so choose 4 or more.')
        self.fea_conv = conv(3, n_feats, 3)
        self.names = [f'IMDB{i + 1}' for i in range(n_resblocks)]
        for name in self.names:
            self.add_module(name, IMDB(n_feats))
        self.c = nn.Sequential(conv(n_resblocks * n_feats, n_feats, 1), leaky_relu())
        self.LR_conv = conv(n_feats, n_feats, 3)
        self.upsampler = DirectUpsampler(scale, n_feats)

    def forward(self, x: Tensor) -> Tensor:
        check_images(x)
        first = self.fea_conv(in_fast_memory(x))
        join, act = self.c
        x = join_outputs([self.get_submodule(name) for name in self.names], first, cast(nn.Conv2d, join))
        return self.upsampler(self.LR_conv(act(x), plus=first))


def recognise(state: Mapping[str, Tensor]) -> dict[str, object] | None:
    """Scale and all settings of IMDN's weights; None for those of another network."""
    if 'IMDB1.c1.weight' not in state or 'upsampler.0.weight' not in state:
        return None
    outputs, n_feats = state['upsampler.0.weight'].shape[:2]
    return {'scale': math.isqrt(outputs // 3), 'n_resblocks': how_many(state, 'IMDB'), 'n_feats': n_feats}


NETWORKS = {  # parameters and multiply-adds at a 1280x720 output, x2 / x3 / x4
    'IMDN': NetworkSpec(  # 694k 159G / 703k 71.5G / 715k 40.9G
        IMDN,
        (2, 3, 4),
        tiling_exact=False,
        upsampler_prefix='upsampler.',
        checkpoint_blocks=(IMDB,),
        recognise=recognise,
    ),
}
