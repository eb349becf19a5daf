"""Degradations against scipy's Gaussian, Pillow's JPEG, statistics of noise, and for windows the whole image."""

import io
import json

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter

import main
from data.degradation import KINDS, PRESETS, Degradation, add_shot_noise, parse
from data.imresize import blur_and_shrink, shrink
from data.patch import Window
from data.sets import find_set
from data.srdata import SRData
from data.traindata import TrainData, train_loader, whole_batches
from error import UserError
from system.parallel import Batches
from tests.conftest import picture, slow

SCALES = pytest.mark.parametrize('scale', [2, 3, 4])


def pair(scale: int, height: int = 75, width: int = 90, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """LR of so many pixels and its HR, with detail at all sizes."""
    small = picture(seed, height * scale // 4 + 1, width * scale // 4 + 1)
    hr = np.asarray(Image.fromarray(small).resize((width * scale, height * scale), Image.Resampling.BICUBIC))
    return shrink(hr, scale), hr


@SCALES
@pytest.mark.parametrize('border', ['mirror', 'clamp'])
def test_without_blur_it_is_the_exact_bicubic(scale, border):
    _, hr = pair(scale)
    found = blur_and_shrink(hr, scale, 0.0, border, 3, 70, 0, 90)
    wrong = found != shrink(hr, scale, border)[3:70]
    assert wrong.mean() < 1e-4  # float32


@SCALES
def test_blur_is_a_gaussian_of_its_deviation(scale):
    _, hr = pair(scale)
    blurred = gaussian_filter(hr.astype(float), (1.7, 1.7, 0), mode='reflect', truncate=4.0)  # the edge pixel repeated
    expected = shrink(np.rint(blurred).astype(np.uint8), scale).astype(int)
    found = blur_and_shrink(hr, scale, 1.7, 'mirror', 0, 75, 0, 90)
    assert np.abs(found - expected).max() <= 1  # which is rounded once more
    assert (found != expected).mean() < 0.1


@SCALES
@pytest.mark.parametrize('text', ['blur0.9', 'jpeg30', 'blur0.2-1.2+jpeg40-95'])
@pytest.mark.parametrize('window', [(0, 20, 0, 20), (17, 41, 30, 54), (55, 75, 71, 90), (16, 32, 48, 64)])
def test_a_window_is_that_of_the_whole_image(scale, text, window):
    lr, hr = pair(scale)
    degradation = Degradation(text, scale)
    for seed in range(4):  # both sizes of the colours
        whole = degradation.of_window(lr, hr, Window(0, 75, 0, 90), np.random.default_rng(seed))
        part = degradation.of_window(lr, hr, Window(*window), np.random.default_rng(seed))
        top, bottom, left, right = window
        difference = np.abs(part.astype(int) - whole[top:bottom, left:right]).mean()
        assert difference < (0.3 if 'blur' in text else 1e-9)  # blur is rounded in float32, and JPEG spreads that
        assert not np.array_equal(whole, lr)


def test_jpeg_is_what_pillow_makes():
    lr, hr = pair(2)
    expected = []
    for subsampling in ('4:2:0', '4:4:4'):
        file = io.BytesIO()
        Image.fromarray(lr).save(file, 'JPEG', quality=40, subsampling=subsampling)
        expected.append(np.asarray(Image.open(file)))
    found = [Degradation('jpeg40', 2).of_image(lr, hr, str(name)) for name in range(40)]
    counts = [sum(np.array_equal(image, each) for image in found) for each in expected]
    assert sum(counts) == 40
    assert min(counts) > 8  # of a coin 20, within 4 deviations


def test_noise_has_its_deviation():
    grey = np.full((200, 200, 3), 128, np.uint8)
    noisy = Degradation('noise5', 2).of_image(grey, grey.repeat(2, 0).repeat(2, 1), 'a') - 128.0
    assert abs(noisy.mean()) < 0.1
    assert noisy.std() == pytest.approx(np.hypot(5, 12**-0.5), rel=0.01)  # and that of rounding
    assert abs(np.corrcoef(noisy[..., 0].ravel(), noisy[..., 1].ravel())[0, 1]) < 0.02


@pytest.mark.parametrize('value', [0, 40, 160, 220])
def test_shot_noise_grows_with_the_root_of_brightness(value):
    image = np.full((200, 200, 3), value, np.uint8)
    noisy = add_shot_noise(image, 4.0, np.random.default_rng(1)).astype(float)
    assert noisy.mean() == pytest.approx(value, abs=0.15)
    deviation = np.hypot(4 * (value / 255) ** 0.5, 12**-0.5) if value else 0
    assert noisy.std() == pytest.approx(deviation, rel=0.04)


def test_resizing_smooths_and_keeps_size_and_mean():
    lr, hr = pair(2)
    found = Degradation('resize0.5', 2).of_image(lr, hr, 'a')
    assert found.shape == lr.shape
    assert found.mean() == pytest.approx(lr.mean(), abs=0.5)
    board = (255 * np.indices((32, 32, 3)).sum(0) % 510).astype(np.uint8)
    halved = Degradation('resize0.5', 2).of_image(board, board.repeat(2, 0).repeat(2, 1), 'a')
    assert halved.std() < 0.2 * board.std()  # half the pixels cannot hold it
    same = Degradation('resize1', 2).of_image(lr, hr, 'a')
    assert np.array_equal(same, lr)


def test_a_chance_is_how_often_a_term_is_done():
    lr, hr = pair(2)
    degradation = Degradation('0.25*noise3', 2)
    changed = sum(not np.array_equal(degradation.of_image(lr, hr, str(name)), lr) for name in range(400))
    assert changed == pytest.approx(100, abs=35)  # four deviations
    assert np.array_equal(Degradation('0*blur2+0*jpeg', 2).of_image(lr, hr, 'a'), lr)


def test_an_image_is_always_degraded_alike_and_others_otherwise():
    lr, hr = pair(4)
    degradation, again = (Degradation('0.5*blur+noise1-6+0.8*jpeg', 4) for _ in range(2))
    first = degradation.of_image(lr, hr, 'a')
    assert np.array_equal(first, again.of_image(lr, hr, 'a'))
    others = [degradation.of_image(lr, hr, name) for name in 'bcde']
    assert not any(np.array_equal(first, other) for other in others)
    assert np.array_equal(
        Degradation('noise4', 4).of_image(lr, hr, '\udcff'), Degradation('noise4', 4).of_image(lr, hr, '\udcff')
    )


def test_values_are_drawn_from_the_whole_range():
    lr, hr = pair(2, 64, 64)
    grey = np.full_like(lr, 128)
    noise = [(Degradation('noise2-10', 2).of_image(grey, hr, str(name)) - 128.0).std() for name in range(100)]
    assert min(noise) < 3
    assert max(noise) > 9
    assert np.mean(noise) == pytest.approx(6, abs=1)


@pytest.mark.parametrize(('text', 'words'), [
    ('grain3', ['grain3', 'noise']), ('', ['unknown']), ('jpeg40-', ['jpeg40-']), ('noise3+noise4', ['noise', 'twice']),
    ('jpeg60+blur1', ['blur', 'first']), ('jpeg101', ['jpeg101', '100']), ('noise6-2', ['noise6-2', 'rising']),
    ('2*jpeg', ['2*jpeg', 'chance']), ('blur9', ['blur9', '8']), ('jpeg4.4.4', ['jpeg4.4.4']), ('resize0', ['0.25']),
])  # fmt: skip
def test_what_is_no_degradation_is_refused(text, words):
    with pytest.raises(UserError) as caught:
        Degradation(text, 2)
    assert all(word in str(caught.value) for word in ['--degradation', *words])


def test_a_preset_is_what_it_stands_for():
    assert all(parse(name) == parse(text) for name, text in PRESETS.items())
    (term,) = parse('jpeg')
    assert (term.low, term.high, term.chance) == (*KINDS['jpeg'].usual, 1.0)


@pytest.mark.parametrize('cached', slow([True], False))
def test_training_samples_depend_on_seed_and_number_alone(tmp_path, cached):
    for i in range(3):
        (tmp_path / 'A' / 'HR').mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(i, 60 - 20 * i, 50)).save(tmp_path / 'A' / 'HR' / f'{i}.png')
    images = SRData(find_set('A', tmp_path, tmp_path), 2, cached=cached)
    images.prepare()

    def samples(seed: int, workers: int, text: str = 'photo') -> list:
        degradation = Degradation(text, 2) if text else None
        data = TrainData([images], 32, seed, degradation=degradation)
        return list(whole_batches(train_loader(data, Batches(range(12), 3), workers, pin_memory=False)))

    first, again, other, clean = samples(1, 0), samples(1, 2), samples(2, 0), samples(1, 0, '')
    assert all(a.lr.equal(b.lr) and a.hr.equal(b.hr) for a, b in zip(first, again, strict=True))
    assert all(a.hr.equal(b.hr) for a, b in zip(first, clean, strict=True))
    assert not any(a.lr.equal(b.lr) for a, b in zip(first, clean, strict=True))
    assert not any(a.lr.equal(b.lr) for a, b in zip(first, other, strict=True))


def test_a_test_is_scored_on_degraded_images_and_says_so(data_folder, capsys):
    line = ['--cpu', '--model', 'Bicubic', '--scale', '2', '--test_only', '--dir_data', str(data_folder)]
    psnr = {}
    for text in ('', 'jpeg20'):
        save = ['--save_dir', str(data_folder / 'runs'), '--save', f'run{text}', '--degradation', text]
        assert main.main([*line, *save]) == 0
        results = json.loads((data_folder / 'runs' / f'run{text}' / 'results.json').read_text())
        ((_, found),) = results['sets'].items()
        ((_, protocol),) = results['protocol']['sets'].items()
        psnr[text] = found['psnr']
        assert protocol.get('degradation', '') == text
    assert psnr['jpeg20'] < psnr[''] - 1
    assert main.main([*line, '--degradation', 'rain']) == 2
    assert 'rain' in capsys.readouterr().err


@pytest.mark.parametrize('deviation', [0, 1e-9, 5e-8, 9e-4])
def test_as_good_as_no_photon_noise_changes_nothing(deviation):
    """Of more photons than can be counted, too."""
    white = np.full((4, 5, 3), 255, np.uint8)
    assert np.array_equal(add_shot_noise(white, deviation, np.random.default_rng(0)), white)
