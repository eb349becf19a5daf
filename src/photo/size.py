"""How large a result is to be, and which networks bring a photograph there."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations_with_replacement

from error import UserError

LARGEST = 8  # factor


@dataclass(frozen=True)
class Size:
    """What a result is to measure: a factor, a width, a height, or a frame of both to fit into; one of them is given.

    Attributes:
        scale: factor of enlargement, above 0.
        width: of the result, pixels.
        height: of it; with `width` the result is as large as fits into both.
    """

    scale: float | None = None
    width: int | None = None
    height: int | None = None

    def of(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the result of a photograph, the shape kept as nearly as whole pixels allow.

        Raises:
            UserError: it would be more than `LARGEST` times as large.
        """
        frames = [Fraction(new, old) for new, old in ((self.width, width), (self.height, height)) if new]
        factor = Fraction(self.scale) if self.scale else min(frames)
        if factor > LARGEST:
            raise UserError(
                f'{width}x{height} pixels would be enlarged {float(factor):.4g} times; {LARGEST} times is the most: '
                'give a smaller size.'
            )
        half = Fraction(1, 2)
        return max(1, math.floor(height * factor + half)), max(1, math.floor(width * factor + half))

    def __str__(self) -> str:
        if self.scale:
            return f'x{self.scale:g}'
        return f'{self.width or ""}x{self.height or ""}'


def steps(old: tuple[int, int], new: tuple[int, int], scales: Iterable[int]) -> tuple[int, ...]:
    """The factors of networks that together enlarge (height, width) to `new` or, as little as can be, beyond it.

    One network where that is enough, otherwise two; none where nothing is to be enlarged.

    Raises:
        UserError: two are not enough.
    """
    height, width = old

    def reaches(*factors: int) -> bool:
        product = math.prod(factors)
        return height * product >= new[0] and width * product >= new[1]

    if reaches():
        return ()
    rising = sorted(set(scales))
    choices = [found for n in (1, 2) for found in combinations_with_replacement(rising, n) if reaches(*found)]
    if not choices:
        there = ', '.join(f'x{scale}' for scale in rising) or 'none'
        raise UserError(
            f'{width}x{height} pixels become {new[1]}x{new[0]} with no two of the weights there are ({there}): give '
            'a smaller size, or other weights.'
        )
    best = min(choices, key=lambda found: (len(found), math.prod(found)))
    return tuple(reversed(best))  # the larger one first: of two orders the one whose second network sees clean pixels
