"""Weights from files: read without running anything they contain, and matched to a network key by key."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from error import UserError
from model import Model
from model.loading.detect import mismatches, recognise
from model.tiles.tiling import Tiler
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


def load_weights(
    net: nn.Module, state: dict[str, Tensor], source: str, upsampler: str | tuple[str, ...] | None = None
) -> list[str]:
    """Copy `state` into `net`, every key of it and every key of the network.

    Args:
        net: the network.
        state: its parameters and buffers by name.
        source: where `state` comes from, for messages.
        upsampler: prefix, or several, of the keys that may differ, as they do in weights of another scale; None: no
            key may.

    Returns:
        Keys of `net` that `state` did not fill (all of them below `upsampler`).

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
    net.load_state_dict({**own, **fitting}, strict=True)
    return [*missing, *reshaped]


def load_model(path: Path, device: torch.device | str, tiler: Tiler | None = None, scale: int | None = None) -> Model:
    """The network that a file of weights belongs to, found as by `--model auto`, with these weights.

    `scale` counts for weights that are alike at several.

    Raises:
        UserError: a file that cannot be read, or weights of no network known here.
    """
    state = read_weights(path)[0]
    try:
        found = recognise(state, scale)
    except UserError as error:
        raise UserError(f'{path}: {error}') from error
    model = Model(found.name, found.scale, device, tiler, **found.settings)
    load_weights(model.net, state, str(path))
    return model


def _cause(state: dict[str, Tensor]) -> str:
    """Why weights do not fit, and what to do."""
    try:
        return f'these are weights of {recognise(state)}: give --model auto, or the options that say so.'
    except UserError as error:
        reason = str(error)
        return reason[0].lower() + reason[1:]
