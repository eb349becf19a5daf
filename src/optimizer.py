"""Optimisers and the learning-rate schedule, under EDSR's names."""

from collections.abc import Iterable, Sequence

from torch import nn, optim


def make_optimizer(
    parameters: Iterable[nn.Parameter],
    name: str,
    lr: float,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    epsilon: float = 1e-8,
    momentum: float = 0.9,
) -> optim.Optimizer:
    """`SGD` (with momentum), `ADAM`, `ADAMW` or `RMSprop` over the parameters that take gradients."""
    trainable = [p for p in parameters if p.requires_grad]
    if name == 'SGD':
        return optim.SGD(trainable, lr, momentum, weight_decay=weight_decay)
    if name == 'RMSprop':
        return optim.RMSprop(trainable, lr, eps=epsilon, weight_decay=weight_decay)
    adam = {'ADAM': optim.Adam, 'ADAMW': optim.AdamW}[name]
    return adam(trainable, lr, betas, epsilon, weight_decay)


def learning_rate(lr: float, milestones: Sequence[int], gamma: float, finished: int) -> float:
    """Step decay: the rate after `finished` epochs is `lr` times `gamma` once per milestone reached.

    A function of the epoch alone, so a resumed run needs no state of a schedule.
    """
    return lr * gamma ** sum(milestone <= finished for milestone in milestones)


def set_learning_rate(optimizer: optim.Optimizer, lr: float) -> None:
    """Give every parameter group the rate `lr`."""
    for group in optimizer.param_groups:
        group['lr'] = lr
