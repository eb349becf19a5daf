"""Centroids of clusters, by numbers worked out by hand and in two processes."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed

from model.blocks.centroids import moved
from tests.conftest import kept_for_gradients, numbers

CODES = torch.tensor([[[0, 0, 2]], [[2, 0, 2]], [[0, 2, 2]]])


def test_centroids_are_normalised_sums() -> None:
    """(1, 0) + (3, 3) and twice (0, 2) to unit vectors; nobody is in the second cluster."""
    x = torch.tensor([[[1.0, 0], [3, 3], [0, 2], [0, 2]]])
    means = torch.tensor([[[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]]])
    found = moved(means, x, torch.tensor([[[0, 0, 2, 2]]]))
    torch.testing.assert_close(found, torch.tensor([[[0.8, 0.6], [0.3, 0.4], [0, 1]]]))


def plain(means: Tensor, x: Tensor, codes: Tensor) -> Tensor:
    """With PyTorch's own gradients, one clustering."""
    sums = [x[codes[:, 0] == k].sum(0) for k in range(means.shape[1])]
    own = [s / s.norm() if (codes[:, 0] == k).any() else means[0, k] for k, s in enumerate(sums)]
    return torch.stack(own).unsqueeze(0)


def test_gradients_of_the_members() -> None:
    means, x, seed = numbers(1, 3, 4), numbers(3, 3, 4, seed=2).requires_grad_(), numbers(1, 3, 4, seed=3)
    found, expected = moved(means, x, CODES), plain(means, x, CODES)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    gradients = [torch.autograd.grad(out, x, seed)[0] for out in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)
    assert gradients[0].abs().max() > 0.1


def test_of_the_members_only_their_clusters_are_kept_for_the_gradients() -> None:
    x, codes = numbers(2, 500, 3).requires_grad_(), torch.arange(1000).view(2, 1, 500) % 40
    kept = kept_for_gradients(lambda: moved(numbers(1, 40, 3), x, codes))
    assert max(tensor.numel() for tensor in kept) == 1000


def part_of_a_batch(rank: int, folder: Path) -> None:
    """One of two processes; the first has one image, the second two."""
    torch.set_num_threads(1)
    distributed.init_process_group('gloo', f'file://{folder}/meet', rank=rank, world_size=2)
    part = slice(0, 1) if rank == 0 else slice(1, 3)
    x, weight = numbers(3, 3, 4, seed=2)[part].requires_grad_(), numbers(2, 1, 3, 4, seed=3)
    found = moved(numbers(1, 3, 4), x, CODES[part])
    (found * weight[rank]).sum().backward()  # each process has a loss of its own
    torch.save((found.detach(), x.grad), folder / f'{rank}.pt')
    distributed.destroy_process_group()


@pytest.mark.slow
def test_processes_have_the_centroids_and_gradients_of_all(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(part_of_a_batch, (tmp_path,), nprocs=2)
    found = [torch.load(tmp_path / f'{rank}.pt') for rank in (0, 1)]
    x, weight = numbers(3, 3, 4, seed=2).requires_grad_(), numbers(2, 1, 3, 4, seed=3)
    expected = plain(numbers(1, 3, 4), x, CODES)
    (expected * weight.sum(0)).sum().backward()
    for centroids, _ in found:
        torch.testing.assert_close(centroids, expected.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.cat([gradient for _, gradient in found]), x.grad, rtol=0, atol=1e-12)
