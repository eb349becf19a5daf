"""Networks on a GPU give what the official code gave on a CPU, and learn what they learn there."""

import copy

import pytest
import torch
from torch import Tensor, nn

from tests.gpu.parts import ALL, DEVICE, LIGHT, REHEARSE, SORTING, Recorded, chosen, distance, note

TOLERANCE = 1e-4  # of the largest value
NEAR_TIES = 0.02  # share of the pixels that a few other choices of a sorting network may reach
CASES = [(name, 2) for name in chosen(ALL)]
CASES += [] if REHEARSE else [(name, scale) for name in chosen(LIGHT) for scale in (3, 4)]
SIDE = 12 if REHEARSE else 16
FIXED = {'SwinIR-light': {'drop_path': 0.0}}  # else it draws


@pytest.mark.parametrize(('name', 'scale'), CASES)
@torch.no_grad()
def test_equals_the_recorded_outputs(name: str, scale: int) -> None:
    recorded = Recorded(name, scale)
    net = recorded.network().to(DEVICE).eval()
    for x, truth in recorded.cases():
        y, again = net(x.to(DEVICE)), net(x.to(DEVICE))
        assert y.shape == truth.shape
        assert y.isfinite().all()
        error = (y.cpu().double() - truth.double()).abs().amax(1) / truth.double().abs().max()
        beyond = (error > TOLERANCE).double().mean().item()
        size = f'{x.shape[3]}x{x.shape[2]}'
        note(
            'parity', network=f'{name} x{scale}', size=size, worst=error.max().item(), beyond=beyond,
            repeats=torch.equal(y, again),
        )  # fmt: skip
        assert beyond <= (NEAR_TIES if name in SORTING else 0)


def gradients(net: nn.Module, x: Tensor, target: Tensor, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Of a training step, and its loss."""
    net = copy.deepcopy(net).to(device, dtype)
    net.train(type(net).__name__ != 'NLSN')  # which draws other directions in each step
    y = net(x.to(device, dtype))
    # A loss without kinks, at which rounding would decide.
    loss = (y / target.max() - target.to(y) / target.max()).square().mean()
    loss.backward()
    found = {key: p.grad.cpu().double() for key, p in net.named_parameters() if p.grad is not None}
    return found | {'loss': loss.detach().cpu().double()}


def worst(found: dict[str, Tensor], truth: dict[str, Tensor]) -> tuple[float, str]:
    """Largest distance of a gradient relative to its norm, and whose; small ones relative to the largest."""
    assert found.keys() == truth.keys()
    floor = 1e-3 * max(grad.norm().item() for key, grad in truth.items() if key != 'loss')
    return max(((found[key] - grad).norm().item() / max(grad.norm().item(), floor), key) for key, grad in truth.items())


@pytest.mark.parametrize('name', chosen(ALL))
def test_gradients_are_those_of_the_cpu(name: str) -> None:
    """In float64, where nothing is a near tie, to its precision; in float32 as near to that as on a CPU."""
    recorded = Recorded(name, 2)
    net = recorded.network(**FIXED.get(name, {}))
    draw = torch.Generator().manual_seed(1)
    x = torch.rand(2, 3, SIDE, SIDE, generator=draw) * recorded.range
    target = torch.rand(2, 3, 2 * SIDE, 2 * SIDE, generator=draw) * recorded.range
    truth = gradients(net, x, target, 'cpu', torch.float64)
    assert len(truth) > 10
    error, where = worst(gradients(net, x, target, DEVICE, torch.float64), truth)
    single, where_single = worst(gradients(net, x, target, DEVICE, torch.float32), truth)
    on_cpu, _ = worst(gradients(net, x, target, 'cpu', torch.float32), truth)
    note('gradients', network=name, float64=error, float32=single, float32_on_cpu=on_cpu, where=where_single)
    assert error < 1e-7, where
    if name not in SORTING:
        # Where a value is next to zero, rounding decides on which side of the kink of a ReLU it lies.
        assert single < max(1e-3, 10 * on_cpu), where_single


@pytest.mark.parametrize('name', chosen(SORTING))
@torch.no_grad()
def test_double_precision_leaves_no_choice_open(name: str) -> None:
    """What float32 leaves to near ties: here the sorting networks have to agree to the last digits."""
    recorded = Recorded(name, 2)
    net = recorded.network().double().eval()
    x, _ = next(recorded.cases())
    truth = net(x.double())
    found = net.to(DEVICE)(x.double().to(DEVICE))
    note('double', network=name, distance=(error := distance(found, truth)))
    assert error < 1e-9
