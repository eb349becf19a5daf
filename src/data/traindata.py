"""Training samples for a PyTorch loader, by sample number."""

import signal
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data.patch import cut, draw, flip
from data.srdata import SRData


class TrainData(Dataset):
    """Patches of one or more sets, each image equally likely.

    Args:
        sets: prepared paired images of one scale.
        patch_size: side of the HR patch in pixels, a multiple of the scale.
        seed: of all random choices.
        augment: flip and transpose each patch at random.
    """

    def __init__(self, sets: Sequence[SRData], patch_size: int, seed: int, augment: bool = True) -> None:
        self.sets, self.patch_size, self.seed, self.augment = sets, patch_size, seed, augment
        self.scale = sets[0].scale
        self.images = [(images, index) for images in sets for index in range(len(images))]

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        """LR and HR patch of sample `number`: (3, side, side) and (3, patch_size, patch_size), uint8."""
        choice = draw(self.seed, number, len(self.images))
        images, index = self.images[choice.image]
        pair = cut(images.lr(index), images.hr(index), self.scale, self.patch_size // self.scale, choice)
        lr, hr = (flip(patch, choice.flips if self.augment else (False, False, False)) for patch in pair)
        return to_tensor(lr), to_tensor(hr)

    def name(self, number: int) -> str:
        """Which image sample `number` is cut from."""
        images, index = self.images[draw(self.seed, number, len(self.images)).image]
        return f'{images.name}/{images.names[index]}'


def to_tensor(patch: np.ndarray) -> Tensor:
    """(H, W, 3) uint8 to (3, H, W) uint8."""
    return torch.from_numpy(np.ascontiguousarray(patch.transpose(2, 0, 1)))


def train_loader(data: TrainData, batches: Iterable[list[int]], workers: int, pin_memory: bool) -> DataLoader:
    """Batches of samples by their numbers, in this order whatever the number of workers."""
    return DataLoader(
        data,
        batch_sampler=batches,
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=start_worker,
    )


def start_worker(_: int) -> None:
    """Leave Ctrl-C, which reaches all processes, to the main one: it finishes its step and then ends the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
