"""Before and after: sizes, pixels, and the place where the two differ most."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.image import Photo, read_photo, write_png
from data.imresize import upscale_bicubic
from tests.conftest import picture
from web import comparing
from web.comparing import Pair, compare, most_different_column


def pixels(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image).astype(int)


def shown(pair: Pair) -> tuple[np.ndarray, np.ndarray]:
    assert pixels(pair.before).shape[1::-1] == pixels(pair.after).shape[1::-1] == pair.size
    return pixels(pair.before), pixels(pair.after)


def test_small_images_are_shown_whole(tmp_path):
    lr = picture(1, 20, 30)
    sr = upscale_bicubic(lr, 3)
    found = compare(Photo(lr, None, False), sr, tmp_path)
    before, after = shown(found.whole)
    assert found.detail is None
    assert found.files == [found.whole.before, found.whole.after]
    assert np.array_equal(after, sr)
    inner = (slice(12, -12), slice(12, -12))  # at the border, Pillow follows another rule than MATLAB
    assert np.abs(before[inner] - sr[inner].astype(int)).max() <= 2


@pytest.mark.parametrize(('row', 'column'), [(0, 0), (700, 100), (400, 1900), (1000, 1000)])
def test_the_detail_is_where_the_two_differ_most(tmp_path, row, column):
    lr = np.full((600, 1000, 3), 90, np.uint8)
    sr = np.full((1200, 2000, 3), 90, np.uint8)
    sr[row : row + 60, column : column + 40] = 200
    found = compare(Photo(lr, None, False), sr, tmp_path)
    before, after = shown(found.detail)
    assert found.detail.size == comparing.DETAIL
    assert (before == 90).all()
    assert (after == 200).sum() == (sr == 200).sum()  # every pixel of it, none resized
    middle = (after[..., 0] == 200).any(0).nonzero()[0].mean() / after.shape[1]
    inner = min(max(middle, comparing.MARGIN), 1 - comparing.MARGIN)
    assert found.detail.at == pytest.approx(inner, abs=0.03)
    assert middle == pytest.approx(0.5, abs=0.1) or column in (0, 100, 1900)  # near a border there is no middle


def test_the_detail_before_is_that_part_enlarged(tmp_path, monkeypatch):
    monkeypatch.setattr(comparing, 'DETAIL', (40, 32))
    lr = picture(2, 50, 60)
    sr = upscale_bicubic(lr, 2)
    sr[60:80, 70:90] ^= 128
    before, after = shown(compare(Photo(lr, None, False), sr, tmp_path).detail)
    places = [
        (y, x) for y in range(100 - 31) for x in range(120 - 39) if np.array_equal(sr[y : y + 32, x : x + 40], after)
    ]
    ((y, x),) = places
    assert y <= 60 and y + 32 >= 80 and x <= 70 and x + 40 >= 90
    expected = upscale_bicubic(lr, 2)[y : y + 32, x : x + 40].astype(int)
    assert np.abs(before - expected)[8:-8, 8:-8].max() <= 2


def test_large_images_are_reduced(tmp_path, monkeypatch):
    monkeypatch.setattr(comparing, 'WHOLE', 600)
    lr = picture(1, 20, 30)
    before, after = shown(compare(Photo(lr, None, False), upscale_bicubic(lr, 4), tmp_path).whole)
    assert before.shape == after.shape == (20, 30, 3)
    assert np.abs(after - lr).mean() < 8


def test_the_slider_opens_in_the_middle_where_nothing_differs():
    assert most_different_column(np.zeros((5, 100))) == 0.5
    assert most_different_column(np.zeros((1, 1))) == 0.5


def test_the_slider_opens_away_from_the_borders():
    gap = np.zeros((5, 100))
    gap[:, 0] = 9
    assert most_different_column(gap) >= comparing.MARGIN


def test_the_slider_by_hand():
    """Of 24 columns the sums of two around each, the first and last one halved; the middle of the largest."""
    gap = np.zeros((1, 24))
    gap[0, [4, 15, 16]] = 5, 3, 4  # 15 and 16 make 7
    assert most_different_column(gap) == pytest.approx((16 + 0.5) / 24)


def test_the_slider_of_a_very_wide_image():
    """As many steps as there are columns, not their square."""
    gap = np.zeros((1, 2_000_000), np.float32)
    gap[0, 1_500_000] = 1
    assert most_different_column(gap) == pytest.approx(0.75, abs=1e-3)


@pytest.mark.parametrize('kind', ['grey', 'clear', 'deep'])
def test_other_kinds_of_pixels(tmp_path, kind):
    lr = {
        'grey': picture(3, 10, 10)[..., 0],
        'clear': np.dstack((picture(3, 10, 10), picture(4, 10, 10)[..., 0])),
        'deep': picture(3, 10, 10) * np.uint16(257),
    }[kind]
    write_png(tmp_path / 'lr.png', lr)
    sr = lr.repeat(2, 0).repeat(2, 1)
    _, after = shown(compare(read_photo(tmp_path / 'lr.png'), sr, tmp_path).whole)
    assert np.array_equal(after, sr // 257 if kind == 'deep' else sr)
