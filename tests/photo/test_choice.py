"""Weights of a folder: what they are by their content, the best first, and which of them enlarge what."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from error import UserError
from model import Model, build
from model.loading.description import Description, described
from photo.choice import BICUBIC, Networks, Weights, best, list_weights, read_score, weights_of
from system.files import read_torch
from tests.conftest import ROOT

TINY = {'n_feats': 4, 'n_resblocks': 1}


def weights(folder: Path, name: str, scale: int, score: str = '') -> None:
    """A file of weights of a tiny EDSR, with a card if there is a score."""
    state = build('EDSR-baseline', scale, **TINY).state_dict()
    torch.save(described(state, Description('EDSR-baseline', scale, TINY)), folder / f'{name}.pt')
    if score:
        (folder / f'{name}.md').write_text(
            f'# Card\n\n| Set | PSNR |\n|---|---|\n| Set14 | 99.9 | .9 |\n| Set5 | {score} | .9 |\n'
        )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Weights of x2 and x4, some for photographs, some without a card; files that hold none; a card alone."""
    scores = {'A_x4': '30.5', 'B-light_x4': '31.25', 'C_x4': '', 'A_x2': '37', 'B-light-photo_x4': '9.50'}
    for name, score in scores.items():
        weights(tmp_path, name, int(name[-1]), score)
    (tmp_path / 'notes.pt').write_text('no weights')
    (tmp_path / 'README.md').write_text('no weights either')
    return tmp_path


def networks(folder: Path, network: str | None = None) -> Networks:
    return Networks(weights_of(network, folder), lambda each: Model('Bicubic', each.scale), 'cpu')


def chosen(folder: Path, scale: int, lossy: bool, network: str | None = None) -> str:
    (found,) = networks(folder, network).chain([scale], lossy)
    return found.name


def test_of_a_scale_the_best_score_is_first_and_what_has_none_is_last(folder, messages):
    found = list_weights(folder)
    assert [each.name for each in found] == ['A_x2.pt', 'B-light_x4.pt', 'A_x4.pt', 'B-light-photo_x4.pt', 'C_x4.pt']
    assert found[0] == Weights('EDSR-baseline', 2, folder / 'A_x2.pt', False, 37.0)
    assert found[3:] == [
        Weights('EDSR-baseline', 4, folder / 'B-light-photo_x4.pt', True, 9.5),
        Weights('EDSR-baseline', 4, folder / 'C_x4.pt', False),
    ]
    assert [message for message in messages if re.search('notes.pt is left out: .* is not a file of weights', message)]


def test_what_macos_puts_beside_files_is_no_weights(tmp_path, messages):
    (tmp_path / '._A_x2.pt').write_bytes(b'\0' * 9)
    assert list_weights(tmp_path) == [] == messages


def test_names_may_be_anything(tmp_path):
    """The content says network and scale, of each kind of file."""
    weights(tmp_path, 'SwinIR-light_x3', 2)
    shutil.copy(ROOT / 'models' / 'ASID_x2.pt', tmp_path / 'b\nest.pth')
    save_file(read_torch(ROOT / 'models' / 'ASID_x3.pt'), tmp_path / 'a.safetensors')
    shutil.copy(ROOT / 'models' / 'ASID_x4.pt', tmp_path / 'zip.safetensors')
    found = {each.name: (each.network, each.scale) for each in list_weights(tmp_path)}
    assert found == {
        'SwinIR-light_x3.pt': ('EDSR-baseline', 2),
        'b\nest.pth': ('ASID', 2),
        'a.safetensors': ('ASID', 3),
        'zip.safetensors': ('ASID', 4),
    }


def test_a_name_decides_only_what_the_content_leaves_open(tmp_path, messages):
    """PAN's weights are the same at x2 and x3."""
    for name in ('PAN_x2', 'PAN_x3', 'PAN_x4', 'PAN'):
        torch.save(build('PAN', 2).state_dict(), tmp_path / f'{name}.pth')
    assert [(each.name, each.scale) for each in list_weights(tmp_path)] == [('PAN_x2.pth', 2), ('PAN_x3.pth', 3)]
    assert sum('is left out: These are weights of PAN at x2 or x3' in message for message in messages) == 2


@pytest.mark.parametrize(
    ('scale', 'lossy', 'name'),
    [(4, False, 'B-light_x4'), (4, True, 'B-light-photo_x4'), (2, False, 'A_x2'), (2, True, 'B-light-photo_x4')],
)
def test_the_best_by_its_card(folder, scale, lossy, name):
    assert chosen(folder, scale, lossy) == f'{name}.pt'
    assert best([*list_weights(folder), *BICUBIC], scale, lossy).name == f'{name}.pt'
    assert networks(folder).scales(lossy) == ([4] if lossy else [2, 4])


def test_where_there_are_none_of_a_kind_it_is_the_best_of_the_others(folder):
    made = [each for each in list_weights(folder) if each.photo]
    others = [each for each in list_weights(folder) if not each.photo]
    assert best([*made, *BICUBIC], 4, lossy=False).name == 'B-light-photo_x4.pt'
    assert best([*made, *BICUBIC], 3, lossy=False) == Weights('Bicubic', 3)
    assert best([*others, *BICUBIC], 4, lossy=True).name == 'B-light_x4.pt'
    assert best([*others, *BICUBIC], 3, lossy=True) == Weights('Bicubic', 3)


def test_those_for_photographs_at_a_larger_factor_are_better_than_others(folder):
    """Of two larger factors the next one."""
    assert best([*list_weights(folder), *BICUBIC], 3, lossy=True).name == 'B-light-photo_x4.pt'
    weights(folder, 'A-photo_x3', 3)
    assert best(list_weights(folder), 2, lossy=True).name == 'A-photo_x3.pt'


def test_weights_for_photographs_at_x2_alone_do_not_reach_every_factor(tmp_path):
    for name, scale in (('A-photo_x2', 2), ('A_x2', 2), ('A_x4', 4)):
        weights(tmp_path, name, scale)
    assert networks(tmp_path).scales(True) == [2, 4]


def test_what_comes_from_a_network_is_clean(folder):
    assert [each.name for each in networks(folder).chain([4, 4], lossy=True)] == [
        'B-light-photo_x4.pt',
        'B-light_x4.pt',
    ]


def test_a_network_that_is_named(folder):
    """By what the file calls it, or by what it is."""
    assert chosen(folder, 4, True, 'A') == 'A_x4.pt'
    assert chosen(folder, 4, True, 'B-light') == 'B-light-photo_x4.pt'
    assert chosen(folder, 4, False, 'EDSR-baseline') == 'B-light_x4.pt'
    assert networks(folder, 'Bicubic').scales(True) == [2, 3, 4]
    with pytest.raises(UserError, match=r'--model SwinIR: .* A, B-light, C and Bicubic'):
        weights_of('SwinIR', folder)


def test_the_choice_is_said_once(folder, messages):
    found = networks(folder)
    for lossy in (False, True, False, True):
        found([4], lossy)
    assert [line for line in messages if line.startswith('x4')] == [
        'x4, clean images: B-light_x4.pt (EDSR-baseline), 31.25 dB on Set5',
        'x4, JPEG and lossy WebP: B-light-photo_x4.pt (EDSR-baseline), 9.50 dB on Set5, made for such photographs',
    ]


def test_what_weights_are_called():
    assert str(Weights('LCoAN', 4, Path('models/a.pt'))) == 'a.pt (LCoAN)'
    assert str(Weights('LCoAN', 4, Path('models/LCoAN-small_x4.pt'), False, 30.98)) == (
        'LCoAN-small_x4.pt, 30.98 dB on Set5'
    )
    assert str(Weights('Bicubic', 2)) == 'Bicubic_x2'


def test_other_content_has_another_digest(folder):
    def digest() -> str:
        return networks(folder).digest(best(list_weights(folder), 4, lossy=False))

    before = digest()
    assert digest() == before
    weights(folder, 'B-light_x4', 4, '31.25')  # of other random numbers
    assert digest() != before


def test_an_empty_folder_is_told(tmp_path):
    assert list_weights(tmp_path) == []
    with pytest.raises(UserError, match='holds no weights'):
        weights_of(None, tmp_path)


def test_weights_of_ours_are_found_with_their_scores():
    """Those of the table in models/README.md."""
    found = {each.name: each.score for each in list_weights(ROOT / 'models')}
    table = re.findall(r'^\| \[(\S+_x\d\.pt)\]\(\S+\) \| (\S+) \|', (ROOT / 'models' / 'README.md').read_text(), re.M)
    assert len(table) > 3
    assert {name: found[name] for name, _ in table} == {name: float(score) for name, score in table}


def test_a_card_without_that_row(tmp_path):
    assert read_score(tmp_path / 'none.md') is None
    (tmp_path / 'a.md').write_bytes(b'| Set14 | 33.0 | .9 |\nSet5 37.1\n\xff')
    assert read_score(tmp_path / 'a.md') is None
