import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.image import read_rgb
from metric import METRICS, Metric, luma, mean, psnr, ssim
from tests.test_trainer import EDSR, equal, metrics, train


def noise(seed: int, height: int = 17, width: int = 14) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def colour(*rgb: int) -> np.ndarray:
    return np.full((4, 4, 3), rgb, np.uint8)


def plain_ssim(x: np.ndarray, y: np.ndarray) -> float:
    """SSIM of two planes by its definition: one explicit 11x11 window after the other."""
    d = np.arange(-5, 6)
    window = np.exp(-(d[:, None] ** 2 + d[None, :] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    c1, c2 = 6.5025, 58.5225
    scores = []
    for i in range(x.shape[0] - 10):
        for j in range(x.shape[1] - 10):
            a, b = x[i : i + 11, j : j + 11], y[i : i + 11, j : j + 11]
            mean_a, mean_b = (window * a).sum(), (window * b).sum()
            variance_a = (window * (a - mean_a) ** 2).sum()
            variance_b = (window * (b - mean_b) ** 2).sum()
            covariance = (window * (a - mean_a) * (b - mean_b)).sum()
            likeness = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
            scores.append(likeness * (2 * covariance + c2) / (variance_a + variance_b + c2))
    return float(np.mean(scores))


@pytest.mark.parametrize(
    'rgb, expected',
    [
        ((0, 0, 0), 16),
        ((255, 255, 255), 235),
        ((255, 0, 0), 81.481),
        ((0, 255, 0), 144.553),
        ((0, 0, 255), 40.966),
        ((51, 102, 204), 16 + 13.0962 + 51.4212 + 19.9728),
    ],
)
def test_luma_by_hand(rgb, expected):
    result = luma(colour(*rgb))
    assert result.shape == (4, 4)
    assert result.dtype == np.float64
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-10)


def test_luma_is_not_rounded():
    assert luma(colour(1, 0, 0))[0, 0] == pytest.approx(16 + 65.481 / 255, abs=1e-12)


def test_psnr_by_hand():
    # All pixels off by one: MSE 1 on RGB; on Y the range shrinks by 219/255.
    sr, hr = colour(100, 100, 100), colour(101, 101, 101)
    assert psnr(sr, hr, 0, 'RGB') == pytest.approx(48.1308036, abs=1e-6)
    assert psnr(sr, hr, 0, 'Y') == pytest.approx(20 * math.log10(255 * 255 / 219), abs=1e-9)
    # Black against white is 0 dB on RGB; one channel of three off by 255 is a third of that error.
    assert psnr(colour(0, 0, 0), colour(255, 255, 255), 0, 'RGB') == pytest.approx(0, abs=1e-12)
    assert psnr(colour(0, 0, 0), colour(255, 0, 0), 0, 'RGB') == pytest.approx(10 * math.log10(3), abs=1e-12)
    assert psnr(colour(0, 0, 0), colour(255, 0, 0), 0, 'Y') == pytest.approx(20 * math.log10(255 / 65.481), abs=1e-9)


def test_psnr_takes_the_mean_over_the_image():
    hr = np.zeros((10, 10, 3), np.uint8)
    sr = hr.copy()
    sr[4, 4] = 10  # MSE 100/100
    assert psnr(sr, hr, 0, 'RGB') == pytest.approx(48.1308036, abs=1e-6)
    assert psnr(sr, hr, 3, 'RGB') == pytest.approx(48.1308036 - 10 * math.log10(100 / 16), abs=1e-6)


def test_shaving_drops_exactly_the_border():
    hr = noise(0)
    sr = hr.copy()
    sr[:2], sr[-2:], sr[:, :2], sr[:, -2:] = 0, 0, 0, 0
    assert psnr(sr, hr, 2) == math.inf
    assert psnr(sr, hr, 1) < math.inf


@pytest.mark.parametrize('channels', ['Y', 'RGB'])
def test_identical_images(channels):
    assert psnr(noise(0), noise(0), 1, channels) == math.inf
    assert ssim(noise(0), noise(0), 1, channels) == 1


@pytest.mark.parametrize('channels', ['Y', 'RGB'])
def test_symmetry(channels):
    assert psnr(noise(0), noise(1), 1, channels) == psnr(noise(1), noise(0), 1, channels)
    assert ssim(noise(0), noise(1), 1, channels) == ssim(noise(1), noise(0), 1, channels)


def test_ssim_is_the_definition():
    hr = noise(0, 23, 16)
    sr = np.clip(hr // 2 + noise(1, 23, 16) // 4, 0, 255)
    a, b = sr[2:-2, 2:-2], hr[2:-2, 2:-2]
    assert ssim(sr, hr, 2) == pytest.approx(plain_ssim(luma(a), luma(b)), abs=1e-12)
    each = [plain_ssim(a[..., c].astype(float), b[..., c].astype(float)) for c in range(3)]
    assert ssim(sr, hr, 2, 'RGB') == pytest.approx(np.mean(each), abs=1e-12)


def test_ssim_of_flat_images_by_hand():
    # Without variance only the luminance term is left: (2ab + C1)/(a^2 + b^2 + C1).
    sr, hr = np.full((11, 11, 3), 100, np.uint8), np.full((11, 11, 3), 50, np.uint8)
    assert ssim(sr, hr, 0, 'RGB') == pytest.approx((10000 + 6.5025) / (12500 + 6.5025), abs=1e-9)


def test_ssim_of_an_image_below_the_window_is_nan():
    assert math.isnan(ssim(noise(0, 14, 40), noise(1, 14, 40), 2))
    assert not math.isnan(ssim(noise(0, 15, 40), noise(1, 15, 40), 2))


@pytest.mark.parametrize('metric', [psnr, ssim])
def test_wrong_arguments(metric):
    with pytest.raises(ValueError, match='different shapes'):
        metric(noise(0, 20, 20), noise(0, 20, 21), 2)
    with pytest.raises(ValueError, match='8x20 pixels after shaving 4'):
        metric(noise(0, 8, 20), noise(0, 8, 20), 4)
    with pytest.raises(ValueError, match='YCbCr'):
        metric(noise(0), noise(0), 1, 'YCbCr')


def test_mean():
    assert mean([30.0, 31.0, 35.0]) == 32
    assert mean(iter([30.0, math.inf])) == math.inf
    assert mean([30.0, math.nan, 31.0]) == 30.5
    assert math.isnan(mean([math.nan, math.nan]))


@pytest.mark.parametrize('scale', [2, 3, 4])
def test_values_that_matlab_printed(shared, scale):
    folder = shared / 'reference' / 'metrics'
    expected = json.loads((folder / 'expected.json').read_text())[f'x{scale}']
    expected_mean = expected.pop('mean')
    assert len(expected) == 5
    measured = {name: measure(shared, name, scale) for name in expected}
    measured['mean'] = tuple(mean(values) for values in zip(*measured.values(), strict=True))
    for name, values in {**expected, 'mean': expected_mean}.items():
        assert measured[name][0] == pytest.approx(values['psnr'], rel=0, abs=1e-4), name
        assert measured[name][1] == pytest.approx(values['ssim'], rel=0, abs=1e-6), name


def measure(shared: Path, name: str, scale: int) -> tuple[float, float]:
    sr = rgb(shared / 'reference' / 'metrics' / f'x{scale}' / f'{name}_SR.png')
    hr = rgb(shared / 'benchmark' / 'Set5' / 'HR' / f'{name}.png')[: sr.shape[0], : sr.shape[1]]
    return psnr(sr, hr, scale), ssim(sr, hr, scale)


def rgb(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert('RGB'))


# The table.


def test_values_as_text():
    first, second = METRICS
    assert (first.label, second.label) == ('PSNR (dB)', 'SSIM')
    assert (first.text_with_unit(30.128), second.text_with_unit(0.91236)) == ('30.13 dB', '0.9124')
    assert (first.text(math.inf), first.text(math.nan), first.text(None)) == ('inf', '-', '-')


@pytest.mark.parametrize('higher', [True, False])
def test_which_value_is_better(higher):
    metric = replace(METRICS[0], higher_is_better=higher)
    assert metric.is_better(2.0, 1.0) == higher
    assert metric.is_better(1.0, 2.0) != higher
    assert not any(metric.is_better(*pair) for pair in ((1.0, 1.0), (math.nan, 1.0), (1.0, math.nan)))


def worst(sr, hr, shave, channels):
    """The largest difference of two pixels."""
    return float(np.abs(sr.astype(int) - hr).max())


def test_a_metric_is_added_by_one_row(data_folder, monkeypatch):
    """As the first one: lower is better by it."""
    row = Metric('worst', 'Worst', worst, unit='levels', digits=1, higher_is_better=False)
    monkeypatch.setattr('metric.METRICS', (row, *METRICS))
    for module in ('trainer', 'report.page', 'report.picture', 'report.board'):
        monkeypatch.setattr(f'{module}.METRICS', (row, *METRICS))
    run = train(data_folder, EDSR, '--epochs 2 --save_results --lr 0.01')
    found = json.loads((run / 'results.json').read_text())['sets']['Set5']
    assert found.keys() == {'worst', 'psnr', 'seconds', 'images'}
    for name, scores in found['images'].items():
        sr = read_rgb(run / 'results-Set5' / f'{name}_x2_SR.png')
        hr = read_rgb(data_folder / 'benchmark' / 'Set5' / 'HR' / f'{name}.png')[: len(sr), : sr.shape[1]]
        assert scores['worst'] == np.abs(sr.astype(int) - hr).max()
    text = f'{found["worst"]:.1f}'
    assert re.search(rf'images   Worst    PSNR    SSIM  s/image\nSet5 +2 +{text} ', (run / 'log.txt').read_text())
    page = (run / 'report.html').read_text()
    assert '<th>Worst</th><th>PSNR</th><th>SSIM</th>' in page
    assert f'<td>{text}</td>' in page
    assert all(f', {scores["worst"]:.1f} levels<br>' in page for scores in found['images'].values())
    epochs = [record['test']['Set5']['worst'] for record in metrics(run)]
    weights = [torch.load(run / 'model' / f'model_{name}.pt', weights_only=True) for name in ('best', 'latest')]
    assert equal(*weights) == (epochs[1] <= epochs[0])
