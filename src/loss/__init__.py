"""The loss: weighted terms, as in '5*VGG54+0.15*GAN'.

A term is a module in a file of its own, and a row of `TERMS`; `python src/tables.py` writes what options and help read
of the table into terms.json. A term's `forward(sr, hr)` takes output and target, both (N, C, H, W) float32 in the
network's range, and gives a mean over the batch. It may ask for more by keyword, and is given what it asks for:

- `lr`: the images that the output was made from, (N, C, h, w) float32 in the network's range;
- `step`: the number of steps that were made before this one, int64 () on the device.

A class with `whole_batches = True` is of use on whole batches only: not in parts of them, nor in several processes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn, optim

from error import UserError
from loss.adversarial import GAN, RGAN, WGANGP, MakeOptimizer, make_wgan_optimizer
from loss.charbonnier import Charbonnier
from loss.discriminator import Discriminator
from loss.distill import Distill, Teacher
from loss.frequency import Frequency
from loss.vgg import VGG
from loss_language import parse

ON_REQUEST = ('lr', 'step')  # what a term may ask for


@dataclass(frozen=True)
class Setup:
    """What a term may be made from; the attributes are the arguments of `Loss`."""

    value_range: tuple[float, float]
    n_colors: int
    patch_size: int
    gan_k: int
    make_optimizer: MakeOptimizer
    vgg: Path | None
    teacher: Teacher | None

    def discriminator(self) -> Discriminator:
        """A new one, for patches of this size."""
        return Discriminator(self.n_colors, self.patch_size)

    def perceptual(self, name: str) -> tuple[Any, ...]:
        """The arguments of `VGG`, whose `name` is VGG22 or VGG54."""
        return name, self.value_range, self.n_colors, self.patch_size, self.vgg


@dataclass(frozen=True)
class Term:
    """A term of the loss: its class, and the arguments that it is made with."""

    kind: type[nn.Module]
    arguments: Callable[[Setup], tuple[Any, ...]] = lambda setup: ()

    @property
    def whole_batches(self) -> bool:
        """Whether it is of use on whole batches only."""
        return getattr(self.kind, 'whole_batches', False)


TERMS: dict[str, Term] = {
    'L1': Term(nn.L1Loss),
    'MSE': Term(nn.MSELoss),
    'Charbonnier': Term(Charbonnier, lambda setup: (setup.value_range,)),
    'FFT': Term(Frequency),
    'Distill': Term(Distill, lambda setup: (setup.teacher,)),
    'VGG22': Term(VGG, lambda setup: setup.perceptual('VGG22')),
    'VGG54': Term(VGG, lambda setup: setup.perceptual('VGG54')),
    'GAN': Term(GAN, lambda setup: (setup.discriminator(), setup.make_optimizer, setup.gan_k)),
    'WGAN_GP': Term(WGANGP, lambda setup: (setup.discriminator(), make_wgan_optimizer, setup.gan_k)),
    'RGAN': Term(RGAN, lambda setup: (setup.discriminator(), setup.make_optimizer, setup.gan_k)),
}


class Loss(nn.Module):
    """A sum of weighted terms between output and target, both (N, C, H, W) in the network's range.

    L1, MSE, Charbonnier, FFT and Distill are in units of that range. Adversarial terms train a discriminator of their
    own in each call; it is what `state_dict` holds, weights and optimiser.

    Args:
        text: terms `weight*NAME` joined by '+'; a term without weight counts once.
        value_range: black and white in the network's range.
        n_colors: C.
        patch_size: H and W in training.
        gan_k: steps of the discriminator a call.
        make_optimizer: makes the discriminator's optimiser (not that of WGAN_GP, which has its paper's).
        vgg: file of VGG19's weights; None: torchvision downloads it.
        teacher: what Distill learns from.

    Raises:
        UserError: unknown term, a weight that is not a positive number, or a term that does not go with the rest.

    Attributes:
        names: of the values that are logged: the terms, and 'discriminator' if there are any.
        asked: what each term wants to see besides output and target, of `ON_REQUEST`.
        whole_batches: names of the terms that need whole batches.
        adversaries: terms that train a discriminator.
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
        teacher: Teacher | None = None,
    ) -> None:
        super().__init__()
        setup = Setup(value_range, n_colors, patch_size, gan_k, make_optimizer, vgg, teacher)
        self.weights = parse(text, TERMS)
        self.terms = nn.ModuleDict({name: TERMS[name].kind(*TERMS[name].arguments(setup)) for name in self.weights})
        self.asked = {name: wishes(term) for name, term in self.terms.items()}
        self.whole_batches = [name for name in self.terms if TERMS[name].whole_batches]
        self.adversaries = [term for term in self.terms.values() if isinstance(term, GAN)]
        self.names = [*self.terms, *(['discriminator'] if self.adversaries else [])]

    def forward(
        self, sr: Tensor, hr: Tensor, *, lr: Tensor | None = None, step: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The weighted terms by name, in float32; the loss is their sum.

        Args:
            sr, hr: output and target, (N, C, H, W) in the network's range.
            lr: what the output was made from, (N, C, h, w) in the network's range, if a term `wants` it.
            step: number of steps before this one, int64 () on the device, if a term `wants` it.
        """
        with torch.autocast(sr.device.type, enabled=False):
            sr, hr = sr.float(), hr.float()
            known = {'lr': None if lr is None else lr.float(), 'step': step}
            return {
                name: self.weights[name] * term(sr, hr, **{key: known[key] for key in self.asked[name]})
                for name, term in self.terms.items()
            }

    def wants(self, name: str) -> bool:
        """Whether a term asks for `lr` or for `step`."""
        return any(name in asked for asked in self.asked.values())

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


def wishes(term: nn.Module) -> list[str]:
    """What `forward` of a term takes by keyword, of `ON_REQUEST`."""
    taken = signature(term.forward).parameters
    return [name for name in ON_REQUEST if name in taken]
