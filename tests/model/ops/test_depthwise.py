import logging
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from measure.speed import clocked
from model.ops import depthwise as module
from model.ops import fast
from model.ops.depthwise import depthwise
from model.ops.llvm import depthwise as depthwise_llvm
from tests.conftest import numbers
from tests.model.ops.conftest import Call, functions

KERNELS = (depthwise_llvm,)
CALLED = ((depthwise_llvm, 'forward'), (depthwise_llvm, 'gradients'))
CLOSE = 1e-5  # of the largest value
SIZES = {  # of the batch, channels, height, width, side of the filters
    'whole vectors': (1, 64, 16, 16, 3),
    'vectors not full': (2, 36, 9, 11, 3),
    'halves that end within a vector': (2, 72, 10, 13, 3),
    'few channels': (3, 6, 7, 3, 3),
    'one pixel': (1, 4, 1, 1, 3),
    'large filters': (2, 20, 17, 10, 7),
    'filters larger than the maps': (1, 18, 2, 3, 7),
    'filters of one number': (1, 10, 9, 9, 1),
}
Given = tuple[Tensor, Tensor, Tensor | None]


def fast_memory(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def operands(n: int, channels: int, height: int, width: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Maps in channels_last memory, weights and biases, in float64."""
    x = fast_memory(numbers(n, channels, height, width, seed=1))
    return x, numbers(channels, 1, size, size, seed=2) / size, numbers(channels, seed=3)


def plain(x: Tensor, weight: Tensor, bias: Tensor | None, act: str, *, plus: Tensor | float = 0.0) -> Tensor:
    """From the definition: shifted maps, each times a number a channel."""
    size, (height, width) = weight.shape[2], x.shape[2:]
    padded = F.pad(x, [size // 2] * 4)
    out = torch.zeros_like(x) if bias is None else bias[:, None, None].expand_as(x)
    for i in range(size):
        for j in range(size):
            out = out + weight[:, :, i, j, None] * padded[:, :, i : i + height, j : j + width]
    out = out + plus
    if act == 'gate':
        first, second = out.chunk(2, 1)
        return first * (1 + torch.erf(first / math.sqrt(2))) / 2 * second
    return out * (1 + torch.erf(out / math.sqrt(2))) / 2 if act else out


def results(function: Callable[..., Tensor], given: Given, act: str, grad: Tensor) -> list[Tensor]:
    """What a function gives, and its gradients."""
    leaves = [t if t is None else t.detach().requires_grad_() for t in given]
    out = function(*leaves, act)
    wanted = [t for t in leaves if t is not None]
    return [out.detach(), *torch.autograd.grad(out, wanted, grad.to(out.dtype))]


def single(given: Given) -> Given:
    return tuple(t if t is None else t.float() for t in given)  # type: ignore[return-value]


def grad_of(x: Tensor, act: str) -> Tensor:
    n, channels, height, width = x.shape
    return fast_memory(numbers(n, channels // 2 if act == 'gate' else channels, height, width, seed=4))


def check(given: Given, act: str, grad: Tensor | None = None) -> list[Tensor]:
    grad = grad_of(given[0], act) if grad is None else grad
    found = results(depthwise, single(given), act, grad)
    for part, truth in zip(found, results(plain, given, act, grad), strict=True):
        assert part.dtype == torch.float32
        torch.testing.assert_close(part.double(), truth, rtol=0, atol=CLOSE * float(truth.abs().max()))
    return found


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('act', ['', 'gelu', 'gate'])
def test_equals_the_definition(act: str, size: str, lanes: int, calls: list[Call]) -> None:
    x, weight, bias = operands(*SIZES[size])
    out, by_x, *_ = check((x, weight, bias), act)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert by_x.is_contiguous(memory_format=torch.channels_last)
    check((x, weight, None), act)
    assert functions(calls) == 2 * ['forward', 'gradients']


def test_tensors_in_any_memory(calls: list[Call]) -> None:
    x, weight, bias = operands(2, 20, 9, 12, 3)
    larger = fast_memory(F.pad(x, (2, 1, 1, 3, 3, 9, 0, 0), value=math.nan))
    part = larger[:, 3:23, 1:10, 2:14]
    grad = numbers(2, 20, 12, 9, seed=4).mT
    check((part, weight, bias), 'gelu', grad)
    check((part, weight, bias), '', numbers(1, 1, 1, 1).expand(2, 20, 9, 12))
    assert len(calls) == 4
    check((x.contiguous(), weight, bias), 'gelu', grad)  # channels far apart: left to PyTorch
    assert len(calls) == 4


def test_results_repeat_themselves(lanes: int) -> None:
    """To the bit: in another call, with other threads, and of an image by itself."""
    x, weight, bias = single(operands(3, 24, 30, 21, 3))
    grad = grad_of(x, 'gate')
    first, threads = results(depthwise, (x, weight, bias), 'gate', grad), torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert all(map(torch.equal, results(depthwise, (x, weight, bias), 'gate', grad), first))
    finally:
        torch.set_num_threads(threads)
    alone = results(depthwise, (x[1:2], weight, bias), 'gate', grad[1:2])
    assert torch.equal(alone[0], first[0][1:2])
    assert torch.equal(alone[1], first[1][1:2])


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize(('act', 'added'), [('', True), ('gelu', False), ('gelu', True), ('gate', False)])
def test_without_gradients(act: str, added: bool, size: str, lanes: int, calls: list[Call]) -> None:
    given = operands(*SIZES[size])
    plus = numbers(*given[0].shape, seed=5) if added else None
    truth = plain(*given, act, plus=0.0 if plus is None else plus)
    with torch.no_grad():
        found = depthwise(*single(given), act, plus=None if plus is None else plus.float())
    torch.testing.assert_close(found.double(), truth, rtol=0, atol=CLOSE * float(truth.abs().max()))
    assert functions(calls) == ['forward']


@pytest.mark.parametrize('act', ['', 'gelu'])
def test_gradients_by_what_is_added(act: str, calls: list[Call]) -> None:
    x, weight, bias = operands(2, 20, 9, 12, 3)
    plus, grad = numbers(2, 20, 9, 12, seed=5), grad_of(x, act)

    def found(function: Callable[..., Tensor], *given: Tensor) -> list[Tensor]:
        *first, plus = (t.detach().requires_grad_() for t in given)
        out = function(*first, act, plus=plus)
        return list(torch.autograd.grad(out, [*first, plus], grad.to(out.dtype)))

    given = x, weight, bias, plus
    for part, truth in zip(found(depthwise, *(t.float() for t in given)), found(plain, *given), strict=True):
        torch.testing.assert_close(part.double(), truth, rtol=0, atol=CLOSE * float(truth.abs().max()))
    assert calls


def test_sizes_that_do_not_fit_are_refused(calls: list[Call]) -> None:
    given = x, weight, bias = single(operands(1, 12, 9, 9, 3))
    with torch.no_grad():
        with pytest.raises(RuntimeError, match='channels'):
            depthwise(x[:, :8], weight, bias, 'gelu')
        with pytest.raises(RuntimeError, match='size'):
            depthwise(x, weight, bias, 'gelu', plus=x[:, :, :5])
        by_channel = x[:, :, :1, :1]
        truth = plain(*(t.double() for t in given), 'gelu', plus=by_channel.double())
        torch.testing.assert_close(depthwise(*given, 'gelu', plus=by_channel).double(), truth, rtol=0, atol=1e-5)
        with pytest.raises(RuntimeError, match='type'):
            depthwise(x, weight, bias.double(), 'gelu')
    assert not calls


def test_nothing_is_added_before_a_gate() -> None:
    x, weight, bias = operands(1, 12, 9, 9, 3)
    with pytest.raises(ValueError, match='before a gate'):
        depthwise(x, weight, bias, 'gate', plus=x)


def test_other_calls_take_the_plain_form(calls: list[Call], monkeypatch: pytest.MonkeyPatch) -> None:
    given = operands(1, 12, 9, 9, 3)
    with torch.no_grad():
        for act in ('', 'gelu', 'gate'):
            plus = {} if act == 'gate' else {'plus': given[0]}
            torch.testing.assert_close(depthwise(*given, act, **plus), plain(*given, act, **plus), rtol=0, atol=1e-12)
        torch.testing.assert_close(depthwise(*single(given)).double(), plain(*given, ''), rtol=0, atol=1e-5)
    for act in ('', 'gelu', 'gate'):
        with monkeypatch.context() as patch:
            patch.setattr(fast, 'wanted', False)
            check(given, act)
    with torch.autocast('cpu', torch.bfloat16):
        assert depthwise(*single(given)).dtype == torch.bfloat16
    assert not calls
    check(given, 'gate')
    assert calls


def test_a_kernel_that_fails_is_left_out(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def fails(*arguments: object) -> None:
        raise RuntimeError('no such processor')

    for name in ('kernel', 'gradient_kernel'):
        with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, 'frugalsr'):
            patch.setattr(depthwise_llvm, name, fails)
            patch.setattr(fast, 'failed', set())
            x, weight, bias = operands(1, 12, 9, 9, 3)
            check((x, weight, bias), 'gate')
            check((x, weight, None), '')
    message = 'The depthwise runs without llvmlite, slower: RuntimeError: no such processor'
    assert caplog.messages == [message, message]


def test_its_time_is_told_by_name() -> None:
    x, weight, bias = single(operands(1, 12, 9, 9, 3))
    weight.requires_grad_()
    names = clocked(lambda: module.depthwise(x, weight, bias, 'gelu').sum().backward())
    assert {'frugalsr::depthwise_conv', 'frugalsr::depthwise_conv_gradients'} <= set(names)
