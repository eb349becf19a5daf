"""Weights from files: read without running anything they contain, and matched to a network key by key."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from error import UserError
from model import Model, type_name
from model.common import at_least_float32
from model.loading.description import Description, from_metadata, from_options, from_state
from model.loading.detect import Found, mismatches, nearest, recognise
from model.tiles.tiling import Tiler
from system.files import SAFETENSORS, is_safetensors, read_safetensors, read_torch, some

SUFFIXES = ('.pt', '.pth', '.safetensors')  # of files of weights

# What state dicts are wrapped in, the first choice first: averages of weights before the weights themselves. BasicSR
# has 'params_ema' and 'params', a state of this program 'average' and 'model'.
WRAPPERS = (
    'params_ema', 'state_dict_ema', 'model_ema', 'ema', 'average', 'params', 'state_dict', 'model_state_dict', 'model',
    'net', 'netG', 'net_g', 'generator', 'weights',
)  # fmt: skip
DEEPEST = 4  # wrappers within wrappers


def weights_in(folder: Path) -> list[Path]:
    """The files of weights in a folder by name, but for hidden ones, which macOS puts beside others."""
    return sorted(path for path in folder.glob('[!.]*') if path.suffix in SUFFIXES)


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


class Weights(NamedTuple):
    """The weights in a file.

    Attributes:
        state: parameters and buffers by name.
        unwrapped: in words, what was taken off to get at them; '' for nothing.
        description: what the file says of their network, if anything.
    """

    state: dict[str, Tensor]
    unwrapped: str
    description: Description | None


def read_weights(path: Path, mapped: bool = False) -> Weights:
    """Weights from a file of PyTorch or of safetensors, whatever its name is.

    Taken off are the dicts around the state dict (of those in `WRAPPERS` the first one, else the only one that has
    tensors), what is no tensor in it, and a prefix that all keys share, as 'module.' or 'model.'. `mapped` is as of
    `read_torch`.

    Raises:
        UserError: no such file, damaged, with objects that could run code, or without a state dict.
    """
    if is_safetensors(path):
        state, metadata = read_safetensors(path)
        content: object = state
        description = from_metadata(metadata)
    else:
        content, description = read_torch(path, mapped), None
    taken: list[str] = []
    while len(taken) < DEEPEST and (wrapper := _wrapper(content)):
        description = from_options(content) or description  # type: ignore[arg-type]
        content = content[wrapper]  # type: ignore[index]
        taken.append(wrapper)
    found = content if isinstance(content, dict) else {}
    state = {key: value.detach() for key, value in found.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if not state:
        holds = f' but {some([f"{key}: {type(value).__name__}" for key, value in found.items()])}' if found else ''
        raise UserError(f'{path} holds no state dict{holds}: give a file with the tensors of a network by name.')
    if odd := [f'{key} ({type_name(value.dtype)})' for key, value in state.items() if not _is_plain(value)]:
        raise UserError(f'{path} holds tensors in forms that are not read, {some(odd)}: get it in float32.')
    if others := [str(key) for key in found if key not in state]:
        taken.append(f'without {some(others)}')
    prefix = _shared_prefix(state)
    if prefix:
        state = {key.removeprefix(prefix): value for key, value in state.items()}
        taken.append(f"without the prefix '{prefix}'")
    return Weights(state, ', '.join(taken), from_state(content) or description)


def _is_plain(tensor: Tensor) -> bool:
    """Whether all its values are there, as floats or integers: it is not sparse, quantised or complex."""
    return tensor.layout == torch.strided and not tensor.is_meta and tensor.dtype in SAFETENSORS.values()


def _wrapper(content: object) -> str | None:
    """The key under which a dict has another one that holds the weights; None if they are in it itself, or nowhere."""
    if not isinstance(content, dict):
        return None
    inner = [key for key, value in content.items() if isinstance(value, dict) and _holds_tensors(value)]
    if named := [key for key in WRAPPERS if key in inner]:
        return named[0]
    return inner[0] if len(inner) == 1 and not any(isinstance(value, Tensor) for value in content.values()) else None


def _holds_tensors(content: Mapping[object, object], depth: int = DEEPEST) -> bool:
    """Whether tensors are found by names, in a dict or in dicts within it."""
    return any(
        isinstance(key, str)
        and (isinstance(value, Tensor) or (depth > 0 and isinstance(value, dict) and _holds_tensors(value, depth - 1)))
        for key, value in content.items()
    )


def _shared_prefix(state: Mapping[str, Tensor]) -> str:
    """What the names of all tensors begin with, up to a dot."""
    parts = [key.split('.')[:-1] for key in state]
    shared = 0
    while all(len(own) > shared and own[shared] == parts[0][shared] for own in parts):
        shared += 1
    return ''.join(f'{part}.' for part in parts[0][:shared])


def load_weights(
    net: nn.Module, state: dict[str, Tensor], source: str, upsampler: str | tuple[str, ...] | None = None
) -> NotCopied:
    """Copy `state` into `net`, every key of it and every key of the network.

    Args:
        net: the network.
        state: its parameters and buffers by name.
        source: where `state` comes from, for messages.
        upsampler: prefix, or several, of the keys that may differ, as they do in weights of another scale, and are then
            made from these where `for_this_scale` can; None: no key may.

    Returns:
        Keys of `net` that `state` did not fill as they are (all of them below `upsampler`).

    Raises:
        UserError: missing or extra keys, other shapes, whole numbers in place of weights, or values that are not
            finite; nothing was copied.
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
    if whole := [k for k, value in fitting.items() if own[k].is_floating_point() and not value.is_floating_point()]:
        raise UserError(f'{source} holds whole numbers where weights belong, in {some(whole)}: get it in float32.')
    if broken := [key for key, value in state.items() if not value.isfinite().all()]:
        raise UserError(f'{source} holds values that are not finite, in {some(broken)}: take other weights.')
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


def recognise_file(path: Path, scale: int | None = None) -> Found:
    """The network that a file of weights belongs to, found as by `--model auto`; tensors are read only as needed.

    `scale` is for weights that are alike at several.

    Raises:
        UserError: a file that cannot be read, weights of no network known here, or a setting that nothing decides.
    """
    state, _, description = read_weights(path, mapped=True)
    return recognise(state, description, scale=scale)


def load_model(
    path: Path,
    device: torch.device | str,
    tiler: Tiler | None = None,
    settings: Mapping[str, object] = MappingProxyType({}),
    scale: int | None = None,
    ensemble: bool = False,
    half: bool = False,
) -> Model:
    """The network that a file of weights belongs to, found as by `--model auto`, with these weights.

    Args:
        path: the file.
        device: where the network runs.
        tiler: cuts large images into tiles.
        settings: of the network, which neither the file says nor its weights show.
        scale: for weights that are alike at several.
        ensemble, half: as of `Model`.

    Raises:
        UserError: a file that cannot be read, weights of no network known here, or a setting that nothing decides.
    """
    state, _, description = read_weights(path)
    try:
        found = recognise(state, description, settings, scale)
    except UserError as error:
        raise UserError(f'{path}: {error}') from error
    with torch.random.fork_rng(devices=[]):  # the random start of a network is nobody's concern
        model = Model(found.name, found.scale, device, tiler, ensemble, half, **found.settings)
    load_weights(model.net, state, str(path))
    model.weights = f'weights from {path}'
    return model


def _cause(state: dict[str, Tensor]) -> str:
    """Why weights do not fit, and what to do."""
    try:
        return f'these are weights of {nearest(state)}: give --model auto, or the options that say so.'
    except UserError as error:
        reason = str(error)
        return reason[0].lower() + reason[1:]
