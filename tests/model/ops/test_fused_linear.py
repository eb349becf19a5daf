import logging
import math
from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from measure.speed import by_kind, clocked
from model import build
from model.blocks.pixels import pointwise
from model.ops import fast
from model.ops import fused_linear as module
from model.ops.fused_linear import fused_linear
from model.ops.llvm import fused_linear as fused_linear_llvm
from model.ops.llvm import linear_gradients
from tests.conftest import numbers
from tests.model.ops.conftest import Call, functions

pytestmark = pytest.mark.usefixtures('no_gradients')
KERNELS = (fused_linear_llvm, linear_gradients)
CALLED = ((fused_linear_llvm, 'forward'), (linear_gradients, 'gradients'))

CLOSE = 1e-5  # of the largest value
# What stands around the layers: of the tensors that `tensors` makes, and flags.
AROUND: dict[str, tuple[str, ...]] = {
    'nothing': (),
    'plus': ('plus',),
    'norm': ('norm',),
    'GELU': ('norm', 'gelu'),
    'norm behind': ('norm_after', 'plus'),
    'sum': ('gelu_summed', 'plus'),
    'LeakyReLU': ('slope',),
    'maps to weigh': ('weighed',),
    'all behind': ('norm_after', 'weighed', 'slope', 'plus'),
}
SIZES = {  # pixels, channels before, between and behind the layers
    'SwinIR-light': (100, 60, 120, 60),
    'two rows of vectors': (24, 64, 192, 64),
    'less than a block': (1, 5, 3, 2),
    'odd': (61, 33, 47, 65),
    'one channel': (13, 1, 1, 1),
}


def norm_of(width: int, seed: int) -> SimpleNamespace:
    return SimpleNamespace(weight=1 + numbers(width, seed=seed), bias=numbers(width, seed=seed + 1), eps=1e-3)


def operands(names: tuple[str, ...], pixels: int, *widths: int, biased: bool = True) -> dict[str, Any]:
    """Arguments of `fused_linear` in float64, with a batch of two."""
    sizes = list(pairwise(widths))
    weights = [numbers(o, i, seed=n) / math.sqrt(i) for n, (i, o) in enumerate(sizes)]
    given = {
        'gelu_summed': 2 * numbers(2, pixels, widths[0], seed=11),
        'plus': numbers(2, pixels, widths[-1], seed=13),
        'norm': norm_of(widths[0], 14),
        'norm_after': norm_of(widths[-1], 16),
        'gelu': True,
        'weighed': numbers(2, pixels, widths[-1], seed=18),
        'slope': 0.2,
    }
    return {
        'x': 1 + 2 * numbers(2, pixels, widths[0], seed=10),
        'layers': [(w, numbers(len(w), seed=20 + n) if biased else None) for n, w in enumerate(weights)],
        **{name: given[name] for name in names},
    }


def converted(value: Any, to: Callable[[Tensor], Tensor]) -> Any:
    """Arguments with their tensors as `to` makes them."""
    if isinstance(value, Tensor):
        return to(value)
    if isinstance(value, (list, tuple)):
        return type(value)(converted(part, to) for part in value)
    if isinstance(value, dict):
        return {key: converted(part, to) for key, part in value.items()}
    return SimpleNamespace(**converted(vars(value), to)) if isinstance(value, SimpleNamespace) else value


def plain(x: Tensor, layers: list[tuple[Tensor, Tensor | None]], **around: Any) -> Tensor:
    """By PyTorch's own functions."""

    def norm(x: Tensor, by: SimpleNamespace) -> Tensor:
        return F.layer_norm(x, by.weight.shape, by.weight, by.bias, by.eps)

    x = norm(x, around['norm']) if 'norm' in around else x
    x = x + F.gelu(around['gelu_summed']) if 'gelu_summed' in around else x
    first, *others = layers
    x = F.linear(x, *first)
    x = F.gelu(x) if 'gelu' in around else x
    for layer in others:
        x = F.linear(x, *layer)
    x = norm(x, around['norm_after']) if 'norm_after' in around else x
    x = around['weighed'] / (1 + torch.exp(-x)) if 'weighed' in around else x
    x = torch.where(x < 0, around['slope'] * x, x) if 'slope' in around else x
    return x + around['plus'] if 'plus' in around else x


def check(found: Tensor, truth: Tensor) -> None:
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), truth, rtol=0, atol=CLOSE * float(truth.abs().max()))


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('names', AROUND)
def test_equals_the_plain_form(names: str, size: str, lanes: int, calls: list[Call]) -> None:
    pixels, *widths = SIZES[size]
    for sizes, biased in ((widths, True), (widths[:2], False)):
        given = operands(AROUND[names], pixels, *sizes, biased=biased)
        found = fused_linear(**converted(given, Tensor.float))
        assert found.is_contiguous()
        check(found, plain(**given))
    assert len(calls) == 2


def test_gelu_is_exact_to_the_rounding_of_its_input(lanes: int) -> None:
    x = torch.cat((torch.linspace(-9, 9, 30001), torch.tensor([-1e30, -1e-30, 0.0, 1e-30, 1e30])))
    found = fused_linear(x.view(1, -1, 1), [(torch.ones(1, 1), None)], gelu=True).flatten()
    error = (found.double() - F.gelu(x.double())).abs()
    assert (error <= 2e-7 * x.abs().double()).all()


@pytest.mark.parametrize('slope', [0.0, -0.5])
def test_infinite_numbers_and_an_activation(slope: float, lanes: int) -> None:
    x = torch.tensor([-math.inf, -2.0, -0.0, 0.0, 3.0, math.inf, math.nan])
    found = fused_linear(x.view(1, -1, 1), [(torch.ones(1, 1), None)], slope=slope).flatten()
    torch.testing.assert_close(found, F.leaky_relu(x, slope) if slope else F.relu(x), rtol=0, atol=0, equal_nan=True)


def test_channels_of_larger_maps(lanes: int, calls: list[Call]) -> None:
    """Parts of maps in channels_last memory are used where they are, and their gaps are left alone."""
    given = converted(operands(('gelu_summed', 'plus', 'weighed'), 30, 12, 7), Tensor.float)
    truth = plain(**converted(given, Tensor.double))
    x = given['x'] = F.pad(given['x'].view(2, 5, 6, 12), (3, 9), value=math.nan)[..., 3:15]
    others = {name: given[name].view(2, 5, 6, -1) for name in ('gelu_summed', 'plus')}
    others['weighed'] = F.pad(given['weighed'].view(2, 5, 6, 7), (2, 4), value=math.nan)[..., 2:9]
    check(fused_linear(**(given | others)), truth.view(2, 5, 6, -1))
    assert calls[0].first.data_ptr() == x.data_ptr()


def test_tensors_in_any_memory(lanes: int, calls: list[Call]) -> None:
    given = operands(('gelu_summed', 'plus', 'weighed'), 15, 12, 7)
    turned = converted(given, lambda t: t.float().mT.contiguous().mT if t.dim() > 1 else t.float())
    check(fused_linear(**turned), plain(**given))
    assert calls


@pytest.mark.parametrize('widths', [(33, 20), (18, 33, 20), (12, 12, 5, 4)])
@pytest.mark.parametrize('names', AROUND)
def test_joined_channels(names: str, widths: tuple[int, ...], lanes: int, calls: list[Call]) -> None:
    """Of parts of larger maps, and of some that a kernel cannot read where they are."""
    given = operands(AROUND[names], 25, sum(widths), 47, 18)
    parts = [part.float() for part in given['x'].split(widths, -1)]
    gaps = [F.pad(part, (2, 3), value=math.nan)[..., 2:-3] for part in parts]
    for x, *beside in (gaps, [part.mT.contiguous().mT for part in parts]):
        check(fused_linear(**{**converted(given, Tensor.float), 'x': x}, beside=beside), plain(**given))
    assert len(calls) == 2


def test_joined_channels_of_maps(lanes: int, calls: list[Call]) -> None:
    """Quarters of maps in channels_last memory, as ASID's."""
    maps = numbers(2, 12, 5, 7, seed=1).to(memory_format=torch.channels_last)
    layer = nn.Conv2d(12, 7, 1).double()
    first, second, third = maps.float().split((3, 6, 3), 1)
    found = pointwise(first, layer.weight.float(), layer.bias.float(), beside=[second, third])
    check(found, layer(maps))
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert calls[0].first.data_ptr() == first.data_ptr()


def test_joined_channels_where_no_kernel_joins_them(lanes: int, calls: list[Call]) -> None:
    given = operands(('plus',), 25, 10, 7)
    parts = list(given['x'].float().split(2, -1))
    around = {**converted(given, Tensor.float), 'x': parts[0], 'beside': parts[1:]}
    truth = plain(**given)
    check(fused_linear(**around), truth)  # of too many
    assert calls.pop().first.shape == (2, 25, 10)
    with torch.enable_grad():
        leaf = parts[1].requires_grad_()
        found = fused_linear(**around)
        check(found, truth)
        (by_leaf,) = torch.autograd.grad(found.sum(), leaf)
    check(by_leaf, given['layers'][0][0].sum(0)[2:4].expand(2, 25, 2))
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.allclose(fused_linear(**around).double(), truth, atol=0.05 * float(truth.abs().max()))


def test_joined_channels_that_are_none_or_do_not_fit(calls: list[Call]) -> None:
    given = operands((), 25, 10, 7)
    x = given['x'].float()
    check(fused_linear(x, converted(given['layers'], Tensor.float), beside=[x[..., :0]]), plain(**given))
    for other in (x[:, :24], x[:1], x[0]):
        with pytest.raises(RuntimeError):
            fused_linear(x[..., :6], converted(given['layers'], Tensor.float), beside=[other[..., 6:]])
    assert not calls


@pytest.mark.parametrize('names', [('norm', 'gelu_summed'), ('norm', 'norm_after')])
def test_steps_that_do_not_go_together_are_refused(names: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match='a norm without'):
        fused_linear(**operands(names, 3, 4, 4))
    with pytest.raises(ValueError, match='one or two layers'):
        fused_linear(**operands((), 3, 4, 4, 4, 4))


@pytest.mark.parametrize('name', ['weighed', 'plus', 'gelu_summed'])
def test_maps_of_other_shapes_are_spread_by_pytorch(name: str, calls: list[Call]) -> None:
    given = operands((name,), 20, 12, 7)
    given[name] = given[name][:, :1, :1]
    check(fused_linear(**converted(given, Tensor.float)), plain(**given))
    assert not calls


@pytest.mark.parametrize('channels', [11, 13])
def test_weights_of_other_sizes_are_refused(channels: int, calls: list[Call]) -> None:
    given = converted(operands(('plus',), 20, 12, 7), Tensor.float)
    given['x'] = given['x'][..., :1].expand(2, 20, channels)
    with pytest.raises(RuntimeError):
        fused_linear(**given)
    assert not calls


def test_no_pixels(calls: list[Call]) -> None:
    given = converted(operands(('norm', 'plus'), 0, 12, 7), Tensor.float)
    assert fused_linear(**given).shape == (2, 0, 7)
    assert calls


@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize('names', AROUND)
def test_what_is_not_finite_stays_in_its_row(names: str, value: float, lanes: int) -> None:
    given = converted(operands(AROUND[names], 20, 12, 7, 9), Tensor.float)
    clean = fused_linear(**given)
    given['x'][0, 13, 5] = value
    found, truth = fused_linear(**given), plain(**given)
    assert 0 < (~truth.isfinite()).sum() <= 2 * truth.shape[2]
    assert torch.equal(found.isfinite(), truth.isfinite())
    assert torch.equal(found[truth.isfinite()], clean[truth.isfinite()])


def test_results_repeat_themselves(lanes: int) -> None:
    """To the bit: in another call, with other threads, and of an image by itself."""
    given = converted(operands(('norm', 'gelu', 'plus'), 101, 60, 120, 60), Tensor.float)
    first = fused_linear(**given)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(fused_linear(**given), first)
    finally:
        torch.set_num_threads(threads)
    alone = {name: given[name][1:] for name in ('x', 'plus')}
    assert torch.equal(fused_linear(**(given | alone)), first[1:])


def test_other_calls_take_the_plain_form(calls: list[Call], monkeypatch: pytest.MonkeyPatch) -> None:
    given = operands(('norm', 'gelu', 'plus'), 20, 12, 7, 9)
    truth, single = plain(**given), converted(given, Tensor.float)
    torch.testing.assert_close(fused_linear(**given), truth, rtol=0, atol=1e-12)
    half = fused_linear(**converted(given, Tensor.bfloat16))
    assert half.dtype == torch.bfloat16
    with torch.autocast('cpu', torch.bfloat16):
        assert not torch.equal(fused_linear(**(single | {'plus': None})), plain(**single) - single['plus'])
    for target, name, value in (
        (fast, 'wanted', False),
        (fast, 'is_installed', lambda package: False),
        (torch.jit, 'is_tracing', lambda: True),
        (torch.compiler, 'is_compiling', lambda: True),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, value)
            check(fused_linear(**single), truth)
    assert not calls
    check(fused_linear(**single), truth)
    assert calls


def test_a_kernel_that_fails_is_left_out(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    tried = []

    def fails(*arguments: object) -> Tensor:
        tried.append(arguments)
        raise RuntimeError('no such processor')

    monkeypatch.setattr(fused_linear_llvm, 'kernel', fails)
    monkeypatch.setattr(fast, 'failed', set())
    given = operands(('norm', 'plus'), 20, 12, 7)
    with caplog.at_level(logging.WARNING, 'frugalsr'):
        for _ in range(2):
            check(fused_linear(**converted(given, Tensor.float)), plain(**given))
    assert len(tried) == 1
    assert caplog.messages == ['The fused linear runs without llvmlite, slower: RuntimeError: no such processor']


def test_its_time_is_told_by_name() -> None:
    given = converted(operands(('norm', 'plus'), 20, 12, 7), Tensor.float)
    assert 'frugalsr::fused_linear' in clocked(lambda: fused_linear(**given))
    assert by_kind(lambda: fused_linear(**given), 'cpu')['matrix product'] > 0


NETWORKS = ('SwinIR-light', 'ATD-light', 'HiT-SRF', 'PFT-light', 'OmniSR', 'ASID', 'CATANet', 'ESC')


@pytest.mark.parametrize('name', NETWORKS)
def test_networks_with_and_without_it(name: str, calls: list[Call], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)  # with 0 PFT-light chooses between tokens that are equal but for rounding
    net = build(name, 2).eval()
    for key, buffer in net.named_buffers():
        if key.endswith('initted'):
            buffer.fill_(True)
    x = torch.rand(2, 3, 17, 20)
    found = net(x)
    assert calls
    monkeypatch.setattr(fast, 'wanted', False)
    check(found, net(x).double())


def tensors_of(value: Any) -> list[Tensor]:
    """All tensors of arguments, in their order."""
    found: list[Tensor] = []
    converted(value, lambda t: found.append(t) or t)  # type: ignore[func-returns-value]
    return found


def gradients_of(function: Callable[..., Tensor], given: dict[str, Any], grad: Tensor) -> list[Tensor]:
    """By all tensors that a function is given."""
    with torch.enable_grad():
        leaves = converted(given, lambda t: t.detach().requires_grad_())
        return list(torch.autograd.grad(function(**leaves), tensors_of(leaves), grad.to(leaves['x'].dtype)))


def check_gradients(given: dict[str, Any], grad: Tensor) -> None:
    truth = gradients_of(plain, given, grad)
    for found, true in zip(gradients_of(fused_linear, converted(given, Tensor.float), grad), truth, strict=True):
        close = CLOSE * float(true.abs().max()) + 1e-12  # a norm of one channel passes no gradient
        torch.testing.assert_close(found.double(), true, rtol=0, atol=close)


TRAINED = ('nothing', 'plus', 'norm', 'GELU', 'sum', 'LeakyReLU', 'maps to weigh')


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('names', TRAINED)
def test_gradients(names: str, size: str, lanes: int, calls: list[Call]) -> None:
    pixels, *widths = SIZES[size]
    for sizes, biased in ((widths, True), (widths[:2], False)):
        given = operands(AROUND[names], pixels, *sizes, biased=biased)
        check_gradients(given, numbers(2, pixels, sizes[-1], seed=30))
    assert functions(calls).count('gradients') == 2


def test_gradients_of_two_layers_without_gelu(lanes: int, calls: list[Call]) -> None:
    check_gradients(operands(('plus',), 50, 12, 20, 7), numbers(2, 50, 7, seed=30))
    assert 'gradients' in functions(calls)


def test_gradients_of_tensors_in_any_memory(calls: list[Call]) -> None:
    given = operands(('gelu_summed', 'plus'), 35, 12, 7)
    turned = converted(given, lambda t: t.mT.contiguous().mT if t.dim() > 1 else t)
    check_gradients(turned, numbers(2, 7, 35, seed=30).mT)
    check_gradients(turned, numbers(1, 1, 1, seed=30).expand(2, 35, 7))
    assert functions(calls).count('gradients') == 2


def test_gradients_of_no_pixels(calls: list[Call]) -> None:
    given = converted(operands(('norm', 'plus'), 0, 12, 7), Tensor.float)
    found = gradients_of(fused_linear, given, torch.zeros(2, 0, 7))
    assert [g.shape for g in found] == [t.shape for t in tensors_of(given)]
    assert not any(g.any() for g in found)
    assert 'gradients' in functions(calls)


def test_gradients_repeat_themselves(lanes: int) -> None:
    """To the bit: in another call, and with other threads."""
    given = converted(operands(('norm', 'gelu', 'plus'), 2001, 30, 40, 20), Tensor.float)
    grad = numbers(2, 2001, 20, seed=30).float()
    first, threads = gradients_of(fused_linear, given, grad), torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert all(map(torch.equal, gradients_of(fused_linear, given, grad), first))
    finally:
        torch.set_num_threads(threads)


def test_parameters_that_are_not_trained() -> None:
    given = converted(operands(('norm', 'plus'), 20, 12, 7), Tensor.float)
    with torch.enable_grad():
        weight = given['layers'][0][0].requires_grad_()
        fused_linear(**given).sum().backward()
    assert weight.grad is not None
    assert all(t.grad is None for t in tensors_of(given) if t is not weight)


def test_gradients_of_other_calls(calls: list[Call], monkeypatch: pytest.MonkeyPatch) -> None:
    """By PyTorch: with a norm behind the layers, of large weights, and where kernels are left out."""
    grad = numbers(2, 20, 9, seed=30)
    check_gradients(operands(('norm_after', 'plus'), 20, 12, 9), grad)
    given = operands(('norm', 'gelu', 'plus'), 20, 12, 7, 9)
    for target, name, value in ((module, 'MOST_WEIGHTS', 70), (fast, 'wanted', False)):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, value)
            check_gradients(given, grad)
    assert 'gradients' not in functions(calls)
    check_gradients(given, grad)
    assert 'gradients' in functions(calls)


def test_a_kernel_of_gradients_that_fails_is_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*arguments: object) -> None:
        raise RuntimeError('no such processor')

    monkeypatch.setattr(linear_gradients, 'kernel', fails)
    monkeypatch.setattr(fast, 'failed', set())
    with caplog.at_level(logging.WARNING, 'frugalsr'):
        for names in (('norm', 'gelu'), ('gelu_summed', 'plus')):
            check_gradients(operands(names, 20, 12, 7), numbers(2, 20, 7, seed=30))
    assert caplog.messages == ['The linear gradients runs without llvmlite, slower: RuntimeError: no such processor']
