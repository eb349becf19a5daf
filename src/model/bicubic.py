"""Bicubic interpolation as a network without weights: the baseline of every table.

MATLAB's `imresize(image, scale, 'bicubic')` of a floating-point image: cubic convolution with a = -0.5 (Keys, "Cubic
convolution interpolation for digital image processing", 1981) and mirrored borders. MATLAB rounds an 8-bit image
between the two passes; here nothing is rounded inside, so that 16-bit images keep their depth.
"""

import torch
from torch import Tensor, nn

from model.common import NetworkSpec


def cubic(x: Tensor) -> Tensor:
    """Keys' kernel with a = -0.5; zero outside [-2, 2]."""
    x = x.abs()
    inner = 1.5 * x**3 - 2.5 * x**2 + 1
    outer = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return torch.where(x <= 1, inner, torch.where(x <= 2, outer, torch.zeros_like(x)))


def enlarge_rows(x: Tensor, scale: int) -> Tensor:
    """(..., n) to (..., scale * n) along the last axis."""
    n = x.shape[-1]
    position = torch.arange(-2, n + 2, device=x.device) % (2 * n)
    x = x[..., torch.minimum(position, 2 * n - 1 - position)]
    windows = x.unfold(-1, 4, 1)  # window k holds the pixels k - 2 .. k + 1
    phases = []
    for phase in range(scale):
        centre = (phase + 0.5) / scale - 0.5
        first = -2 if centre < 0 else -1
        taps = torch.arange(first, first + 4, dtype=torch.float64)
        weights = cubic(centre - taps).to(x.device, x.dtype)
        phases.append(windows[..., first + 2 : first + 2 + n, :] @ weights)
    return torch.stack(phases, -1).flatten(-2)


class Bicubic(nn.Module):
    """(N, C, H, W) to (N, C, scale * H, scale * W), any value range; overshoot is not clipped."""

    def __init__(self, scale: int) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        x = enlarge_rows(x.transpose(-2, -1), self.scale).transpose(-2, -1)
        return enlarge_rows(x, self.scale)


NETWORKS = {'Bicubic': NetworkSpec(Bicubic, scales=(2, 3, 4, 5, 6, 7, 8), autocast_dtypes=())}
