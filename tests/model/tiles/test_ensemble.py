import torch
from torch import Tensor, nn

from model.tiles.ensemble import self_ensemble


class Lopsided(nn.Module):
    """Enlarges by 2 with a random kernel, which no flip or rotation leaves as it is; counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.PixelShuffle(2)).double()
        self.shapes: list[torch.Size] = []

    def forward(self, x: Tensor) -> Tensor:
        self.shapes.append(x.shape)
        return self.layers(x)


def plain_ensemble(net: nn.Module, x: Tensor) -> Tensor:
    """Turn, mirror, run, mirror back, turn back: one image at a time."""
    images = []
    for image in x.split(1):
        outputs = []
        for turns in range(4):
            turned = image.rot90(turns, (2, 3))
            outputs.append(net(turned).rot90(-turns, (2, 3)))
            outputs.append(net(turned.flip(3)).flip(3).rot90(-turns, (2, 3)))
        images.append(sum(outputs) / 8)
    return torch.cat(images)


@torch.no_grad()
def test_is_the_mean_over_the_eight_flips_and_rotations() -> None:
    net = Lopsided()
    for batch, height, width in [(1, 5, 5), (1, 4, 7), (3, 6, 2), (2, 1, 1)]:
        x = torch.rand(batch, 3, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        expected = plain_ensemble(net, x)
        assert torch.allclose(self_ensemble(net, x), expected, rtol=0, atol=1e-12)
        # A network without this effect would not show a missing or repeated transform.
        assert (net(x) - expected).abs().max() > 1e-2


@torch.no_grad()
def test_takes_two_calls() -> None:
    net = Lopsided()
    self_ensemble(net, torch.zeros(2, 3, 4, 7, dtype=torch.float64))
    assert net.shapes == [(8, 3, 4, 7), (8, 3, 7, 4)]
