"""PSNR and SSIM as super-resolution papers report them: the values of the field's MATLAB scripts.

`METRICS` is the table that everything else goes by: a metric is added by its function and one row at the end of the
file. A function takes uint8 RGB images, drops `shave` pixels on every side, and compares the luma ('Y') or all channels
('RGB').
"""

import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

Channels = Literal['Y', 'RGB']

WINDOW = 11  # side of the SSIM window in pixels
SIGMA = 1.5
PEAK = 255


def luma(rgb: np.ndarray) -> np.ndarray:
    """Studio-range luma Y of ITU-R BT.601, unrounded, as MATLAB's `rgb2ycbcr` gives it for doubles.

    rgb: uint8 (H, W, 3). Returns float64 (H, W) in [16, 235].
    """
    return rgb @ np.array([65.481, 128.553, 24.966]) / 255 + 16


def psnr(sr: np.ndarray, hr: np.ndarray, shave: int, channels: Channels = 'Y') -> float:
    """Peak signal-to-noise ratio, 10 log10(255^2 / MSE), in dB; `math.inf` for identical images.

    sr, hr: uint8 (H, W, 3); shave: pixels dropped on every side.
    Raises ValueError if the shapes differ or nothing is left after shaving.
    """
    difference = np.subtract(*_planes(sr, hr, shave, channels))
    error = float(np.mean(difference**2))
    return 10 * math.log10(PEAK**2 / error) if error else math.inf


def ssim(sr: np.ndarray, hr: np.ndarray, shave: int, channels: Channels = 'Y') -> float:
    """Mean structural similarity, at most 1; for 'RGB' the mean over the channels.

    sr, hr, shave and errors as for `psnr`. An image that is smaller than the window (11x11) after shaving has no SSIM:
    `math.nan`, so that one tiny image does not end an evaluation.

    Source: Wang et al., "Image quality assessment: from error visibility to structural similarity", IEEE TIP 2004:
    Gaussian window of sigma 1.5, K1 = 0.01, K2 = 0.03, biased variances, only windows inside the image.
    """
    planes = _planes(sr, hr, shave, channels)
    if min(planes[0].shape[1:]) < WINDOW:
        return math.nan
    return statistics.fmean(_ssim_plane(x, y) for x, y in zip(*planes, strict=True))


@dataclass(frozen=True)
class Metric:
    """A row of `METRICS`.

    Attributes:
        name: its key in results.json and metrics.jsonl.
        title: what tables and curves call it.
        measure: its function: the value of (sr, hr, shave, channels), as `psnr`.
        unit: of its values; empty if they have none.
        digits: after the point, where it is shown.
        higher_is_better: which of two values is the better one.
        slow: while training it is measured with --ssim alone.
    """

    name: str
    title: str
    measure: Callable[[np.ndarray, np.ndarray, int, Channels], float]
    unit: str = ''
    digits: int = 2
    higher_is_better: bool = True
    slow: bool = False

    @property
    def label(self) -> str:
        """Its title and unit, for an axis: PSNR (dB)."""
        return f'{self.title} ({self.unit})' if self.unit else self.title

    def text(self, value: float | None) -> str:
        """A value with the digits of the metric: 30.12; - if there is none (None or nan)."""
        return '-' if value is None or math.isnan(value) else f'{value:.{self.digits}f}'

    def text_with_unit(self, value: float | None) -> str:
        """30.12 dB."""
        return f'{self.text(value)} {self.unit}'.rstrip()

    def is_better(self, value: float, other: float) -> bool:
        """Whether `value` is better than `other`; never if one of them is nan."""
        return value > other if self.higher_is_better else value < other


def mean(values: Iterable[float]) -> float:
    """The value of a set: the mean over the images that have one (not nan), nan if none has. Infinity carries over."""
    known = [value for value in values if not math.isnan(value)]
    return statistics.fmean(known) if known else math.nan


def _planes(sr: np.ndarray, hr: np.ndarray, shave: int, channels: Channels) -> tuple[np.ndarray, np.ndarray]:
    """What is compared: both images shaved, as float64 (1 or 3, H, W)."""
    if sr.shape != hr.shape:
        raise ValueError(f'images of different shapes cannot be compared: {sr.shape} and {hr.shape}')
    height, width = sr.shape[:2]
    if min(height, width) <= 2 * shave:
        raise ValueError(f'nothing is left of an image of {height}x{width} pixels after shaving {shave} on every side')
    if channels not in ('Y', 'RGB'):
        raise ValueError(f"channels must be 'Y' or 'RGB', not {channels!r}")

    def plane(image: np.ndarray) -> np.ndarray:
        inside = image[shave : height - shave, shave : width - shave]
        return luma(inside)[None] if channels == 'Y' else inside.transpose(2, 0, 1).astype(np.float64, order='C')

    return plane(sr), plane(hr)


def _ssim_plane(x: np.ndarray, y: np.ndarray) -> float:
    c1, c2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2
    mean_x, mean_y = _blur(x), _blur(y)
    product, squares = mean_x * mean_y, mean_x**2 + mean_y**2
    covariance = _blur(x * y) - product
    variances = _blur(x**2 + y**2) - squares  # of x plus of y: SSIM needs only their sum
    score = (2 * product + c1) * (2 * covariance + c2) / ((squares + c1) * (variances + c2))
    return float(score.mean())


def _blur(plane: np.ndarray) -> np.ndarray:
    """Gaussian mean of every window inside (H, W): (H - 10, W - 10)."""
    gauss = np.exp(-((np.arange(WINDOW) - WINDOW // 2) ** 2) / (2 * SIGMA**2))
    gauss /= gauss.sum()
    rows, columns = (size - WINDOW + 1 for size in plane.shape)
    plane = sum(g * plane[i : i + rows] for i, g in enumerate(gauss))
    return sum(g * plane[:, i : i + columns] for i, g in enumerate(gauss))


# The first one decides which epoch is the best, and stands in captions and curves.
METRICS = (
    Metric('psnr', 'PSNR', psnr, unit='dB', digits=2),
    Metric('ssim', 'SSIM', ssim, digits=4, slow=True),
)
