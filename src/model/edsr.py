"""EDSR (CVPRW 2017): a plain residual network without batch normalisation.

Lim, Son, Kim, Nah, Lee, "Enhanced Deep Residual Networks for Single Image Super-Resolution",
https://arxiv.org/abs/1707.02921. Official weights load with `strict=True`.

Departures from the official code: `dilation` dilates the convolutions of the residual blocks by 2 (the official module
for it is missing), `act` is in force, and one colour channel has a mean of its own.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from model.blocks.edsr import ResBlock, Tail, mean_shifts, recognise_ends
from model.common import NetworkSpec, check_images, conv, how_many, in_fast_memory


class EDSR(nn.Module):
    """EDSR of figure 3, without settings the large one of the paper (EDSR, not EDSR-baseline).

    Args:
        scale: 2, 3, 4 or 8.
        n_resblocks: residual blocks B.
        n_feats: feature channels F.
        res_scale: factor of each residual branch.
        act: activation inside the blocks.
        dilation: dilate the blocks' convolutions by 2.
        rgb_range: value of white; black is 0.
        n_colors: 3 (RGB) or 1 (luma).
        shift_mean: subtract the mean colour first and add it last.

    Maps (N, n_colors, H, W) to (N, n_colors, scale * H, scale * W).
    """

    def __init__(
        self,
        scale: int,
        n_resblocks: int = 32,
        n_feats: int = 256,
        res_scale: float = 0.1,
        act: str = 'relu',
        dilation: bool = False,
        rgb_range: float = 255,
        n_colors: int = 3,
        shift_mean: bool = True,
    ) -> None:
        super().__init__()
        self.n_colors = n_colors
        blocks = (ResBlock(n_feats, act, res_scale, 2 if dilation else 1) for _ in range(n_resblocks))
        self.sub_mean, self.add_mean = mean_shifts(rgb_range, n_colors, shift_mean)
        self.head = nn.Sequential(conv(n_colors, n_feats, 3))
        self.body = nn.Sequential(*blocks, conv(n_feats, n_feats, 3))
        self.tail = Tail(scale, n_feats, n_colors)

    def forward(self, x: Tensor) -> Tensor:
        check_images(x, self.n_colors)
        x = self.head(self.sub_mean(in_fast_memory(x)))
        x = x + self.body(x)
        return self.add_mean(self.tail(x))


def recognise(state: Mapping[str, Tensor]) -> dict[str, object] | None:
    """Scale and settings that the weights of an EDSR show; None for other weights."""
    found = recognise_ends(state)
    if found is None or 'body.0.body.0.weight' not in state:
        return None
    found['n_resblocks'] = how_many(state, 'body.') - 1
    if 'body.0.body.1.weight' in state:
        found['act'] = 'prelu'
    return found


SCALES = (2, 3, 4, 8)
BASELINE = {'n_resblocks': 16, 'n_feats': 64, 'res_scale': 1.0}

NETWORKS = {  # parameters and multiply-adds at a 1280x720 output, x2 / x3 / x4
    # 40.7M 9.38T / 43.7M 4.48T / 43.1M 2.89T
    'EDSR': NetworkSpec(EDSR, SCALES, checkpoint_blocks=(ResBlock,), recognise=recognise),
    # 1.37M 316G / 1.55M 160G / 1.52M 114G
    'EDSR-baseline': NetworkSpec(EDSR, SCALES, BASELINE, checkpoint_blocks=(ResBlock,), recognise=recognise),
}
