"""Writes what is derived from the program itself: src/model/networks.json, and from that docs/OPTIONS.md."""

import json
import sys
from pathlib import Path

from model import NETWORKS, all_settings
from system.files import write_atomic

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / 'src' / 'model' / 'networks.json'
OPTIONS = ROOT / 'docs' / 'OPTIONS.md'


def main() -> int:
    """Write both files; returns the exit status, 0."""
    write_atomic(TABLE, networks_table().encode())
    import option  # which reads the table

    write_atomic(OPTIONS, option.page().encode())
    print(f'Written: {TABLE}, {OPTIONS}')
    return 0


def networks_table() -> str:
    """The networks with their scales and settings, as JSON; a setting whose value depends on the scale is null."""
    lines = (
        f' {json.dumps(name)}: {json.dumps({"scales": network.scales, "settings": settings})}'
        for name, network in NETWORKS.items()
        for settings in [all_settings(network, network.scales[0])]
    )
    return '{\n' + ',\n'.join(lines) + '\n}\n'


if __name__ == '__main__':
    sys.exit(main())
