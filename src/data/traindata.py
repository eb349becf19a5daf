"""Training samples for a PyTorch loader, by sample number."""

import multiprocessing
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from data.degradation import Degradation
from data.patch import Draw, Window, cut, draw, plain
from data.srdata import SRData
from error import UserError

START = 'fork' if sys.platform == 'linux' else None  # of loading processes; else the way of this Python, slower
MORE_SHARED = 'make /dev/shm larger (--shm-size of Docker), or give a smaller --n_threads, at best 0.'


class Sample(NamedTuple):
    """A training sample as it is handed to the device, or with a leading N a batch of them.

    Attributes:
        lr, hr: (3, side, side) and (3, patch_size, patch_size), uint8, not yet flipped.
        flips: (3,) bool: mirror left-right, mirror up-down, transpose.
        replaced: () bool: the image of this number cannot be used, another one took its place.
    """

    lr: Tensor
    hr: Tensor
    flips: Tensor
    replaced: Tensor


@dataclass(frozen=True)
class Failure:
    """What takes the place of a batch that could not be made, as it comes from a loading process.

    PyTorch would raise the error of a loading process again with a text of its own around it.

    Attributes:
        message: of the `UserError`.
        trace: where it was raised, for --debug.
    """

    message: str
    trace: str


class LoadingFailed(Exception):
    """Where an error came up in a loading process: its traceback there."""


class TrainData(Dataset):
    """Patches of one or more sets.

    Args:
        sets: prepared paired images of one scale.
        patch_size: side of the HR patch in pixels, a multiple of the scale.
        seed: of all random choices.
        augment: flip and transpose each patch at random.
        skip_bad: the next image takes the place of one that cannot be used.
        by_area: images are as likely as they have pixels, instead of all equally.
        degradation: what is done to the LR patches, drawn for each sample.
    """

    def __init__(
        self,
        sets: Sequence[SRData],
        patch_size: int,
        seed: int,
        augment: bool = True,
        skip_bad: bool = False,
        by_area: bool = False,
        degradation: Degradation | None = None,
    ) -> None:
        self.sets, self.patch_size, self.seed, self.augment = sets, patch_size, seed, augment
        self.scale, self.skip_bad, self.degradation = sets[0].scale, skip_bad, degradation
        self.images = [(images, index) for images in sets for index in range(len(images))]
        self.area_ends = (
            np.cumsum(np.concatenate([images.areas() for images in sets]), dtype=np.int64) if by_area else None
        )

    def __getitem__(self, number: int) -> Sample:
        """Sample `number`.

        Raises:
            UserError: its image cannot be used, nor, with `skip_bad`, can any other.
        """
        choice = self._draw(number)
        lr, hr, image = self._read(choice.image)
        lr, hr = cut(lr, hr, self.scale, self.patch_size // self.scale, choice, self._view(number))
        flips = choice.flips if self.augment else (False, False, False)
        return Sample(to_tensor(lr), to_tensor(hr), torch.tensor(flips), torch.tensor(image != choice.image))

    def __getitems__(self, numbers: Sequence[int]) -> list[Sample] | Failure:
        """The samples of a batch, or why one of them cannot be had; this is what a `DataLoader` calls."""
        try:
            return [self[number] for number in numbers]
        except UserError as error:
            return Failure(str(error), traceback.format_exc())

    def with_patches(self, patch_size: int) -> 'TrainData':
        """The same samples in another size: of the same image, around the same place, turned alike."""
        other = copy(self)
        other.patch_size = patch_size
        return other

    def _view(self, number: int) -> Callable[[np.ndarray, np.ndarray, Window], np.ndarray]:
        """How sample `number` sees its LR image."""
        if self.degradation is None:
            return plain
        return partial(self.degradation.of_window, rng=np.random.default_rng((self.seed, 2, number)))

    def _draw(self, number: int) -> Draw:
        return draw(self.seed, number, len(self.images), self.area_ends)

    def _read(self, image: int) -> tuple[np.ndarray, np.ndarray, int]:
        """LR and HR of an image, or of the next one that can be used, and which it is."""
        for other in range(image, image + len(self.images)):
            images, index = self.images[other % len(self.images)]
            try:
                return images.lr(index), images.hr(index), other
            except UserError as error:
                if not self.skip_bad:
                    raise
                reason = error
        raise UserError(f'None of the {len(self.images)} training images can be used: {reason}')

    def name(self, number: int) -> str:
        """Which image sample `number` is cut from."""
        images, index = self.images[self._draw(number).image]
        return f'{images.name}/{images.names[index]}'


def turn(images: Tensor, flips: Tensor) -> Tensor:
    """Square images (N, C, side, side), each mirrored left-right, up-down and transposed by its row of (N, 3) bool."""
    left_right, up_down, transpose = flips.view(-1, 3, 1, 1, 1).unbind(1)
    images = torch.where(left_right, images.flip(-1), images)
    images = torch.where(up_down, images.flip(-2), images)
    return torch.where(transpose, images.transpose(-1, -2), images)


def to_tensor(patch: np.ndarray) -> Tensor:
    """(H, W, 3) uint8 to (3, H, W) uint8."""
    return torch.from_numpy(np.ascontiguousarray(patch.transpose(2, 0, 1)))


def collate(samples: list[Sample] | Failure) -> Sample | Failure:
    """Samples as one with a leading N, in a loading process in shared memory; a failure stays one."""
    if isinstance(samples, Failure):
        return samples
    try:
        return default_collate(samples)
    except RuntimeError as error:
        if '/torch_' not in str(error):  # as PyTorch calls its pieces of shared memory
            raise
        said = f'A loading process could not get shared memory ({error}): {MORE_SHARED}'
        return Failure(said, traceback.format_exc())


def train_loader(data: TrainData, batches: Iterable[list[int]], workers: int, pin_memory: bool) -> DataLoader:
    """Batches by the numbers of their samples, a `Sample` or `Failure` each, in this order whatever the workers.

    Raises:
        UserError: there is no shared memory for so many workers.
    """
    try:
        context = multiprocessing.get_context(START)
        [context.Queue() for _ in range(workers and workers + 2)]  # as a loader makes them, and more untidily
    except OSError as error:
        raise UserError(
            f'{workers} loading processes could not get shared memory ({error.strerror}): {MORE_SHARED}'
        ) from error
    return DataLoader(
        data,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        worker_init_fn=start_worker,
        multiprocessing_context=START if workers else None,
    )


def start_worker(_: int) -> None:
    """Leave Ctrl-C, which reaches all processes, to the main one: it finishes its step and then ends the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class WorkerDied(Exception):
    """A process that loads data ended before its time."""


def whole_batches(loader: Iterable[Sample | Failure]) -> Iterator[Sample]:
    """The batches of a loader, with errors as this program has them.

    When a loading process dies PyTorch raises in the middle of whatever the program is doing, a step perhaps; here that
    is noticed between two batches.

    Raises:
        WorkerDied: a loading process ended.
        UserError: a sample could not be made.
    """
    child = getattr(signal, 'SIGCHLD', None)  # Windows has none
    handler = signal.getsignal(child) if child else None
    try:
        batches = iter(loader)
        if child:
            signal.signal(child, handler)
        for batch in batches:
            if isinstance(batch, Failure):
                raise UserError(batch.message) from LoadingFailed(batch.trace)
            yield batch
    except (RuntimeError, OSError, EOFError) as error:  # OSError: a batch was on its way
        if type(error) is RuntimeError and 'DataLoader worker' not in str(error):
            raise
        raise WorkerDied(str(error)) from error
