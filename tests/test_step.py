"""One step of training, as it is made on a GPU: the optimiser itself leaves out what is not to be learned from."""

import math
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from data.traindata import Sample
from loss import Loss
from model import Model
from muon import hidden_matrices
from optimizer import ModelEMA, load_optimizer, make_optimizer
from step import TrainStep

RATE = 1e-3


def batch(seed: int, size: int = 4) -> Sample:
    """Random LR patches of 8 and HR patches of 16 pixels; the second sample stands for another."""
    rng = torch.Generator().manual_seed(seed)
    lr, hr = (torch.randint(0, 256, (size, 3, side, side), dtype=torch.uint8, generator=rng) for side in (8, 16))
    flips = torch.rand(size, 3, generator=rng) < 0.5
    return Sample(lr, hr, flips, torch.arange(size) == 1)


def make_step(fused: bool, name: str = 'ADAM', **more: object) -> TrainStep:
    """A step of a small network, with an optimiser that is fused as on a GPU or not."""
    torch.manual_seed(0)
    model = Model('EDSR-baseline', 2, n_resblocks=1, n_feats=8, rgb_range=1.0)
    optimizer = make_optimizer(model.parameters(), name, RATE, matrices=hidden_matrices(model.net))
    if fused:
        for settings in (*optimizer.param_groups, optimizer.defaults):
            settings['fused'] = True
    return TrainStep(model, Loss('1*L1'), optimizer, 4, ema_decay=0.9, **more)


def weights(step: TrainStep) -> Tensor:
    return torch.cat([p.detach().flatten() for p in step.model.net.parameters()])


def average(step: TrainStep) -> Tensor:
    return torch.cat([step.ema.state[key].flatten() for key, _ in step.model.net.named_parameters()])


def values(step: TrainStep, sample: Sample, rate: float = RATE) -> dict[str, float]:
    return dict(zip(step.names, step(sample, rate).tolist(), strict=True))


@pytest.mark.parametrize('name', ['ADAM', 'ADAMW', 'SGD'])
@pytest.mark.parametrize('more', [{}, {'clip': 1e-3}, {'clip_norm': 0.1}, {'accumulation': 3}])
def test_a_step_that_decides_itself_equals_one_that_asks(name: str, more: dict) -> None:
    asks, decides = make_step(False, name, **more), make_step(True, name, **more)
    assert (asks.decides_itself, decides.decides_itself) == (False, True)
    start = weights(asks)
    for seed, limit in enumerate([math.inf, 1e-9, math.inf, math.inf]):  # the second batch is skipped
        for step in (asks, decides):
            step.limit.fill_(limit)
        one, other = (values(step, batch(seed), rate=RATE / (seed + 1)) for step in (asks, decides))
        assert one['applied'] == other['applied'] == (limit == math.inf)
        assert one['total'] == pytest.approx(other['total'], rel=1e-5)
        assert one['replaced'] == other['replaced'] == 1
    assert not torch.equal(weights(asks), start)
    assert torch.allclose(weights(asks), weights(decides), rtol=0, atol=1e-6)
    assert torch.allclose(average(asks), average(decides), rtol=0, atol=1e-6)


def test_gradients_beyond_float16_are_no_step() -> None:
    step = make_step(False, dtype=torch.float16)
    step.scaler = torch.amp.GradScaler('cpu', init_scale=2.0**4)
    start = weights(step)
    assert values(step, batch(0))['applied'] == 1
    moved, mean = weights(step), average(step)
    assert torch.allclose(mean, start + 0.1 * (moved - start), rtol=0, atol=1e-7)
    step.scaler = torch.amp.GradScaler('cpu', init_scale=2.0**60)
    found = values(step, batch(0))
    assert (math.isfinite(found['total']), math.isfinite(found['gradient_norm']), found['applied']) == (True, False, 0)
    assert torch.equal(weights(step), moved)
    assert torch.equal(average(step), mean)


@pytest.mark.parametrize('bad', [math.nan, math.inf])
@pytest.mark.parametrize('fused', [False, True])
def test_a_loss_that_is_not_finite_changes_nothing(monkeypatch: pytest.MonkeyPatch, fused: bool, bad: float) -> None:
    step = make_step(fused, 'ADAM')
    values(step, batch(0))
    before = weights(step), average(step), [s['step'].item() for s in step.optimizer.state.values()]
    monkeypatch.setattr(step.loss, 'weights', {'L1': bad})
    assert values(step, batch(1))['applied'] == 0
    after = weights(step), average(step), [s['step'].item() for s in step.optimizer.state.values()]
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])
    assert before[2] == after[2]


@pytest.mark.parametrize('more', [{}, {'clip': 1e-3, 'clip_norm': 0.1, 'accumulation': 3}])
def test_muon_steps_as_if_a_skipped_batch_had_not_been(more: dict) -> None:
    skips, other = make_step(True, 'MUON', **more), make_step(True, 'MUON', **more)
    assert make_step(False, 'MUON').decides_itself  # also on a CPU
    start = weights(skips)
    for seed, limit in enumerate([math.inf, 1e-9, math.inf, math.inf]):
        skips.limit.fill_(limit)
        applied = values(skips, batch(seed))['applied']
        assert applied == (limit == math.inf)
        if applied:
            values(other, batch(seed))
    assert torch.equal(weights(skips), weights(other))
    assert torch.equal(average(skips), average(other))
    assert not torch.equal(weights(skips), start)


def test_another_loss_and_batch_size_from_a_step_on() -> None:
    step = make_step(False)
    values(step, batch(0))
    loss = Loss('1*MSE+1*L1')
    step.change(loss, 2)
    sample = batch(1, 2)._replace(flips=torch.zeros(2, 3, dtype=torch.bool))
    net, hr = step.model, step.model.to_range(sample.hr)
    expected = (net(sample.lr) - hr).square().mean().item(), (net(sample.lr) - hr).abs().mean().item()
    found = values(step, sample)
    assert list(found) == ['MSE', 'L1', 'total', 'gradient_norm', 'replaced', 'applied']
    assert (found['MSE'], found['L1']) == pytest.approx(expected, rel=1e-5)


def test_the_norm_is_that_of_all_gradients_before_they_are_clipped() -> None:
    step, sample = make_step(False, 'SGD', clip_norm=1e-6), batch(0)
    upright = sample._replace(flips=torch.zeros(4, 3, dtype=torch.bool))
    net = make_step(False).model
    (net(upright.lr) - net.to_range(upright.hr)).abs().mean().backward()
    expected = math.sqrt(sum(float(p.grad.square().sum()) for p in net.net.parameters() if p.grad is not None))
    assert values(step, upright)['gradient_norm'] == pytest.approx(expected, rel=1e-5)


def test_the_number_of_steps_is_written_where_a_graph_would_read_it() -> None:
    step = make_step(False)
    place = step.number.data_ptr()
    for number in (7, 8):
        step(batch(0), RATE, number)
        assert (step.number.item(), step.number.data_ptr()) == (number, place)


def test_an_average_with_a_flag_equals_one_without() -> None:
    net = nn.Linear(3, 2)
    one, other, still = ModelEMA(net, 0.75), ModelEMA(net, 0.75), ModelEMA(net, 0.75)
    with torch.no_grad():
        net.weight.add_(1)
    one.update()
    other.update(torch.tensor(True))
    still.update(torch.tensor(False))
    assert torch.allclose(one.state['weight'], other.state['weight'], rtol=1e-6)
    assert torch.allclose(still.state['weight'], net.weight.detach() - 1, rtol=0, atol=1e-6)


def test_a_state_fits_an_optimiser_of_either_kind() -> None:
    """The counter of steps of a fused one is on its device, and what hyperparameters a state holds is not taken."""
    for source, target in ((False, True), (True, False)):
        one, other = make_step(source), make_step(target)
        values(one, batch(0))
        load_optimizer(other.optimizer, deepcopy(one.optimizer.state_dict()))
        assert bool(other.optimizer.param_groups[0]['fused']) == target
        other.model.load_state_dict(one.model.state_dict())
        for step in (one, other):
            values(step, batch(1))
        assert torch.allclose(weights(one), weights(other), rtol=0, atol=1e-6)
