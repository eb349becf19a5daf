"""Muon against singular value decompositions and PyTorch's AdamW, and which weights of the networks it takes."""

import io
import math
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn, optim

from model.common import stacked
from muon import Muon, hidden_matrices, orthogonalised
from optimizer import load_optimizer, make_optimizer
from tests.conftest import numbers
from tests.model.test_networks import SMALL, small

SHAPES = [(5, 5), (4, 9), (12, 3), (1, 6)]


def polar(matrices: Tensor) -> Tensor:
    """U p(S) V^T by singular value decomposition, where p is what the iteration makes of a singular value."""
    u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
    s = s / s.square().sum(-1, keepdim=True).sqrt()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ torch.diag_embed(s) @ vh


@pytest.mark.parametrize('shape', SHAPES)
def test_orthogonalised_against_singular_values(shape):
    matrices = numbers(3, *shape)
    found = orthogonalised(matrices)
    torch.testing.assert_close(found, polar(matrices), rtol=0, atol=1e-9)
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.6
    assert values.max() < 1.25
    torch.testing.assert_close(orthogonalised(1e-9 * matrices), found, rtol=0, atol=1e-9)
    assert torch.equal(orthogonalised(0 * matrices), 0 * matrices)


def given(*gradients: Tensor) -> list[nn.Parameter]:
    """Parameters of ones with these gradients."""
    parameters = [nn.Parameter(torch.ones_like(gradient)) for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    return parameters


@pytest.mark.parametrize('shape', SHAPES)
def test_two_steps_by_hand(shape):
    """Nesterov: the second step goes along the mean of the second gradient and of the momentum after it."""
    first, second = numbers(2, *shape)
    (p,) = given(first)
    optimizer = Muon([p], {p: 1}, lr=0.1, weight_decay=0.5, momentum=0.75)
    length = 0.1 * 0.2 * math.sqrt(max(shape))
    optimizer.step()
    expected = 0.95 - length * polar(first)
    torch.testing.assert_close(p.detach(), expected, rtol=0, atol=1e-9)
    p.grad = second.clone()
    optimizer.step()
    momentum = 0.75 * 0.25 * first + 0.25 * second
    expected = 0.95 * expected - length * polar(0.25 * second + 0.75 * momentum)
    torch.testing.assert_close(p.detach(), expected, rtol=0, atol=1e-9)


def test_a_step_is_as_long_as_one_of_adam():
    (p,) = given(numbers(48, 432).float())
    Muon([p], {p: 1}, lr=1e-3).step()
    moved = (p.detach() - 1).square().mean().sqrt().item()
    assert moved == pytest.approx(2e-4, rel=0.15)


def test_parts_of_a_stack_are_taken_apart():
    gradients = numbers(3, 4, 6)
    gradients[1] *= 100  # which in one matrix would outweigh the others
    (whole,), parts = given(gradients.flatten(0, 1)), given(*gradients)
    Muon([whole], {whole: 3}, lr=0.1).step()
    Muon(parts, dict.fromkeys(parts, 1), lr=0.1).step()
    assert len(Muon(parts, dict.fromkeys(parts, 1), lr=0.1).param_groups) == 1
    torch.testing.assert_close(whole.detach(), torch.cat([p.detach() for p in parts]), rtol=0, atol=1e-12)


def test_a_convolution_is_a_matrix_of_its_outputs():
    gradient = numbers(4, 5, 3, 3)
    kernel, matrix = given(gradient, gradient.flatten(1))
    kernel.grad = gradient.contiguous(memory_format=torch.channels_last)
    Muon([kernel, matrix], {kernel: 1, matrix: 1}, lr=0.1).step()
    torch.testing.assert_close(kernel.detach().flatten(1), matrix.detach(), rtol=0, atol=1e-12)
    assert kernel.detach().std() > 0


def test_the_rest_is_adamw():
    mine, theirs = ([nn.Parameter(numbers(n, 3).float()) for n in (1, 4)] for _ in range(2))
    unused = nn.Parameter(torch.ones(2))
    settings = {'lr': 0.01, 'weight_decay': 0.1, 'betas': (0.8, 0.9)}
    muon = Muon([*mine, unused], {}, epsilon=1e-6, **settings)
    adamw = optim.AdamW(theirs, eps=1e-6, **settings)
    for seed in range(4):
        for p, q in zip(mine, theirs, strict=True):
            p.grad, q.grad = (numbers(*p.shape, seed=seed).float() for _ in range(2))
        muon.step()
        adamw.step()
    for p, q in zip(mine, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)
    assert unused.tolist() == [1, 1]


# Layers of several matrices: queries, keys and values, gates and values, queries and values.
STACKS = {'qkv': 3, 'project_in': 2, 'qv.conv.4': 2, 'qv.linear': 2}
# The layers of the networks that take and give pixels.
ENDS = {
    **dict.fromkeys(('EDSR', 'RCAN', 'NLSN', 'LCoAN'), ('head.0', 'tail.1')),
    **dict.fromkeys(('ASID', 'OmniSR'), ('input', 'up.0')),
    **dict.fromkeys(('ATD', 'PAN'), ('conv_first', 'conv_last')),
    **dict.fromkeys(('ATD-light', 'SwinIR-light', 'HiT-SRF', 'PFT-light'), ('conv_first', 'upsample.0')),
    'CATANet': ('first_conv', 'last_conv'),
    **dict.fromkeys(('ESC', 'ESC-FP'), ('proj', 'to_img')),
    'DLGSANet': ('overlap_embed.0.proj', 'upsample.0'),
    'IMDN': ('fea_conv', 'upsampler.0'),
    'BSRN': ('upsampler.upsampleOneStep.0',),  # its first layer takes twelve channels, four copies of the image
}


class Net(nn.Module):
    """A layer of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Conv2d(8, 8, 1).requires_grad_(False)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.grouped = nn.Conv2d(8, 8, 3, groups=2)
        self.dense = nn.Conv2d(8, 8, 3)
        self.table = nn.Embedding(5, 4)
        self.qkv = stacked(3, nn.Linear(8, 24))
        self.twin = nn.Conv2d(8, 8, 3)
        self.norm = nn.LayerNorm(8)
        self.first = nn.Conv2d(3, 8, 3)
        self.last = nn.Conv2d(8, 12, 3)


def test_which_weights_are_matrices():
    net = Net()
    assert hidden_matrices(net) == {
        net.dense.weight: 1,
        net.qkv.weight: 3,
        net.twin.weight: 1,
    }


@pytest.mark.parametrize('name', SMALL)
def test_the_matrices_of_every_network(name):
    """All layers but the first, the last, and those with groups or few channels; what is stacked apart."""
    net = small(name)
    expected = {
        f'{key}.weight': next((parts for end, parts in STACKS.items() if key.endswith(end)), 1)
        for key, layer in net.named_modules()
        if isinstance(layer, nn.Conv2d | nn.Linear)
        and key not in ENDS[name]
        and getattr(layer, 'groups', 1) == 1
        and min(layer.weight.shape[:2]) > 3
        and layer.weight.requires_grad
    }
    found = hidden_matrices(net)
    assert {key: found[p] for key, p in net.named_parameters() if p in found} == expected


def train(net: Net, optimizer: optim.Optimizer, steps: range) -> list[Tensor]:
    """Steps along gradients that are those of the step's number; returns all weights."""
    for step in steps:
        rng = torch.Generator().manual_seed(step)
        for p in net.parameters():
            if p.requires_grad:
                p.grad = torch.randn(p.shape, generator=rng)
        optimizer.step()
    return [p.detach().clone() for p in net.parameters()]


def make(net: Net) -> optim.Optimizer:
    return make_optimizer(net.parameters(), 'MUON', 0.01, 0.1, matrices=hidden_matrices(net))


def test_momentum_is_that_of_muon_unless_given():
    p = nn.Parameter(torch.ones(2, 2))
    assert make_optimizer([p], 'MUON', 0.1).defaults['momentum'] == 0.95
    assert make_optimizer([p], 'MUON', 0.1, momentum=0.5).defaults['momentum'] == 0.5
    assert make_optimizer([p], 'SGD', 0.1).defaults['momentum'] == 0.9


def test_the_state_continues_to_the_bit():
    net = Net()
    start = deepcopy(net)
    expected = train(net, make(net), range(6))
    first = make(start)
    train(start, first, range(3))
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    second = make(start)
    load_optimizer(second, torch.load(buffer, weights_only=True))
    assert all(torch.equal(p, q) for p, q in zip(train(start, second, range(3, 6)), expected, strict=True))


def everything(net: Net, optimizer: optim.Optimizer) -> list[Tensor]:
    kept = [value for state in optimizer.state.values() for value in state.values()]
    return [tensor.detach().clone() for tensor in (*net.parameters(), *kept)]


@pytest.mark.parametrize('bad', [math.nan, math.inf, 1.0])
@pytest.mark.parametrize('at', [0, 2])
def test_a_step_is_left_out_by_the_flag(bad, at):
    """As if it had not been there, at the first step too."""
    net, other = Net(), Net()
    other.load_state_dict(net.state_dict())
    optimizer, plain = make(net), make(other)
    optimizer.found_inf = torch.zeros(())
    train(net, optimizer, range(at))
    before = everything(net, optimizer)
    for p in net.parameters():
        p.grad = torch.full_like(p, bad) if p.requires_grad else None
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    if at:
        assert all(torch.equal(a, b) for a, b in zip(everything(net, optimizer), before, strict=True))
    optimizer.found_inf = torch.zeros(())
    train(net, optimizer, range(at, 4))
    train(other, plain, range(4))
    for a, b in zip(everything(net, optimizer), everything(other, plain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_nothing_in_a_step_asks_the_device():
    """On meta there are no values to be had. The kernel of AdamW is PyTorch's own, and not to be run there."""
    with torch.device('meta'):
        p = nn.Parameter(torch.ones(6, 4))
        optimizer = Muon([p], {p: 3}, lr=0.1, weight_decay=0.1)
        optimizer.param_groups[0]['lr'] = torch.full((), 0.1)
        p.grad, optimizer.found_inf = torch.ones(6, 4), torch.zeros(())
        optimizer.step()
    assert optimizer.state[p]['momentum'].is_meta
