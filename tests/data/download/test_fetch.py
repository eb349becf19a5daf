"""Downloads from a server on this machine that breaks connections, ignores ranges and sends other files."""

import hashlib
import re
import socket
import ssl
import struct
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.error import URLError

import numpy as np
import pytest

from data.download import fetch as download
from data.download.fetch import fetch, verify
from error import UserError, WriteError

CONTENT = np.random.default_rng(0).bytes(100_000)
SHA256 = 'sha256:' + hashlib.sha256(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves `files` by name.

    `breaks`: after how many bytes the next answers end; `reset`: with a reset instead of an orderly end.
    `ranges`: whether parts can be asked for. `codes`: what the next answers are instead of the file.
    `shift`: by how much parts begin later than asked for. `kind`: the type of the content.
    `asked`: name and Range header of every request.
    """

    def __init__(self) -> None:
        super().__init__(('127.0.0.1', 0), Handler)
        self.files: dict[str, bytes] = {}
        self.breaks: list[int] = []
        self.codes: list[int] = []
        self.ranges, self.reset, self.lengths = True, False, True
        self.shift, self.kind = 0, 'application/zip'
        self.asked: list[tuple[str, str | None]] = []
        self.url = f'http://127.0.0.1:{self.server_port}'


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server, name = self.server, self.path.rpartition('/')[2]
        wanted = self.headers['Range']
        server.asked.append((name, wanted))
        code = server.codes.pop(0) if server.codes else 200
        if name not in server.files or code != 200:
            self.send_error(404 if name not in server.files else code)
            return
        content = server.files[name]
        start = int(re.fullmatch(r'bytes=(\d+)-', wanted)[1]) if wanted and server.ranges else 0
        if start and start >= len(content):
            self.send_response(416)
            self.send_header('Content-Range', f'bytes */{len(content)}')
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        start += server.shift
        if start:
            self.send_header('Content-Range', f'bytes {start}-{len(content) - 1}/{len(content)}')
        self.send_header('Content-Type', server.kind)
        if server.lengths:
            self.send_header('Content-Length', str(len(content) - start))
        self.end_headers()
        broken = bool(server.breaks)
        self.wfile.write(content[start:][: server.breaks.pop(0)] if broken else content[start:])
        if broken and server.reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))

    def log_message(self, *_) -> None:
        """Nothing on the screen."""


@pytest.fixture
def server(monkeypatch) -> Iterator[Server]:
    monkeypatch.setattr(download, 'PAUSES', (0, 0, 0))
    with Server() as running:
        running.files['x.zip'] = CONTENT
        thread = threading.Thread(target=running.serve_forever, kwargs={'poll_interval': 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def message(*arguments) -> str:
    with pytest.raises(UserError) as caught:
        fetch(*arguments)
    assert '\n' not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize('size', [None, len(CONTENT)])
@pytest.mark.parametrize('lengths', [True, False])
def test_a_whole_file(server, tmp_path, size, lengths):
    server.lengths = lengths
    path = tmp_path / 'new' / 'x.zip'
    fetch(f'{server.url}/x.zip', path, SHA256, size)
    assert path.read_bytes() == CONTENT
    assert list(path.parent.iterdir()) == [path]
    assert server.asked == [('x.zip', None)]


def test_a_broken_connection_is_continued(server, tmp_path):
    server.breaks = [40_000, 30_000]
    fetch(f'{server.url}/x.zip', tmp_path / 'x.zip', SHA256)
    assert (tmp_path / 'x.zip').read_bytes() == CONTENT
    assert [wanted for _, wanted in server.asked] == [None, 'bytes=40000-', 'bytes=70000-']


def test_a_reset_connection_is_continued(server, tmp_path):
    server.breaks, server.reset = [40_000], True
    fetch(f'{server.url}/x.zip', tmp_path / 'x.zip', SHA256)
    assert (tmp_path / 'x.zip').read_bytes() == CONTENT
    assert len(server.asked) == 2


def test_a_server_without_ranges(server, tmp_path):
    server.breaks, server.ranges = [40_000, 50_000], False
    fetch(f'{server.url}/x.zip', tmp_path / 'x.zip', SHA256)
    assert (tmp_path / 'x.zip').read_bytes() == CONTENT
    assert [wanted for _, wanted in server.asked] == [None, 'bytes=40000-', 'bytes=50000-']


def test_an_answer_cut_short_without_its_length_is_continued_where_the_size_is_published(server, tmp_path):
    server.breaks, server.lengths = [40_000], False
    fetch(f'{server.url}/x.zip', tmp_path / 'x.zip', SHA256, len(CONTENT))
    assert (tmp_path / 'x.zip').read_bytes() == CONTENT


def test_what_an_earlier_run_left_is_continued(server, tmp_path):
    (tmp_path / 'x.zip.part').write_bytes(CONTENT[:60_000])
    fetch(f'{server.url}/x.zip', tmp_path / 'x.zip', SHA256)
    assert (tmp_path / 'x.zip').read_bytes() == CONTENT
    assert server.asked == [('x.zip', 'bytes=60000-')]


@pytest.mark.parametrize('size, requests', [(len(CONTENT), 0), (None, 1)])
def test_a_part_that_is_whole_already(server, tmp_path, size, requests):
    (tmp_path / 'x.zip.part').write_bytes(CONTENT)
    fetch(f'{server.url}/x.zip', tmp_path / 'x.zip', SHA256, size)
    assert [path.name for path in tmp_path.iterdir()] == ['x.zip']
    assert len(server.asked) == requests


def test_a_part_of_the_wrong_place(server, tmp_path):
    (tmp_path / 'x.zip.part').write_bytes(CONTENT[:60_000])
    server.shift = 10
    assert '60,010' in message(f'{server.url}/x.zip', tmp_path / 'x.zip', SHA256)
    assert (tmp_path / 'x.zip.part').read_bytes() == CONTENT[:60_000]
    server.shift = -10  # some servers send whole blocks
    fetch(f'{server.url}/x.zip', tmp_path / 'x.zip', SHA256)
    assert (tmp_path / 'x.zip').read_bytes() == CONTENT


@pytest.mark.parametrize('size', [None, len(CONTENT)])
def test_a_part_longer_than_the_file_is_started_over(server, tmp_path, size):
    (tmp_path / 'x.zip.part').write_bytes(bytes(150_000))
    fetch(f'{server.url}/x.zip', tmp_path / 'x.zip', SHA256, size)
    assert (tmp_path / 'x.zip').read_bytes() == CONTENT


def test_a_short_page_in_place_of_the_rest_costs_nothing(server, tmp_path):
    """Such as one for a login, where the size of the file is not published."""
    (tmp_path / 'x.zip.part').write_bytes(CONTENT[:60_000])
    server.files['x.zip'], server.ranges = b'Log in first.', False
    for server.kind, what in (('application/zip', '13 bytes'), ('text/html; charset=utf-8', 'a page')):
        said = message(f'{server.url}/x.zip', tmp_path / 'x.zip', SHA256)
        assert f'gives {what} in place of what the 60,000 bytes in {tmp_path}/x.zip.part lack' in said
        assert (tmp_path / 'x.zip.part').read_bytes() == CONTENT[:60_000]
        server.lengths = False


def test_a_part_longer_than_the_file_of_a_server_without_ranges(server, tmp_path):
    server.ranges = False
    (tmp_path / 'x.zip.part').write_bytes(bytes(150_000))
    fetch(f'{server.url}/x.zip', tmp_path / 'x.zip', SHA256, len(CONTENT))
    assert (tmp_path / 'x.zip').read_bytes() == CONTENT


def test_tries_are_counted_anew_when_something_arrives(server, tmp_path):
    server.breaks = [5_000] * 19  # more than the pauses there are
    fetch(f'{server.url}/x.zip', tmp_path / 'x.zip', SHA256)
    assert (tmp_path / 'x.zip').read_bytes() == CONTENT


def test_a_connection_that_never_brings_more(server, tmp_path):
    server.breaks = [40_000] + [0] * 20
    text = message(f'{server.url}/x.zip', tmp_path / 'x.zip', SHA256)
    assert '40,000 of 100,000 bytes' in text
    assert str(tmp_path) in text
    assert (tmp_path / 'x.zip.part').read_bytes() == CONTENT[:40_000]
    assert len(server.asked) == 1 + len(download.PAUSES)


def test_a_server_that_is_busy_for_a_while(server, tmp_path):
    server.codes = [503, 429]
    fetch(f'{server.url}/x.zip', tmp_path / 'x.zip', SHA256)
    assert (tmp_path / 'x.zip').read_bytes() == CONTENT
    server.codes = [503] * 9
    assert '503 Service Unavailable' in message(f'{server.url}/x.zip', tmp_path / 'y.zip', SHA256)


def test_no_such_file(server, tmp_path):
    text = message(f'{server.url}/y.zip', tmp_path / 'y.zip', SHA256)
    for part in (f'{server.url}/y.zip', '404 Not Found', '--mirror'):
        assert part in text
    assert len(server.asked) == 1
    assert not list(tmp_path.iterdir())


def test_no_server(server, tmp_path):
    with socket.socket() as unused:
        unused.bind(('127.0.0.1', 0))
        text = message(f'http://127.0.0.1:{unused.getsockname()[1]}/x.zip', tmp_path / 'x.zip', SHA256)
    assert 'Connection refused' in text
    assert 'check the connection' in text


def test_a_python_without_certificates(server, tmp_path, monkeypatch):
    """Waiting would not help."""
    tries = []

    def refuse(*_, **__):
        tries.append(1)
        raise URLError(ssl.SSLCertVerificationError(1, 'unable to get local issuer certificate'))

    monkeypatch.setattr(download, 'urlopen', refuse)
    text = message('https://host/x.zip', tmp_path / 'x.zip', SHA256)
    assert 'unable to get local issuer certificate' in text
    assert 'Install Certificates.command' in text
    assert len(tries) == 1


@pytest.mark.parametrize('url', ['http://a..b/x.zip', 'http://', 'http://127.0.0.1:x/x.zip'])
def test_no_address(server, tmp_path, url):
    assert url in message(url, tmp_path / 'x.zip', SHA256)


def test_a_file_of_another_size_is_refused_at_once(server, tmp_path):
    text = message(f'{server.url}/x.zip', tmp_path / 'x.zip', SHA256, 99_999)
    assert '100,000' in text
    assert '99,999' in text
    assert not list(tmp_path.iterdir())


def test_a_wrong_checksum(server, tmp_path):
    server.files['x.zip'] = b'x' + CONTENT[1:]
    text = message(f'{server.url}/x.zip', tmp_path / 'x.zip', SHA256)
    assert str(tmp_path / 'x.zip.part') in text
    assert SHA256.partition(':')[2] in text
    assert not (tmp_path / 'x.zip').exists()


@pytest.mark.parametrize(
    'checksum',  # of 'abc': RFC 1321, section A.5, and FIPS 180-2, appendix B.1
    [
        'md5:900150983cd24fb0d6963f7d28e17f72',
        'sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad',
    ],
)
def test_checksums(tmp_path, checksum):
    (tmp_path / 'x').write_bytes(b'abc')
    verify(tmp_path / 'x', checksum)
    (tmp_path / 'x').write_bytes(b'abd')
    with pytest.raises(UserError, match='remove it'):
        verify(tmp_path / 'x', checksum)
    assert (tmp_path / 'x').read_bytes() == b'abd'


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file can grow beyond `size` bytes: a write stops half-way, as on a full disk."""
    import resource  # Windows has none

    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


@pytest.mark.skipif(sys.platform == 'win32', reason='Windows has no limit on the size of files')
def test_a_full_disk(server, tmp_path):
    with full_disk(65536):
        text = message(f'{server.url}/x.zip', tmp_path / 'x.zip', SHA256)
    assert f'{tmp_path}/x.zip.part could not be written (File too large)' in text
    assert (tmp_path / 'x.zip.part').read_bytes() == CONTENT[:65536]
    fetch(f'{server.url}/x.zip', tmp_path / 'x.zip', SHA256)
    assert (tmp_path / 'x.zip').read_bytes() == CONTENT
    assert server.asked[-1] == ('x.zip', 'bytes=65536-')


def test_a_file_where_the_folder_should_be(server, tmp_path):
    (tmp_path / 'file').write_text('text')
    with pytest.raises(WriteError, match='--dir_data'):
        fetch(f'{server.url}/x.zip', tmp_path / 'file' / 'x.zip', SHA256)
    assert (tmp_path / 'file').read_text() == 'text'
