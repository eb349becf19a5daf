"""The discriminator of EDSR's adversarial losses, which is that of SRGAN.

Ledig et al., "Photo-Realistic Single Image Super-Resolution Using a Generative Adversarial Network",
https://arxiv.org/abs/1609.04802, figure 4.

Departures from EDSR's code: patches whose side is no multiple of 16 are possible, and the batch normalisation, which
there too is only ever run with the statistics of its batch, keeps no running ones.
"""

from torch import Tensor, nn

from error import UserError

DEPTH = 7


class Discriminator(nn.Module):
    """Logits (N, 1), above 0 for real, of patches (N, n_colors, patch_size, patch_size)."""

    def __init__(self, n_colors: int, patch_size: int) -> None:
        super().__init__()
        channels, side = 64, patch_size
        blocks = [block(n_colors, channels, stride=1)]
        for i in range(DEPTH):
            wider = i % 2
            blocks.append(block(channels, channels * (1 + wider), stride=2 - wider))
            channels *= 1 + wider
            side = side if wider else -(-side // 2)
        self.side = side
        self.features = nn.Sequential(*blocks)
        self.classifier = nn.Sequential(
            nn.Linear(channels * side**2, 1024), nn.LeakyReLU(0.2, inplace=True), nn.Linear(1024, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        if len(x) * self.side**2 == 1:
            raise UserError(
                'A discriminator needs more than one patch of 16 pixels or less: raise --batch_size or --patch_size.'
            )
        return self.classifier(self.features(x).flatten(1))


def block(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    """Convolution, batch normalisation, leaky ReLU."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False),
        nn.BatchNorm2d(out_channels, track_running_stats=False),
        nn.LeakyReLU(0.2, inplace=True),
    )
