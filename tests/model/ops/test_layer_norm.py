"""Layer normalisation over few channels: its plain form, and its kernels, compiled on a GPU, else interpreted."""

import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.ops import fast, layer_norm
from tests.conftest import numbers

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
EPS = 1e-5
# Rows and channels: of less than a program, of one that is not full, of several to a program.
SHAPES = [(1, 1), (3, 5), (7, 48), (2, 3, 4, 12), (300, 60), (5, 210)]


def by_kernels(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    from model.ops.triton import layer_norm as layer_norm_triton

    grad, x, weight, bias = (t.to(DEVICE) for t in (grad, x, weight, bias))
    found = layer_norm_triton.forward(x, weight, bias, EPS), *layer_norm_triton.backward(grad, x, weight, EPS)
    return tuple(t.cpu() for t in found)


def plain(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    return layer_norm.forward(x, weight, bias, EPS), *layer_norm.backward(grad, x, weight, EPS)


def expected(*tensors: Tensor) -> tuple[Tensor, ...]:
    """By PyTorch and its differentiation, in float64."""
    grad, *leaves = (t.double() for t in tensors)
    x, weight, bias = (t.requires_grad_() for t in leaves)
    out = F.layer_norm(x, weight.shape, weight, bias, EPS)
    return out.detach(), *torch.autograd.grad(out, (x, weight, bias), grad)


def operands(*shape: int) -> tuple[Tensor, ...]:
    """Gradient, input, weight, bias."""
    return numbers(*shape, seed=1), 3 * numbers(*shape, seed=2) + 1, numbers(shape[-1], seed=3), numbers(shape[-1])


FORMS = [
    plain,
    pytest.param(
        by_kernels, marks=pytest.mark.skipif(sys.platform != 'linux' and DEVICE == 'cpu', reason='Triton is for Linux')
    ),
]


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('shape', SHAPES)
def test_equals_pytorch(form: Callable, shape: tuple[int, ...]) -> None:
    for found, truth in zip(form(*operands(*shape)), expected(*operands(*shape)), strict=True):
        assert found.shape == truth.shape
        assert (found - truth).abs().max() < 1e-11


@pytest.mark.parametrize('form', FORMS)
def test_half_types_are_summed_in_float32(form: Callable) -> None:
    grad, x, weight, bias = operands(100, 24)
    tensors = grad.bfloat16(), x.bfloat16(), weight.float(), bias.float()
    found = form(*tensors)
    assert [t.dtype for t in found] == [torch.bfloat16] * 2 + [torch.float32] * 2
    for value, truth in zip(found, expected(*tensors), strict=True):
        near = torch.finfo(value.dtype).eps * truth.abs() + 1e-5 * truth.abs().max()
        assert ((value.double() - truth).abs() <= near).all()


def test_gradients_of_more_rows_than_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    from model.ops.triton import layer_norm as layer_norm_triton

    monkeypatch.setattr(layer_norm_triton, 'TILE', 16)
    monkeypatch.setattr(layer_norm_triton, 'PROGRAMS', 3)
    for found, truth in zip(by_kernels(*operands(23, 5)), expected(*operands(23, 5)), strict=True):
        assert (found - truth).abs().max() < 1e-12


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors pass for those of a GPU."""
    for module in (layer_norm, fast):
        monkeypatch.setattr(module, 'is_for_triton', lambda x: True)
    monkeypatch.setattr(fast, 'failed', set())


def test_the_door_on_a_gpu(on_gpu: None) -> None:
    """Of maps in any memory, with gradients."""
    grad, x = operands(2, 6, 3, 4)[:2]
    leaves = [t.to(DEVICE) for t in (x.permute(0, 2, 3, 1), numbers(6, seed=3), numbers(6))]
    out = layer_norm.layer_norm(*(t.requires_grad_() for t in leaves), EPS)
    found = out.detach(), *torch.autograd.grad(out, leaves, grad.permute(0, 2, 3, 1).to(DEVICE))
    truth = expected(grad.permute(0, 2, 3, 1), *(t.detach().cpu() for t in leaves))
    for value, other in zip(found, truth, strict=True):
        assert (value.cpu() - other).abs().max() < 1e-11
    assert not fast.failed


def test_if_the_kernel_cannot_be_imported_the_plain_form_is_taken_and_it_is_said_once(
    on_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, 'model.ops.triton.layer_norm', None)
    x, weight, bias = operands(3, 5)[1:]
    for _ in range(2):
        assert torch.equal(layer_norm.layer_norm(x, weight, bias, EPS), F.layer_norm(x, (5,), weight, bias, EPS))
    assert fast.failed == {'triton.layer_norm'}
