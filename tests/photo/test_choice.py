import re
from pathlib import Path

import pytest

from error import UserError
from model import Model
from photo.choice import Networks, list_weights, read_score
from tests.conftest import ROOT


def weights(folder: Path, name: str, score: str = '') -> None:
    (folder / f'{name}.pt').write_bytes(name.encode())
    if score:
        (folder / f'{name}.md').write_text(
            f'# Card\n\n| Set | PSNR |\n|---|---|\n| Set5 | {score} | .9 |\n| Set14 | 99.9 |\n'
        )


@pytest.fixture
def folder(tmp_path):
    for name, score in {
        'A_x4': '30.5',
        'B-light_x4': '31.25',
        'C_x4': '',
        'A_x2': '37',
        'B-light-photo_x4': '25.5',
    }.items():
        weights(tmp_path, name, score)
    (tmp_path / 'notes.pt').write_text('no weights')
    return tmp_path


def networks(folder: Path, network: str | None = None) -> Networks:
    return Networks(list_weights(folder, network), lambda each: Model('Bicubic', each.scale), 'cpu')


@pytest.mark.parametrize(
    ('scale', 'lossy', 'stem'),
    [(4, False, 'B-light_x4'), (4, True, 'B-light-photo_x4'), (2, False, 'A_x2'), (2, True, 'A_x2')],
)
def test_the_best_by_its_card(folder, scale, lossy, stem):
    assert networks(folder).best(scale, lossy).file == folder / f'{stem}.pt'
    assert networks(folder).scales == [2, 4]


def test_a_network_that_is_named(folder):
    assert networks(folder, 'A').best(4, lossy=True).file.stem == 'A_x4'
    assert networks(folder, 'B-light').best(4, lossy=True).file.stem == 'B-light-photo_x4'
    assert networks(folder, 'Bicubic').scales == [2, 3, 4]
    with pytest.raises(UserError, match=r'--model EDSR: .* A, B-light, C and Bicubic'):
        networks(folder, 'EDSR')


def test_the_choice_is_said_once(folder, messages):
    chosen = networks(folder)
    for lossy in (False, True, False, True):
        chosen([4], lossy)
    assert [line for line in messages if line.startswith('x4')] == [
        'x4, clean images: B-light_x4.pt (31.25 dB on Set5)',
        'x4, JPEG and lossy WebP: B-light-photo_x4.pt (25.50 dB on Set5), made for such photographs',
    ]


def test_other_content_has_another_digest(folder):
    def digest() -> str:
        return networks(folder).digest(networks(folder).best(4, lossy=False))

    before = digest()
    assert digest() == before
    (folder / 'B-light_x4.pt').write_bytes(b'trained longer')
    assert digest() != before


def test_an_empty_folder_is_told(tmp_path):
    with pytest.raises(UserError, match='holds no weights'):
        list_weights(tmp_path)


def test_weights_of_ours_are_found_with_their_scores():
    """Those of the table in models/README.md."""
    found = {each.file.name: each.score for each in list_weights(ROOT / 'models')}
    table = re.findall(r'^\| \[(\S+_x\d\.pt)\]\(\S+\) \| (\S+) \|', (ROOT / 'models' / 'README.md').read_text(), re.M)
    assert len(table) > 3
    assert {name: found[name] for name, _ in table} == {name: float(score) for name, score in table}


def test_a_card_without_that_row(tmp_path):
    assert read_score(tmp_path / 'none.md') is None
    (tmp_path / 'a.md').write_text('| Set14 | 33.0 | .9 |\nSet5 37.1\n')
    assert read_score(tmp_path / 'a.md') is None
