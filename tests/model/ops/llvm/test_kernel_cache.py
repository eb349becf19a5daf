"""Processes are played by functions that are decorated anew, and so have nothing in memory, but for one test."""

import ast
import inspect
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

import llvmlite
import llvmlite.binding as llvm
import pytest
import torch

from model.ops.llvm import code as llvm_code
from model.ops.llvm import fused_linear, kernel_cache
from model.ops.llvm.code import Code, Kernel
from model.ops.llvm.kernel_cache import compiled, digest_of, find_folder
from tests.conftest import ROOT
from tests.test_imports import find_imports, find_modules, is_within

WIDTH = 8
posix = pytest.mark.skipif(sys.platform == 'win32', reason='users and modes of POSIX')


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where kernels are kept during a test."""
    monkeypatch.setenv('FRUGALSR_CACHE', str(tmp_path / 'cache'))
    return tmp_path / 'cache/kernels'


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is done to make kernels."""
    found = []
    emit_object = llvm.TargetMachine.emit_object

    def emit(*arguments: object) -> bytes:
        found.append('compiled')
        return emit_object(*arguments)

    monkeypatch.setattr(llvm.TargetMachine, 'emit_object', emit)
    return found


@pytest.fixture(autouse=True)
def silence(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Whatever happens to files is nothing that a user has to know."""
    with caplog.at_level(logging.DEBUG, 'frugalsr'):
        yield
    assert [record for record in caplog.records if record.levelno > logging.DEBUG] == []


def process(calls: list[str]) -> Callable[[float], Kernel]:
    """As a process begins: a maker of kernels that multiply eight numbers."""

    def write(factor: float) -> Code:
        calls.append('written')
        code = Code(('x', 'out'), WIDTH)
        x = code.load(code.pointer('x'), WIDTH)
        code.store(code.to.fmul(x, code.vector(factor)), code.pointer('out'))
        code.to.ret_void()
        return code

    return compiled(write)


def check(kernel: Kernel, factor: float) -> None:
    x, out = torch.arange(WIDTH, dtype=torch.float32), torch.zeros(WIDTH)
    kernel([x, out], 1, 0.0)
    assert out.tolist() == [i * factor for i in range(WIDTH)]


def files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.exists() else []


PROGRAM = """
import sys, torch, llvmlite.binding as llvm
from llvmlite import ir
from model.ops.llvm.fused_linear import forward

def refuse(*arguments):
    raise RuntimeError('not from the folder')

llvm.TargetMachine.emit_object = ir.IRBuilder.__init__ = refuse
*given, out = torch.load(sys.argv[1])
assert torch.equal(forward(*given), out)
"""


@pytest.mark.usefixtures('folder')
def test_a_second_process_writes_and_compiles_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And finds the same to the bit."""
    monkeypatch.setattr(fused_linear, 'kernel', compiled(inspect.unwrap(fused_linear.kernel)))
    given = torch.randn(5, 7), [torch.randn(13, 7)], [torch.randn(13)], [], [], 0.0, None, True, None, 1.0, None, []
    torch.save([*given, fused_linear.forward(*given)], tmp_path / 'given.pt')
    environment = {**os.environ, 'PYTHONPATH': str(ROOT / 'src')}
    subprocess.run([sys.executable, '-c', PROGRAM, tmp_path / 'given.pt'], env=environment, check=True)


def test_each_kernel_is_kept_and_loaded_once(folder: Path, calls: list[str]) -> None:
    for made in (['written', 'compiled'] * 2, []):
        calls.clear()
        kernel = process(calls)
        for factor in (3, 5, 3, 5):
            check(kernel(factor), factor)
        assert calls == made
        assert kernel(3) is kernel(3)
    assert len(files(folder)) == 2


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def changed(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def empty(content: bytes) -> bytes:
    return b''


@pytest.mark.parametrize('damage', [cut, changed, empty])
def test_a_damaged_file_is_made_again(damage: Callable[[bytes], bytes], folder: Path, calls: list[str]) -> None:
    process(calls)(3)
    (path,) = files(folder)
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    check(process(calls)(3), 3)
    assert calls == ['written', 'compiled'] * 2
    assert files(folder) == [path]
    assert path.read_bytes() == whole


def test_a_file_under_the_name_of_another_is_made_again(folder: Path, calls: list[str]) -> None:
    process(calls)(3)
    (path,) = files(folder)
    content = path.read_bytes()
    path.unlink()
    process(calls)(5)
    (other,) = files(folder)
    other.write_bytes(content)
    check(process(calls)(5), 5)


@posix
def test_nobody_else_may_write(folder: Path, calls: list[str]) -> None:
    """Whatever the umask is."""
    before = os.umask(0)
    try:
        process(calls)(3)
    finally:
        os.umask(before)
    (path,) = files(folder)
    assert (folder.stat().st_mode & 0o777, path.stat().st_mode & 0o777) == (0o700, 0o600)


@posix
@pytest.mark.parametrize('mode', [0o620, 0o602])
def test_a_file_that_others_may_write_to_is_made_again(mode: int, folder: Path, calls: list[str]) -> None:
    process(calls)(3)
    (path,) = files(folder)
    path.chmod(mode)
    check(process(calls)(3), 3)
    assert calls == ['written', 'compiled'] * 2
    assert path.stat().st_mode & 0o777 == 0o600


@posix
@pytest.mark.parametrize('mode', [0o720, 0o702])
def test_a_folder_that_others_may_write_to_is_left_alone(mode: int, folder: Path, calls: list[str]) -> None:
    process(calls)(3)
    folder.chmod(mode)
    check(process(calls)(3), 3)
    check(process(calls)(5), 5)
    assert calls == ['written', 'compiled'] * 3
    assert len(files(folder)) == 1


@posix
def test_what_belongs_to_another_user_is_left_alone(
    folder: Path, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    process(calls)(3)
    me = os.geteuid()
    monkeypatch.setattr(os, 'geteuid', lambda: me + 1)
    check(process(calls)(3), 3)
    check(process(calls)(5), 5)
    assert calls == ['written', 'compiled'] * 3
    assert len(files(folder)) == 1


@pytest.mark.parametrize(
    ('owner', 'name', 'value'),
    [
        (kernel_cache, 'SOURCES', 'others'),
        (kernel_cache, 'host', lambda: ('another', llvm_code.host()[1])),
        (kernel_cache, 'host', lambda: (llvm_code.host()[0], '+one,-two')),
        (kernel_cache, 'openmp', lambda: not llvm_code.openmp()),
        (llvmlite, '__version__', '0.0.1'),
        (llvm, 'llvm_version_info', (1, 2, 3)),
        (llvm, 'get_process_triple', lambda: 'sparc-sun-solaris'),
    ],
)
def test_in_other_circumstances_there_are_other_kernels(
    owner: object, name: str, value: object, folder: Path, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    process(calls)(3)
    with monkeypatch.context() as patch:
        patch.setattr(kernel_cache, 'object_file', lambda code: calls.append('other') or b'')
        patch.setattr(kernel_cache, 'Kernel', bytes)
        patch.setattr(owner, name, value)
        process(calls)(3)
    check(process(calls)(3), 3)
    assert calls == ['written', 'compiled', 'written', 'other']
    assert len(files(folder)) == 2


def test_functions_do_not_share_kernels(folder: Path, calls: list[str]) -> None:
    def write(factor: float) -> Code:
        return inspect.unwrap(process(calls))(factor + 1)

    for _ in range(2):
        check(process(calls)(3), 3)
        check(compiled(write)(3), 4)
    assert calls == ['written', 'compiled'] * 2


def test_any_change_of_sources_is_seen(tmp_path: Path) -> None:
    def found(**contents: str) -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        for name, content in contents.items():
            path = folder / name.replace('_', '/')
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_suffix('.py').write_text(content)
        (folder / 'a.pyc').write_text(str(time.time()))
        return digest_of(folder)

    first = {'a': 'x = 1', 'b': '', 'llvm_c': 'y = 2'}
    assert found(**first) == found(**first)
    others = [
        {**first, 'a': 'x = 2'}, {**first, 'llvm_c': 'y = 3'}, {**first, 'd': ''}, {'a': 'x = 1', 'llvm_c': 'y = 2'},
        {'a': '', 'b': 'x = 1', 'llvm_c': 'y = 2'}, {'a': 'x = 1', 'b': '', 'c': 'y = 2'},
    ]  # fmt: skip
    assert len({found(**first), *(found(**other) for other in others)}) == 1 + len(others)


def test_kernels_are_written_by_these_sources_alone() -> None:
    """All of this project that their modules import, errors aside, is in the folder whose files are part of the key."""
    modules, found = find_modules(ROOT / 'src'), set()
    to_do = [name for name in modules if is_within(name, ('model.ops.llvm',))]
    while to_do:
        name = to_do.pop()
        if name in modules and name not in found:
            found.add(name)
            for target, _ in find_imports(ast.parse(modules[name].read_text()), name.rpartition('.')[0]):
                to_do += [target, target.rpartition('.')[0]]
    assert {'model.ops.llvm.code', 'model.ops.cached_attention'} < found
    assert [name for name in found if not is_within(name, ('model.ops', 'error'))] == []
    assert digest_of(ROOT / 'src/model/ops') == kernel_cache.SOURCES


def test_off(folder: Path, calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    process(calls)(3)
    monkeypatch.setenv('FRUGALSR_CACHE', 'off')
    assert find_folder() is None
    check(process(calls)(3), 3)
    assert calls == ['written', 'compiled'] * 2


def no_home() -> NoReturn:
    raise RuntimeError('Could not determine home directory.')


@pytest.mark.parametrize(
    ('system', 'variables', 'place'),
    [
        ('linux', {}, '/home/me/.cache/frugalsr/kernels'),
        ('linux', {'XDG_CACHE_HOME': '/caches', 'LOCALAPPDATA': '/local'}, '/caches/frugalsr/kernels'),
        ('linux', {'XDG_CACHE_HOME': 'caches'}, '/home/me/.cache/frugalsr/kernels'),
        ('darwin', {'XDG_CACHE_HOME': '/caches'}, '/home/me/Library/Caches/frugalsr/kernels'),
        ('win32', {'LOCALAPPDATA': '/local'}, '/local/frugalsr/kernels'),
        ('win32', {}, None),
        ('linux', {'FRUGALSR_CACHE': '/here', 'XDG_CACHE_HOME': '/caches'}, '/here/kernels'),
    ],
)
def test_place(system: str, variables: dict[str, str], place: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, 'platform', system)
    monkeypatch.setattr(Path, 'home', lambda: Path('/home/me'))
    for name in ('FRUGALSR_CACHE', 'XDG_CACHE_HOME', 'LOCALAPPDATA'):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert find_folder() == (place and Path(place))


def test_without_a_home_each_process_compiles(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ('FRUGALSR_CACHE', 'XDG_CACHE_HOME', 'LOCALAPPDATA'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, 'home', no_home)
    for _ in range(2):
        check(process(calls)(3), 3)
    assert calls == ['written', 'compiled'] * 2


def test_where_no_folder_can_be_each_process_compiles(folder: Path, calls: list[str]) -> None:
    folder.parent.write_text('a file')
    for _ in range(2):
        check(process(calls)(3), 3)
    assert calls == ['written', 'compiled'] * 2


@posix
def test_a_full_disk(folder: Path, calls: list[str]) -> None:
    """Played by a bound on the size of files; nothing is left over, either."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        for _ in range(2):
            check(process(calls)(3), 3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert calls == ['written', 'compiled'] * 2
    assert files(folder) == []


def test_what_is_not_used_is_removed(folder: Path, calls: list[str]) -> None:
    """After a month; files of others in the folder stay."""
    process(calls)(3)
    process(calls)(5)
    other = folder / 'notes.txt'
    other.touch()
    month = time.time() - 31 * 24 * 60 * 60
    for path in files(folder):
        os.utime(path, (month, month))
    kernel_cache.sweep.cache_clear()
    used = process(calls)
    used(3)
    (path,) = (path for path in files(folder) if path.stat().st_mtime > month + 1)
    used(7)
    left = files(folder)
    assert len(left) == 3
    assert {path, other} < set(left)
    calls.clear()
    process(calls)(3)
    process(calls)(7)
    assert calls == []


def test_many_threads_at_once(folder: Path) -> None:
    """Each as a process, all with the same file."""
    with ThreadPoolExecutor(8) as pool:
        for kernel in pool.map(lambda _: process([])(3), range(24)):
            check(kernel, 3)
    assert len(files(folder)) == 1
