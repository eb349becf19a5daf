"""Parsers of command lines, and the kinds of values that options take."""

import argparse
import difflib
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from error import UserError

Group = argparse._ArgumentGroup


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Adds the default to an option's help where there is one to speak of; keeps the lines of the examples."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        silent = action.default is None or action.default is False or action.default in ('', [])
        if silent or 'default:' in (action.help or ''):
            return action.help
        if isinstance(action.default, list):
            return f'{action.help} (default: {" ".join(map(str, action.default))})'
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """A parser of one of the programs, whose complaints are one sentence."""

    def __init__(self, prog: str, description: str, usage: str = '[options]', epilog: str | None = None) -> None:
        super().__init__(
            prog, f'python {prog} {usage}', description, epilog, formatter_class=Formatter, allow_abbrev=False
        )

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As in the base class, but an unknown option is answered with those of a similar name."""
        args = sys.argv[1:] if args is None else args
        if lost := next((word for word in args if re.fullmatch('--[a-zA-Z_]+=--', word)), ''):
            self.error(f'argument {lost[:-3]}: -- is no value')  # argparse would take it for an empty list
        found, unknown = self.parse_known_intermixed_args(args, namespace)
        if unknown:
            first = next((word for word in unknown if word.startswith('-')), unknown[0])
            self.error(f'unknown option {first}{self._similar(first)}')
        return found

    def _similar(self, word: str) -> str:
        name = word.partition('=')[0]
        near = difflib.get_close_matches(name, self._option_string_actions, 3, 0.75)
        return f', similar to {" and ".join(near)}' if near else ''

    def page(self, without: str) -> str:
        """What --help says of the options, in Markdown below a heading of the program, without a text such as a folder.

        It depends on nothing of this machine but `without`, nor on the release of Python.
        """
        formatter = Formatter(self.prog)
        parts = [f'## src/{self.prog}']
        for group in self._action_groups:
            rows = [
                f'- `{_typed(formatter, action)}`: {formatter._expand_help(action)}'
                for action in group._group_actions
                if action.dest != 'help'
            ]
            if rows:
                parts += [f'### {group.title}', '\n'.join(rows).replace(without, '')]
        return '\n\n'.join(parts)

    def error(self, message: str) -> NoReturn:
        raise UserError(f'{message[0].upper()}{message[1:]}; {self.prog} --help lists the options.')


def _typed(formatter: Formatter, action: argparse.Action) -> str:
    """Names of an option, and what stands behind them."""
    names = ', '.join(action.option_strings)
    values = '' if action.nargs == 0 else formatter._format_args(action, action.dest.upper())
    return f'{names} {values}'.strip() if names else formatter._metavar_formatter(action, action.dest)(1)[0]


def number(kind: type, low: float, high: float = float('inf'), open_low: bool = False) -> Callable[[str], float]:
    """Type of an option: a finite number in [low, high], or (low, high] if `open_low`."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = None
        fits = value is not None and abs(value) < float('inf') and value <= high
        if not fits or not (low < value if open_low else low <= value):
            what = 'a whole number' if kind is int else 'a number'
            bound = f'above {low:g}' if open_low else f'of {low:g} or more'
            bound += '' if high == float('inf') else f', at most {high:g}'
            raise argparse.ArgumentTypeError(f'{text!r} is not {what} {bound}')
        return value

    return parse


MOST = 10**9  # far beyond every use, and within what libraries take
count = number(int, 1, MOST)
natural = number(int, 0, MOST)
positive = number(float, 0, 1e30, open_low=True)
fraction = number(float, 0, 1)


def truth(text: str) -> bool:
    """'True' or 'False', as EDSR writes them."""
    if text.lower() not in ('true', 'false'):
        raise argparse.ArgumentTypeError(f'{text!r} is neither True nor False')
    return text.lower() == 'true'


def automatic(text: str) -> str:
    """'auto'."""
    if text != 'auto':
        raise argparse.ArgumentTypeError(f'{text!r} is not auto; --chop alone takes tiles of --chop_size')
    return text


def memory_size(text: str) -> int:
    """Bytes, from a number with the unit M or G (2**20, 2**30)."""
    units = {'M': 2**20, 'G': 2**30}
    try:
        return int(positive(text[:-1]) * units[text[-1:].upper()])
    except (KeyError, argparse.ArgumentTypeError) as error:
        raise argparse.ArgumentTypeError(f'{text!r} is not an amount of memory such as 2G or 700M') from error


def names(text: str) -> list[str]:
    """Sets joined by '+', or one path to a folder; paths are made absolute."""

    def is_path(name: str) -> bool:
        return os.sep in name or '/' in name

    found = [text] if Path(text).is_dir() and is_path(text) else [name for name in text.split('+') if name]
    if not found:
        raise argparse.ArgumentTypeError(f'{text!r} names no set')
    return [str(folder(name)) if is_path(name) else name for name in found]


def scales(text: str) -> int | list[int]:
    """One factor, or several joined by '+'."""
    try:
        factors = [int(count(part)) for part in text.split('+')]
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f'{text!r} is not a factor such as 4, or several such as 2+3+4') from error
    return factors[0] if len(factors) == 1 else factors


def assignment(text: str) -> str:
    """'name=value'."""
    if not re.fullmatch(r'\w+=.+', text):
        raise argparse.ArgumentTypeError(f'{text!r} is not a setting and its value such as n_feats=64')
    return text


def epochs_list(text: str) -> list[int]:
    """Increasing epochs joined by '-'."""
    try:
        values = [int(part) for part in text.split('-')]
    except ValueError:
        values = []
    if not values or values[0] < 1 or values != sorted(set(values)):
        raise argparse.ArgumentTypeError(f'{text!r} is not a list of rising epochs such as 200-400')
    return values


def sides(text: str) -> list[int]:
    """Sides of patches joined by '-'."""
    try:
        return [int(count(part)) for part in text.split('-')]
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f'{text!r} is not a list of sides such as 32-48-64') from error


def data_range(text: str) -> tuple[tuple[int, int], ...]:
    """'first-last' or 'first-last/first-last', counted from 1."""
    try:
        spans = tuple((int(first), int(last)) for first, last in (part.split('-') for part in text.split('/')))
    except ValueError:
        spans = ()
    if len(spans) not in (1, 2) or any(not 1 <= first <= last for first, last in spans):
        raise argparse.ArgumentTypeError(f'{text!r} is not a range of images such as 1-800/801-810')
    return spans


def weights(text: str) -> str:
    """A path to a file, made absolute so that a run can be continued from anywhere, or a name to look up."""
    return str(folder(text)) if at_home(text).is_file() else text


def folder(text: str) -> Path:
    """A path, made absolute so that a run can be continued from anywhere."""
    if not text:
        raise argparse.ArgumentTypeError("'' is not a path; the current folder is .")
    path = at_home(text)
    try:
        return path.absolute()
    except FileNotFoundError as error:
        raise UserError(f'{text}: the folder that this shell is in was deleted: change to another one.') from error


def at_home(path: str | Path) -> Path:
    """A path, a home folder in place of ~.

    Raises:
        UserError: nobody has such a home folder.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f'{path}: no such home folder is known: give the path without ~.') from error
