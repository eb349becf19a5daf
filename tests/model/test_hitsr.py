"""What is special to HiT-SRF, beside plain loops over tokens and offsets."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from error import UserError
from model import build
from model.common import reflect_pad
from model.hitsr import Correlation, PositionBias, recognise
from tests.conftest import numbers


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """In double precision, in evaluation and with weights of order one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.double().parameters():
            p.copy_(torch.randn(p.shape, dtype=torch.float64, generator=generator) / max(p[0].numel(), 1) ** 0.5)
    return module.eval()


def plain_offset(module: PositionBias, dy: int, dx: int) -> np.ndarray:
    """What the network makes of one offset: (heads,)."""
    w = {key: value.detach().numpy() for key, value in module.named_parameters()}
    x = w['pos_proj.weight'] @ np.array([dy, dx]) + w['pos_proj.bias']
    for step in ('pos1', 'pos2', 'pos3'):
        normed = (x - x.mean()) / np.sqrt(x.var() + 1e-5) * w[f'{step}.0.weight'] + w[f'{step}.0.bias']
        x = w[f'{step}.2.weight'] @ np.maximum(normed, 0) + w[f'{step}.2.bias']
    return x


# Windows and cells: cells of one pixel, of four, of four where a window has nine, a window of one cell.
WINDOWS = pytest.mark.parametrize('window, cell', [(3, 1), (4, 2), (6, 2), (3, 3)])


@WINDOWS
@torch.no_grad()
def test_the_bias_of_a_cell_is_the_mean_over_its_pixels(window: int, cell: int) -> None:
    module = randomised(PositionBias(2, window, cell))
    side = window // cell
    found = module().view(2, window, window, side, side)
    for y, x, row, column in np.ndindex(window, window, side, side):
        keys = [(row * cell + i, column * cell + j) for i in range(cell) for j in range(cell)]
        expected = np.mean([plain_offset(module, y - ky, x - kx) for ky, kx in keys], 0)
        assert np.abs(found[:, y, x, row, column].numpy() - expected).max() < 1e-12


def plain_correlation(qv: np.ndarray, module: Correlation) -> np.ndarray:
    """Both correlations of a window (T, C), with maps of every pair; two heads."""
    length, channels = qv.shape
    half, window, cell = channels // 2, module.window, module.cell
    d, side = half // 2, window // cell
    q, v = qv[:, :half], qv[:, half:]
    weight, shift = module.spatial_linear.weight[0].numpy(), module.spatial_linear.bias.item()
    cells = np.array([
        sum(weight[i * cell + j] * v[(row * cell + i) * window + column * cell + j] for i, j in np.ndindex(cell, cell))
        + shift
        for row, column in np.ndindex(side, side)
    ])  # fmt: skip
    bias, out = module.pos().numpy(), np.zeros_like(qv)
    for head in range(2):
        own = slice(head * d, (head + 1) * d)
        for i in range(length):
            maps = np.array([q[i, own] @ key / d for key in cells[:, own]]) + bias[head, i]
            out[i, own] = maps @ cells[:, own]
    for i in range(half):
        for j in range(half):
            out[:, half + i] += q[:, i] @ v[:, j] / length * v[:, j]
    return out


@WINDOWS
@pytest.mark.parametrize('size', [(1, 2), (2, 1)])  # in windows
@torch.no_grad()
def test_tokens_and_channels_are_correlated_within_windows(window: int, cell: int, size: tuple[int, int]) -> None:
    module = randomised(Correlation(8, 2, window, window // cell))
    assert module.cell == cell
    height, width = (count * window for count in size)
    qv = numbers(2, 8, height, width)
    found = module.correlate(qv)
    for image, row, column in np.ndindex(2, *size):
        own = (
            image,
            slice(None),
            slice(row * window, (row + 1) * window),
            slice(column * window, (column + 1) * window),
        )
        expected = plain_correlation(qv[own].flatten(1).T.numpy(), module)
        assert np.abs(found[own].flatten(1).T.numpy() - expected).max() < 1e-11


# Windows of 4 and 16 pixels: whole ones, oblong images, sides of one and two pixels, padding beyond a reflection.
@pytest.mark.parametrize('size', [(4, 8), (16, 16), (1, 5), (2, 1), (3, 9), (17, 6), (5, 33)])
@pytest.mark.parametrize('window', [4, 16])
@torch.no_grad()
def test_features_are_continued_by_reflection(window: int, size: tuple[int, int]) -> None:
    """The official code reflects, as numpy does, as often as it takes; a single pixel is repeated."""
    module, x = randomised(Correlation(8, 2, window, 4)), numbers(2, 8, *size)
    missing = [(0, 0), (0, 0), *((0, -side % window) for side in size)]
    padded = torch.from_numpy(np.pad(x.numpy(), missing, mode='reflect'))
    assert torch.equal(reflect_pad(x, window), padded)
    whole = module(padded).view(2, *padded.shape[2:], 8)[:, : size[0], : size[1]]
    torch.testing.assert_close(module(x), whole.reshape(2, -1, 8), rtol=0, atol=1e-12)


@torch.no_grad()
def test_queries_and_values_are_a_product_of_convolutions() -> None:
    features = randomised(Correlation(20, 2, 4, 4)).qv
    x, w = numbers(1, 20, 5, 6), features.state_dict()
    around = F.leaky_relu(F.conv2d(x, w['conv.0.weight'], w['conv.0.bias']), 0.2)
    around = F.leaky_relu(F.conv2d(around, w['conv.2.weight'], w['conv.2.bias'], padding=1), 0.2)
    around = F.conv2d(around, w['conv.4.weight'], w['conv.4.bias'])
    expected = around * F.conv2d(x, w['linear.weight'], w['linear.bias'])
    torch.testing.assert_close(features(x), expected, rtol=0, atol=1e-12)
    assert w['conv.0.weight'].shape[0] == 4  # a fifth of the channels


# The bias is kept for the weights that it is of.


def count_calls(module: PositionBias, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one whenever the bias is made."""
    calls, make = [], module.make
    monkeypatch.setattr(module, 'make', lambda *given: calls.append(1) or make(*given))
    return calls


@pytest.mark.parametrize('mode', [torch.no_grad, torch.inference_mode])
def test_the_bias_is_made_once(mode: type, monkeypatch: pytest.MonkeyPatch) -> None:
    module = randomised(PositionBias(2, 6, 2))
    calls = count_calls(module, monkeypatch)
    with mode():
        assert torch.equal(module(), module())
    with torch.no_grad():
        module()
    assert len(calls) == 1


def one_step(module: nn.Module) -> None:
    with torch.enable_grad():
        module().square().sum().backward()
    torch.optim.SGD(module.parameters(), 1e-3).step()


def of_another(module: nn.Module) -> None:
    module.load_state_dict(randomised(PositionBias(2, 6, 2), seed=1).state_dict())


def past_autograd(module: nn.Module) -> None:
    module.pos_proj.weight.data.mul_(2)


def other_tensors(module: nn.Module) -> None:
    module.pos3[2].bias.data = torch.full((2,), 7.0, dtype=torch.float64)


def by_vector(module: nn.Module) -> None:
    vector = nn.utils.parameters_to_vector(module.parameters())
    nn.utils.vector_to_parameters(1.1 * vector, module.parameters())


@pytest.mark.parametrize('change', [one_step, of_another, past_autograd, other_tensors, by_vector])
@torch.no_grad()
def test_the_bias_follows_its_weights(change) -> None:
    module = randomised(PositionBias(2, 6, 2))
    before = module()
    change(module)
    assert not torch.equal(module(), before)
    torch.testing.assert_close(module(), module.make(), rtol=0, atol=0)


@torch.no_grad()
def test_the_bias_is_of_the_type_of_its_weights() -> None:
    module = randomised(PositionBias(2, 6, 2))
    assert module().dtype == torch.float64
    assert module.float()().dtype == torch.float32
    torch.testing.assert_close(module(), module.make(), rtol=0, atol=0)


@torch.no_grad()
def test_a_copy_of_a_network_has_a_bias_of_its_own() -> None:
    module = randomised(PositionBias(2, 6, 2))
    before = module().clone()
    other = copy.deepcopy(module)
    past_autograd(other)
    assert not torch.equal(other(), before)
    assert torch.equal(module(), before)


def test_the_bias_is_no_part_of_the_weights() -> None:
    module = randomised(PositionBias(2, 6, 2))
    before = list(module.state_dict())
    with torch.no_grad():
        module()
    assert list(module.state_dict()) == before
    assert not list(module.buffers())


def test_the_bias_has_a_gradient_also_after_it_was_kept() -> None:
    module = randomised(PositionBias(2, 4, 2))
    with torch.no_grad():
        module()
    module().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in module.parameters())


def test_nothing_grows_with_the_square_of_a_window() -> None:
    """The largest tensor of a window of 64x64 pixels has a number for each pixel, cell and head."""
    most = 0

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            nonlocal most
            out = operation(*args, **(kwargs or {}))
            most = max(
                most, *(x.numel() for x in (out if isinstance(out, tuple) else (out,)) if isinstance(x, Tensor)), 0
            )
            return out

    module = Correlation(60, 6, 64, 8).eval()
    with torch.no_grad(), Sizes():
        module(torch.rand(1, 60, 64, 64))
    assert most == 4096 * 64 * 6


# Settings and weights.


@pytest.mark.parametrize(
    'settings, says',
    [
        ({'window_sizes': '8-20'}, 'window_sizes=8-20: 20 is no multiple of n_cells 8'),
        ({'window_sizes': '520'}, 'window_sizes=520: 520 with n_cells 8 would fill the memory'),
        ({'window_sizes': '65', 'n_cells': 65}, 'window_sizes=65: 65 with n_cells 65 would fill the memory'),
        ({'window_sizes': '4,8'}, 'window_sizes=4,8: whole numbers from 1 on with a dash between two'),
        ({'n_heads': 4}, '--n_heads 4: twice that does not divide --n_feats 60'),
        ({'n_cells': 0}, '--net n_cells=0: choose 1 or more'),
        ({'n_cells': -4}, '--net n_cells=-4: choose 1 or more'),
        ({'n_feats': 4, 'n_heads': 2}, '--n_feats 4: a fifth of them makes the queries, so choose 5 or more'),
    ],
)
def test_settings_that_make_no_network(settings: dict, says: str) -> None:
    with pytest.raises(UserError, match=says), torch.device('meta'):
        build('HiT-SRF', 2, **settings)


def test_windows_by_turns() -> None:
    with torch.device('meta'):
        net = build('HiT-SRF', 2, n_resblocks=3, window_sizes='2-8', n_cells=4)
    found = [layer.correlation for layer in net.layers[0].residual_group.blocks]
    assert [(layer.window, layer.cell) for layer in found] == [(2, 1), (8, 2), (2, 1)]


def test_the_windows_of_the_paper() -> None:
    with torch.device('meta'):
        net = build('HiT-SRF', 2)
    found = [layer.correlation for layer in net.layers[3].residual_group.blocks]
    assert [(layer.window, layer.cell) for layer in found] == [(4, 1), (8, 1), (16, 2), (32, 4), (48, 6), (64, 8)]


def test_weights_show_windows_that_are_not_the_papers() -> None:
    with torch.device('meta'):
        states = [
            build('HiT-SRF', 2, **more).state_dict() for more in ({}, {'window_sizes': '16-24', 'n_resblocks': 2})
        ]
    assert 'window_sizes' not in recognise(states[0])
    assert recognise(states[1])['window_sizes'] == '16-24'
