"""`cached_attention` of tokens that kernels in LLVM read where they are, and whose gradients these put there.

No window is gathered, and no gradient of queries, keys or values copied.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.ops.cached_attention import gradients, without_gradients
from model.ops.fast import by_llvm, operation
from model.ops.progressive_attention import area_masks


class PackedAttention(torch.autograd.Function):
    """See `packed_attention`."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, order: Tensor, masks: Tensor | None, kinds: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(qkv, order, masks, kinds)
        ctx.scale = scale
        return fast_packed(qkv, order, masks, kinds, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        qkv, order, masks, kinds = ctx.saved_tensors
        by_qkv, by_masks = fast_packed_gradients(grad, qkv, order, masks, kinds, ctx.scale)
        return by_qkv, None, None if masks is None else by_masks, None, None


def packed_attention(qkv: Tensor, order: Tensor, masks: Tensor | None, kinds: Tensor, scale: float) -> Tensor:
    """`cached_attention` of tokens that a kernel reads where they are: (B * T, heads, d), for calls `is_for_kernel`.

    Args:
        qkv: queries, keys and values (B * T, 3, heads, d), float32.
        order: (B, T) int64, which rows are the tokens of a window; each row is in one. The result has theirs.
        masks, kinds, scale: as of `cached_attention`.
    """
    if torch.is_grad_enabled():
        return PackedAttention.apply(qkv, order, masks, kinds, scale)
    return fast_packed(qkv, order, masks, kinds, scale)


def packed(qkv: Tensor, order: Tensor, masks: Tensor | None, kinds: Tensor, scale: float) -> Tensor:
    """See `packed_attention`."""
    out = qkv.new_empty(len(qkv), *qkv.shape[2:])
    q, k, v = qkv[order].unbind(2)
    out[order] = without_gradients(q, k, v, masks, kinds, scale)
    return out


@operation('packed_attention')
def fast_packed(qkv: Tensor, order: Tensor, masks: Tensor | None, kinds: Tensor, scale: float) -> Tensor:
    """As `fast_without_gradients`."""
    return by_llvm('cached_attention', packed, qkv, order, masks, kinds, scale)


def by_position(
    qkv: Tensor, order: Tensor, table: Tensor, positions: Tensor, areas: Tensor, kinds: Tensor, scale: float
) -> Tensor:
    """`packed_attention` without gradients in square windows, for biases by the position of the query to the key.

    Args:
        qkv, order, kinds, scale: as of `packed_attention`.
        table: biases ((2 * size - 1)^2, heads).
        positions: (T, T) int64, where in the table a query and a key find their bias; a kernel takes those of
            `windows.relative_positions` instead.
        areas: (kinds, T) int32, by kind of window; between different ones `APART` is added.
    """
    biases = table.t()[:, positions].unsqueeze(1)
    return packed(qkv, order, biases + area_masks(areas, biases.dtype), kinds, scale)


@operation('packed_attention_by_position')
def fast_by_position(
    qkv: Tensor, order: Tensor, table: Tensor, positions: Tensor, areas: Tensor, kinds: Tensor, scale: float
) -> Tensor:
    """As `fast_without_gradients`."""
    return by_llvm('cached_attention', by_position, qkv, order, table, positions, areas, kinds, scale)


def packed_gradients(
    grad: Tensor, qkv: Tensor, order: Tensor, masks: Tensor | None, kinds: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """By `qkv` and masks (which is empty without masks), given the gradient by the result of `packed_attention`."""
    by_qkv = torch.empty_like(qkv)
    q, k, v = qkv[order].unbind(2)
    *found, by_masks = gradients(grad[order], q, k, v, masks, kinds, scale)
    by_qkv[order] = torch.stack(found, 2)
    return by_qkv, by_masks


@operation('packed_attention_gradients')
def fast_packed_gradients(
    grad: Tensor, qkv: Tensor, order: Tensor, masks: Tensor | None, kinds: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """As `fast_without_gradients`."""
    return by_llvm('cached_attention', packed_gradients, grad, qkv, order, masks, kinds, scale)
