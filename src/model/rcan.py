"""RCAN (ECCV 2018): very deep residual groups with channel attention.

Zhang, Li, Li, Wang, Zhong, Fu, "Image Super-Resolution Using Very Deep Residual Channel Attention Networks",
https://arxiv.org/abs/1807.02758. Official weights load with `strict=True`.

Each residual block ends with channel attention: the means of its channels over the image pass through a bottleneck of
two 1x1 convolutions and a sigmoid and become a factor for each channel. Blocks make groups, and groups the network;
blocks, groups and network each add their input (residual in residual).

Departures from the official code: it takes a `res_scale` and ignores it, which is therefore no setting here; `act` is
in force inside the blocks (the channel attention keeps its ReLU); one colour channel has a mean of its own.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from model.blocks.edsr import Tail, mean_shifts, recognise_ends
from model.common import (
    NetworkSpec,
    activated,
    activation,
    check_divides,
    check_images,
    conv,
    how_many,
    in_fast_memory,
    shape_of,
)


class ChannelAttention(nn.Module):
    """Each channel times a factor in (0, 1) that follows from the means of all channels over the image (figure 3)."""

    def __init__(self, n_feats: int, reduction: int) -> None:
        super().__init__()
        squeeze, excite = conv(n_feats, n_feats // reduction, 1), conv(n_feats // reduction, n_feats, 1)
        self.conv_du = nn.Sequential(squeeze, nn.ReLU(inplace=True), excite, nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.conv_du(x.mean((2, 3), keepdim=True))


class RCAB(nn.Module):
    """Residual channel attention block (figure 4): convolution, activation, convolution, attention, plus the input."""

    def __init__(self, n_feats: int, reduction: int, act: str) -> None:
        super().__init__()
        first, second = conv(n_feats, n_feats, 3), conv(n_feats, n_feats, 3)
        self.body = nn.Sequential(first, activation(act), second, ChannelAttention(n_feats, reduction))

    def forward(self, x: Tensor) -> Tensor:
        first, act, second, attention = self.body
        return x + attention(second(activated(first, act, x)))


class ResidualGroup(nn.Module):
    """Blocks and a convolution, plus the input (figure 2)."""

    def __init__(self, n_resblocks: int, n_feats: int, reduction: int, act: str) -> None:
        super().__init__()
        blocks = (RCAB(n_feats, reduction, act) for _ in range(n_resblocks))
        self.body = nn.Sequential(*blocks, conv(n_feats, n_feats, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class RCAN(nn.Module):
    """RCAN, without settings the one of the paper.

    Args:
        scale: 2, 3, 4 or 8.
        n_resgroups: residual groups G.
        n_resblocks: blocks a group, B.
        n_feats: feature channels C.
        reduction: the channel attention has a bottleneck of n_feats / reduction channels.
        act: activation inside the blocks.
        rgb_range: value of white; black is 0.
        n_colors: 3 (RGB) or 1 (luma).
        shift_mean: subtract the mean colour first and add it last.

    Maps (N, n_colors, H, W) to (N, n_colors, scale * H, scale * W), each image on its own.

    Raises:
        UserError: a reduction that does not divide n_feats.
    """

    def __init__(
        self,
        scale: int,
        n_resgroups: int = 10,
        n_resblocks: int = 20,
        n_feats: int = 64,
        reduction: int = 16,
        act: str = 'relu',
        rgb_range: float = 255,
        n_colors: int = 3,
        shift_mean: bool = True,
    ) -> None:
        super().__init__()
        check_divides('reduction', reduction, n_feats)
        self.n_colors = n_colors
        groups = (ResidualGroup(n_resblocks, n_feats, reduction, act) for _ in range(n_resgroups))
        self.sub_mean, self.add_mean = mean_shifts(rgb_range, n_colors, shift_mean)
        self.head = nn.Sequential(conv(n_colors, n_feats, 3))
        self.body = nn.Sequential(*groups, conv(n_feats, n_feats, 3))
        self.tail = Tail(scale, n_feats, n_colors)

    def forward(self, x: Tensor) -> Tensor:
        check_images(x, self.n_colors)
        if not torch.is_grad_enabled():  # over 400 layers its other rounding changes some gradients by 0.6 %
            x = in_fast_memory(x)
        x = self.head(self.sub_mean(x))
        x = x + self.body(x)
        return self.add_mean(self.tail(x))


def recognise(state: Mapping[str, Tensor]) -> dict[str, object] | None:
    """Scale and settings that the weights of an RCAN show; None for other weights."""
    found = recognise_ends(state)
    squeeze = shape_of(state, 'body.0.body.0.body.3.conv_du.0.weight')
    if found is None or len(squeeze) != 4:
        return None
    found['n_resgroups'] = how_many(state, 'body.') - 1
    found['n_resblocks'] = how_many(state, 'body.0.body.') - 1
    found['reduction'] = squeeze[1] // squeeze[0]
    if 'body.0.body.0.body.1.weight' in state:
        found['act'] = 'prelu'
    return found


# 15.4M parameters, 3.53T multiply-adds at a 1280x720 output / 15.6M 1.59T / 15.6M 917G at x2 / x3 / x4.
NETWORKS = {
    'RCAN': NetworkSpec(RCAN, (2, 3, 4, 8), tiling_exact=False, checkpoint_blocks=(RCAB,), recognise=recognise),
}
