"""What pixels read in a dictionary of tokens, and how its tokens come nearer to the pixels, as in ATD (model/atd.py).

On a CPU without gradients, where llvmlite is installed, kernels do it a few pixels at a time (`llvm.token_dictionary`).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.common import at_least_float32, full_precision
from model.ops.fast import by_llvm, is_for_llvm, operation
from model.ops.fused_linear import Layer, Norm, linear
from model.ops.layer_norm import layer_norm

VECTOR = 16  # tokens: of whole vectors a kernel has nothing to fill up


class Reading(NamedTuple):
    """What a layer has of pixels (N, L, C) and a dictionary of M tokens."""

    qkv: Tensor  # (N, L, C'), a linear layer of the normalised pixels
    x: Tensor  # (N, L, C), the pixels plus what they read
    similarity: Tensor  # (N, L, M), of each pixel to the tokens, which sums to 1
    category: Tensor  # (N, L) int64, the token that a pixel is most similar to


def read_tokens(x: Tensor, norm: Norm, qkv: Layer, query: Layer, keys: Tensor, values: Tensor) -> Reading:
    """Normalised pixels through a linear layer, and pixels plus what they read in a dictionary by cosines.

    Args:
        x: pixels (N, L, C).
        norm: layer normalisation of these.
        qkv, query: linear layers from C to C' and to D channels.
        keys: (N, M, D), by which the queries, made to have length 1, are multiplied.
        values: (N, M, C), what is read.
    """
    parameters = norm.weight, norm.bias, norm.eps, *qkv, *query
    form = fast_read if is_for_kernel(x, *parameters, keys, values) else read
    return Reading(*form(x, *parameters, keys, values))


def is_for_kernel(x: Tensor, *others: Tensor | float | None) -> bool:
    """Whether a kernel takes these pixels and parameters, the last one of which has M tokens."""
    tensors = [x, *(t for t in others if isinstance(t, Tensor))]
    are_float32 = all(t.dtype == torch.float32 for t in tensors) and not torch.is_autocast_enabled('cpu')
    return is_for_llvm(x) and are_float32 and tensors[-1].shape[1] % VECTOR == 0


def read(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    query_weight: Tensor,
    query_bias: Tensor | None,
    keys: Tensor,
    values: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `read_tokens`. What decides the category is in float32 or more, also under autocast."""
    normed = layer_norm(x, scale, shift, eps)
    with full_precision(x):
        query = linear(at_least_float32(normed), at_least_float32(query_weight), query_bias)
        query = F.normalize(query, dim=-1)
        similarity = (query @ keys.transpose(1, 2)).softmax(-1)
    found = x + similarity @ values
    return linear(normed, qkv_weight, qkv_bias), found, similarity, similarity.argmax(-1)


@operation('read_tokens')
def fast_read(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    query_weight: Tensor,
    query_bias: Tensor | None,
    keys: Tensor,
    values: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """An operation with a name, by which its time is told from that of others."""
    parameters = scale, shift, eps, qkv_weight, qkv_bias, query_weight, query_bias
    return by_llvm('token_dictionary', read, x, *parameters, keys, values)


def refine_tokens(tokens: Tensor, similarity: Tensor, x: Tensor, norm: Norm, share: Tensor) -> Tensor:
    """Tokens that move towards the pixels that are similar to them.

    Args:
        tokens: (N, M, C).
        similarity: (N, L, M), of pixels to tokens.
        x: pixels (N, L, C).
        norm: instance normalisation of each token's similarities over the L pixels. The softmax over these weighs the
            pixels.
        share: (M, 1), of what a token was before.
    """
    form = fast_refine if is_for_kernel(x, similarity, norm.weight, norm.bias, share, tokens) else refine
    return form(x, tokens, similarity, norm.weight, norm.bias, norm.eps, share)


def refine(
    x: Tensor, tokens: Tensor, similarity: Tensor, scale: Tensor, shift: Tensor, eps: float, share: Tensor
) -> Tensor:
    """See `refine_tokens`; in float32 or more, also under autocast.

    The instance norm is written out since the similarity has the positions first, and since PyTorch's variance along
    such an axis takes ten times as long.
    """
    with full_precision(x):
        tokens, x = at_least_float32(tokens), at_least_float32(x)
        centred = similarity - similarity.mean(1, keepdim=True)
        gain = scale * (centred.square().mean(1, keepdim=True) + eps).rsqrt()
        logits = torch.addcmul(shift, centred, gain)
        # Along an axis that is not the last one PyTorch's softmax leaves a GPU idle: three quarters of ATD-light.
        weights = logits.mT.contiguous().softmax(-1) if x.is_cuda else logits.softmax(1).mT
        return torch.lerp(weights @ x, tokens, share)


@operation('refine_tokens')
def fast_refine(
    x: Tensor, tokens: Tensor, similarity: Tensor, scale: Tensor, shift: Tensor, eps: float, share: Tensor
) -> Tensor:
    """As `fast_read`."""
    return by_llvm('token_dictionary', refine, x, tokens, similarity, scale, shift, eps, share)
