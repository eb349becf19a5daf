"""MATLAB's `imresize(image, ..., 'bicubic')`: by integer factors bit for bit, and to any size.

Two things set it apart from other bicubic code: shrinking stretches the kernel (antialiasing), and an image of integers
is rounded after each of the two passes, first along the side with the smaller factor, of equal ones along the height.

Kernel: R. G. Keys, "Cubic convolution interpolation for digital image processing", IEEE TASSP 1981, with a = -0.5.
"""

import math
from fractions import Fraction
from typing import Literal

import numpy as np

Border = Literal['mirror', 'clamp', 'wrap']

TOGETHER = 8  # output rows in one product, at most


def shrink(image: np.ndarray, scale: int, border: Border = 'mirror') -> np.ndarray:
    """Shrinks an image by an integer: how the low-resolution side of every benchmark was made.

    image: uint8 (H, W) or (H, W, C). Rows and columns beyond a multiple of `scale` are cropped first.
    border: what lies outside the image. 'mirror' reflects it, edge pixel included (EDSR's benchmark package);
        'clamp' repeats the edge pixel (RCAN's test package, made with an older MATLAB); 'wrap' goes on at the
        opposite edge.
    Returns uint8 (H // scale, W // scale) or (H // scale, W // scale, C).
    Raises ValueError if the image is not uint8 or is smaller than `scale` in a direction.
    """
    height, width = image.shape[:2]
    if min(height, width) < scale:
        raise ValueError(f'an image of {height}x{width} pixels cannot be shrunk by {scale}; it needs {scale}x{scale}')
    return _resize(_bytes(image)[: height - height % scale, : width - width % scale], 1, scale, border)


def upscale_bicubic(image: np.ndarray, scale: int, border: Border = 'mirror') -> np.ndarray:
    """Enlarges an image by an integer: the bicubic baseline.

    image: uint8 (H, W) or (H, W, C) of at least one pixel; border: as for `shrink`.
    Returns uint8 (H * scale, W * scale) or (H * scale, W * scale, C). Raises ValueError if the image is not uint8.
    """
    return _resize(_bytes(image), scale, 1, border)


def resize(image: np.ndarray, height: int, width: int, border: Border = 'mirror') -> np.ndarray:
    """An image of another size, as `imresize(image, [height width], 'bicubic')` gives it.

    image: uint8 or uint16 (H, W) or (H, W, C) of at least one pixel; border: as for `shrink`.
    Returns the same type, (height, width) or (height, width, C), both at least 1.
    """
    sides = height, width
    if min(sides) < 1:
        raise ValueError(f'an image of {height}x{width} pixels has none; both sides must be 1 or more')
    factors = [Fraction(new, old) for new, old in zip(sides, image.shape, strict=False)]
    for axis in (0, 1) if factors[0] <= factors[1] else (1, 0):
        up, down = factors[axis].as_integer_ratio()
        image = _resize_rows(image.swapaxes(0, axis), up, down, border).swapaxes(0, axis)
    return np.ascontiguousarray(image)


def blur_and_shrink(
    image: np.ndarray, scale: int, deviation: float, border: Border, top: int, bottom: int, left: int, right: int
) -> np.ndarray:
    """A window of what `shrink` gives of an image after a Gaussian blur.

    Blur and bicubic are one kernel, so that nothing is rounded between them. It is computed in float32: without blur
    the window is that of `shrink`, except where a value lies so near to a half that this decides.

    image: uint8 (H, W, C), its sides multiples of `scale`; deviation: standard deviation of the Gaussian in pixels of
    the image, cut off at 4 of them; border: as for `shrink`; top, bottom, left, right: the window in pixels of the
    result, the last row and column excluded.
    Returns uint8 (bottom - top, right - left, C).
    """
    first, weights = _weights(1, scale)
    reach = math.ceil(4 * deviation)
    gaussian = np.exp(-0.5 * (np.arange(-reach, reach + 1) / max(deviation, 1e-9)) ** 2)
    kernel = np.convolve(weights[0], gaussian / gaussian.sum()).astype(np.float32)

    def sources(start: int, stop: int, size: int) -> np.ndarray:
        begin = first - reach + start * scale
        return _outside(np.arange(begin, begin + (stop - start - 1) * scale + len(kernel)), size, border)

    def shrink_rows(rows: np.ndarray) -> np.ndarray:
        count = (len(rows) - len(kernel)) // scale + 1
        band = np.zeros((count, len(rows)), np.float32)
        for i in range(count):
            band[i, i * scale : i * scale + len(kernel)] = kernel
        values = band @ rows.reshape(len(rows), -1).astype(np.float32)
        return np.floor(values.clip(0, 255) + 0.5).astype(np.uint8).reshape(count, *rows.shape[1:])

    part = image[sources(top, bottom, image.shape[0])[:, None], sources(left, right, image.shape[1])]
    return np.ascontiguousarray(shrink_rows(shrink_rows(part).swapaxes(0, 1)).swapaxes(0, 1))


def _bytes(image: np.ndarray) -> np.ndarray:
    if image.dtype != np.uint8:
        raise ValueError(f'imresize by a factor works on uint8 images, this one is {image.dtype}')
    return image


def _resize(image: np.ndarray, up: int, down: int, border: Border) -> np.ndarray:
    rows = _resize_rows(image, up, down, border)
    return np.ascontiguousarray(_resize_rows(rows.swapaxes(0, 1), up, down, border).swapaxes(0, 1))


def _resize_rows(image: np.ndarray, up: int, down: int, border: Border) -> np.ndarray:
    """One pass along axis 0: every `down` input rows give `up` output rows, with the same weights each time."""
    groups = [_weights(up, down, start) for start in range(0, up, TOGETHER)]
    count, first = len(image) // down, groups[0][0]
    end = (count - 1) * down + groups[-1][0] + groups[-1][1].shape[1]
    rows = _outside(np.arange(first, end), len(image), border)
    padded = image[rows].reshape(len(rows), -1)
    out, peak = np.empty((count * up, padded.shape[1]), image.dtype), np.iinfo(image.dtype).max
    done = 0
    # One small product after the other stays in the cache; the image as float64 would not.
    for i in range(count):
        for begin, weights in groups:
            start = i * down + begin - first
            values = weights @ padded[start : start + weights.shape[1]].astype(np.float64)
            out[done : done + len(weights)] = np.floor(values.clip(0, peak) + 0.5)
            done += len(weights)
    return out.reshape(count * up, *image.shape[1:])


def _weights(up: int, down: int, start: int = 0) -> tuple[int, np.ndarray]:
    """First input row (from 0) behind the output rows from `start` on, `TOGETHER` or to `up`, and their weights.

    Weights are (rows, taps).
    """
    centre = (np.arange(start, min(start + TOGETHER, up)) + 0.5) * down / up - 0.5
    stretch = max(1, down / up)
    reach = 2 * stretch  # the kernel is 4 pixels wide, stretched where the image shrinks
    taps = np.arange(np.ceil(centre[0] - reach), np.floor(centre[-1] + reach) + 1)
    weights = _cubic((centre[:, None] - taps) / stretch)
    return int(taps[0]), weights / weights.sum(axis=1, keepdims=True)


def _cubic(x: np.ndarray) -> np.ndarray:
    x = np.abs(x)
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x <= 1, near, np.where(x <= 2, far, 0))


def _outside(index: np.ndarray, size: int, border: Border) -> np.ndarray:
    """Maps any index to one inside [0, size)."""
    if border == 'clamp':
        return index.clip(0, size - 1)
    if border == 'mirror':
        index = index % (2 * size)
        return np.minimum(index, 2 * size - 1 - index)
    if border == 'wrap':
        return index % size
    raise ValueError(f"border must be 'mirror', 'clamp' or 'wrap', not {border!r}")
