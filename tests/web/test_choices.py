"""Choices among weights: what files hold, the best first, by the kind of picture."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import save_file

from error import UserError
from system.files import read_torch
from tests.conftest import ROOT
from web.choices import Choice, find_choices, fitting, kinds_at

WEIGHTS = ROOT / 'models' / 'LCoAN-small_x2.pt'


def card(file: Path, psnr: str) -> None:
    file.with_suffix('.md').write_text(
        f'# A card\n\n| Set | PSNR | SSIM |\n|---|---|---|\n| Set14 | 99.00 | .9 |\n| Set5 | {psnr} | .9584 |\n'
    )


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """Weights of x2, of x4 without a card, a file that holds none, and a card alone."""
    for name, psnr in {'a': '37.10', 'b': '37.45', 'c': '9.75', 'd-photo_x2': '31.00'}.items():
        shutil.copy(WEIGHTS, tmp_path / f'{name}.pt')
        card(tmp_path / f'{name}.pt', psnr)
    save_file(read_torch(WEIGHTS), tmp_path / 'e.safetensors')
    shutil.copy(ROOT / 'models' / 'LCoAN-small_x4.pt', tmp_path)
    (tmp_path / 'LCoAN_x3.pt').write_text('no weights')
    (tmp_path / 'README.md').write_text('no weights either')
    return tmp_path


def names(choices: list[Choice]) -> list[str]:
    return [choice.weights for choice in choices]


def test_the_best_score_of_a_scale_is_first(models):
    choices = find_choices(models)
    assert [choice.scale for choice in choices] == [2, 2, 2, 2, 2, 2, 3, 4, 4]
    assert names(choices)[:6] == ['b.pt', 'a.pt', 'd-photo_x2.pt', 'c.pt', 'e.safetensors', 'none']
    assert choices[0] == Choice('LCoAN', 2, models / 'b.pt', 37.45)
    assert choices[6:] == [Choice('Bicubic', 3), Choice('LCoAN', 4, models / 'LCoAN-small_x4.pt'), Choice('Bicubic', 4)]


def test_what_ships_has_scores():
    shipped = [choice for choice in find_choices(ROOT / 'models') if choice.file]
    assert len(shipped) >= 7
    assert all(choice.kind == 'photo' or (choice.psnr and 28 < choice.psnr < 40) for choice in shipped)


def test_kinds_are_offered_where_there_are_both(models):
    choices = find_choices(models)
    assert [kinds_at(choices, scale) for scale in (2, 3, 4)] == [['clean', 'photo'], [], ['clean']]
    assert names(fitting(choices, 2, 'photo')) == ['d-photo_x2.pt', 'none']
    assert names(fitting(choices, 2, 'clean')) == ['b.pt', 'a.pt', 'c.pt', 'e.safetensors', 'none']
    assert names(fitting(choices, 4, 'photo')) == ['LCoAN-small_x4.pt', 'none']


def test_choices_are_named():
    assert str(Choice('LCoAN', 4, Path('models/a.pt'))) == 'LCoAN x4 (a.pt)'
    assert str(Choice('Bicubic', 2)) == 'Bicubic x2'


def test_no_folder(tmp_path):
    with pytest.raises(UserError, match=r'--extend .*/none is not a folder'):
        find_choices(tmp_path / 'none')
