"""LR images that are there, that are made, and that cannot be kept; decoded copies beside the images."""

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest

from data.image import read_rgb, write_png
from data.imresize import shrink
from data.sets import ImageSet, find_set
from data.srdata import SRData
from error import UserError
from tests.conftest import picture


@pytest.fixture
def warnings():
    """What is logged at level WARNING or above while the test runs."""
    messages = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    log = logging.getLogger('frugalsr')
    log.addHandler(handler)
    yield messages
    log.removeHandler(handler)


def one_set(folder: Path, *sizes: tuple[int, int]) -> ImageSet:
    """A set of random images a.png, b.png, ... in folder/HR."""
    rng = np.random.default_rng(0)
    for name, size in zip('abcdef', sizes, strict=False):
        write_png(folder / 'HR' / f'{name}.png', rng.integers(0, 256, (*size, 3)).astype(np.uint8))
    return find_set(f'{folder}/HR', folder, folder)


def prepared(images: ImageSet, scale: int, **options) -> SRData:
    data = SRData(images, scale, **options)
    data.prepare()
    return data


def tree(folder: Path) -> set[str]:
    files = (path for path in folder.rglob('[!.]*') if path.is_file())
    return {str(path.relative_to(folder)) for path in files}


def message(images: ImageSet, scale: int, **options) -> str:
    with pytest.raises(UserError) as caught:
        prepared(images, scale, **options)
    assert '\n' not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize('scale', [2, 3, 4])
def test_the_lr_of_set5_is_the_official_one(shared, tmp_path, scale):
    official = shared / 'benchmark' / 'Set5'
    (tmp_path / 'Set5').mkdir()
    (tmp_path / 'Set5' / 'HR').symlink_to(official / 'HR')
    data = prepared(find_set('Set5', tmp_path, tmp_path), scale)
    assert data.names == ['baby', 'bird', 'butterfly', 'head', 'woman']
    for index, name in enumerate(data.names):
        file = f'LR_bicubic/X{scale}/{name}x{scale}.png'
        expected = read_rgb(official / file)
        np.testing.assert_array_equal(read_rgb(tmp_path / 'Set5' / file), expected)
        np.testing.assert_array_equal(data.lr(index), expected)
        assert data.hr(index).shape == (scale * expected.shape[0], scale * expected.shape[1], 3)


@pytest.mark.parametrize('workers', [0, 1, 3])
def test_lr_is_made_once(tmp_path, workers):
    images = one_set(tmp_path, (20, 24), (30, 18), (16, 16))
    SRData(images, 2).prepare(workers)
    made = {tmp_path / 'LR_bicubic' / 'X2' / f'{name}x2.png' for name in 'abc'}
    assert set((tmp_path / 'LR_bicubic').rglob('[!.]*.*')) == made
    for hr in images.hr:
        lr = tmp_path / 'LR_bicubic' / 'X2' / f'{hr.stem}x2.png'
        np.testing.assert_array_equal(read_rgb(lr), shrink(read_rgb(hr), 2))
    before = {path: path.stat().st_mtime_ns for path in made}
    SRData(images, 2).prepare(workers)
    assert {path: path.stat().st_mtime_ns for path in made} == before


def test_only_what_is_missing_is_made(tmp_path):
    images = one_set(tmp_path, (20, 24), (20, 24))
    own = picture(1, 10, 12)
    write_png(tmp_path / 'LR_bicubic' / 'X2' / 'ax2.png', own)
    data = prepared(images, 2)
    np.testing.assert_array_equal(data.lr(0), own)
    np.testing.assert_array_equal(data.lr(1), shrink(data.hr(1), 2))
    assert tree(tmp_path / 'LR_bicubic') == {'X2/ax2.png', 'X2/bx2.png'}


@pytest.mark.parametrize('size', [(12, 10), (10, 13), (20, 24)])
def test_lr_of_the_wrong_size(tmp_path, size):
    images = one_set(tmp_path, (20, 24))
    lr = tmp_path / 'LR_bicubic' / 'X2' / 'ax2.png'
    write_png(lr, picture(1, *size))
    text = message(images, 2)
    for part in (str(lr), str(images.hr[0]), f'{size[1]}x{size[0]}', '12x10'):  # width x height
        assert part in text


def test_names_that_are_no_words(tmp_path):
    for name in ('x[1].png', 'photo.of.me.png', 'é ü.png', 'x1.png'):
        write_png(tmp_path / 'HR' / name, picture(len(name), 8, 8))
    data = prepared(find_set(f'{tmp_path}/HR', tmp_path, tmp_path), 2, cached=True)
    expected = {f'X2/{name}x2.png' for name in ('x[1]', 'photo.of.me', 'é ü', 'x1')}
    assert tree(tmp_path / 'LR_bicubic') == expected
    for index, name in enumerate(data.names):
        np.testing.assert_array_equal(data.hr(index), read_rgb(tmp_path / 'HR' / f'{name}.png'))
        np.testing.assert_array_equal(data.lr(index), shrink(data.hr(index), 2))


@pytest.mark.parametrize('cached', [False, True])
@pytest.mark.parametrize('in_the_way', ['LR_bicubic', 'LR_bicubic/X3'])
def test_lr_that_cannot_be_written_is_kept_in_memory(tmp_path, warnings, in_the_way, cached):
    images = one_set(tmp_path, (20, 24), (30, 18), (16, 16))
    (tmp_path / in_the_way).parent.mkdir(exist_ok=True)
    (tmp_path / in_the_way).write_text('a file where the folder should be')
    data = SRData(images, 3, cached=cached)
    data.prepare(workers=2)
    assert len(warnings) == 1
    assert str(tmp_path / 'LR_bicubic' / 'X3') in warnings[0]
    for index, path in enumerate(images.hr):
        np.testing.assert_array_equal(data.lr(index), shrink(read_rgb(path), 3))
        assert data.lr(index) is data.lr(index)
    assert tree(tmp_path) - tree(tmp_path / 'bin') >= {'HR/a.png', 'HR/b.png', 'HR/c.png', in_the_way}
    assert (tmp_path / in_the_way).read_text() == 'a file where the folder should be'


@pytest.mark.parametrize('cached', [False, True])
def test_a_set_beside_which_nothing_may_be_written(tmp_path, warnings, cached):
    """The set Sample lies within an installed package."""
    images = one_set(tmp_path / 'package', (20, 24), (30, 18))
    data = prepared(ImageSet('Sample', images.hr, [None, None]), 2, cached=cached)
    for index, path in enumerate(images.hr):
        np.testing.assert_array_equal(data.lr(index), shrink(read_rgb(path), 2))
        np.testing.assert_array_equal(data.hr(index), read_rgb(path))
    assert tree(tmp_path) == {'package/HR/a.png', 'package/HR/b.png'}
    assert warnings == []


@pytest.mark.parametrize('scale', [2, 3, 4])
def test_hr_is_cropped_to_a_multiple_of_the_scale(tmp_path, scale):
    data = prepared(one_set(tmp_path, (23, 31)), scale)
    height, width = 23 // scale * scale, 31 // scale * scale
    whole = read_rgb(tmp_path / 'HR' / 'a.png')
    np.testing.assert_array_equal(data.hr(0), whole[:height, :width])
    np.testing.assert_array_equal(data.lr(0), shrink(whole[:height, :width], scale))


@pytest.mark.parametrize('size', [(3, 20), (20, 3)])
def test_hr_smaller_than_the_scale(tmp_path, size):
    text = message(one_set(tmp_path, (8, 8), size), 4)
    for part in (str(tmp_path / 'HR' / 'b.png'), f'{size[1]}x{size[0]}', 'x4'):
        assert part in text
    assert not (tmp_path / 'LR_bicubic' / 'X4' / 'bx4.png').exists()


@pytest.mark.parametrize('cached', [False, True])
def test_a_truncated_hr_image(tmp_path, cached):
    images = one_set(tmp_path, (20, 24), (30, 18))
    images.hr[1].write_bytes(images.hr[1].read_bytes()[:300])
    assert str(images.hr[1]) in message(images, 2, cached=cached)
    assert not (tmp_path / 'LR_bicubic' / 'X2' / 'bx2.png').exists()


@pytest.mark.parametrize('cached', [False, True])
def test_images_that_cannot_be_used_are_counted_and_passed_over(tmp_path, warnings, cached):
    images = one_set(tmp_path, (20, 24), (30, 18), (16, 16), (20, 20))
    write_png(tmp_path / 'LR_bicubic' / 'X2' / 'ax2.png', picture(1, 3, 3))
    images.hr[1].write_bytes(images.hr[1].read_bytes()[:300])
    data = prepared(images, 2, cached=cached, skip_bad=True)
    assert len(warnings) == 1
    assert warnings[0].startswith('2 of 4 images of ')
    for part in (str(tmp_path / 'LR_bicubic' / 'X2' / 'ax2.png'), str(images.hr[1])):
        assert part in warnings[0]
    for index in (0, 1):
        with pytest.raises(UserError, match=r'remove the LR file|cannot be read'):
            data.lr(index)
    np.testing.assert_array_equal(data.lr(3), shrink(read_rgb(images.hr[3]), 2))
    assert len(data) == 4
    assert data.lr_made == 2


def test_one_warning_where_nothing_can_be_written(tmp_path, warnings):
    images = one_set(tmp_path, (20, 24), (30, 18))
    for name in ('LR_bicubic', 'bin'):
        (tmp_path / name).write_text('a file where the folder should be')
    data = prepared(images, 2, cached=True)
    assert len(warnings) == 1
    assert 'LR images are kept in memory and images are decoded whenever they are read' in warnings[0]
    np.testing.assert_array_equal(data.lr(1), shrink(read_rgb(images.hr[1]), 2))


def test_lr_border(tmp_path):
    """White above, black below: repeating the edge pixel and reflecting the image weigh them differently."""
    image = np.zeros((8, 8, 3), np.uint8)
    image[0] = 255
    write_png(tmp_path / 'HR' / 'a.png', image)
    images = find_set(f'{tmp_path}/HR', tmp_path, tmp_path)
    mirror = prepared(images, 2).lr(0)
    shutil.rmtree(tmp_path / 'LR_bicubic')
    clamp = prepared(images, 2, border='clamp').lr(0)
    # Cubic weights at distances 0.25, 0.75, 1.25, 1.75 pixels of LR, halved: the first row of HR is seen once as
    # itself (0.25) and once mirrored (0.75); clamped it also stands for the rows at 1.25 and 1.75 above.
    near, mid, far, end = (w / 2 for w in (0.8671875, 0.2265625, -0.0703125, -0.0234375))
    assert clamp[0, 0, 0] == np.floor(255 * (near + mid + far + end) + 0.5)
    assert mirror[0, 0, 0] == np.floor(255 * (near + mid) + 0.5)


def test_decoded_copies_lie_where_edsr_keeps_them(data_folder):
    data = prepared(find_set('DIV2K', data_folder, data_folder, (1, 2)), 2, cached=True)
    for index, name in enumerate(('0001', '0002')):
        for folder, file, image in (
            ('DIV2K_train_HR', f'{name}.png', data.hr(index)),
            ('DIV2K_train_LR_bicubic/X2', f'{name}x2.png', data.lr(index)),
        ):
            (copy,) = (data_folder / 'DIV2K' / 'bin' / folder).glob(f'{file}.*.npy')
            np.testing.assert_array_equal(np.load(copy)[: len(image), : image.shape[1]], image)
    assert isinstance(data.lr(0), np.memmap)
    assert isinstance(data.hr(0), np.memmap)
    assert len(tree(data_folder / 'DIV2K' / 'bin')) == 4


def test_copies_are_read_until_they_are_renewed(tmp_path):
    images = one_set(tmp_path, (8, 8))
    prepared(images, 2, cached=True)
    (copy,) = (tmp_path / 'bin' / 'HR').iterdir()
    np.save(copy, np.full((8, 8, 3), 7, np.uint8))
    assert (prepared(images, 2, cached=True).hr(0) == 7).all()
    data = SRData(images, 2, cached=True)
    data.prepare(renew_cache=True)
    np.testing.assert_array_equal(data.hr(0), read_rgb(images.hr[0]))
    assert list((tmp_path / 'bin' / 'HR').iterdir()) == [copy]


def test_copies_that_cannot_be_written(tmp_path, warnings):
    images = one_set(tmp_path, (8, 8), (10, 12))
    (tmp_path / 'bin').write_text('a file where the folder should be')
    data = SRData(images, 2, cached=True)
    data.prepare(workers=2)
    assert len(warnings) == 1
    assert str(tmp_path / 'bin') in warnings[0]
    for index, path in enumerate(images.hr):
        np.testing.assert_array_equal(data.hr(index), read_rgb(path))
        np.testing.assert_array_equal(data.lr(index), shrink(read_rgb(path), 2))


@pytest.mark.parametrize('renew', [False, True])
def test_copies_that_cannot_be_removed(tmp_path, warnings, renew):
    images = one_set(tmp_path, (8, 8))
    (tmp_path / 'bin' / 'HR' / 'a.png.1-2.npy').mkdir(parents=True)
    data = SRData(images, 2, cached=True)
    data.prepare(renew_cache=renew)
    assert len(warnings) == 1
    assert 'a.png.1-2.npy' in warnings[0]
    np.testing.assert_array_equal(data.hr(0), read_rgb(images.hr[0]))


def test_lr_of_another_border_is_not_taken(tmp_path):
    write_png(tmp_path / 'HR' / 'a.png', picture(1, 16, 16))
    images = find_set(f'{tmp_path}/HR', tmp_path, tmp_path)
    assert prepared(images, 2, border='mirror').lr_border == 'mirror'
    assert 'LR_bicubic/X2 have --lr_border mirror' in message(images, 2, border='clamp')
    assert prepared(images, 2, border='mirror').lr_border == 'mirror'


def test_given_lr_suits_any_border(tmp_path):
    hr = picture(1, 16, 16)
    write_png(tmp_path / 'HR' / 'a.png', hr)
    write_png(tmp_path / 'LR_bicubic' / 'X2' / 'ax2.png', hr[::2, ::2])
    images = find_set(f'{tmp_path}/HR', tmp_path, tmp_path)
    for border in ('mirror', 'clamp'):
        data = prepared(images, 2, border=border)
        np.testing.assert_array_equal(data.lr(0), hr[::2, ::2])
        assert (data.lr_made, data.lr_border) == (0, None)


def test_given_lr_is_not_completed_with_another_border(tmp_path):
    for name in 'ab':
        write_png(tmp_path / 'HR' / f'{name}.png', picture(1, 16, 16))
    write_png(tmp_path / 'LR_bicubic' / 'X2' / 'ax2.png', picture(1, 8, 8))
    images = find_set(f'{tmp_path}/HR', tmp_path, tmp_path)
    assert 'unknown border' in message(images, 2, border='clamp')
    data = prepared(images, 2)
    assert (data.lr_made, data.lr_border) == (1, 'mirror')


def test_border_is_noted_before_a_failure(tmp_path):
    for name in 'ab':
        write_png(tmp_path / 'HR' / f'{name}.png', picture(1, 16, 16))
    broken = tmp_path / 'HR' / 'b.png'
    whole = broken.read_bytes()
    broken.write_bytes(whole[:-40])
    images = find_set(f'{tmp_path}/HR', tmp_path, tmp_path)
    assert 'b.png' in message(images, 2, border='clamp')
    broken.write_bytes(whole)
    assert '--lr_border clamp' in message(images, 2, border='mirror')


def test_what_a_killed_process_left_aside_is_swept_up(tmp_path):
    images = one_set(tmp_path, (20, 24), (20, 24))
    prepared(images, 2, cached=True)
    folders = [tmp_path / 'LR_bicubic' / 'X2', tmp_path / 'bin' / 'HR']
    for folder in folders:
        (folder / '.frugalsr-0123abcd.tmp').write_bytes(b'half of a file')
        (folder / '.mine.tmp').write_bytes(b'of a stranger')
        next(folder.glob('a*')).unlink()  # as it was not done either
    prepared(images, 2, cached=True)
    for folder in folders:
        assert [path.name for path in folder.glob('*.tmp')] == ['.mine.tmp']


def test_a_name_too_long_for_its_copies(tmp_path, warnings):
    """`<name>.png` may be one for a file where `<name>x2.png` is none; no other image suffers from it."""
    one_set(tmp_path, (20, 24), (20, 24))
    (tmp_path / 'HR' / 'a.png').rename(tmp_path / 'HR' / f'{"a" * 250}.png')
    data = prepared(find_set(f'{tmp_path}/HR', tmp_path, tmp_path), 2, cached=True)
    hr = [read_rgb(path) for path in sorted((tmp_path / 'HR').iterdir())]
    for index, image in enumerate(hr):
        np.testing.assert_array_equal(data.hr(index), image)
        np.testing.assert_array_equal(data.lr(index), shrink(image, 2, 'mirror'))
    assert [path.name for path in (tmp_path / 'LR_bicubic' / 'X2').glob('*.png')] == ['bx2.png']
    assert 'LR images are kept in memory' in warnings[0]
    assert 'name too long' in warnings[0]
