"""Blocks that several networks share, and the facts that a network file declares beside its class."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from error import UserError as UserError
from model.cached_attention import CACHED_LOGITS, cached_attention

RGB_MEAN = (0.4488, 0.4371, 0.4040)  # of DIV2K's training images, in [0, 1] (EDSR, section 4.1)

MOST_WINDOW = 64  # pixels along the side of an attention window

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
        half: the types below float32 that autocast may use without a visible loss. Of float16 this has to be shown:
            nothing keeps the features of a network without norms below 65504.
        blocks: classes of the modules that activation checkpointing computes again.
        recognise: from a state dict of this network in any sizes, scale and settings as far as keys and shapes show
            them; None for the weights of another network.
    """

    build: Callable[..., nn.Module]
    scales: tuple[int, ...]
    settings: Mapping[str, object] = field(default_factory=dict)
    value_range: tuple[float, float] = (0.0, 1.0)
    tiling_exact: bool = True
    upsampler: str = 'tail.0.'
    half: tuple[torch.dtype, ...] = (torch.bfloat16,)
    blocks: tuple[type[nn.Module], ...] = ()
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


def check_divides(option: str, divisor: int, n_feats: int) -> None:
    """Refuse a setting that does not divide the number of feature channels."""
    if n_feats % divisor:
        raise UserError(f'--{option} {divisor} does not divide --n_feats {n_feats}: choose a divisor.')


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


def zero_pad(x: Tensor, multiple: int, at_least: int = 1) -> Tensor:
    """(N, C, H, W) grown right and below by zeros to multiples of `multiple` that are not below `at_least`."""
    height, width = ((max(size, at_least) + multiple - 1) // multiple * multiple for size in x.shape[2:])
    return F.pad(x, (0, width - x.shape[3], 0, height - x.shape[2]))


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


def in_fast_memory(x: Tensor) -> Tensor:
    """On a CPU in channels_last memory, where convolutions are up to a tenth faster; elsewhere as it is."""
    return x.contiguous(memory_format=torch.channels_last) if x.device.type == 'cpu' else x


def full_precision(x: Tensor) -> AbstractContextManager[object]:
    """No autocast on the device of `x` for a while: for what decides an argmax, or averages over many pixels."""
    device = x.device.type
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if on else nullcontext()


def widen(x: Tensor) -> Tensor:
    """`x` in float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class WideConv(nn.Conv2d):
    """3x3 or 1x1 convolution in float32 or more, also under autocast: for pixels, of which bfloat16 keeps 8 bits."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2)

    def forward(self, x: Tensor) -> Tensor:
        with full_precision(x):
            return super().forward(widen(x))


def activation(name: str) -> nn.Module:
    """Activation by its name in `ACTIVATIONS`."""
    if name not in ACTIVATIONS:
        raise UserError(f'Unknown activation {name!r}: choose one of {", ".join(ACTIVATIONS)}.')
    return ACTIVATIONS[name]()


def mean_colour(n_colors: int) -> Tensor:
    """Mean of DIV2K's training images in [0, 1], of RGB (3,) or of luma (1,)."""
    mean = torch.tensor(RGB_MEAN)
    return mean if n_colors == 3 else rgb_to_ycbcr(mean.view(1, 3, 1, 1))[0, :1, 0, 0]


class MeanShift(WideConv):
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
        return torch.add(x, self.body(x), alpha=self.res_scale)


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
        super().__init__(Upsampler(scale, n_feats), WideConv(n_feats, n_colors, 3))

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
            x = widen(x)
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
        # To the digits that float32 keeps, so that it is the number that was typed.
        found['rgb_range'] = float(f'{-float(state["sub_mean.bias"][0] / mean_colour(n_colors)[0]):.6g}')
    return found


class DirectUpsampler(nn.Sequential):
    """One 3x3 convolution to all pixels of the output, and PixelShuffle, whatever the scale."""

    def __init__(self, scale: int, n_feats: int) -> None:
        super().__init__(WideConv(n_feats, 3 * scale**2, 3), nn.PixelShuffle(scale))


def check_window(size: int) -> None:
    """Refuse windows whose masks, of size^4 entries, would fill the memory."""
    if size > MOST_WINDOW:
        raise UserError(f'--window_size {size} makes windows of {size}x{size} pixels: choose {MOST_WINDOW} or less.')


def hidden_width(n_feats: int, mlp_ratio: float) -> int:
    """Channels inside a feed-forward network: `n_feats` times `mlp_ratio`, rounded, at least one."""
    return max(1, round(n_feats * mlp_ratio))


def gelu(x: Tensor) -> Tensor:
    """GELU of maps (N, C, H, W) in channels_last memory, seen as contiguous (N, H, W, C), for which a CPU is faster."""
    return F.gelu(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class GELU(nn.Module):
    """See `gelu`."""

    def forward(self, x: Tensor) -> Tensor:
        return gelu(x)


class GatedFFN(nn.Module):
    """Gated feed-forward network with a depthwise 3x3 (Restormer, section 3.2): project_out(gelu(a) * b)."""

    def __init__(self, n_feats: int, hidden: int) -> None:
        super().__init__()
        self.project_in = conv(n_feats, 2 * hidden, 1, bias=False)
        self.dwconv = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden, bias=False)
        self.project_out = conv(hidden, n_feats, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        # One convolution a half: parts of the channels of one map are slow to work on in channels_last memory. The gate
        # is finished first, so that a CPU's cache has less to hold.
        first, second = self.project_in.weight.chunk(2), self.dwconv.weight.chunk(2)

        def half(i: int) -> Tensor:
            return F.conv2d(F.conv2d(x, first[i]), second[i], padding=1, groups=len(second[i]))

        gate = gelu(half(0))
        return self.project_out(gate * half(1))


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

    order: Tensor  # (N, R, (W + 2) * w) int64: pixels sorted by code, in a ring: last window, all windows, first window
    inverse: Tensor  # (N, R, L) int64: where a pixel stands in all windows
    attention: Tensor  # (N, R, W, w, 3 * w): softmaxed map over the previous window, a window itself and the next one
    round_weights: Tensor  # (N, R, L, 1): share of each round in a pixel's result


def with_neighbours(ring: Tensor, window_size: int) -> Tensor:
    """Each window between its neighbours: (N, R, (W + 2) * w, C) to (N, R, W, 3 * w, C), a view."""
    return ring.unfold(2, 3 * window_size, window_size).transpose(-2, -1)


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
    order = torch.cat((order[..., -window_size:], order, order[..., :window_size]), -1)

    with full_precision(embedding):
        ring = take_rows(widen(embedding), order)
        queries = ring[:, :, window_size:-window_size].unflatten(2, (-1, window_size))
        keys = with_neighbours(F.normalize(ring, dim=-1, eps=5e-5), window_size)
        logits = queries @ keys.transpose(-2, -1)
        attention = logits.softmax(-1)
        score = logits.amax(-1) - attention.amax(-1).log()  # both of the same key: what is left is the sum
        round_weights = score.flatten(2).gather(-1, inverse).softmax(1).unsqueeze(-1)
    return Pattern(order, inverse, attention.to(embedding.dtype), round_weights.to(embedding.dtype))


def attend(values: Tensor, pattern: Pattern) -> Tensor:
    """Means of the values (N, L, C), weighted by the map of the pattern and by its rounds: (N, L, C)."""
    n_windows, window_size = pattern.attention.shape[2:4]
    ring = take_rows(values, pattern.order)
    out = (pattern.attention @ with_neighbours(ring, window_size)).flatten(1, 3)
    rounds = torch.arange(ring.shape[1], device=values.device).view(1, -1, 1) * n_windows * window_size
    return (take_rows(out, pattern.inverse + rounds) * pattern.round_weights).sum(1)


# What OmniSR, ASID and DLGSANet are built of. Their maps are in channels_last memory, where a pixel is a row.


class PixelNorm(nn.Module):
    """Layer normalisation over the channels of each pixel, (N, C, H, W), for maps in channels_last memory."""

    def __init__(self, n_feats: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_feats))
        self.bias = nn.Parameter(torch.zeros(n_feats))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        pixels = x.permute(0, 2, 3, 1)
        return F.layer_norm(pixels, self.weight.shape, self.weight, self.bias, self.eps).permute(0, 3, 1, 2)


def to_tokens(x: Tensor, cell: tuple[int, int], strided: bool, parts: int = 1) -> Tensor:
    """Pixels by groups, those of a group in row-major order: (N, C, H, W) to (parts * N * groups, pixels, C / parts).

    The image is cut into cells of (height, width) pixels. A group is a cell or, with `strided`, the pixels at one place
    within all cells.
    """
    n, channels, height, width = x.shape
    rows, columns = height // cell[0], width // cell[1]
    x = x.permute(0, 2, 3, 1).reshape(n, rows, cell[0], columns, cell[1], parts, channels // parts)
    if strided:
        return x.permute(5, 0, 2, 4, 1, 3, 6).reshape(-1, rows * columns, channels // parts)
    return x.permute(5, 0, 1, 3, 2, 4, 6).reshape(-1, cell[0] * cell[1], channels // parts)


def to_map(tokens: Tensor, like: Tensor, cell: tuple[int, int], strided: bool, parts: int = 1) -> Tensor:
    """Inverse of `to_tokens`, with the height and width of `like`."""
    n, _, height, width = like.shape
    cells, channels = (height // cell[0], width // cell[1]), tokens.shape[-1]
    if strided:
        x = tokens.view(parts, n, *cell, *cells, channels).permute(1, 4, 2, 5, 3, 0, 6)
    else:
        x = tokens.view(parts, n, *cells, *cell, channels).permute(1, 2, 4, 3, 5, 0, 6)
    return x.reshape(n, height, width, parts * channels).permute(0, 3, 1, 2)


def attention_cell(x: Tensor, window_size: int, strided: bool) -> tuple[int, int]:
    """Cells that make groups of window_size x window_size pixels, contiguous or, strided, spread over the image."""
    return (x.shape[2] // window_size, x.shape[3] // window_size) if strided else (window_size, window_size)


class SqueezeExcitation(nn.Module):
    """Each channel times a factor in (0, 1) that is found from the means of all channels over the image."""

    def __init__(self, n_feats: int) -> None:
        super().__init__()
        hidden = max(n_feats // 4, 1)
        self.gate = nn.Sequential(
            nn.Identity(),
            nn.Linear(n_feats, hidden, bias=False),
            nn.SiLU(),
            nn.Linear(hidden, n_feats, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x.mean((2, 3))).unsqueeze(-1).unsqueeze(-1)


class LocalBlock(nn.Module):
    """Inverted bottleneck without expansion, its depthwise convolution gated by squeeze-excitation, plus the input."""

    def __init__(self, n_feats: int) -> None:
        super().__init__()
        self.fn = nn.Sequential(
            conv(n_feats, n_feats, 1),
            GELU(),
            nn.Conv2d(n_feats, n_feats, 3, padding=1, groups=n_feats),
            GELU(),
            SqueezeExcitation(n_feats),
            conv(n_feats, n_feats, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fn(x)


def length(x: Tensor) -> Tensor:
    """Euclidean norm over all pixels, in float32 or more, at least 1e-12: (..., pixels, C) to (..., 1, C)."""
    x = widen(x)
    return x.square().sum(-2, keepdim=True).clamp_min(1e-24).sqrt()  # in this order the gradient at 0 is finite


class ChannelAttention(TransposedAttention):
    """Attention between channels with a map for each group of pixels.

    A group is a cell of window_size x window_size pixels or, with `strided`, the pixels at one place within all cells.
    """

    def __init__(self, n_feats: int, n_heads: int, window_size: int, strided: bool) -> None:
        super().__init__(n_feats, n_heads)
        self.cell = (window_size, window_size)
        self.strided = strided

    def forward(self, x: Tensor) -> Tensor:
        parts = to_tokens(self.qkv_dwconv(self.qkv(x)), self.cell, self.strided, 3 * self.n_heads)
        q, k, v = parts.unflatten(0, (3, self.n_heads, -1)).unbind(0)  # (heads, groups, pixels, channels)
        cosines = q.transpose(2, 3) @ k / length(q).transpose(2, 3) / length(k)
        out = v @ self.weights(cosines * self.temperature.unsqueeze(1)).transpose(2, 3)
        return self.project_out(to_map(out, x, self.cell, self.strided, self.n_heads))


class SpatialGate(nn.Module):
    """Enhanced spatial attention (RFANet), here without ReLUs: each value times a factor in (0, 1).

    The factors are found at low resolution.

    Height and width are at least `SpatialGate.AT_LEAST`.
    """

    AT_LEAST = 15

    def __init__(self, n_feats: int) -> None:
        super().__init__()
        hidden = max(n_feats // 4, 16)
        self.conv1 = conv(n_feats, hidden, 1)
        self.conv_f = conv(hidden, hidden, 1)
        self.conv2 = nn.Conv2d(hidden, hidden, 3, stride=2)
        self.conv3 = conv(hidden, hidden, 3)
        self.conv4 = conv(hidden, n_feats, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.conv1(x)
        low = self.conv3(F.max_pool2d(self.conv2(skip), 7, 3))
        low = F.interpolate(low, x.shape[2:], mode='bilinear', align_corners=False)
        return x * self.conv4(low + self.conv_f(skip)).sigmoid()


# Windows of transformers (ATD, SwinIR).


def init_linear(module: nn.Module) -> None:
    """Linear layers as transformers start: normal weights of deviation 0.02 (truncated at 2), no bias."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


def position_table(size: int, n_heads: int) -> nn.Parameter:
    """What a window of `size` pixels a side learns of each relative position: ((2 * size - 1)^2, heads)."""
    return nn.Parameter(nn.init.trunc_normal_(torch.empty((2 * size - 1) ** 2, n_heads), std=0.02))


def flatten_image(image: Tensor) -> Tensor:
    """(N, C, H, W) to (N, H * W, C)."""
    return image.permute(0, 2, 3, 1).flatten(1, 2)


def unflatten_image(tokens: Tensor, height: int, width: int) -> Tensor:
    """(N, H * W, C) to (N, C, H, W): a view, in memory format channels_last."""
    return tokens.unflatten(1, (height, width)).permute(0, 3, 1, 2)


class TokenLinear(nn.Linear):
    """Linear layer (N, L, C) to (N, L, C'). A CPU is faster, by up to two, at the same as a 1x1 convolution."""

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_cpu:
            return super().forward(x)
        pixels = x.transpose(1, 2).unsqueeze(2)  # channels_last
        return F.conv2d(pixels, self.weight[:, :, None, None], self.bias).squeeze(2).transpose(1, 2)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    masks: Tensor | None = None,
    counts: Sequence[int] | None = None,
    scale: float | None = None,
) -> Tensor:
    """Multi-head softmax attention within windows.

    PyTorch's own kernel for a CPU is slow with the few channels of a head, and has no gradient by the mask: there it is
    for traces, which must not fix how many windows there are, and for maps beyond the cache. The memory-efficient
    kernels of CUDA want rows of whole 16 bytes, so heads of other sizes are filled up by zeros there.

    Args:
        q, k, v: (B, T, heads, d).
        masks: what to add to the logits, (heads, kinds, T, T), by kind of window.
        counts: windows of each kind, which stand together; all are of the only kind if None.
        scale: factor of the logits before a mask is added, d^-0.5 if None.

    Returns:
        (B, T, heads * d).
    """
    d = int(q.shape[-1])  # a plain number in a trace too
    scale = d**-0.5 if scale is None else scale
    traced = torch.jit.is_tracing() or torch.compiler.is_compiling()
    if q.is_cpu and not traced and q.shape[1] ** 2 <= CACHED_LOGITS:
        with full_precision(q):
            masks = masks if masks is None else widen(masks)
            kinds = torch.repeat_interleave(torch.tensor(counts)) if counts else torch.zeros(len(q), dtype=torch.int64)
            return cached_attention(widen(q), widen(k), widen(v), masks, kinds, scale).to(v.dtype).flatten(2)
    missing = -d % (16 // q.element_size()) if q.is_cuda else 0
    q, k, v = (F.pad(x, (0, missing)).transpose(1, 2) if missing else x.transpose(1, 2) for x in (q, k, v))
    mask_of: list[Tensor | None] = [None] if masks is None else [mask.unsqueeze(0) for mask in masks.unbind(1)]
    parts = zip(*([x] if counts is None else x.split(counts) for x in (q, k, v)), mask_of, strict=True)
    out = [F.scaled_dot_product_attention(q, k, v, mask, scale=scale) for q, k, v, mask in parts]
    return (out[0] if len(out) == 1 else torch.cat(out))[..., :d].transpose(1, 2).flatten(2)


def relative_positions(size: int, device: torch.device | None = None) -> Tensor:
    """Row of the position table for each pair (query, key) of a window's T = size^2 pixels: (T, T) int64 (Swin).

    With (dy, dx) = query - key it is (dy + size - 1) * (2 * size - 1) + dx + size - 1.
    """
    place = torch.arange(size, device=device)
    y, x = place.repeat_interleave(size), place.repeat(size)
    dy, dx = y[:, None] - y, x[:, None] - x
    return (dy + size - 1) * (2 * size - 1) + dx + size - 1


def look_up_bias(table: Tensor, index: Tensor) -> Tensor:
    """Rows `index` (T, T) of a position table ((2 * size - 1)^2, heads), as a mask (heads, T, T)."""
    return table.t().contiguous().index_select(1, index.flatten()).unflatten(1, index.shape)


def shift_masks(size: int, shift: int, like: Tensor) -> Tensor:
    """What to add to the logits of a window after a cyclic shift, (4, T, T): -100 between what was apart, else 0.

    Only the last windows of a row or column hold pixels from opposite borders. The four are a window inside, the last
    of its row, the last of its column, and both.
    """
    far = (torch.arange(size, device=like.device) >= size - shift).long()  # torch.compile fails to compare booleans
    down, right = far.repeat_interleave(size), far.repeat(size)
    down, right = down[:, None] != down, right[:, None] != right
    apart = torch.stack((torch.zeros_like(down), right, down, down | right))
    return torch.zeros(apart.shape, dtype=like.dtype, device=like.device).masked_fill(apart, -100.0)


class Windows(NamedTuple):
    """How a batch of images is cut into square windows of T pixels, windows with the same mask together."""

    order: Tensor  # (N * H * W,) int64: row of the flattened tokens (N * H * W, C) for each pixel of each window
    inverse: Tensor  # (N * H * W,) int64: where a row stands in `order`
    counts: list[int]  # windows of each kind, in all images
    masks: Tensor  # (kinds, T, T)


def cut_windows(like: Tensor, size: int, shift: int) -> Windows:
    """Windows of `size` pixels on images like (N, C, H, W), which are shifted up and left cyclically by `shift` first.

    H and W are multiples of `size`.
    """
    n, _, height, width = like.shape
    pixels = torch.arange(height * width, device=like.device).view(height, width).roll((-shift, -shift), (0, 1))
    grid = pixels.unflatten(1, (-1, size)).unflatten(0, (-1, size)).transpose(1, 2)
    kinds = [grid[:-1, :-1], grid[:-1, -1:], grid[-1:, :-1], grid[-1:, -1:]] if shift else [grid]
    kinds = [kind.reshape(-1, 1, size**2) for kind in kinds]
    first_row = torch.arange(n, device=like.device).view(-1, 1) * (height * width)
    order = torch.cat([(kind + first_row).flatten() for kind in kinds])
    rows, columns = height // size, width // size
    counts = [(rows - 1) * (columns - 1), rows - 1, columns - 1, 1] if shift else [rows * columns]
    used = [i for i, count in enumerate(counts) if count]
    masks = shift_masks(size, shift, like)
    masks = torch.stack([masks[i] for i in used])  # an index by a list would be copied to a GPU, which waits for it
    return Windows(order, inverse_of(order), [n * counts[i] for i in used], masks)


def window_attention(qkv: Tensor, bias: Tensor, windows: Windows) -> Tensor:
    """Multi-head attention within windows: (N, H * W, 3 * C) and a position bias (heads, T, T) to (N, H * W, C)."""
    n, length, channels = qkv.shape
    heads, pixels, _ = bias.shape
    rows = qkv.reshape(-1, channels).index_select(0, windows.order)
    q, k, v = rows.view(-1, pixels, 3, heads, channels // (3 * heads)).unbind(2)
    masks = (bias.unsqueeze(1) + windows.masks).to(q.dtype)
    out = attention(q, k, v, masks, windows.counts)
    return out.flatten(0, 1).index_select(0, windows.inverse).view(n, length, -1)
