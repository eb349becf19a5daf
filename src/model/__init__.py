"""Networks by name."""

import inspect
from torch import nn

from error import UserError
from model import bicubic, edsr, lcoan
from model.common import Network

NETWORKS: dict[str, Network] = {**bicubic.NETWORKS, **edsr.NETWORKS, **lcoan.NETWORKS}


def build(name: str, scale: int, **settings: object) -> nn.Module:
    """Network `name` for `scale`; what `settings` leave out is as in its paper.

    Raises:
        UserError: unknown name, a scale or a setting that the network does not have.
    """
    if name not in NETWORKS:
        raise UserError(f'Unknown network {name!r}: choose one of {", ".join(NETWORKS)}.')
    network = NETWORKS[name]
    if scale not in network.scales:
        raise UserError(f'{name} cannot enlarge by {scale}: choose one of {", ".join(map(str, network.scales))}.')
    known = [p for p in inspect.signature(network.build).parameters if p != 'scale']
    for setting in settings:
        if setting not in known:
            has = f'its settings are {", ".join(known)}' if known else 'it has no settings'
            raise UserError(f'{name} has no setting {setting!r} ({has}): leave it out.')
    return network.build(scale, **{**network.settings, **settings})
