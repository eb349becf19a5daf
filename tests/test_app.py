"""The program that serves the page: its options, its errors, its end."""

import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from urllib.request import urlopen

import pytest

import app
from tests.conftest import ROOT


class Program:
    """`python src/app.py` on a free port of this machine, with its temporary files in a folder of their own."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder = folder
        command = [sys.executable, str(ROOT / 'src' / 'app.py'), '--port', '0', '--cpu', *options]
        environment = {'PATH': '/usr/bin:/bin', 'TMPDIR': str(folder), 'OMP_NUM_THREADS': '1'}
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder, env=environment
        )
        assert self.process.stdout is not None
        self.said = ''
        for line in self.process.stdout:
            self.said += line
            if found := re.search(r'The page is at (\S+)', line):
                self.url = found[1]
                return
        raise AssertionError(self.said)

    def end(self, number: int = signal.SIGINT) -> int:
        """Send a signal; returns the exit status."""
        self.process.send_signal(number)
        self.said += self.process.communicate(timeout=60)[0]
        return self.process.returncode


def test_serves_until_a_signal_and_leaves_nothing(tmp_path):
    program = Program(tmp_path)
    try:
        assert program.url.startswith('http://127.0.0.1:')
        with urlopen(program.url) as page:
            assert b'FrugalSR' in page.read()
        assert len(list(tmp_path.glob('frugalsr-*'))) == 1
    finally:
        status = program.end(signal.SIGTERM)
    assert status == 0
    assert program.said.count('\n') == 1
    assert not list(tmp_path.glob('frugalsr-*'))


def refused(capsys, *options: str) -> str:
    assert app.main(options) == 2
    said = capsys.readouterr().err
    assert said.startswith('Error: ')
    assert said.count('\n') == 1
    return said


@pytest.fixture
def restored(monkeypatch):
    """Signals and environment as they were, after the program ran in this process."""
    for name in ('GRADIO_ANALYTICS_ENABLED', 'GRADIO_TEMP_DIR'):
        monkeypatch.setenv(name, '')
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures('restored')
class TestErrors:
    def test_gradio_is_optional(self, capsys, monkeypatch):
        monkeypatch.setitem(sys.modules, 'gradio', None)
        monkeypatch.delitem(sys.modules, 'web.page', raising=False)
        said = refused(capsys, '--port', '0')
        assert 'gradio is missing' in said
        assert '"gradio>=' in said

    def test_no_folder_of_weights(self, capsys, tmp_path):
        assert '/none is not a folder' in refused(capsys, '--extend', str(tmp_path / 'none'))

    def test_port_in_use(self, capsys):
        with socket.create_server(('127.0.0.1', 0)) as other:
            port = str(other.getsockname()[1])
            assert f'--port {port}' in refused(capsys, '--port', port)

    @pytest.mark.parametrize(
        'options', [('--port', '70000'), ('--port', '-1'), ('--host', '192.0.2.1'), ('--max_upload', '0'), ('--share',)]
    )
    def test_options(self, capsys, options):
        assert options[0] in refused(capsys, *options)
