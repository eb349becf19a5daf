"""Centroids of clusters, which are no parameters but follow what is seen in training (LCoAN, CATANet)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.autograd.function import once_differentiable

from error import UserError


def sum_over_ranks(x: Tensor) -> Tensor:
    """`x` added up over all processes of a distributed run; `x` itself in a single one."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(x)
    return x


class ClusterSums(torch.autograd.Function):
    """See `moved`: sums (R, K, dim) and sizes (R, K). Of the members only their clusters are kept for the gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, n_clusters: int) -> tuple[Tensor, Tensor]:
        clusters = torch.arange(n_clusters, device=codes.device)
        members = (codes.unsqueeze(-1) == clusters).to(x.dtype)  # F.one_hot would look at the largest code
        sizes = sum_over_ranks(members.sum((0, 2)))
        ctx.save_for_backward(codes)
        ctx.mark_non_differentiable(sizes)
        return sum_over_ranks(torch.einsum('nrlk,nld->rkd', members, x)), sizes

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        (codes,) = ctx.saved_tensors
        rounds = zip(sum_over_ranks(grad.contiguous()), codes.unbind(1), strict=True)
        of_rows = [of_clusters.index_select(0, of.flatten()).view(*of.shape, -1) for of_clusters, of in rounds]
        return torch.stack(of_rows).sum(0), None, None


def moved(means: Tensor, x: Tensor, codes: Tensor) -> Tensor:
    """Normalised sums of the members of each cluster, over the batch and all ranks.

    A cluster that is empty keeps its centroid, as all do where the rows are not finite.

    Args:
        means: centroids (R, K, dim) of R independent clusterings.
        x: rows (N, L, dim), with or without a gradient.
        codes: the cluster of each, (N, R, L) int64.
    """
    sums, sizes = ClusterSums.apply(x, codes, means.shape[1])
    sums = sums.to(means.dtype)
    known = (sizes.unsqueeze(-1) > 0) & sums.isfinite().all(-1, keepdim=True)
    return torch.where(known, F.normalize(sums, dim=-1), means)


class Centroids(nn.Module):
    """The buffers `means` (..., K, dim) and `initted`, whether a first batch has given the means their place.

    In training each batch moves them: means <- decay * means + (1 - decay) * those of the batch.
    """

    means: Tensor
    initted: Tensor

    def __init__(self, *shape: int, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer('means', torch.randn(shape))
        self.register_buffer('initted', torch.tensor(False))
        self._seen = -1  # how often `initted` was changed when it was read from the device as true

    def initialised(self) -> bool:
        """`initted`, for which the device is asked after a change alone; a network made for inference has none."""
        changes = 0 if self.initted.is_inference() else self.initted._version
        if self._seen != changes and bool(self.initted):
            self._seen = changes
        return self._seen == changes

    def check_initialised(self, name: str) -> None:
        """Refuse to evaluate what was never trained, but for traces and where there are no values."""
        if not (torch.compiler.is_compiling() or self.initted.is_meta or self.initialised()):
            raise UserError(
                f'The k-means centroids of {name} were never initialised: train it, or load trained weights.'
            )

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._seen = -1
