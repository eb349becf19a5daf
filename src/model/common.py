"""The facts that a network file declares beside its class, and the checks and layers of nearly all of them."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from error import UserError
from model.ops.depthwise import depthwise
from model.ops.fused_conv import fused_conv

Layer = TypeVar('Layer', bound=nn.Module)

AUTOCAST_DEVICES = frozenset(filter(torch.amp.is_autocast_available, ('cpu', 'cuda', 'mps', 'xpu')))
RGB_MEAN = (0.4488, 0.4371, 0.4040)  # of DIV2K's training images, in [0, 1] (EDSR, section 4.1)

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    'relu': lambda: nn.ReLU(inplace=True),
    'leaky_relu': lambda: nn.LeakyReLU(0.2, inplace=True),
    'prelu': nn.PReLU,
    'gelu': nn.GELU,
    'silu': lambda: nn.SiLU(inplace=True),
}


@dataclass(frozen=True)
class NetworkSpec:
    """What the program has to know of a network besides its class.

    Attributes:
        build: the class, called as `build(scale, **settings)`.
        scales: the factors it can enlarge by.
        settings: what this name changes of the class's own defaults.
        value_range: the pixel values it was made for, as (black, white). A network with an `rgb_range` setting is fed
            (0, rgb_range) instead.
        tiling_exact: tiles that overlap by more than its reach give the result of the whole image.
        upsampler_prefix: prefix, or several, of the parameters that depend on the scale; all others carry over to
            another scale as they are, convolutions before an `nn.PixelShuffle` interpolated.
        autocast_dtypes: the types below float32 that autocast may use without a visible loss. Of float16 this has to
            be shown: nothing keeps the features of a network without norms below 65504.
        checkpoint_blocks: classes of the modules that activation checkpointing computes again.
        recognise: from a state dict of this network in any sizes, scale (several where they are alike) and settings as
            far as keys and shapes show them; None for the weights of another network.
    """

    build: Callable[..., nn.Module]
    scales: tuple[int, ...]
    settings: Mapping[str, object] = field(default_factory=dict)
    value_range: tuple[float, float] = (0.0, 1.0)
    tiling_exact: bool = True
    upsampler_prefix: str | tuple[str, ...] = 'tail.0.'
    autocast_dtypes: tuple[torch.dtype, ...] = (torch.bfloat16,)
    checkpoint_blocks: tuple[type[nn.Module], ...] = ()
    recognise: Callable[[Mapping[str, Tensor]], dict[str, object] | None] = lambda state: None


def shape_of(state: Mapping[str, Tensor], key: str) -> tuple[int, ...]:
    """Shape of the tensor at `key`; () if there is none."""
    return tuple(state[key].shape) if key in state else ()


def how_many(state: Mapping[str, Tensor], prefix: str) -> int:
    """How many modules the list at `prefix` has, such as 2 at 'body.' for the keys body.0.weight and body.1.weight."""
    return len({key.removeprefix(prefix).split('.')[0] for key in state if key.startswith(prefix)})


def check_images(x: Tensor, n_colors: int = 3) -> None:
    """Refuse what is not a batch of images (N, n_colors, H, W)."""
    if x.dim() != 4 or x.shape[1] != n_colors or 0 in x.shape:
        raise UserError(
            f'This network takes a batch of images of {n_colors} channels, (N, {n_colors}, H, W), '
            f'and was given {tuple(x.shape)}: convert them first.'
        )


def check_divides(option: str, divisor: int, n_feats: int) -> None:
    """Refuse a setting that does not divide the number of feature channels."""
    if n_feats % divisor:
        raise UserError(f'--{option} {divisor} does not divide --n_feats {n_feats}: choose a divisor.')


def check_least(setting: str, value: int, least: int) -> None:
    """Refuse a setting of `--net` below the least that makes a network."""
    if value < least:
        raise UserError(f'--net {setting}={value}: choose {least} or more.')


def check_odd(option: str, side: int) -> None:
    """Refuse a kernel of an even number of pixels along its side."""
    if side % 2 == 0:
        raise UserError(f'--{option} {side} has no pixel in its middle: choose an odd number.')


def check_numbers(option: str, text: str) -> tuple[int, ...]:
    """Whole numbers from 1 on, typed with a dash between two."""
    parts = text.split('-')
    if not all(part.isdecimal() and int(part) for part in parts):
        raise UserError(f'--net {option}={text}: whole numbers from 1 on with a dash between two, such as 16-32.')
    return tuple(int(part) for part in parts)


def mirrored(length: int, size: int, device: torch.device) -> Tensor:
    """`length` places in a row of `size` that is continued by its mirror image again and again, int64."""
    position = torch.arange(length, device=device) % (2 * size)
    return torch.minimum(position, 2 * size - 1 - position)


def reflected(length: int, size: int, device: torch.device) -> Tensor:
    """As `mirrored`, but the pixels at the ends are not repeated, except a single one."""
    position = torch.arange(length, device=device) % max(2 * size - 2, 1)
    return torch.minimum(position, 2 * size - 2 - position)


def mirror_pad(x: Tensor, multiple: int) -> Tensor:
    """(N, C, H, W) grown right and below to multiples of `multiple` by its mirror image, the edge pixel repeated.

    An image smaller than its padding is mirrored again and again.
    """
    return _continue(x, multiple, mirrored)


def reflect_pad(x: Tensor, multiple: int) -> Tensor:
    """(N, C, H, W) grown right and below to multiples of `multiple` by its reflection, the edge pixel not repeated.

    An image smaller than its padding is reflected again and again, a single pixel repeated.
    """
    return _continue(x, multiple, reflected)


def _continue(x: Tensor, multiple: int, places: Callable[[int, int, torch.device], Tensor]) -> Tensor:
    """(N, C, H, W) grown right and below to multiples of `multiple` by its own pixels, at `places` as of `mirrored`."""
    pixels = x.stride(1) == 1  # in channels_last memory, of which `index_select` would make the other one
    x = x.permute(0, 2, 3, 1) if pixels else x
    for axis in (1, 2) if pixels else (2, 3):
        size = x.shape[axis]
        if size % multiple:
            x = x.index_select(axis, places(size + -size % multiple, size, x.device))
    return x.permute(0, 3, 1, 2) if pixels else x


def zero_pad(x: Tensor, multiple: int, at_least: int = 1) -> Tensor:
    """(N, C, H, W) grown right and below by zeros to multiples of `multiple` that are not below `at_least`."""
    # The maximum, in a form that a trace follows to smaller images than its own.
    sides = ((size + at_least + abs(size - at_least)) // 2 for size in x.shape[2:])
    height, width = ((side + multiple - 1) // multiple * multiple for side in sides)
    return F.pad(x, (0, width - x.shape[3], 0, height - x.shape[2]))


def rgb_to_ycbcr(rgb: Tensor) -> Tensor:
    """ITU-R BT.601 with foot and head room, as MATLAB's rgb2ycbcr: (N, 3, H, W) in [0, 1] to (N, 3, H, W) in [0, 1]."""
    r, g, b = rgb.unbind(1)
    y = (65.481 * r + 128.553 * g + 24.966 * b + 16) / 255
    cb = (-37.797 * r - 74.203 * g + 112.0 * b + 128) / 255
    cr = (112.0 * r - 93.786 * g - 18.214 * b + 128) / 255
    return torch.stack((y, cb, cr), 1)


def ycbcr_to_rgb(ycbcr: Tensor) -> Tensor:
    """Inverse of `rgb_to_ycbcr`."""
    y, cb, cr = (ycbcr * 255).unbind(1)
    y, cb, cr = (y - 16) / 219, (cb - 128) / 224, (cr - 128) / 224
    r = y + 1.402 * cr
    g = y - 0.344136 * cb - 0.714136 * cr
    b = y + 1.772 * cb
    return torch.stack((r, g, b), 1)


class Conv(nn.Conv2d):
    """Convolution that keeps height and width (zero padding), of a dilation that is the same along both."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, bias: bool = True, dilation: int = 1
    ) -> None:
        padding = dilation * (kernel_size // 2)
        super().__init__(in_channels, out_channels, kernel_size, padding=padding, bias=bias, dilation=dilation)

    def forward(self, input: Tensor, **behind: Any) -> Tensor:
        """Maps (N, C, H, W), with what `fused_conv` takes behind it."""
        return fused_conv(input, self.weight, self.bias, self.dilation[0], **behind)


class DepthwiseConv(nn.Conv2d):
    """Convolution of each channel by itself that keeps height and width (zero padding)."""

    def __init__(self, channels: int, kernel_size: int, bias: bool = True) -> None:
        super().__init__(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels, bias=bias)

    def forward(self, input: Tensor, act: str = '', *, plus: Tensor | None = None) -> Tensor:
        """Maps (N, C, H, W), with what `depthwise` takes behind it."""
        return depthwise(input, self.weight, self.bias, act, plus=plus)


def activated(layer: nn.Module, act: nn.Module, x: Tensor) -> Tensor:
    """act(layer(x)) of a `Conv`, in one step where `act` is a ReLU or LeakyReLU."""
    slope = 0.0 if isinstance(act, nn.ReLU) else getattr(act, 'negative_slope', 1.0)
    return act(layer(x)) if slope == 1 else layer(x, slope=slope)


def conv(in_channels: int, out_channels: int, kernel_size: int, bias: bool = True, dilation: int = 1) -> Conv:
    """Convolution that keeps height and width (zero padding)."""
    return Conv(in_channels, out_channels, kernel_size, bias, dilation)


def stacked(parts: int, layer: Layer) -> Layer:
    """The layer, of which it is noted that its weight is `parts` matrices on top of each other, such as q, k and v.

    An optimiser that works on whole matrices takes them apart (`muon.hidden_matrices`).
    """
    layer.n_stacked = parts  # type: ignore[assignment]
    return layer


def in_fast_memory(x: Tensor) -> Tensor:
    """On a CPU in channels_last memory, where convolutions are faster; elsewhere as it is."""
    return in_channels_last(x) if x.device.type == 'cpu' else x


def in_channels_last(x: Tensor) -> Tensor:
    """A copy in channels_last memory.

    `contiguous` leaves a single picture as it was read, row by row, whose first stride does not tell its format:
    convolutions then give maps in the other one.
    """
    return x.clone(memory_format=torch.channels_last)


def full_precision(x: Tensor) -> AbstractContextManager[object]:
    """No autocast on the device of `x` for a while: for what decides an argmax, or averages over many pixels."""
    device = x.device.type
    on = device in AUTOCAST_DEVICES and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if on else nullcontext()


def at_least_float32(x: Tensor) -> Tensor:
    """`x` in float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Float32Conv(Conv):
    """3x3 or 1x1 convolution in float32 or more, also under autocast: for pixels, of which bfloat16 keeps 8 bits."""

    def forward(self, input: Tensor, **behind: Any) -> Tensor:
        with full_precision(input):
            return super().forward(at_least_float32(input), **behind)


def activation(name: str) -> nn.Module:
    """Activation by its name in `ACTIVATIONS`."""
    if name not in ACTIVATIONS:
        raise UserError(f'Unknown activation {name!r}: choose one of {", ".join(ACTIVATIONS)}.')
    return ACTIVATIONS[name]()
