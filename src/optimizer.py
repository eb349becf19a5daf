"""Optimisers, the learning-rate schedule and the weight average, under EDSR's and BasicSR's names."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn, optim

from muon import Muon


def make_optimizer(
    parameters: Iterable[nn.Parameter],
    name: str,
    lr: float,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    epsilon: float = 1e-8,
    momentum: float | None = None,
    matrices: Mapping[nn.Parameter, int] = MappingProxyType({}),
) -> optim.Optimizer:
    """`SGD` (with momentum), `ADAM`, `ADAMW`, `RMSprop` or `MUON` over the parameters that take gradients.

    `momentum` is that of SGD, without a value 0.9, and of MUON, without a value 0.95; `matrices` are what MUON
    orthogonalises (see `Muon`), for other parameters it is AdamW.

    Of parameters on CUDA all but RMSprop are fused: one kernel, which leaves out a step by a flag on the device, and
    whose learning rate is a tensor there, so that a CUDA graph can hold it.
    """
    trainable = [p for p in parameters if p.requires_grad]
    if name == 'RMSprop':
        return optim.RMSprop(trainable, lr, eps=epsilon, weight_decay=weight_decay)
    fused = bool(trainable) and all(p.is_cuda for p in trainable)
    if name == 'SGD':
        kept = 0.9 if momentum is None else momentum
        optimizer: optim.Optimizer = optim.SGD(trainable, lr, kept, weight_decay=weight_decay, fused=fused)
        for p in trainable if fused and kept else ():  # PyTorch makes these of whatever memory held, if no step is made
            optimizer.state[p]['momentum_buffer'] = torch.zeros_like(p)
    elif name == 'MUON':
        kept = 0.95 if momentum is None else momentum
        optimizer = Muon(trainable, matrices, lr, weight_decay, betas, epsilon, kept)
    else:
        adam = {'ADAM': optim.Adam, 'ADAMW': optim.AdamW}[name]
        optimizer = adam(trainable, lr, betas, epsilon, weight_decay, fused=fused, capturable=fused)
    if fused:
        for group in optimizer.param_groups:
            group['lr'] = torch.full((), lr, device=trainable[0].device)
    return optimizer


def load_optimizer(optimizer: optim.Optimizer, state: dict[str, Any]) -> None:
    """Continue from the `state_dict` of an optimiser of the same kind, on whatever device; hyperparameters stay.

    Raises:
        ValueError, KeyError: it is of another network or kind.
    """
    own = [{key: value for key, value in g.items() if key != 'params'} for g in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, hyperparameters in zip(optimizer.param_groups, own, strict=True):
        group.update(hyperparameters)
        if group.get('fused'):
            for parameter in group['params']:
                kept = optimizer.state.get(parameter, {})
                if 'step' in kept:
                    kept['step'] = kept['step'].to(parameter.device)


@dataclass(frozen=True)
class Schedule:
    """Learning rate by finished epochs and steps; without a state, so that a resumed run needs none.

    Args:
        lr: the highest rate.
        kind: 'step': `lr` times `gamma` once per milestone reached; 'cosine': half a cosine from `lr` to `lr_min`,
            again after each restart (SGDR, https://arxiv.org/abs/1608.03983, equation 5).
        milestones: after which the rate drops, counted in `unit`.
        gamma: factor of a drop.
        unit: 'epochs' or 'steps'.
        total: length of all cosines together, counted in `unit`.
        lr_min: end of the cosine.
        restarts: times that it begins again at `lr`, at equal distances.
        warmup: step n of the first `warmup` steps has n / warmup of the rate.
    """

    lr: float
    kind: str = 'step'
    milestones: Sequence[int] = ()
    gamma: float = 0.5
    unit: str = 'epochs'
    total: int = 1
    lr_min: float = 0.0
    restarts: int = 0
    warmup: int = 0

    def __call__(self, epochs: int, steps: int) -> float:
        """The rate of the next step."""
        done = epochs if self.unit == 'epochs' else steps
        if self.kind == 'cosine':
            part = done * (self.restarts + 1) % self.total / self.total if done < self.total else 1  # of one cosine
            share = (1 + math.cos(math.pi * part)) / 2
            rate = self.lr_min + (self.lr - self.lr_min) * share
        else:
            rate = self.lr * self.gamma ** sum(milestone <= done for milestone in self.milestones)
        return rate * min(1.0, (steps + 1) / self.warmup) if self.warmup else rate


def set_learning_rate(optimizer: optim.Optimizer, lr: float) -> None:
    """Give every parameter group the rate `lr`."""
    for group in optimizer.param_groups:
        if isinstance(group['lr'], Tensor):
            group['lr'].fill_(lr)
        else:
            group['lr'] = lr


class ModelEMA:
    """Exponential moving average of a network's parameters: average <- decay * average + (1 - decay) * parameters.

    It starts as a copy of the network. Buffers are not averaged, the network's own are taken.
    """

    def __init__(self, net: nn.Module, decay: float) -> None:
        self.net, self.decay = net, decay
        self.state = {key: value.detach().clone() for key, value in net.state_dict().items()}

    @torch.no_grad()
    def update(self, applied: Tensor | None = None) -> None:
        """Take the network's weights after a step into the average.

        Args:
            applied: (), bool on the device: whether the step was made; None: it was.
        """
        parameters = dict(self.net.named_parameters())
        averages, own = [self.state[key] for key in parameters], [p.detach() for p in parameters.values()]
        if applied is None:
            torch._foreach_lerp_(averages, own, 1 - self.decay)
        else:
            towards = torch._foreach_sub(own, averages)
            torch._foreach_mul_(towards, applied * (1 - self.decay))
            torch._foreach_add_(averages, towards)
        for key, buffer in self.net.named_buffers():
            if key in self.state:
                self.state[key].copy_(buffer)

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Continue from the average in `state`."""
        for key, value in self.state.items():
            value.copy_(state[key])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within this block the network has the averaged weights."""
        own = {key: value.clone() for key, value in self.net.state_dict().items()}
        self.net.load_state_dict(self.state)
        try:
            yield
        finally:
            self.net.load_state_dict(own)
