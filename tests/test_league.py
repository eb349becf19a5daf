import json
import os
import re
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest

import league
from data.image import write_png
from tests.conftest import ROOT, picture

NETWORKS = ('EDSR-baseline', 'PAN')
MORE = '--cpu --n_feats 8 --patch_size 16 --batch_size 2'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, number in {'SR291/HR': 3, 'benchmark/Set5/HR': 2}.items():
        for i in range(number):
            write_png(tmp_path / 'data' / name / f'{i}.png', picture(i, 40 + i, 36 + i))
    return tmp_path


def call(folder: Path, minutes: float = 0.02, names: str = '+'.join(NETWORKS)) -> int:
    line = f'--minutes {minutes} --networks {names} --save_dir {folder}/runs --out {folder}/LEAGUE.md'
    return league.main([*line.split(), '--dir_data', f'{folder}/data', *MORE.split()])


def rows(folder: Path) -> dict[str, list[str]]:
    lines = (folder / 'LEAGUE.md').read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip('|').split('|')] for line in lines if line.startswith('| ')]
    return {row[0]: row[1:] for row in cells[2:]}


def test_all_train_for_the_same_time_and_are_ranked(folder: Path) -> None:
    assert call(folder) == 0
    found = rows(folder)
    assert sorted(found) == sorted(NETWORKS)
    psnr = [float(row[0].split(' / ')[0]) for row in found.values()]
    assert psnr == sorted(psnr, reverse=True)
    for name, row in found.items():
        seconds = json.loads((folder / 'runs' / name / 'league.json').read_text())['seconds']
        steps, patches, speed = (float(cell) for cell in row[3:])
        assert 0.98 * 1.2 <= seconds < 30
        assert patches == 2 * steps > 0
        assert speed == pytest.approx(patches / seconds, abs=0.05)
        scored = json.loads((folder / 'runs' / f'{name}_test' / 'results.json').read_text())
        assert row[0].startswith(f'{scored["sets"]["Set5"]["psnr"]:.2f} / ')
    # 2 x 8 x 8 x 9 + 8 in each of 16 blocks and at the body's end, head, upsampler and tail
    edsr = 33 * (8 * 8 * 9 + 8) + (3 * 8 * 9 + 8) + (8 * 32 * 9 + 32) + (8 * 3 * 9 + 3)
    assert found['EDSR-baseline'][1] == f'{edsr / 1e3:.0f}K'
    assert (folder / 'league.png').read_bytes().startswith(b'\x89PNG')
    before = {path: path.stat().st_mtime_ns for path in folder.rglob('*.pt')}
    assert call(folder) == 0
    assert {path: path.stat().st_mtime_ns for path in folder.rglob('*.pt')} == before
    assert rows(folder) == found


def test_the_page_in_the_documents_has_the_parameters_of_the_published_networks() -> None:
    """Not with buffers, of which SwinIR-light and others have many."""
    costs = re.findall(r'^    (\S+) +x2 +([\d.]+)', (ROOT / 'docs' / 'COSTS.md').read_text(), re.MULTILINE)
    known = {name: float(thousands) for name, thousands in costs}
    found = {name: float(row[1].rstrip('K')) for name, row in rows(ROOT / 'docs').items()}
    assert len(found) == len(league.NETWORKS)
    own = {'LCoAN-small': 274.2}  # models/LCoAN-small_x2.md
    assert found == pytest.approx({name: (known | own)[name] for name in found}, abs=0.5)


def test_goes_on_within_a_network(folder: Path) -> None:
    timer = threading.Timer(2.5, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    assert call(folder, 0.2, 'PAN') == 130
    timer.join()
    first = json.loads((folder / 'runs' / 'PAN' / 'league.json').read_text())['seconds']
    assert 0 < first < 12
    assert not (folder / 'LEAGUE.md').exists()
    assert call(folder, 0.2, 'PAN') == 0
    assert 0.98 * 12 <= json.loads((folder / 'runs' / 'PAN' / 'league.json').read_text())['seconds'] < 12 + 2.5
    assert 'continues' in (folder / 'runs' / 'PAN' / 'log.txt').read_text()


def test_what_trained_on_is_scored_again(folder: Path) -> None:
    assert call(folder, 0.02, 'PAN') == 0
    scored = folder / 'runs' / 'PAN_test' / 'results.json'
    before = scored.stat().st_mtime_ns
    shutil.rmtree(folder / 'runs' / 'PAN')  # to have it trained anew
    assert call(folder, 0.02, 'PAN') == 0
    assert scored.stat().st_mtime_ns > before


def test_other_minutes_want_another_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(folder, 0.01, 'PAN') == 0
    page = (folder / 'LEAGUE.md').read_text()
    assert call(folder, 0.02, 'PAN') == 2
    assert (
        'league.json is of a run with other minutes or options: give these, or another --save_dir'
        in capsys.readouterr().err
    )
    assert (folder / 'LEAGUE.md').read_text() == page


def test_minutes_are_those_of_the_processor(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here another program gets every second moment."""
    monkeypatch.setattr(league, 'processor_seconds', lambda: time.monotonic() / 2)
    start = time.monotonic()
    assert call(folder, 0.05, 'PAN') == 0
    assert time.monotonic() - start > 2 * 0.98 * 3
    assert 0.98 * 3 <= json.loads((folder / 'runs' / 'PAN' / 'league.json').read_text())['seconds'] < 3 + 2.5


def test_no_more_minutes_where_the_others_end(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another program gets nearly all of the first four seconds."""
    start = time.monotonic()

    def seconds() -> float:
        passed = time.monotonic() - start
        return 0.02 * passed + max(0.0, passed - 4)

    monkeypatch.setattr(league, 'processor_seconds', seconds)
    assert call(folder, 0.05, 'PAN') == 0
    assert 0.98 * 3 <= json.loads((folder / 'runs' / 'PAN' / 'league.json').read_text())['seconds'] < 3 + 2.5
