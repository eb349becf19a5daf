"""Blocks that several networks share, and the facts that a network file declares beside its class."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from error import UserError as UserError

RGB_MEAN = (0.4488, 0.4371, 0.4040)  # of DIV2K's training images, in [0, 1] (EDSR, section 4.1)

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    'relu': lambda: nn.ReLU(inplace=True),
    'leaky_relu': lambda: nn.LeakyReLU(0.2, inplace=True),
    'prelu': nn.PReLU,
    'gelu': nn.GELU,
    'silu': lambda: nn.SiLU(inplace=True),
}


@dataclass(frozen=True)
class Network:
    """What the program has to know of a network besides its class.

    Attributes:
        build: the class, called as `build(scale, **settings)`.
        scales: the factors it can enlarge by.
        settings: what this name changes of the class's own defaults.
        value_range: the pixel values it was made for, as (black, white). A network with an `rgb_range` setting is fed
            (0, rgb_range) instead.
        tiling_exact: tiles that overlap by more than its reach give the result of the whole image.
        upsampler: prefix of the parameters that depend on the scale; all others carry over to another scale.
        half: the types below float32 that autocast may use without a visible loss.
        recognise: from a state dict of this network in any sizes, scale and settings as far as keys and shapes show
            them; None for the weights of another network.
    """

    build: Callable[..., nn.Module]
    scales: tuple[int, ...]
    settings: Mapping[str, object] = field(default_factory=dict)
    value_range: tuple[float, float] = (0.0, 1.0)
    tiling_exact: bool = True
    upsampler: str = 'tail.0.'
    half: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16)
    recognise: Callable[[Mapping[str, Tensor]], dict[str, object] | None] = lambda state: None


def how_many(state: Mapping[str, Tensor], prefix: str) -> int:
    """Number of modules in the list at `prefix` (which ends in the dot before their index)."""
    return len({key.removeprefix(prefix).split('.')[0] for key in state if key.startswith(prefix)})


def check_images(x: Tensor, n_colors: int = 3) -> None:
    """Refuse what is not a batch of images (N, n_colors, H, W)."""
    if x.dim() != 4 or x.shape[1] != n_colors or 0 in x.shape:
        raise UserError(
            f'This network takes a batch of images of {n_colors} channels, (N, {n_colors}, H, W), '
            f'and was given {tuple(x.shape)}: convert them first.'
        )


def mirror_pad(x: Tensor, multiple: int) -> Tensor:
    """(N, C, H, W) grown right and below to multiples of `multiple` by its mirror image, the edge pixel repeated.

    An image smaller than its padding is mirrored again and again.
    """
    for axis in (2, 3):
        size = x.shape[axis]
        if size % multiple:
            position = torch.arange(size + -size % multiple, device=x.device) % (2 * size)
            x = x.index_select(axis, torch.minimum(position, 2 * size - 1 - position))
    return x


def rgb_to_ycbcr(rgb: Tensor) -> Tensor:
    """ITU-R BT.601 with foot and head room, as MATLAB's rgb2ycbcr: (N, 3, H, W) in [0, 1] to (N, 3, H, W) in [0, 1]."""
    r, g, b = rgb.unbind(1)
    y = (65.481 * r + 128.553 * g + 24.966 * b + 16) / 255
    cb = (-37.797 * r - 74.203 * g + 112.0 * b + 128) / 255
    cr = (112.0 * r - 93.786 * g - 18.214 * b + 128) / 255
    return torch.stack((y, cb, cr), 1)


def ycbcr_to_rgb(ycbcr: Tensor) -> Tensor:
    """Inverse of `rgb_to_ycbcr`."""
    y, cb, cr = (ycbcr * 255).unbind(1)
    y, cb, cr = (y - 16) / 219, (cb - 128) / 224, (cr - 128) / 224
    r = y + 1.402 * cr
    g = y - 0.344136 * cb - 0.714136 * cr
    b = y + 1.772 * cb
    return torch.stack((r, g, b), 1)


def conv(in_channels: int, out_channels: int, kernel_size: int, bias: bool = True, dilation: int = 1) -> nn.Conv2d:
    """Convolution that keeps height and width (zero padding)."""
    padding = dilation * (kernel_size // 2)
    return nn.Conv2d(in_channels, out_channels, kernel_size, padding=padding, bias=bias, dilation=dilation)


def activation(name: str) -> nn.Module:
    """Activation by its name in `ACTIVATIONS`."""
    if name not in ACTIVATIONS:
        raise UserError(f'Unknown activation {name!r}: choose one of {", ".join(ACTIVATIONS)}.')
    return ACTIVATIONS[name]()


class MeanShift(nn.Conv2d):
    """Adds `sign` times the mean colour, scaled to `rgb_range`: a frozen 1x1 convolution, part of the state dict."""

    def __init__(self, rgb_range: float, n_colors: int, sign: int) -> None:
        super().__init__(n_colors, n_colors, kernel_size=1)
        mean = torch.tensor(RGB_MEAN)
        if n_colors == 1:
            mean = rgb_to_ycbcr(mean.view(1, 3, 1, 1))[0, :1, 0, 0]
        self.weight = nn.Parameter(torch.eye(n_colors).view_as(self.weight), requires_grad=False)
        self.bias = nn.Parameter(sign * rgb_range * mean, requires_grad=False)


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
        return x + self.body(x) * self.res_scale


class Upsampler(nn.Sequential):
    """Sub-pixel upsampling (ESPCN): 3x3 convolution and PixelShuffle, once per factor 2, or once for 3."""

    def __init__(self, scale: int, n_feats: int) -> None:
        steps = [scale] if scale == 3 else [2] * (scale.bit_length() - 1)
        layers: list[nn.Module] = []
        for step in steps:
            layers += [conv(n_feats, n_feats * step**2, 3), nn.PixelShuffle(step)]
        super().__init__(*layers)


class DirectUpsampler(nn.Sequential):
    """One 3x3 convolution to all pixels of the output, and PixelShuffle, whatever the scale."""

    def __init__(self, scale: int, n_feats: int) -> None:
        super().__init__(conv(n_feats, 3 * scale**2, 3), nn.PixelShuffle(scale))


class ChannelNorm(nn.Module):
    """Layer normalisation over the channels of each pixel, (N, C, H, W), biased variance, in float32 or more."""

    def __init__(self, n_feats: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_feats))
        self.bias = nn.Parameter(torch.zeros(n_feats))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        x = x - x.mean(1, keepdim=True)
        variance = x.square().mean(1, keepdim=True)  # on a CPU five times as fast as `var_mean` over channels
        return x * (variance + self.eps).rsqrt() * self.weight.view(-1, 1, 1) + self.bias.view(-1, 1, 1)


class GatedFFN(nn.Module):
    """Gated feed-forward network with a depthwise 3x3 (Restormer, section 3.2): project_out(gelu(a) * b)."""

    def __init__(self, n_feats: int, hidden: int) -> None:
        super().__init__()
        self.project_in = conv(n_feats, 2 * hidden, 1, bias=False)
        self.dwconv = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden, bias=False)
        self.project_out = conv(hidden, n_feats, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.dwconv(self.project_in(x)).chunk(2, 1)
        return self.project_out(F.gelu(gate) * value)


class TransposedAttention(nn.Module):
    """Attention between channels (Restormer, section 3.1): each head's map is (C / heads) x (C / heads).

    A network's own class decides which pixels a map is computed from.
    """

    def __init__(self, n_feats: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.temperature = nn.Parameter(torch.ones(n_heads, 1, 1))
        self.qkv = conv(n_feats, 3 * n_feats, 1, bias=False)
        self.qkv_dwconv = nn.Conv2d(3 * n_feats, 3 * n_feats, 3, padding=1, groups=3 * n_feats, bias=False)
        self.project_out = conv(n_feats, n_feats, 1, bias=False)

    def weights(self, logits: Tensor) -> Tensor:
        """What makes a map of the scaled cosines."""
        return logits.softmax(-1)

    def attend(self, qkv: Tensor) -> Tensor:
        """Tokens of one group of pixels: (B, 3 * C, L) to (B, C, L). The norms over pixels are in float32 or more."""
        q, k, v = qkv.unflatten(1, (3, self.n_heads, -1)).unbind(1)
        wide = torch.promote_types(qkv.dtype, torch.float32)
        cosines = F.normalize(q.to(wide), dim=-1) @ F.normalize(k.to(wide), dim=-1).transpose(-2, -1)
        return (self.weights(cosines * self.temperature) @ v).flatten(1, 2)
