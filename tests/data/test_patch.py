"""Random choices as a function of their number, and patches cut where they say."""

import itertools

import numpy as np
import pytest

from data.imresize import shrink
from data.patch import Draw, cut, draw, mirrored, shuffled

LAST = np.nextafter(1, 0)  # the largest place that can be drawn
UNFLIPPED = (False, False, False)


def coordinates(scale: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """LR pixels that hold (row, column, 0) and HR pixels that hold the LR pixel they belong to and the place in it."""
    y, x = np.mgrid[:height, :width]
    lr = np.stack((y, x, 0 * y), axis=2).astype(np.uint8)
    y, x = np.mgrid[: scale * height, : scale * width]
    hr = np.stack((y // scale, x // scale, y % scale * scale + x % scale), axis=2).astype(np.uint8)
    return lr, hr


def test_a_draw_depends_on_seed_and_number_alone():
    first = [draw(3, number, 7) for number in range(60)]
    shuffled.cache_clear()
    order = np.random.default_rng(0).permutation(60)
    again = {int(number): draw(3, int(number), 7) for number in order}
    assert [again[number] for number in range(60)] == first
    assert draw(3, 10**9, 7) == draw(3, 10**9, 7)
    assert [draw(4, number, 7) for number in range(60)] != first
    assert len({(choice.y, choice.x) for choice in first}) == 60


def test_every_image_once_in_each_round():
    rounds = [[draw(1, turn * 20 + i, 20).image for i in range(20)] for turn in range(10)]
    for images in rounds:
        assert sorted(images) == list(range(20))
    assert len({tuple(images) for images in rounds}) == 10
    assert [draw(2, i, 20).image for i in range(20)] not in rounds
    assert all(isinstance(draw(1, 5, length).image, int) for length in (1, 2))


def test_places_and_flips_are_uniform_and_independent():
    choices = [draw(1, number, 50) for number in range(4000)]
    values = np.array([(c.y, c.x, *c.flips) for c in choices])
    assert len(np.unique(values[:, :2], axis=0)) == 4000
    assert (values >= 0).all()
    assert (values[:, :2] < 1).all()
    np.testing.assert_allclose(values.mean(axis=0), 0.5, atol=0.03)
    correlation = np.corrcoef(np.column_stack((values, [c.image for c in choices])), rowvar=False)
    assert np.abs(correlation - np.eye(6)).max() < 0.06
    counts = [sum(c.flips == flips for c in choices) for flips in itertools.product((False, True), repeat=3)]
    assert min(counts) > 400


@pytest.mark.parametrize('scale', [1, 2, 3, 4])
@pytest.mark.parametrize('side', [1, 2, 5])
def test_patches_are_aligned_and_inside(scale, side):
    lr, hr = coordinates(scale, 5, 7)
    for number in range(50):
        lr_patch, hr_patch = cut(lr, hr, scale, side, draw(0, number, 1))
        y, x = (int(n) for n in lr_patch[0, 0, :2])
        assert y + side <= 5
        assert x + side <= 7
        np.testing.assert_array_equal(lr_patch, lr[y : y + side, x : x + side])
        assert hr_patch.shape == (scale * side, scale * side, 3)
        np.testing.assert_array_equal(hr_patch[..., :2], np.kron(lr_patch[..., :2], np.ones((scale, scale, 1))))
        pattern = np.arange(scale * scale).reshape(scale, scale)
        np.testing.assert_array_equal(hr_patch[..., 2], np.tile(pattern, (side, side)))


def test_every_position_is_reached_equally_often():
    lr, hr = coordinates(2, 5, 6)
    counts = np.zeros((5, 6), int)
    for number in range(3000):
        patch, _ = cut(lr, hr, 2, 3, draw(0, number, 10))
        counts[tuple(patch[0, 0, :2])] += 1
    assert not counts[3:].any()
    assert not counts[:, 4:].any()
    assert counts[:3, :4].min() > 180  # 250 on average
    assert counts[:3, :4].max() < 320


@pytest.mark.parametrize('size', [(3, 3), (48, 49), (97, 1023), (64, 65537)])
def test_first_and_last_position(size):
    height, width = size
    lr = np.zeros((height, width, 1), np.uint8)
    lr[0, 0], lr[-1, -1] = 1, 2
    for choice, corner, value in ((Draw(0, 0.0, 0.0, UNFLIPPED), 0, 1), (Draw(0, LAST, LAST, UNFLIPPED), -1, 2)):
        patch, _ = cut(lr, lr, 1, 3, choice)
        assert patch.shape == (3, 3, 1)
        assert patch[corner, corner, 0] == value


@pytest.mark.parametrize(('height', 'width'), [(3, 9), (9, 3), (1, 1), (2, 5), (7, 8)])
@pytest.mark.parametrize('scale', [2, 3])
def test_small_images_are_continued_by_their_mirror_image(height, width, scale):
    side = 8
    lr, hr = coordinates(scale, height, width)

    def reflected(image, y, x):
        places = []
        for n, size in ((y, image.shape[0]), (x, image.shape[1])):
            places.append([*range(size), *reversed(range(size))][n % (2 * size)])
        return image[tuple(places)]

    for number in range(10):
        choice = draw(0, number, 1)
        y, x = int(choice.y * (max(height - side, 0) + 1)), int(choice.x * (max(width - side, 0) + 1))
        for image, patch, factor in zip((lr, hr), cut(lr, hr, scale, side, choice), (1, scale), strict=True):
            size = factor * side
            expected = [[reflected(image, factor * y + i, factor * x + j) for j in range(size)] for i in range(size)]
            np.testing.assert_array_equal(patch, expected)


@pytest.mark.parametrize('scale', [2, 3, 4])
@pytest.mark.parametrize('size', [(5, 5), (3, 7), (11, 2)])
def test_the_mirrored_lr_is_the_lr_of_the_mirrored_hr(scale, size):
    """All but the rows and columns whose kernel reaches over the new end."""
    rng = np.random.default_rng(scale)
    hr = rng.integers(0, 256, (scale * size[0], scale * size[1], 3)).astype(np.uint8)
    lr = mirrored(shrink(hr, scale), 16)
    assert lr.shape == (16, 16, 3)
    np.testing.assert_array_equal(shrink(mirrored(hr, 16 * scale), scale)[:-2, :-2], lr[:-2, :-2])


def test_by_area_images_are_as_likely_as_they_have_pixels() -> None:
    areas = np.array([10, 0, 30, 60])
    chosen = [draw(3, number, 4, areas.cumsum()) for number in range(4000)]
    shares = np.bincount([choice.image for choice in chosen], minlength=4) / 4000
    assert np.abs(shares - areas / 100).max() < 0.025  # three standard deviations
    assert shares[1] == 0
    assert chosen[:9] == [draw(3, number, 4, areas.cumsum()) for number in range(9)]
    assert [(c.y, c.x, c.flips) for c in chosen[:9]] == [
        (c.y, c.x, c.flips) for c in (draw(3, number, 4) for number in range(9))
    ]
