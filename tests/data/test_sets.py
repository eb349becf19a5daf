"""Where the images of a set are looked for, and what is said when they are not there."""

from pathlib import Path

import pytest

from data.image import read_size
from data.sets import find_set
from error import UserError


def fill(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()
    return folder


def numbered(first: int, last: int) -> list[str]:
    return [f'{i:04d}.png' for i in range(first, last + 1)]


def message(*arguments) -> str:
    with pytest.raises(UserError) as caught:
        find_set(*arguments)
    assert '\n' not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize('in_train', [800, 900])
def test_div2k_counts_on_from_train_to_valid(tmp_path, in_train):
    root = tmp_path / 'DIV2K'
    fill(root / 'DIV2K_train_HR', *numbered(1, in_train))
    if in_train < 900:
        fill(root / 'DIV2K_valid_HR', *numbered(in_train + 1, 900))
    images = find_set('DIV2K', tmp_path, tmp_path / 'none', (801, 810))
    assert images.names == [f'{i:04d}' for i in range(801, 811)]
    part = 'train' if in_train == 900 else 'valid'
    assert set(images.lr) == {root / f'DIV2K_{part}_LR_bicubic'}
    assert images.hr[0] == root / f'DIV2K_{part}_HR' / '0801.png'
    assert (images.name, images.channels) == ('DIV2K', 'RGB')


def test_div2k_range_across_the_folders(data_folder):
    root = data_folder / 'DIV2K'
    fill(root / 'DIV2K_valid_HR', '0007.png', '0008.png')
    images = find_set('DIV2K', data_folder, data_folder, (5, 7))
    assert images.names == ['0005', '0006', '0007']
    assert images.lr == [root / f'DIV2K_{part}_LR_bicubic' for part in ('train', 'train', 'valid')]
    assert len(find_set('DIV2K', data_folder, data_folder).hr) == 8


def test_a_range_is_of_the_numbers_of_images(data_folder):
    """Where some are not there, others would move into the test images, or from there into the training images."""
    fill(data_folder / 'DIV2K' / 'DIV2K_valid_HR', '0801.png')
    assert find_set('DIV2K', data_folder, data_folder, (801, 801)).names == ['0801']
    text = message('DIV2K', data_folder, data_folder, (5, 801))
    for part in ('5-801', 'no 0007', '7 images', 'DIV2K_train_HR', 'DIV2K_valid_HR'):
        assert part in text


def test_a_range_of_images_without_numbers_is_of_their_places(tmp_path):
    fill(tmp_path / 'DIV2K' / 'DIV2K_train_HR', 'a.png', 'b.png', 'c.png')
    assert find_set('DIV2K', tmp_path, tmp_path, (2, 3)).names == ['b', 'c']
    for part in ('2-4', '3 images', 'DIV2K_train_HR'):
        assert part in message('DIV2K', tmp_path, tmp_path, (2, 4))


def test_flickr2k(tmp_path):
    root = tmp_path / 'Flickr2K'
    fill(root / 'Flickr2K_HR', '000002.png', '000001.png')
    images = find_set('Flickr2K', tmp_path, tmp_path / 'none', (1, 1))  # the range is that of DIV2K
    assert images.hr == [root / 'Flickr2K_HR' / name for name in ('000001.png', '000002.png')]
    assert images.lr == [root / 'Flickr2K_LR_bicubic'] * 2
    assert images.channels == 'RGB'


def test_sr291(data_folder):
    images = find_set('SR291', data_folder, data_folder / 'none', (1, 1))
    assert images.names == ['0001', '0002', '0003']
    assert set(images.lr) == {data_folder / 'SR291' / 'LR_bicubic'}


def test_benchmarks_and_the_order_of_the_folders(tmp_path):
    data, own = tmp_path / 'data', tmp_path / 'own'
    for root in (own, data, data / 'benchmark'):
        fill(root / 'Set5' / 'HR', 'baby.png')
        images = find_set('Set5', data, own)
        assert images.hr == [root / 'Set5' / 'HR' / 'baby.png']
        assert images.lr == [root / 'Set5' / 'LR_bicubic']
        assert (images.name, images.channels) == ('Set5', 'Y')


@pytest.mark.parametrize(
    ('hr', 'lr', 'name'),
    [
        ('mine/HR', 'mine/LR_bicubic', 'mine'),
        ('DIV2K_valid_HR', 'DIV2K_valid_LR_bicubic', 'DIV2K_valid_HR'),
        ('photos', 'photos/LR_bicubic', 'photos'),
        ('my.photos [2]', 'my.photos [2]/LR_bicubic', 'my.photos [2]'),
        ('ULTRAHR', 'ULTRAHR/LR_bicubic', 'ULTRAHR'),
    ],
)
def test_a_folder_given_by_its_path(tmp_path, hr, lr, name):
    fill(tmp_path / hr, 'b.JPG', 'a.png', '.hidden.png', 'notes.txt')
    for given in (str(tmp_path / hr), f'{tmp_path / hr}/'):
        images = find_set(given, tmp_path / 'none', tmp_path / 'none')
        assert images.hr == [tmp_path / hr / 'a.png', tmp_path / hr / 'b.JPG']
        assert images.lr == [tmp_path / lr] * 2
        assert (images.name, images.channels) == (name, 'Y')


def test_relative_paths_and_home(tmp_path, monkeypatch):
    fill(tmp_path / 'photos', 'a.png')
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.chdir(tmp_path / 'photos')
    for given in ('.', './', '../photos', '~/photos'):
        images = find_set(given, tmp_path / 'none', tmp_path / 'none')
        assert (images.name, images.names) == ('photos', ['a'])


def test_sample(tmp_path):
    images = find_set('Sample', tmp_path / 'none', tmp_path / 'none')
    assert 'astronaut' in images.names
    assert read_size(images.hr[images.names.index('astronaut')]) == (512, 512)
    assert images.lr == [None] * len(images.hr)


def test_a_missing_set(data_folder, tmp_path):
    text = message('B100', data_folder, tmp_path / 'own')
    for root in (data_folder / 'benchmark', data_folder, tmp_path / 'own'):
        assert str(root / 'B100' / 'HR') in text
    for part in ("'B100'", 'DIV2K, SR291, benchmark', '<dir_data>/B100/HR/*.png', 'B100/LR_bicubic/X<scale>'):
        assert part in text
    fill(tmp_path / 'empty')
    assert 'holds nothing' in message('B100', tmp_path / 'empty', tmp_path / 'own')
    assert 'does not exist' in message('DIV2K', tmp_path / 'nowhere', tmp_path / 'own')
    assert 'DIV2K/DIV2K_train_HR/*.png' in message('DIV2K', tmp_path / 'nowhere', tmp_path / 'own')


def test_a_missing_folder(tmp_path):
    assert str(tmp_path / 'photos') in message(str(tmp_path / 'photos'), tmp_path, tmp_path)


def test_an_empty_folder(tmp_path):
    fill(tmp_path / 'Set5' / 'HR', 'notes.txt')
    for name in ('Set5', str(tmp_path / 'Set5' / 'HR')):
        text = message(name, tmp_path, tmp_path)
        assert str(tmp_path / 'Set5' / 'HR') in text
        assert '.png, .jpg' in text


def test_two_images_of_one_name(tmp_path):
    fill(tmp_path / 'Set5' / 'HR', 'a.png', 'b.png', 'b.jpg')
    assert "'b'" in message('Set5', tmp_path, tmp_path)


def test_validation_images_copied_into_the_training_folder(tmp_path):
    fill(tmp_path / 'DIV2K' / 'DIV2K_train_HR', '0001.png', '0002.png')
    fill(tmp_path / 'DIV2K' / 'DIV2K_valid_HR', '0002.png')
    files = find_set('DIV2K', tmp_path, tmp_path).hr
    assert [str(path.relative_to(tmp_path / 'DIV2K')) for path in files] == [
        'DIV2K_train_HR/0001.png',
        'DIV2K_train_HR/0002.png',
    ]
