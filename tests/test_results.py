import json
import os
from pathlib import Path

import pytest
import torch

import results
from data.image import write_png
from measure.published import PUBLISHED, SETS
from model import build
from tests.conftest import picture


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> Path:
    """Two images a benchmark, weights of an untrained network, and what is measured of them."""
    tmp_path = tmp_path_factory.mktemp('with a space')
    for i, name in enumerate(SETS):
        for j in range(2):
            write_png(tmp_path / 'data' / 'benchmark' / name / 'HR' / f'{j}.png', picture(2 * i + j, 28, 24))
    (tmp_path / 'models').mkdir()
    torch.manual_seed(0)
    for name in ('ASID_x4', 'ASID-photo_x4'):
        torch.save(build('ASID', 4).state_dict(), tmp_path / 'models' / f'{name}.pt')
    (tmp_path / 'authors').mkdir()
    torch.save(build('PAN', 3).state_dict(), tmp_path / 'authors' / 'PAN_x3.pth')
    assert results.main(options(tmp_path)) == 0
    return tmp_path


def options(folder: Path) -> list[str]:
    paths = {
        'dir_data': 'data', 'extend': 'models', 'save_dir': 'runs', 'out': 'docs/RESULTS.md', 'authors': 'authors'
    }  # fmt: skip
    return ['--cpu', *(word for key, name in paths.items() for word in (f'--{key}', str(folder / name)))]


def cells(page: str, first: str) -> list[str]:
    """The row of a table that begins with a cell."""
    (row,) = [line for line in page.splitlines() if line.startswith(f'| {first} |')]
    return [cell.strip() for cell in row.strip('|').split('|')]


def test_the_page_has_what_was_measured_and_what_was_published(folder):
    page = (folder / 'docs' / 'RESULTS.md').read_text()
    for name, first in (('Bicubic_x4', 'Bicubic'), ('ASID_x4', '[ASID_x4](../models/ASID_x4.md)')):
        found = json.loads((folder / 'runs' / name / 'results.json').read_text())
        expected = [f'{s["psnr"]:.2f} / {s["ssim"]:.4f}'.replace('/ 0.', '/ .') for s in found['sets'].values()]
        assert cells(page, first)[1:] == expected
        assert list(found['sets']) == list(SETS[:4])
    assert found['protocol']['chop'] == {'size': 64, 'overlap': 24, 'blend': 'mean', 'fixed': False}
    assert 'Set5, 2 of 5 images' in page
    assert cells(page, 'ATD-light')[1:] == ['DIV2K', *(f'{PUBLISHED["ATD-light"][4].psnr[name]:.2f}' for name in SETS)]
    assert cells(page, 'IDN')[1:3] == ['SR291', '31.82']
    assert f'torch {torch.__version__}' in page


def test_weights_for_photographs_are_scored_on_degraded_images(folder):
    _, section = (folder / 'docs' / 'RESULTS.md').read_text().split('## Photographs as they are\n')
    rows = [line for line in section.split('\n## ')[0].splitlines() if line.startswith('| ')][2:]
    names = ['Bicubic', '[ASID_x4](../models/ASID_x4.md)', '[ASID-photo_x4](../models/ASID-photo_x4.md)']
    assert [row.split(' | ')[:2] for row in rows] == [
        [f'| {what}, x4', name] for what in ('jpeg75', 'jpeg40', 'noise5+jpeg60') for name in names
    ]
    for row in rows:
        _, what, name, psnr = row.replace(', x4', '').split('| ')[:4]
        run = f'{name.split("]")[0].strip("[ ")} {what.strip()}'.replace('Bicubic', 'Bicubic_x4').replace(' ', '_')
        found = json.loads((folder / 'runs' / run / 'results.json').read_text())
        assert psnr.startswith(f'{found["sets"]["Set5"]["psnr"]:.2f} / ')
    clean = json.loads((folder / 'runs' / 'ASID-photo_x4' / 'results.json').read_text())
    assert 'degradation' not in json.dumps(clean['sets']['Set5'])


def test_the_weights_of_authors_stand_beside_what_they_published(folder):
    _, section = (folder / 'docs' / 'RESULTS.md').read_text().split("## The authors' weights\n")
    found = json.loads((folder / 'runs' / 'authors_PAN_x3' / 'results.json').read_text())
    assert found['protocol']['chop'] is None
    expected = []
    for name, published in {'Set5': '34.40', 'Set14': '30.36', 'B100': '29.11'}.items():
        expected += [f'{found["sets"][name]["psnr"]:.2f} / {found["sets"][name]["ssim"]:.4f}', published]
    assert cells(section, 'PAN_x3')[1:] == [cell.replace('/ 0.', '/ .') for cell in expected]


def test_without_a_folder_of_theirs_there_is_no_such_section(folder, tmp_path):
    line = options(folder)
    del line[line.index('--authors') : line.index('--authors') + 2]
    assert results.main([*line, '--out', str(tmp_path / 'page.md')]) == 0
    page = (folder / 'docs' / 'RESULTS.md').read_text()
    assert (tmp_path / 'page.md').read_text() == page.partition("\n## The authors' weights\n")[0]


def test_each_way_of_running_is_compared_with_whole_images(folder):
    page = (folder / 'docs' / 'RESULTS.md').read_text()
    whole, half = (
        json.loads((folder / 'runs' / f'ASID_x4_{what}' / 'results.json').read_text())
        for what in ('whole_images', 'bfloat16')
    )
    assert whole['protocol']['chop'] is None
    assert half['protocol']['precision'] == 'bfloat16'
    gain = half['sets']['Set5']['psnr'] - whole['sets']['Set5']['psnr']
    (row,) = [line for line in page.splitlines() if line.startswith('| ASID_x4 | bfloat16 |')]
    assert f'{half["sets"]["Set5"]["psnr"]:.2f} ({gain:+.3f})' in row
    for what in results.STUDIES:
        assert f'| ASID_x4 | {what} |' in page


def test_what_is_there_is_kept(folder):
    page = (folder / 'docs' / 'RESULTS.md').read_text()
    for file in (folder / 'runs').glob('*/results.json'):
        text = file.read_text()
        file.write_text(text.replace('"torch": "', '"torch": "older '))
    assert results.main(options(folder)) == 0
    again = (folder / 'docs' / 'RESULTS.md').read_text()
    assert again == page.replace(f'torch {torch.__version__}', f'torch older {torch.__version__}')


def test_other_weights_are_measured_again(folder):
    """Not shown with the scores of those before, also if they are older files."""
    weights = folder / 'models' / 'ASID_x4.pt'
    before, dates = weights.read_bytes(), weights.stat()
    first = scores_of(folder)
    torch.manual_seed(1)
    torch.save(build('ASID', 4).state_dict(), weights)
    os.utime(weights, ns=(dates.st_atime_ns, dates.st_mtime_ns - 10**12))
    assert results.main(options(folder)) == 0
    assert scores_of(folder) != first
    weights.write_bytes(before)
    assert results.main(options(folder)) == 0
    assert scores_of(folder) == first


def test_more_images_are_measured_for_all(folder):
    place = folder / 'data' / 'benchmark' / 'Set5' / 'HR' / '2.png'
    write_png(place, picture(99, 28, 24))
    assert results.main(options(folder)) == 0
    page = (folder / 'docs' / 'RESULTS.md').read_text()
    for file in (folder / 'runs').glob('*/results.json'):
        assert len(json.loads(file.read_text())['sets']['Set5']['images']) == 3
    assert 'Set5, 3 of 5 images' in page and 'Set5, 2 of 5 images' not in page
    place.unlink()
    assert results.main(options(folder)) == 0


def scores_of(folder: Path) -> list[float]:
    found = json.loads((folder / 'runs' / 'ASID_x4' / 'results.json').read_text())
    return [each['psnr'] for each in found['sets'].values()]


def test_figures_of_other_training_images_stand_beside_no_weights():
    score = {'psnr': 38.1, 'ssim': 0.96, 'images': dict.fromkeys(range(5))}
    rows = {
        f'{name}_x2': {'model': 'OmniSR', 'scale': 2, 'sets': {'Set5': score}} for name in ('OmniSR', 'OmniSR-DF2K')
    }
    table = results.authors_table(rows)
    assert cells('\n'.join(table), 'OmniSR_x2')[2] == f'{PUBLISHED["OmniSR"][2].psnr["Set5"]:.2f}'
    assert cells('\n'.join(table), 'OmniSR-DF2K_x2')[2] == '-'


@pytest.mark.parametrize(('other', 'said'), [('this', '0.50 (0.25x)'), ('another', '0.50')])
def test_seconds_of_two_machines_have_no_ratio(other, said):
    def row(seconds: float, device: str) -> dict:
        return {'sets': {'Set5': {'psnr': 38.0, 'seconds': seconds}}, 'machine': {'device': device}}

    table = results.study_table({('A', 'whole images'): row(2.0, 'this'), ('A', 'bfloat16'): row(0.5, other)})
    assert [cell.strip() for cell in table[-1].strip('|').split('|')][-1] == said


def test_what_is_missing_is_told(tmp_path, capsys):
    (tmp_path / 'models').mkdir()
    (tmp_path / 'models' / '._ASID_x4.pt').touch()  # as macOS puts it beside a file
    assert results.main(options(tmp_path)) == 2
    assert str(tmp_path / 'models') in capsys.readouterr().err
    (tmp_path / 'models' / 'mine.pt').touch()
    assert results.main(options(tmp_path)) == 2
    assert 'mine.pt' in capsys.readouterr().err


def test_a_folder_of_theirs_without_weights_is_told(folder, tmp_path, capsys):
    assert results.main([*options(folder), '--authors', str(tmp_path)]) == 2
    assert f'{tmp_path} holds no weights (*.pth): give their folder with --authors' in capsys.readouterr().err
