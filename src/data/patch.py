"""Training patches: which image, where, and how it is turned, as a pure function of (seed, sample number)."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np


@dataclass(frozen=True)
class Draw:
    """One random choice.

    Attributes:
        image: index of the image.
        y: vertical place of the patch in [0, 1), 0 at the top.
        x: horizontal place in [0, 1), 0 at the left.
        flips: mirror left-right, mirror up-down, transpose.
    """

    image: int
    y: float
    x: float
    flips: tuple[bool, bool, bool]


class Window(NamedTuple):
    """A rectangle of an LR image: rows top to bottom, columns left to right, the last ones excluded."""

    top: int
    bottom: int
    left: int
    right: int

    def grown(self, margin: int, multiple: int, height: int, width: int) -> 'Window':
        """At least `margin` pixels larger, to multiples of `multiple`, and within an image of height and width."""
        top, left = (max(0, place - margin) // multiple * multiple for place in (self.top, self.left))
        bottom, right = (-(-(place + margin) // multiple) * multiple for place in (self.bottom, self.right))
        return Window(top, min(bottom, height), left, min(right, width))

    def of(self, image: np.ndarray, origin: 'Window | None' = None) -> np.ndarray:
        """This part of an image, which may be the part `origin` of a larger one."""
        top, left = (origin.top, origin.left) if origin else (0, 0)
        return image[self.top - top : self.bottom - top, self.left - left : self.right - left]


@lru_cache(maxsize=4)
def shuffled(seed: int, turn: int, length: int) -> np.ndarray:
    """Order in which the images are seen the `turn`-th time round."""
    return np.random.default_rng((seed, 0, turn)).permutation(length)


def draw(seed: int, number: int, length: int, area_ends: np.ndarray | None = None) -> Draw:
    """The random choice of sample `number` from `length` images.

    Args:
        seed: of all choices.
        number: of the sample.
        length: number of images; every run of `length` samples sees each of them once.
        area_ends: (length,) cumulative sums of the pixels of the images, for choices in proportion to them instead.
    """
    y, x, *coins, place = np.random.default_rng((seed, 1, number)).random(6)
    left, up, turned = (bool(coin < 0.5) for coin in coins)
    if area_ends is None:
        turn, position = divmod(number, length)
        image = int(shuffled(seed, turn, length)[position])
    else:
        image = int(np.searchsorted(area_ends, place * area_ends[-1], side='right'))
    return Draw(image, float(y), float(x), (left, up, turned))


def plain(lr: np.ndarray, hr: np.ndarray, window: Window) -> np.ndarray:
    """A window of the LR image as it is."""
    return window.of(lr)


def cut(
    lr: np.ndarray,
    hr: np.ndarray,
    scale: int,
    side: int,
    choice: Draw,
    view: Callable[[np.ndarray, np.ndarray, Window], np.ndarray] = plain,
) -> tuple[np.ndarray, np.ndarray]:
    """The patches of a draw, not yet flipped.

    Args:
        lr: (H, W, C).
        hr: (scale * H, scale * W, C).
        scale: factor between the two.
        side: of the LR patch, in pixels. An image that is smaller is continued by its mirror image, which is what the
            bicubic with mirrored borders assumes beyond the edge.
        choice: where to cut.
        view: gives a window of the LR image from both images, as a degradation does.

    Returns:
        (side, side, C) and (scale * side, scale * side, C).
    """
    if min(lr.shape[:2]) < side:
        lr, hr = mirrored(lr, side), mirrored(hr, scale * side)
    y = int(choice.y * (lr.shape[0] - side + 1))
    x = int(choice.x * (lr.shape[1] - side + 1))
    top, left, hr_side = scale * y, scale * x, scale * side
    return view(lr, hr, Window(y, y + side, x, x + side)), hr[top : top + hr_side, left : left + hr_side]


def mirrored(image: np.ndarray, side: int) -> np.ndarray:
    """Continue (H, W, C) at the bottom and right by its mirror image to at least (side, side, C)."""
    down, right = (max(0, side - n) for n in image.shape[:2])
    return np.pad(image, ((0, down), (0, right), (0, 0)), mode='symmetric')
