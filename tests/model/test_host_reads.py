"""No network makes the host wait for a GPU, or copies from the host, which a CUDA graph cannot hold."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import l1_loss
from torch.utils._python_dispatch import TorchDispatchMode

from tests.model.test_networks import SMALL, images, small

# What reads a value, or what has as many values as the data says; and what brings a list of the host into a tensor.
READS = {'_local_scalar_dense', 'is_nonzero', 'nonzero', 'equal', 'masked_select', 'unique', '_unique2', 'lift_fresh'}

# Networks that read nevertheless, and why; none now.
EXCUSED: dict[str, str] = {}


class NoReads(TorchDispatchMode):
    """Refuses operations that a GPU would be waited for."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation._schema.name.removeprefix('aten::')
        assert name not in READS, f'{name}: the host waits for it'
        if name.startswith('index'):
            masks = [x for x in args[1] or () if isinstance(x, Tensor)] if isinstance(args[1], list | tuple) else []
            assert not any(mask.dtype in (torch.bool, torch.uint8) for mask in masks), f'{name} by a mask'
        return operation(*args, **(kwargs or {}))


def waits(call) -> bool:
    """Whether a call does what it should not."""
    try:
        with NoReads():
            call()
    except AssertionError:
        return True
    return False


def test_what_is_refused():
    x = torch.rand(4, 4)
    assert waits(lambda: x.sum().item())
    assert waits(lambda: x.nonzero())
    assert waits(lambda: x[x > 0.5])
    assert waits(lambda: x[[0, 2]])
    assert waits(lambda: bool(x[0, 0]))
    assert waits(lambda: torch.tensor([1, 2]))
    assert not waits(lambda: x.sort(stable=True)[0].index_select(0, torch.arange(2)))


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Attention by PyTorch's kernels; what is only for a CPU reads values."""
    monkeypatch.setattr('model.blocks.windows.CACHED_LOGITS', 0)
    monkeypatch.setattr('model.blocks.tokens.COUNTED', 0)
    monkeypatch.setattr('model.ops.kept_attention.is_plain', lambda x: True)


@pytest.mark.parametrize('name', [name for name in SMALL if name not in EXCUSED])
def test_evaluation(as_on_a_gpu, name):
    """After the first pass, in which LCoAN asks for its state; with gradients, without which DLGSANet has strips."""
    net, x = small(name).eval(), torch.rand(1, 3, 17, 10, dtype=torch.float64)
    expected = net(x)
    with NoReads():
        found = net(x)
    assert torch.equal(found, expected)


@pytest.mark.parametrize('name', SMALL)
def test_a_device_that_is_no_cpu_computes_the_same(name, monkeypatch):
    """By other operations in places, which only a GPU would run; results and gradients in double precision."""

    def both() -> list[Tensor]:
        net, x = small(name), images(2, 3, 17, 10)
        with torch.no_grad():
            found = net(x)
        net(x.requires_grad_()).square().sum().backward()
        return [found, x.grad, *(p.grad for p in net.parameters() if p.grad is not None)]

    expected = both()
    monkeypatch.setattr(Tensor, 'is_cpu', property(lambda _: False))
    for one, other in zip(both(), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize('name', [name for name in SMALL if name not in EXCUSED])
def test_training(as_on_a_gpu, name):
    net, x = small(name).train(), torch.rand(2, 3, 16, 16, dtype=torch.float64)
    net(x)
    with NoReads():
        y = net(x)
        l1_loss(y, torch.zeros_like(y)).backward()
    assert any(p.grad is not None for p in net.parameters())
