"""The frequency loss: the absolute difference of spectra."""

import torch
from torch import Tensor, nn


class Frequency(nn.Module):
    """Mean absolute difference of the two-dimensional discrete Fourier transforms of (N, C, H, W).

    As in the code of Cho, Ji, Hong, Jung, Ko (MIMO-UNet), https://arxiv.org/abs/2108.05054: the transform is a plain
    sum over the pixels, and the mean is over the real and imaginary parts of all frequencies. So the weights of papers
    carry over (0.1 beside L1 there), and the value of an error that is noise grows with the side of the patch.
    """

    def forward(self, sr: Tensor, hr: Tensor) -> Tensor:
        return torch.view_as_real(torch.fft.fft2(sr - hr)).abs().mean()  # the transform is linear
