"""The perceptual losses of EDSR: the distance of two images in the features of VGG19.

Simonyan, Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition",
https://arxiv.org/abs/1409.1556, network E; as a loss in SRGAN, https://arxiv.org/abs/1609.04802. As in EDSR the
features are taken before their activation and are not divided by 12.75.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from error import UserError
from system.files import read_torch

# Convolutions, ReLUs and pools, at their numbers in torchvision's `features`.
NETWORK = ('CR' * 2 + 'P') * 2 + ('CR' * 4 + 'P') * 3
DEPTHS = {'VGG22': 8, 'VGG54': 35}  # up to the second convolution after 1 pool, the fourth after 4
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, RGB in [0, 1]


class VGG(nn.Module):
    """Mean squared difference of VGG19's features of two batches of RGB patches (N, 3, H, W).

    Not trained, and no part of a state dict. The gradient goes to the first batch alone.

    Args:
        name: VGG22 or VGG54.
        value_range: black and white of the patches.
        n_colors: of the patches.
        patch_size: their H and W.
        file: weights of VGG19 as torchvision saves them; None: torchvision downloads them.

    Raises:
        UserError: patches of one colour or too small, no weights, or others.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, name: str, value_range: tuple[float, float], n_colors: int, patch_size: int, file: Path | None
    ) -> None:
        super().__init__()
        depth = DEPTHS[name]
        smallest = 2 ** NETWORK[:depth].count('P')
        if n_colors != 3:
            raise UserError(f'--n_colors {n_colors}: {name} compares RGB images; leave one of the two out.')
        if patch_size < smallest:
            raise UserError(f'--patch_size {patch_size}: {name} needs patches of {smallest} pixels or more a side.')
        self.layers = features(read_torch(file) if file else download(name), depth, file)
        black, white = value_range
        mean, std = (torch.tensor(values).view(3, 1, 1) * (white - black) for values in (MEAN, STD))
        self.register_buffer('mean', black + mean, persistent=False)
        self.register_buffer('std', std, persistent=False)

    def forward(self, sr: Tensor, hr: Tensor) -> Tensor:
        with torch.no_grad():
            target = self._features(hr)
        return F.mse_loss(self._features(sr), target)

    def _features(self, x: Tensor) -> Tensor:
        return self.layers((x - self.mean) / self.std)


class FixedConv(nn.Module):
    """3x3 convolution whose weights nothing trains or saves."""

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.register_buffer('weight', weight.float(), persistent=False)
        self.register_buffer('bias', bias.float(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, padding=1)


def features(state: object, depth: int, file: Path | None) -> nn.Sequential:
    """The first `depth` layers of VGG19, with the weights of torchvision's state dict, which came from `file`."""
    layers: list[nn.Module] = []
    before, channels = 3, 64
    for index, kind in enumerate(NETWORK[:depth]):
        if kind == 'C':
            weight = entry(state, f'features.{index}.weight', (channels, before, 3, 3), file)
            layers.append(FixedConv(weight, entry(state, f'features.{index}.bias', (channels,), file)))
            before = channels
        elif kind == 'R':
            layers.append(nn.ReLU(inplace=True))
        else:
            layers.append(nn.MaxPool2d(2))
            channels = min(2 * channels, 512)
    return nn.Sequential(*layers)


def entry(state: object, key: str, shape: tuple[int, ...], file: Path | None) -> Tensor:
    """The tensor of VGG19 at `key`."""
    tensor = state.get(key) if isinstance(state, Mapping) else None
    if not isinstance(tensor, Tensor) or tensor.shape != shape:
        raise UserError(
            f"--vgg {file} does not hold VGG19: no {key} of shape {shape}; give torchvision's vgg19-dcbb9e9d.pth."
        )
    return tensor


def download(name: str) -> Mapping[str, Tensor]:
    """The state dict of VGG19 from torchvision, if that is installed; it keeps what it downloaded."""
    try:
        from torchvision.models import VGG19_Weights

        return VGG19_Weights.IMAGENET1K_V1.get_state_dict(progress=True, check_hash=True)
    except (ImportError, OSError, RuntimeError) as error:  # the last: it does not fit PyTorch, or the file its hash
        raise UserError(
            f'--loss with {name}: the weights of VGG19 could not be had from torchvision ({error}): give its file '
            'vgg19-dcbb9e9d.pth with --vgg.'
        ) from error
