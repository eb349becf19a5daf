import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.imresize import resize, shrink, upscale_bicubic
from tests.conftest import slow

SIZES = [(1, 1), (2, 3), (5, 4), (7, 13)]


def cubic(x: float) -> float:
    x = abs(x)
    if x <= 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x <= 2 else 0.0


def inside(tap: int, size: int, border: str) -> int:
    """The pixel, counted from 1, that stands for any tap: found by walking, not by arithmetic."""
    while not 1 <= tap <= size:
        if border == 'clamp':
            return 1 if tap < 1 else size
        tap = 1 - tap if tap < 1 else 2 * size + 1 - tap
    return tap


def plain_line(line: list[int], scale: float, border: str) -> list[int]:
    """MATLAB's formula for one line of pixels, one tap after the other, counted from 1 as MATLAB does."""
    stretch = min(scale, 1)
    support = 4 / stretch
    result = []
    for i in range(1, round(len(line) * scale) + 1):
        centre = i / scale + 0.5 * (1 - 1 / scale)
        first = math.floor(centre - support / 2)
        taps = range(first, first + math.ceil(support) + 2)
        weights = [stretch * cubic(stretch * (centre - tap)) for tap in taps]
        pixels = [line[inside(tap, len(line), border) - 1] for tap in taps]
        value = sum(w / sum(weights) * p for w, p in zip(weights, pixels, strict=True))
        result.append(math.floor(min(max(value, 0), 255) + 0.5))
    return result


def plain_plane(plane: np.ndarray, scale: float, border: str) -> np.ndarray:
    columns = [plain_line(column, scale, border) for column in plane.T.tolist()]
    rows = np.array(columns).T.tolist()
    return np.array([plain_line(row, scale, border) for row in rows])


def plain(image: np.ndarray, scale: float, border: str) -> np.ndarray:
    if image.ndim == 2:
        return plain_plane(image, scale, border)
    return np.stack([plain_plane(image[..., c], scale, border) for c in range(image.shape[2])], axis=2)


def noise(*shape: int) -> np.ndarray:
    """Black and white beside random values, so that the clipping is exercised."""
    rng = np.random.default_rng(shape)
    return np.clip(rng.integers(-128, 384, shape), 0, 255).astype(np.uint8)


@pytest.mark.parametrize('channels', [(), (3,)], ids=['grey', 'colour'])
@pytest.mark.parametrize('border', ['mirror', 'clamp'])
@pytest.mark.parametrize('scale', [2, 3, 4])
@pytest.mark.parametrize('size', SIZES)
def test_shrink_is_the_formula(size, scale, border, channels):
    height, width = (n * scale for n in size)
    image = noise(height + 1, width + scale - 1, *channels)
    result = shrink(image, scale, border)
    assert result.dtype == np.uint8
    np.testing.assert_array_equal(result, plain(image[:height, :width], 1 / scale, border))


@pytest.mark.parametrize('channels', [(), (3,)], ids=['grey', 'colour'])
@pytest.mark.parametrize('border', ['mirror', 'clamp'])
@pytest.mark.parametrize('scale', [2, 3, 4])
@pytest.mark.parametrize('size', SIZES)
def test_enlarge_is_the_formula(size, scale, border, channels):
    image = noise(*size, *channels)
    result = upscale_bicubic(image, scale, border)
    assert result.dtype == np.uint8
    np.testing.assert_array_equal(result, plain(image, scale, border))


def test_shrink_an_edge_by_hand():
    # The weights for 2 are (-3 -9 29 111 111 29 -9 -3)/256. The last output before the edge has the taps 29 -9 -3 on
    # white, 255 * 17/256 = 16.9; the one before it only -3, clipped to 0. White to black is the same from the top.
    image = np.repeat(np.array([[0] * 6 + [255] * 6], np.uint8), 2, axis=0)
    assert shrink(image, 2).tolist() == [[0, 0, 17, 238, 255, 255]]


def test_enlarge_an_edge_by_hand():
    # The weights for 2 are (-3 29 111 -9)/128 and their mirror image: 255 * (29 - 3)/128 = 51.8 beside the edge.
    assert (
        upscale_bicubic(np.array([[0, 0, 255, 255]], np.uint8), 2).tolist() == [[0, 0, 0, 52, 203, 255, 255, 255]] * 2
    )


def test_borders_differ():
    ramp = np.tile(np.arange(0, 256, 32, dtype=np.uint8), (8, 1))
    assert not np.array_equal(shrink(ramp, 4, 'mirror'), shrink(ramp, 4, 'clamp'))


@pytest.mark.parametrize('border', ['mirror', 'clamp'])
@pytest.mark.parametrize('scale', [1, 2, 3, 4, 8])
@pytest.mark.parametrize('value', [0, 1, 77, 255])
def test_constant_images_stay_constant(value, scale, border):
    image = np.full((19, 10, 3), value, np.uint8)
    small = shrink(image, scale, border)
    assert small.shape == (19 // scale, 10 // scale, 3)
    assert (small == value).all()
    assert (upscale_bicubic(small, scale, border) == value).all()


def plain_resize(plane: np.ndarray, height: int, width: int, border: str, peak: int) -> np.ndarray:
    """MATLAB's formula for any size, tap by tap in exact numbers; the side with the smaller factor first."""

    def line(pixels: list[int], count: int) -> list[int]:
        scale = Fraction(count, len(pixels))
        stretch = min(scale, Fraction(1))
        result = []
        for i in range(1, count + 1):
            centre = i / scale + (1 - 1 / scale) / 2
            first = math.floor(centre - 2 / stretch)
            taps = range(first, first + math.ceil(4 / stretch) + 2)
            weights = [exact_cubic(stretch * (centre - tap)) for tap in taps]
            value = sum(w * pixels[inside(tap, len(pixels), border) - 1] for w, tap in zip(weights, taps, strict=True))
            result.append(math.floor(min(max(value / sum(weights), 0), peak) + Fraction(1, 2)))
        return result

    def columns(rows: list[list[int]]) -> list[list[int]]:
        return [list(column) for column in zip(*rows, strict=True)]

    def along_height(rows: list[list[int]]) -> list[list[int]]:
        return columns([line(column, height) for column in columns(rows)])

    def along_width(rows: list[list[int]]) -> list[list[int]]:
        return [line(row, width) for row in rows]

    rows = plane.tolist()
    if Fraction(height, len(rows)) <= Fraction(width, len(rows[0])):
        return np.array(along_width(along_height(rows)))
    return np.array(along_height(along_width(rows)))


def exact_cubic(x: Fraction) -> Fraction:
    x = abs(x)
    if x <= 1:
        return (3 * x**3 - 5 * x**2) / 2 + 1
    return (-(x**3) + 5 * x**2) / 2 - 4 * x + 2 if x <= 2 else Fraction(0)


@pytest.mark.parametrize('dtype', [np.uint8, np.uint16])
@pytest.mark.parametrize('border', ['mirror', 'clamp'])
@pytest.mark.parametrize(
    ('old', 'new'),
    [((7, 11), (10, 17)), ((11, 7), (5, 6)), ((9, 8), (9, 13)), ((6, 9), (13, 4)), ((9, 6), (4, 13)), ((1, 3), (7, 2)),
     ((23, 20), (41, 37))],
)  # fmt: skip
def test_any_size_is_the_formula(old, new, border, dtype):
    peak = np.iinfo(dtype).max
    image = noise(*old).astype(dtype) * dtype(peak // 255)
    result = resize(image, *new, border)
    assert result.dtype == dtype
    np.testing.assert_array_equal(result, plain_resize(image, *new, border, peak))
    colour = np.stack((image, image[::-1], image), 2)
    np.testing.assert_array_equal(resize(colour, *new, border)[..., 0], result)


@pytest.mark.parametrize('scale', [2, 3, 4])
def test_a_size_of_an_integer_factor_is_that_factor(scale):
    image = noise(24, 36, 3)
    np.testing.assert_array_equal(resize(image, 24 * scale, 36 * scale), upscale_bicubic(image, scale))
    np.testing.assert_array_equal(resize(image, 24 // scale, 36 // scale), shrink(image, scale))
    np.testing.assert_array_equal(resize(image, 24, 36), image)


def test_no_size_is_refused():
    with pytest.raises(ValueError, match='0x5'):
        resize(noise(4, 4), 0, 5)


def test_the_image_given_is_left_alone():
    image = noise(9, 9, 3)
    before = image.copy()
    shrink(image, 2)
    upscale_bicubic(image, 2)
    np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize('shape', [(3, 9), (9, 3, 3), (0, 8)])
def test_too_small_to_shrink(shape):
    with pytest.raises(ValueError, match=f'{shape[0]}x{shape[1]} pixels cannot be shrunk by 4'):
        shrink(np.zeros(shape, np.uint8), 4)


@pytest.mark.parametrize('change', [shrink, upscale_bicubic])
def test_wrong_arguments(change):
    with pytest.raises(ValueError, match='float64'):
        change(np.zeros((8, 8)), 2)
    with pytest.raises(ValueError, match='reflect'):
        change(np.zeros((8, 8), np.uint8), 2, 'reflect')


def rgb(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert('RGB'))


@pytest.mark.parametrize('scale', [2, 3, 4])
@pytest.mark.parametrize('name, count', [('Set5', 5), *slow(('Set14', 14))])
def test_official_files_bit_for_bit(shared, name, count, scale):
    folder = shared / 'benchmark' / name
    files = sorted((folder / 'HR').glob('*.png'))
    assert len(files) == count
    for file in files:
        official = rgb(folder / 'LR_bicubic' / f'X{scale}' / f'{file.stem}x{scale}.png')
        np.testing.assert_array_equal(shrink(rgb(file), scale), official, err_msg=file.name)


@pytest.mark.parametrize('sides', [(14, 33), (5, 4), (7, 11)])
def test_a_wrapped_image_goes_on_at_the_opposite_border(sides):
    """As the one in the middle of nine copies."""
    image = np.random.default_rng(0).integers(0, 256, (7, 11, 3)).astype(np.uint8)
    height, width = sides
    whole = resize(np.tile(image, (3, 3, 1)), 3 * height, 3 * width)
    assert np.array_equal(resize(image, height, width, 'wrap'), whole[height : 2 * height, width : 2 * width])
