"""Attention within windows of an image, as in transformers."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from math import isqrt
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from error import UserError
from model.blocks.tokens import inverse_of
from model.common import at_least_float32, full_precision
from model.ops.cached_attention import CACHED_LOGITS, LEAST_QUERIES, cached_attention, is_for_kernel
from model.ops.fast import has_llvm
from model.ops.packed_attention import fast_by_position, packed_attention
from model.ops.progressive_attention import area_masks
from model.ops.table_attention import table_attention

MOST_WINDOW = 64  # pixels along the side of an attention window
CUDNN_TOKENS = 128  # from which on cuDNN's attention with a mask is faster than PyTorch's own (docs/GPU.md)
WITHOUT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def check_window(size: int) -> None:
    """Refuse windows whose masks, of size^4 entries, would fill the memory."""
    if size > MOST_WINDOW:
        raise UserError(f'--window_size {size} makes windows of {size}x{size} pixels: choose {MOST_WINDOW} or less.')


def hidden_width(n_feats: int, mlp_ratio: float) -> int:
    """Channels inside a feed-forward network: `n_feats` times `mlp_ratio`, rounded, at least one."""
    return max(1, round(n_feats * mlp_ratio))


def init_linear(module: nn.Module) -> None:
    """Linear layers as transformers start: normal weights of deviation 0.02 (truncated at 2), no bias."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def relative_position_bias_table(size: int, n_heads: int) -> nn.Parameter:
    """What a window of `size` pixels a side learns of each relative position: ((2 * size - 1)^2, heads)."""
    return nn.Parameter(nn.init.trunc_normal_(torch.empty((2 * size - 1) ** 2, n_heads), std=0.02))


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    masks: Tensor | None = None,
    counts: Sequence[int] | None = None,
    scale: float | None = None,
) -> Tensor:
    """Multi-head softmax attention within windows.

    On a CPU it is computed by `cached_attention`, since PyTorch's kernel there is slow with the few channels of a head
    and gives no gradient by the mask. PyTorch's kernel takes over in traces, which must not fix the number of windows,
    and where the map of a window is too large for the cache. On CUDA the channels of a head are filled up by zeros to
    whole 16 bytes, which its memory-efficient kernels want, and cuDNN's kernel is left out where it is the slower one.

    Args:
        q, k, v: (B, T, heads, d), (B, S, heads, d) and (B, S, heads, e).
        masks: what to add to the logits, (heads, kinds, T, S), by kind of window.
        counts: windows of each kind, which stand together; all are of the only kind if None.
        scale: factor of the logits before a mask is added, d^-0.5 if None.

    Returns:
        (B, T, heads * e).
    """
    d, e = int(q.shape[-1]), int(v.shape[-1])  # plain numbers in a trace too
    scale = d**-0.5 if scale is None else scale
    traced = torch.jit.is_tracing() or torch.compiler.is_compiling()
    if q.is_cpu and not traced and q.shape[1] * k.shape[1] <= CACHED_LOGITS:
        with full_precision(q):
            masks = masks if masks is None else at_least_float32(masks)
            kinds = kinds_of(counts or [len(q)])
            q, k, values = (at_least_float32(x) for x in (q, k, v))
            return cached_attention(q, k, values, masks, kinds, scale).to(v.dtype).flatten(2)
    whole = 16 // q.element_size() if q.is_cuda else 1
    q, k, v = (F.pad(x, (0, -n % whole)) if n % whole else x for x, n in ((q, d), (k, d), (v, e)))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    mask_of: list[Tensor | None] = [None] if masks is None else [mask.unsqueeze(0) for mask in masks.unbind(1)]
    insisting = q.is_cuda and not traced and torch.is_deterministic_algorithms_warn_only_enabled()
    insisting = insisting and torch.are_deterministic_algorithms_enabled()
    if insisting:
        q, k, v = Insisting.apply(False, q, k, v)
    parts = zip(*([x] if counts is None else x.split(counts) for x in (q, k, v)), mask_of, strict=True)
    slow = q.is_cuda and not traced and masks is not None and q.shape[2] < CUDNN_TOKENS
    with sdpa_kernel(WITHOUT_CUDNN) if slow else nullcontext():
        out = [F.scaled_dot_product_attention(q, k, v, mask, scale=scale) for q, k, v, mask in parts]
    found = out[0] if len(out) == 1 else torch.cat(out)
    if insisting:
        (found,) = Insisting.apply(True, found)
    return found[..., :e].transpose(1, 2).flatten(2)


class Insisting(torch.autograd.Function):
    """Tensors as they are; on the way back PyTorch insists from here on algorithms that repeat themselves, or warns.

    Where it only warns, as it has to where some operation has no such algorithm, its memory-efficient attention adds
    up gradients in any order, although it could always in the same one.
    """

    @staticmethod
    def forward(ctx: Any, insist: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.insist = insist
        return tuple(x.view_as(x) for x in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        torch.use_deterministic_algorithms(True, warn_only=not ctx.insist)
        return None, *grads


def biased_attention(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    """Multi-head softmax attention within square windows, with a bias by the position of the key to the query.

    With the keys in reverse order the biases of a query at (y, x) are a window of the reversed table, which begins at
    (y, x): a view, for which no index is needed.

    Args:
        q, k, v: (B, T, heads, d), of windows of T = size^2 pixels.
        table: (heads, 2 * size - 1, 2 * size - 1), its middle for the query itself, below and to the right of it keys
            that are there.

    Returns:
        (B, T, heads * d).
    """
    t, heads, d = q.shape[1:]
    size = (table.shape[-1] + 1) // 2
    k, v = k.flip(1), v.flip(1)
    bias = table.flip(1, 2).unfold(1, size, 1).unfold(2, size, 1)
    traced = torch.jit.is_tracing() or torch.compiler.is_compiling()
    if not q.is_cpu or traced or torch.is_grad_enabled() or heads * t**2 <= CACHED_LOGITS:
        return attention(q, k, v, bias.reshape(heads, 1, t, t).to(q.dtype))
    with full_precision(q):
        queries, keys, values, bias = (at_least_float32(x) for x in (q, k, v, bias))
        return table_attention(queries, keys, values, bias, d**-0.5).to(v.dtype).flatten(2)


def relative_positions(size: int, device: torch.device | None = None) -> Tensor:
    """Row of the position table for each pair (query, key) of a window's T = size^2 pixels: (T, T) int64 (Swin).

    With (dy, dx) = query - key it is (dy + size - 1) * (2 * size - 1) + dx + size - 1.
    """
    place = torch.arange(size, device=device)
    y, x = place.repeat_interleave(size), place.repeat(size)
    dy, dx = y[:, None] - y, x[:, None] - x
    return (dy + size - 1) * (2 * size - 1) + dx + size - 1


def register_positions(module: nn.Module, name: str, size: int) -> None:
    """Give a module `relative_positions` as the buffer `name`, which weights hold, too, and have others refused."""
    module.register_buffer(name, relative_positions(size))
    module.register_load_state_dict_pre_hook(partial(check_positions, name))


def check_positions(name: str, module: nn.Module, state: Mapping[str, Tensor], prefix: str, *_: object) -> None:
    """Refuse weights whose windows know other positions: kernels go by the usual ones alone."""
    own, given = module.get_buffer(name), state.get(prefix + name)
    if given is not None and given.shape == own.shape and not torch.equal(given.to(own), own):
        raise UserError(
            f'{prefix}{name} of these weights has other positions than those of Swin: they are of a network that is '
            'not known here.'
        )


def look_up_bias(table: Tensor, index: Tensor) -> Tensor:
    """Rows `index` (T, T) of a position table ((2 * size - 1)^2, heads), as a mask (heads, T, T).

    For kernels in LLVM its memory has query after query, as they want it.
    """
    table = table.t().contiguous()
    if has_llvm(table):
        return table.index_select(1, index.t().flatten()).unflatten(1, index.shape).mT
    return table.index_select(1, index.flatten()).unflatten(1, index.shape)


def shift_areas(size: int, shift: int, device: torch.device | None = None, kinds: Sequence[int] = range(4)) -> Tensor:
    """Which pixels of a window were together before a cyclic shift: the numbers of their areas, (kinds, T) int32.

    Only the last windows of a row or column hold pixels from opposite borders. The kinds are 0, a window inside, 1, the
    last of its row, 2, the last of its column, and 3, both.
    """
    far = (torch.arange(size, device=device) >= size - shift).int()
    down, right = far.repeat_interleave(size), far.repeat(size)
    areas = torch.zeros_like(down), right, down, 2 * down + right
    return torch.stack([areas[kind] for kind in kinds])


class Windows(NamedTuple):
    """How a batch of images is cut into square windows of T pixels, windows with the same mask together."""

    order: Tensor  # (N * H * W,) int64: row of the flattened tokens (N * H * W, C) for each pixel of each window
    inverse: Tensor  # (N * H * W,) int64: where a row stands in `order`
    areas: Tensor  # (kinds, T) int32: see `shift_areas`
    counts: list[int]  # windows of each kind, in all images
    masks: Tensor  # (kinds, T, T): see `area_masks`


def window_partition(like: Tensor, size: int, shift: int) -> Windows:
    """Windows of `size` pixels on images like (N, C, H, W), which are shifted up and left cyclically by `shift` first.

    H and W are multiples of `size`.
    """
    n, _, height, width = like.shape
    pixels = torch.arange(height * width, device=like.device).view(height, width).roll((-shift, -shift), (0, 1))
    grid = pixels.unflatten(1, (-1, size)).unflatten(0, (-1, size)).transpose(1, 2)
    kinds = [grid[:-1, :-1], grid[:-1, -1:], grid[-1:, :-1], grid[-1:, -1:]] if shift else [grid]
    kinds = [kind.reshape(-1, 1, size**2) for kind in kinds]
    first_row = torch.arange(n, device=like.device).view(-1, 1) * (height * width)
    order = torch.cat([(kind + first_row).flatten() for kind in kinds])
    rows, columns = height // size, width // size
    counts = [(rows - 1) * (columns - 1), rows - 1, columns - 1, 1] if shift else [rows * columns]
    used = [i for i, count in enumerate(counts) if count]
    areas = shift_areas(size, shift, like.device, used)
    return Windows(order, inverse_of(order), areas, [n * counts[i] for i in used], area_masks(areas, like.dtype))


def plain_and_shifted(like: Tensor, size: int) -> list[Windows]:
    """The windows of `window_partition` as they are, and shifted by half a window."""
    return [window_partition(like, size, shift) for shift in (0, size // 2)]


def window_attention(qkv: Tensor, table: Tensor, positions: Tensor, windows: Windows) -> Tensor:
    """Multi-head attention within windows of an image: (N, H * W, 3 * C) to (N, H * W, C).

    Args:
        qkv: queries, keys and values side by side.
        table: position table ((2 * size - 1)^2, heads).
        positions: see `relative_positions`.
        windows: how the image is cut.
    """
    pixels, heads = len(positions), table.shape[1]
    d = qkv.shape[-1] // (3 * heads)
    by_rows = isqrt(pixels) % LEAST_QUERIES == 0 and not torch.is_grad_enabled()  # else a vector is not within a row
    if by_rows and pixels**2 <= CACHED_LOGITS and table.dtype == qkv.dtype and is_for_kernel(qkv, pixels, d):
        rows, order, kinds = qkv.reshape(-1, 3, heads, d), windows.order.view(-1, pixels), kinds_of(windows.counts)
        out = fast_by_position(rows, order, table, positions, windows.areas, kinds, d**-0.5)
        return out.view(*qkv.shape[:2], -1)
    masks = look_up_bias(table, positions).unsqueeze(1) + windows.masks.mT  # which are symmetric
    rows = qkv.reshape(-1, pixels, qkv.shape[-1])
    return self_attention(rows, heads, masks.to(qkv.dtype), windows).view(*qkv.shape[:2], -1)


def self_attention(qkv: Tensor, heads: int, masks: Tensor | None = None, windows: Windows | None = None) -> Tensor:
    """`attention` of queries, keys and values side by side: (B, T, 3 * C) to (B, T, C).

    With `windows` these are all rows of an image, or several, in their order, and so is the result.
    """
    b, t, channels = qkv.shape
    d = channels // (3 * heads)
    counts = windows.counts if windows else None
    if t**2 <= CACHED_LOGITS and is_for_kernel(qkv, t, d):
        order = windows.order if windows else torch.arange(b * t)
        rows, kinds = qkv.reshape(-1, 3, heads, d), kinds_of(counts or [b])
        return packed_attention(rows, order.view(b, t), masks, kinds, d**-0.5).view(b, t, -1)
    if windows:
        qkv = qkv.flatten(0, 1).index_select(0, windows.order).view(qkv.shape)
    q, k, v = qkv.unflatten(2, (3, heads, d)).unbind(2)
    out = attention(q, k, v, masks, counts)
    return out.flatten(0, 1).index_select(0, windows.inverse).view(b, t, -1) if windows else out


def kinds_of(counts: Sequence[int]) -> Tensor:
    """The kind of each window, int64, on a CPU."""
    return torch.repeat_interleave(torch.tensor(counts))
