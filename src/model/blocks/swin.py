"""The frame of SwinIR, in which its descendants (ATD, HiT-SRF, PFT) stand: between convolutions pixels are tokens."""

from collections import OrderedDict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from model.blocks.tokens import TokenNorm, flatten_image, unflatten_image
from model.common import RGB_MEAN, at_least_float32, check_images, conv, mirror_pad


class Block(nn.Module):
    """A group of layers and a convolution, plus the input: tokens (N, H * W, C) to the same shape.

    Args:
        group: called with tokens, H, W, and what all blocks are given.
        n_feats: C.
    """

    def __init__(self, group: nn.Module, n_feats: int) -> None:
        super().__init__()
        self.residual_group = group
        self.conv = conv(n_feats, n_feats, 3)

    def forward(self, x: Tensor, height: int, width: int, *shared: object) -> Tensor:
        y = self.residual_group(x, height, width, *shared)
        y, x = (unflatten_image(tokens, height, width) for tokens in (y, x))
        return flatten_image(self.conv(y, plus=x))


class Frame(nn.Module):
    """First and last convolutions and norms around the blocks; `upsample` is what a network adds itself.

    Args:
        scale: factor of enlargement.
        n_feats: feature channels.
        multiple: of which the sides of an image are made by its mirror image, the edge pixel repeated.
        groups: of the layers, a group a block; they are made, one after the other, when their turn comes.

    Maps (N, 3, H, W) to (N, 3, scale * H, scale * W); black is 0, white is 1.
    """

    mean: Tensor
    upsample: nn.Module

    def __init__(self, scale: int, n_feats: int, multiple: int, groups: Iterable[nn.Module]) -> None:
        super().__init__()
        self.scale, self.multiple = scale, multiple
        self.register_buffer('mean', torch.tensor(RGB_MEAN).view(3, 1, 1), persistent=False)
        self.conv_first = conv(3, n_feats, 3)
        self.patch_embed = nn.Sequential(OrderedDict(norm=TokenNorm(n_feats)))
        self.layers = nn.ModuleList(Block(group, n_feats) for group in groups)
        self.norm = TokenNorm(n_feats)
        self.conv_after_body = conv(n_feats, n_feats, 3)

    def forward(self, x: Tensor) -> Tensor:
        check_images(x)
        out_height, out_width = (self.scale * side for side in x.shape[2:])
        x = self.conv_first(mirror_pad(x, self.multiple) - self.mean)
        x = self.enlarge(self.conv_after_body(self.body(x), plus=x))
        return x[..., :out_height, :out_width] + self.mean

    def body(self, x: Tensor) -> Tensor:
        """Features (N, C, H, W) through all blocks."""
        height, width = x.shape[2:]
        shared = self.shared(x)
        x = self.patch_embed(at_least_float32(flatten_image(x)))
        for block in self.layers:
            x = block(x, height, width, *shared)
        return unflatten_image(self.norm(x), height, width)

    def shared(self, x: Tensor) -> tuple[object, ...]:
        """What all blocks are given besides the tokens, for features like `x` (N, C, H, W)."""
        return ()

    def enlarge(self, x: Tensor) -> Tensor:
        """Features (N, C, H, W) to the image (N, 3, scale * H, scale * W), without the mean colour."""
        return self.upsample(x)
