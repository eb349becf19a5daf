"""Files written whole or not at all, whatever goes wrong in between."""

import os
import subprocess
import sys
import threading

import pytest

from error import WriteError
from system.files import write_atomic
from tests.conftest import ROOT


def test_a_new_file_and_its_folders(tmp_path):
    path = tmp_path / 'a' / 'b' / 'x.bin'
    write_atomic(path, b'one')
    assert path.read_bytes() == b'one'
    write_atomic(path, memoryview(b'two and more'))
    assert path.read_bytes() == b'two and more'
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize('umask', [0o002, 0o022, 0o077])
def test_the_umask_is_respected(tmp_path, umask):
    old = os.umask(umask)
    try:
        write_atomic(tmp_path / 'x', b'content')
    finally:
        now = os.umask(old)
    assert (tmp_path / 'x').stat().st_mode & 0o777 == 0o666 & ~umask
    assert now == umask


FULL_DISK = """
import resource, sys
from pathlib import Path
from error import WriteError
from system.files import write_atomic

resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    write_atomic(Path(sys.argv[1]), bytes(100_000))
except WriteError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == 'win32', reason='Windows has no limit on the size of files')
@pytest.mark.parametrize('old', [b'the old content', None])
def test_a_full_disk(tmp_path, old):
    """The limit stops the write half-way, as a full disk does."""
    path = tmp_path / 'x.bin'
    if old is not None:
        path.write_bytes(old)
    source = str(ROOT / 'src')
    command = [sys.executable, '-c', FULL_DISK, str(path)]
    ran = subprocess.run(command, env={**os.environ, 'PYTHONPATH': source}, capture_output=True, text=True, check=True)
    assert str(path) in ran.stdout
    assert 'File too large' in ran.stdout
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == ({} if old is None else {'x.bin': old})


def test_a_file_where_the_folder_should_be(tmp_path):
    (tmp_path / 'file').write_text('text')
    with pytest.raises(WriteError) as caught:
        write_atomic(tmp_path / 'file' / 'x.bin', b'content')
    assert str(tmp_path / 'file' / 'x.bin') in str(caught.value)
    assert '\n' not in str(caught.value)
    assert (tmp_path / 'file').read_text() == 'text'


def test_a_folder_where_the_file_should_be(tmp_path):
    (tmp_path / 'x').mkdir()
    with pytest.raises(WriteError, match='could not be written'):
        write_atomic(tmp_path / 'x', b'content')
    assert [path.is_dir() for path in tmp_path.iterdir()] == [True]


def test_ctrl_c_leaves_the_old_file_alone(tmp_path, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    (tmp_path / 'x').write_bytes(b'old')
    monkeypatch.setattr(os, 'fsync', interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / 'x', b'new')
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {'x': b'old'}


def test_a_reader_never_sees_a_part(tmp_path):
    path, contents = tmp_path / 'x', [bytes(500_000), b'1' * 700_000]
    write_atomic(path, contents[0])
    writers = [
        threading.Thread(target=lambda content=content: [write_atomic(path, content) for _ in range(10)])
        for content in contents
    ]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert path.read_bytes() in contents
    assert list(tmp_path.iterdir()) == [path]
