"""Writes what follows from the program itself: tables of its networks and loss terms, and from them docs/OPTIONS.md."""

import json
import os
from pathlib import Path

from error import run_program
from loss import TERMS
from model import NETWORKS, all_settings
from system.files import write_atomic

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / 'src' / 'model' / 'networks.json'
LOSSES = ROOT / 'src' / 'loss' / 'terms.json'
OPTIONS = ROOT / 'docs' / 'OPTIONS.md'


def main() -> int:
    """Write all of them; returns the exit status, 0."""
    write_atomic(TABLE, networks_table().encode())
    write_atomic(LOSSES, losses_table().encode())
    write_atomic(OPTIONS, options_page().encode())
    print(f'Written: {TABLE}, {LOSSES}, {OPTIONS}')
    return 0


def networks_table() -> str:
    """The networks with their scales and settings, as JSON; a setting whose value depends on the scale is null."""
    lines = (
        f' {json.dumps(name)}: {json.dumps({"scales": network.scales, "settings": settings})}'
        for name, network in NETWORKS.items()
        for settings in [all_settings(network, network.scales[0])]
    )
    return '{\n' + ',\n'.join(lines) + '\n}\n'


def losses_table() -> str:
    """The terms of the loss, and whether each needs whole batches, as JSON."""
    return json.dumps({name: term.whole_batches for name, term in TERMS.items()}, indent=1) + '\n'


def options_page() -> str:
    """docs/OPTIONS.md: what --help says, in Markdown, with paths from the checkout."""
    import enlarge
    from options import table  # which reads the other tables

    programs = (parser.page(f'{ROOT}{os.sep}') for parser in (table.build_parser(), enlarge.build_parser()))
    said = 'Written by `python src/tables.py` from what `--help` prints.'
    return '\n\n'.join(['# Options', said, *programs]) + '\n'


if __name__ == '__main__':
    run_program(main)
