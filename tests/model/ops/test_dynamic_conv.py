"""The dynamic convolution in plain PyTorch, and its choice between this and Triton."""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import model.ops.dynamic_conv
import model.ops.triton
from model.ops.dynamic_conv import (
    backward,
    dynamic_conv,
    dynamic_conv_in_strips,
    fast_backward,
    fast_forward,
    forward,
    is_for_triton,
    taps,
)
from tests.conftest import numbers

# batch, channels, groups, kernel, height, width: several groups, one group, a group a channel, smaller than the kernel.
SHAPES = [
    (2, 6, 3, 7, 9, 11),
    (1, 4, 1, 5, 6, 3),
    (2, 3, 3, 3, 4, 5),
    (2, 4, 2, 7, 2, 3),
    (1, 2, 2, 7, 1, 1),
    (2, 4, 2, 1, 3, 2),
]


def operands(n: int, c: int, g: int, k: int, h: int, w: int) -> tuple[Tensor, Tensor]:
    return numbers(n, c, h, w), numbers(n, g, k, k, h, w, seed=2)


def plain_dynamic_conv(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    n, c, h, w = x.shape
    g, k = weights.shape[1:3]
    out = np.zeros_like(x)
    for image, channel, row, column in product(range(n), range(c), range(h), range(w)):
        for i, j in product(range(k), range(k)):
            y, z = row + i - k // 2, column + j - k // 2
            if 0 <= y < h and 0 <= z < w:
                kernel = weights[image, channel // (c // g), :, :, row, column]
                out[image, channel, row, column] += kernel[i, j] * x[image, channel, y, z]
    return out


@pytest.mark.parametrize('shape', SHAPES)
def test_dynamic_convolution_equals_plain_loops(shape: tuple[int, ...]) -> None:
    x, weights = operands(*shape)
    assert np.abs(dynamic_conv(x, weights).numpy() - plain_dynamic_conv(x.numpy(), weights.numpy())).max() < 1e-13


@pytest.mark.parametrize('shape', [(2, 4, 2, 3, 3, 2), (2, 2, 1, 5, 2, 3), (1, 3, 1, 7, 2, 1), (1, 2, 2, 1, 2, 2)])
def test_dynamic_convolution_has_the_right_gradients(shape: tuple[int, ...]) -> None:
    x, weights = (t.requires_grad_() for t in operands(*shape))
    assert torch.autograd.gradcheck(dynamic_conv, (x, weights))
    assert torch.autograd.gradcheck(dynamic_conv, (x, weights.detach()))
    assert torch.autograd.gradcheck(dynamic_conv, (x.detach(), weights))


def test_dynamic_convolution_keeps_its_operands_only() -> None:
    x, weights = (t.requires_grad_() for t in operands(*SHAPES[0]))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape), lambda t: t):
        dynamic_conv(x, weights)
    assert kept == [x.shape, weights.shape]


@pytest.mark.parametrize('half', [torch.bfloat16, torch.float16])
def test_dynamic_convolution_adds_half_precision_up_in_float32(half: torch.dtype) -> None:
    x, weights = (t.to(half).requires_grad_() for t in operands(2, 6, 3, 7, 9, 11))
    exact = [t.detach().double().requires_grad_() for t in (x, weights)]
    out, expected = dynamic_conv(x, weights), dynamic_conv(*exact)
    seed = numbers(*x.shape, seed=3).to(half)
    out.backward(seed)
    expected.backward(seed.double())
    for found, truth in [(out, expected), (x.grad, exact[0].grad), (weights.grad, exact[1].grad)]:
        assert found.dtype == half
        # Half a unit in the last place, and what float32 leaves where terms cancel.
        assert ((found - truth).abs() <= truth.abs() * torch.finfo(half).eps / 2 + 1e-5).all()


@pytest.mark.parametrize(('dtype', 'tolerance'), [(torch.float64, 1e-13), (torch.float32, 1e-5)])  # apart in PyTorch
@pytest.mark.parametrize('rows', [0.5, 1, 2.9, 4, 99])
@pytest.mark.parametrize('shape', SHAPES)
def test_strips_equal_plain_loops(
    shape: tuple[int, ...], rows: float, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weights = (t.to(dtype) for t in operands(*shape))
    monkeypatch.setattr(model.ops.dynamic_conv, 'STRIP', int(rows * weights[0, ..., 0, :].numel()))
    given = []

    def to_kernels(strip: Tensor) -> Tensor:
        given.append(strip.shape[2])
        return strip

    out = dynamic_conv_in_strips(x, weights.flatten(1, 3), to_kernels, *weights.shape[1:3])
    expected = plain_dynamic_conv(x.double().numpy(), weights.double().numpy())
    assert np.abs(out.double().numpy() - expected).max() < tolerance
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert max(given) == min(max(int(rows), 1), shape[4])


@pytest.mark.parametrize('half', [torch.bfloat16, torch.float16])
def test_strips_add_half_precision_up_in_float32(half: torch.dtype) -> None:
    x, weights = (t.to(half) for t in operands(2, 6, 3, 7, 9, 11))
    found = dynamic_conv_in_strips(x, weights.flatten(1, 3), lambda strip: strip, 3, 7)
    truth = dynamic_conv(x.double(), weights.double())
    assert found.dtype == half
    assert ((found - truth).abs() <= truth.abs() * torch.finfo(half).eps / 2 + 1e-5).all()


@torch.no_grad()
def test_strips_leave_nothing_behind_of_tensors_without_values() -> None:
    def strips(x: Tensor) -> Tensor:
        to_kernels = partial(F.conv2d, weight=torch.arange(18.0).view(9, 2, 1, 1) / 18)
        return dynamic_conv_in_strips(x, x, to_kernels, 1, 3)

    x = numbers(1, 2, 5, 7).float().contiguous(memory_format=torch.channels_last)
    taps.cache_clear()
    expected = strips(x)
    taps.cache_clear()
    with FakeTensorMode():
        strips(torch.empty_strided(x.shape, x.stride()))
    assert torch.equal(strips(x), expected)


def test_multiply_adds_of_the_dynamic_convolution_can_be_counted() -> None:
    class Count(TorchDispatchMode):
        total = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function._schema.name == 'aten::addcmul_':
                self.total += args[0].numel()
            return function(*args, **(kwargs or {}))

    with torch.device('meta'), Count() as count:
        out = dynamic_conv(torch.empty(2, 6, 9, 11), torch.empty(2, 3, 7, 7, 9, 11))
    assert out.shape == (2, 6, 9, 11)
    assert count.total == 49 * out.numel()


# The choice. That the kernels are right is tested in triton/test_dynamic_conv.py.


class Kernels:
    """In place of the kernels: plain forms that note that they were called, or fail."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.calls: list[str] = []

    def _call(self, plain: Callable, *tensors: Tensor) -> Any:
        self.calls.append(plain.__name__)
        assert all(tensor.is_contiguous() for tensor in tensors)
        if self.error:
            raise self.error
        return plain(*tensors)

    def forward(self, *tensors: Tensor) -> Tensor:
        return self._call(forward, *tensors)

    def backward(self, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        return self._call(backward, *tensors)


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors pass for those of a GPU."""
    for module in (model.ops.dynamic_conv, model.ops.fast):
        monkeypatch.setattr(module, 'is_for_triton', lambda x: True)
    monkeypatch.setattr(model.ops.fast, 'failed', set())


@pytest.fixture
def kernels(on_gpu: None, monkeypatch: pytest.MonkeyPatch) -> Kernels:
    kernels = Kernels()
    monkeypatch.setitem(sys.modules, 'model.ops.triton.dynamic_conv', kernels)
    monkeypatch.setattr(model.ops.triton, 'dynamic_conv', kernels, raising=False)
    return kernels


def gradients(function: Callable[[Tensor, Tensor], Tensor], x: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
    """Result, and gradients by those of the inputs that require one."""
    out = function(x, weights)
    wanted = [t for t in (x, weights) if t.requires_grad]
    return out, *torch.autograd.grad(out, wanted, numbers(*out.shape, seed=3).to(out.dtype))


def same(function: Callable[[Tensor, Tensor], Tensor], x: Tensor, weights: Tensor) -> bool:
    """Whether `function` gives what the plain form gives."""
    pairs = zip(gradients(function, x, weights), gradients(PlainConv.apply, x, weights), strict=True)
    return all(torch.equal(*pair) for pair in pairs)


class PlainConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return forward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return backward(grad, *ctx.saved_tensors)


def test_tensors_of_a_cpu_are_not_for_triton() -> None:
    assert not is_for_triton(torch.ones(1))
    with torch.device('meta'):
        assert not is_for_triton(torch.ones(1))


@pytest.mark.parametrize(('first', 'second'), [(True, True), (True, False), (False, True)])
def test_kernels_are_used(kernels: Kernels, first: bool, second: bool) -> None:
    x, weights = operands(*SHAPES[0])
    assert same(dynamic_conv, x.requires_grad_(first), weights.requires_grad_(second))
    assert kernels.calls == ['forward', 'backward']


def test_kernels_get_rows_in_a_row(kernels: Kernels) -> None:
    x, weights = operands(*SHAPES[0])
    x, weights = x.transpose(2, 3).contiguous().transpose(2, 3), weights.flip(0).transpose(4, 5).contiguous().mT
    assert same(dynamic_conv, x.requires_grad_(), weights.requires_grad_())
    assert kernels.calls == ['forward', 'backward']


def test_kernels_under_checkpointing_inference_mode_and_torch_compile(kernels: Kernels) -> None:
    x, weights = (t.requires_grad_() for t in operands(*SHAPES[0]))
    assert same(partial(checkpoint, dynamic_conv, use_reentrant=False), x, weights)
    assert same(torch.compile(dynamic_conv, backend='aot_eager', fullgraph=True), x, weights)
    with torch.inference_mode():
        assert torch.equal(dynamic_conv(x, weights), forward(x, weights))
    assert kernels.calls == ['forward', 'forward', 'backward', 'forward', 'backward', 'forward']


def test_torch_compile_leaves_it_alone_on_a_cpu() -> None:
    x, weights = (t.requires_grad_() for t in operands(*SHAPES[0]))
    found = set()

    def compiler(graph: torch.fx.GraphModule, _: Sequence[Tensor]) -> Callable[..., Any]:
        found.update(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    assert same(torch.compile(dynamic_conv, backend=aot_autograd(fw_compiler=compiler), fullgraph=True), x, weights)
    assert {'frugalsr.dynamic_conv.default', 'frugalsr.dynamic_conv_backward.default'} <= found
    assert not any('addcmul' in target for target in found)


def test_shapes_that_torch_compile_expects(kernels: Kernels) -> None:
    x, weights = (t.float() for t in operands(*SHAPES[0]))
    checks = ('test_schema', 'test_faketensor')
    torch.library.opcheck(fast_forward, (x, weights), test_utils=checks)
    torch.library.opcheck(fast_backward, (torch.ones_like(x), x, weights), test_utils=checks)


def test_without_kernels_that_work_the_plain_form_runs_after_one_warning(
    kernels: Kernels, caplog: pytest.LogCaptureFixture
) -> None:
    kernels.error = RuntimeError('no C compiler')
    x, weights = (t.requires_grad_() for t in operands(*SHAPES[0]))
    assert same(dynamic_conv, x, weights)
    assert same(dynamic_conv, x, weights)
    assert kernels.calls == ['forward']
    (record,) = caplog.records
    assert record.levelname == 'WARNING'
    assert record.getMessage().endswith('RuntimeError: no C compiler')


def test_without_triton_the_plain_form_runs_after_one_warning(
    on_gpu: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, 'triton', None)
    monkeypatch.delitem(sys.modules, 'model.ops.triton.dynamic_conv', raising=False)
    monkeypatch.delattr(model.ops.triton, 'dynamic_conv', raising=False)
    x, weights = (t.requires_grad_() for t in operands(*SHAPES[0]))
    assert same(dynamic_conv, x, weights)
    (record,) = caplog.records
    assert 'ModuleNotFoundError' in record.getMessage()


@pytest.mark.parametrize(
    'error',
    [
        MemoryError(),
        torch.OutOfMemoryError('CUDA out of memory'),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 16 bytes."),
    ],
)
def test_a_lack_of_memory_is_not_the_fault_of_the_kernels(kernels: Kernels, error: Exception) -> None:
    x, weights = operands(*SHAPES[0])
    kernels.error = error
    with pytest.raises(type(error)):
        dynamic_conv(x, weights)
    kernels.error = None
    dynamic_conv(x, weights)
    assert kernels.calls == ['forward'] * 2
