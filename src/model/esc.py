"""ESC, ESC-light and ESC-FP (ICCV 2025): convolutions with one large kernel in place of most of the attention.

Lee, Yun, Ro, "Emulating Self-attention with Convolution for Efficient Image Super-Resolution",
https://arxiv.org/abs/2503.06671. Official weights load with `strict=True`.

A block attends within windows of 32x32 pixels once. Five times after that a few channels pass a 13x13 convolution whose
kernel all blocks share (for range), beside a depthwise 3x3 whose kernels are made from the means of these channels over
the image (to adapt to it, as attention does). ESC averages the large kernel over its eight orientations; ESC-FP
factorises it into a 1x1 and a depthwise 13x13, and adds norms.

Departures from the official code:
- The features are continued to whole windows by reflection as there, an image smaller than that by its reflection again
  and again; the official code fails below 17 pixels a side, and in ESC on more than one image in evaluation.
- The position bias is cut from its table as a view, without an index; copies of a network have their own.
- The dynamic kernels are applied beside the large ones, not added to them, in ESC-FP too.

The published scores are of images that were continued by reflection to multiples of 32 first, which changes the means
too: `--pad_to 32`, as in the recipes.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from error import UserError
from model.blocks.pixels import LayerNorm2d, PointwiseConv, to_map, to_tokens
from model.blocks.windows import biased_attention, check_window, hidden_width
from model.common import (
    Float32Conv,
    NetworkSpec,
    check_divides,
    check_images,
    check_odd,
    conv,
    how_many,
    in_fast_memory,
    reflect_pad,
    stacked,
)
from model.ops.fused_linear import Norm

EPS = 1e-6  # of all norms
DYNAMIC = 3  # side of the kernels that are made from the image


class ConvFFN(nn.Module):
    """Feed-forward network with a depthwise 3x3: with a = gelu(proj(x)) it is aggr(a + gelu(dwc(a)))."""

    def __init__(self, n_feats: int, hidden: int) -> None:
        super().__init__()
        self.proj = PointwiseConv(n_feats, hidden)
        self.dwc = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.aggr = PointwiseConv(hidden, n_feats)

    def forward(self, x: Tensor, norm: Norm | None = None) -> Tensor:
        """Maps (N, C, H, W), normalised first."""
        x = self.proj(x, norm=norm, gelu=True)
        return self.aggr(x, gelu_summed=self.dwc(x))


class WindowAttention(nn.Module):
    """Multi-head attention within windows, with a position bias."""

    def __init__(self, n_feats: int, n_heads: int, window_size: int) -> None:
        super().__init__()
        self.n_heads, self.window_size = n_heads, window_size
        self.relative_position_bias = nn.Parameter(0.001 * torch.randn(n_heads, (2 * window_size - 1) ** 2))
        self.to_qkv = stacked(3, PointwiseConv(n_feats, 3 * n_feats))
        self.to_out = PointwiseConv(n_feats, n_feats)

    def forward(self, x: Tensor, norm: Norm) -> Tensor:
        """Maps (N, C, H, W), plus what is made of them normalised."""
        height, width = x.shape[2:]
        padded = reflect_pad(x, self.window_size)
        cell = (self.window_size, self.window_size)
        qkv = to_tokens(self.to_qkv(padded, norm=norm), cell, strided=False)
        q, k, v = qkv.unflatten(2, (3, self.n_heads, -1)).unbind(2)
        table = self.relative_position_bias.unflatten(1, (2 * self.window_size - 1, -1))
        out = to_map(biased_attention(q, k, v, table), padded, cell, strided=False)
        return self.to_out(out[..., :height, :width], plus=x)


class DynamicKernels(nn.Sequential):
    """Depthwise 3x3 kernels (N, C, 3, 3) from the means of all C channels over each image."""

    def __init__(self, n_feats: int, hidden: int) -> None:
        last = nn.Conv2d(hidden, n_feats * DYNAMIC**2, 1)
        super().__init__(nn.AdaptiveAvgPool2d(1), nn.Conv2d(n_feats, hidden, 1), nn.GELU(), last)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).view(*x.shape[:2], DYNAMIC, DYNAMIC)


def depthwise(x: Tensor, kernels: Tensor) -> Tensor:
    """Depthwise convolution with kernels of every image's own: (N, C, H, W) and (N, C, k, k) to (N, C, H, W)."""
    size = kernels.shape[-1]
    if torch.jit.is_tracing():  # ONNX has no groups whose number depends on the batch
        (height, width), padded = x.shape[2:], F.pad(x, [size // 2] * 4)
        weights = kernels.flatten(2)[..., None, None].unbind(2)
        taps = (padded[..., i : i + height, j : j + width] for i, j in product(range(size), repeat=2))
        return torch.stack([weight * tap for weight, tap in zip(weights, taps, strict=True)]).sum(0)
    maps, kernels = x.reshape(1, -1, *x.shape[2:]), kernels.flatten(0, 1).unsqueeze(1)
    return F.conv2d(maps, kernels, padding=size // 2, groups=len(kernels)).reshape(x.shape)


def average_orientations(kernel: Tensor) -> Tensor:
    """Mean of a kernel (..., k, k) over its four rotations and their mirror images."""
    kernel = kernel + kernel.flip(-1)
    kernel = kernel + kernel.flip(-2)
    return (kernel + kernel.mT) / 8


class LargeKernel(nn.Module):
    """Convolution with the shared kernel (C, C, k, k), plus one with kernels from the image."""

    def __init__(self, n_feats: int) -> None:
        super().__init__()
        self.dwc_proj = DynamicKernels(n_feats, n_feats // 2)
        for p in self.dwc_proj[-1].parameters():
            nn.init.zeros_(p)

    def forward(self, x: Tensor, kernel: Tensor) -> Tensor:
        return F.conv2d(x, kernel, padding=kernel.shape[-1] // 2) + depthwise(x, self.dwc_proj(x))


class FactorisedKernel(nn.Module):
    """The same with a kernel in two factors, (C, C, 1, 1) and then depthwise (C, 1, k, k).

    The kernels from the image are made before the first and applied after it.
    """

    def __init__(self, n_feats: int) -> None:
        super().__init__()
        self.proj = DynamicKernels(n_feats, n_feats // 4)

    def forward(self, x: Tensor, channel: Tensor, spatial: Tensor) -> Tensor:
        kernels = self.proj(x)
        x = F.conv2d(x, channel)
        large = F.conv2d(x, spatial, padding=spatial.shape[-1] // 2, groups=len(spatial))
        return large + depthwise(x, kernels)


class ConvAttention(nn.Module):
    """The large kernel `plk` on the first `part` channels, and a 1x1 convolution of all."""

    def __init__(self, n_feats: int, part: int, plk: nn.Module) -> None:
        super().__init__()
        self.part = part
        self.plk = plk
        self.aggr = PointwiseConv(n_feats, n_feats)

    def forward(self, x: Tensor, kernels: Sequence[Tensor], plus: Tensor | None = None) -> Tensor:
        return self.aggr(torch.cat((self.plk(x[:, : self.part], *kernels), x[:, self.part :]), 1), plus=plus)


class Block(nn.Module):
    """A feed-forward network, window attention, feed-forward networks and convolutional attention by turns."""

    def __init__(
        self, n_feats: int, attn: WindowAttention, first_hidden: int, hidden: int, pconvs: Sequence[nn.Module], ln: bool
    ) -> None:
        super().__init__()
        self.ln_proj = LayerNorm2d(n_feats, EPS)
        self.proj = ConvFFN(n_feats, first_hidden)
        self.ln_attn = LayerNorm2d(n_feats, EPS)
        self.attn = attn
        self.lns = nn.ModuleList(LayerNorm2d(n_feats, EPS) if ln else nn.Identity() for _ in pconvs)
        self.pconvs = nn.ModuleList(pconvs)
        self.convffns = nn.ModuleList(ConvFFN(n_feats, hidden) for _ in pconvs)
        self.ln_out = LayerNorm2d(n_feats, EPS)
        self.conv_out = conv(n_feats, n_feats, 3)

    def forward(self, x: Tensor, kernels: Sequence[Tensor]) -> Tensor:
        y = self.attn(self.proj(x, self.ln_proj), self.ln_attn)
        for ln, ffn, pconv in zip(self.lns, self.convffns, self.pconvs, strict=True):
            y = pconv(ffn(y, ln if isinstance(ln, LayerNorm2d) else None), kernels, plus=y)
        return self.conv_out(self.ln_out(y), plus=x)


class Frame(nn.Module):
    """What ESC and ESC-FP share: first and last layers around the blocks, and the enlarged image that is added.

    Args:
        scale: 2, 3 or 4.
        n_feats: feature channels.
        blocks: between the first and the last layers.
        ln_last: before the last convolution of the features.
        skip: how the image is enlarged, as `F.interpolate` calls it.
    """

    def __init__(self, scale: int, n_feats: int, blocks: Sequence[Block], ln_last: nn.Module, skip: str) -> None:
        super().__init__()
        self.scale, self.skip = scale, skip
        self.proj = conv(3, n_feats, 3)
        self.blocks = nn.ModuleList(blocks)
        self.ln_last = ln_last
        self.last = conv(n_feats, n_feats, 3)
        self.to_img = Float32Conv(n_feats, 3 * scale**2, 3)
        self.shuffle = nn.PixelShuffle(scale)

    def forward(self, x: Tensor) -> Tensor:
        check_images(x)
        x = in_fast_memory(x)
        kernels = self.kernels()
        feats = first = self.proj(x)
        for block in self.blocks:
            feats = block(feats, kernels)
        y = self.shuffle(self.to_img(self.last(self.ln_last(feats), plus=first)))
        return y + F.interpolate(x, scale_factor=self.scale, mode=self.skip)

    def kernels(self) -> Sequence[Tensor]:
        """Those that all blocks share."""
        raise NotImplementedError


class ESC(Frame):
    """ESC, without settings the one of the paper.

    Args:
        scale: 2, 3 or 4.
        n_feats: feature channels.
        n_resgroups: blocks.
        n_resblocks: convolutional attentions a block.
        n_heads: heads of the window attention.
        window_size: pixels along a window's side.
        mlp_ratio: channels inside the feed-forward networks before the convolutions, as a multiple of n_feats.
        kernel_size: side of the large kernel, odd.
        kernel_feats: channels that pass it.

    Maps (N, 3, H, W) to (N, 3, scale * H, scale * W), each image on its own; black is 0, white is 1.

    Raises:
        UserError: heads do not divide the channels, an even kernel, more channels of the kernel than there are.
    """

    def __init__(
        self,
        scale: int,
        n_feats: int = 64,
        n_resgroups: int = 5,
        n_resblocks: int = 5,
        n_heads: int = 4,
        window_size: int = 32,
        mlp_ratio: float = 1.25,
        kernel_size: int = 13,
        kernel_feats: int = 16,
    ) -> None:
        check_sizes(n_feats, n_heads, window_size, kernel_size, kernel_feats)

        def block() -> Block:
            pconvs = [ConvAttention(n_feats, kernel_feats, LargeKernel(kernel_feats)) for _ in range(n_resblocks)]
            attn = WindowAttention(n_feats, n_heads, window_size)
            return Block(n_feats, attn, 2 * n_feats, hidden_width(n_feats, mlp_ratio), pconvs, ln=False)

        super().__init__(scale, n_feats, [block() for _ in range(n_resgroups)], nn.Identity(), 'nearest')
        self.plk_filter = nn.Parameter(torch.empty(kernel_feats, kernel_feats, kernel_size, kernel_size))
        nn.init.orthogonal_(self.plk_filter)

    def kernels(self) -> Sequence[Tensor]:
        return (average_orientations(self.plk_filter),)


class ESCFP(Frame):
    """ESC-FP, without settings the one of the paper: the kernel in two factors, a norm before every part.

    Arguments, images and errors are as in `ESC`.
    """

    def __init__(
        self,
        scale: int,
        n_feats: int = 48,
        n_resgroups: int = 5,
        n_resblocks: int = 5,
        n_heads: int = 3,
        window_size: int = 32,
        mlp_ratio: float = 1.25,
        kernel_size: int = 13,
        kernel_feats: int = 16,
    ) -> None:
        check_sizes(n_feats, n_heads, window_size, kernel_size, kernel_feats)

        def block() -> Block:
            pconvs = [ConvAttention(n_feats, kernel_feats, FactorisedKernel(kernel_feats)) for _ in range(n_resblocks)]
            attn = WindowAttention(n_feats, n_heads, window_size)
            first_hidden, hidden = hidden_width(n_feats, 1.5), hidden_width(n_feats, mlp_ratio)
            return Block(n_feats, attn, first_hidden, hidden, pconvs, ln=True)

        blocks, ln_last = [block() for _ in range(n_resgroups)], LayerNorm2d(n_feats, EPS)
        super().__init__(scale, n_feats, blocks, ln_last, 'bicubic')
        self.lk_channel = nn.Parameter(torch.randn(kernel_feats, kernel_feats, 1, 1))
        self.lk_spatial = nn.Parameter(torch.empty(kernel_feats, 1, kernel_size, kernel_size))
        nn.init.orthogonal_(self.lk_spatial)

    def kernels(self) -> Sequence[Tensor]:
        return self.lk_channel, self.lk_spatial


def check_sizes(n_feats: int, n_heads: int, window_size: int, kernel_size: int, kernel_feats: int) -> None:
    """Refuse settings that do not fit one another."""
    check_divides('n_heads', n_heads, n_feats)
    check_window(window_size)
    check_odd('kernel_size', kernel_size)
    if not 4 <= kernel_feats <= n_feats:
        raise UserError(f'--net kernel_feats={kernel_feats}: choose from 4 to the {n_feats} channels of --n_feats.')


def sizes(state: Mapping[str, Tensor], kernel: str) -> dict[str, object] | None:
    """What the state dicts of ESC and ESC-FP show alike, given the key of their large kernel (.., .., k, k)."""
    keys = ('to_img.weight', kernel, 'blocks.0.attn.relative_position_bias', 'blocks.0.convffns.0.proj.weight')
    if not all(key in state for key in keys):
        return None
    up, large, bias, ffn = (state[key] for key in keys)
    return {
        'scale': math.isqrt(len(up) // 3),
        'n_feats': up.shape[1],
        'n_resgroups': how_many(state, 'blocks.'),
        'n_resblocks': how_many(state, 'blocks.0.convffns.'),
        'n_heads': len(bias),
        'window_size': (math.isqrt(bias.shape[1]) + 1) // 2,
        'mlp_ratio': len(ffn) / up.shape[1],
        'kernel_size': large.shape[-1],
        'kernel_feats': len(large),
    }


def recognise(state: Mapping[str, Tensor]) -> dict[str, object] | None:
    """Scale and all settings of ESC's weights; None for those of another network."""
    return sizes(state, 'plk_filter')


def recognise_fp(state: Mapping[str, Tensor]) -> dict[str, object] | None:
    """The same of ESC-FP's weights."""
    return sizes(state, 'lk_spatial')


NETWORKS = {  # parameters and multiply-adds at a 1280x720 output, x2 / x3 / x4
    'ESC': NetworkSpec(  # 947K 591G / 955K 268G / 968K 149G
        ESC,
        (2, 3, 4),
        tiling_exact=False,
        upsampler_prefix='to_img.',
        checkpoint_blocks=(Block,),
        recognise=recognise,
    ),
    'ESC-light': NetworkSpec(  # 604K 359G / 612K 163G / 624K 90.9G
        ESC,
        (2, 3, 4),
        {'n_resgroups': 3},
        tiling_exact=False,
        upsampler_prefix='to_img.',
        checkpoint_blocks=(Block,),
        recognise=recognise,
    ),
    'ESC-FP': NetworkSpec(  # 524K 238G / 530K 109G / 539K 60.4G
        ESCFP,
        (2, 3, 4),
        tiling_exact=False,
        upsampler_prefix='to_img.',
        checkpoint_blocks=(Block,),
        recognise=recognise_fp,
    ),
}
