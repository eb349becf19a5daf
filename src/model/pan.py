"""PAN (ECCVW 2020): attention that gives every value of a map a factor of its own, also after the enlargement.

Zhao, Kong, He, Qiao, Dong, "Efficient Image Super-Resolution Using Pixel Attention", https://arxiv.org/abs/2010.01073.
Official weights load with `strict=True`. Those of x2 and x3 have the same shapes, so that nothing in them shows the
scale.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from error import UserError
from model.common import Float32Conv, NetworkSpec, check_images, check_least, conv, how_many, in_fast_memory, shape_of

SLOPE = 0.2  # of all LeakyReLUs


class PixelAttention(nn.Module):
    """Each value times a factor in (0, 1) that is found from the channels of its pixel (figure 2c)."""

    def __init__(self, n_feats: int) -> None:
        super().__init__()
        self.conv = conv(n_feats, n_feats, 1)

    def forward(self, x: Tensor, slope: float = 1.0) -> Tensor:
        """Maps (N, C, H, W), with an activation of this slope behind it (`fused_conv`)."""
        return self.conv(x, weighed=x, slope=slope)


class PAConv(nn.Module):
    """Two convolutions, and between them the factors of pixel attention, found from the input."""

    def __init__(self, n_feats: int) -> None:
        super().__init__()
        self.k2 = conv(n_feats, n_feats, 1)
        self.k3 = conv(n_feats, n_feats, 3, bias=False)
        self.k4 = conv(n_feats, n_feats, 3, bias=False)

    def forward(self, x: Tensor, slope: float) -> Tensor:
        """As `PixelAttention`."""
        return self.k4(self.k2(x, weighed=self.k3(x)), slope=slope)


class SCPA(nn.Module):
    """Self-calibrated block with pixel attention (figure 3): two branches of half the channels, plus the input."""

    def __init__(self, n_feats: int) -> None:
        super().__init__()
        half = n_feats // 2
        self.conv1_a = conv(n_feats, half, 1, bias=False)
        self.conv1_b = conv(n_feats, half, 1, bias=False)
        self.k1 = nn.Sequential(conv(half, half, 3, bias=False))
        self.PAConv = PAConv(half)
        self.conv3 = conv(2 * half, n_feats, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        a = self.k1[0](self.conv1_a(x, slope=SLOPE), slope=SLOPE)
        b = self.PAConv(self.conv1_b(x, slope=SLOPE), slope=SLOPE)
        return self.conv3(torch.cat((a, b), 1), plus=x)


class PAN(nn.Module):
    """PAN of figure 2, without settings the one of the paper.

    Args:
        scale: 2, 3 or 4.
        n_resblocks: SCPA blocks.
        n_feats: feature channels.
        n_up_feats: feature channels from the first enlargement on.

    Maps (N, 3, H, W) in [0, 1] to (N, 3, scale * H, scale * W).

    Raises:
        UserError: a single feature channel.
    """

    def __init__(self, scale: int, n_resblocks: int = 16, n_feats: int = 40, n_up_feats: int = 24) -> None:
        super().__init__()
        if n_feats < 2:
            raise UserError(f'--n_feats {n_feats}: the branches have half of them each, so choose 2 or more.')
        check_least('n_up_feats', n_up_feats, 1)
        self.scale = scale
        self.steps = (2, 2) if scale == 4 else (scale,)
        self.conv_first = conv(3, n_feats, 3)
        self.SCPA_trunk = nn.Sequential(*(SCPA(n_feats) for _ in range(n_resblocks)))
        self.trunk_conv = conv(n_feats, n_feats, 3)
        for i in range(len(self.steps)):
            self.add_module(f'upconv{i + 1}', conv(n_up_feats if i else n_feats, n_up_feats, 3))
            self.add_module(f'att{i + 1}', PixelAttention(n_up_feats))
            self.add_module(f'HRconv{i + 1}', conv(n_up_feats, n_up_feats, 3))
        self.conv_last = Float32Conv(n_up_feats, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        check_images(x)
        x = in_fast_memory(x)
        y = self.conv_first(x)
        y = self.trunk_conv(self.SCPA_trunk(y), plus=y)
        for i, factor in enumerate(self.steps):
            upconv, att, hr_conv = (self.get_submodule(f'{name}{i + 1}') for name in ('upconv', 'att', 'HRconv'))
            y = upconv(F.interpolate(y, scale_factor=factor, mode='nearest'))
            y = hr_conv(att(y, SLOPE), slope=SLOPE)
        return self.conv_last(y) + F.interpolate(x, scale_factor=self.scale, mode='bilinear')


def recognise(state: Mapping[str, Tensor]) -> dict[str, object] | None:
    """Scale, which may be one of two, and all settings of PAN's weights; None for those of another network."""
    if 'SCPA_trunk.0.PAConv.k2.weight' not in state or 'upconv1.weight' not in state:
        return None
    n_up_feats, n_feats = shape_of(state, 'upconv1.weight')[:2]
    return {
        'scale': 4 if 'upconv2.weight' in state else (2, 3),
        'n_resblocks': how_many(state, 'SCPA_trunk.'),
        'n_feats': n_feats,
        'n_up_feats': n_up_feats,
    }


NETWORKS = {  # parameters and multiply-adds at a 1280x720 output, x2 / x3 / x4
    'PAN': NetworkSpec(  # 261k 70.5G / 261k 39.1G / 272k 28.2G
        PAN,
        (2, 3, 4),
        upsampler_prefix=('upconv2.', 'att2.', 'HRconv2.'),
        checkpoint_blocks=(SCPA,),
        recognise=recognise,
    ),
}
