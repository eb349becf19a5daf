"""The networks as options and help know them, without torch: their names, scales and settings.

They come from model/networks.json, which `python src/tables.py` writes from the networks' own files.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from error import UserError

FILE = Path(__file__).resolve().parent / 'model' / 'networks.json'
TABLE: dict[str, dict[str, Any]] = json.loads(FILE.read_text(encoding='utf-8'))
MODELS = tuple(TABLE)


def settings_of(name: str) -> Mapping[str, object]:
    """The settings of network `name`, each with its paper's value; None where that depends on the scale."""
    return TABLE[name]['settings']


def defaults(setting: str) -> str:
    """Which networks have a setting, and what it is in their papers: 'EDSR, NLSN 256; RCAN 64'."""
    by_value: dict[str, list[str]] = {}
    for name in MODELS:
        if setting in settings_of(name):
            by_value.setdefault(shown(settings_of(name)[setting]), []).append(name)
    return '; '.join(f'{", ".join(names)} {value}' for value, names in by_value.items())


def shown(value: object) -> str:
    """A setting's value as it is typed."""
    if value is None:
        return 'by scale'
    return f'{value:g}' if type(value) is float else str(value)


def check_setting(model: str, setting: str) -> None:
    """Refuse a setting that a network does not have.

    Raises:
        UserError: it has none of that name.
    """
    known = settings_of(model)
    if setting not in known:
        has = f'its settings are {", ".join(known)}' if known else 'it has no settings'
        raise UserError(f'--net {setting}: {model} has no such setting ({has}); choose one of them or leave it out.')


def parse_settings(model: str, typed: Sequence[str]) -> dict[str, object]:
    """Settings typed as 'name=value', each of the type that the network's own value has; the last of a name counts.

    Raises:
        UserError: a setting that the network does not have, or a value of another type.
    """
    found = {}
    for text in typed:
        name, _, value = text.partition('=')
        check_setting(model, name)
        found[name] = parse_value(text, value, settings_of(model)[name])
    return found


def parse_value(text: str, value: str, example: object) -> object:
    """A value as typed in `text`, of the type of `example`; of any number if that is None."""
    try:
        if isinstance(example, str):
            return value
        if isinstance(example, bool):
            return {'true': True, 'false': False}[value.lower()]
        if isinstance(example, float):
            return float(value)
        return int(value) if isinstance(example, int) else json.loads(value)
    except (KeyError, ValueError) as error:
        kinds = {bool: 'True or False', float: 'a number', int: 'a whole number'}
        raise UserError(f'--net {text}: {value!r} is not {kinds.get(type(example), "a number")}; give one.') from error
