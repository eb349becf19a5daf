"""What a visitor may choose: weights of a folder by scale and by the kind of picture, the best first."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from error import UserError
from model.loading.detect import recognise
from model.loading.weights import SUFFIXES, read_weights
from photo.choice import PHOTO, read_score

log = logging.getLogger('frugalsr')


@dataclass(frozen=True)
class Choice:
    """A network at a scale.

    Attributes:
        network: its name.
        scale: factor of enlargement.
        file: its weights; None if it has none.
        psnr: on Set5, dB, by the card beside the file; None if that does not say.
    """

    network: str
    scale: int
    file: Path | None = None
    psnr: float | None = None

    @property
    def weights(self) -> str:
        """The name of the file."""
        return self.file.name if self.file else 'none'

    @property
    def kind(self) -> str | None:
        """What pictures the weights are for, 'photo' or 'clean'; None without weights."""
        if self.file is None:
            return None
        return 'photo' if PHOTO in self.file.stem else 'clean'

    def __str__(self) -> str:
        return f'{self.network} x{self.scale}' + (f' ({self.weights})' if self.file else '')


def find_choices(folder: Path) -> list[Choice]:
    """What the files of weights in `folder` hold, and bicubic after them.

    By scale; of a scale, the best score on Set5 comes first, and those without a score after those that have one.

    Raises:
        UserError: `folder` is not a folder.
    """
    if not folder.is_dir():
        raise UserError(f'--extend {folder} is not a folder: give a folder of weights.')
    found = []
    for file in sorted(folder.glob('*')):
        if file.suffix in SUFFIXES:
            try:
                state, _, description = read_weights(file)
                network = recognise(state, description)
                found.append(Choice(network.name, network.scale, file, read_score(file.with_suffix('.md'))))
            except UserError as error:
                log.warning('%s is left out: %s', file, error)
    found += [Choice('Bicubic', scale) for scale in (2, 3, 4)]
    return sorted(found, key=lambda choice: (choice.scale, choice.file is None, -(choice.psnr or 0)))


def kinds_at(choices: Sequence[Choice], scale: int) -> list[str]:
    """The kinds of pictures that weights of a scale are for."""
    found = {choice.kind for choice in choices if choice.scale == scale}
    return [kind for kind in ('clean', 'photo') if kind in found]


def fitting(choices: Sequence[Choice], scale: int, kind: str) -> list[Choice]:
    """The choices at a scale: of those kinds of pictures, where there are several; what has no weights is for all."""
    several = len(kinds_at(choices, scale)) > 1
    return [choice for choice in choices if choice.scale == scale and not (several and choice.kind not in (kind, None))]
