import pytest
import torch
from torch import Tensor

from model.ops.llvm.code import INT, Code, Kernel, object_file
from model.ops.llvm.product import BLOCKS, packed, product
from tests.conftest import numbers


def add_product(sums: Tensor, rows: Tensor, columns: Tensor, lanes: int) -> None:
    """Add rows (R, K) times columns (K, V * lanes) to `sums`, by a kernel."""
    count, width = columns.shape
    code = Code(('sums', 'rows', 'columns', 'count', 'width'), lanes)
    count_given, width_given = code.given['count'], code.given['width']

    def write(_: object) -> None:
        row_starts = [code.at(code.pointer('rows'), code.offset((count_given, INT(r)))) for r in range(len(rows))]
        column_starts = [code.at(code.pointer('columns'), INT(v)) for v in range(0, width, lanes)]
        places = [code.at(code.pointer('sums'), INT(i)) for i in range(0, sums.numel(), lanes)]
        before = [code.load(place, lanes) for place in places]
        found = product(code, row_starts, column_starts, width_given, count_given, before)
        for vector, place in zip(found, places, strict=True):
            code.store(vector, place)

    code.tasks(INT(1), write)
    Kernel(object_file(code))([sums, rows, columns, count, width], 1, 0.0)


@pytest.mark.parametrize('lanes', BLOCKS)
@pytest.mark.parametrize('count', [0, 1, 61])
def test_equals_the_product_in_float64(lanes: int, count: int) -> None:
    n_rows, vectors = BLOCKS[lanes]
    rows, columns, sums = numbers(n_rows, count), numbers(count, vectors * lanes), numbers(n_rows, vectors * lanes)
    found = sums.float()
    add_product(found, rows.float(), columns.float(), lanes)
    torch.testing.assert_close(found.double(), sums + rows @ columns, rtol=0, atol=1e-5)


def test_rows_may_be_columns_of_a_matrix() -> None:
    code = Code(('left', 'right', 'out'), 8)
    rows, columns = [code.at(code.pointer('left'), INT(i)) for i in range(3)], [code.pointer('right')]
    for i, x in enumerate(product(code, rows, columns, INT(8), INT(5), [code.vector(0)] * 3, INT(3))):
        code.store(x, code.at(code.pointer('out'), INT(8 * i)))
    code.to.ret_void()
    left, right, out = numbers(5, 3), numbers(5, 8), torch.zeros(3, 8)
    Kernel(object_file(code))([left.float(), right.float(), out], 1, 0.0)
    torch.testing.assert_close(out.double(), left.mT @ right, rtol=0, atol=1e-5)


@pytest.mark.parametrize(('rows', 'vectors'), [(1, 1), (5, 3)])
def test_other_shapes(rows: int, vectors: int) -> None:
    left, right = numbers(rows, 7), numbers(7, 8 * vectors)
    found = torch.zeros(rows, 8 * vectors)
    add_product(found, left.float(), right.float(), 8)
    torch.testing.assert_close(found.double(), left @ right, rtol=0, atol=1e-5)


def test_packed_layers_have_their_bias_first_and_zeros_last() -> None:
    weight, bias = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), torch.tensor([7.0, 8.0, 9.0])
    by_vector = [[[7.0, 8.0], [1.0, 3.0], [2.0, 4.0]], [[9.0, 0.0], [5.0, 0.0], [6.0, 0.0]]]
    assert packed(weight, bias, 2).tolist() == by_vector
    assert packed(weight, None, 2)[:, 0].tolist() == [[0.0, 0.0], [0.0, 0.0]]
