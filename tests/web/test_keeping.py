"""Files that are deleted when they are old."""

import asyncio
import os
import time
from pathlib import Path

from web.keeping import keep, sweep, sweeping


def make(path: Path, age: float) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('a picture')
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_what_is_old_goes_and_what_is_new_stays(tmp_path):
    old = [make(tmp_path / 'a' / '0' / name, 3700) for name in ('photo_x2.png', 'before.png', '.half.tmp')]
    archive = make(tmp_path / 'a' / '3_images.zip', 3601)
    new = [make(tmp_path / 'a' / 'new.png', 3500), make(tmp_path / 'b' / 'upload.jpg', 0)]
    sweep(tmp_path, 3600)
    assert not any(file.exists() for file in [*old, archive])
    assert all(file.exists() for file in new)


def test_what_is_at_work_is_kept(tmp_path):
    """However long that takes."""
    upload, result = make(tmp_path / 'a' / 'x.png', 3700), make(tmp_path / 'own' / '0' / 'x_x2.png', 3700)
    other = make(tmp_path / 'b' / 'x.png', 3700)
    keep([upload, tmp_path / 'own', tmp_path / 'gone'])
    sweep(tmp_path, 3600)
    assert (upload.exists(), result.exists(), other.exists()) == (True, True, False)


def test_folders_go_when_they_are_empty_and_old(tmp_path):
    for name, age in (('old', 5000), ('new', 0)):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    make(tmp_path / 'full' / 'new.png', 0)
    os.utime(tmp_path / 'full', (time.time() - 5000,) * 2)
    sweep(tmp_path, 3600)
    assert {path.name for path in tmp_path.iterdir()} == {'new', 'full'}


def test_links_are_not_followed(tmp_path):
    kept = make(tmp_path / 'elsewhere' / 'kept.png', 5000)
    (tmp_path / 'swept').mkdir()
    (tmp_path / 'swept' / 'link').symlink_to(kept.parent)
    sweep(tmp_path / 'swept', 3600)
    assert kept.exists()


def test_it_happens_by_itself_while_the_application_runs(tmp_path):
    file = make(tmp_path / 'photo.png', 0)

    async def run() -> None:
        async with sweeping(tmp_path, 0.06)(None):
            for _ in range(1000):
                if not file.exists():
                    return
                await asyncio.sleep(0.01)

    asyncio.run(run())
    assert not file.exists()
