import math

import numpy as np
import pytest
import torch

from data.imresize import upscale_bicubic
from model.bicubic import Bicubic

SIZES = [(1, 1), (1, 6), (2, 3), (7, 4), (9, 10)]


def cubic(x: float) -> float:
    x = abs(x)
    if x <= 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x <= 2 else 0.0


def plain_matrix(size: int, scale: int) -> np.ndarray:
    """MATLAB's weights for one axis, (scale * size, size): one tap after the other, counted from 1, mirrored."""
    matrix = np.zeros((scale * size, size))
    for i in range(1, scale * size + 1):
        centre = i / scale + 0.5 * (1 - 1 / scale)
        for tap in range(math.floor(centre - 2), math.floor(centre - 2) + 6):
            inside = tap
            while not 1 <= inside <= size:
                inside = 1 - inside if inside < 1 else 2 * size + 1 - inside
            matrix[i - 1, inside - 1] += cubic(centre - tap)
    return matrix / matrix.sum(1, keepdims=True)


def plain(x: np.ndarray, scale: int) -> np.ndarray:
    return plain_matrix(x.shape[-2], scale) @ x @ plain_matrix(x.shape[-1], scale).T


@pytest.mark.parametrize('scale', [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize('size', SIZES)
def test_equals_matlabs_formula(size: tuple[int, int], scale: int) -> None:
    x = np.random.default_rng(0).uniform(-1, 2, (2, 3, *size))
    expected = plain(x, scale)
    assert np.abs(Bicubic(scale)(torch.from_numpy(x)).numpy() - expected).max() < 1e-12
    assert np.abs(Bicubic(scale)(torch.from_numpy(x).float()).numpy() - expected).max() < 1e-6


@pytest.mark.parametrize('scale', [2, 3, 4])
def test_equals_imresize_up_to_the_rounding_between_its_passes(scale: int) -> None:
    # No black and white side by side, whose overshoot imresize also clips between the passes.
    image = np.random.default_rng(0).integers(60, 196, (13, 17, 3), np.uint8)
    sr = Bicubic(scale)(torch.from_numpy(image).permute(2, 0, 1)[None].double())
    sr = sr[0].permute(1, 2, 0).round().numpy()
    assert np.abs(sr - upscale_bicubic(image, scale)).max() <= 1


def test_memory_layout_does_not_matter() -> None:
    wide = torch.rand(3, 12, 10, 3, generator=torch.Generator().manual_seed(0))
    x = wide.permute(0, 3, 2, 1)[..., ::2]
    assert not x.is_contiguous()
    assert np.abs(Bicubic(3)(x).numpy() - plain(x.numpy(), 3)).max() < 1e-6
