"""Images as rows of tokens: there and back, rows by their index, layers."""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.blocks.pixels import GELU
from model.ops.layer_norm import layer_norm


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows of each image: (N, L, C) and (N, ...) to (N, ..., C)."""
    n, length, channels = x.shape
    offset = torch.arange(n, device=x.device).view(-1, *[1] * (index.dim() - 1)) * length
    rows = x.reshape(-1, channels).index_select(0, (index + offset).flatten())
    return rows.view(*index.shape, channels)


def inverse_of(order: Tensor) -> Tensor:
    """Where each number stands in the permutations `order` (..., L) of 0 to L - 1."""
    places = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)


def flatten_image(image: Tensor) -> Tensor:
    """(N, C, H, W) to (N, H * W, C)."""
    return image.permute(0, 2, 3, 1).flatten(1, 2)


def unflatten_image(tokens: Tensor, height: int, width: int) -> Tensor:
    """(N, H * W, C) to (N, C, H, W): a view, in memory format channels_last."""
    return tokens.unflatten(1, (height, width)).permute(0, 3, 1, 2)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Linear layer (N, L, C) to (N, L, C'). A CPU is faster, by up to two, at the same as a 1x1 convolution."""
    if not x.is_cpu:
        return F.linear(x, weight, bias)
    pixels = x.transpose(1, 2).unsqueeze(2)  # channels_last
    # A dilation, which a 1x1 kernel does not feel, has PyTorch take its fast library on one thread, too.
    traced = torch.jit.is_tracing() or torch.compiler.is_compiling()
    dilation = 2 if torch.get_num_threads() == 1 and not traced else 1
    return F.conv2d(pixels, weight[:, :, None, None], bias, dilation=dilation).squeeze(2).transpose(1, 2)


class TokenLinear(nn.Linear):
    """See `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class TokenNorm(nn.LayerNorm):
    """Layer normalisation of tokens (N, L, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps)


class ConvFFN(nn.Module):
    """Feed-forward network with a depthwise convolution between its layers."""

    def __init__(self, n_feats: int, hidden: int, kernel_size: int) -> None:
        super().__init__()
        depthwise = nn.Conv2d(hidden, hidden, kernel_size, padding=kernel_size // 2, groups=hidden)
        self.fc1 = TokenLinear(n_feats, hidden)
        self.dwconv = nn.Sequential(OrderedDict(depthwise_conv=nn.Sequential(depthwise, GELU())))
        self.fc2 = TokenLinear(hidden, n_feats)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        x = F.gelu(self.fc1(x))
        return self.fc2(x + flatten_image(self.dwconv(unflatten_image(x, height, width))))
