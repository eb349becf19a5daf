"""Which weights enlarge a photograph: those that were named, or the best of a folder."""

import hashlib
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from error import UserError
from model import Model
from model.loading.weights import recognise_file, weights_in
from photo.size import LARGEST
from system.files import some

log = logging.getLogger('frugalsr')

NAME = re.compile(r'(?P<model>.*?)(?P<photo>-photo)?(?:_x(?P<scale>[2-9]))?', re.DOTALL)  # of a file
SCORE = re.compile(r'^\| *Set5 *\| *(\d+(?:\.\d+)?)', re.MULTILINE)


@dataclass(frozen=True)
class Weights:
    """Weights of a network, or bicubic interpolation, which has none.

    Attributes:
        network: the name of the network.
        scale: factor of enlargement.
        file: the file; None: it has none.
        photo: whether they were trained for photographs that were compressed with loss; None: they were not trained.
        score: PSNR on Set5 by the card beside the file, dB; None without one.
    """

    network: str
    scale: int
    file: Path | None = None
    photo: bool | None = None
    score: float | None = None

    @property
    def name(self) -> str:
        """The name of the file, or Bicubic_x2 and the like."""
        return self.file.name if self.file else f'{self.network}_x{self.scale}'

    @property
    def stem(self) -> str:
        """The name without suffix."""
        return self.file.stem if self.file else self.name

    @property
    def model(self) -> str:
        """What the file calls its network: LCoAN-small, of LCoAN-small-photo_x4.pt."""
        return _parts(self.stem)['model']

    @property
    def title(self) -> str:
        """The name, and the network where that does not say it."""
        return self.name if self.name.startswith(self.network) else f'{self.name} ({self.network})'

    def __str__(self) -> str:
        return self.title + (f', {self.score:.2f} dB on Set5' if self.score else '')

    def digest(self) -> str:
        """What tells their content from any other."""
        return hashlib.sha256(self.file.read_bytes() if self.file else self.name.encode()).hexdigest()


BICUBIC = [Weights('Bicubic', scale) for scale in (2, 3, 4)]


def list_weights(folder: Path) -> list[Weights]:
    """What the files of weights in a folder hold, by scale; of a scale the best score first, those without one last.

    Network and scale are those of the content; `_x2` in a name decides where weights look the same at several scales,
    and `-photo` at its end, before the scale, says that they were trained for photographs. What cannot be used is left
    out, and the log says why.
    """
    found = []
    for file in weights_in(folder):
        try:
            network = recognise_file(file, named_scale(file))
        except UserError as error:
            log.warning('%s is left out: %s', file, error)
        else:
            score = read_score(file.with_suffix('.md'))
            found.append(Weights(network.name, network.scale, file, bool(_parts(file.stem)['photo']), score))
    return sorted(found, key=lambda weights: (weights.scale, -(weights.score or 0)))


def named_scale(file: Path) -> int | None:
    """The factor in the name of a file of weights, for those that look the same at several."""
    scale = _parts(file.stem)['scale']
    return int(scale) if scale else None


def _parts(stem: str) -> re.Match[str]:
    found = NAME.fullmatch(stem)
    assert found
    return found


def weights_of(network: str | None, folder: Path) -> list[Weights]:
    """The weights in a folder, as of `list_weights`, of one network or all; Bicubic needs none.

    Raises:
        UserError: there are none.
    """
    if network == 'Bicubic':
        return BICUBIC
    found = list_weights(folder)
    if not found:
        raise UserError(f'{folder} holds no weights, such as ASID_x4.pt: give a file with --weights.')
    if own := [weights for weights in found if network in (None, weights.network, weights.model)]:
        return own
    names = some(sorted({weights.model for weights in found}))
    raise UserError(f'--model {network}: {folder} has no weights of it, but of {names} and Bicubic; give one of these.')


def read_score(card: Path) -> float | None:
    """The PSNR on Set5 that a model card states, dB."""
    row = SCORE.search(card.read_text(encoding='utf-8', errors='replace')) if card.is_file() else None
    return float(row[1]) if row else None


def at_scale(found: Sequence[Weights], scale: int) -> list[Weights]:
    """Those weights that enlarge by a factor."""
    return [weights for weights in found if weights.scale == scale]


def best(found: Sequence[Weights], scale: int, lossy: bool) -> Weights:
    """Of weights in the order of `list_weights` those for photographs that were compressed with loss, or for others.

    For the former those for a larger factor, where there are none for this one: made smaller, their result is better
    than that of others (docs/LOG.md). Where there are none of a kind, the first ones for the factor.
    """
    own = at_scale(found, scale)
    able = (weights for weights in found if weights.photo and weights.scale >= scale)
    return next(able if lossy else (weights for weights in own if weights.photo is False), own[0])


class Networks:
    """The networks there are to choose from, each loaded when it is first used.

    Args:
        weights: theirs, in the order of `list_weights`.
        load: gives the network of one.
        device: where they run: cpu or cuda.
    """

    def __init__(self, weights: list[Weights], load: Callable[[Weights], Model], device: str) -> None:
        self._weights, self._load, self.device = weights, load, device
        self._models: dict[Weights, Model] = {}
        self._digests: dict[Weights, str] = {}
        self._told: set[tuple[int, bool]] = set()

    def scales(self, lossy: bool) -> list[int]:
        """The factors by which they enlarge.

        For photographs that were compressed with loss those of weights made for these, if two of them reach `LARGEST`
        (see `best`).
        """
        every = {weights.scale for weights in self._weights}
        made = {weights.scale for weights in self._weights if weights.photo}
        return sorted(made if lossy and max(made, default=0) ** 2 >= LARGEST else every)

    def chain(self, steps: Sequence[int], lossy: bool) -> list[Weights]:
        """The best weights for factors one after the other; what comes from a network is clean."""
        return [best(self._weights, scale, lossy and i == 0) for i, scale in enumerate(steps)]

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
        super().__init__([Weights(model.name, model.scale)], lambda _: model, model.device.type)
        self._told = {(model.scale, False), (model.scale, True)}
