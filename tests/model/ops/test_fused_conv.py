import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from measure.speed import by_kind, clocked
from model import build
from model.common import activated, conv
from model.ops import fast
from model.ops import fused_conv as module
from model.ops.fused_conv import fused_conv
from model.ops.llvm import fused_conv as fused_conv_llvm
from model.ops.llvm import fused_linear as fused_linear_llvm
from tests.conftest import numbers
from tests.model.ops.conftest import Call

pytestmark = pytest.mark.usefixtures('no_gradients')
KERNELS = (fused_conv_llvm,)
CALLED = ((fused_conv_llvm, 'forward'), (fused_linear_llvm, 'forward'))

CLOSE = 5e-6  # of the largest value
BEHIND: dict[str, dict[str, Any]] = {
    'nothing': {},
    'ReLU': {'slope': 0.0},
    'LeakyReLU': {'slope': 0.05},
    'sum': {'plus': True},
    'EDSR': {'plus': True, 'factor': 0.1},
    'maps to weigh': {'weighed': True},
    'sum without factor': {'plus': True, 'weighed': True, 'slope': 0.2},
    'all': {'plus': True, 'weighed': True, 'slope': 0.2, 'factor': -2.0},
}
SIZES = {  # of the batch, channels in and out, height, width
    'whole tiles and vectors': (1, 64, 64, 8, 12),
    'vectors not full': (2, 52, 36, 9, 11),
    'more outputs than a block has': (1, 16, 100, 5, 6),
    'smaller than a tile': (3, 20, 7, 3, 2),
    'one pixel': (1, 5, 3, 1, 1),
    'to one channel': (1, 2, 1, 4, 30),
    'a row': (1, 33, 17, 1, 70),
}


@pytest.fixture
def any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels also where they are slower."""
    for name in ('FEWEST_CHANNELS', 'FEWEST_PIXELS', 'LEAST'):
        monkeypatch.setattr(module, name, 0)


def operands(behind: str, n: int, ins: int, outs: int, height: int, width: int) -> dict[str, Any]:
    """Arguments of `fused_conv` in float64."""
    given = {
        'x': fast_memory(numbers(n, ins, height, width, seed=1)),
        'weight': numbers(outs, ins, 3, 3, seed=2) / math.sqrt(9 * ins),
        'bias': numbers(outs, seed=3),
        **BEHIND[behind],
    }
    maps = {
        name: fast_memory(numbers(n, outs, height, width, seed=seed)) for seed, name in ((4, 'plus'), (6, 'weighed'))
    }
    return given | {name: maps[name] for name in maps if name in given}


def fast_memory(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def single(given: dict[str, Any]) -> dict[str, Any]:
    return {key: value.float() if isinstance(value, Tensor) else value for key, value in given.items()}


def plain(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    plus: Tensor | None = None,
    weighed: Tensor | None = None,
    slope: float = 1,
    factor: float = 1,
) -> Tensor:
    """From the definition: nine shifted maps, each times a matrix."""
    padded, (height, width) = F.pad(x, (1, 1, 1, 1)), x.shape[2:]
    out = torch.zeros(len(x), len(weight), height, width, dtype=x.dtype)
    for i in range(3):
        for j in range(3):
            out += torch.einsum('oc,nchw->nohw', weight[:, :, i, j], padded[:, :, i : i + height, j : j + width])
    out += 0 if bias is None else bias[:, None, None]
    out = out if weighed is None else weighed / (1 + torch.exp(-out))
    out = torch.where(out < 0, slope * out, out) * factor
    return out if plus is None else out + plus


def check(found: Tensor, truth: Tensor, close: float = CLOSE) -> None:
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), truth, rtol=0, atol=close * float(truth.abs().max()))


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('behind', BEHIND)
def test_equals_the_definition(behind: str, size: str, lanes: int, any_size: None, calls: list[Call]) -> None:
    given = operands(behind, *SIZES[size])
    for changed in ({}, {'bias': None}):
        found = fused_conv(**single(given | changed))
        assert found.is_contiguous(memory_format=torch.channels_last)
        check(found, plain(**given | changed))
    assert len(calls) == 2


@pytest.mark.parametrize('channels', [64, 128, 256])
def test_errors_stay_below_those_of_the_usual_points(channels: int, calls: list[Call]) -> None:
    """With 0, +-1, +-2 and infinity a convolution of 64 channels is off by 5e-6, of 256 by 9e-6."""
    given = operands('nothing', 1, channels, channels, 24, 24)
    check(fused_conv(**single(given)), plain(**given), 3e-6)
    assert calls


def test_outputs_a_part_at_a_time(any_size: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of many outputs are not all in memory at once."""
    monkeypatch.setattr(fused_conv_llvm, 'MOST_OUTS', 32)
    given = operands('all', 2, 24, 80, 6, 7)
    check(fused_conv(**single(given)), plain(**given))


def test_channels_of_larger_maps(lanes: int, any_size: None, calls: list[Call]) -> None:
    """Parts of maps in channels_last memory are used where they are, and nothing around them is."""
    given = operands('sum', 2, 20, 18, 6, 9)
    found = single(given)
    for name in ('x', 'plus'):
        larger = fast_memory(F.pad(found[name], (2, 1, 1, 3, 3, 9, 0, 0), value=math.nan))
        found[name] = larger[:, 3 : 3 + given[name].shape[1], 1:7, 2:11]
    check(fused_conv(**found), plain(**given))
    assert calls[0].first.data_ptr() == found['x'].data_ptr()


def test_tensors_in_any_memory(any_size: None, calls: list[Call]) -> None:
    given = operands('sum', 2, 20, 18, 6, 9)
    found = single(given)
    found['weight'] = fast_memory(found['weight'])
    found['plus'] = found['plus'].mT.contiguous().mT
    check(fused_conv(**found), plain(**given))
    assert len(calls) == 1
    found['x'] = found['x'].contiguous()  # channels far apart: the convolutions of a library are left to it
    check(fused_conv(**found), plain(**given))
    assert len(calls) == 1


def test_sizes_that_do_not_fit_are_refused(calls: list[Call]) -> None:
    given = single(operands('sum', 1, 48, 48, 24, 24))
    with pytest.raises(RuntimeError, match='channels'):
        fused_conv(**given | {'x': given['x'][:, :40]})
    with pytest.raises(RuntimeError, match='size'):
        fused_conv(**given | {'plus': given['plus'][:, :, :20]})
    by_channel = given['plus'][:, :, :1, :1]
    check(fused_conv(**given | {'plus': by_channel}), plain(**given | {'plus': by_channel}).double())
    given['weight'] = given['weight'][..., 1:2, 1:2]
    truth = plain(**given | {'weight': F.pad(given['weight'], (1, 1, 1, 1)), 'plus': by_channel})
    check(fused_conv(**given | {'plus': by_channel}), truth.double())
    with pytest.raises(RuntimeError, match='size'):
        fused_conv(**given | {'plus': given['plus'][:, :, :20]})
    assert fused_conv_llvm not in [call.module for call in calls]
    assert 'llvm.fused_conv' not in fast.failed


@pytest.mark.parametrize('value', [math.nan, math.inf])
def test_what_is_not_finite_stays_near(value: float, lanes: int, any_size: None) -> None:
    given = single(operands('LeakyReLU', 2, 20, 18, 16, 16))
    clean = fused_conv(**given)
    given['x'][0, 5, 8, 9] = value
    found = fused_conv(**given)
    near = torch.zeros_like(found, dtype=torch.bool)
    near[0, :, 5:12, 6:13] = True
    assert not found[0, :, 7:10, 8:11].isfinite().any()
    assert torch.equal(found[~near], clean[~near])


def test_results_repeat_themselves(lanes: int, any_size: None) -> None:
    """To the bit: in another call, with other threads and blocks, and of an image by itself."""
    given = single(operands('sum', 3, 24, 40, 30, 45))
    first = fused_conv(**given)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(fused_conv(**given), first)
    finally:
        torch.set_num_threads(threads)
    alone = {name: given[name][1:2] for name in ('x', 'plus')}
    assert torch.equal(fused_conv(**(given | alone)), first[1:2])


def test_other_calls_take_the_plain_form(calls: list[Call], monkeypatch: pytest.MonkeyPatch) -> None:
    given = operands('EDSR', 1, 48, 48, 24, 24)
    truth, found = plain(**given), single(given)
    torch.testing.assert_close(fused_conv(**given), truth, rtol=0, atol=1e-12)
    with torch.autocast('cpu', torch.bfloat16):
        assert fused_conv(found['x'], found['weight']).dtype == torch.bfloat16
    for target, name, value in (
        (fast, 'wanted', False),
        (fast, 'is_installed', lambda package: False),
        (torch.jit, 'is_tracing', lambda: True),
        (torch.compiler, 'is_compiling', lambda: True),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, value)
            check(fused_conv(**found), truth)
    small = operands('nothing', 1, 48, 48, 8, 8)
    check(fused_conv(**single(small)), plain(**small))
    assert not calls
    check(fused_conv(**found), truth)
    assert calls


@pytest.mark.parametrize(('size', 'dilation'), [(3, 2), (5, 1)])
def test_other_weights_take_the_plain_form(size: int, dilation: int, calls: list[Call]) -> None:
    x, weight = numbers(1, 32, 40, 40).float(), numbers(32, 32, size, size, seed=2).float()
    x = fast_memory(x)
    found = fused_conv(x, weight, None, dilation, slope=0.5, plus=x, factor=0.1)
    padding = dilation * (size // 2)
    truth = x + 0.1 * F.leaky_relu(F.conv2d(x, weight, None, padding=padding, dilation=dilation), 0.5)
    torch.testing.assert_close(found, truth)
    assert not calls


@pytest.mark.parametrize('behind', BEHIND)
def test_1x1_is_a_linear_layer(behind: str, calls: list[Call]) -> None:
    given = operands(behind, 2, 19, 21, 17, 31)
    given['weight'] = given['weight'][..., 1:2, 1:2]
    truth = plain(**given | {'weight': F.pad(given['weight'], (1, 1, 1, 1))})
    check(fused_conv(**single(given)), truth)
    assert [call.module for call in calls] == [fused_linear_llvm]
    few = {name: given[name][:, :, :2] for name in ('x', 'plus', 'weighed') if name in given}
    check(fused_conv(**single(given | few)), truth[:, :, :2])
    assert len(calls) == 1
    with pytest.raises(RuntimeError, match='channels'):
        fused_conv(**single(given | {'x': given['x'][:, 1:]}))


@pytest.mark.parametrize('behind', ['sum', 'LeakyReLU', 'maps to weigh', 'sum without factor'])
def test_what_is_behind_1x1_is_done_by_its_kernel(behind: str) -> None:
    given = single(operands(behind, 1, 16, 16, 24, 24))
    names = clocked(lambda: fused_conv(**given | {'weight': given['weight'][..., 1:2, 1:2]}))
    assert 'frugalsr::fused_linear' in names
    assert not {'aten::add', 'aten::leaky_relu_', 'aten::sigmoid', 'aten::mul'} & set(names)


def test_a_kernel_that_fails_is_left_out(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    tried = []

    def fails(*arguments: object) -> Tensor:
        tried.append(arguments)
        raise RuntimeError('no such processor')

    monkeypatch.setattr(fused_conv_llvm, 'kernel', fails)
    monkeypatch.setattr(fast, 'failed', set())
    given = operands('sum', 1, 48, 48, 24, 24)
    with caplog.at_level(logging.WARNING, 'frugalsr'):
        for _ in range(2):
            check(fused_conv(**single(given)), plain(**given))
    assert len(tried) == 1
    assert caplog.messages == ['The fused conv runs without llvmlite, slower: RuntimeError: no such processor']


def test_its_time_is_told_by_name() -> None:
    given = single(operands('sum', 1, 48, 48, 24, 24))
    assert 'frugalsr::fused_conv' in clocked(lambda: fused_conv(**given))
    assert by_kind(lambda: fused_conv(**given), 'cpu')['convolution'] > 0


@pytest.mark.parametrize('act', [nn.ReLU(), nn.LeakyReLU(0.3), nn.PReLU(init=-0.5), nn.GELU(), nn.SiLU()])
def test_an_activation_behind_a_layer(act: nn.Module, calls: list[Call]) -> None:
    layer, x = conv(32, 32, 3), fast_memory(numbers(1, 32, 40, 40).float())
    check(activated(layer, act, x), act.double()(plain(x.double(), layer.weight.double(), layer.bias.double())))
    assert calls


@pytest.mark.parametrize('name', ['EDSR-baseline', 'IMDN', 'PAN', 'RCAN', 'SwinIR-light', 'CATANet'])
def test_networks_with_and_without_it(name: str, calls: list[Call], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net = build(name, 2, **({'n_resgroups': 1} if name == 'RCAN' else {})).eval()
    for key, buffer in net.named_buffers():
        if key.endswith('initted'):
            buffer.fill_(True)
    x = torch.rand(2, 3, 23, 26)
    found = net(x)
    assert fused_conv_llvm in [call.module for call in calls]
    monkeypatch.setattr(module, 'LEAST', math.inf)
    check(found, net(x).double(), 1e-5)


def gradients_of(function: Callable[..., Tensor], given: dict[str, Any], grad: Tensor) -> list[Tensor]:
    """By all tensors that a function is given."""
    with torch.enable_grad():
        leaves = {name: t.detach().requires_grad_() if isinstance(t, Tensor) else t for name, t in given.items()}
        wanted = [t for t in leaves.values() if isinstance(t, Tensor)]
        return list(torch.autograd.grad(function(**leaves), wanted, grad.to(leaves['x'].dtype)))


def check_gradients(given: dict[str, Any], grad: Tensor) -> None:
    found = gradients_of(fused_conv, single(given), grad)
    for part, truth in zip(found, gradients_of(plain, given, grad), strict=True):
        check(part, truth, 1e-5)


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('behind', ['nothing', 'ReLU', 'LeakyReLU', 'sum', 'EDSR'])
def test_gradients(behind: str, size: str, lanes: int, any_size: None, calls: list[Call]) -> None:
    n, ins, outs, height, width = SIZES[size]
    given, grad = operands(behind, n, ins, outs, height, width), numbers(n, outs, height, width, seed=5)
    check_gradients(given, fast_memory(grad))
    check_gradients(given | {'bias': None}, grad)
    assert len(calls) == (4 if outs > 1 else 2)  # a single channel is in either memory


@pytest.mark.parametrize('behind', BEHIND)
def test_gradients_of_1x1(behind: str) -> None:
    given = operands(behind, 2, 19, 21, 17, 31)
    given['weight'] = given['weight'][..., 1:2, 1:2]
    grad = numbers(2, 21, 17, 31, seed=5)

    def padded(weight: Tensor, **others: Any) -> Tensor:
        return plain(weight=F.pad(weight, (1, 1, 1, 1)), **others)

    found = gradients_of(fused_conv, single(given), grad)
    for part, truth in zip(found, gradients_of(padded, given, grad), strict=True):
        check(part, truth, 1e-5)


def test_gradients_of_other_calls(any_size: None, calls: list[Call], monkeypatch: pytest.MonkeyPatch) -> None:
    """By PyTorch: an activation below a sum, and the gradient by maps of a convolution to few channels."""
    grad = numbers(1, 18, 9, 9, seed=5)
    check_gradients(operands('all', 1, 20, 18, 9, 9) | {'weighed': None}, grad)
    assert not calls
    check_gradients(operands('all', 1, 20, 18, 9, 9) | {'slope': -0.5}, grad)
    calls.clear()
    monkeypatch.setattr(module, 'FEWEST_CHANNELS', 8)
    check_gradients(operands('sum', 1, 20, 3, 9, 9), grad[:, :3])
    assert len(calls) == 1


def test_what_is_not_trained_gets_no_gradient(any_size: None, calls: list[Call]) -> None:
    for name in ('x', 'weight', 'bias', 'plus'):
        given = single(operands('EDSR', 1, 20, 18, 9, 9))
        truth = single(operands('EDSR', 1, 20, 18, 9, 9))
        with torch.enable_grad():
            given[name].requires_grad_()
            truth[name].requires_grad_()
            fused_conv(**given).square().sum().backward()
            plain(**truth).square().sum().backward()
        torch.testing.assert_close(given[name].grad, truth[name].grad, rtol=1e-4, atol=1e-4)
        assert all(t.grad is None for key, t in given.items() if isinstance(t, Tensor) and key != name)
    assert len(calls) == 5


@torch.enable_grad()
@pytest.mark.parametrize('size', [1, 3])
def test_an_activation_in_place_behind_it(size: int, any_size: None) -> None:
    """PyTorch has no gradients for what is changed in place if it was a view."""
    x, weight = numbers(1, 16, 24, 25).float(), numbers(16, 16, size, size, seed=2).float().requires_grad_()
    found, truth = (
        torch.autograd.grad(F.leaky_relu_(conv(), 0.2).square().sum(), weight)[0]
        for conv in (lambda: fused_conv(fast_memory(x), weight), lambda: F.conv2d(x, weight, padding=size // 2))
    )
    torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-2)
