"""Distillation: the network learns from the output of a larger one as well as from the truth.

Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", https://arxiv.org/abs/1503.02531, here of images:
the mean absolute difference to what the teacher makes of the same LR images.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from error import UserError

Teacher = Callable[[Tensor], Tensor]


class Distill(nn.Module):
    """Mean absolute difference of output and teacher's output, (N, C, H, W) both, in units of the network's range.

    Args:
        teacher: LR images (N, C, h, w) to enlarged ones (N, C, H, W), in the range of the network that learns. Nothing
            of it is trained, or saved.

    Raises:
        UserError: there is none.
    """

    def __init__(self, teacher: Teacher | None) -> None:
        super().__init__()
        if teacher is None:
            raise UserError('--loss with Distill: it compares with another network; give its weights with --teacher.')
        self.teacher = teacher

    def forward(self, sr: Tensor, hr: Tensor, *, lr: Tensor) -> Tensor:
        with torch.no_grad():
            target = self.teacher(lr)
        return F.l1_loss(sr, target)
