import math
import weakref
from copy import deepcopy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.blocks.pixels import ContrastAttention, gelu, join_outputs
from model.common import conv
from tests.conftest import numbers


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


# Contrast-aware channel attention.


def contrast_attention() -> ContrastAttention:
    torch.manual_seed(0)
    layer = ContrastAttention(32).double()
    layer.conv_du[0].bias.data.fill_(1)  # so that no ReLU is silent
    return layer


@torch.no_grad()
def test_contrast_attention_equals_plain_sums() -> None:
    layer, x = contrast_attention(), numbers(2, 32, 3, 4)
    squeeze, excite = (layer.conv_du[i] for i in (0, 2))
    assert len(squeeze.weight) == 2
    for image, found in zip(x.numpy(), layer(x).numpy(), strict=True):
        pixels = image.reshape(32, 12)
        means = pixels.sum(1) / 12
        contrast = means + np.sqrt(((pixels - means[:, None]) ** 2).sum(1) / 12)
        hidden = np.maximum(squeeze.weight.flatten(1).numpy() @ contrast + squeeze.bias.numpy(), 0)
        logits = excite.weight.flatten(1).numpy() @ hidden + excite.bias.numpy()
        np.testing.assert_allclose(found, image / (1 + np.exp(-logits))[:, None, None], rtol=0, atol=1e-12)


@pytest.mark.parametrize('size', [(1, 1), (3, 4)])
@pytest.mark.parametrize('value', [0.0, 0.1, 7.0])
def test_a_constant_channel_has_no_contrast_and_passes_the_gradient_of_its_mean(
    size: tuple[int, int], value: float
) -> None:
    """By differences of the output, along all pixels of the channel together, which keep it constant."""
    layer, x = contrast_attention(), numbers(1, 32, *size)
    x[:, 0] = value
    x.requires_grad_()
    layer(x).sum().backward()
    assert x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in layer.parameters())
    with torch.no_grad():
        step = torch.zeros_like(x)
        step[:, 0] = 1e-5
        expected = (layer(x + step).sum() - layer(x - step).sum()) / 2e-5
    assert x.grad[:, 0].sum().item() == pytest.approx(expected.item(), abs=1e-7)


def test_contrast_is_found_in_float32_under_autocast() -> None:
    """Deviations far below the mean, which 8 bits of it do not show."""
    layer = contrast_attention().float()
    x = 1 + 1e-3 * numbers(1, 32, 9, 9).float()
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        seen = []
        layer.conv_du.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        layer(x)
    torch.testing.assert_close(seen[0].flatten(), (x.mean((2, 3)) + x.std((2, 3), correction=0)).flatten())


# Outputs of all blocks, joined.


def test_joined_outputs_are_a_convolution_of_all_of_them() -> None:
    torch.manual_seed(0)
    blocks, layer = [conv(5, 5, 3).double() for _ in range(3)], conv(15, 4, 1).double()
    x = numbers(2, 5, 6, 7)
    a = blocks[0](x)
    b = blocks[1](a)
    expected = F.conv2d(torch.cat((a, b, blocks[2](b)), 1), layer.weight, layer.bias)
    torch.testing.assert_close(join_outputs(blocks, x, layer), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize('trained', [False, True])
def test_joined_outputs_in_single_precision(trained: bool) -> None:
    """In maps that are large enough for kernels."""
    torch.manual_seed(0)
    blocks, layer = [conv(5, 5, 3) for _ in range(3)], conv(15, 4, 1)
    x = numbers(2, 5, 24, 25).float().contiguous(memory_format=torch.channels_last)

    def found(blocks: list[nn.Module], layer: nn.Conv2d, x: Tensor) -> list[Tensor]:
        with torch.set_grad_enabled(trained):
            out = join_outputs(blocks, x, layer)
        return [out.detach(), *(torch.autograd.grad(out.square().sum(), layer.parameters()) if trained else [])]

    truth = found([deepcopy(block).double() for block in blocks], deepcopy(layer).double(), x.double())
    for part, expected in zip(found(blocks, layer, x), truth, strict=True):
        torch.testing.assert_close(part.double(), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@torch.no_grad()
def test_joining_keeps_no_outputs() -> None:
    outputs: list[weakref.ref] = []
    alive = []

    class Block(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            alive.append(sum(output() is not None for output in outputs))
            y = x + 1
            outputs.append(weakref.ref(y))
            return y

    join_outputs([Block() for _ in range(4)], torch.ones(1, 2, 3, 3), conv(8, 2, 1))
    assert alive == [0, 1, 1, 1]  # the block's own input
