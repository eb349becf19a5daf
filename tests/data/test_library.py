"""Sets opened as the program opens them."""

import pytest

from data.library import Library
from error import UserError


def test_sets_of_both_folders(data_folder):
    library = Library(data_folder, data_folder / 'benchmark', 2, shave=3)
    sets = library.open_tests(['Set5', 'Demo', 'DIV2K', 'SR291'], (5, 6))
    assert [(images.name, len(images), images.shave) for images in sets] == [
        ('Set5', 2, 3), ('DIV2K', 2, 3), ('SR291', 3, 3)
    ]  # fmt: skip
    assert sets[1].names == ['0005', '0006']
    assert sets[0].lr(0).shape[0] * 2 == sets[0].hr(0).shape[0]


def test_nothing_is_made_unless_it_is_to_be(data_folder):
    before = sorted(data_folder.rglob('*'))
    Library(data_folder, data_folder, 2).open_tests(['SR291'], prepare=False)
    assert sorted(data_folder.rglob('*')) == before
    Library(data_folder, data_folder, 2).open('SR291')
    assert (data_folder / 'SR291' / 'LR_bicubic' / 'X2' / '0001x2.png').is_file()


def test_two_sets_of_one_name(data_folder):
    with pytest.raises(UserError, match='--data_test names SR291 twice'):
        Library(data_folder, data_folder, 2).open_tests(['SR291', str(data_folder / 'SR291' / 'HR')])
