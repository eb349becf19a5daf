import numpy as np
import pytest

from data.image import Photo, as_photo
from model import Model
from model.tiles.tiling import Tiler
from photo.engine import resized

RNG = np.random.default_rng(0)


def texture(channels: int) -> np.ndarray:
    return RNG.integers(0, 256, (37, 50, channels)).astype(np.uint8)


def whole(model: Model, samples: np.ndarray, size: tuple[int, int], *models: Model) -> np.ndarray:
    photo: Photo = as_photo(samples, None)
    return np.concatenate(list(resized([model, *models], photo, size, seamless=True))).astype(int)


def edsr(scale: int, tiler: Tiler | None = None) -> Model:
    return Model('EDSR-baseline', scale, tiler=tiler, n_feats=8, n_resblocks=2)


@pytest.mark.parametrize('channels', [1, 3, 4])
@pytest.mark.parametrize('tiler', [None, Tiler(24, 16, 2)])
def test_a_rolled_texture_gives_the_rolled_result(channels, tiler):
    """Which no border does that is made up."""
    samples, model = texture(channels), edsr(2, tiler)
    straight = whole(model, samples, (74, 100))
    rolled = whole(model, np.roll(samples, (11, -20), (0, 1)), (74, 100))
    assert np.abs(np.roll(straight, (22, -40), (0, 1)) - rolled).max() <= 1
    plain = np.concatenate(list(resized([model], as_photo(samples, None), (74, 100)))).astype(int)
    assert np.abs(plain - straight)[30:-30, 30:-30].max() <= 1
    assert np.abs(plain - straight).max() > 1


def test_and_so_does_another_size_by_two_networks():
    """Of 37x50 pixels by 3, by 2 and by bicubic, 148x200: four for each."""
    samples, models = texture(3), (edsr(3), edsr(2))
    straight, rolled = (whole(models[0], each, (148, 200), models[1]) for each in (samples, np.roll(samples, 9, 1)))
    assert np.abs(np.roll(straight, 36, 1) - rolled).max() <= 2


def test_tiles_are_told_and_megapixels_counted():
    photo, told, counted = as_photo(texture(3), None), [], []
    models = [Model('Bicubic', 2, tiler=Tiler(32, 8, 1)), Model('Bicubic', 2)]
    rows = resized(models, photo, (111, 150), False, lambda *tiles: told.append(tiles), counted.append)
    assert np.concatenate(list(rows)).shape == (111, 150, 3)
    assert told == [(done, 4) for done in range(5)] + [(0, 1), (1, 1)]
    assert sum(counted) == pytest.approx((37 * 50 * 4 + 37 * 50 * 16) / 1e6)
