"""Geometric self-ensemble (EDSR, section 3.3; "+" in the tables)."""

from collections.abc import Callable

import torch
from torch import Tensor


def flips(x: Tensor) -> tuple[Tensor, ...]:
    """The four mirror images of (N, C, H, W); each undoes itself."""
    return x, x.flip(-1), x.flip(-2), x.flip(-2, -1)


def self_ensemble(net: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Mean of a network's outputs over the eight flips and rotations of (N, C, H, W), in two calls of 4N images."""
    upright = net(torch.cat(flips(x))).chunk(4)
    turned = net(torch.cat(flips(x.transpose(-2, -1)))).chunk(4)
    undone = [flips(y)[i] for i, y in enumerate(upright)]
    undone += [flips(y)[i].transpose(-2, -1) for i, y in enumerate(turned)]
    return torch.stack(undone).mean(0)
