"""Which files are the LR of a set, and which of them were made here."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.image import read_rgb, write_png
from data.imresize import shrink
from data.lr import find_lr
from data.sets import find_set
from data.srdata import SRData
from error import UserError
from tests.conftest import picture

OWN = np.full((10, 12, 3), 200, np.uint8)  # LR of a user, of another kind than bicubic


def put(path: Path, image: np.ndarray) -> None:
    """An image file of the format that the suffix says, upper or lower case."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, quality=100)


def own_set(folder: Path, *files: str, names: str = 'a', hr: str = 'HR') -> SRData:
    """The set of HR images `names` in folder/HR, with LR of the user in `files`."""
    for number, name in enumerate(names):
        write_png(folder / hr / f'{name}.png', picture(number, 20, 24))
    for file in files:
        put(folder / file, OWN)
    return SRData(find_set(f'{folder}/{hr}', folder, folder), 2)


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob('*') if path.is_file() and 'HR' not in path.parts}


@pytest.mark.parametrize(
    ('hr', 'place', 'name'),
    [
        ('HR', 'LR_bicubic/X2', 'ax2.png'),
        ('HR', 'LR_bicubic/X2', 'ax2.jpg'),
        ('HR', 'LR_bicubic/X2', 'aX2.PNG'),
        ('HR', 'LR_bicubic/x2', 'ax2.TIFF'),
        ('HR', 'lr_BICUBIC/X2', 'ax2.JPG'),
        ('hr', 'lr_bicubic/x2', 'ax2.bmp'),
        ('Test_HR', 'lr_bicubic/X2', 'ax2.png'),
        ('test_hr', 'LR_bicubic/X2', 'ax2.webp'),
    ],
)
def test_lr_of_the_user_is_taken(tmp_path, messages, hr, place, name):
    file = f'{hr[:-2]}{place}/{name}'
    data = own_set(tmp_path, file, hr=hr)
    data.prepare()
    assert np.abs(data.lr(0).astype(int) - OWN).max() <= 2  # JPEG
    assert (data.lr_made, data.lr_border) == (0, None)
    assert messages[-1].endswith(f' x2: LR made: 0 of 1; in {tmp_path}/{hr[:-2]}{place}')
    assert tree(tmp_path) - {f'{hr}/a.png'} == {file}


@pytest.mark.parametrize(
    'file',
    ['LR_bicubic/X2/a.png', 'LR_bicubic/x2/A.jpg', 'LR_bicubic/X2/a_x2.png', 'LR_bicubic/a.png', 'LR_bicubic/ax2.png'],
)
@pytest.mark.parametrize('names', ['a', 'ab'])
def test_lr_that_fits_no_name_is_not_passed_over(tmp_path, file, names):
    others = ['LR_bicubic/X2/bx2.png'] if len(names) > 1 and '/x2/' not in file else []
    data = own_set(tmp_path, file, *others, names=names)
    with pytest.raises(UserError) as caught:
        data.prepare()
    for part in (str(tmp_path / file), 'the LR of a.png is called', 'x2/ax2.png' if '/x2/' in file else 'X2/ax2.png'):
        assert part in str(caught.value)
    assert tree(tmp_path) == {file, *others}


def test_lr_beside_one_that_an_older_version_made_in_its_place(tmp_path):
    data = own_set(tmp_path, 'LR_bicubic/X2/a.png', 'LR_bicubic/X2/ax2.png')
    with pytest.raises(UserError, match=r'No HR image goes by the name of .*X2/a\.png:'):
        data.prepare()


def test_several_lr_of_one_image(tmp_path):
    data = own_set(tmp_path, 'LR_bicubic/X2/ax2.png', 'LR_bicubic/X2/ax2.jpg')
    with pytest.raises(UserError, match=r'a\.png has several LR images \(.*ax2\.jpg, .*ax2\.png\)'):
        data.prepare()


def test_lr_of_images_that_are_not_asked_for_is_in_nobodys_way(tmp_path):
    """A part of a set, or one of whose HR images some were taken out."""
    data = own_set(tmp_path, 'LR_bicubic/X2/ax2.png', 'LR_bicubic/X2/cx2.png', names='ab')
    (tmp_path / 'HR' / 'b.png').unlink()
    images = find_set(f'{tmp_path}/HR', tmp_path, tmp_path)
    SRData(images, 2).prepare()
    write_png(tmp_path / 'HR' / 'c.png', picture(2, 20, 24))
    write_png(tmp_path / 'HR' / 'd.png', picture(3, 20, 24))
    images = find_set(f'{tmp_path}/HR', tmp_path, tmp_path)
    SRData(images[2:], 2).prepare()  # of d alone, which has no LR yet
    assert tree(tmp_path) == {f'LR_bicubic/X2/{name}x2.png' for name in 'acd'}
    assert data.names == ['a', 'b']


def test_what_is_missing_is_made_and_counted(tmp_path, messages):
    data = own_set(tmp_path, 'LR_bicubic/X2/ax2.png', names='abc')
    data.prepare()
    place = tmp_path / 'LR_bicubic' / 'X2'
    assert messages[-1].endswith(f'LR made: 2 of 3; in {place}')
    np.testing.assert_array_equal(data.lr(0), OWN)
    (place / 'cx2.png').unlink()
    again = own_set(tmp_path, names='abc')
    again.prepare()
    assert messages[-1].endswith(f'LR made: 2 of 3, 1 of them now; in {place}')
    assert (again.lr_made, again.lr_border) == (2, 'mirror')
    assert again.protocol()['lr_made'] == 2


def test_names_that_end_like_lr(tmp_path):
    write_png(tmp_path / 'HR' / 'ax2.png', picture(7, 20, 24))
    data = own_set(tmp_path, 'LR_bicubic/X2/ax2x2.png', 'LR_bicubic/X2/ax2.png')
    assert data.names == ['a', 'ax2']
    found = find_lr(find_set(f'{tmp_path}/HR', tmp_path, tmp_path), 2)
    assert [path.name for path in found] == ['ax2.png', 'ax2x2.png']


def test_lr_is_made_anew_when_its_hr_has_changed(tmp_path, messages):
    own_set(tmp_path, 'LR_bicubic/X2/bx2.png', names='ab').prepare()
    messages.clear()
    for name in 'ab':  # as large, and of the same time
        path = tmp_path / 'HR' / f'{name}.png'
        write_png(path, picture(9, 20, 24))
    data = SRData(find_set(f'{tmp_path}/HR', tmp_path, tmp_path), 2)
    data.prepare()
    anew, counted = messages
    assert anew.endswith('LR is made anew where its HR has changed: a')
    assert 'LR made: 1 of 2; in' in counted
    expected = shrink(picture(9, 20, 24), 2)
    np.testing.assert_array_equal(data.lr(0), expected)
    np.testing.assert_array_equal(read_rgb(tmp_path / 'LR_bicubic' / 'X2' / 'ax2.png'), expected)
    np.testing.assert_array_equal(data.lr(1), OWN)  # given: never touched


def test_an_hr_image_of_another_size_gets_another_lr(tmp_path):
    own_set(tmp_path).prepare()
    write_png(tmp_path / 'HR' / 'a.png', picture(9, 40, 30))
    data = SRData(find_set(f'{tmp_path}/HR', tmp_path, tmp_path), 2)
    data.prepare()
    np.testing.assert_array_equal(data.lr(0), shrink(picture(9, 40, 30), 2))


def test_a_copy_of_the_set_is_no_change(tmp_path, messages):
    own_set(tmp_path / 'one').prepare()
    shutil.copytree(tmp_path / 'one', tmp_path / 'two', copy_function=shutil.copyfile)  # with new times
    lr = tmp_path / 'two' / 'LR_bicubic' / 'X2' / 'ax2.png'
    os.utime(tmp_path / 'two' / 'HR' / 'a.png', ns=(1, 1))
    before = lr.stat().st_mtime_ns
    messages.clear()
    SRData(find_set(f'{tmp_path}/two/HR', tmp_path, tmp_path), 2).prepare()
    assert lr.stat().st_mtime_ns == before
    assert len(messages) == 1


def test_lr_that_the_user_put_in_place_of_ours_is_not_touched(tmp_path):
    own_set(tmp_path).prepare()
    put(tmp_path / 'LR_bicubic' / 'X2' / 'ax2.png', OWN)
    write_png(tmp_path / 'HR' / 'a.png', picture(9, 20, 24))
    data = SRData(find_set(f'{tmp_path}/HR', tmp_path, tmp_path), 2)
    data.prepare()
    np.testing.assert_array_equal(data.lr(0), OWN)
    assert data.lr_made == 0


@pytest.mark.parametrize('cached', [False, True])
def test_changed_hr_where_lr_cannot_be_written(tmp_path, cached):
    own_set(tmp_path).prepare()
    write_png(tmp_path / 'HR' / 'a.png', picture(9, 20, 24))
    place = tmp_path / 'LR_bicubic' / 'X2'
    lr = (place / 'ax2.png').read_bytes()
    data = SRData(find_set(f'{tmp_path}/HR', tmp_path, tmp_path), 2, cached=cached)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, 'replace', lambda *_: (_ for _ in ()).throw(OSError(30, 'Read-only file system')))
        data.prepare()
    assert (place / 'ax2.png').read_bytes() == lr
    np.testing.assert_array_equal(data.lr(0), shrink(picture(9, 20, 24), 2))


def test_lr_of_older_versions_is_known_by_the_note_beside_it(tmp_path, messages):
    data = own_set(tmp_path, 'LR_bicubic/X2/ax2.png')
    (tmp_path / 'LR_bicubic' / 'X2' / '.lr_border').write_text('mirror\n')
    data.prepare()
    assert (data.lr_made, data.lr_border) == (1, 'mirror')
    np.testing.assert_array_equal(data.lr(0), OWN)
    assert f'{tmp_path}/LR_bicubic/X2: an older version made the LR there, and kept no record' in messages[0]


def test_a_link_to_lr_that_leads_nowhere_is_named(tmp_path):
    data = own_set(tmp_path)
    place = tmp_path / 'LR_bicubic' / 'X2'
    place.mkdir(parents=True)
    (place / 'ax2.png').symlink_to(tmp_path / 'nowhere.png')
    with pytest.raises(UserError, match=r'ax2\.png does not exist'):
        data.prepare()


def test_an_hr_image_that_is_turned_after_its_pixels_is_prepared_again_and_again(tmp_path):
    from tests.data.test_formats import EXIF_CHUNK, with_chunks

    data = own_set(tmp_path)
    with_chunks(tmp_path / 'HR' / 'a.png', after=EXIF_CHUNK)
    for _ in range(3):
        data = SRData(find_set(f'{tmp_path}/HR', tmp_path, tmp_path), 2)
        data.prepare()
        np.testing.assert_array_equal(data.lr(0), shrink(np.rot90(picture(0, 20, 24), -1).copy(), 2))
