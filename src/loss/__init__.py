"""The loss language of EDSR: weighted terms, as in '1*L1+0.5*MSE'."""

from torch import Tensor, nn

from error import UserError

TERMS = {'L1': nn.L1Loss, 'MSE': nn.MSELoss}


class Loss(nn.Module):
    """A sum of weighted terms between output and target, both (N, C, H, W) in the network's range.

    Args:
        text: terms `weight*NAME` joined by '+'; a term without weight counts once.

    Raises:
        UserError: unknown term, or a weight that is not a positive number.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.weights: dict[str, float] = {}
        self.terms = nn.ModuleDict()
        for part in text.split('+'):
            weight, star, name = part.strip().rpartition('*')
            if name not in TERMS:
                raise UserError(f'--loss {text}: unknown term {part!r}; write weight*NAME with {" or ".join(TERMS)}.')
            if name in self.weights:
                raise UserError(f'--loss {text}: the term {name} stands twice; give it once.')
            self.weights[name] = _weight(weight if star else '1', text)
            self.terms[name] = TERMS[name]()

    def forward(self, sr: Tensor, hr: Tensor) -> dict[str, Tensor]:
        """The weighted terms by name; the loss is their sum."""
        return {name: self.weights[name] * term(sr, hr) for name, term in self.terms.items()}


def _weight(text: str, loss: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = 0.0
    if not 0 < weight < float('inf'):
        raise UserError(f'--loss {loss}: the weight {text!r} is not a positive number.')
    return weight
