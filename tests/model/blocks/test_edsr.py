import pytest
import torch
import torch.nn.functional as F
from torch import nn

from error import UserError
from model.blocks.edsr import MeanShift, ResBlock, Tail, Upsampler, mean_shifts


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
