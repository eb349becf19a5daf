import unicodedata
from pathlib import Path

import pytest

from data.outputs import claim, match_outputs, output_names
from error import UserError


def fill(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).touch()
    return folder


@pytest.mark.parametrize(
    'file',
    [
        'baby.png',
        'baby.JPG',
        'baby.jpeg',
        'baby.TIF',
        'baby.tiff',
        'baby.webp',
        'babyx2.png',
        'babyX4.png',
        'baby_x4_SR.png',
        'babyx4_SR.png',
        'baby_SRF_4_HR.png',
        'baby-LCoAN.bmp',
        'baby (1).png',
        'baby.x4.png',
    ],
)
def test_any_suffix(tmp_path, file):
    assert match_outputs(fill(tmp_path, file), ['baby']) == {'baby': tmp_path / file}


@pytest.mark.parametrize(
    'name, other',
    [
        ('3096', '30960.png'),
        ('img_001', 'img_0012.png'),
        ('man', 'mandrill.png'),
        ('man', 'woman.png'),
        ('baby', 'babyx2b.png'),
        ('baby', 'babyx.png'),
        ('baby', 'babyé.png'),
        ('baby', 'Set5_baby.png'),
        ('a.b', 'a_b.png'),
    ],
)
def test_a_longer_word_is_another_name(tmp_path, name, other):
    with pytest.raises(UserError, match='no image for 1 of 1'):
        match_outputs(fill(tmp_path, other), [name])


def test_a_file_belongs_to_the_longest_name(tmp_path):
    fill(tmp_path, 'man_SR.png', 'man_2_SR.png', 'man_2_b_x4_SR.png')
    assert match_outputs(tmp_path, ['man_2', 'man', 'man_2_b']) == {
        'man_2': tmp_path / 'man_2_SR.png',
        'man': tmp_path / 'man_SR.png',
        'man_2_b': tmp_path / 'man_2_b_x4_SR.png',
    }


def test_the_order_is_that_of_the_names(tmp_path):
    fill(tmp_path, 'a.png', 'b.png', 'c.png')
    assert list(match_outputs(tmp_path, ['c', 'a', 'b'])) == ['c', 'a', 'b']


def test_files_of_no_name_are_ignored(tmp_path):
    fill(tmp_path, 'baby_SR.png', 'baby.txt', 'bird_SR.png')
    assert match_outputs(tmp_path, ['baby']) == {'baby': tmp_path / 'baby_SR.png'}


def test_sr_wins_over_what_lies_beside_it(tmp_path):
    fill(tmp_path, 'baby_x4_SR.png', 'baby_x4_LR.png', 'baby_x4_HR.png')
    assert match_outputs(tmp_path, ['baby']) == {'baby': tmp_path / 'baby_x4_SR.png'}


@pytest.mark.parametrize(
    'files', [('baby.png', 'baby-2.png'), ('baby_x2_SR.png', 'baby_x4_SR.png'), ('baby.png', 'baby.bmp')]
)
def test_several_files_for_one_name(tmp_path, files):
    with pytest.raises(UserError) as error:
        match_outputs(fill(tmp_path, *files), ['baby'])
    for text in (str(tmp_path), '2 images for baby', *files, '_SR'):
        assert text in str(error.value)


def test_names_without_a_file(tmp_path):
    names = ['baby', 'bird', 'butterfly', 'head', 'woman']
    with pytest.raises(UserError) as error:
        match_outputs(fill(tmp_path, 'head_SR.png', 'other.png'), names)
    for text in (str(tmp_path), '4 of 5', 'baby, bird, butterfly and 1 more', 'head_SR.png, other.png'):
        assert text in str(error.value)


def test_no_folder(tmp_path):
    with pytest.raises(UserError, match='nowhere is not a folder'):
        match_outputs(tmp_path / 'nowhere', ['baby'])


def test_no_images(tmp_path):
    with pytest.raises(UserError, match='holds no images'):
        match_outputs(fill(tmp_path, 'baby.txt'), ['baby'])


def test_names_that_differ_in_case_alone_are_told_apart():
    """On some file systems they are one."""
    files = [Path(name) for name in ('A.png', 'a.jpg', 'A.PNG', 'b.png', '\u00e9.png', 'E\u0301.png')]
    names = output_names(files)
    assert len({unicodedata.normalize('NFC', name).lower() for name in names}) == len(files)
    assert names[3] == 'b'


def results(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob('*.png')}


def test_images_of_another_folder_are_not_replaced(tmp_path):
    one, two, target = tmp_path / 'one', tmp_path / 'two', tmp_path / 'results'
    claim(target, one, reset=False)
    for name in ('a_x2_SR.png', 'a_x2_attention.png', 'mine.png'):
        (target / name).write_bytes(b'of one')
    claim(target, one, reset=False)
    claim(target, tmp_path / 'other' / '..' / 'one', reset=False)
    before = results(target)
    with pytest.raises(UserError, match=rf'{target} holds images made from {one}, not from {two}: --reset .*--save'):
        claim(target, two, reset=False)
    assert results(target) == before
    claim(target, two, reset=True)
    assert results(target) == {'mine.png': b'of one'}
    with pytest.raises(UserError, match=r'folder that is not known'):
        claim(fill(tmp_path, 'a_x2_SR.png'), one, reset=False)


def test_an_empty_folder_is_anyones(tmp_path):
    for name in ('one', 'two'):
        claim(tmp_path / 'results', tmp_path / name, reset=False)
