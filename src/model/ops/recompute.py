"""Activation checkpointing: memory for time in training."""

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint


def recompute(net: nn.Module, blocks: tuple[type[nn.Module], ...]) -> None:
    """Have `net` keep only the inputs of its blocks of these classes, and compute the rest again for the gradients.

    The result is the same (Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016), also of random numbers.
    """
    for module in net.modules():
        if isinstance(module, blocks):
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)
