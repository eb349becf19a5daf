"""The Charbonnier loss: the absolute difference, rounded off around 0."""

from torch import Tensor, nn


class Charbonnier(nn.Module):
    """Mean of sqrt(d^2 + eps^2) over the differences d of two tensors, eps = 0.001 of the way from black to white.

    Charbonnier, Blanc-Feraud, Aubert, Barlaud, "Two deterministic half-quadratic regularization algorithms for computed
    imaging", ICIP 1994; with this eps in Lai, Huang, Ahuja, Yang (LapSRN), https://arxiv.org/abs/1704.03915.
    """

    def __init__(self, value_range: tuple[float, float]) -> None:
        super().__init__()
        black, white = value_range
        self.eps = 1e-3 * (white - black)

    def forward(self, sr: Tensor, hr: Tensor) -> Tensor:
        return ((sr - hr).square() + self.eps**2).sqrt().mean()
