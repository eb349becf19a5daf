import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from error import UserError
from model.common import (
    MeanShift,
    ResBlock,
    Tail,
    TokenLinear,
    Upsampler,
    activation,
    attention,
    conv,
    gelu,
    mean_shifts,
    rgb_to_ycbcr,
    ycbcr_to_rgb,
)

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


@pytest.mark.parametrize('rgb_range', [1, 255])
@pytest.mark.parametrize('sign', [-1, 1])
def test_mean_shift_moves_by_the_mean_colour_of_div2k(rgb_range: float, sign: int) -> None:
    shift = MeanShift(rgb_range, 3, sign)
    x = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)) * rgb_range
    moved = (shift(x) - x).permute(1, 0, 2, 3).flatten(1) / rgb_range
    for values, mean in zip(moved.tolist(), (0.4488, 0.4371, 0.4040), strict=True):
        assert values == pytest.approx([sign * mean] * len(values), abs=1e-6)
    assert not any(p.requires_grad for p in shift.parameters())


def test_mean_shift_of_one_colour_is_the_luma_of_the_mean_colour() -> None:
    # (65.481 * 0.4488 + 128.553 * 0.4371 + 24.966 * 0.4040 + 16) / 255 = 0.4379...
    luma = (29.3878728 + 56.1905163 + 10.086264 + 16) / 255
    subtract, add = mean_shifts(255, 1, shift_mean=True)
    x = torch.full((1, 1, 2, 2), 200.0)
    assert subtract(x).flatten().tolist() == pytest.approx([200 - 255 * luma] * 4, abs=1e-4)
    assert add(x).flatten().tolist() == pytest.approx([200 + 255 * luma] * 4, abs=1e-4)


def test_without_mean_shift_nothing_moves_and_nothing_is_stored() -> None:
    x = torch.rand(1, 3, 2, 2)
    for layer in mean_shifts(255, 3, shift_mean=False):
        assert torch.equal(layer(x), x)
        assert not layer.state_dict()


def test_other_numbers_of_colours_are_refused() -> None:
    with pytest.raises(UserError, match='--n_colors 2'):
        mean_shifts(1, 2, shift_mean=False)


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


@pytest.mark.parametrize('memory_format', [torch.channels_last, torch.contiguous_format])
def test_gelu_of_maps_and_its_gradient(memory_format: torch.memory_format) -> None:
    x = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    x = (2 * x).contiguous(memory_format=memory_format).requires_grad_()
    y = gelu(x)
    assert y.is_contiguous(memory_format=memory_format)
    y.sum().backward()
    share = torch.special.ndtr(x.detach().double())  # of the normal distribution below x
    density = torch.exp(-(x.detach().double() ** 2) / 2) / math.sqrt(2 * math.pi)
    torch.testing.assert_close(y.detach().double(), x.detach() * share, rtol=0, atol=2e-6)
    torch.testing.assert_close(x.grad.double(), share + x.detach() * density, rtol=0, atol=2e-6)


@pytest.mark.parametrize('kernel_size', [1, 3, 5])
@pytest.mark.parametrize('dilation', [1, 2, 3])
@pytest.mark.parametrize('size', [(1, 1), (2, 7)])
def test_convolution_keeps_the_size(kernel_size: int, dilation: int, size: tuple[int, int]) -> None:
    assert conv(2, 5, kernel_size, dilation=dilation)(torch.zeros(1, 2, *size)).shape == (1, 5, *size)


@pytest.mark.parametrize(('dilation', 'seen'), [(1, [-2, -1, 0, 1, 2]), (2, [-4, -2, 0, 2, 4])])
def test_residual_block_sees_as_far_as_its_dilation_says(dilation: int, seen: list[int]) -> None:
    block = ResBlock(1, 'gelu', dilation=dilation)
    x = torch.randn(1, 1, 11, 11, generator=torch.Generator().manual_seed(0)).requires_grad_()
    block(x)[0, 0, 5, 5].backward()
    rows, columns = x.grad[0, 0].nonzero().unbind(1)
    assert sorted(set((rows - 5).tolist())) == seen
    assert sorted(set((columns - 5).tolist())) == seen


def test_residual_block_adds_its_scaled_branch() -> None:
    block = ResBlock(1, 'relu', res_scale=0.1)
    for parameter in block.parameters():
        nn.init.zeros_(parameter)
    nn.init.constant_(block.body[2].bias, 7.0)
    assert block(torch.full((1, 1, 2, 2), 3.0)).flatten().tolist() == pytest.approx([3.7] * 4)


@pytest.mark.parametrize(('scale', 'steps'), [(2, [2]), (3, [3]), (4, [2, 2]), (8, [2, 2, 2])])
def test_upsampler_enlarges_step_by_step(scale: int, steps: list[int]) -> None:
    net = Upsampler(scale, 4)
    assert net(torch.zeros(2, 4, 3, 5)).shape == (2, 4, 3 * scale, 5 * scale)
    # Convolutions at 0, 2, 4, ..., pixel shuffles between: the names of the official weights.
    expected = {f'{2 * i}.weight': (4 * step**2, 4, 3, 3) for i, step in enumerate(steps)}
    assert {k: tuple(v.shape) for k, v in net.state_dict().items() if k.endswith('weight')} == expected


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize('n_tokens', [1, 6])
# Which mask each of the five windows has; [] for none.
@pytest.mark.parametrize('masks_of', [[], [0, 0, 0, 0, 0], [0, 1, 1, 1, 1], [0, 0, 1, 2, 2]])
@pytest.mark.parametrize('scale', [None, 0.7])
def test_attention_is_a_mean_weighted_by_a_softmax(n_tokens: int, masks_of: list[int], scale: float | None) -> None:
    q, k, v = numbers(3, 5, n_tokens, 2, 5)
    masks = numbers(2, max(masks_of) + 1, n_tokens, n_tokens) if masks_of else None
    logits = torch.einsum('bqhd,bkhd->bhqk', q, k) * (5**-0.5 if scale is None else scale)
    weights = (logits if masks is None else logits + masks[:, masks_of].transpose(0, 1)).exp()
    expected = torch.einsum('bhqk,bkhd->bqhd', weights / weights.sum(-1, keepdim=True), v).flatten(2)
    counts = torch.tensor(masks_of).unique(return_counts=True)[1].tolist() if any(masks_of) else None
    torch.testing.assert_close(attention(q, k, v, masks, counts, scale), expected, rtol=0, atol=1e-12)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, masks, counts, scale)

    example = (q, k, v) if counts else (q[:1], k[:1], v[:1])  # with which any number of windows of one kind has to do
    traced = torch.jit.trace(attend, example)
    torch.testing.assert_close(traced(q, k, v), expected, rtol=0, atol=1e-12)
    masks = masks if masks is None else masks.bfloat16()
    half = attend(q.bfloat16(), k.bfloat16(), v.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize('n', [1, 3])
def test_linear_layer_of_tokens(n: int) -> None:
    layer, x = TokenLinear(5, 7).double(), numbers(n, 6, 5)
    out = layer(x)
    torch.testing.assert_close(out, x @ layer.weight.t() + layer.bias, rtol=0, atol=1e-12)
    assert out.is_contiguous()


@pytest.mark.parametrize('scale', [2, 3, 4, 8])
@pytest.mark.parametrize('size', [(1, 1), (1, 5), (2, 1), (3, 4), (6, 5)])
@pytest.mark.parametrize('n_colors', [1, 3])
def test_tail_is_an_upsampler_and_a_convolution(scale: int, size: tuple[int, int], n_colors: int) -> None:
    torch.manual_seed(0)
    tail = Tail(scale, 4, n_colors).double()
    x = torch.randn(2, 4, *size, dtype=torch.float64, requires_grad=True)

    y = x
    for layer in (*tail[0], tail[1]):  # one after the other
        if isinstance(layer, nn.PixelShuffle):
            y = F.pixel_shuffle(y, layer.upscale_factor)
        else:
            y = F.conv2d(y, layer.weight, layer.bias, padding=1)

    found = tail(x)
    assert torch.allclose(found, y, rtol=0, atol=1e-12)
    gradient, inputs = torch.randn_like(y), (x, *tail.parameters())
    for a, b in zip(*(torch.autograd.grad(out, inputs, gradient) for out in (found, y)), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-10)


def test_tail_is_in_float32_under_autocast() -> None:
    torch.manual_seed(0)
    tail, x = Tail(2, 4, 3), torch.randn(1, 4, 5, 6)
    with torch.autocast('cpu', torch.bfloat16):
        low = tail(x)
    assert low.dtype == torch.float32
    assert torch.allclose(low, tail(x), rtol=0, atol=1e-6)
