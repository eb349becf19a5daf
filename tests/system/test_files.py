"""Files written whole or not at all, whatever goes wrong in between."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from error import WriteError
from system import files, memory
from system.files import folded, is_there, read_torch, sweep, write_atomic
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


@pytest.fixture
def refusing(monkeypatch) -> list[str]:
    """Names of files that no file can be renamed to, once for each time that one is in here."""
    names: list[str] = []
    replace = Path.replace

    def refuse(path, target):
        if target.name in names:
            names.remove(target.name)
            raise PermissionError(13, 'Permission denied')
        return replace(path, target)

    monkeypatch.setattr(Path, 'replace', refuse)
    monkeypatch.setattr(files, 'REFUSED', ())
    return names


def test_the_old_file_comes_back_if_the_new_one_cannot_take_its_place(tmp_path, refusing):
    (tmp_path / 'x').write_bytes(b'old')
    refusing.append('x')
    with pytest.raises(WriteError, match='what was there before is unchanged'):
        write_atomic(tmp_path / 'x', b'new', tmp_path / 'before')
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {'x': b'old'}


def test_a_name_that_another_program_holds_for_a_while_is_waited_for(tmp_path, monkeypatch, refusing):
    """As on Windows."""
    monkeypatch.setattr(files, 'REFUSED', (0, 0))
    (tmp_path / 'x').write_bytes(b'old')
    refusing += ['x', 'x', 'before', 'before']
    write_atomic(tmp_path / 'x', b'new', tmp_path / 'before')
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {'x': b'new', 'before': b'old'}
    refusing += ['x'] * 3
    with pytest.raises(WriteError, match='Permission denied'):
        write_atomic(tmp_path / 'x', b'newer')
    assert (tmp_path / 'x').read_bytes() == b'new'


@pytest.mark.parametrize(('one', 'other'), [('É.png', 'e\u0301.PNG'), ('IMG_1', 'img_1')])
def test_names_that_some_file_systems_take_for_one(one, other):
    assert folded(one) == folded(other) != folded(one + '_')


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


@pytest.mark.parametrize('bytes_of_a_letter', ['a', 'ä', '漢'])
def test_a_name_may_be_as_long_as_the_file_system_allows(tmp_path, bytes_of_a_letter):
    longest = os.pathconf(tmp_path, 'PC_NAME_MAX')
    count = longest // len(bytes_of_a_letter.encode())
    path = tmp_path / (bytes_of_a_letter * count)
    write_atomic(path, b'content')
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {path.name: b'content'}
    with pytest.raises(WriteError, match='name too long'):
        write_atomic(tmp_path / (bytes_of_a_letter * (count + 1)), b'content')
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_no_file_has_a_name_that_is_too_long(tmp_path):
    (tmp_path / 'a').touch()
    (tmp_path / 'link').symlink_to('nowhere')
    assert [is_there(tmp_path / name) for name in ('a', 'link', 'b', 'a' * 999, 'a/b')] == [True, True, *3 * [False]]


WRITES_SLOWLY = """
import sys
from pathlib import Path
from system.files import write_atomic

def pieces():
    yield b'begun'
    print('begun', flush=True)
    sys.stdin.read()

write_atomic(Path(sys.argv[1]), pieces())
"""


def start_writing(path: Path) -> subprocess.Popen:
    """A process that has begun a file and ends it when its input is closed."""
    environment = {**os.environ, 'PYTHONPATH': str(ROOT / 'src')}
    command = [sys.executable, '-c', WRITES_SLOWLY, str(path)]
    process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == 'begun\n'
    return process


def test_what_a_killed_process_left_aside_is_deleted_and_nothing_else(tmp_path):
    killed, alive = start_writing(tmp_path / 'killed'), start_writing(tmp_path / 'alive')
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    others = ['.hidden.tmp', 'a.tmp', '.frugalsr-1.txt', 'alive.part']
    for name in others:
        (tmp_path / name).write_bytes(b'of someone else')
    assert len(list(tmp_path.iterdir())) == len(others) + 2
    sweep(tmp_path)
    assert len(list(tmp_path.iterdir())) == len(others) + 1
    alive.communicate()
    assert alive.returncode == 0
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([*others, 'alive'])
    assert (tmp_path / 'alive').read_bytes() == b'begun'
    sweep(tmp_path / 'no such folder')


@pytest.mark.skipif(sys.platform != 'linux', reason='by the figures of Linux')
@pytest.mark.parametrize(
    ('zipped', 'name', 'most'), [(True, 'a.pt', 8), (False, 'a.pt', 100), (True, 'a.safetensors', 100)]
)
def test_tensors_stay_in_a_file_that_is_mapped(tmp_path, zipped, name, most):
    """Of 64 MB nothing is in memory; in files that cannot be mapped they are read."""
    state = {'a': torch.arange(2**24, dtype=torch.float32)}
    torch.save(state, tmp_path / name, _use_new_zipfile_serialization=zipped)
    before = memory.in_use('cpu')
    found = read_torch(tmp_path / name, mapped=True)
    assert memory.in_use('cpu') - before < most * 2**20
    assert torch.equal(found['a'], state['a'])
