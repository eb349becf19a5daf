"""config.txt of a run folder: the options of the run."""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from error import UserError

NOT_RESTORED = (
    'load', 'save', 'save_dir', 'resume', 'reset', 'debug', 'template', 'test_only', 'pre_train', 'score', 'max_time',
)  # fmt: skip


def write_config(args: argparse.Namespace, settings: Mapping[str, object] = MappingProxyType({})) -> str:
    """The text of config.txt: one `option: value` a line, the value as JSON; `settings` are those of the network."""
    lines = (f'{key}: {json.dumps(value, default=str)}' for key, value in sorted({**vars(args), **settings}.items()))
    return '\n'.join(lines) + '\n'


def read_config(path: Path) -> dict[str, object]:
    """The options in a config.txt.

    Raises:
        UserError: no such file, or not one that this program wrote.
    """
    if not path.parent.is_dir():
        runs = sorted(p.parent.name for p in path.parent.parent.glob('*/config.txt'))
        raise UserError(f'No run at {path.parent}: the runs there are {", ".join(runs) or "none"}.')
    try:
        options = parse_config(path.read_text())
        options['data_range'] = tuple((int(first), int(last)) for first, last in options['data_range'])
        known = options.keys() >= {'model', 'scale'}
    except (OSError, ValueError, TypeError, KeyError):
        known = False
    if not known:
        raise UserError(f'{path.parent} is not a run of this program: its config.txt is missing or unreadable.')
    return options


def parse_config(text: str) -> dict[str, Any]:
    """The options in the text of a config.txt.

    Raises:
        ValueError: it is not what `write_config` writes.
    """
    pairs = (line.split(': ', 1) for line in text.splitlines())
    return {key: json.loads(value) for key, value in pairs}


def changes(old: str, new: str) -> list[str]:
    """What differs between the texts of two config.txt, of what a continued run takes over: 'lr 0.001 -> 0.0001'."""
    before, after = (dict(line.split(': ', 1) for line in text.splitlines()) for text in (old, new))
    keys = [key for key in after if key in before and key not in NOT_RESTORED]
    return [f'{key} {before[key]} -> {after[key]}' for key in keys if json.loads(before[key]) != json.loads(after[key])]
