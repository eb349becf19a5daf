import pytest
import torch

from loss.charbonnier import Charbonnier

SR = torch.tensor([1.0, 2.0, 3.0, 5.0]).view(1, 1, 2, 2)
HR = torch.tensor([1.0, 4.0, 2.0, 1.0]).view(1, 1, 2, 2)


@pytest.mark.parametrize('black, white, eps', [(0, 1, 0.001), (0, 3000, 3.0), (-500, 500, 1.0)])
def test_by_hand(black, white, eps):
    expected = (eps + (4 + eps**2) ** 0.5 + (1 + eps**2) ** 0.5 + (16 + eps**2) ** 0.5) / 4
    assert Charbonnier((black, white))(SR, HR).item() == pytest.approx(expected)


def test_gradient_by_hand():
    """d / sqrt(d^2 + eps^2), 0 where there is no difference."""
    sr = SR.clone().requires_grad_()
    Charbonnier((0, 3000))(sr, HR).backward()
    expected = [0, -2 / 13**0.5, 1 / 10**0.5, 4 / 25**0.5]
    torch.testing.assert_close(sr.grad.flatten(), torch.tensor(expected) / 4)
