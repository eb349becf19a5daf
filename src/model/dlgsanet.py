"""DLGSANet (ICCV 2023): dynamic convolutions and sparse attention between channels, by turns.

Li, Pan, Tang, Dong, "DLGSANet: Lightweight Dynamic Local and Global Self-Attention Networks for Image
Super-Resolution", https://arxiv.org/abs/2301.02031. Official weights load with `strict=True`.

A local block (MHDLSA) filters every pixel by kernels of its own, made from the features around it. A global block
(SparseGSA) attends between channels; ReLU in place of softmax keeps the positive similarities only. Both end in a gated
feed-forward network. In evaluation the similarities are computed in overlapping windows of one size, whatever the image
(test-time local converter, TLC), and the results averaged.

Departures from the official code:
- The dynamic convolution is plain PyTorch, for every device and type; the official one is CUDA source for float32 and
  float64, compiled at run time by an interface of CuPy that no longer exists.
- The windows of the evaluation are one batch, and nothing is kept between calls. Batches of any size can be evaluated;
  the official code takes one image at a time.
- `n_heads` are the heads of the global attention; what the official options call heads of the local one is the number
  of channels that share a kernel, here `group_channels`.
"""

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import product
from math import isqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from model.common import (
    RGB_MEAN,
    ChannelNorm,
    DirectUpsampler,
    GatedFFN,
    Network,
    TransposedAttention,
    UserError,
    check_divides,
    check_images,
    conv,
    hidden_width,
    how_many,
    widen,
)

TLC_SIZES = {2: 96, 3: 72, 4: 48}  # side of an evaluation window, by scale


def taps(padded: Tensor, size: int) -> Iterator[tuple[int, int, Tensor]]:
    """Row and column of every tap of a size x size kernel, with the view (..., H, W) of `padded` that it meets."""
    height, width = padded.shape[-2] - size + 1, padded.shape[-1] - size + 1
    for i, j in product(range(size), repeat=2):
        yield i, j, padded[..., i : i + height, j : j + width]


class DynamicConv(torch.autograd.Function):
    """See `dynamic_conv`. The backward pass needs the two inputs only, none of their k * k products."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(x, weights)
        groups, size = weights.shape[1:3]
        x_groups = widen(x.unflatten(1, (groups, -1)))
        out = torch.zeros_like(x_groups)
        for i, j, view in taps(F.pad(x_groups, [size // 2] * 4), size):
            out.addcmul_(weights[:, :, None, i, j], view)
        return out.flatten(1, 2).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weights = ctx.saved_tensors
        groups, size = weights.shape[1:3]
        x_groups, grad_groups = (widen(t.unflatten(1, (groups, -1))) for t in (x, grad))
        padded = F.pad(x_groups, [size // 2] * 4)
        grad_padded, grad_weights = torch.zeros_like(padded), torch.empty_like(weights)
        for i, j, view in taps(grad_padded, size):
            view.addcmul_(weights[:, :, None, i, j], grad_groups)
        for i, j, view in taps(padded, size):
            grad_weights[:, :, i, j] = (grad_groups * view).sum(2)
        return F.pad(grad_padded, [-(size // 2)] * 4).flatten(1, 2).to(x.dtype), grad_weights


def dynamic_conv(x: Tensor, weights: Tensor) -> Tensor:
    """Convolution with kernels of every pixel's own, without bias, zeros outside the image.

    out[n, c, y, x] = sum over i, j of weights[n, c // (C / G), i, j, y, x] * in[n, c, y + i - k // 2, x + j - k // 2]

    Args:
        x: (N, C, H, W).
        weights: (N, G, k, k, H, W) with an odd k; each of the G kernels of a pixel serves C / G channels in a row.

    Returns:
        (N, C, H, W) of the type of `x`, summed in float32 or more.
    """
    return DynamicConv.apply(x, weights)


class FilterGenerator(nn.Module):
    """Kernels for every pixel from the features around it, linear throughout: (N, C, H, W) to (N, G, k, k, H, W)."""

    def __init__(self, n_feats: int, groups: int, kernel_size: int) -> None:
        super().__init__()
        hidden = n_feats // 4
        depthwise = nn.Conv2d(hidden, hidden, kernel_size, padding=kernel_size // 2, groups=hidden)
        self.conv1 = nn.Sequential(conv(n_feats, hidden, 1), depthwise)
        self.conv2 = nn.Sequential(conv(hidden, groups * kernel_size**2, 1))
        self.shape = (groups, kernel_size, kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x)).unflatten(1, self.shape)


class DynamicLocalAttention(nn.Module):
    """MHDLSA: a dynamic convolution between two 1x1 convolutions."""

    def __init__(self, n_feats: int, group_channels: int, kernel_size: int) -> None:
        super().__init__()
        self.conv0 = conv(n_feats, n_feats, 1, bias=False)
        self.conv1 = conv(n_feats, n_feats, 1, bias=False)
        self.conv = FilterGenerator(n_feats, n_feats // group_channels, kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv0(x)
        return self.conv1(dynamic_conv(x, self.conv(x)))


def window_steps(length: int, size: int) -> tuple[int, int]:
    """Number of windows of `size` that it takes to cover `length`, and the distance from each to the next."""
    n = -(-length // size)
    return n, -(-(length - size) // max(n - 1, 1))


def windows(length: int, size: int) -> list[slice]:
    """The windows of `size` along an axis; the last one is moved back to end with the image."""
    n, step = window_steps(length, size)
    starts = (min(i * step, length - size) for i in range(n))
    return [slice(start, start + size) for start in starts]


def coverage(length: int, size: int, device: torch.device) -> Tensor:
    """How many of the windows along an axis each position lies in: (length,)."""
    n, step = window_steps(length, size)
    position = torch.arange(length, device=device)
    start = (torch.arange(n, device=device) * step).clamp(max=length - size).unsqueeze(1)
    return ((start <= position) & (position < start + size)).sum(0)


class SparseGlobalAttention(TransposedAttention):
    """SparseGSA: attention between channels that keeps positive similarities as they are and drops the others.

    In training the whole patch is one window. In evaluation windows have `tlc_size` pixels a side, at most those of the
    image; where they overlap, their results are averaged.
    """

    def __init__(self, n_feats: int, n_heads: int, tlc_size: int) -> None:
        super().__init__(n_feats, n_heads)
        self.tlc_size = tlc_size

    def weights(self, logits: Tensor) -> Tensor:
        return logits.relu()

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv_dwconv(self.qkv(x))
        height, width = x.shape[2:]
        if self.training or max(height, width) <= self.tlc_size:
            return self.project_out(self.attend(qkv.flatten(2)).view_as(x))

        h, w = min(height, self.tlc_size), min(width, self.tlc_size)
        places = list(product(windows(height, h), windows(width, w)))
        cut = torch.stack([qkv[:, :, rows, columns] for rows, columns in places], 1)  # (N, windows, 3 * C, h, w)
        parts = self.attend(cut.flatten(3).flatten(0, 1)).view(-1, len(places), x.shape[1], h, w)
        total = parts.new_zeros(x.shape)
        for part, (rows, columns) in zip(parts.unbind(1), places, strict=True):
            total[:, :, rows, columns] += part
        count = coverage(height, h, x.device).unsqueeze(1) * coverage(width, w, x.device)
        return self.project_out(total / count)


class Norm(nn.Module):
    """Channel norm, a level deeper in the official names."""

    def __init__(self, n_feats: int) -> None:
        super().__init__()
        self.body = ChannelNorm(n_feats, 1e-5)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class LocalBlock(nn.Module):
    """Local half of a hybrid block (HDTB): MHDLSA, feed-forward network, each after a norm and plus its input."""

    def __init__(self, n_feats: int, hidden: int, group_channels: int, kernel_size: int) -> None:
        super().__init__()
        self.norm1 = Norm(n_feats)
        self.IDynamicDWConv = DynamicLocalAttention(n_feats, group_channels, kernel_size)
        self.norm2 = Norm(n_feats)
        self.IDynamic_ffn = GatedFFN(n_feats, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.IDynamicDWConv(self.norm1(x))
        return x + self.IDynamic_ffn(self.norm2(x))


class GlobalBlock(nn.Module):
    """Global half of a hybrid block (HDTB): SparseGSA, feed-forward network, each after a norm and plus its input."""

    def __init__(self, n_feats: int, hidden: int, n_heads: int, tlc_size: int) -> None:
        super().__init__()
        self.norm3 = Norm(n_feats)
        self.restormer_attn = SparseGlobalAttention(n_feats, n_heads, tlc_size)
        self.norm4 = Norm(n_feats)
        self.restormer_ffn = GatedFFN(n_feats, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.restormer_attn(self.norm3(x))
        return x + self.restormer_ffn(self.norm4(x))


class Group(nn.Module):
    """Residual group (RHDTG): local and global blocks by turns, a convolution, plus the input."""

    def __init__(self, blocks: Iterable[nn.Module], n_feats: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*blocks, conv(n_feats, n_feats, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Embedding(nn.Module):
    """The first convolution, a level deeper in the official names."""

    def __init__(self, n_feats: int) -> None:
        super().__init__()
        self.proj = conv(3, n_feats, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class DLGSANet(nn.Module):
    """DLGSANet, without settings the large one of the paper.

    Args:
        scale: 2, 3 or 4.
        n_feats: feature channels.
        n_resgroups: groups.
        n_resblocks: local blocks a group, each followed by a global one.
        n_heads: heads of the global attention.
        group_channels: channels that share a kernel of the dynamic convolution.
        kernel_size: side of these kernels, and of the depthwise convolution that makes them; odd.
        mlp_ratio: the feed-forward networks are n_feats * mlp_ratio channels wide.
        tlc_size: side of the windows of the global attention in evaluation; None: 96, 72 or 48 at x2, x3 or x4.

    Maps (N, 3, H, W) in [0, 1] to (N, 3, scale * H, scale * W), each image on its own.

    Raises:
        UserError: settings that do not fit together.
    """

    mean: Tensor

    def __init__(
        self,
        scale: int,
        n_feats: int = 90,
        n_resgroups: int = 6,
        n_resblocks: int = 4,
        n_heads: int = 6,
        group_channels: int = 6,
        kernel_size: int = 7,
        mlp_ratio: float = 2.0,
        tlc_size: int | None = None,
    ) -> None:
        super().__init__()
        if n_feats < 4:
            raise UserError(f'--n_feats {n_feats}: the kernels are made from a quarter of them, so choose 4 or more.')
        for option, divisor in {'n_heads': n_heads, 'group_channels': group_channels}.items():
            check_divides(option, divisor, n_feats)
        if kernel_size % 2 == 0:
            raise UserError(f'--kernel_size {kernel_size} is even and has no pixel in the middle: choose an odd one.')
        hidden, window = hidden_width(n_feats, mlp_ratio), TLC_SIZES[scale] if tlc_size is None else tlc_size

        def blocks() -> Iterator[nn.Module]:
            for _ in range(n_resblocks):
                yield LocalBlock(n_feats, hidden, group_channels, kernel_size)
                yield GlobalBlock(n_feats, hidden, n_heads, window)

        self.register_buffer('mean', torch.tensor(RGB_MEAN).view(3, 1, 1), persistent=False)
        self.overlap_embed = nn.Sequential(Embedding(n_feats))
        groups = (Group(blocks(), n_feats) for _ in range(n_resgroups))
        self.deep_feature_extraction = nn.Sequential(*groups, conv(n_feats, n_feats, 3))
        self.upsample = DirectUpsampler(scale, n_feats)

    def forward(self, x: Tensor) -> Tensor:
        check_images(x)
        x = self.overlap_embed(x - self.mean)
        return self.upsample(x + self.deep_feature_extraction(x)) + self.mean


def recognise(state: Mapping[str, Tensor]) -> dict[str, object] | None:
    """Settings of the DLGSANet that `state` is of, but `tlc_size`, which leaves no trace; None for other networks."""
    groups, block = 'deep_feature_extraction.', 'deep_feature_extraction.0.body.0.IDynamic'
    keys = (
        block + 'DWConv.conv.conv1.1.weight',
        block + 'DWConv.conv.conv2.0.weight',
        block + '_ffn.project_out.weight',
        groups + '0.body.1.restormer_attn.temperature',
        'upsample.0.weight',
    )
    if not all(key in state for key in keys):
        return None
    depthwise, kernels, out, temperature, upsample = (state[key].shape for key in keys)
    n_feats, hidden = out[:2]
    return {
        'scale': isqrt(upsample[0] // 3),
        'n_feats': n_feats,
        'n_resgroups': how_many(state, groups) - 1,
        'n_resblocks': how_many(state, groups + '0.body.') // 2,
        'n_heads': temperature[0],
        'group_channels': n_feats * depthwise[-1] ** 2 // kernels[0],
        'kernel_size': depthwise[-1],
        'mlp_ratio': hidden / n_feats,
    }


LIGHT = {'n_feats': 48, 'n_resgroups': 4, 'n_resblocks': 3}
TINY = {'n_feats': 48, 'n_resgroups': 3, 'n_resblocks': 3}
network = partial(
    Network,
    DLGSANet,
    (2, 3, 4),
    tiling_exact=False,
    upsampler='upsample.',
    blocks=(LocalBlock, GlobalBlock),
    recognise=recognise,
)

NETWORKS = {  # parameters and multiply-adds at a 1280x720 output, x2 / x3 / x4
    'DLGSANet': network(),  # 4.73M 1.12T / 4.75M 501G / 4.76M 283G
    'DLGSANet-light': network(LIGHT),  # 745k 178G / 752k 80.1G / 761k 45.5G
    'DLGSANet-tiny': network(TINY),  # 566k 135G / 572k 60.9G / 581k 34.7G
}
