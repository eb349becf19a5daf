"""Blocks of the EDSR family: mean colour, residual block, upsamplers, the last layers as one."""

import math
from collections.abc import Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from error import UserError
from model.common import (
    RGB_MEAN,
    Float32Conv,
    activated,
    activation,
    at_least_float32,
    conv,
    full_precision,
    how_many,
    rgb_to_ycbcr,
    shape_of,
)


def mean_colour(n_colors: int) -> Tensor:
    """Mean of DIV2K's training images in [0, 1], of RGB (3,) or of luma (1,)."""
    mean = torch.tensor(RGB_MEAN)
    return mean if n_colors == 3 else rgb_to_ycbcr(mean.view(1, 3, 1, 1))[0, :1, 0, 0]


class MeanShift(Float32Conv):
    """Adds `sign` times the mean colour, scaled to `rgb_range`: a frozen 1x1 convolution, part of the state dict."""

    def __init__(self, rgb_range: float, n_colors: int, sign: int) -> None:
        super().__init__(n_colors, n_colors, kernel_size=1)
        self.weight = nn.Parameter(torch.eye(n_colors).view_as(self.weight), requires_grad=False)
        self.bias = nn.Parameter(sign * rgb_range * mean_colour(n_colors), requires_grad=False)


def mean_shifts(rgb_range: float, n_colors: int, shift_mean: bool) -> tuple[nn.Module, nn.Module]:
    """First and last layer of the EDSR family: subtract the mean colour and add it again."""
    if n_colors not in (1, 3):
        raise UserError(f'--n_colors {n_colors}: images have 3 colours (RGB) or 1 (luma).')
    if not shift_mean:
        return nn.Identity(), nn.Identity()
    return MeanShift(rgb_range, n_colors, -1), MeanShift(rgb_range, n_colors, 1)


class ResBlock(nn.Module):
    """Convolution, activation, convolution, times `res_scale`, plus the input (EDSR, figure 2c)."""

    def __init__(self, n_feats: int, act: str = 'relu', res_scale: float = 1.0, dilation: int = 1) -> None:
        super().__init__()
        first, second = (conv(n_feats, n_feats, 3, dilation=dilation) for _ in range(2))
        self.body = nn.Sequential(first, activation(act), second)
        self.res_scale = res_scale

    def forward(self, x: Tensor) -> Tensor:
        first, act, second = self.body
        return second(activated(first, act, x), plus=x, factor=self.res_scale)


class Upsampler(nn.Sequential):
    """Sub-pixel upsampling (ESPCN): 3x3 convolution and PixelShuffle, once per factor 2, or once for 3."""

    def __init__(self, scale: int, n_feats: int) -> None:
        steps = [scale] if scale == 3 else [2] * (scale.bit_length() - 1)
        layers: list[nn.Module] = []
        for step in steps:
            layers += [conv(n_feats, n_feats * step**2, 3), nn.PixelShuffle(step)]
        super().__init__(*layers)


def as_one(first: nn.Conv2d, last: nn.Conv2d) -> tuple[Tensor, Tensor]:
    """Of two 3x3 convolutions around a pixel shuffle the 5x5 convolution that comes before it instead of both.

    Its weight is (colours * scale^2, C, 5, 5). It is found from what both answer to one pixel of each channel, and its
    bias from what they answer to none.
    """
    scale = math.isqrt(first.out_channels // last.in_channels)

    def answer(maps: Tensor, bias: Tensor | None) -> Tensor:
        return F.pixel_unshuffle(F.conv2d(F.pixel_shuffle(maps, scale), last.weight, bias, padding=1), scale)

    pixels = F.pad(first.weight.flip(2, 3).transpose(0, 1), (1, 1, 1, 1))
    weight = answer(pixels, None).transpose(0, 1).flip(2, 3)
    bias = answer(first.get_parameter('bias').view(1, -1, 1, 1).expand(-1, -1, 3, 3), last.bias)[0, :, 1, 1]
    return weight.reshape(last.out_channels * scale**2, first.in_channels, 5, 5), bias


class Tail(nn.Sequential):
    """Last layers of the EDSR family: `Upsampler`, and a 3x3 convolution to pixels, (N, C, H, W) to (N, colours, ...).

    Between the last two convolutions stands a rearrangement and nothing else, so that together they are one 5x5
    convolution with few outputs, at a small part of the cost and memory. It differs only in the outermost pixels, where
    the map in between ends; these are found in two steps.
    """

    def __init__(self, scale: int, n_feats: int, n_colors: int) -> None:
        super().__init__(Upsampler(scale, n_feats), Float32Conv(n_feats, n_colors, 3))

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == 'meta':  # operations are counted: those of the published network
            return super().forward(x)
        *steps, first, shuffle = self[0].children()
        last = self[1]
        for step in steps:
            x = step(x)

        def in_two_steps(x: Tensor) -> Tensor:
            return last(shuffle(first(x)))

        with full_precision(x):
            x = at_least_float32(x)
            y = shuffle(F.conv2d(x, *as_one(cast(nn.Conv2d, first), cast(nn.Conv2d, last)), padding=2))
            top, bottom = in_two_steps(x[:, :, :2])[:, :, :1], in_two_steps(x[:, :, -2:])[:, :, -1:]
            left, right = in_two_steps(x[..., :2])[..., :1], in_two_steps(x[..., -2:])[..., -1:]
        return torch.cat((left, torch.cat((top, y[:, :, 1:-1], bottom), 2)[..., 1:-1], right), 3)


def recognise_ends(state: Mapping[str, Tensor]) -> dict[str, object] | None:
    """Settings that the first and last layers of the EDSR family show; None if these layers are not there.

    They are `scale`, `n_feats`, `n_colors`, `shift_mean` and, where the mean is shifted, `rgb_range`.
    """
    head, upsampler = shape_of(state, 'head.0.weight'), shape_of(state, 'tail.0.0.weight')
    if len(head) != 4 or len(upsampler) != 4 or head[1] not in (1, 3) or 'tail.1.weight' not in state:
        return None
    n_feats, n_colors = head[:2]
    if upsampler[0] not in (4 * n_feats, 9 * n_feats):
        return None
    scale = 3 if upsampler[0] == 9 * n_feats else 2 ** how_many(state, 'tail.0.')
    shift_mean = shape_of(state, 'sub_mean.bias') == (n_colors,)
    found = {'scale': scale, 'n_feats': n_feats, 'n_colors': n_colors, 'shift_mean': shift_mean}
    if shift_mean and not state['sub_mean.bias'].is_meta:
        shown = -float(state['sub_mean.bias'][0] / mean_colour(n_colors)[0])
        # The number that was typed: float32 keeps 6 digits of it, float16 and bfloat16 3 and 2.
        usual = next((white for white in (1.0, 255.0) if math.isclose(shown, white, rel_tol=2**-7)), shown)
        found['rgb_range'] = float(f'{usual:.6g}')
    return found


class DirectUpsampler(nn.Sequential):
    """One 3x3 convolution to all pixels of the output, and PixelShuffle, whatever the scale."""

    def __init__(self, scale: int, n_feats: int) -> None:
        super().__init__(Float32Conv(n_feats, 3 * scale**2, 3), nn.PixelShuffle(scale))
