"""Images as rows of tokens: there and back, rows by their index, layers."""

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from model.common import DepthwiseConv
from model.ops.fused_linear import Norm, fused_linear
from model.ops.layer_norm import layer_norm

COUNTED = 2**15  # integers of 16 bits that are not below 0


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows of each image: (N, L, C) and (N, ...) to (N, ..., C)."""
    n, length, channels = x.shape
    offset = torch.arange(n, device=x.device).view(-1, *[1] * (index.dim() - 1)) * length
    rows = x.reshape(-1, channels).index_select(0, (index + offset).flatten())
    return rows.view(*index.shape, channels)


def stable_order(codes: Tensor, count: int) -> Tensor:
    """Which integers (..., L) come first in the order of their size, of equal ones those that stand first: int64.

    NumPy sorts integers of 16 bits, for a `count` of at most `COUNTED`, by counting them: some five times as fast on
    a CPU as PyTorch's sort.
    """
    traced = torch.jit.is_tracing() or torch.compiler.is_compiling() or type(codes) is not Tensor
    if not codes.is_cpu or traced or count > COUNTED:
        return codes.argsort(dim=-1, stable=True)
    return torch.from_numpy(codes.short().numpy().argsort(axis=-1, kind='stable'))


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


class TokenLinear(nn.Linear):
    """Linear layer of tokens (N, L, C) to (N, L, C'), with what `fused_linear` takes around it."""

    def forward(self, input: Tensor, **around: Any) -> Tensor:
        return fused_linear(input, [(self.weight, self.bias)], **around)


class TokenNorm(nn.LayerNorm):
    """Layer normalisation of tokens (N, L, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps)


class ConvFFN(nn.Module):
    """Feed-forward network: with a = gelu(fc1(x)) it is fc2(a + gelu(dwconv(a)))."""

    def __init__(self, n_feats: int, hidden: int, kernel_size: int) -> None:
        super().__init__()
        depthwise = DepthwiseConv(hidden, kernel_size)
        self.fc1 = TokenLinear(n_feats, hidden)
        self.dwconv = nn.Sequential(OrderedDict(depthwise_conv=nn.Sequential(depthwise)))
        self.fc2 = TokenLinear(hidden, n_feats)

    def forward(self, x: Tensor, height: int, width: int, norm: Norm | None = None, **behind: Any) -> Tensor:
        """Tokens (N, H * W, C), normalised first, with what `fused_linear` takes behind."""
        x = self.fc1(x, norm=norm, gelu=True)
        around = flatten_image(self.dwconv(unflatten_image(x, height, width)))
        return self.fc2(x, gelu_summed=around, **behind)
