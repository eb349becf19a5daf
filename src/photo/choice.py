"""Which weights enlarge a photograph: a file that was named, or the best of a folder."""

import hashlib
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from error import UserError
from model import Model
from model.loading.weights import SUFFIXES
from system.files import some

log = logging.getLogger('frugalsr')

PHOTO = '-photo'  # in the names of weights that were trained for photographs
NAME = re.compile(rf'(?P<network>.+?)(?P<photo>{PHOTO})?_x(?P<scale>[2-9])')
SCORE = re.compile(r'^\| *Set5 *\| *(\d+(?:\.\d+)?)', re.MULTILINE)


@dataclass(frozen=True)
class Weights:
    """A file of weights.

    Attributes:
        file: its path, or Bicubic_x2 and the like, which has none.
        network: the name of its network, by that of the file.
        scale: factor of enlargement.
        photo: whether it was trained for photographs that were compressed with loss.
        score: PSNR on Set5 by the card beside it, dB; None without one.
    """

    file: Path
    network: str
    scale: int
    photo: bool = False
    score: float | None = None

    def __str__(self) -> str:
        return self.file.name + (f' ({self.score:.2f} dB on Set5)' if self.score else '')

    def digest(self) -> str:
        """What tells its content from any other."""
        content = self.file.read_bytes() if self.file.is_file() else self.file.name.encode()
        return hashlib.sha256(content).hexdigest()


def list_weights(folder: Path, network: str | None = None) -> list[Weights]:
    """The files of weights in a folder that are named as `NAME_x4.pt` or `NAME-photo_x4.pt`, of one network or all.

    Raises:
        UserError: there are none.
    """
    if network == 'Bicubic':
        return [Weights(Path(f'Bicubic_x{scale}'), network, scale) for scale in (2, 3, 4)]
    found = []
    for file in sorted(folder.glob('*')):
        if file.suffix in SUFFIXES and (name := NAME.fullmatch(file.stem)):
            score = read_score(file.with_suffix('.md'))
            found.append(Weights(file, name['network'], int(name['scale']), bool(name['photo']), score))
    if not found:
        raise UserError(f'{folder} holds no weights, such as ASID_x4.pt: give a file with --weights.')
    if network is None:
        return found
    if own := [weights for weights in found if weights.network == network]:
        return own
    names = some(sorted({weights.network for weights in found}))
    raise UserError(f'--model {network}: {folder} has no weights of it, but of {names} and Bicubic; give one of these.')


def read_score(card: Path) -> float | None:
    """The PSNR on Set5 that a model card states, dB."""
    row = SCORE.search(card.read_text(encoding='utf-8')) if card.is_file() else None
    return float(row[1]) if row else None


class Networks:
    """The networks there are to choose from, each loaded when it is first used.

    Args:
        weights: the files.
        load: gives the network of a file.
        device: where they run: cpu, cuda or mps.
    """

    def __init__(self, weights: list[Weights], load: Callable[[Weights], Model], device: str) -> None:
        self._weights, self._load, self.device = weights, load, device
        self._models: dict[Weights, Model] = {}
        self._digests: dict[Weights, str] = {}
        self._told: set[tuple[int, bool]] = set()

    @property
    def scales(self) -> list[int]:
        """The factors by which they enlarge."""
        return sorted({weights.scale for weights in self._weights})

    def best(self, scale: int, lossy: bool) -> Weights:
        """The weights of the highest score for a factor, for `lossy` photographs of those made for them, if any are."""
        own = [weights for weights in self._weights if weights.scale == scale]
        fitting = [weights for weights in own if weights.photo == lossy] or own
        return max(fitting, key=lambda weights: weights.score or 0)

    def chain(self, steps: Sequence[int], lossy: bool) -> list[Weights]:
        """The best weights for factors one after the other; what comes from a network is clean."""
        return [self.best(scale, lossy and i == 0) for i, scale in enumerate(steps)]

    def digest(self, weights: Weights) -> str:
        """What tells the content of weights from any other."""
        if weights not in self._digests:
            self._digests[weights] = weights.digest()
        return self._digests[weights]

    def __call__(self, steps: Sequence[int], lossy: bool) -> list[Model]:
        """The networks for factors one after the other, with their weights; each choice is said once."""
        chosen = self.chain(steps, lossy)
        for i, weights in enumerate(chosen):
            if weights not in self._models:
                self._models[weights] = self._load(weights)
            kind = lossy and i == 0
            if (weights.scale, kind) not in self._told:
                self._told.add((weights.scale, kind))
                of = 'JPEG and lossy WebP' if kind else 'clean images'
                made = ', made for such photographs' if weights.photo else ''
                log.info('x%d, %s: %s%s', weights.scale, of, weights, made)
        return [self._models[weights] for weights in chosen]


class OneNetwork(Networks):
    """A single network that is loaded already."""

    def __init__(self, model: Model) -> None:
        weights = Weights(Path(f'{model.name}_x{model.scale}'), model.name, model.scale)
        super().__init__([weights], lambda _: model, model.device.type)
        self._told = {(model.scale, False), (model.scale, True)}
