"""Which network a state dict belongs to, found from its keys and shapes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from error import UserError
from model import NETWORKS, all_settings, build
from model.atd import recognise_v2
from model.common import NetworkSpec
from system.files import some

State = Mapping[str, Tensor]

# What reading settings from shapes that no network has, and building from such settings, may come to.
IMPOSSIBLE = (IndexError, TypeError, ValueError, ZeroDivisionError, RuntimeError, UserError)


@dataclass(frozen=True)
class Found:
    """A network and its scale.

    Attributes:
        shown: settings that keys and shapes show.
        settings: those of them in which it differs from the published network of that name.
        unseen: settings that nothing shows; they are taken to be those of the published network.
    """

    name: str
    scale: int
    shown: dict[str, Any]
    settings: dict[str, Any]
    unseen: tuple[str, ...]

    def __str__(self) -> str:
        sizes = ', '.join(f'{key} {value}' for key, value in self.settings.items())
        return f'{self.name} x{self.scale}' + (f' ({sizes})' if sizes else '')


def recognise(state: State, scale: int | None = None) -> Found:
    """The network whose state dict this is.

    Of several names for one network in different sizes, it is the one that differs in the fewest settings.

    Args:
        state: weights by name.
        scale: the factor as far as it is known from elsewhere, for weights that are alike at several.

    Raises:
        UserError: the weights of no network that is known here, or not all of them; weights that are alike at several
            scales, and none is given.
    """
    if recognise_v2(state):
        raise UserError(
            'These are weights of the second ATD (TPAMI, arXiv 2603.02581), another network than the ATD of CVPR 2024 '
            'that --model ATD and ATD-light are: get the weights of the first one.'
        )
    candidates = _candidates(state)
    found = min(candidates, key=lambda candidate: len(candidate.settings), default=None)
    own = _layout(found) if found else None
    if found is None or own is None:
        raise UserError(f'No network known here has such weights: {len(state)} tensors, {some(list(state))}.')
    missing, extra, reshaped = mismatches(own, state)
    if wrong := [*missing, *extra, *reshaped]:
        raise UserError(
            f'These weights look like {found}, but {len(missing)} are missing, {len(extra)} unknown and '
            f'{len(reshaped)} of another shape, first {some(wrong)}: get the whole file, or the code it belongs to.'
        )
    alike = {candidate.scale: candidate for candidate in candidates if candidate.name == found.name}
    if len(alike) == 1:
        return found
    if scale not in alike:
        raise UserError(
            f'These are weights of {found.name} at x{" or x".join(map(str, alike))}, which look the same: give the '
            f'scale (--scale {" or ".join(map(str, alike))}).'
        )
    return alike[scale]


def mismatches(own: State, state: State) -> tuple[list[str], list[str], list[str]]:
    """Keys of a network that `state` lacks, keys that the network lacks, and keys with other shapes."""
    missing = [key for key in own if key not in state]
    extra = [key for key in state if key not in own]
    reshaped = [key for key in own if key in state and own[key].shape != state[key].shape]
    return missing, extra, reshaped


def _candidates(state: State) -> list[Found]:
    seen = {network.recognise: _read(network, state) for network in NETWORKS.values()}
    return [
        _compare(name, network, scale, shown)
        for name, network in NETWORKS.items()
        if (shown := dict(seen[network.recognise] or {}))
        for scale in as_tuple(shown.pop('scale'))
        if scale in network.scales
    ]


def as_tuple(scale: int | tuple[int, ...]) -> tuple[int, ...]:
    """The scales that weights may be of, of a single one too."""
    return scale if isinstance(scale, tuple) else (scale,)


def _read(network: NetworkSpec, state: State) -> dict[str, Any] | None:
    """What a network reads from `state`; None as well if shapes of its keys make no sense to it."""
    try:
        return network.recognise(state)
    except IMPOSSIBLE:
        return None


def _layout(found: Found) -> State | None:
    """The state dict of a network without its values; None if it cannot be."""
    try:
        with torch.device('meta'):
            return build(found.name, found.scale, **found.settings).state_dict()
    except IMPOSSIBLE:
        return None


def _compare(name: str, network: NetworkSpec, scale: int, shown: dict[str, Any]) -> Found:
    published = all_settings(network, scale)
    differing = {key: value for key, value in shown.items() if published[key] != value}
    unseen = tuple(key for key in published if key not in shown)
    return Found(name, scale, shown, differing, unseen)
