"""Weights from files: read without running anything they contain, and matched to a network key by key."""

from pathlib import Path

from torch import Tensor, nn

from error import UserError
from files import read_torch


def read_weights(path: Path) -> dict[str, Tensor]:
    """State dict from a file: plain, or under 'params_ema', 'params' (BasicSR) or 'model' (a run's state)."""
    content = read_torch(path)
    for wrapper in ('params_ema', 'params', 'model'):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    entries = content.items() if isinstance(content, dict) else ()
    if not entries or not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in entries):
        raise UserError(f'{path} holds no state dict: give a file with the tensors of a network by name.')
    return dict(entries)


def load_weights(net: nn.Module, state: dict[str, Tensor], source: str, upsampler: str | None = None) -> list[str]:
    """Copy `state` into `net`, every key of it and every key of the network.

    Args:
        net: the network.
        state: its parameters and buffers by name.
        source: where `state` comes from, for messages.
        upsampler: prefix of the keys that may differ, as they do in weights of another scale; None: no key may.

    Returns:
        Keys of `net` that `state` did not fill (all of them below `upsampler`).

    Raises:
        UserError: missing or extra keys, or other shapes; nothing was copied.
    """
    own = net.state_dict()
    missing = [key for key in own if key not in state]
    extra = [key for key in state if key not in own]
    reshaped = [key for key in own if key in state and own[key].shape != state[key].shape]
    wrong = [*missing, *extra, *reshaped]
    if upsampler is not None:
        wrong = [key for key in wrong if not key.startswith(upsampler)]
    if wrong:
        counts = f'{len(missing)} missing, {len(extra)} unknown and {len(reshaped)} of another shape'
        scale = all(key.startswith(('tail.', 'upsample')) for key in wrong)
        cause = 'another scale' if scale else 'another network or other sizes'
        raise UserError(
            f'{source} does not fit this network: {counts}, first {", ".join(map(repr, wrong[:3]))}; '
            f'it looks like the weights of {cause}: give the matching --model, --scale and sizes.'
        )
    fitting = {key: value for key, value in state.items() if key in own and key not in reshaped}
    net.load_state_dict({**own, **fitting}, strict=True)
    return [*missing, *reshaped]
