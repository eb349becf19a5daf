"""Decoded copies: what they hold, when they are renewed, and what is never taken for one."""

import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from data.cache import DecodedCache
from data.image import read_rgb, write_png
from error import UserError, WriteError
from tests.conftest import picture


@pytest.fixture
def source(tmp_path) -> Path:
    write_png(tmp_path / 'HR' / 'a.png', picture(1, 20, 30))
    return tmp_path / 'HR' / 'a.png'


@pytest.fixture
def cache(tmp_path) -> DecodedCache:
    return DecodedCache(tmp_path / 'bin')


def test_a_copy_is_a_plain_array_file(cache, source):
    cache.write(source)
    (copy,) = cache.folder.iterdir()
    assert copy == cache.path(source)
    array = np.load(copy, allow_pickle=False)
    assert (array.dtype, array.shape) == (np.uint8, (20, 30, 3))
    np.testing.assert_array_equal(array, picture(1, 20, 30))


def test_a_copy_is_memory_mapped_and_read_only(cache, source):
    assert not isinstance(cache.read(source), np.memmap)
    cache.write(source)
    image = cache.read(source)
    assert isinstance(image, np.memmap)
    assert not image.flags.writeable
    np.testing.assert_array_equal(image, picture(1, 20, 30))


def test_a_copy_is_written_once(cache, source):
    cache.write(source)
    np.save(cache.path(source), np.zeros((20, 30, 3), np.uint8))
    cache.write(source)
    assert not cache.read(source).any()


def test_a_change_of_size_renews(cache, source):
    cache.write(source)
    stat = source.stat()
    write_png(source, picture(2, 40, 50))
    os.utime(source, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert source.stat().st_size != stat.st_size
    check_renewed(cache, source, picture(2, 40, 50))


def test_a_change_of_time_renews(cache, source):
    """A bitmap of the same size, saved a nanosecond scale later."""
    source.write_bytes(bitmap(50))
    cache.write(source)
    stat = source.stat()
    source.write_bytes(bitmap(60))
    os.utime(source, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1000))
    assert source.stat().st_size == stat.st_size
    check_renewed(cache, source, np.full((1, 1, 3), 60, np.uint8))


def bitmap(value: int) -> bytes:
    """A BMP file of one pixel: two headers, the pixel, and a byte that fills up the row."""
    head = b'BM' + np.array([58, 0, 54, 40, 1, 1], '<u4').tobytes()
    return head + np.array([1, 24], '<u2').tobytes() + bytes(24) + bytes([value] * 3) + b'\0'


def check_renewed(cache, source, expected):
    np.testing.assert_array_equal(cache.read(source), expected)
    cache.write(source)
    assert list(cache.folder.iterdir()) == [cache.path(source)]
    assert isinstance(cache.read(source), np.memmap)
    np.testing.assert_array_equal(cache.read(source), expected)


def test_copies_of_other_images_stay(cache, tmp_path):
    names = ['a.png', 'b.a.png', 'a.png.png', 'a.jpg', 'x[1].png', 'x1.png', 'x*.png', 'a.png.1-2.npy.png']
    sources = [tmp_path / 'HR' / name for name in names]
    for i, path in enumerate(sources):
        write_png(path, picture(i, 8, 9))
        cache.write(path)
    for path in sources:
        os.utime(path, ns=(1, 1))
        cache.write(path)
        assert len(list(cache.folder.iterdir())) == len(names)
    for i, path in enumerate(sources):
        assert isinstance(cache.read(path), np.memmap)
        np.testing.assert_array_equal(cache.read(path), picture(i, 8, 9))
        cache.remove(path)
        assert len(list(cache.folder.iterdir())) == len(names) - i - 1


@pytest.mark.parametrize('length', [0, 1, 60, 500])
def test_half_a_copy_is_not_used(cache, source, length):
    cache.write(source)
    cache.path(source).write_bytes(cache.path(source).read_bytes()[:length])
    np.testing.assert_array_equal(cache.read(source), picture(1, 20, 30))


def test_a_temporary_file_is_not_a_copy(cache, source):
    """What a killed run leaves: `.<name>.<random>.tmp` in the folder of the copies."""
    cache.write(source)
    copy = cache.path(source)
    copy.rename(copy.with_name(f'.{copy.name}.1234abcd.tmp'))
    assert not isinstance(cache.read(source), np.memmap)
    cache.write(source)
    np.testing.assert_array_equal(cache.read(source), picture(1, 20, 30))
    assert isinstance(cache.read(source), np.memmap)


def test_a_failed_write(cache, source):
    cache.folder.write_text('a file where the folder should be')
    with pytest.raises(WriteError, match='bin'):
        cache.write(source)
    np.testing.assert_array_equal(cache.read(source), read_rgb(source))


def test_a_missing_or_damaged_source(cache, source):
    with pytest.raises(UserError, match='nowhere'):
        cache.read(source.with_name('nowhere.png'))
    source.write_bytes(source.read_bytes()[:100])
    with pytest.raises(UserError, match=r'a\.png'):
        cache.write(source)
    assert not cache.folder.exists()


@pytest.mark.skipif(not Path('/dev/fd').is_dir(), reason='open files cannot be counted')
def test_images_in_use_hold_no_files_open(cache, source):
    """DIV2K has 1600 images with LR, and a process may often open no more than 1024 files."""
    before = len(os.listdir('/dev/fd'))  # noqa: PTH208
    for i in range(20):
        path = shutil.copy(source, source.with_name(f'{i}.png'))
        cache.write(path)
        cache.read(path)
    assert len(os.listdir('/dev/fd')) == before  # noqa: PTH208
    assert len(pickle.dumps(cache)) < 1000
