"""CATANet (CVPR 2025): attention among tokens that are alike, wherever they are, and within overlapping patches.

Liu, Liu, Tang, Wu, "CATANet: Efficient Content-Aware Token Aggregation for Lightweight Image Super-Resolution",
https://arxiv.org/abs/2503.06896. Official weights load with `strict=True`.

Each block has centres of its own, shared by all images. Tokens are sorted by the centre that they are most similar to
and cut into groups; a group attends to itself and to the next one (IASA), and each token to all centres (IRCA). After
that each token attends within square patches that overlap by two pixels (LRSA). The centres follow the tokens of the
training batches.

What of the official code's oddities is kept, since the published weights were trained with it:
- Where (side - patch) % (patch - 2) is 1 and there are three patches or more, as with patches of 16 at sides of 31, 45,
  59, the last patch overlaps two others in one row (column) of pixels. The mean of the three is divided by four instead
  of three: that row comes out of the patches at 3/4 of its value. A repair would move an output of such a side by up to
  7 % of its largest value with random weights.
- Attention scales its products by the root of the channels of a head; the number that is called `scale` is not used.

Departures from the official code:
- The sort is stable. PyTorch's default one, in the official code, leaves it to the device which tokens of a cluster
  come into which group.
- A side that is smaller than a patch is taken as one patch. So does the official code below 9 pixels; from 9 to 27 it
  loses most of the map, which becomes zero without a word.
- An image with fewer tokens than the last groups lack is mirrored again and again; the official code fails.
- The centres are initialised by the first training batch, never by a test image: evaluating a network that was never
  trained is refused. They start from runs of tokens as there, but of the image alone: the official code fills up the
  last runs by the mirror image, and at some sizes two centres are the same then, between which rounding decides.
- Several processes agree on the centres, which are those of all their images.
- The centre of a token is chosen in float32 under autocast.
"""

import math
from collections.abc import Mapping
from itertools import cycle, islice
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from error import UserError
from model.blocks.centroids import Centroids, moved
from model.blocks.tokens import (
    ConvFFN,
    TokenLinear,
    TokenNorm,
    flatten_image,
    inverse_of,
    stable_order,
    take_rows,
    unflatten_image,
)
from model.blocks.windows import MOST_WINDOW, attention, hidden_width, init_linear
from model.common import (
    Float32Conv,
    NetworkSpec,
    at_least_float32,
    check_divides,
    check_images,
    check_least,
    check_numbers,
    conv,
    full_precision,
    how_many,
    in_fast_memory,
    mirrored,
    shape_of,
)
from model.ops.fused_linear import Norm, fused_linear

OVERLAP = 2  # pixels that two neighbouring patches share
SLOPE = 0.1  # of the upsampler's LeakyReLU


class SelfAttention(nn.Module):
    """The linear layers of an attention, none of which has a bias."""

    def __init__(self, n_feats: int, qk_dim: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads, self.qk_dim = n_heads, qk_dim
        self.to_q = TokenLinear(n_feats, qk_dim, bias=False)
        self.to_k = TokenLinear(n_feats, qk_dim, bias=False)
        self.to_v = TokenLinear(n_feats, n_feats, bias=False)
        self.proj = TokenLinear(n_feats, n_feats, bias=False)

    def qkv(self, x: Tensor, norm: Norm | None = None) -> Tensor:
        """Queries, keys and values of tokens (N, L, C) side by side, (N, L, 2 * qk_dim + C), after a norm."""
        weight = torch.cat((self.to_q.weight, self.to_k.weight, self.to_v.weight))
        return fused_linear(x, [(weight, None)], norm=norm)

    def heads(self, qkv: Tensor) -> tuple[Tensor, ...]:
        """(..., 2 * qk_dim + C) to queries and keys (..., heads, d) and values (..., heads, e)."""
        parts = qkv.tensor_split((self.qk_dim, 2 * self.qk_dim), -1)
        return tuple(part.unflatten(-1, (self.n_heads, -1)) for part in parts)


class IntraGroupAttention(SelfAttention):
    """IASA: attention within groups of tokens of the same centre, plus that to the centres (IRCA)."""

    def __init__(self, n_feats: int, qk_dim: int, n_heads: int, group_size: int) -> None:
        super().__init__(n_feats, qk_dim, n_heads)
        self.group_size = group_size

    def forward(self, x: Tensor, codes: Tensor, keys: Tensor, values: Tensor, last: nn.Conv2d, plus: Tensor) -> Tensor:
        """To the shape of the tokens, through the projection and the 1x1 convolution `last`, with `plus` added.

        Args:
            x: tokens (N, L, C).
            codes: the centre of each, (N, L) int64.
            keys, values: (M, qk_dim) and (M, C), of the centres.
        """
        n, length, channels = x.shape
        size = min(length, self.group_size)
        groups = (length + size - 1) // size
        order = stable_order(codes, len(keys))
        # The last group is filled up by the last tokens mirrored, and has mirrored ones as its neighbour.
        order = order.index_select(1, mirrored((groups + 1) * size, length, x.device))
        rows = take_rows(self.qkv(x), order)
        q, _, _ = self.heads(rows[:, :-size].reshape(n * groups, size, -1))
        both = rows.unfold(1, 2 * size, size).transpose(2, 3).flatten(0, 1)  # each group and the next one
        _, k, v = self.heads(both)
        out = attention(q, k, v)
        k, v = (of.unflatten(-1, (self.n_heads, -1)).expand(len(q), -1, -1, -1) for of in (keys, values))
        out = out + attention(q, k, v)
        out = take_rows(out.view(n, -1, channels), inverse_of(order[:, :length]))
        return fused_linear(out, [(self.proj.weight, None), (last.weight, None)], plus=plus)


class CentreAttention(nn.Module):
    """IRCA: keys and values of the centres."""

    def __init__(self, n_feats: int, qk_dim: int) -> None:
        super().__init__()
        self.to_k = nn.Linear(n_feats, qk_dim, bias=False)
        self.to_v = nn.Linear(n_feats, n_feats, bias=False)

    def forward(self, centres: Tensor) -> tuple[Tensor, Tensor]:
        return self.to_k(centres), self.to_v(centres)


class FeedForward(nn.Module):
    """Norm and feed-forward network, plus the input."""

    def __init__(self, n_feats: int, hidden: int) -> None:
        super().__init__()
        self.norm = TokenNorm(n_feats)
        self.fn = ConvFFN(n_feats, hidden, 5)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        return self.fn(x, height, width, norm=self.norm, plus=x)


class TokenAggregation(Centroids):
    """TAB: the centres, attention by groups and to the centres, and the feed-forward network."""

    def __init__(
        self,
        n_feats: int,
        qk_dim: int,
        n_heads: int,
        hidden: int,
        n_centres: int,
        group_size: int,
        n_iters: int,
        ema_decay: float,
    ) -> None:
        super().__init__(n_centres, n_feats, decay=ema_decay)
        self.n_iters = n_iters
        self.norm = TokenNorm(n_feats)
        self.mlp = FeedForward(n_feats, hidden)
        self.irca_attn = CentreAttention(n_feats, qk_dim)
        self.iasa_attn = IntraGroupAttention(n_feats, qk_dim, n_heads, group_size)
        self.conv1x1 = conv(n_feats, n_feats, 1, bias=False)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """Tokens (N, H * W, C) to the same shape."""
        normed = self.norm(x)
        with full_precision(x):
            centres, codes = self.centres(at_least_float32(normed))
        x = self.iasa_attn(normed, codes, *self.irca_attn(centres), self.conv1x1, plus=x)
        return self.mlp(x, height, width)

    def centres(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The centres (M, C), and the one that each token of (N, L, C) is most similar to, (N, L) int64.

        In training k-means goes on from the centres so far for `n_iters` steps, of which the last one has a gradient.
        """
        if not self.training:
            self.check_initialised('CATANet')
            return self.means, nearest(x, self.means)
        unit, fresh = F.normalize(x, dim=-1), not self.initialised()
        centres = self.first_centres(x.detach()) if fresh else self.means
        for i in range(self.n_iters):
            centres = F.normalize(centres, dim=-1)
            members = unit if i == self.n_iters - 1 else unit.detach()
            codes = nearest(unit, centres)
            centres = moved(centres.unsqueeze(0), members, codes.unsqueeze(1)).squeeze(0)
        with torch.no_grad():
            self.means.lerp_(centres, 1.0 if fresh else 1 - self.decay)
            if fresh:
                self.initted.fill_(True)
        return centres, nearest(unit, centres)

    def first_centres(self, x: Tensor) -> Tensor:
        """Directions of the means of M runs of tokens that follow one another, over the batch and all ranks."""
        n, length, _ = x.shape
        runs = torch.arange(length, device=x.device) * len(self.means) // length
        return moved(self.means.unsqueeze(0), x, runs.expand(n, 1, -1)).squeeze(0)


@torch.no_grad()
def nearest(x: Tensor, centres: Tensor) -> Tensor:
    """The centre (M, C) with the largest cosine to each token of (N, L, C): (N, L) int64."""
    return (x @ F.normalize(centres.to(x.dtype), dim=-1).t()).argmax(-1)


class Cover(NamedTuple):
    """How patches cover an axis of pixels, the last one moved back to its end."""

    pixels: Tensor  # (patches, size) int64: the pixels of each patch
    first: Tensor  # (side,) int64: where in `pixels`, flattened, a pixel stands in the first patch that covers it
    last: Tensor  # (side,) int64: in the last one
    seam: Tensor | None  # (side,) bool: the pixel that three patches cover, if there is one


def cover(side: int, size: int, device: torch.device) -> Cover:
    """Patches of `size` pixels, each `OVERLAP` of them over the one before; of the whole side if it is not larger."""
    size = min(size, side)
    step, end = max(size - OVERLAP, 1), side - size
    count = (end + step - 1) // step + 1
    starts = (torch.arange(count, device=device) * step).clamp(max=end)
    pixel = torch.arange(side, device=device)
    first = ((pixel - size + step) // step).clamp(0, count - 1)
    last = torch.where(pixel >= end, count - 1, (pixel // step).clamp(max=max(count - 2, 0)))
    first, last = (patch * size + pixel - starts.index_select(0, patch) for patch in (first, last))
    triple = count > 2 and end % step == 1
    return Cover(starts[:, None] + torch.arange(size, device=device), first, last, pixel == end if triple else None)


def average(patches: Tensor, axis: int, along: Cover) -> Tensor:
    """Pixels of patches that stand one after the other along `axis` to means of those at the same place.

    The sum of three pixels, which the seam has, is divided by four, as in the official code.
    """
    out = (patches.index_select(axis, along.first) + patches.index_select(axis, along.last)) / 2
    if along.seam is None:
        return out
    size = along.pixels.shape[1]
    between = (along.last - size + along.pixels[-1, 0] - along.pixels[-2, 0]).clamp(min=0)
    seam = along.seam.view(-1, *[1] * (patches.dim() - 1 - axis))
    return torch.where(seam, (2 * out + patches.index_select(axis, between)) / 4, out)


class PatchAttention(nn.Module):
    """The attention of LRSA: norm, attention within square patches that overlap, plus the input.

    All but the attention itself is done once for each pixel, not once for each patch that it is in.
    """

    def __init__(self, n_feats: int, qk_dim: int, n_heads: int, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.norm = TokenNorm(n_feats)
        self.fn = SelfAttention(n_feats, qk_dim, n_heads)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """Tokens (N, H * W, C) to the same shape."""
        n, length, channels = x.shape
        rows, columns = (cover(side, self.patch_size, x.device) for side in (height, width))
        pixels = rows.pixels[:, None, :, None] * width + columns.pixels[None, :, None, :]
        patches = take_rows(self.fn.qkv(x, self.norm), pixels.flatten().expand(n, -1))
        q, k, v = self.fn.heads(patches.view(-1, pixels.shape[2] * pixels.shape[3], patches.shape[-1]))
        out = attention(q, k, v).view(n, *pixels.shape, channels).transpose(2, 3)
        out = out.reshape(n, rows.pixels.numel(), columns.pixels.numel(), channels)
        out = average(average(out, 2, columns), 1, rows)
        x = x.view(n, height, width, channels)
        for seam, axes in ((rows.seam, (-1, 1, 1)), (columns.seam, (-1, 1))):
            if seam is not None:
                x = torch.where(seam.view(axes), 0.75 * x, x)
        return self.fn.proj(out.view(n, length, channels), plus=x.view(n, length, channels))


class InTurn(nn.ModuleList):
    """Modules of tokens, one after the other."""

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        for module in self:
            x = module(x, height, width)
        return x


class LocalRegionAttention(nn.Module):
    """LRSA: attention within patches and the feed-forward network."""

    def __init__(self, n_feats: int, qk_dim: int, n_heads: int, hidden: int, patch_size: int) -> None:
        super().__init__()
        self.layer = InTurn([PatchAttention(n_feats, qk_dim, n_heads, patch_size), FeedForward(n_feats, hidden)])

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        return self.layer(x, height, width)


class CATANet(nn.Module):
    """CATANet, without settings the one of the paper.

    Of the numbers with a dash between two each block takes the next one, and after the last the first again.

    Args:
        scale: 2, 3 or 4.
        n_feats: feature channels.
        n_resblocks: residual groups.
        qk_dim: channels of queries and keys.
        n_heads: attention heads.
        mlp_ratio: channels inside the feed-forward networks, as a multiple of n_feats.
        patch_sizes: pixels along the side of a patch.
        n_centres: centres of a block.
        group_sizes: tokens a group.
        n_iters: steps of k-means in training, 1 or more.
        ema_decay: decay of the centres' moving average.

    Maps (N, 3, H, W) to (N, 3, scale * H, scale * W), each image on its own; black is 0, white is 1.

    Raises:
        UserError: heads do not divide the channels, no steps, not numbers with dashes; in evaluation, never trained.
    """

    def __init__(
        self,
        scale: int,
        n_feats: int = 40,
        n_resblocks: int = 8,
        qk_dim: int = 36,
        n_heads: int = 4,
        mlp_ratio: float = 2.4,
        patch_sizes: str = '16-20-24-28',
        n_centres: str = '16-32-64-128',
        group_sizes: str = '256-128-64-32',
        n_iters: int = 5,
        ema_decay: float = 0.999,
    ) -> None:
        super().__init__()
        check_divides('n_heads', n_heads, n_feats)
        check_least('qk_dim', qk_dim, 1)
        if qk_dim % n_heads:
            raise UserError(f'--n_heads {n_heads} does not divide --net qk_dim={qk_dim}: choose a divisor.')
        check_least('n_iters', n_iters, 1)
        numbers = {'patch_sizes': patch_sizes, 'n_centres': n_centres, 'group_sizes': group_sizes}
        sizes = [cycle(check_numbers(option, text)) for option, text in numbers.items()]
        hidden = hidden_width(n_feats, mlp_ratio)
        self.scale = scale
        self.first_conv = conv(3, n_feats, 3)
        self.blocks = nn.ModuleList()
        for patch, centres, group in islice(zip(*sizes, strict=False), n_resblocks):
            if not 2 * OVERLAP <= patch <= MOST_WINDOW:
                raise UserError(
                    f'--net patch_sizes={patch_sizes}: {patch} is not from 4 to {MOST_WINDOW}; choose less.'
                )
            tab = TokenAggregation(n_feats, qk_dim, n_heads, hidden, centres, group, n_iters, ema_decay)
            self.blocks.append(InTurn([tab, LocalRegionAttention(n_feats, qk_dim, n_heads, hidden, patch)]))
        self.mid_convs = nn.ModuleList(conv(n_feats, n_feats, 3) for _ in range(n_resblocks))
        if scale == 4:
            self.upconv1, self.upconv2 = (conv(n_feats, 4 * n_feats, 3) for _ in range(2))
        else:
            self.upconv = conv(n_feats, scale**2 * n_feats, 3)
        self.last_conv = Float32Conv(n_feats, 3, 3)
        self.apply(init_linear)

    def forward(self, x: Tensor) -> Tensor:
        check_images(x)
        base = F.interpolate(x, scale_factor=self.scale, mode='bilinear', align_corners=False)
        head = x = self.first_conv(in_fast_memory(x))
        height, width = x.shape[2:]
        for block, mid_conv in zip(self.blocks, self.mid_convs, strict=True):
            y = unflatten_image(block(flatten_image(x), height, width), height, width)
            x = mid_conv(y, plus=x)
        x = x + head
        for step in (self.upconv1, self.upconv2) if self.scale == 4 else (self.upconv,):
            x = F.leaky_relu(F.pixel_shuffle(step(x), 2 if self.scale == 4 else self.scale), SLOPE)
        return self.last_conv(x) + base


def shortest(numbers: list[int]) -> str:
    """The fewest numbers that give these when they are repeated, with a dash between two."""
    periods = (n for n in range(1, len(numbers) + 1) if numbers == list(islice(cycle(numbers[:n]), len(numbers))))
    return '-'.join(map(str, numbers[: next(periods)]))


def recognise(state: Mapping[str, Tensor]) -> dict[str, object] | None:
    """Scale and settings that the state dict of a CATANet shows; None for another network."""
    n_blocks = how_many(state, 'blocks.')
    head, qk, hidden = (
        shape_of(state, key)
        for key in ('first_conv.weight', 'blocks.0.0.iasa_attn.to_q.weight', 'blocks.0.0.mlp.fn.fc1.weight')
    )
    centres = [shape_of(state, f'blocks.{i}.0.means') for i in range(n_blocks)]
    if not head or not qk or not hidden or not all(centres):
        return None
    scale = 4 if 'upconv2.weight' in state else math.isqrt(len(state['upconv.weight']) // head[0])
    return {
        'scale': scale,
        'n_feats': head[0],
        'n_resblocks': n_blocks,
        'qk_dim': qk[0],
        'mlp_ratio': hidden[0] / head[0],
        'n_centres': shortest([shape[0] for shape in centres]),
    }


NETWORKS = {  # parameters and multiply-adds at a 1280x720 output, x2 / x3 / x4: 477K 237G / 550K 115G / 535K 74.2G
    'CATANet': NetworkSpec(
        CATANet,
        (2, 3, 4),
        tiling_exact=False,
        upsampler_prefix='upconv',
        checkpoint_blocks=(IntraGroupAttention, PatchAttention, FeedForward),
        recognise=recognise,
    )
}
