import pytest
import torch

from model.ops.llvm import INT, Code, Kernel


@pytest.mark.parametrize(('rows', 'columns'), [(16, 16), (16, 12), (6, 16), (5, 3), (16, 20), (1, 5), (3, 1), (1, 1)])
def test_rows_become_columns(rows: int, columns: int) -> None:
    code = Code(('x', 'out'), 8)
    vectors = [code.load(code.at(code.pointer('x'), INT(i * columns)), columns) for i in range(rows)]
    found = code.transposed(vectors)
    for i, vector in enumerate(found):
        code.store(vector, code.at(code.pointer('out'), INT(i * rows)))
    code.to.ret_void()
    x, out = torch.arange(rows * columns, dtype=torch.float32).view(rows, columns), torch.zeros(columns, rows)
    Kernel(code)([x, out], 1, 0.0)
    assert len(found) == columns
    assert out.tolist() == x.mT.tolist()
