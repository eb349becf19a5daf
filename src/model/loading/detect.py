"""Which network a state dict belongs to: what its file says of it, what keys and shapes show, what the user names."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from error import UserError
from model import NETWORKS, all_settings, build
from model.atd import recognise_v2
from model.common import NetworkSpec
from model.loading.description import Description
from networks import shown as as_typed
from options.table import setting_option
from system.files import some
from template import TEMPLATES

State = Mapping[str, Tensor]
Settings = Mapping[str, Any]

# What reading settings from shapes that no network has, and building from such settings, may come to.
IMPOSSIBLE = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RuntimeError, UserError)


@dataclass(frozen=True)
class Found:
    """A network and its scale.

    Attributes:
        settings: those in which it differs from the published network of that name.
        assumed: settings that nothing shows, no file says and nobody named.
        like: the network or the recipe after which they are assumed.
    """

    name: str
    scale: int
    settings: dict[str, Any]
    assumed: tuple[str, ...]
    like: str

    def __str__(self) -> str:
        return _title(self.name, self.scale, self.settings)


@dataclass(frozen=True)
class Candidate:
    """A network that is known, in the sizes that weights show.

    Attributes:
        label: its name, or the recipe that says its settings.
        name: of the network.
        scale: that of the weights.
        shown: the settings that they show.
        settings: all settings, as the network or the recipe has them.
    """

    label: str
    name: str
    scale: int
    shown: dict[str, Any]
    settings: dict[str, Any]

    def distance(self, given: Settings = MappingProxyType({})) -> int:
        """In how many of the settings that weights show, or are given, the known network is another one."""
        return sum(self.settings[key] != value for key, value in {**given, **self.shown}.items())

    def __str__(self) -> str:
        return _title(self.name, self.scale, _differing(self.name, self.scale, self.shown))


def recognise(
    state: State,
    description: Description | None = None,
    given: Settings = MappingProxyType({}),
    scale: int | None = None,
) -> Found:
    """The network whose state dict this is.

    What its file says of it counts. If that says nothing, it is the published network, or the network of a recipe, that
    differs in the fewest of the settings which weights show. The others are as there if it has exactly these sizes; in
    other sizes, if all networks of that kind agree in them.

    Args:
        state: parameters and buffers by name.
        description: what their file says.
        given: settings that the user names.
        scale: the factor that the user names, for weights that are alike at several.

    Raises:
        UserError: the weights of no network that is known here, or not all of them; other weights than the file says;
            a given setting that is not theirs; or a setting or scale that nothing decides.
    """
    rivals = _fitting(state, description)
    rivals = [candidate for candidate in rivals if not candidate.distance()] or rivals
    rivals = _of_one_scale(rivals, scale)
    _check_one_kind(rivals)
    shown, known = rivals[0].shown, rivals[0].settings
    for key, value in given.items():
        if key not in known:
            raise UserError(
                f'{rivals[0].name} has no setting {key!r} (its settings are {", ".join(known)}): leave it out.'
            )
        if shown.get(key, value) != value:
            raise UserError(f'{key} {value}: these are weights of {rivals[0]}; leave it out.')
    unseen = [key for key in known if key not in shown and key not in given]
    for key in unseen:
        _check_agreed(key, rivals)
    best = min(rivals, key=lambda candidate: candidate.distance(given))
    sure = {**shown, **given}
    settings = _differing(best.name, best.scale, {**sure, **best.settings, **sure})  # what is sure first
    said = description.settings if description else ()
    return Found(best.name, best.scale, settings, tuple(key for key in unseen if key not in said), best.label)


def nearest(state: State, description: Description | None = None) -> Candidate:
    """The known network that differs in the fewest settings that weights show.

    Raises:
        UserError: the weights of no network known here, or not all of them, or other weights than the file says.
    """
    return _fitting(state, description)[0]


def mismatches(own: State, state: State) -> tuple[list[str], list[str], list[str]]:
    """Keys of a network that `state` lacks, keys that the network lacks, and keys with other shapes."""
    missing = [key for key in own if key not in state]
    extra = [key for key in state if key not in own]
    reshaped = [key for key in own if key in state and own[key].shape != state[key].shape]
    return missing, extra, reshaped


def _fitting(state: State, description: Description | None) -> list[Candidate]:
    """Those candidates whose keys and shapes are those of the weights, the nearest first; at least one."""
    if recognise_v2(state):
        raise UserError(
            'These are weights of the second ATD (TPAMI, arXiv 2603.02581), another network than the ATD of CVPR 2024 '
            'that --model ATD and ATD-light are: get the weights of the first one.'
        )
    said = description is not None and description.model in NETWORKS
    candidates = [_described(state, description)] if said else list(_candidates(state))  # type: ignore[arg-type]
    candidates.sort(key=Candidate.distance)
    faults: dict[object, str | None] = {}  # a kind of network is built once: what weights do not show has no keys
    for candidate in candidates:
        kind = NETWORKS[candidate.name].build
        if kind not in faults:
            faults[kind] = _layout_fault(candidate, state)
    fitting = [candidate for candidate in candidates if faults[NETWORKS[candidate.name].build] == '']
    if fitting:
        return fitting
    if not candidates or (fault := faults[NETWORKS[candidates[0].name].build]) is None:
        names = ', '.join(list(state)[:8]) + (', ...' if len(state) > 8 else '')
        raise UserError(f'No network known here has such weights: {len(state)} tensors, {names}.')
    raise UserError(
        f'These weights look like {candidates[0]}, but {fault}: get the whole file, or the code it belongs to.'
    )


def _candidates(state: State) -> Iterator[Candidate]:
    """The published networks, and those of the recipes, that the weights may be of, in whatever sizes."""
    seen = {network.recognise: _read(network, state) for network in NETWORKS.values()}
    for name, network in NETWORKS.items():
        shown = dict(seen[network.recognise] or {})
        for scale in set(as_tuple(shown.pop('scale', ()))) & set(network.scales):
            published = all_settings(network, scale)
            known = {name: published}
            for label, recipe in TEMPLATES.items():
                settings = {key: recipe.get(key, value) for key, value in published.items()}
                other_sizes = any(settings[key] != published[key] for key in shown)  # or it is the published network
                if recipe['model'] == name and other_sizes and settings not in known.values():
                    known[f'the recipe {label}'] = settings
            for label, settings in known.items():
                yield Candidate(label, name, scale, shown, settings)


def as_tuple(scale: int | tuple[int, ...]) -> tuple[int, ...]:
    """The scales that weights may be of, of a single one too."""
    return scale if isinstance(scale, tuple) else (scale,)


def _described(state: State, description: Description) -> Candidate:
    """The network that a file says its weights are of, if they are."""
    name, scale, settings = description.model, description.scale, description.settings
    network = NETWORKS[name]
    try:
        known = all_settings(network, scale, **settings)
        shown = dict(_read(network, state) or {})
        # Sizes are compared before anything is built of them, which could take all memory; shapes round other numbers.
        sure = {key: value for key, value in shown.items() if key != 'scale' and type(value) is not float}
        fits = scale in as_tuple(shown.get('scale', ())) and all(known[key] == value for key, value in sure.items())
    except IMPOSSIBLE:
        fits = False
    if not fits:
        raise UserError(
            f'The file says that these are weights of {name} x{scale}, with settings that they do not have: fetch or '
            'make it again.'
        )
    return Candidate(name, name, scale, {key: known[key] for key in shown if key != 'scale'}, known)


def _read(network: NetworkSpec, state: State) -> Settings | None:
    """What a network reads from `state`; None as well if shapes of its keys make no sense to it."""
    try:
        return network.recognise(state)
    except IMPOSSIBLE:
        return None


def _layout_fault(candidate: Candidate, state: State) -> str | None:
    """In which keys and shapes the weights differ from such a network, '' if in none; None if it cannot be."""
    try:
        with torch.device('meta'):
            settings = {**candidate.settings, **candidate.shown}
            own = build(candidate.name, candidate.scale, **settings).state_dict()
    except IMPOSSIBLE:
        return None
    missing, extra, reshaped = mismatches(own, state)
    if not (wrong := [*missing, *extra, *reshaped]):
        return ''
    return f'{len(missing)} are missing, {len(extra)} unknown and {len(reshaped)} of another shape, first {some(wrong)}'


def _of_one_scale(rivals: list[Candidate], scale: int | None) -> list[Candidate]:
    """Those of the scale that is named, where weights are alike at several."""
    scales = sorted({candidate.scale for candidate in rivals})
    if len(scales) == 1:
        return rivals
    if scale not in scales:
        raise UserError(
            f'These are weights of {rivals[0].name} at x{" or x".join(map(str, scales))}, which look the same: give '
            f'the scale (--scale {" or ".join(map(str, scales))}).'
        )
    return [candidate for candidate in rivals if candidate.scale == scale]


def _check_one_kind(rivals: Sequence[Candidate]) -> None:
    """Refuse to choose between networks of different kinds that fit equally well."""
    kinds = {NETWORKS[candidate.name].build: candidate for candidate in rivals}
    if len(kinds) > 1:
        names = [candidate.name for candidate in kinds.values()]
        raise UserError(f'These weights fit {" and ".join(names)} equally well: name one, as --model {names[0]}.')


def _check_agreed(key: str, rivals: Sequence[Candidate]) -> None:
    """Refuse to choose what a setting is that weights do not show."""
    values = {candidate.label: as_typed(candidate.settings[key]) for candidate in rivals}
    first, *others = values.values()
    if any(value != first for value in others):
        said = ', '.join(f'{value} in {label}' for label, value in values.items())
        raise UserError(
            f'Nothing shows the {key} of these weights, which look like {rivals[0]} ({said}): name it, as '
            f'{setting_option(key, rivals[0].settings[key])} or, in Python, {key}={first}.'
        )


def _differing(name: str, scale: int, settings: Settings) -> dict[str, Any]:
    """Those of the settings in which a network is not the published one of that name."""
    published = all_settings(NETWORKS[name], scale)
    return {key: value for key, value in settings.items() if published[key] != value}


def _title(name: str, scale: int, settings: Settings) -> str:
    sizes = ', '.join(f'{key} {value}' for key, value in settings.items())
    return f'{name} x{scale}' + (f' ({sizes})' if sizes else '')
