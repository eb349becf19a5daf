import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from error import UserError
from loss.discriminator import Discriminator

CONVOLUTIONS = [
    (3, 64, 1), (64, 64, 2), (64, 128, 1), (128, 128, 2), (128, 256, 1), (256, 256, 2), (256, 512, 1), (512, 512, 2),
]  # fmt: skip


@pytest.mark.parametrize('patch_size, side', [(96, 6), (16, 1), (24, 2), (20, 2), (8, 1)])
def test_parameters(patch_size, side):
    """Of convolutions without bias, scale and shift of the normalisations, and two linear layers."""
    expected = sum(9 * before * after + 2 * after for before, after, _ in CONVOLUTIONS)
    expected += 512 * side**2 * 1024 + 1024 + 1024 + 1
    assert sum(p.numel() for p in Discriminator(3, patch_size).parameters()) == expected


@pytest.mark.parametrize('n_colors, patch_size', [(3, 16), (1, 16), (3, 24), (3, 7)])
def test_gives_a_logit_a_patch(n_colors, patch_size):
    assert Discriminator(n_colors, patch_size)(torch.rand(2, n_colors, patch_size, patch_size)).shape == (2, 1)


def normalised(x: Tensor) -> Tensor:
    mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), unbiased=False, keepdim=True)
    return (x - mean) / (variance + 1e-5).sqrt()


def leaky(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 0.2 * x)


@pytest.mark.parametrize('evaluating', [False, True])
def test_against_a_plain_version(evaluating):
    torch.manual_seed(0)
    net = Discriminator(3, 32).train(not evaluating)
    state = net.state_dict()
    inputs = x = torch.rand(2, 3, 32, 32)
    for i, (_, _, stride) in enumerate(CONVOLUTIONS):
        x = leaky(normalised(F.conv2d(x, state[f'features.{i}.0.weight'], stride=stride, padding=1)))
    x = x.reshape(2, -1) @ state['classifier.0.weight'].T + state['classifier.0.bias']
    x = leaky(x) @ state['classifier.2.weight'].T + state['classifier.2.bias']
    with torch.no_grad():
        torch.testing.assert_close(net(inputs), x, rtol=1e-4, atol=1e-5)


def test_one_small_patch_cannot_be_normalised():
    with pytest.raises(UserError, match='--batch_size'):
        Discriminator(3, 16)(torch.rand(1, 3, 16, 16))
    assert Discriminator(3, 17)(torch.rand(1, 3, 17, 17)).shape == (1, 1)
