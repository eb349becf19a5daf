import sys
from collections.abc import Iterator

import pytest
import torch
from llvmlite import ir

from model.ops.llvm import code as llvm
from model.ops.llvm.code import FLOAT, INT, Code, Kernel, object_file


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


def test_each_thread_has_memory_of_its_own(threads: None) -> None:
    """A task fills it with its number times the factor, and adds up what it finds there."""
    count, width, vectors = 200, 8, 1000
    code = Code(('counter', 'out'), width)
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
        code.store(total, code.at(code.pointer('out'), to.mul(task, INT(width))))

    code.tasks(code.pointer('counter', INT), INT(count), work)
    counter, out = torch.zeros(1, dtype=torch.int64), torch.zeros(count, width)
    Kernel(object_file(code))([counter, out], vectors * width, 0.5)
    assert out.tolist() == [[0.5 * task * vectors] * width for task in range(count)]
    assert counter.item() == count + 3
