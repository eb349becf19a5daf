"""What cameras and websites do to a picture before anybody enlarges it: blur, resizing, noise, JPEG.

A degradation is written as terms joined by '+', such as '0.5*blur0.2-1.2+noise5+jpeg', which are done in this order.
A term is a kind with a range that a value is drawn from, or one value, or neither for the range that is usual; a factor
before it is the chance that it is done.
`blur` acts on the HR image, before the bicubic, by which LR is made anew then; all others act on LR as it is.

The kinds and the ranges are a mild choice from those of K. Zhang et al., "Designing a practical degradation model for
deep blind image super-resolution" (BSRGAN, ICCV 2021, section 3: Gaussian blur of deviation 0.1 to 2.4 and 2.8 at x2
and x4, noise 1 to 25, JPEG 30 to 95), and X. Wang et al., "Real-ESRGAN" (ICCVW 2021, section 3 and appendix: resizing
by bicubic, bilinear and area, noise 1 to 30, Poisson noise, JPEG 30 to 95).
"""

import hashlib
import io
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from PIL import Image

from data.imresize import Border, blur_and_shrink
from data.patch import Window
from error import UserError

BLOCK = 16  # pixels along the side of what JPEG with 4:2:0 codes together


def add_noise(image: np.ndarray, deviation: float, rng: Generator) -> np.ndarray:
    """Gaussian noise of a standard deviation in units of 1/255 of white, each channel by itself."""
    return to_uint8(image + np.float32(deviation) * rng.standard_normal(image.shape, np.float32))


def add_shot_noise(image: np.ndarray, deviation: float, rng: Generator) -> np.ndarray:
    """Poisson noise of counted photons: of this standard deviation in white, less in the dark; units of 1/255."""
    if deviation < 1e-3:  # so little that no value moves, of more photons than can be counted
        return image
    photons = 255 / deviation**2  # for each of the 255 steps up to white
    return to_uint8(rng.poisson(image * photons) / photons)


def resize_and_back(image: np.ndarray, factor: float, rng: Generator) -> np.ndarray:
    """Resized by `factor` and back to its size, each by bicubic, bilinear or area, whichever is drawn."""
    kernels = (Image.Resampling.BICUBIC, Image.Resampling.BILINEAR, Image.Resampling.BOX)
    there, back = (kernels[i] for i in rng.integers(len(kernels), size=2))
    whole = Image.fromarray(image)
    width, height = (max(1, round(side * factor)) for side in whole.size)
    return np.array(whole.resize((width, height), there).resize(whole.size, back))


def compress(image: np.ndarray, quality: float, rng: Generator) -> np.ndarray:
    """As it comes back from a JPEG file of this quality, its colours at half (4:2:0) or full size, equally likely."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, 'jpeg', quality=round(quality), subsampling=2 if rng.random() < 0.5 else 0)
    return np.array(Image.open(file))


def to_uint8(image: np.ndarray) -> np.ndarray:
    """Values rounded and clipped to 0 to 255."""
    return np.rint(image).clip(0, 255).astype(np.uint8)


@dataclass(frozen=True)
class Kind:
    """A kind of degradation.

    Attributes:
        usual: the range of values if none is given.
        least, most: bounds of the values.
        act: gives an image (H, W, 3) uint8 from one of the same size, a value, and what draws at random; None for the
            blur, which is done with the bicubic.
        margin: LR pixels beyond a window that a value may need.
        multiple: where windows of the image have to begin.
    """

    usual: tuple[float, float]
    least: float
    most: float
    act: Callable[[np.ndarray, float, Generator], np.ndarray] | None = None
    margin: int = 0
    multiple: int = 1


KINDS = {
    'blur': Kind((0.2, 1.2), 0, 8),  # standard deviation, HR pixels
    'resize': Kind((0.7, 1.4), 0.25, 4, resize_and_back, 16),  # factor
    'noise': Kind((0, 6), 0, 100, add_noise),  # standard deviation of 255
    'poisson': Kind((0, 6), 0, 100, add_shot_noise),  # the same in white
    'jpeg': Kind((40, 95), 1, 100, compress, 2, BLOCK),  # quality; a decoder smooths colours over 2 pixels
}
PRESETS = {'photo': '0.1*blur0.2-1+0.2*noise0-6+0.6*jpeg30-95'}


@dataclass(frozen=True)
class Term:
    """One step of a degradation, done with some chance."""

    kind: Kind
    low: float
    high: float
    chance: float


class Degradation:
    """Makes degraded LR images, as `text` says.

    Args:
        text: terms [chance*]KIND[value or low-high] joined by '+', or the name of a preset.
        scale: factor between HR and LR.
        border: of the bicubic, for blur.

    Raises:
        UserError: what is no degradation.

    Attributes:
        text: what was given.
    """

    def __init__(self, text: str, scale: int, border: Border = 'mirror') -> None:
        self.text, self.scale, self.border = text, scale, border
        self.terms = parse(text)

    def of_image(self, lr: np.ndarray, hr: np.ndarray, name: str) -> np.ndarray:
        """A whole LR image (H, W, 3) uint8, always the same for the `name` of the image; HR is that times the scale."""
        digest = hashlib.sha256(f'{self.text}\n{name}'.encode(errors='surrogateescape')).digest()
        rng = np.random.default_rng(int.from_bytes(digest[:8], 'little'))
        return self.of_window(lr, hr, Window(0, lr.shape[0], 0, lr.shape[1]), rng)

    def of_window(self, lr: np.ndarray, hr: np.ndarray, window: Window, rng: Generator) -> np.ndarray:
        """The window of the degraded LR image, (bottom - top, right - left, 3) uint8.

        Blur and JPEG give what they give in the whole image; noise and resizing are drawn for the window alone.

        Args:
            lr: the whole image (H, W, 3) uint8.
            hr: (scale * H, scale * W, 3) uint8.
            window: of `lr`.
            rng: what all values are drawn from.
        """
        done = [(term, rng.uniform(term.low, term.high)) for term in self.terms if rng.random() < term.chance]
        margin, multiple = sum(term.kind.margin for term, _ in done), max([1, *(t.kind.multiple for t, _ in done)])
        region = window.grown(margin, multiple, *lr.shape[:2])
        image = region.of(lr)
        for term, value in done:
            if term.kind.act:
                image = term.kind.act(image, value, rng)
            else:
                image = blur_and_shrink(hr, self.scale, value, self.border, *region)
        return window.of(image, region)


def parse(text: str) -> list[Term]:
    """The terms of a degradation, or of a preset.

    Raises:
        UserError: a term that is none, stands twice or out of its range, or a blur that is not the first.
    """
    found: dict[str, Term] = {}
    for part in PRESETS.get(text, text).split('+'):
        match = re.fullmatch(r'(?:([\d.]+)\*)?([a-z]+)(?:([\d.]+)(?:-([\d.]+))?)?', part.strip())
        name = match[2] if match else ''
        if match is None or name not in KINDS:
            raise UserError(
                f'--degradation {text}: unknown term {part!r}; write one of {", ".join(KINDS)} with a range, such as '
                f'noise0-6, or a preset ({", ".join(PRESETS)}).'
            )
        if name in found:
            raise UserError(f'--degradation {text}: the term {name} stands twice; give it once.')
        if name == 'blur' and found:
            raise UserError(f'--degradation {text}: blur comes before the bicubic that makes LR; name it first.')
        found[name] = _term(text, part, KINDS[name], match)
    return list(found.values())


def _term(text: str, part: str, kind: Kind, match: re.Match[str]) -> Term:
    low, high = kind.usual
    try:
        chance = float(match[1] or 1)
        if match[3]:
            low, high = float(match[3]), float(match[4] or match[3])
    except ValueError:
        chance = -1.0
    if not 0 <= chance <= 1 or not kind.least <= low <= high <= kind.most:
        raise UserError(
            f'--degradation {text}: {part} is out of range; its values are {kind.least:g} to {kind.most:g}, rising, '
            'and the chance before a * is 0 to 1.'
        )
    return Term(kind, low, high, chance)
