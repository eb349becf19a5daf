"""Training runs of main.py on a GPU. All run in the background."""

from typing import Any

import pytest
import torch

from tests.gpu import programs
from tests.gpu.parts import CUDA, background, chosen, note
from tests.gpu.programs import Run

# A recorded step has to follow a rate that changes, averages, clipping, scaled gradients, centroids, and other shapes.
GRAPHS = {
    'ASID': '--optimizer ADAMW --weight_decay 1e-4 --decay 1-2 --gamma 0.25 --lr 5e-4',
    'ATD-light': '--optimizer ADAMW --betas 0.9 0.9 --weight_ema 0.99 --warmup 8 --lr 5e-4',
    'DLGSANet-tiny': '--weight_ema 0.99 --decay 1 --gamma 0.1 --lr 5e-4',
    'LCoAN': '--gclip 0.01 --lr 5e-4',
    'OmniSR': '--optimizer ADAMW --split_batch 2 --clip_norm 0.1 --lr 5e-4 --patch_schedule 16-24',
    'EDSR-baseline': '--optimizer SGD --lr 1e-4',
    'SwinIR-light': '--drop_path 0 --optimizer MUON --weight_decay 0.01 --lr 2e-4',
    'CATANet': '--betas 0.9 0.99 --lr 2e-4',
    'HiT-SRF': '--betas 0.9 0.99 --lr 5e-4',
}
LOW = {
    'ASID': '--amp bf16 --optimizer ADAMW --lr 5e-4',
    'LCoAN': '--amp fp16 --lr 5e-4',
    'DLGSANet-tiny': '--amp bf16 --channels_last --lr 5e-4',
}


def relative(found: float, truth: float) -> float:
    return abs(found - truth) / abs(truth)


def in_background(function: Any, *arguments: Any, name: str) -> Any:
    return pytest.param(name, marks=background(function, *arguments), id=name)


def apart(first: Run, second: Run) -> float:
    """Distance of the weights, relative to how far they are from zero."""
    truth = second.weights()
    both = [(first.weights()[key].double(), value.double()) for key, value in truth.items()]
    gone = sum((a - b).square().sum() for a, b in both).sqrt()
    return float(gone / sum(b.square().sum() for _, b in both).sqrt())


def compare(what: str, name: str, first: Run, second: Run, tolerance: float) -> None:
    """Losses after each step and epoch, scores, and weights."""
    assert len(second.losses) == len(first.losses) == 3
    assert len(second.progress) == len(first.progress) == 12
    losses = max(map(relative, first.losses, second.losses))
    steps = max(map(relative, first.progress, second.progress))
    psnr = max(abs(a - b) for a, b in zip(first.psnr, second.psnr, strict=True))
    learned = relative(second.losses[0], second.losses[-1])
    note(what, network=name, losses=losses, steps=steps, psnr=psnr, weights=apart(first, second), learned=learned)
    assert losses < tolerance
    assert steps < tolerance + 1e-4  # printed with five digits
    assert psnr < 0.05
    assert apart(first, second) < 10 * tolerance
    assert learned > 3 * tolerance  # else equal losses would show nothing


@pytest.mark.parametrize(
    'name', [in_background(programs.graph_and_not, name, GRAPHS[name], name=name) for name in chosen(list(GRAPHS))]
)
def test_a_recorded_step_learns_the_same(name: str, result: tuple[Run, Run]) -> None:
    compare('graph', name, *result, tolerance=1e-4)


@pytest.mark.parametrize(
    'name', [in_background(programs.graph_and_not, name, LOW[name], name=name) for name in chosen(list(LOW))]
)
def test_a_recorded_step_learns_the_same_in_half_precision(name: str, result: tuple[Run, Run]) -> None:
    compare('graph, half', name, *result, tolerance=2e-3)


@pytest.mark.parametrize(
    'name', [in_background(programs.broken_and_not, name, name=name) for name in chosen(['ASID', 'LCoAN'])]
)
def test_a_continued_run_equals_an_unbroken_one_to_the_bit(name: str, result: tuple[Run, Run]) -> None:
    whole, parts = result
    differing = [
        key for key, value in whole.state['model'].items() if not torch.equal(value, parts.state['model'][key])
    ]
    note('continued', network=name, differing=len(differing), of=len(whole.state['model']))
    assert not differing
    assert parts.losses == whole.losses
    assert len(whole.losses) == 2
    for key, value in whole.state['average'].items():
        assert torch.equal(parts.state['average'][key], value), key
    assert parts.psnr == whole.psnr


@background(programs.loaded_in_processes)
def test_processes_load_what_one_loads(result: tuple[Run, Run]) -> None:
    """By pinned memory; and they end in good order."""
    several, one = result
    assert several.losses == one.losses
    assert all(torch.equal(value, one.state['model'][key]) for key, value in several.state['model'].items())
    assert 'Traceback' not in several.text


@pytest.mark.skipif(not programs.has('--max_time'), reason='main.py has no --max_time')
@background(programs.ended_by_the_clock)
def test_the_clock_ends_a_run_in_good_order(result: tuple[Run, float]) -> None:
    run, seconds = result
    note('max_time', seconds=seconds, steps=run.state['step'])
    assert run.state['step'] > 0
    assert 10 < seconds < 90
    assert 'continues' in run.text
    weights = torch.load(run.folder / 'model' / 'model_latest.pt', weights_only=True)
    assert {value.device.type for value in weights.values()} == {'cpu'}  # any machine opens them


@background(programs.group_of_one)
def test_a_group_of_processes_computes_what_one_does(result: dict[str, Any]) -> None:
    note('group', **result)
    assert result['backend'] == ('nccl' if CUDA else 'gloo')
    assert result['apart'] < 0.01 * result['moved']
    assert result['total'] == [1.5, -2.0]
    assert (result['gather'][0], result['spread'], result['rank']) == ({'a': 1}, ['b', 2], 0)


@pytest.mark.parametrize(
    'name', [in_background(programs.run_in_a_group_of_one, name, name=name) for name in chosen(['LCoAN'])]
)
def test_a_run_in_a_group_learns_the_same(name: str, result: tuple[Run, Run]) -> None:
    compare('grouped', name, *result, tolerance=1e-4)
