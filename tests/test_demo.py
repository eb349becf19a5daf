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


def test_weights_are_taken_with_the_suffix_that_they_have(tmp_path):
    """As prepare.py names those of authors; with a Python that repeats what it is given."""
    for name, content in {
        'demo.sh': (ROOT / 'demo.sh').read_text(), '.ci/setup.sh': (ROOT / '.ci' / 'setup.sh').read_text(),
        'requirements.txt': '', 'constraints.txt': '', '.venv/installed-requirements.txt': '4294967295 0',
        '.venv/bin/python': '#!/bin/sh\necho "$@"', 'models/IMDN_x2.pth': '', 'models/OmniSR_x3.safetensors': '',
        'models/ASID_x4.pt': '', 'models/ASID_x4.pth': '',
    }.items():  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    (tmp_path / '.venv' / 'bin' / 'python').chmod(0o755)
    for file in ('IMDN_x2.pth', 'OmniSR_x3.safetensors', 'ASID_x4.pt', 'PAN_x4.pt'):
        command = ['bash', tmp_path / 'demo.sh', f'{file.partition(".")[0]}_test']
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.stdout.split()[-2:] == ['--pre_train', file], done.stderr


def test_unknown_command():
    result = demo('nothing')
    assert result.returncode == 2
    assert 'demo.sh list' in result.stderr
