"""An image before and after it was enlarged, as files that a browser likes, and where to look."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from data.image import Photo, eight_bits, write_png

WHOLE = 2_000_000  # pixels that a whole image is shown with, at most
DETAIL = (768, 576)  # width and height of a part that is shown pixel by pixel
CELLS = 64  # along the longer side of an image, in which differences are added up
MARGIN = 0.15  # of the width, which the slider opens at least away from the borders


@dataclass(frozen=True)
class Pair:
    """Two files of one size, before and after, and where the two differ most: share of the width, from the left."""

    before: Path
    after: Path
    size: tuple[int, int]
    at: float


@dataclass(frozen=True)
class Comparison:
    """The whole image, and the part with most detail, pixel by pixel; None if the image is no larger than that."""

    whole: Pair
    detail: Pair | None

    @property
    def files(self) -> list[Path]:
        """All files that are shown."""
        return [file for pair in (self.whole, self.detail) if pair for file in (pair.before, pair.after)]


def compare(photo: Photo, sr: np.ndarray, folder: Path) -> Comparison:
    """Write files that show a photograph, enlarged by bicubic interpolation, beside its enlargement.

    Args:
        photo: before.
        sr: after, (H, W) or (H, W, 2 to 4), a multiple of its size.
        folder: of the files.
    """
    height, width = sr.shape[:2]
    lr = photo.samples.squeeze(2) if photo.samples.shape[2] == 1 else photo.samples
    before, after = (Image.fromarray(eight_bits(pixels)) for pixels in (lr, sr))
    scale = width / before.width
    share = min(1, (WHOLE / (height * width)) ** 0.5)
    size = (max(1, round(width * share)), max(1, round(height * share)))
    whole = [np.asarray(image.resize(size, Image.Resampling.BICUBIC)) for image in (before, after)]
    shown = write_pair(whole, folder, '', photo)
    if width <= DETAIL[0] and height <= DETAIL[1]:
        return Comparison(shown, None)
    left, top, right, bottom = most_detail(difference(*whole), width, height)
    box = (left / scale, top / scale, right / scale, bottom / scale)
    part = before.resize((right - left, bottom - top), Image.Resampling.BICUBIC, box)
    pair = [np.asarray(part), np.asarray(after.crop((left, top, right, bottom)))]
    return Comparison(shown, write_pair(pair, folder, 'detail-', photo))


def write_pair(images: list[np.ndarray], folder: Path, prefix: str, photo: Photo) -> Pair:
    """Write the two images of a pair, with what the photograph says of its colours."""
    before, after = folder / f'{prefix}before.png', folder / f'{prefix}after.png'
    for file, pixels in zip((before, after), images, strict=True):
        write_png(file, pixels, photo.icc, photo.chunks)
    height, width = images[0].shape[:2]
    return Pair(before, after, (width, height), most_different_column(difference(*images)))


def difference(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """How much two images of one shape, uint8, differ at each pixel, (H, W), in their own units."""
    gap = np.abs(before.astype(np.int16) - after)
    return gap if gap.ndim == 2 else gap.mean(2)


def most_detail(gap: np.ndarray, width: int, height: int) -> tuple[int, int, int, int]:
    """The part of an image of that size, at most DETAIL, with the greatest difference: left, top, right, bottom."""
    columns, rows = (max(1, round(CELLS * length / max(width, height))) for length in (width, height))
    cells = np.asarray(Image.fromarray(gap.astype(np.float32)).resize((columns, rows), Image.Resampling.BOX))
    sums = np.pad(cells.astype(np.float64), ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    wide, high = min(width, DETAIL[0]), min(height, DETAIL[1])
    across, down = max(1, round(columns * wide / width)), max(1, round(rows * high / height))
    total = sums[down:, across:] - sums[:-down, across:] - sums[down:, :-across] + sums[:-down, :-across]
    best = np.argwhere(total >= 0.99 * total.max())
    row, column = best[np.abs(best - best.mean(0)).sum(1).argmin()]  # so that it is not at the border of the part
    left, top = (
        min(round(cell * length / count), length - part)
        for cell, length, count, part in ((column, width, columns, wide), (row, height, rows, high))
    )
    return left, top, left + wide, top + high


def most_different_column(gap: np.ndarray) -> float:
    """Where the columns around differ most, share of the width; the middle if nothing differs."""
    columns = gap.mean(0)
    around, sums = max(1, len(columns) // 10), np.concatenate(([0.0], columns.cumsum()))
    last = np.arange(len(columns)) + (around - 1) // 2 + 1
    sums = sums[np.minimum(last, len(columns))] - sums[np.maximum(last - around, 0)]
    most = np.flatnonzero(sums >= 0.99 * sums.max())
    return float(np.clip((np.median(most) + 0.5) / len(sums), MARGIN, 1 - MARGIN)) if sums.any() else 0.5
