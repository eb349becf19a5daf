"""The loss language of EDSR: weighted terms, as in '5*VGG54+0.15*GAN'."""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn, optim

from error import UserError
from loss.adversarial import GAN, RGAN, WGANGP, MakeOptimizer, make_wgan_optimizer
from loss.charbonnier import Charbonnier
from loss.discriminator import Discriminator
from loss.frequency import Frequency
from loss.vgg import VGG


class Loss(nn.Module):
    """A sum of weighted terms between output and target, both (N, C, H, W) in the network's range.

    L1, MSE, Charbonnier and FFT are in units of that range. Adversarial terms train a discriminator of their own in
    each call; it is what `state_dict` holds, weights and optimiser.

    Args:
        text: terms `weight*NAME` joined by '+'; a term without weight counts once.
        value_range: black and white in the network's range.
        n_colors: C.
        patch_size: H and W in training.
        gan_k: steps of the discriminator a call.
        make_optimizer: makes the discriminator's optimiser (not that of WGAN_GP, which has its paper's).
        vgg: file of VGG19's weights; None: torchvision downloads it.

    Raises:
        UserError: unknown term, a weight that is not a positive number, or a term that does not go with the rest.
    """

    def __init__(
        self,
        text: str,
        value_range: tuple[float, float] = (0.0, 1.0),
        n_colors: int = 3,
        patch_size: int = 192,
        gan_k: int = 1,
        make_optimizer: MakeOptimizer = optim.Adam,
        vgg: Path | None = None,
    ) -> None:
        super().__init__()

        def adversary(kind: type[GAN], make: MakeOptimizer = make_optimizer) -> GAN:
            return kind(Discriminator(n_colors, patch_size), make, gan_k)

        terms: dict[str, Callable[[], nn.Module]] = {
            'L1': nn.L1Loss,
            'MSE': nn.MSELoss,
            'Charbonnier': lambda: Charbonnier(value_range),
            'FFT': Frequency,
            'VGG22': lambda: VGG('VGG22', value_range, n_colors, patch_size, vgg),
            'VGG54': lambda: VGG('VGG54', value_range, n_colors, patch_size, vgg),
            'GAN': lambda: adversary(GAN),
            'WGAN_GP': lambda: adversary(WGANGP, make_wgan_optimizer),
            'RGAN': lambda: adversary(RGAN),
        }
        self.weights = parse(text, terms)
        self.terms = nn.ModuleDict({name: terms[name]() for name in self.weights})
        self.adversaries = [term for term in self.terms.values() if isinstance(term, GAN)]
        self.names = [*self.terms, *(['discriminator'] if self.adversaries else [])]

    def forward(self, sr: Tensor, hr: Tensor) -> dict[str, Tensor]:
        """The weighted terms by name, in float32; the loss is their sum."""
        with torch.autocast(sr.device.type, enabled=False):
            sr, hr = sr.float(), hr.float()
            return {name: self.weights[name] * term(sr, hr) for name, term in self.terms.items()}

    def watched(self) -> list[Tensor]:
        """What `names` has besides the terms, and is no part of the loss: the last loss of the discriminators."""
        return [torch.stack([term.last_loss for term in self.adversaries]).sum()] if self.adversaries else []

    def scale_rates(self, factor: float) -> None:
        """Give what the terms train `factor` times the learning rate it started with."""
        for term in self.adversaries:
            term.scale_rate(factor)

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Continue from `state`. A term that it does not know starts anew, and others that it knows are left out.

        Raises:
            UserError: it is of other sizes.
        """
        taken = {key: state.get(key, own) for key, own in self.state_dict().items()}
        try:
            return super().load_state_dict(taken, strict, assign)
        except RuntimeError as error:
            raise UserError(
                'The discriminator of this run was trained on patches of another size: give its --patch_size again.'
            ) from error


def parse(text: str, known: Collection[str]) -> dict[str, float]:
    """The weights of a loss by term."""
    weights: dict[str, float] = {}
    for part in text.split('+'):
        weight, star, name = part.strip().rpartition('*')
        if name not in known:
            *most, last = known
            names = f'{", ".join(most)} or {last}'
            raise UserError(f'--loss {text}: unknown term {part!r}; write weight*NAME with {names}.')
        if name in weights:
            raise UserError(f'--loss {text}: the term {name} stands twice; give it once.')
        weights[name] = _weight(weight if star else '1', text)
    return weights


def _weight(text: str, loss: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = 0.0
    if not 0 < weight < float('inf'):
        raise UserError(f'--loss {loss}: the weight {text!r} is not a positive number.')
    return weight
