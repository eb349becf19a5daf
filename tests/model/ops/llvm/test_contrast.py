"""Mean plus deviation of channels by a kernel, against PyTorch's of the same numbers in float64."""

import pytest
import torch
import torch.nn.functional as F

from model.blocks.pixels import ContrastAttention
from model.ops.llvm import contrast as kernels
from tests.conftest import numbers
from tests.model.ops.conftest import Call

pytestmark = pytest.mark.usefixtures('no_gradients')
KERNELS = (kernels,)
CALLED = ((kernels, 'contrast'),)


@pytest.mark.parametrize('offset', [0.5, -300.0])  # of which the latter leaves few digits to a sum of squares
@pytest.mark.parametrize('channels', [1, 5, 16, 64, 70])
@pytest.mark.parametrize('size', [(1, 1, 1), (2, 3, 7), (2, 33, 65)])
def test_equals_sums_in_float64(size: tuple[int, int, int], channels: int, offset: float, lanes: int) -> None:
    images, *sides = size
    x = (numbers(images, channels, *sides) + offset).float()
    x[:, 0] = offset
    wide = F.pad(x, (0, 0, 0, 0, 3, 5), value=torch.nan).to(memory_format=torch.channels_last)[:, 3:-5]
    deviation, mean = torch.std_mean(x.double(), (2, 3), correction=0, keepdim=True)
    for maps in (x, x.to(memory_format=torch.channels_last), wide):
        found = kernels.contrast(maps)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), mean + deviation, rtol=1e-6, atol=1e-6)
    assert torch.equal(kernels.contrast(x[:, :1]).flatten(), x[:, 0, 0, 0])


def test_attention_to_contrast_takes_it_where_it_can(calls: list[Call]) -> None:
    torch.manual_seed(0)
    layer, x = ContrastAttention(32), numbers(2, 32, 9, 8).float()
    truth = layer.double()(x.double(), plus=x.double())
    torch.testing.assert_close(truth, x + layer(x.double()))
    assert not calls
    torch.testing.assert_close(layer.float()(x, plus=x).double(), truth, rtol=0, atol=1e-6)
    assert len(calls) == 1
    with torch.autocast('cpu', torch.bfloat16):
        found = layer(x.bfloat16(), plus=x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), truth, rtol=0, atol=0.05)
    by_kernel, by_plain = x.clone().requires_grad_(), x.double().requires_grad_()
    with torch.enable_grad():
        layer(by_kernel, plus=by_kernel).sum().backward()
        layer.double()(by_plain, plus=by_plain).sum().backward()
    torch.testing.assert_close(by_kernel.grad.double(), by_plain.grad, rtol=0, atol=1e-5)
    assert len(calls) == 1
