"""DLGSANet (ICCV 2023): dynamic convolutions and sparse attention between channels, by turns.

Li, Pan, Tang, Dong, "DLGSANet: Lightweight Dynamic Local and Global Self-Attention Networks for Image
Super-Resolution", https://arxiv.org/abs/2301.02031. Official weights load with `strict=True`.

A local block (MHDLSA) filters every pixel by kernels of its own, made from the features around it. A global block
(SparseGSA) attends between channels; ReLU in place of softmax keeps the positive similarities only. Both end in a gated
feed-forward network. In evaluation the similarities are computed in overlapping windows of one size, whatever the image
(test-time local converter, TLC), and the results averaged.

Departures from the official code:
- The dynamic convolution (`ops.dynamic_conv`) runs on every device and in every type; the official one is CUDA source
  for float32 and float64, compiled at run time by an interface of CuPy that no longer exists.
- The windows of the evaluation are one batch, and nothing is kept between calls. Batches of any size can be evaluated;
  the official code takes one image at a time.
- `n_heads` are the heads of the global attention; what the official options call heads of the local one is the number
  of channels that share a kernel, here `group_channels`.
"""

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import pairwise, product, repeat
from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from error import UserError
from model.blocks.edsr import DirectUpsampler
from model.blocks.pixels import GatedFFN, LayerNorm2d, TransposedAttention
from model.blocks.windows import hidden_width
from model.common import (
    RGB_MEAN,
    NetworkSpec,
    at_least_float32,
    check_divides,
    check_images,
    check_odd,
    conv,
    full_precision,
    how_many,
    in_channels_last,
)
from model.ops.dynamic_conv import dynamic_conv, dynamic_conv_in_strips
from model.ops.fast import float32_by_llvm, is_exporting, is_for_llvm

TLC_SIZES = {2: 96, 3: 72, 4: 48}  # side of an evaluation window, by scale


class FilterGenerator(nn.Module):
    """Kernels for every pixel from the features around it, linear throughout: (N, C, H, W) to (N, G, k, k, H, W).

    The last convolution is a matrix product, which writes a tap of all pixels in a row, whatever the memory format.
    """

    def __init__(self, n_feats: int, groups: int, kernel_size: int) -> None:
        super().__init__()
        hidden = n_feats // 4
        depthwise = nn.Conv2d(hidden, hidden, kernel_size, padding=kernel_size // 2, groups=hidden)
        self.conv1 = nn.Sequential(conv(n_feats, hidden, 1), depthwise)
        self.conv2 = nn.Sequential(conv(hidden, groups * kernel_size**2, 1))
        self.shape = (groups, kernel_size, kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = (parameter.view(len(parameter), -1) for parameter in self.conv2.parameters())
        kernels = torch.baddbmm(bias, weight.expand(len(x), -1, -1), self.conv1(x).flatten(2))
        return kernels.view(len(x), *self.shape, *x.shape[2:])


class DynamicLocalAttention(nn.Module):
    """MHDLSA: a dynamic convolution between two 1x1 convolutions.

    Its kernels, larger than any other features, are not kept for the gradients but made again. Without gradients a CPU
    has those of a few rows at a time, but where the network is recorded for an export.
    """

    def __init__(self, n_feats: int, group_channels: int, kernel_size: int) -> None:
        super().__init__()
        self.conv0 = conv(n_feats, n_feats, 1, bias=False)
        self.conv1 = conv(n_feats, n_feats, 1, bias=False)
        self.conv = FilterGenerator(n_feats, n_feats // group_channels, kernel_size)

    def forward(self, x: Tensor, norm: LayerNorm2d) -> Tensor:
        """Maps (N, C, H, W), plus what is made of them normalised."""

        def local_attention(x: Tensor, *_: object) -> Tensor:
            y = self.conv0(norm(x))
            if y.is_cpu and not torch.is_grad_enabled() and not is_exporting():
                y = dynamic_conv_in_strips(y, self.conv.conv1(y), self.conv.conv2, *self.conv.shape[:2])
            elif torch.is_grad_enabled():
                y = checkpoint(self.filtered, y, use_reentrant=False, preserve_rng_state=False)
            else:
                y = self.filtered(y)
            return x + self.conv1(y.contiguous(memory_format=torch.channels_last))

        if not is_for_llvm(x):
            return local_attention(x)
        return float32_by_llvm('dynamic_conv', local_attention, x, *norm.parameters(), norm.eps, *self.parameters())

    def filtered(self, x: Tensor) -> Tensor:
        return dynamic_conv(x.contiguous(), self.conv(x))


PIXELS = 1024  # of a product of `gram_matrix`


def windows(length: int, size: int) -> list[slice]:
    """The windows of `size` that cover an axis, at equal steps; the last one is moved back to end with the image."""
    n = -(-length // size)
    step = -(-(length - size) // max(n - 1, 1))
    starts = (min(i * step, length - size) for i in range(n))
    return [slice(start, start + size) for start in starts]


def cells(length: int, size: int, like: Tensor, most: int | None = None) -> tuple[list[slice], Tensor]:
    """The C pieces between the borders of the W windows along an axis; (W, C): 1 where a window has a piece, else 0.

    Pieces longer than `most` are cut into equal ones.
    """
    found = windows(length, size)
    pieces = []
    for start, stop in pairwise(sorted({end for w in found for end in (w.start, w.stop)})):
        count = -(-(stop - start) // (most or length))
        ends = (start + (stop - start) * i // count for i in range(count + 1))
        pieces += [slice(*part) for part in pairwise(ends)]
    starts, stops = ([getattr(piece, end) for piece in pieces] for end in ('start', 'stop'))
    spans = [(starts.index(window.start), stops.index(window.stop) + 1) for window in found]
    if is_for_llvm(like) or is_exporting():  # a file holds the numbers themselves
        inside = [[float(first <= i < last) for i in range(len(pieces))] for first, last in spans]
        return pieces, torch.tensor(inside, dtype=like.dtype, device=like.device)
    # Made where they are needed: a list would be copied to a GPU, which a CUDA graph does not allow.
    rows = [F.pad(like.new_ones(last - first), (first, len(pieces) - last)) for first, last in spans]
    return pieces, torch.stack(rows)


def gram_matrix(x: Tensor) -> Tensor:
    """Products of all pairs of channels, summed over the pixels: (N, pixels, C) to (N, C, C).

    A GPU sums a part of the pixels in each of many products beside each other: in a single one most of it is idle.
    """
    n_parts = x.shape[1] // PIXELS
    parts, rest = x[:, : n_parts * PIXELS].unflatten(1, (n_parts, PIXELS)), x[:, n_parts * PIXELS :]
    return (parts.mT @ parts).sum(1) + rest.mT @ rest


def from_gram(gram: Tensor, n_heads: int) -> tuple[Tensor, Tensor]:
    """What `SparseGlobalAttention.sums` gives, from the products of all pairs of channels (N, 2 * C, 2 * C) of it."""
    channels = gram.shape[1] // 2
    of_heads = gram[:, :channels, channels:].unflatten(1, (n_heads, -1)).unflatten(3, (n_heads, -1))
    squares = gram.diagonal(dim1=1, dim2=2).unflatten(1, (2, n_heads, -1))
    return of_heads.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2), squares


class SparseGlobalAttention(TransposedAttention):
    """SparseGSA: attention between channels that keeps positive similarities as they are and drops the others.

    In training the whole patch is one window. In evaluation windows have `tlc_size` pixels a side, at most those of the
    image; where they overlap, their results are averaged.

    A similarity is a sum over pixels, and what it weights is a sum over channels. Windows are therefore put together
    from the cells that their borders cut the image into, and each pixel is weighted once, by the mean of the maps of
    its windows, times the last convolution.
    """

    def __init__(self, n_feats: int, n_heads: int, tlc_size: int) -> None:
        super().__init__(n_feats, n_heads)
        self.tlc_size = tlc_size

    def forward(self, x: Tensor, norm: LayerNorm2d) -> Tensor:
        """Maps (N, C, H, W), plus what is made of them normalised."""

        def channel_attention(x: Tensor, *_: object) -> Tensor:
            return x + self.attention(norm(x))

        if not is_for_llvm(x):
            return channel_attention(x)
        weights = *norm.parameters(), norm.eps, self.qkv.weight, self.qkv_dwconv.weight
        how = self.n_heads, self.layout, self.from_sums
        return float32_by_llvm('channel_attention', channel_attention, x, *weights, *how)

    def attention(self, x: Tensor) -> Tensor:
        qkv = self.qkv_dwconv(self.qkv(x)).permute(0, 2, 3, 1)
        rows, columns, inside = self.layout(x)
        places = list(product(rows, columns))
        parts = [qkv[:, i, j].flatten(1, 2) for i, j in places]
        maps = self.maps(parts, inside).to(qkv.dtype)
        out = qkv.new_empty(*qkv.shape[:3], len(self.project_out.weight))
        for (i, j), part, factor in zip(places, parts, maps, strict=True):
            cell = torch.bmm(part.chunk(3, -1)[2], factor)
            out[:, i, j] = cell.unflatten(1, (i.stop - i.start, j.stop - j.start))
        return out.permute(0, 3, 1, 2)

    def layout(self, x: Tensor, *most: int) -> tuple[list[slice], list[slice], Tensor]:
        """Rows and columns of the cells, these of at most `most` pixels each way, and `inside` of `maps`."""
        lengths = [int(length) for length in x.shape[2:]]  # plain numbers in a trace too
        sizes = [length if self.training else min(length, self.tlc_size) for length in lengths]
        axes = zip(lengths, sizes, repeat(self.project_out.weight), most or lengths, strict=False)
        (rows, down), (columns, across) = (cells(*axis) for axis in axes)
        return rows, columns, torch.kron(down, across)

    def maps(self, parts: list[Tensor], inside: Tensor) -> Tensor:
        """What to multiply the values of each cell by, in float32 or more.

        Args:
            parts: queries, keys and values of the pixels of each cell, (N, pixels, 3 * C).
            inside: (windows, cells), 1 where the cell is a part of the window, else 0.

        Returns:
            (cells, N, C, C), with the channels of the values before those of the result.
        """
        with full_precision(inside):
            sums, squares = zip(*map(self.sums, parts), strict=True)
            return self.from_sums(torch.stack(sums), torch.stack(squares), inside)

    def from_sums(self, sums: Tensor, squares: Tensor, inside: Tensor) -> Tensor:
        """See `maps`, given what `sums` finds in each cell."""
        products = torch.tensordot(inside, sums, 1)  # (windows, N, heads, C / heads, C / heads)
        q, k = torch.tensordot(inside, squares, 1).clamp_min(1e-24).sqrt().unbind(2)
        cosines = products / (q.unsqueeze(-1) * k.unsqueeze(-2))
        last = self.project_out.weight.flatten(1).t().unflatten(0, (self.n_heads, -1))
        maps = (cosines * self.temperature).relu().transpose(-2, -1) @ last
        return torch.tensordot((inside / inside.sum(0)).t(), maps.flatten(2, 3), 1)

    def sums(self, part: Tensor) -> tuple[Tensor, Tensor]:
        """Over the pixels of a cell: products (N, heads, C / heads, C / heads), squares (N, 2, heads, C / heads)."""
        qk = at_least_float32(part[..., : part.shape[-1] // 3 * 2])
        if qk.is_cuda:
            return from_gram(gram_matrix(qk), self.n_heads)
        qk = qk.unflatten(2, (2, self.n_heads, -1))
        q, k = qk.unbind(2)
        return q.permute(0, 2, 3, 1) @ k.transpose(1, 2), qk.square().sum(1)


class Norm(nn.Module):
    """Channel norm, a level deeper in the official names."""

    def __init__(self, n_feats: int) -> None:
        super().__init__()
        self.body = LayerNorm2d(n_feats, 1e-5)

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
        x = self.IDynamicDWConv(x, self.norm1.body)
        return self.IDynamic_ffn(x, self.norm2.body)


class GlobalBlock(nn.Module):
    """Global half of a hybrid block (HDTB): SparseGSA, feed-forward network, each after a norm and plus its input."""

    def __init__(self, n_feats: int, hidden: int, n_heads: int, tlc_size: int) -> None:
        super().__init__()
        self.norm3 = Norm(n_feats)
        self.restormer_attn = SparseGlobalAttention(n_feats, n_heads, tlc_size)
        self.norm4 = Norm(n_feats)
        self.restormer_ffn = GatedFFN(n_feats, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = self.restormer_attn(x, self.norm3.body)
        return self.restormer_ffn(x, self.norm4.body)


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
        check_odd('kernel_size', kernel_size)
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
        x = self.overlap_embed(in_channels_last(x - self.mean))
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
    NetworkSpec,
    DLGSANet,
    (2, 3, 4),
    tiling_exact=False,
    upsampler_prefix='upsample.',
    checkpoint_blocks=(LocalBlock, GlobalBlock),
    recognise=recognise,
)

NETWORKS = {  # parameters and multiply-adds at a 1280x720 output, x2 / x3 / x4
    'DLGSANet': network(),  # 4.73M 1.11T / 4.75M 497G / 4.76M 281G
    'DLGSANet-light': network(LIGHT),  # 745k 177G / 752k 79.4G / 761k 45.2G
    'DLGSANet-tiny': network(TINY),  # 566k 134G / 572k 60.4G / 581k 34.5G
}
