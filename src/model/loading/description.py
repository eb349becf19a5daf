"""What a file of weights says of its network: which one it is, its scale, its settings.

Keys and shapes of weights do not show all settings: not the window of LCoAN, the categories of ATD or the factor of
EDSR's residual branches. So the files that this program writes name them.

In a file of PyTorch they stand in the attribute `_metadata` of the state dict, in which PyTorch itself keeps the
versions of modules. `torch.save` writes it and `torch.load(weights_only=True)` reads it (tried with torch 2.6, 2.13 and
2.14, with old files that are no zip archives too); it stays with the dict where a program wraps it or saves it again,
which a record beside it in the zip archive does not; and the dict still holds nothing but tensors, so that
`load_state_dict` of any program takes it. In a file of safetensors they stand in its metadata, as JSON.
"""

import json
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

import networks
from model import Model
from options.config import parse_config

KEY = 'frugalsr'


@dataclass(frozen=True)
class Description:
    """A network by its name, with its scale and its settings; those that are missing are as in its paper."""

    model: str
    scale: int
    settings: dict[str, Any]


def describe(model: Model) -> Description:
    """The description of a network."""
    return Description(model.name, model.scale, model.settings)


def described(state: Mapping[str, Tensor], description: Description) -> OrderedDict[str, Tensor]:
    """The state dict with its description in it, on the CPU, for machines without a GPU too; `state` stays as it is."""
    found = OrderedDict((key, value.cpu()) for key, value in state.items())
    found._metadata = {**getattr(state, '_metadata', {}), KEY: asdict(description)}  # type: ignore[attr-defined]
    return found


def to_metadata(description: Description) -> dict[str, str]:
    """The metadata of a file of safetensors."""
    return {KEY: json.dumps(asdict(description))}


def from_state(state: object) -> Description | None:
    """What `described` put into a state dict."""
    metadata = getattr(state, '_metadata', None)
    return _checked(metadata.get(KEY)) if isinstance(metadata, Mapping) else None


def from_metadata(metadata: object) -> Description | None:
    """What `to_metadata` made."""
    try:
        return _checked(json.loads(metadata[KEY]))  # type: ignore[index]
    except (KeyError, TypeError, ValueError, RecursionError):
        return None


def from_options(content: Mapping[str, object]) -> Description | None:
    """What the options that a run keeps in its state say of its network."""
    try:
        options = parse_config(str(content['options']))
        settings = networks.settings_of(str(options['model']))
        known = {key: options[key] for key in settings if key in options}
        return _checked({'model': options['model'], 'scale': options['scale'], 'settings': known})
    except (KeyError, ValueError, RecursionError):
        return None


def _checked(found: object) -> Description | None:
    """A description that a file gives; None if it is none, as it may be in a file of others."""
    if not isinstance(found, Mapping) or found.keys() != {'model', 'scale', 'settings'}:
        return None
    model, scale, settings = found['model'], found['scale'], found['settings']
    if not isinstance(model, str) or type(scale) is not int or not isinstance(settings, dict):
        return None
    return Description(model, scale, settings)
