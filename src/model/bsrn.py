"""BSRN (CVPRW 2022): distillation with depthwise convolutions, weighed by pixels and by channels.

Li, Liu, Chen, Cai, Gu, Qiao, Dong, "Blueprint Separable Residual Network for Efficient Image Super-Resolution",
https://arxiv.org/abs/2205.05996. Official weights load with `strict=True`.

Departures from the official code: images below 15 pixels a side, for which its spatial gate fails, are padded to that
with zeros; the gradient of a deviation of 0 is 0, not NaN (`ContrastAttention`).
"""

import math
from collections.abc import Mapping
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from error import UserError
from model.blocks.edsr import DirectUpsampler
from model.blocks.pixels import ESA, ContrastAttention, PointwiseConv, gelu, join_outputs
from model.common import DepthwiseConv, NetworkSpec, check_images, conv, in_channels_last, zero_pad
from model.ops.fast import float32_by_llvm, is_for_llvm

COPIES = 4  # of the image, side by side in the first channels


class BSConv(nn.Module):
    """Blueprint separable convolution (BSConv-U): a 1x1 convolution without bias, then a depthwise 3x3."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.pw = conv(in_channels, out_channels, 1, bias=False)
        self.dw = DepthwiseConv(out_channels, 3)

    def forward(self, x: Tensor, act: str = '', *, plus: Tensor | None = None) -> Tensor:
        """Maps (N, C, H, W), with what `depthwise` takes behind it."""
        return self.dw(self.pw(x), act, plus=plus)


class SmallerBSConv(nn.Module):
    """`BSConv` at every second pixel that has all its neighbours."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pw = conv(channels, channels, 1, bias=False)
        self.dw = nn.Conv2d(channels, channels, 3, stride=2, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.dw(self.pw(x))


class BlueprintESA(nn.Module):
    """Enhanced spatial attention as `ESA`, with GELU between three blueprint convolutions at low resolution."""

    def __init__(self, n_feats: int) -> None:
        super().__init__()
        hidden = max(n_feats // 4, 1)
        self.conv1 = conv(n_feats, hidden, 1)
        self.conv_f = conv(hidden, hidden, 1)
        self.conv_max = BSConv(hidden, hidden)
        self.conv2 = SmallerBSConv(hidden)
        self.conv3 = BSConv(hidden, hidden)
        self.conv3_ = BSConv(hidden, hidden)
        self.conv4 = conv(hidden, n_feats, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.conv1(x)
        low = self.conv_max(F.max_pool2d(self.conv2(skip), 7, 3), 'gelu')
        low = self.conv3_(self.conv3(low, 'gelu'))
        low = F.interpolate(low, x.shape[2:], mode='bilinear')
        return self.conv4(self.conv_f(skip, plus=low), weighed=x)


class ESDB(nn.Module):
    """Efficient separable distillation block (figure 3): half of the channels are kept at each of three steps.

    The steps refine all of them. What was kept, and what a last convolution makes of the rest, are mixed and weighed by
    pixels and by channels, plus the input.
    """

    def __init__(self, n_feats: int) -> None:
        super().__init__()
        kept = n_feats // 2
        self.c1_d, self.c1_r = PointwiseConv(n_feats, kept), BSConv(n_feats, n_feats)
        self.c2_d, self.c2_r = PointwiseConv(n_feats, kept), BSConv(n_feats, n_feats)
        self.c3_d, self.c3_r = PointwiseConv(n_feats, kept), BSConv(n_feats, n_feats)
        self.c4 = BSConv(n_feats, kept)
        self.c5 = conv(4 * kept, n_feats, 1)
        self.esa = BlueprintESA(n_feats)
        self.cca = ContrastAttention(n_feats)

    def forward(self, x: Tensor) -> Tensor:
        return self.cca(self.esa(self.c5(self.distilled(x))), plus=x)

    def distilled(self, x: Tensor) -> Tensor:
        """What is kept at all steps and made of the rest, side by side."""
        steps = (self.c1_d, self.c1_r), (self.c2_d, self.c2_r), (self.c3_d, self.c3_r)

        def separable_distillation(x: Tensor, *_: object) -> Tensor:
            parts = []
            for keep, refine in steps:
                parts.append(keep(x, gelu=True))
                x = refine(x, 'gelu', plus=x)
            return torch.cat((*parts, self.c4(x, 'gelu')), 1)

        if not is_for_llvm(x):
            return separable_distillation(x)
        weights = [weight for layer in (*chain(*steps), self.c4) for weight in layer.parameters()]
        return float32_by_llvm('separable_distillation', separable_distillation, x, *weights)


class LastLayers(nn.Module):
    """The upsampler, a level deeper in the official names."""

    def __init__(self, scale: int, n_feats: int) -> None:
        super().__init__()
        self.upsampleOneStep = DirectUpsampler(scale, n_feats)

    def forward(self, x: Tensor) -> Tensor:
        return self.upsampleOneStep(x)


class BSRN(nn.Module):
    """BSRN of figure 2, without settings the one of the paper.

    Args:
        scale: 2, 3 or 4.
        n_resblocks: blocks, whose outputs are all joined at the end.
        n_feats: feature channels.

    Maps (N, 3, H, W) in [0, 1] to (N, 3, scale * H, scale * W), each image on its own.

    Raises:
        UserError: a single feature channel.
    """

    def __init__(self, scale: int, n_resblocks: int = 8, n_feats: int = 64) -> None:
        super().__init__()
        if n_feats < 2:
            raise UserError(f'--n_feats {n_feats}: half of them is kept at every step, so choose 2 or more.')
        self.scale = scale
        self.fea_conv = BSConv(3 * COPIES, n_feats)
        self.names = [f'B{i + 1}' for i in range(n_resblocks)]
        for name in self.names:
            self.add_module(name, ESDB(n_feats))
        self.c1 = conv(n_resblocks * n_feats, n_feats, 1)
        self.c2 = BSConv(n_feats, n_feats)
        self.upsampler = LastLayers(scale, n_feats)

    def forward(self, x: Tensor) -> Tensor:
        check_images(x)
        height, width = x.shape[2:]
        x = in_channels_last(zero_pad(x, 1, ESA.AT_LEAST))
        first = self.fea_conv(torch.cat([x] * COPIES, 1))
        x = join_outputs([self.get_submodule(name) for name in self.names], first, self.c1)
        return self.upsampler(self.c2(gelu(x), plus=first))[..., : self.scale * height, : self.scale * width]


def recognise(state: Mapping[str, Tensor]) -> dict[str, object] | None:
    """Scale and all settings of BSRN's weights; None for those of another network."""
    last = 'upsampler.upsampleOneStep.0.weight'
    if 'B1.c1_r.pw.weight' not in state or last not in state:
        return None
    outputs, n_feats = state[last].shape[:2]
    return {
        'scale': math.isqrt(outputs // 3),
        'n_resblocks': state['c1.weight'].shape[1] // n_feats,
        'n_feats': n_feats,
    }


NETWORKS = {  # parameters and multiply-adds at a 1280x720 output, x2 / x3 / x4
    'BSRN': NetworkSpec(  # 332k 71.9G / 340k 32.9G / 352k 19.2G
        BSRN,
        (2, 3, 4),
        tiling_exact=False,
        upsampler_prefix='upsampler.',
        checkpoint_blocks=(ESDB,),
        recognise=recognise,
    ),
}
