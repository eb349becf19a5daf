import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from measure.speed import by_kind, clocked
from model.ops import fast
from model.ops import small_products as module
from model.ops.llvm import small_products as small_products_llvm
from model.ops.small_products import small_products
from tests.conftest import numbers
from tests.model.ops.conftest import Call

KERNELS = (small_products_llvm,)
CALLED = ((small_products_llvm, 'products'),)
CLOSE = 1e-5  # of the largest value
SIZES = {  # matrices, rows, numbers between the two, columns
    'a map of ASID and its values': (7, 64, 64, 36),
    'channels with channels': (5, 36, 64, 36),
    'odd': (3, 13, 33, 17),
    'fewer than a vector': (4, 5, 3, 2),
    'one number': (2, 1, 1, 1),
    'one row': (2, 1, 40, 24),
    'none': (0, 8, 8, 8),
}


def operands(count: int, rows: int, between: int, columns: int) -> tuple[Tensor, Tensor]:
    return numbers(count, rows, between, seed=1), numbers(count, between, columns, seed=2)


def plain(x: Tensor, y: Tensor) -> Tensor:
    """From the definition."""
    return (x.unsqueeze(3) * y.unsqueeze(1)).sum(2)


def results(function: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor, grad: Tensor) -> list[Tensor]:
    """What a function gives, and its gradients."""
    leaves = [t.detach().requires_grad_() for t in (x, y)]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


def check(x: Tensor, y: Tensor) -> None:
    grad = numbers(len(x), x.shape[1], y.shape[2], seed=3)
    for found, truth in zip(
        results(small_products, x.float(), y.float(), grad), results(plain, x, y, grad), strict=True
    ):
        assert found.dtype == torch.float32
        close = CLOSE * float(truth.abs().max()) if truth.numel() else 0
        torch.testing.assert_close(found.double(), truth, rtol=0, atol=close)


@pytest.mark.parametrize('size', SIZES)
def test_equals_the_definition(size: str, lanes: int, calls: list[Call]) -> None:
    x, y = operands(*SIZES[size])
    check(x, y)
    assert len(calls) == 3  # two of them for the gradients


def test_matrices_in_any_memory(lanes: int, calls: list[Call]) -> None:
    x, y = operands(3, 13, 33, 17)
    turned = [t.mT.contiguous().mT for t in (x, y)]
    check(turned[0], y)
    check(x, turned[1])
    check(x, y.flip(2).permute(2, 0, 1).contiguous().permute(1, 2, 0))  # numbers of neither rows nor columns together
    check(x[:, :, :5], y[:, 7:12])
    check(x[:, ::2], y[..., ::2])
    check(x[:1].expand(3, -1, -1), y)
    assert len(calls) == 18


def test_results_repeat_themselves(lanes: int) -> None:
    """To the bit: in another call, with other threads, and of a pair by itself."""
    x, y = (t.float() for t in operands(9, 30, 50, 20))
    first, threads = small_products(x, y), torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(small_products(x, y), first)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(small_products(x[3:4], y[3:4]), first[3:4])


def test_other_calls_take_the_plain_form(calls: list[Call], monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = operands(2, 10, 12, 14)
    torch.testing.assert_close(small_products(x, y), plain(x, y))
    with torch.autocast('cpu', torch.bfloat16):
        assert small_products(x.float(), y.float()).dtype == torch.bfloat16
    for target, name, value in ((fast, 'wanted', False), (module, 'MOST', 13)):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, value)
            check(x, y)
    assert not calls
    check(x, y)
    assert calls


def test_sizes_that_do_not_fit_are_refused() -> None:
    x, y = (t.float() for t in operands(2, 10, 12, 14))
    for wrong in (y[:, :11], y[:1], y[0]):
        with pytest.raises(RuntimeError, match='batch2'):
            small_products(x, wrong)


def test_a_kernel_that_fails_is_left_out(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def fails(*arguments: object) -> None:
        raise RuntimeError('no such processor')

    monkeypatch.setattr(small_products_llvm, 'kernel', fails)
    monkeypatch.setattr(fast, 'failed', set())
    with caplog.at_level(logging.WARNING, 'frugalsr'):
        check(*operands(2, 10, 12, 14))
    assert caplog.messages == ['The small products runs without llvmlite, slower: RuntimeError: no such processor']


def test_its_time_is_told_by_name() -> None:
    x, y = (t.float() for t in operands(2, 10, 12, 14))
    assert 'frugalsr::small_matmul' in clocked(lambda: small_products(x, y))
    assert by_kind(lambda: small_products(x, y), 'cpu')['matrix product'] > 0
