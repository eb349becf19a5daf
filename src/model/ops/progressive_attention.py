"""Progressive focused attention (PFA) within windows: J. Long et al., PFT (CVPR 2025), figure 2.

A layer multiplies its attention map by that of the layer before and keeps the largest entries of each row.

- The product of two maps, made to sum to one, is the softmax of the sum of their logits, so these are handed on.
- Logits of all keys of a window are not kept but made again from queries and keys: their sum over several layers is
  one product of the layers' queries and keys side by side.
- Maps are made, and kept, for a few windows at a time, but where a kernel keeps them in registers; keys as int16.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from model.ops.fast import by_llvm
from model.ops.kept_attention import best, kept_logits, kept_values, products, read

AT_ONCE = 2**26  # entries of the maps that are made at once
AT_ONCE_CPU = 2**22  # on a CPU: those of one window of PFT-light
APART = -100.0  # is added to the logits of pixels that a cyclic shift has brought together
BLOCK = 32  # the kernel in LLVM wants whole blocks of tokens, of entries, and of those that are kept


class Whole(NamedTuple):
    """What the maps of all windows follow from, where all of each is kept."""

    q: Tensor  # (L, heads, d * layers), of all tokens in the order of the image
    k: Tensor
    table: Tensor  # the sum of the layers' position tables


class Kept(NamedTuple):
    """What is kept of the maps of some windows: sums of logits, each with its key."""

    logits: Tensor  # (B, T, heads, K)
    keys: Tensor  # (B, T, heads, K) int16; of a kernel also (B, T, heads, T / 8) uint8, with a bit for each token


Focus = Whole | list[Kept] | None  # of all windows, some at a time; None: there was no map before


def progressive_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    positions: Tensor,
    order: Tensor,
    inverse: Tensor,
    areas: Tensor,
    counts: Sequence[int],
    focus: Focus,
    topk: int,
) -> tuple[Tensor, Focus]:
    """Attention in square windows of T pixels, which goes on from the maps of the layer before and narrows them.

    Args:
        q, k, v: (L, heads, d), of all pixels of all images. Their products are multiplied by d^-0.5.
        table: biases of all heads by relative position, (n,), see `windows.relative_positions`.
        positions: (T, T) int64, where in the table a query and a key find their bias; a kernel takes those of
            `windows.relative_positions` instead.
        order: (L,) int64, the pixels window by window.
        inverse: (L,) int64, where each pixel stands in it.
        areas: (kinds, T) int32, by kind of window. A pixel sees hardly anything of other areas, see `APART`.
        counts: windows of each kind, which stand together.
        focus: what the layer before has handed on. Without gradients it may be written over.
        topk: how many entries of a row are kept, if it has more.

    Returns:
        (L, heads, d), and what is handed on.
    """
    if isinstance(focus, Whole):
        q, k, table = torch.cat((focus.q, q), -1), torch.cat((focus.k, k), -1), focus.table + table
    before = focus if isinstance(focus, list) else None
    tokens = areas.shape[1]
    entries = before[0].logits.shape[-1] if before else tokens
    whole_blocks = not any(count % BLOCK for count in (tokens, entries, topk))
    is_float32 = all(x.dtype == torch.float32 for x in (q, k, v, table))
    form = partial(by_llvm, 'progressive_attention', attend) if is_float32 and whole_blocks else attend
    out, kept = form(q, k, v, table, positions, order, inverse, areas, counts, before, topk)
    return out, Whole(q.contiguous(), k.contiguous(), table) if kept is None else kept


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    positions: Tensor,
    order: Tensor,
    inverse: Tensor,
    areas: Tensor,
    counts: Sequence[int],
    before: list[Kept] | None,
    topk: int,
) -> tuple[Tensor, list[Kept] | None]:
    """`progressive_attention`; without `before` q, k and table hold what all logits follow from. None: all is kept."""
    bias = table.index_select(0, positions.flatten()).view_as(positions)
    sizes, of_group = groups(areas, counts, q.shape[1])
    q, k, v = (x.index_select(0, order).unflatten(0, (-1, len(positions))) for x in (q * v.shape[-1] ** -0.5, k, v))
    parts = zip(q.split(sizes), k.split(sizes), v.split(sizes), strict=True)
    if before:
        given = drain(before if len(before) == len(sizes) else split(before, sizes))
        made = [focused(*part, bias, listed(kept), topk) for part, kept in zip(parts, given, strict=True)]
    else:  # maps over all keys are not kept for the gradients but made again
        again = partial(checkpoint, focused, use_reentrant=False, preserve_rng_state=False)
        masks = (area_masks(area, bias.dtype) for area in of_group)
        made = [again(*part, bias + mask, None, topk) for part, mask in zip(parts, masks, strict=True)]
    out, kept = zip(*made, strict=True)
    return torch.cat(out).flatten(0, 1).index_select(0, inverse), None if kept[0] is None else list(kept)


def area_masks(areas: Tensor, dtype: torch.dtype) -> Tensor:
    """What to add to the logits of a window, (..., T) to (..., T, T): `APART` between different areas, else 0."""
    apart = areas.unsqueeze(-1) != areas.unsqueeze(-2)
    return torch.zeros_like(apart, dtype=dtype).masked_fill_(apart, APART)


def groups(areas: Tensor, counts: Sequence[int], heads: int) -> tuple[list[int], list[Tensor]]:
    """How many windows are attended at once, all of the same kind, and their areas (T,).

    A trace does not follow how many these are: there it is all of them, with areas (B, T).
    """
    if torch.jit.is_tracing():
        by_window = torch.cat([area.expand(n, -1) for n, area in zip(counts, areas.unbind(), strict=True)])
        return [by_window.shape[0]], [by_window]
    at_once = max(1, (AT_ONCE_CPU if areas.is_cpu else AT_ONCE) // (heads * areas.shape[1] ** 2))
    sizes, of_group = [], []
    for count, area in zip(counts, areas.unbind(), strict=True):
        parts = [min(at_once, count - i) for i in range(0, count, at_once)]
        sizes += parts
        of_group += [area] * len(parts)
    return sizes, of_group


def joined(kept: list[Kept]) -> Kept:
    """Of all windows."""
    return kept[0] if len(kept) == 1 else Kept(*map(torch.cat, zip(*kept, strict=True)))


def listed(kept: Kept) -> Kept:
    """With numbers for keys."""
    logits, keys = kept
    if keys.dtype == torch.uint8:
        marks = keys.unsqueeze(-1).bitwise_right_shift(torch.arange(8, dtype=torch.uint8)).bitwise_and(1)
        keys = marks.flatten(-2).nonzero()[:, -1].short().view(logits.shape)
    return Kept(logits, keys)


def split(kept: list[Kept], sizes: list[int]) -> list[Kept]:
    """Of as many windows each as `sizes` says, where a kernel has done all of them at once."""
    return [Kept(*parts) for parts in zip(*(x.split(sizes) for x in listed(joined(kept))), strict=True)]


def drain(kept: list[Kept]) -> Iterator[Kept]:
    """One after the other. Without gradients none is needed again: its memory is for what follows from it."""
    if torch.is_grad_enabled():
        yield from kept
    else:
        while kept:
            yield kept.pop(0)


def focused(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, before: Kept | None, topk: int
) -> tuple[Tensor, Kept | None]:
    """Attention in some windows.

    Args:
        q, k: (B, T, heads, D), `q` with its factor.
        v: (B, T, heads, d).
        bias: (T, T), without `before` also (B, T, T).
        before: what was kept of the maps before; None: all, and q, k and bias hold what these followed from.
        topk: how many entries of a row are kept, if it has more.

    Returns:
        (B, T, heads, d), and what is kept; None: all.
    """
    if before is None:
        logits, keys = products(q, k).add_(bias.unsqueeze(-2)), None
    else:
        logits, keys = before.logits + kept_logits(q, k, bias, before.keys), before.keys
    weights = logits.softmax(-1)
    if topk < logits.shape[-1]:
        places = best(logits.detach(), topk)
        logits, weights = logits.gather(-1, places), weights.gather(-1, places)
        keys = places.short() if keys is None else keys.gather(-1, places)
    if keys is None:
        return read(weights, v), None
    return kept_values(weights, v, keys), Kept(logits, keys)
