"""NLSN (CVPR 2021): EDSR with non-local sparse attention, within buckets of similar pixels.

Mei, Fan, Zhou, "Image Super-Resolution With Non-Local Sparse Attention",
https://openaccess.thecvf.com/content/CVPR2021/html/Mei_Image_Super-Resolution_With_Non-Local_Sparse_Attention_CVPR_2021_paper.html.
Official weights load with `strict=True`.

Spherical locality-sensitive hashing gives every pixel a bucket: which of some random directions and their opposites
has the largest product with its embedding. The pixels are sorted by bucket and cut into windows, and each attends to
its window and to both neighbouring ones. Several rounds with directions of their own make up for similar pixels that
one round separates; a round counts for a pixel as much as the scores that it found there.

Departures from the official code:
- The random directions are the same in every evaluation, so that a result repeats itself and the program's random
  numbers stay untouched: the first draws of a generator seeded with 0. With the paper's settings they are those of the
  official code on a CPU after `torch.manual_seed(0)`. In training they are drawn afresh in every forward pass, as in
  the official code.
- There are at least two buckets; the official code fails for images of fewer than `chunk_size` pixels. An image
  with fewer pixels than the padding of its last window repeats its pixels cyclically.
- The sort is stable, so that results do not depend on the device.
- `act` and `dilation` are in force, and one colour channel has a mean of its own.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from model.blocks.edsr import ResBlock, Tail, mean_shifts, recognise_ends
from model.blocks.sorted_attention import attend, find_pattern
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

BLOCKS_PER_ATTENTION = 8
MOST_BUCKETS = 128


def n_buckets(length: int, chunk_size: int) -> int:
    """Number of hash buckets for `length` pixels: about one a window, even, 2 to 128."""
    n = length // chunk_size
    return min(max(n + n % 2, 2), MOST_BUCKETS)


@torch.no_grad()
def buckets(embedding: Tensor, directions: Tensor) -> Tensor:
    """Bucket of every pixel in each round: embedding (N, L, dim) and directions (dim, R, b / 2) to (N, R, L) int64.

    Of the directions, followed by their opposites, it is the one of the largest product with the embedding. Decided in
    float32 or more, also under autocast.
    """
    embedding = at_least_float32(embedding)
    with full_precision(embedding):
        projections = torch.einsum('nlc,crb->nrlb', embedding, directions.to(embedding.dtype))
    return torch.cat((projections, -projections), -1).argmax(-1)


class SparseAttention(nn.Module):
    """Non-local sparse attention (NLSA), times `res_scale`, plus the input."""

    def __init__(self, n_feats: int, reduction: int, chunk_size: int, res_scale: float) -> None:
        super().__init__()
        self.chunk_size = chunk_size
        self.res_scale = res_scale
        self.conv_match = nn.Sequential(conv(n_feats, n_feats // reduction, 3))
        self.conv_assembly = nn.Sequential(conv(n_feats, n_feats, 1))

    def forward(self, x: Tensor, directions: Tensor) -> Tensor:
        embedding = flatten_image(self.conv_match(x))
        pattern = find_pattern(embedding, buckets(embedding, directions), self.chunk_size)
        out = attend(flatten_image(self.conv_assembly(x)), pattern)
        return torch.add(x, unflatten_image(out, *x.shape[2:]), alpha=self.res_scale)


class NLSN(nn.Module):
    """NLSN, without settings the one of the paper.

    Attention stands before the first and after every eighth residual block.

    Args:
        scale: 2, 3, 4 or 8.
        n_resblocks: residual blocks.
        n_feats: feature channels.
        reduction: the matching embedding has n_feats / reduction channels.
        chunk_size: pixels a window.
        n_hashes: rounds of hashing, combined by their scores.
        res_scale: factor of each residual branch and of the attention.
        act: activation inside the blocks.
        dilation: dilate the blocks' convolutions by 2.
        rgb_range: value of white; black is 0.
        n_colors: 3 (RGB) or 1 (luma).
        shift_mean: subtract the mean colour first and add it last.

    Maps (N, n_colors, H, W) to (N, n_colors, scale * H, scale * W), each image on its own.

    Raises:
        UserError: a reduction that does not divide n_feats.
    """

    draws: Tensor

    def __init__(
        self,
        scale: int,
        n_resblocks: int = 32,
        n_feats: int = 256,
        reduction: int = 4,
        chunk_size: int = 144,
        n_hashes: int = 4,
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
        self.chunk_size = chunk_size
        self.sub_mean, self.add_mean = mean_shifts(rgb_range, n_colors, shift_mean)
        self.head = nn.Sequential(conv(n_colors, n_feats, 3))
        self.body = nn.ModuleList([SparseAttention(n_feats, reduction, chunk_size, res_scale)])
        for i in range(1, n_resblocks + 1):
            self.body.append(ResBlock(n_feats, act, res_scale, 2 if dilation else 1))
            if i % BLOCKS_PER_ATTENTION == 0:
                self.body.append(SparseAttention(n_feats, reduction, chunk_size, res_scale))
        self.body.append(conv(n_feats, n_feats, 3))
        self.tail = Tail(scale, n_feats, n_colors)

        # Attentions, dim, rounds. What evaluation needs is drawn here, since torch.export cannot trace a generator; on
        # the CPU, so that a network made on the meta device has it too; as a buffer it moves with the network.
        self.sets = (1 + n_resblocks // BLOCKS_PER_ATTENTION, n_feats // reduction, n_hashes)
        most, generator = math.prod(self.sets) * MOST_BUCKETS // 2, torch.Generator().manual_seed(0)
        draws = torch.randn(most, generator=generator, dtype=torch.float32, device='cpu')
        self.register_buffer('draws', draws, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        check_images(x, self.n_colors)
        directions = iter(self.directions(x))
        head = x = self.head(self.sub_mean(in_fast_memory(x)))
        for module in self.body:
            x = module(x, next(directions)) if isinstance(module, SparseAttention) else module(x)
        return self.add_mean(self.tail(x + head))

    def directions(self, x: Tensor) -> Tensor:
        """Random directions of each attention on images like `x`: (attentions, dim, R, b / 2) float32."""
        shape = (*self.sets, n_buckets(x.shape[2] * x.shape[3], self.chunk_size) // 2)
        if self.training:
            return torch.randn(shape, device=x.device)
        return self.draws[: math.prod(shape)].view(*self.sets, -1).to(x.device)


def recognise(state: Mapping[str, Tensor]) -> dict[str, object] | None:
    """Scale and settings that the weights of an NLSN show; None for other weights."""
    found = recognise_ends(state)
    match = shape_of(state, 'body.0.conv_match.0.weight')
    if found is None or len(match) != 4:
        return None
    found['n_resblocks'] = sum(f'body.{i}.body.0.weight' in state for i in range(how_many(state, 'body.')))
    found['reduction'] = match[1] // match[0]
    if 'body.1.body.1.weight' in state:
        found['act'] = 'prelu'
    return found


# 41.8M parameters, 10.3T multiply-adds at a 1280x720 output / 44.7M 4.88T / 44.2M 3.12T at x2 / x3 / x4.
NETWORKS = {
    'NLSN': NetworkSpec(
        NLSN, (2, 3, 4, 8), tiling_exact=False, checkpoint_blocks=(ResBlock, SparseAttention), recognise=recognise
    )
}
