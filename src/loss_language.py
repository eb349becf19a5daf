"""The loss language of EDSR, as in '5*VGG54+0.15*GAN', for all that reads it without torch.

The terms come from loss/terms.json, which `python src/tables.py` writes from the table of terms in loss/__init__.py.
"""

import json
from collections.abc import Collection
from functools import cache
from pathlib import Path

from error import UserError

FILE = Path(__file__).resolve().parent / 'loss' / 'terms.json'


@cache
def known_terms() -> dict[str, bool]:
    """The names of the terms, and whether each needs whole batches."""
    return json.loads(FILE.read_text(encoding='utf-8'))


def list_names(names: Collection[str]) -> str:
    """'L1, MSE or GAN'."""
    *most, last = names
    return f'{", ".join(most)} or {last}'


def find_whole_batches(text: str) -> list[str]:
    """The terms of a loss that need whole batches.

    Raises:
        UserError: as in `parse`.
    """
    known = known_terms()
    return [name for name in parse(text, known) if known[name]]


def parse(text: str, known: Collection[str]) -> dict[str, float]:
    """The weights of a loss by term.

    Raises:
        UserError: a term that is not `known` or stands twice, or a weight that is not a positive number.
    """
    weights: dict[str, float] = {}
    for part in text.split('+'):
        weight, star, name = part.strip().rpartition('*')
        if name not in known:
            raise UserError(f'--loss {text}: unknown term {part!r}; write weight*NAME with {list_names(known)}.')
        if name in weights:
            raise UserError(f'--loss {text}: the term {name} stands twice; give it once.')
        weights[name] = _weight(weight if star else '1', text)
    return weights


def _weight(text: str, loss: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = 0.0
    if not 0 < weight < float('inf'):
        raise UserError(f'--loss {loss}: the weight {text!r} is not a positive number.')
    return weight
