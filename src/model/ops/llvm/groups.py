"""Groups of pixels of a map that lie side by side or far apart, and are read where they are."""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor


class Groups(NamedTuple):
    """Where pixels are in a map (N, H, W, C), counted in pixels, int64: p of group g at `bases[g] + places[p]`."""

    bases: Tensor
    places: Tensor


@lru_cache(maxsize=16)
def groups_of(n: int, height: int, width: int, cell: tuple[int, int], strided: bool) -> Groups:
    """The groups of `blocks.pixels.to_tokens`, in its order; cells that do not divide the map raise ValueError."""
    if height % cell[0] or width % cell[1]:
        raise ValueError(f'cells of {cell} pixels do not divide a map of {height}x{width}')
    y, x = torch.arange(height)[:, None] * width, torch.arange(width)
    across, within = y[:: cell[0]] + x[:: cell[1]], y[: cell[0]] + x[: cell[1]]
    first, then = (within, across) if strided else (across, within)
    images = torch.arange(n)[:, None] * (height * width)
    return Groups((images + first.flatten()).flatten(), then.flatten())
