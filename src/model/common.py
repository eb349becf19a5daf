"""Blocks that several networks share, and the facts that a network file declares beside its class."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

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


def shape_of(state: Mapping[str, Tensor], key: str) -> tuple[int, ...]:
    """Shape of the tensor at `key`; () if there is none."""
    return tuple(state[key].shape) if key in state else ()


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


def mean_colour(n_colors: int) -> Tensor:
    """Mean of DIV2K's training images in [0, 1], of RGB (3,) or of luma (1,)."""
    mean = torch.tensor(RGB_MEAN)
    return mean if n_colors == 3 else rgb_to_ycbcr(mean.view(1, 3, 1, 1))[0, :1, 0, 0]


class MeanShift(nn.Conv2d):
    """Adds `sign` times the mean colour, scaled to `rgb_range`: a frozen 1x1 convolution, part of the state dict."""

    def __init__(self, rgb_range: float, n_colors: int, sign: int) -> None:
        super().__init__(n_colors, n_colors, kernel_size=1)
        self.weight = nn.Parameter(torch.eye(n_colors).view_as(self.weight), requires_grad=False)
        self.bias = nn.Parameter(sign * rgb_range * mean_colour(n_colors), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        with full_precision(x):  # else bfloat16 rounds the finished image (LCoAN-small x2: -0.02 dB; like this -0.006)
            return super().forward(widen(x))


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
        # To the digits that float32 keeps, so that it is the number that was typed.
        found['rgb_range'] = float(f'{-float(state["sub_mean.bias"][0] / mean_colour(n_colors)[0]):.6g}')
    return found


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
        variance, mean = torch.var_mean(x, 1, correction=0, keepdim=True)
        return (x - mean) * (variance + self.eps).rsqrt() * self.weight.view(-1, 1, 1) + self.bias.view(-1, 1, 1)


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
        """Tokens of one group of pixels: (B, 3 * C, L) to (B, C, L)."""
        q, k, v = qkv.unflatten(1, (3, self.n_heads, -1)).unbind(1)
        cosines = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        return (self.weights(cosines * self.temperature) @ v).flatten(1, 2)


def full_precision(x: Tensor) -> AbstractContextManager[object]:
    """No autocast on the device of `x` for a while: for what decides an argmax, or averages over many pixels."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def widen(x: Tensor) -> Tensor:
    """`x` in float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows of each image: (N, L, C) and (N, ...) to (N, ..., C)."""
    n, length, channels = x.shape
    offset = torch.arange(n, device=x.device).view(-1, *[1] * (index.dim() - 1)) * length
    rows = x.reshape(-1, channels).index_select(0, (index + offset).flatten())
    return rows.view(*index.shape, channels)


def inverse_of(order: Tensor) -> Tensor:
    """Where each number stands in the permutations `order` (..., L) of 0 to L - 1."""
    places = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)


# Attention within windows of pixels sorted by a code (NLSN, LCoAN).


class Pattern(NamedTuple):
    """Which pixels attend to which, and how much. R: rounds, L: pixels, W: windows, w: window size."""

    order: Tensor  # (N, R, W * w) int64: pixels sorted by code, the last window filled up
    inverse: Tensor  # (N, R, L) int64: where a pixel stands in `order`
    attention: Tensor  # (N, R, W, w, 3 * w): softmaxed map over a window and its neighbours
    round_weights: Tensor  # (N, R, L, 1): share of each round in a pixel's result


def with_neighbours(windows: Tensor) -> Tensor:
    """Each window followed by the previous and the next one, cyclically: (N, R, W, w, C) to (N, R, W, 3 * w, C)."""
    return torch.cat((windows, windows.roll(1, 2), windows.roll(-1, 2)), 3)


def find_pattern(embedding: Tensor, codes: Tensor, window_size: int) -> Pattern:
    """Attention map of the matching embedding (N, L, dim) within windows of pixels sorted by their codes (N, R, L).

    Queries are the raw embedding, keys the normalised one, so that a query's length acts as its temperature. The last
    window is filled up by the last pixels once more, cyclically where there are too few. Rounds are weighted by the
    softmax of their scores, the logarithms of the sums of exponentials. Logits are in float32 or more.
    """
    order = codes.argsort(dim=-1, stable=True)
    inverse = inverse_of(order)
    length = order.shape[-1]
    padding = torch.arange(-(-length % window_size), 0, device=order.device) % length
    order = torch.cat((order, order[..., padding]), -1)

    with full_precision(embedding):
        queries = take_rows(widen(embedding), order).unflatten(2, (-1, window_size))
        keys = with_neighbours(F.normalize(queries, dim=-1, eps=5e-5))
        logits = queries @ keys.transpose(-2, -1)
        score = logits.logsumexp(-1).flatten(2).gather(-1, inverse)
        attention, round_weights = logits.softmax(-1), score.softmax(1).unsqueeze(-1)
    return Pattern(order, inverse, attention.to(embedding.dtype), round_weights.to(embedding.dtype))


def attend(values: Tensor, pattern: Pattern) -> Tensor:
    """Means of the values (N, L, C), weighted by the map of the pattern and by its rounds: (N, L, C)."""
    windows = take_rows(values, pattern.order).unflatten(2, (-1, pattern.attention.shape[-2]))
    out = (pattern.attention @ with_neighbours(windows)).flatten(1, 3)
    rounds = torch.arange(pattern.order.shape[1], device=values.device).view(1, -1, 1) * pattern.order.shape[-1]
    return (take_rows(out, pattern.inverse + rounds) * pattern.round_weights).sum(1)
