import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from error import UserError
from model import build
from model.common import activation, conv, reflect_pad, rgb_to_ycbcr, ycbcr_to_rgb

# 8-bit values of MATLAB's rgb2ycbcr before it rounds them.
COLOURS = {
    'white': ((1, 1, 1), (235, 128, 128)),
    'black': ((0, 0, 0), (16, 128, 128)),
    'red': ((1, 0, 0), (81.481, 90.203, 240)),
    'green': ((0, 1, 0), (144.553, 53.797, 34.214)),
    'blue': ((0, 0, 1), (40.966, 240, 109.786)),
}


def pixel(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1)


@pytest.mark.parametrize(('rgb', 'expected'), COLOURS.values(), ids=COLOURS)
def test_ycbcr_of_known_colours(rgb: tuple[float, ...], expected: tuple[float, ...]) -> None:
    ycbcr = rgb_to_ycbcr(pixel(*rgb)).flatten() * 255
    assert ycbcr.tolist() == pytest.approx(expected, abs=1e-9)


def test_ycbcr_round_trip_is_finer_than_16_bits() -> None:
    rgb = torch.rand(2, 3, 40, 50, generator=torch.Generator().manual_seed(0))
    assert (ycbcr_to_rgb(rgb_to_ycbcr(rgb)) - rgb).abs().max() < 0.5 / 65535


@pytest.mark.parametrize(
    ('name', 'at_minus_one'),
    [
        ('relu', 0.0),
        ('leaky_relu', -0.2),
        ('prelu', -0.25),
        ('gelu', -0.5 * math.erfc(math.sqrt(0.5))),
        ('silu', -1 / (1 + math.e)),
    ],
)
def test_activations(name: str, at_minus_one: float) -> None:
    assert activation(name)(torch.tensor([-1.0])).item() == pytest.approx(at_minus_one, abs=1e-6)


def test_unknown_activation_names_the_known() -> None:
    with pytest.raises(UserError, match=r"'swish'.*relu, leaky_relu, prelu, gelu, silu"):
        activation('swish')


@pytest.mark.parametrize('kernel_size', [1, 3, 5])
@pytest.mark.parametrize('dilation', [1, 2, 3])
@pytest.mark.parametrize('size', [(1, 1), (2, 7)])
def test_convolution_keeps_the_size(kernel_size: int, dilation: int, size: tuple[int, int]) -> None:
    assert conv(2, 5, kernel_size, dilation=dilation)(torch.zeros(1, 2, *size)).shape == (1, 5, *size)


@pytest.mark.parametrize('size', [(5, 7), (8, 9), (16, 6)])
@pytest.mark.parametrize('memory', [torch.contiguous_format, torch.channels_last])
def test_reflection_as_pytorch_has_it(size: tuple[int, int], memory: torch.memory_format) -> None:
    x = torch.rand(2, 3, *size).contiguous(memory_format=memory)
    found = reflect_pad(x, 8)
    assert torch.equal(found, F.pad(x, (0, -size[1] % 8, 0, -size[0] % 8), 'reflect'))
    assert found.is_contiguous(memory_format=memory)


@pytest.mark.parametrize('memory', [torch.contiguous_format, torch.channels_last])
@pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore::torch.jit.TracerWarning')
def test_a_trace_of_the_reflection_takes_other_sizes(memory: torch.memory_format) -> None:
    def fast(height: int, width: int) -> Tensor:
        return torch.rand(1, 3, height, width).contiguous(memory_format=memory)

    traced = torch.jit.trace(lambda x: reflect_pad(x, 8), fast(37, 59), check_trace=False)
    for size in ((24, 40), (30, 33)):
        x = fast(*size)
        assert torch.equal(traced(x), F.pad(x, (0, -size[1] % 8, 0, -size[0] % 8), 'reflect'))


@pytest.mark.parametrize(
    ('n', 'expected'),
    [(1, '0000000'), (2, '0101010'), (3, '0121012'), (4, '0123210'), (6, '0123454'), (7, '0123456')],
)
def test_reflection_of_less_than_the_padding(n: int, expected: str) -> None:
    row = torch.arange(float(n))
    found = reflect_pad(row.expand(1, 1, 7, n), 7)
    assert ''.join(str(int(value)) for value in found[0, 0, 3]) == expected
    found = reflect_pad(row.view(n, 1).expand(1, 1, n, 7), 7)
    assert ''.join(str(int(value)) for value in found[0, 0, :, 3]) == expected


@pytest.mark.parametrize('name', ['ASID', 'BSRN', 'DLGSANet-tiny', 'EDSR-baseline', 'IMDN', 'OmniSR'])
def test_a_picture_as_it_was_read_becomes_maps_in_channels_last_memory(name: str) -> None:
    """A single one in memory (H, W, 3), of whole windows: its strides fit both formats."""
    net, found = build(name, 4).eval(), []
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d) and layer.out_channels > 3:
            layer.register_forward_hook(lambda module, given, maps: found.append(maps.stride(1)))
    picture = torch.rand(32, 48, 3).permute(2, 0, 1)
    with torch.no_grad():
        net(picture[None])
        net(picture[None, :, :16, 16:32])
    assert set(found) == {1}
