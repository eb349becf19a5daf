import pytest
import torch
from torch import nn, optim

from optimizer import ModelEMA, Schedule, make_optimizer, set_learning_rate


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3), requires_grad=False), nn.Parameter(torch.ones(4))]


@pytest.mark.parametrize(
    'name, kind, expected',
    [
        ('SGD', optim.SGD, {'momentum': 0.7, 'nesterov': False}),
        ('ADAM', optim.Adam, {'betas': (0.8, 0.95), 'eps': 1e-6}),
        ('ADAMW', optim.AdamW, {'betas': (0.8, 0.95), 'eps': 1e-6}),
        ('RMSprop', optim.RMSprop, {'eps': 1e-6, 'momentum': 0}),
    ],
)
def test_class_and_hyperparameters(name, kind, expected):
    values = parameters()
    optimizer = make_optimizer(values, name, 0.02, 0.3, (0.8, 0.95), 1e-6, 0.7)
    assert type(optimizer) is kind
    (group,) = optimizer.param_groups
    expected |= {'lr': 0.02, 'weight_decay': 0.3}
    assert {key: group[key] for key in expected} == expected
    assert [id(p) for p in group['params']] == [id(values[0]), id(values[2])]  # the frozen one is left out


def test_a_first_step_that_is_left_out_leaves_nothing(monkeypatch):
    """As a GPU leaves it out, by a flag; what memory held before, here NaN, is no momentum."""
    x, plain = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, 'is_cuda', property(lambda _: True))
        optimizer = make_optimizer([x], 'SGD', 0.1)
    assert optimizer.param_groups[0]['fused']
    expected = make_optimizer([plain], 'SGD', 0.1)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    monkeypatch.setattr(torch.utils.deterministic, 'fill_uninitialized_memory', True)
    for left_out in (True, False, False):
        optimizer.grad_scale, optimizer.found_inf = None, torch.tensor(float(left_out))
        x.grad = plain.grad = torch.full((3,), 2.0)
        optimizer.step()
        if not left_out:
            expected.step()
        torch.testing.assert_close(x, plain)
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize('name', ['SGD', 'ADAM', 'ADAMW', 'RMSprop'])
def test_first_step_by_hand(name):
    """On x^2 / 2 from 1, so the gradient is 1; without weight decay."""
    x = nn.Parameter(torch.ones(1))
    optimizer = make_optimizer([x], name, 0.1)
    (x**2 / 2).sum().backward()
    optimizer.step()
    moved = {'SGD': 0.1, 'ADAM': 0.1, 'ADAMW': 0.1, 'RMSprop': 0.1 / 0.01**0.5}[name]
    assert x.item() == pytest.approx(1 - moved, abs=1e-6)


@pytest.mark.parametrize('unit', ['epochs', 'steps'])
@pytest.mark.parametrize('milestones', [[1], [3], [2, 4, 5], [1, 2, 3], [100]])
@pytest.mark.parametrize('gamma', [0.5, 0.1])
def test_step_schedule_is_that_of_pytorch(milestones, gamma, unit):
    optimizer = optim.SGD([nn.Parameter(torch.ones(1))], 0.03)
    theirs = optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma)
    ours = Schedule(0.03, 'step', milestones, gamma, unit)
    for done in range(8):
        place = (done, 7 * done) if unit == 'epochs' else (done // 3, done)
        assert ours(*place) == pytest.approx(theirs.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize('unit', ['epochs', 'steps'])
def test_cosine_schedule_is_that_of_pytorch(unit):
    optimizer = optim.SGD([nn.Parameter(torch.ones(1))], 0.03)
    theirs = optim.lr_scheduler.CosineAnnealingLR(optimizer, 6, eta_min=0.01)
    ours = Schedule(0.03, 'cosine', unit=unit, total=6, lr_min=0.01)
    for done in range(7):
        place = (done, 7 * done) if unit == 'epochs' else (done // 3, done)
        assert ours(*place) == pytest.approx(theirs.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        theirs.step()
    assert ours(9, 9) == pytest.approx(0.01)


@pytest.mark.parametrize('unit', ['epochs', 'steps'])
def test_restarts_of_the_cosine_are_those_of_pytorch(unit):
    optimizer = optim.SGD([nn.Parameter(torch.ones(1))], 0.03)
    theirs = optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 5, eta_min=0.01)
    ours = Schedule(0.03, 'cosine', unit=unit, total=20, lr_min=0.01, restarts=3)
    for done in range(20):
        place = (done, 7 * done) if unit == 'epochs' else (done // 3, done)
        assert ours(*place) == pytest.approx(theirs.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        theirs.step()
    assert ours(20, 20) == ours(99, 99) == pytest.approx(0.01)


def test_set_learning_rate():
    optimizer = optim.SGD([{'params': [p]} for p in parameters()], 0.1)
    set_learning_rate(optimizer, 0.5)
    assert [group['lr'] for group in optimizer.param_groups] == [0.5, 0.5, 0.5]


def test_warm_up_rises_linearly_to_the_rate_of_the_schedule():
    schedule = Schedule(0.4, 'step', [2], 0.5, warmup=4)
    rates = [schedule(steps // 3, steps) for steps in range(9)]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4, 0.2, 0.2, 0.2])


def test_warm_up_meets_a_milestone():
    assert Schedule(0.4, 'step', [1], 0.5, warmup=4)(1, 2) == pytest.approx(0.15)


class Scaled(nn.Module):
    """A parameter, a frozen one, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, -2.0]))
        self.fixed = nn.Parameter(torch.tensor(5.0), requires_grad=False)
        self.register_buffer('count', torch.tensor(0))


def test_average_by_hand():
    net = Scaled()
    average = ModelEMA(net, 0.75)
    expected = torch.tensor([1.0, -2.0])
    for step in range(1, 6):
        with torch.no_grad():
            net.weight += step
            net.count += 1
        average.update()
        expected = 0.75 * expected + 0.25 * net.weight.detach()
    torch.testing.assert_close(average.state['weight'], expected)
    assert average.state['fixed'] == 5
    assert average.state['count'] == 5


def test_average_is_applied_and_taken_back():
    net = Scaled()
    average = ModelEMA(net, 0.75)
    with torch.no_grad():
        net.weight += 4
    average.update()
    with pytest.raises(KeyError), average.applied():
        assert net.weight.tolist() == [2.0, -1.0]
        raise KeyError
    assert net.weight.tolist() == [5.0, 2.0]
    assert average.state['weight'].tolist() == [2.0, -1.0]


def test_average_continues_from_a_saved_one():
    first, second = (ModelEMA(Scaled(), 0.75) for _ in range(2))
    saved = {key: value + 1 for key, value in first.state.items()}
    second.load(saved)
    assert all(torch.equal(second.state[key], saved[key]) for key in saved)
    second.update()
    torch.testing.assert_close(second.state['weight'], torch.tensor([1.75, -1.25]))
    assert saved['weight'].tolist() == [2.0, -1.0]  # copied, not shared
