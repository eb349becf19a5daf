"""Blocks on maps in channels_last memory, where a pixel is a row."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.common import DepthwiseConv, at_least_float32, conv, stacked
from model.ops.depthwise import gelu, is_for_kernel
from model.ops.fast import float32_by_llvm, is_for_llvm
from model.ops.fused_conv import by_pixel, fused_conv
from model.ops.fused_linear import Norm, fused_linear
from model.ops.layer_norm import layer_norm
from model.ops.small_products import small_products


class GELU(nn.Module):
    """See `gelu`."""

    def forward(self, x: Tensor) -> Tensor:
        return gelu(x)


def pointwise(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, beside: Sequence[Tensor] = (), **around: Any
) -> Tensor:
    """1x1 convolution of maps (N, C, H, W), with what `fused_linear` takes around it, its tensors being maps too."""
    given: dict[str, Any] = {
        key: by_pixel(value) if isinstance(value, Tensor) else value for key, value in around.items()
    }
    others = [by_pixel(maps) for maps in beside]
    return fused_linear(by_pixel(x), [(weight, bias)], beside=others, **given).permute(0, 3, 1, 2)


class PointwiseConv(nn.Conv2d):
    """See `pointwise`."""

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, 1, bias=bias)

    def forward(self, input: Tensor, **around: Any) -> Tensor:
        return pointwise(input, self.weight, self.bias, **around)


class GatedFFN(nn.Module):
    """Gated feed-forward network with a depthwise 3x3 (Restormer, section 3.2): project_out(gelu(a) * b)."""

    def __init__(self, n_feats: int, hidden: int) -> None:
        super().__init__()
        self.project_in = stacked(2, PointwiseConv(n_feats, 2 * hidden, bias=False))
        self.dwconv = DepthwiseConv(2 * hidden, 3, bias=False)
        self.project_out = PointwiseConv(hidden, n_feats, bias=False)

    def forward(self, x: Tensor, norm: 'LayerNorm2d') -> Tensor:
        """Maps (N, C, H, W), plus what is made of them normalised."""

        def gated_ffn(x: Tensor, *_: object) -> Tensor:
            if is_for_kernel(x, self.dwconv.weight):
                gated = self.dwconv(self.project_in(x, norm=norm), 'gate')
                return self.project_out(gated, plus=x)
            # One convolution a half: parts of the channels of one map are slow to work on in channels_last memory. The
            # gate is finished first, so that a CPU's cache has less to hold.
            first, second = self.project_in.weight.chunk(2), self.dwconv.weight.chunk(2)
            normed = norm(x)

            def half(i: int) -> Tensor:
                return F.conv2d(F.conv2d(normed, first[i]), second[i], padding=1, groups=len(second[i]))

            gate = gelu(half(0))
            return x + self.project_out(gate * half(1))

        if not is_for_llvm(x):
            return gated_ffn(x)
        return float32_by_llvm('gated_ffn', gated_ffn, x, *norm.parameters(), norm.eps, *self.parameters())


class TransposedAttention(nn.Module):
    """Attention between channels (Restormer, section 3.1): each head's map is (C / heads) x (C / heads).

    A network's own class decides which pixels a map is computed from.
    """

    def __init__(self, n_feats: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.temperature = nn.Parameter(torch.ones(n_heads, 1, 1))
        self.qkv = stacked(3, PointwiseConv(n_feats, 3 * n_feats, bias=False))
        self.qkv_dwconv = DepthwiseConv(3 * n_feats, 3, bias=False)
        self.project_out = PointwiseConv(n_feats, n_feats, bias=False)

    def weights(self, logits: Tensor) -> Tensor:
        """What makes a map of the scaled cosines."""
        return logits.softmax(-1)


class LayerNorm2d(nn.Module):
    """Layer normalisation over the channels of each pixel, (N, C, H, W), for maps in channels_last memory."""

    def __init__(self, n_feats: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_feats))
        self.bias = nn.Parameter(torch.zeros(n_feats))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        pixels = x.permute(0, 2, 3, 1)
        return layer_norm(pixels, self.weight, self.bias, self.eps).permute(0, 3, 1, 2)


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
            PointwiseConv(n_feats, n_feats),
            GELU(),
            DepthwiseConv(n_feats, 3),
            GELU(),
            SqueezeExcitation(n_feats),
            PointwiseConv(n_feats, n_feats),
        )

    def forward(self, x: Tensor) -> Tensor:
        def local_block(x: Tensor, *_: object) -> Tensor:
            first, depthwise, gate, last = (self.fn[i] for i in (0, 2, 4, 5))
            return last(gate(depthwise(first(x, gelu=True), 'gelu')), plus=x)

        if not is_for_llvm(x):
            return local_block(x)
        return float32_by_llvm('local_block', local_block, x, *self.parameters())


def l2_norm(x: Tensor) -> Tensor:
    """Euclidean norm over all pixels, in float32 or more, at least 1e-12: (..., pixels, C) to (..., 1, C)."""
    x = at_least_float32(x)
    return x.square().sum(-2, keepdim=True).clamp_min(1e-24).sqrt()  # in this order the gradient at 0 is finite


class ChannelAttention(TransposedAttention):
    """Attention between channels with a map for each group of pixels.

    A group is a cell of window_size x window_size pixels or, with `strided`, the pixels at one place within all cells.
    """

    def __init__(self, n_feats: int, n_heads: int, window_size: int, strided: bool) -> None:
        super().__init__(n_feats, n_heads)
        self.cell = (window_size, window_size)
        self.strided = strided

    def forward(self, x: Tensor, norm: Norm) -> Tensor:
        """Maps (N, C, H, W), plus what is made of them normalised."""

        def window_channel_attention(x: Tensor, *_: object) -> Tensor:
            parts = to_tokens(self.qkv_dwconv(self.qkv(x, norm=norm)), self.cell, self.strided, 3 * self.n_heads)
            q, k, v = parts.unflatten(0, (3, -1)).unbind(0)  # (heads * groups, pixels, channels)
            factor, other = (l2_norm(t).reciprocal() for t in (q, k))
            factor = (factor.unflatten(0, (self.n_heads, -1)) * self.temperature.unsqueeze(1)).flatten(0, 1)
            if x.is_cpu:  # whose gradients then go over the maps fewer times; a GPU has fewer numbers in the maps
                maps = small_products((q * factor).mT, k * other)
            else:
                maps = small_products(q.mT, k) * (factor.mT * other)
            maps = self.weights(maps)
            out = small_products(v, maps.mT)
            return self.project_out(to_map(out, x, self.cell, self.strided, self.n_heads), plus=x)

        if not is_for_llvm(x):
            return window_channel_attention(x)
        weights = self.qkv.weight, self.qkv_dwconv.weight, self.temperature, self.project_out.weight
        around = norm.weight, norm.bias, norm.eps
        return float32_by_llvm(
            'window_channel_attention', window_channel_attention, x, *around, *weights, self.cell[0], self.strided
        )


class ESA(nn.Module):
    """Enhanced spatial attention (RFANet), here without ReLUs: each value times a factor in (0, 1).

    The factors are found at low resolution.

    Height and width are at least `ESA.AT_LEAST`.
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
        return self.conv4(self.conv_f(skip, plus=low), weighed=x)


class ContrastAttention(nn.Module):
    """Contrast-aware channel attention (IMDN, section 3.3): each channel times a factor in (0, 1).

    The factors are found from the mean plus the standard deviation (of N, not N - 1, pixels) of every channel over the
    image. Of a constant channel, as all of a single pixel are, the deviation is 0, where the gradient of the root is
    infinite and in the official code makes every weight NaN; here it passes no gradient.
    """

    def __init__(self, n_feats: int) -> None:
        super().__init__()
        hidden = max(n_feats // 16, 1)
        squeeze, excite = conv(n_feats, hidden, 1), conv(hidden, n_feats, 1)
        self.conv_du = nn.Sequential(squeeze, nn.ReLU(inplace=True), excite, nn.Sigmoid())

    def forward(self, x: Tensor, plus: Tensor | None = None) -> Tensor:
        """Maps (N, C, H, W), and what is added in the end."""
        factors = self.conv_du(float32_by_llvm('contrast', contrast, x))
        if plus is None:
            return x * factors
        # The gradient of addcmul goes over the maps once more.
        return plus + x * factors if torch.is_grad_enabled() else torch.addcmul(plus, x, factors)


def contrast(x: Tensor) -> Tensor:
    """Mean plus deviation of each channel over the image, in float32 or more: (N, C, H, W) to (N, C, 1, 1)."""
    x = at_least_float32(x)
    mean = x.mean((2, 3), keepdim=True)
    variance = (x - mean).square().mean((2, 3), keepdim=True)  # a CPU takes 30 times as long to torch.var
    return mean + variance.clamp_min(torch.finfo(x.dtype).tiny).sqrt()  # in this order the gradient is finite


def join_outputs(blocks: list[nn.Module], x: Tensor, layer: nn.Conv2d) -> Tensor:
    """A 1x1 convolution of the outputs of all `blocks`, each the input of the next, side by side.

    It is summed up block by block, so that evaluation keeps none of the outputs.
    """
    first, *others = layer.weight.chunk(len(blocks), 1)
    x = blocks[0](x)
    joined = fused_conv(x, first, layer.bias)
    for block, weight in zip(blocks[1:], others, strict=True):
        x = block(x)
        joined = fused_conv(x, weight, plus=joined)
    return joined
