"""LCoAN (2024): learnable collaborative attention, one sparse attention map for the whole network.

Zhao, Zhang, Shi, Sun, Wang, Zhang, Xu, "Efficient Learnable Collaborative Attention for Single Image Super-Resolution",
https://arxiv.org/abs/2404.04922. Official weights load with `strict=True`.

The first group clusters its pixels by k-means (the learnable sparse pattern), sorts them by cluster, cuts the sorted
sequence into windows and attends within a window and its two neighbours. The attention map is computed there only;
every later group multiplies the same map with values of its own (collaborative attention).

Departures from the official code:
- The centroids follow an exponential moving average in training, as the paper says; the official code computes the
  average and throws it away. They are initialised by the first training batch, never by a test image: evaluating a
  network that was never trained is refused.
- The match convolutions of groups 2 and later are part of the official weights, but their results are never used;
  they are not run.
- The average moves once a forward pass in training, so `--split_batch` moves it once a part.
- The sort is stable, so that results do not depend on the device.
- An image with fewer pixels than the padding of its last window repeats its pixels cyclically; the official code fails.
- `act` and `dilation` are in force.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

from model.blocks.centroids import Centroids, moved
from model.blocks.edsr import ResBlock, Tail, mean_shifts, recognise_ends
from model.blocks.sorted_attention import Pattern, attend, find_pattern
from model.blocks.tokens import flatten_image, unflatten_image
from model.common import (
    NetworkSpec,
    at_least_float32,
    check_divides,
    check_images,
    conv,
    full_precision,
    how_many,
    in_fast_memory,
    shape_of,
)

LLOYD_STEPS = 10


def of_all_ranks(rows: Tensor) -> Tensor:
    """`rows` of all processes of a distributed run, one after the other; `rows` itself in a single one."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return rows
    found = [rows] * distributed.get_world_size()
    distributed.all_gather_object(found, rows.cpu())
    return torch.cat(found).to(rows.device)


class KMeans(Centroids):
    """Spherical k-means, `rounds` independent clusterings of one embedding.

    The first training batch initialises the centroids, and each batch moves them.
    """

    def __init__(self, rounds: int, n_clusters: int, dim: int, decay: float) -> None:
        super().__init__(rounds, n_clusters, dim, decay=decay)

    @torch.no_grad()
    def forward(self, embedding: Tensor) -> Tensor:
        """Cluster of every pixel: (N, L, dim) to (N, R, L) int64. Decided in float32 or more, also under autocast."""
        embedding = at_least_float32(embedding)
        with full_precision(embedding):
            if self.training:
                if not self.initialised():
                    self._initialise(embedding)
            else:
                self.check_initialised('LCoAN')
            unit = F.normalize(embedding, dim=-1)
            codes = self._assign(unit)
            if self.training:
                self.means.lerp_(moved(self.means, unit, codes), 1 - self.decay)
        return codes

    def _assign(self, x: Tensor) -> Tensor:
        return torch.einsum('nld,rkd->nrlk', x, self.means.to(x.dtype)).argmax(-1)

    def _initialise(self, x: Tensor) -> None:
        """Random pixels of the batch (of all ranks, chosen by the first), then Lloyd steps on the raw embedding."""
        n_clusters = self.means.shape[1]
        pixels = of_all_ranks(x.flatten(0, 1))
        for means in self.means:
            if len(pixels) >= n_clusters:
                picks = torch.randperm(len(pixels))[:n_clusters]
            else:
                picks = torch.randint(len(pixels), (n_clusters,))
            means.copy_(pixels[picks.to(x.device)])
        if distributed.is_available() and distributed.is_initialized():
            distributed.broadcast(self.means, 0)
        for _ in range(LLOYD_STEPS):
            self.means.copy_(moved(self.means, x, self._assign(x)))
        self.initted.fill_(True)


class CollaborativeAttention(nn.Module):
    """Sparse attention that either finds the pattern (first group) or takes it over (all others), plus its input.

    Values are weighted by the map over windows of clustered pixels.
    """

    def __init__(
        self,
        n_feats: int,
        reduction: int,
        n_hashes: int,
        n_clusters: int,
        window_size: int,
        ema_decay: float,
        res_scale: float,
    ) -> None:
        super().__init__()
        self.window_size = window_size
        self.res_scale = res_scale
        self.kmeans = KMeans(n_hashes, n_clusters, n_feats // reduction, ema_decay)
        self.conv_match = nn.Sequential(conv(n_feats, n_feats // reduction, 3))
        self.conv_assembly = nn.Sequential(conv(n_feats, n_feats, 1))

    def forward(self, x: Tensor, pattern: Pattern | None) -> tuple[Tensor, Pattern]:
        if pattern is None:
            embedding = flatten_image(self.conv_match(x))
            pattern = find_pattern(embedding, self.kmeans(embedding), self.window_size)
        out = attend(flatten_image(self.conv_assembly(x)), pattern)
        return torch.add(x, unflatten_image(out, *x.shape[2:]), alpha=self.res_scale), pattern


class Group(nn.Module):
    """Residual blocks (local), attention (non-local) and a convolution, scaled, plus the input."""

    def __init__(
        self, blocks: nn.Sequential, attention: CollaborativeAttention, n_feats: int, res_scale: float
    ) -> None:
        super().__init__()
        self.local_body = blocks
        self.attention = nn.ModuleList([attention])
        self.m_conv = nn.Sequential(conv(n_feats, n_feats, 3))
        self.res_scale = res_scale

    def forward(self, x: Tensor, pattern: Pattern | None) -> tuple[Tensor, Pattern]:
        out, pattern = self.attention[0](self.local_body(x), pattern)
        return torch.add(x, self.m_conv(out), alpha=self.res_scale), pattern


class LCoAN(nn.Module):
    """LCoAN, without settings the one of the paper.

    Args:
        scale: 2, 3, 4 or 8.
        n_resgroups: groups.
        n_resblocks: residual blocks a group.
        n_feats: feature channels.
        reduction: the matching embedding has n_feats / reduction channels.
        n_clusters: k-means clusters.
        window_size: clustered pixels a window.
        ema_decay: decay of the centroids' moving average.
        n_hashes: independent clusterings, combined by their scores.
        res_scale: factor of the attention's and each group's branch.
        act: activation inside the blocks.
        dilation: dilate the blocks' convolutions by 2.
        rgb_range: value of white; black is 0.
        n_colors: 3 (RGB) or 1 (luma).
        shift_mean: subtract the mean colour first and add it last.

    Maps (N, n_colors, H, W) to (N, n_colors, scale * H, scale * W), each image on its own.
    """

    def __init__(
        self,
        scale: int,
        n_resgroups: int = 10,
        n_resblocks: int = 4,
        n_feats: int = 128,
        reduction: int = 1,
        n_clusters: int = 128,
        window_size: int = 384,
        ema_decay: float = 0.999,
        n_hashes: int = 1,
        res_scale: float = 0.1,
        act: str = 'relu',
        dilation: bool = False,
        rgb_range: float = 1,
        n_colors: int = 3,
        shift_mean: bool = True,
    ) -> None:
        super().__init__()
        check_divides('reduction', reduction, n_feats)
        self.n_colors = n_colors
        self.a = nn.Parameter(torch.ones(1))  # unused, but part of the official weights
        self.sub_mean, self.add_mean = mean_shifts(rgb_range, n_colors, shift_mean)
        self.head = nn.Sequential(conv(n_colors, n_feats, 3))
        self.body = nn.ModuleList()
        for _ in range(n_resgroups):
            blocks = (ResBlock(n_feats, act, dilation=2 if dilation else 1) for _ in range(n_resblocks))
            attention = CollaborativeAttention(
                n_feats, reduction, n_hashes, n_clusters, window_size, ema_decay, res_scale
            )
            self.body.append(Group(nn.Sequential(*blocks), attention, n_feats, res_scale))
        self.m_conv = nn.Sequential(conv(n_feats, n_feats, 3))
        self.tail = Tail(scale, n_feats, n_colors)

    def forward(self, x: Tensor) -> Tensor:
        check_images(x, self.n_colors)
        head = self.head(self.sub_mean(in_fast_memory(x)))
        x, pattern = head, None
        for group in self.body:
            x, pattern = group(x, pattern)
        return self.add_mean(self.tail(self.m_conv(x) + head))


def recognise(state: Mapping[str, Tensor]) -> dict[str, object] | None:
    """Scale and settings that the weights of an LCoAN show; None for other weights."""
    found = recognise_ends(state)
    means = shape_of(state, 'body.0.attention.0.kmeans.means')
    if found is None or len(means) != 3:
        return None
    found |= {
        'n_resgroups': how_many(state, 'body.'),
        'n_resblocks': how_many(state, 'body.0.local_body.'),
        'reduction': shape_of(state, 'head.0.weight')[0] // means[2],
        'n_clusters': means[1],
        'n_hashes': means[0],
    }
    if 'body.0.local_body.0.body.1.weight' in state:
        found['act'] = 'prelu'
    return found


# 15.7M parameters, 3.68T multiply-adds at a 1280x720 output / 16.4M 1.71T / 16.3M 1.06T at x2 / x3 / x4; of the
# parameters 1.33M (match convolutions of groups 2-10) and their 306G / 136G / 76G in the official count are never used.
AUTOCAST_DTYPES = (torch.bfloat16, torch.float16)  # float16 costs LCoAN-small x2 less than 0.001 dB on Set5
NETWORKS = {
    'LCoAN': NetworkSpec(
        LCoAN,
        (2, 3, 4, 8),
        tiling_exact=False,
        autocast_dtypes=AUTOCAST_DTYPES,
        checkpoint_blocks=(ResBlock,),
        recognise=recognise,
    )
}
