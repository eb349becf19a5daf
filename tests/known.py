"""The networks that shared/reference/check.py asks for; it has records of some that this project does not have."""

from torch import nn

import model


def build(name: str, scale: int) -> nn.Module | None:
    return model.build(name, scale) if name in model.NETWORKS else None
