import math
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from llvmlite import ir

from model.ops.llvm import code as llvm
from model.ops.llvm.code import FLOAT, INT, Code, Kernel, object_file
from tests.model.ops.conftest import x86_alone


@pytest.mark.parametrize(('rows', 'columns'), [(16, 16), (16, 12), (6, 16), (5, 3), (16, 20), (1, 5), (3, 1), (1, 1)])
def test_rows_become_columns(rows: int, columns: int) -> None:
    code = Code(('x', 'out'), 8)
    vectors = [code.load(code.at(code.pointer('x'), INT(i * columns)), columns) for i in range(rows)]
    found = code.transposed(vectors)
    for i, vector in enumerate(found):
        code.store(vector, code.at(code.pointer('out'), INT(i * rows)))
    code.to.ret_void()
    x, out = torch.arange(rows * columns, dtype=torch.float32).view(rows, columns), torch.zeros(columns, rows)
    Kernel(object_file(code))([x, out], 1, 0.0)
    assert len(found) == columns
    assert out.tolist() == x.mT.tolist()


@pytest.fixture(params=['team', 'pool'])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Three threads: OpenMP's, or those that take their place."""
    if request.param == 'pool':
        monkeypatch.setattr(llvm, 'openmp', lambda: None)
    else:
        assert llvm.openmp() or sys.platform != 'linux'
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.skipif(sys.platform != 'linux', reason='by the folders of its packages')
def test_the_openmp_of_pytorch_is_found_where_its_packages_for_arm_have_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    maps = [line.split(maxsplit=5)[-1] for line in Path('/proc/self/maps').read_text().splitlines()]
    loaded = next(place for place in maps if '/torch' in place and Path(place).name.startswith('libgomp'))
    link = tmp_path / 'torch.libs' / 'libgomp-1a2b3c.so.1.0.0'
    link.parent.mkdir()
    link.symlink_to(loaded)
    monkeypatch.setattr(torch, '__file__', str(tmp_path / 'torch' / '__init__.py'))
    found = llvm.openmp.__wrapped__()
    assert found._name == str(link)


@pytest.mark.parametrize('count', [200, 2, 0])
def test_each_thread_has_memory_of_its_own(count: int, threads: None) -> None:
    """A task fills it with its number times the factor, and adds up what it finds there, once."""
    width, vectors = 8, 1000
    code = Code(('out',), width)
    to = code.to

    def work(task: ir.Value) -> None:
        own = code.spread(to.fmul(to.sitofp(task, FLOAT), code.factor))

        def write(i: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
            code.store(own, code.at(code.memory, to.mul(i, INT(width))))
            return []

        def add(i: ir.Value, found: list[ir.Value]) -> list[ir.Value]:
            return [to.fadd(found[0], code.load(code.at(code.memory, to.mul(i, INT(width))), width))]

        code.loop(INT(0), INT(vectors), 1, write)
        (total,) = code.loop(INT(0), INT(vectors), 1, add, [code.vector(0)])
        place = code.at(code.pointer('out'), to.mul(task, INT(width)))
        code.store(to.fadd(code.load(place, width), total), place)

    code.tasks(INT(count), work)
    out = torch.zeros(count, width)
    Kernel(object_file(code))([out], vectors * width, 0.5)
    assert out.tolist() == [[0.5 * task * vectors] * width for task in range(count)]


@x86_alone
def test_subnormals_are_zeros_in_a_kernel_and_nowhere_else(threads: None) -> None:
    """Its memory may hold what was an integer before, and with such numbers it would take many times as long."""
    count, width = 2**16, 8
    code = Code(('x', 'out'), width)

    def work(task: ir.Value) -> None:
        x, out = (code.at(code.pointer(name), code.to.mul(task, INT(width))) for name in ('x', 'out'))
        code.store(code.to.fmul(code.load(x, width), code.spread(code.factor)), out)

    code.tasks(INT(count // width), work)
    kernel, least = Kernel(object_file(code)), 2**23  # bits of 2^-126, the least normal number
    subnormal, normal = (
        torch.full((count,), bits, dtype=torch.int32).view(torch.float32) for bits in (least // 2, least)
    )
    for x, factor, expected in (
        (subnormal, 4.0, 0),
        (normal, 0.5, 0),
        (normal, 2.0, 2 * least),
        (normal, -1.0, least - 2**31),
    ):
        out = torch.ones(count)
        kernel([x, out], 1, factor)
        assert out.view(torch.int32).unique().tolist() == [expected]

    def bits_of_half() -> list[int]:
        return (normal * 0.5).view(torch.int32).unique().tolist()

    others = llvm.pool(3)
    for halves in (bits_of_half(), *[work.result() for work in [others.submit(bits_of_half) for _ in range(12)]]):
        assert halves == [least // 2]  # by the threads that ran the kernel


@pytest.mark.parametrize('thread', [0, 1, 2])
def test_a_thread_does_also_what_is_left_of_others(thread: int) -> None:
    """It begins with its own: of ten tasks in three threads that are three or four that follow one another."""
    code = Code(('out', 'done'), 8)

    def work(task: ir.Value) -> None:
        place = code.pointer('done', INT)
        order = code.to.load(place)
        code.to.store(task, code.at(code.pointer('out', INT), order))
        code.to.store(code.to.add(order, INT(1)), place)

    code.tasks(INT(10), work)
    out, done, counters = (torch.zeros(count, dtype=torch.int64) for count in (10, 1, 24))
    given = torch.tensor([out.data_ptr(), done.data_ptr()])
    kernel = Kernel(object_file(code))
    kernel._run(given.data_ptr(), 0, 0.0, counters.data_ptr(), thread, 3)
    shares = [range(3), range(3, 6), range(6, 10)]
    assert out.tolist() == [task for share in (*shares[thread:], *shares[:thread]) for task in share]


def test_kernels_that_need_no_memory(threads: None) -> None:
    code = Code(('out',), 8)

    def work(task: ir.Value) -> None:
        code.to.store(code.factor, code.at(code.pointer('out'), task))

    code.tasks(INT(50), work)
    out = torch.zeros(50)
    Kernel(object_file(code))([out], 0, 0.5)
    assert out.tolist() == [0.5] * 50


@pytest.mark.parametrize('instructions', ['any', 'AVX2'])
@pytest.mark.parametrize('lanes', [8, 16])
def test_powers_of_2(lanes: int, instructions: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if instructions == 'AVX2':
        monkeypatch.setattr(llvm, 'has', lambda feature: False)
    special = [math.inf, -math.inf, math.nan, 0.0, 127.0, 127.5, 128.0, -125.9, -126.0, -126.5, -150.0, 1e30, -1e30]
    given = torch.cat((torch.tensor(special), torch.arange(-252, 256) / 2, torch.linspace(-1, 1, 31)))
    x = torch.cat((given, torch.zeros(-len(given) % lanes)))
    code = Code(('x', 'out'), lanes)

    def power(i: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
        vector = code.exp2(code.load(code.at(code.pointer('x'), i), lanes))
        code.store(vector, code.at(code.pointer('out'), i))
        return []

    code.loop(INT(0), INT(len(x)), lanes, power)
    code.to.ret_void()
    out = torch.empty_like(x)
    Kernel(object_file(code))([x, out], 0, 0.0)
    truth = x.double().exp2()
    assert out.isnan().equal(x.isnan())
    assert (out[x >= 128] == math.inf).all()
    assert (out[x < -126] <= 2.0**-126).all()
    usual = (x >= -125.9) & (x < 127.4)
    torch.testing.assert_close(out[usual].double(), truth[usual], rtol=2**-22, atol=0)
