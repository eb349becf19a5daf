import math

import pytest
import torch

from model.blocks.pixels import gelu


@pytest.mark.parametrize('memory_format', [torch.channels_last, torch.contiguous_format])
def test_gelu_of_maps_and_its_gradient(memory_format: torch.memory_format) -> None:
    x = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    x = (2 * x).contiguous(memory_format=memory_format).requires_grad_()
    y = gelu(x)
    assert y.is_contiguous(memory_format=memory_format)
    y.sum().backward()
    share = torch.special.ndtr(x.detach().double())  # of the normal distribution below x
    density = torch.exp(-(x.detach().double() ** 2) / 2) / math.sqrt(2 * math.pi)
    torch.testing.assert_close(y.detach().double(), x.detach() * share, rtol=0, atol=2e-6)
    torch.testing.assert_close(x.grad.double(), share + x.detach() * density, rtol=0, atol=2e-6)
