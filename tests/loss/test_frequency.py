import cmath
import math

import pytest
import torch

from loss.frequency import Frequency


def test_against_the_sum_that_defines_the_transform():
    sr, hr = torch.rand(2, 2, 3, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    difference = (sr - hr).tolist()
    parts = []
    for image in difference:
        for plane in image:
            for u in range(3):
                for v in range(4):
                    value = sum(
                        plane[y][x] * cmath.exp(-2j * math.pi * (u * y / 3 + v * x / 4))
                        for y in range(3)
                        for x in range(4)
                    )
                    parts += [abs(value.real), abs(value.imag)]
    assert len(parts) == 2 * 3 * 3 * 4 * 2
    assert Frequency()(sr, hr).item() == pytest.approx(sum(parts) / len(parts), rel=1e-9)


@pytest.mark.parametrize('size', [(4, 4), (5, 7)])
def test_one_wrong_pixel_is_in_every_frequency_and_a_constant_in_one(size):
    hr = torch.rand(1, 1, *size)
    sr = hr.clone()
    sr[0, 0, 0, 0] += 0.5  # real parts of 0.5, imaginary ones of 0
    assert Frequency()(sr, hr).item() == pytest.approx(0.25, rel=1e-5)
    assert Frequency()(hr + 0.5, hr).item() == pytest.approx(0.25, rel=1e-4)  # one real part of 0.5 * H * W


def test_gradient_leads_to_the_target():
    sr, hr = torch.rand(2, 1, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    sr.requires_grad_()
    start = Frequency()(sr, hr)
    (gradient,) = torch.autograd.grad(start, sr)
    numeric = Frequency()(sr + 1e-3 * gradient, hr) - Frequency()(sr - 1e-3 * gradient, hr)
    assert numeric.item() == pytest.approx(2e-3 * gradient.square().sum().item(), rel=0.02)
