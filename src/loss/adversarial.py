"""The adversarial losses of EDSR.

Departures from its code: the gradient penalty draws one point between fake and real an image, as its paper does (EDSR's
line draws one a value and fails), and a batch whose gradients are not finite does not touch the discriminator.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn, optim

from optimizer import set_learning_rate

MakeOptimizer = Callable[[Iterable[nn.Parameter]], optim.Optimizer]

# Gulrajani et al., algorithm 1, with EDSR's learning rate.
make_wgan_optimizer = partial(optim.Adam, lr=1e-5, betas=(0.0, 0.9), eps=1e-8)


class GAN(nn.Module):
    """Cross-entropy (Goodfellow et al., https://arxiv.org/abs/1406.2661, with the generator's loss -log D).

    A call trains the discriminator, then gives the generator's loss. Its gradient is that of the generator alone.

    Args:
        discriminator: images (N, C, H, W) in the network's range to logits (N, 1).
        make_optimizer: makes its optimiser.
        steps: of the discriminator a call.
    """

    whole_batches = True

    def __init__(self, discriminator: nn.Module, make_optimizer: MakeOptimizer, steps: int = 1) -> None:
        super().__init__()
        self.discriminator, self.steps = discriminator, steps
        self.optimizer = make_optimizer(discriminator.parameters())

    def forward(self, sr: Tensor, hr: Tensor) -> Tensor:
        for _ in range(self.steps):
            real = self._train(sr.detach(), hr)
        self.discriminator.requires_grad_(False)
        fake = self.discriminator(sr)
        self.discriminator.requires_grad_(True)
        return self.generator_loss(fake, real)

    def _train(self, sr: Tensor, hr: Tensor) -> Tensor:
        """One step of the discriminator; returns its logits of `hr` before it."""
        fake, real = self.discriminator(sr), self.discriminator(hr)
        loss = self.discriminator_loss(fake, real) + self.penalty(sr, hr)
        self.last_loss = loss.detach()
        self.optimizer.zero_grad()
        loss.backward()
        if nn.utils.get_total_norm(p.grad for p in self.discriminator.parameters() if p.grad is not None).isfinite():
            self.optimizer.step()
        return real.detach()

    def discriminator_loss(self, fake: Tensor, real: Tensor) -> Tensor:
        """Of logits."""
        return cross_entropy(real, fake)

    def generator_loss(self, fake: Tensor, real: Tensor) -> Tensor:
        """Of logits, those of the real images as the last step of the discriminator saw them."""
        return F.softplus(-fake).mean()

    def penalty(self, sr: Tensor, hr: Tensor) -> Tensor | float:
        """What the discriminator's loss has besides."""
        return 0.0

    def scale_rate(self, factor: float) -> None:
        """Give the optimiser `factor` times the learning rate it was made with."""
        set_learning_rate(self.optimizer, factor * self.optimizer.defaults['lr'])

    def get_extra_state(self) -> Any:
        """The optimiser's state; its hyperparameters come from the options."""
        return self.optimizer.state_dict()['state']

    def set_extra_state(self, state: Any) -> None:
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), 'state': state})


class WGANGP(GAN):
    """Wasserstein distance with gradient penalty (Gulrajani et al., https://arxiv.org/abs/1704.00028)."""

    def discriminator_loss(self, fake: Tensor, real: Tensor) -> Tensor:
        return fake.mean() - real.mean()

    def generator_loss(self, fake: Tensor, real: Tensor) -> Tensor:
        return -fake.mean()

    def penalty(self, sr: Tensor, hr: Tensor) -> Tensor:
        """10 (|gradient| - 1)^2 between fake and real images, in units of the network's range."""
        share = torch.rand(len(sr), 1, 1, 1, dtype=sr.dtype, device=sr.device)
        between = torch.lerp(sr, hr, share).requires_grad_()
        (gradient,) = torch.autograd.grad(self.discriminator(between).sum(), between, create_graph=True)
        return 10 * (gradient.flatten(1).norm(dim=1) - 1).square().mean()


class RGAN(GAN):
    """Cross-entropy of how much more real than the mean of the others (ESRGAN, https://arxiv.org/abs/1809.00219)."""

    def discriminator_loss(self, fake: Tensor, real: Tensor) -> Tensor:
        return cross_entropy(real - fake.mean(0), fake - real.mean(0))

    def generator_loss(self, fake: Tensor, real: Tensor) -> Tensor:
        return self.discriminator_loss(real, fake)


def cross_entropy(real: Tensor, fake: Tensor) -> Tensor:
    """Binary cross-entropy of logits that should be above 0, plus that of logits that should be below."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()
