"""Muon: momentum whose matrices are orthogonalised, and AdamW for all that is no matrix.

Jordan et al., "Muon: An optimizer for hidden layers in neural networks", https://kellerjordan.github.io/posts/muon/,
with Nesterov's momentum. The length of a step is that of Liu et al., "Muon is Scalable for LLM Training",
https://arxiv.org/abs/2502.16982, section 2.2: by the factor 0.2 * sqrt(max(rows, columns)) its entries have a root mean
square of 0.2, about that of Adam's steps, so that one learning rate serves both.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn, optim
from torch.optim.adamw import adamw

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan's: steep at 0, and near 1 for all singular values after five steps
STEPS = 5
MOST_COLOURS = 3


def hidden_matrices(net: nn.Module) -> dict[nn.Parameter, int]:
    """The weights between the features of a network that are matrices, and how many each of them is.

    These are the weights of linear layers (out, in) and convolutions (out, in, k, k), taken as (out, in * k * k), but
    none of depthwise or other grouped convolutions, each of whose groups is a small matrix of its own. Left out as well
    are, by Jordan's rule for first and last layers, those that take or give three channels or fewer, such as pixels or
    positions, and the one that stands last in the network, which gives pixels too. Of several matrices are layers that
    `model.common.stacked` was told of.
    """
    layers = [
        layer
        for layer in net.modules()
        if (isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1))
        and layer.weight.requires_grad
    ]
    hidden = [layer for layer in layers[:-1] if min(layer.weight.shape[:2]) > MOST_COLOURS]
    return {layer.get_parameter('weight'): getattr(layer, 'n_stacked', 1) for layer in hidden}


@torch.no_grad()
def orthogonalised(matrices: Tensor) -> Tensor:
    """Each of the matrices (N, rows, columns) with its singular values brought near 1; zeros stay zeros.

    A Newton-Schulz iteration, in bfloat16 on CUDA, else in the type of the matrices.
    """
    a, b, c = COEFFICIENTS
    x = matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp_min(1e-30)
    x = x.bfloat16() if x.is_cuda else x
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


class Muon(optim.Optimizer):
    """Muon for matrices, and AdamW for the other parameters, at one learning rate.

    Like PyTorch's fused optimisers it leaves out a step, here also on a CPU, if `found_inf` is set and is not 0, which
    is a tensor on the device and is not waited for.

    Args:
        parameters: all of them.
        matrices: those of them whose steps are orthogonalised, with the number of matrices that each is: its rows in so
            many equal parts.
        lr: learning rate.
        weight_decay: decoupled, for all parameters.
        betas, epsilon: of AdamW.
        momentum: of the matrices.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        matrices: Mapping[nn.Parameter, int],
        lr: float,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        epsilon: float = 1e-8,
        momentum: float = 0.95,
    ) -> None:
        alike: dict[tuple[int, ...], list[nn.Parameter]] = {}
        for parameter in parameters:
            parts = matrices.get(parameter, 0)
            alike.setdefault((parts, *parameter.shape) if parts else (), []).append(parameter)
        groups = [{'params': group, 'parts': shape[0] if shape else 0} for shape, group in alike.items()]
        defaults = {
            'lr': lr, 'weight_decay': weight_decay, 'betas': betas, 'eps': epsilon, 'momentum': momentum, 'fused': True,
        }  # fmt: skip
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step for all parameters that have a gradient."""
        skipped = getattr(self, 'found_inf', None)
        for group in self.param_groups:
            trained = [parameter for parameter in group['params'] if parameter.grad is not None]
            if trained and group['parts']:
                self._step_matrices(trained, group, skipped)
            elif trained:
                self._step_others(trained, group, skipped)

    def _step_matrices(self, alike: list[Tensor], group: dict[str, Any], skipped: Tensor | None) -> None:
        """The step of parameters of one shape, all at once."""
        for parameter in alike:
            if not self.state[parameter]:
                self.state[parameter]['momentum'] = torch.zeros_like(parameter)
        buffers = [self.state[parameter]['momentum'] for parameter in alike]
        gradients, kept, rate = torch.stack([p.grad for p in alike]), group['momentum'], group['lr']  # type: ignore[misc]
        taken = 1 - kept
        if skipped is not None:
            gradients = gradients.masked_fill(skipped > 0, 0)  # they may be nan
            taken, rate = taken * (1 - skipped), rate * (1 - skipped)
        averages = torch.stack(buffers).lerp(gradients, taken)
        torch._foreach_copy_(buffers, list(averages))
        ahead = gradients.lerp(averages, kept)  # Nesterov
        matrices = ahead.reshape(len(alike) * group['parts'], len(alike[0]) // group['parts'], -1)
        length = 0.2 * math.sqrt(max(matrices.shape[1:]))
        steps = (orthogonalised(matrices) * (rate * length)).view_as(ahead)
        torch._foreach_mul_(alike, 1 - rate * group['weight_decay'])
        torch._foreach_sub_(alike, list(steps))

    def _step_others(self, parameters: list[Tensor], group: dict[str, Any], skipped: Tensor | None) -> None:
        """AdamW, by PyTorch's fused kernel."""
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter] = {
                    'step': torch.zeros((), device=parameter.device),
                    'exp_avg': torch.zeros_like(parameter),
                    'exp_avg_sq': torch.zeros_like(parameter),
                }
        steps, averages, squares = (
            [self.state[parameter][key] for parameter in parameters] for key in ('step', 'exp_avg', 'exp_avg_sq')
        )
        adamw(
            parameters, [p.grad for p in parameters], averages, squares, [], steps,  # type: ignore[misc]
            fused=True, found_inf=skipped, amsgrad=False, beta1=group['betas'][0], beta2=group['betas'][1],
            lr=group['lr'], weight_decay=group['weight_decay'], eps=group['eps'], maximize=False,
        )  # fmt: skip
