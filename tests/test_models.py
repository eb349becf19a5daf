"""The weights in models/ are what their cards say."""

import json
import re
from pathlib import Path

import pytest

import main
from tests.conftest import ROOT

CARDS = sorted(path for path in (ROOT / 'models').glob('*.md') if path.name != 'README.md')
QUICK = 'LCoAN-small_x4'


def claimed(card: Path) -> tuple[float, float]:
    psnr, ssim = re.search(r'^\| Set5 \| ([\d.]+) \| (\.\d+) \|', card.read_text(), re.MULTILINE).groups()
    return float(psnr), float(ssim)


def test_every_file_has_a_card():
    own = [
        path for path in (ROOT / 'models').glob('*.pt') if not path.with_name(f'{path.name}.txt').exists()
    ]  # fetched
    assert {path.stem for path in own} == {path.stem for path in CARDS}


@pytest.mark.parametrize(
    'card',
    [pytest.param(path, marks=() if path.stem == QUICK else pytest.mark.slow, id=path.stem) for path in CARDS],
)
def test_set5_is_as_on_the_card(shared, tmp_path, card):
    (tmp_path / 'Set5').symlink_to(shared / 'benchmark' / 'Set5')
    options = ['--template', card.stem, '--pre_train', f'{card.stem}.pt', '--data_test', 'Set5', '--cpu', '--test_only']
    options += ['--degradation', '']  # of clean images, also for photographs' weights
    assert main.main([*options, '--dir_data', str(tmp_path), '--save_dir', str(tmp_path), '--save', 'run']) == 0
    result = json.loads((tmp_path / 'run' / 'results.json').read_text())['sets']['Set5']
    psnr, ssim = claimed(card)
    assert result['psnr'] == pytest.approx(psnr, abs=0.006)
    assert result['ssim'] == pytest.approx(ssim, abs=0.0001)
