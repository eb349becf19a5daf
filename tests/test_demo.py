"""demo.sh: every command that it names is one that the program takes."""

import os
import subprocess

import pytest

from template import TEMPLATES
from tests.conftest import ROOT


def demo(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(['bash', ROOT / 'demo.sh', *arguments], capture_output=True, text=True, timeout=60)


def commands() -> list[str]:
    return [line.split()[0] for line in demo('list').stdout.splitlines()[1:]]


def test_list_names_the_published_commands():
    assert {'LCoAN_x2', 'LCoAN_x4', 'LCoAN_x4_test'} <= set(commands())
    assert {name for name in TEMPLATES if not name.startswith('LCoAN_')} <= set(commands())


@pytest.mark.parametrize('name', commands())
def test_options_are_known(name):
    if not (ROOT / '.venv').is_dir() and not os.environ.get('CI'):
        pytest.skip('no .venv: bash test.sh makes it')
    result = demo(name, '--help')  # read last: whatever stands before it has been parsed
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith('usage:')


def test_unknown_command():
    result = demo('nothing')
    assert result.returncode == 2
    assert 'demo.sh list' in result.stderr
