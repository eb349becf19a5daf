"""Attention within windows of pixels sorted by a code (NLSN, LCoAN)."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.blocks.tokens import inverse_of, take_rows
from model.common import at_least_float32, full_precision


class Pattern(NamedTuple):
    """Which pixels attend to which, and how much. R: rounds, L: pixels, W: windows, w: window size."""

    order: Tensor  # (N, R, (W + 2) * w) int64: pixels sorted by code, in a ring: last window, all windows, first window
    inverse: Tensor  # (N, R, L) int64: where a pixel stands in all windows
    attention: Tensor  # (N, R, W, w, 3 * w): softmaxed map over the previous window, a window itself and the next one
    round_weights: Tensor  # (N, R, L, 1): share of each round in a pixel's result


def with_neighbours(ring: Tensor, window_size: int) -> Tensor:
    """Each window between its neighbours: (N, R, (W + 2) * w, C) to (N, R, W, 3 * w, C), a view."""
    return ring.unfold(2, 3 * window_size, window_size).transpose(-2, -1)


def find_pattern(embedding: Tensor, codes: Tensor, window_size: int) -> Pattern:
    """Attention map of the matching embedding (N, L, dim) within windows of pixels sorted by their codes (N, R, L).

    Queries are the raw embedding, keys the normalised one, so that a query's length acts as its temperature. The last
    window is filled up by the last pixels once more, cyclically where there are too few. Rounds are weighted by the
    softmax of their scores, the logarithms of the sums of exponentials. Logits are in float32 or more.
    """
    order = codes.argsort(dim=-1, stable=True)
    inverse = inverse_of(order)
    length = order.shape[-1]
    padding = torch.arange(-(-length % window_size), 0, device=order.device) % length
    order = torch.cat((order, order[..., padding]), -1)
    order = torch.cat((order[..., -window_size:], order, order[..., :window_size]), -1)

    with full_precision(embedding):
        ring = take_rows(at_least_float32(embedding), order)
        queries = ring[:, :, window_size:-window_size].unflatten(2, (-1, window_size))
        keys = with_neighbours(F.normalize(ring, dim=-1, eps=5e-5), window_size)
        logits = queries @ keys.transpose(-2, -1)
        attention = logits.softmax(-1)
        score = logits.amax(-1) - attention.amax(-1).log()  # both of the same key: what is left is the sum
        round_weights = score.flatten(2).gather(-1, inverse).softmax(1).unsqueeze(-1)
    return Pattern(order, inverse, attention.to(embedding.dtype), round_weights.to(embedding.dtype))


def attend(values: Tensor, pattern: Pattern) -> Tensor:
    """Means of the values (N, L, C), weighted by the map of the pattern and by its rounds: (N, L, C)."""
    n_windows, window_size = pattern.attention.shape[2:4]
    ring = take_rows(values, pattern.order)
    out = (pattern.attention @ with_neighbours(ring, window_size)).flatten(1, 3)
    rounds = torch.arange(ring.shape[1], device=values.device).view(1, -1, 1) * n_windows * window_size
    return (take_rows(out, pattern.inverse + rounds) * pattern.round_weights).sum(1)
