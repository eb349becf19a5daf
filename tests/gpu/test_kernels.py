"""DLGSANet's dynamic convolution by its kernels, and networks through torch.compile."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.ops import dynamic_conv, fast
from model.ops.triton import dynamic_conv as kernels
from tests.gpu import programs
from tests.gpu.parts import CUDA, DEVICE, background, chosen, free_memory, note

# batch, channels, groups, kernel, height, width
TINY = [(1, 6, 1, 7, 3, 5), (2, 4, 2, 3, 4, 7), (1, 1, 1, 7, 1, 1), (2, 4, 2, 1, 3, 2), (1, 33, 1, 3, 5, 8)]
LARGE = [(1, 90, 15, 7, 48, 48), (3, 48, 8, 9, 33, 47), (1, 60, 10, 5, 1, 257), (4, 6, 6, 11, 19, 2)]
LARGE += [(2, 48, 8, 7, 65, 130)]
SHAPES = TINY + (LARGE if CUDA else [])
CASES = [(shape, torch.float32) for shape in SHAPES]
# Each kernel is compiled anew for other sizes of kernels and groups, and for other types.
CASES += [(SHAPES[i], torch.float64) for i in (0, 4)] + [(SHAPES[i], torch.bfloat16) for i in (-1 if CUDA else 0, 1)]
CASES += [(SHAPES[i], torch.float16) for i in (0, 4)]


def operands(n: int, c: int, g: int, k: int, h: int, w: int, dtype: torch.dtype) -> list[Tensor]:
    """Gradient, input and kernels, on the CPU."""
    draw = torch.Generator().manual_seed(1)
    shapes = (n, c, h, w), (n, c, h, w), (n, g, k, k, h, w)
    return [torch.randn(shape, dtype=torch.float64, generator=draw).to(dtype) for shape in shapes]


def expected(grad: Tensor, x: Tensor, weights: Tensor) -> list[Tensor]:
    """Result and gradients in float64, by `unfold` and PyTorch's own differentiation."""
    grad, x, weights = (t.detach().double() for t in (grad, x, weights))
    x.requires_grad_(), weights.requires_grad_()
    (n, c, h, w), (g, k) = x.shape, weights.shape[1:3]
    patches = F.unfold(x, k, padding=k // 2).view(n, g, c // g, k * k, h, w)
    out = (patches * weights.flatten(2, 3).unsqueeze(2)).sum(3).flatten(1, 2)
    return [out.detach(), *torch.autograd.grad(out, (x, weights), grad)]


def assert_equal(found: list[Tensor], truth: list[Tensor], dtype: torch.dtype) -> float:
    """To a unit in the last place of its type, and what sums in float32 leave where terms cancel."""
    worst = 0.0
    for value, true in zip(found, truth, strict=True):
        assert value.dtype == dtype
        assert value.shape == true.shape
        error = (value.cpu().double() - true.cpu()).abs()
        left = 1e-11 if dtype == torch.float64 else 3e-5
        assert (error <= true.cpu().abs() * torch.finfo(dtype).eps + left).all()
        worst = max(worst, error.max().item())
    return worst


@pytest.fixture
def by_the_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The public function takes the kernels, also in a rehearsal, and never gives them up for the plain form."""
    for module in (dynamic_conv, fast):
        monkeypatch.setattr(module, 'is_for_triton', lambda x: True)
    monkeypatch.setattr(fast, 'failed', set())
    calls = []
    launch = kernels.launch
    monkeypatch.setattr(kernels, 'launch', lambda *args, **options: (calls.append(1), launch(*args, **options)))
    yield
    assert calls
    assert not fast.failed


@pytest.mark.parametrize(('shape', 'dtype'), CASES, ids=str)
def test_kernels_equal_unfold(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensors = operands(*shape, dtype)
    grad, x, weights = (t.to(DEVICE) for t in tensors)
    found = [kernels.forward(x, weights), *kernels.backward(grad, x, weights)]
    note('kernels', shape=str(shape), type=str(dtype), worst=assert_equal(found, expected(*tensors), dtype))


def layouts(t: Tensor) -> dict[str, Tensor]:
    """The same values in other orders in memory."""
    wide = torch.zeros(*t.shape[:-1], 2 * t.shape[-1], dtype=t.dtype, device=t.device)
    wide[..., ::2] = t
    return {
        'transposed': t.transpose(-1, -2).contiguous().transpose(-1, -2),
        'strided': wide[..., ::2],
        'channels_last': t.movedim(1, -1).contiguous().movedim(-1, 1),
    }


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize('layout', ['transposed', 'strided', 'channels_last'])
def test_any_layout_with_gradients(by_the_kernels: None, layout: str, dtype: torch.dtype) -> None:
    tensors = operands(2, 12, 2, 5, 9, 7, dtype)
    grad, x, weights = (layouts(t.to(DEVICE))[layout] for t in tensors)
    assert not x.is_contiguous()
    x.requires_grad_(), weights.requires_grad_()
    out = dynamic_conv.dynamic_conv(x, weights)
    found = [out.detach(), *torch.autograd.grad(out, (x, weights), grad)]
    assert_equal(found, expected(*tensors), dtype)


@pytest.mark.only_gpu
def test_places_beyond_32_bits() -> None:
    """Kernels of more than 2**31 values: the last group of the last rows, beside the slow form of a crop."""
    free_memory()
    c, g, k, side, rows = 90, 15, 7, 1720, 40
    assert g * k**2 * side**2 > 2**31
    x = torch.randn(1, c, side, side, device=DEVICE, dtype=torch.bfloat16)
    weights = torch.randn(1, g, k, k, side, side, device=DEVICE, dtype=torch.bfloat16)
    cut = slice(-rows - k // 2, None)  # the rows that the last ones are made of
    found = kernels.forward(x, weights)[:, -c // g :, cut]
    truth = expected(found, x[:, -c // g :, cut], weights[:, -1:, ..., cut, :])[0]
    assert_equal([found[..., -rows:, :]], [truth[..., -rows:, :]], torch.bfloat16)


@pytest.mark.only_gpu
def test_kernels_repeat_their_bits() -> None:
    grad, x, weights = (t.to(DEVICE) for t in operands(2, 48, 8, 7, 65, 130, torch.float32))
    first, second = ([kernels.forward(x, weights), *kernels.backward(grad, x, weights)] for _ in range(2))
    assert all(map(torch.equal, first, second))


def compiles(name: str) -> Any:
    return pytest.param(name, marks=background(programs.compiled, name), id=name)


@pytest.mark.parametrize('name', [compiles(name) for name in chosen(['DLGSANet-tiny', 'ASID'])])
def test_torch_compile_gives_the_same(name: str, result: dict[str, Any]) -> None:
    note('compile', network=name, **result)
    assert result['graphs'] > 0
    assert result['output'] < 1e-4
    assert result['gradients'] < 1e-3
