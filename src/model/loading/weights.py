"""Weights from files: read without running anything they contain, and matched to a network key by key."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from error import UserError
from model.common import at_least_float32
from model.loading.detect import mismatches, recognise
from system.files import read_safetensors, read_torch, some

WRAPPERS = ('params_ema', 'params', 'average', 'model', 'state_dict')  # BasicSR's, those of a run, a common one
PREFIX = 'module.'


@dataclass(frozen=True)
class Origin:
    """Where the weights of a network come from.

    Attributes:
        source: the file or run they were read from, or in words what they are if they were not.
        read: whether they were read.
    """

    source: str
    read: bool = True

    def __str__(self) -> str:
        return f'weights from {self.source}' if self.read else self.source


class NotCopied(NamedTuple):
    """Keys of a network that weights of another scale did not fill as they are.

    Attributes:
        interpolated: those that start from an upsampler of the other scale.
        new: those that were left as they were.
    """

    interpolated: list[str]
    new: list[str]

    def __str__(self) -> str:
        parts = {'interpolated from another scale': self.interpolated, 'new': self.new}
        return ''.join(f'; {what}: {", ".join(keys)}' for what, keys in parts.items() if keys)


def read_weights(path: Path) -> tuple[dict[str, Tensor], str]:
    """State dict from a file of PyTorch or of safetensors, and in words what was unwrapped to get at it, if anything.

    Taken off are BasicSR's 'params_ema' or else 'params', the 'average' or else the 'model' of a run's state,
    'state_dict', and DataParallel's prefix 'module.' of the names.
    """
    content = read_safetensors(path) if path.suffix == '.safetensors' else read_torch(path)
    unwrapped = []
    for wrapper in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
            unwrapped.append(wrapper)
    entries = content.items() if isinstance(content, dict) else ()
    if not entries or not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in entries):
        raise UserError(f'{path} holds no state dict: give a file with the tensors of a network by name.')
    state = dict(entries)
    if all(key.startswith(PREFIX) for key in state):
        state = {key.removeprefix(PREFIX): value for key, value in state.items()}
        unwrapped.append(f"without the prefix '{PREFIX}'")
    return state, ', '.join(unwrapped)


def load_weights(net: nn.Module, state: dict[str, Tensor], source: str, upsampler: str | None = None) -> NotCopied:
    """Copy `state` into `net`, every key of it and every key of the network.

    Args:
        net: the network.
        state: its parameters and buffers by name.
        source: where `state` comes from, for messages.
        upsampler: prefix of the keys that may differ, as they do in weights of another scale, and are then made from
            these where `for_this_scale` can; None: no key may.

    Returns:
        Keys of `net` that `state` did not fill as they are (all of them below `upsampler`).

    Raises:
        UserError: missing or extra keys, or other shapes; nothing was copied.
    """
    own = net.state_dict()
    missing, extra, reshaped = mismatches(own, state)
    wrong = [*missing, *extra, *reshaped]
    if upsampler is not None:
        wrong = [key for key in wrong if not key.startswith(upsampler)]
    if wrong:
        counts = f'{len(missing)} missing, {len(extra)} unknown and {len(reshaped)} of another shape'
        raise UserError(f'{source} does not fit this network: {counts}, first {some(wrong)}; {_cause(state)}')
    fitting = {key: value for key, value in state.items() if key in own and key not in reshaped}
    made = for_this_scale(net, state) if missing or reshaped else {}
    net.load_state_dict({**own, **made, **fitting}, strict=True)
    left = [*missing, *reshaped]
    return NotCopied([key for key in left if key in made], [key for key in left if key not in made])


def for_this_scale(net: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the sub-pixel convolutions of `net` start from, by name, given its weights at another scale.

    A sub-pixel convolution is one with a pixel shuffle after it. It starts from the one of its name, interpolated to
    its own factor; where there is none, as in the second step of x4, from the one that the step before it starts from.
    """
    found, source = {}, ''
    for (name, conv), (_, shuffle) in pairwise(net.named_modules()):
        if isinstance(conv, nn.Conv2d) and isinstance(shuffle, nn.PixelShuffle):
            source = name if f'{name}.weight' in state else source
            for key, own in conv.state_dict().items():
                old = state.get(f'{source}.{key}')
                made = None if old is None else interpolate_rows(old, own, shuffle.upscale_factor)
                if made is not None:
                    found[f'{name}.{key}'] = made
    return found


def interpolate_rows(old: Tensor, own: Tensor, factor: int) -> Tensor | None:
    """Weight or bias of a sub-pixel convolution as one of another factor, each channel bilinearly over its sub-pixels.

    The authors of ESC start x3 and x4 so (`load_state_dict` of their code, half-pixel centres).

    Args:
        old: (channels * old factor^2, ...).
        own: (channels * factor^2, ...), whose shape the result has.
        factor: of `own`.

    Returns:
        The rows; None if `old` is no such tensor.
    """
    channels = len(own) // factor**2
    side = math.isqrt(len(old) // channels)
    if old.shape[1:] != own.shape[1:] or len(old) != channels * side**2:
        return None
    grids = old.reshape(channels, side**2, -1).mT.unflatten(2, (side, side))
    rows = F.interpolate(at_least_float32(grids), (factor, factor), mode='bilinear').flatten(2).mT
    return rows.reshape(own.shape).to(own.dtype)


def _cause(state: dict[str, Tensor]) -> str:
    """Why weights do not fit, and what to do."""
    try:
        return f'these are weights of {recognise(state)}: give --model auto, or the options that say so.'
    except UserError as error:
        reason = str(error)
        return reason[0].lower() + reason[1:]
