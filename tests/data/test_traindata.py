"""Training samples through a loader: the same whatever the workers, and cut from the image they name."""

import errno
import multiprocessing
import os
import sys

import numpy as np
import pytest
import torch

from data.image import write_png
from data.patch import draw
from data.sets import find_set
from data.srdata import SRData
from data.traindata import Sample, TrainData, train_loader, turn, whole_batches
from error import UserError
from system.parallel import Batches
from tests.conftest import picture


def make(folder, name: str, images: list[np.ndarray], lr=None, scale: int = 2, cached: bool = False) -> SRData:
    """A prepared set of the HR images 1, 2, ..., with its own LR images or those that are made."""
    for i, image in enumerate(images):
        write_png(folder / name / 'HR' / f'{i + 1}.png', image)
        if lr is not None:
            write_png(folder / name / 'LR_bicubic' / f'X{scale}' / f'{i + 1}x{scale}.png', lr[i])
    data = SRData(find_set(name, folder, folder), scale, cached=cached)
    data.prepare()
    return data


def pictures(number: int) -> list[np.ndarray]:
    return [picture(i, 30 + 3 * i, 40 - 2 * i) for i in range(number)]


def coordinates(scale: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """LR pixels that hold (row, column, 0), and HR pixels that hold the LR pixel they belong to."""
    y, x = np.mgrid[:height, :width]
    lr = np.stack((y, x, 0 * y), axis=2).astype(np.uint8)
    return lr, lr.repeat(scale, axis=0).repeat(scale, axis=1)


def turned(sample: Sample) -> list[torch.Tensor]:
    """LR and HR of a sample as training sees them."""
    lr, hr, flips = (part.unsqueeze(0) for part in sample[:3])
    return [turn(part, flips)[0] for part in (lr, hr)]


def batches(data: TrainData, numbers: range, workers: int = 0, context: str = '') -> list:
    loader = train_loader(data, Batches(numbers, 3), workers, pin_memory=False)
    if context:
        loader.multiprocessing_context = context
    return list(whole_batches(loader))


def assert_same(found: list, expected: list) -> None:
    assert len(found) == len(expected) > 0
    for pair, other in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(pair, other, strict=True))


@pytest.mark.filterwarnings('ignore:This DataLoader will create')  # more workers than cores
@pytest.mark.parametrize('cached', [False, True])
def test_the_workers_change_nothing(tmp_path, cached):
    data = TrainData([make(tmp_path, 'A', pictures(4), cached=cached)], 16, seed=1)
    expected = [[torch.stack(part) for part in zip(*(data[n + i] for i in range(3)), strict=True)] for n in (0, 3, 6)]
    for workers in (0, 1, 2):
        assert_same(batches(data, range(9), workers), expected)
    assert_same(batches(data, range(6, 9)), expected[2:])  # as after a restart
    assert_same(batches(data, range(11)), expected)  # what is left over waits for more


def test_spawned_workers(tmp_path):
    """Windows and macOS start workers that get the data by pickle."""
    on_disk = make(tmp_path, 'A', pictures(2), cached=True)
    (tmp_path / 'B').mkdir()
    (tmp_path / 'B' / 'LR_bicubic').write_text('a file where the folder should be')
    in_memory = make(tmp_path, 'B', pictures(3))
    data = TrainData([on_disk, in_memory], 16, seed=1)
    expected = batches(data, range(6))
    assert_same(batches(data, range(6), 1, 'spawn'), expected)


def test_samples(tmp_path):
    data = TrainData([make(tmp_path, 'A', pictures(3))], 16, seed=1)
    lr, hr, flips, replaced = data[0]
    assert (flips.shape, flips.dtype, replaced.shape, replaced.item()) == ((3,), torch.bool, (), False)
    assert (lr.shape, lr.dtype) == ((3, 8, 8), torch.uint8)
    assert (hr.shape, hr.dtype) == ((3, 16, 16), torch.uint8)
    assert [len(part) for part in batches(data, range(3))[0]] == [3, 3, 3, 3]
    other = TrainData(data.sets, 16, seed=2)
    assert not all(torch.equal(data[n][1], other[n][1]) for n in range(3))


@pytest.mark.parametrize('scale', [2, 3])
def test_lr_and_hr_are_flipped_alike(tmp_path, scale):
    lr, hr = coordinates(scale, 20, 30)
    images = make(tmp_path, 'A', [hr], [lr], scale)
    plain = TrainData([images], 6 * scale, seed=1, augment=False)
    augmented = TrainData([images], 6 * scale, seed=1)
    seen = set()
    for number in range(60):
        pair, flipped = (turned(data[number]) for data in (plain, augmented))
        for patches in (pair, flipped):
            expected = patches[0].repeat_interleave(scale, 1).repeat_interleave(scale, 2)
            assert torch.equal(patches[1], expected)
        y, x = (int(n) for n in pair[0][:2, 0, 0])
        np.testing.assert_array_equal(pair[0], lr[y : y + 6, x : x + 6].transpose(2, 0, 1))
        left_right, up_down, transposed = flips = draw(1, number, 1).flips
        for patch, other in zip(pair, flipped, strict=True):
            patch = patch.flip(2) if left_right else patch
            patch = patch.flip(1) if up_down else patch
            assert torch.equal(other, patch.transpose(1, 2) if transposed else patch)
        seen.add(flips)
    assert len(seen) == 8


@pytest.mark.parametrize(
    ('flips', 'expected'),
    [
        ((False, False, False), [[1, 2], [3, 4]]),
        ((True, False, False), [[2, 1], [4, 3]]),
        ((False, True, False), [[3, 4], [1, 2]]),
        ((True, True, False), [[4, 3], [2, 1]]),
        ((False, False, True), [[1, 3], [2, 4]]),
        ((True, False, True), [[2, 4], [1, 3]]),
        ((False, True, True), [[3, 1], [4, 2]]),
        ((True, True, True), [[4, 2], [3, 1]]),
    ],
)
def test_each_image_of_a_batch_is_turned_by_its_own_flips(flips, expected):
    image = torch.tensor([[1, 2], [3, 4]], dtype=torch.uint8)
    batch = torch.stack((image, 10 * image)).expand(2, 2, 2, 2)
    found = turn(batch, torch.tensor([flips, (False, False, False)]))
    assert found[0, 0].tolist() == expected
    assert torch.equal(found[0, 1], 10 * found[0, 0])
    assert torch.equal(found[1], batch[1])


def test_an_image_that_cannot_be_read_is_replaced_by_the_next(tmp_path):
    """Grey shows which image a sample comes from; the second is damaged after its LR was made, the last before."""
    images = [np.full((20, 24, 3), 10 * (i + 1), np.uint8) for i in range(4)]
    make(tmp_path, 'A', images[:3])
    for name in ('2', '4'):
        write_png(tmp_path / 'A' / 'HR' / f'{name}.png', images[0])
        (tmp_path / 'A' / 'HR' / f'{name}.png').write_bytes(b'no image')
    sets = SRData(find_set('A', tmp_path, tmp_path), 2, skip_bad=True)
    sets.prepare()
    data = TrainData([sets], 8, seed=3, skip_bad=True)
    taken = {'A/1': 10, 'A/2': 30, 'A/3': 30, 'A/4': 10}
    for number in range(8):
        assert data[number].hr.unique().tolist() == [taken[data.name(number)]]
        assert data[number].replaced.item() == (data.name(number) in ('A/2', 'A/4'))
    strict = TrainData([sets], 8, seed=3)
    bad = next(number for number in range(4) if strict.name(number) == 'A/4')
    with pytest.raises(UserError, match=r'4\.png .* is not an image'):
        strict[bad]
    for name in '13':
        (tmp_path / 'A' / 'HR' / f'{name}.png').write_bytes(b'no image')
    with pytest.raises(UserError, match=r'None of the 4 training images can be used: .*is not an image'):
        data[0]


@pytest.mark.parametrize('workers', [0, 1])
def test_an_error_comes_from_a_loading_process_as_it_was(tmp_path, workers):
    """Whatever words are in it, and with its traceback there as the cause."""
    name = 'error.UserError: a'
    sets = make(tmp_path, name, pictures(2))
    path = tmp_path / name / 'HR' / '2.png'
    path.write_bytes(b'no image')
    data = TrainData([sets], 8, seed=1)
    with pytest.raises(UserError) as alone:
        [data[number] for number in range(2)]
    with pytest.raises(UserError) as caught:
        batches(data, range(3), workers)
    assert str(caught.value) == str(alone.value)
    assert str(path) in str(caught.value)
    assert 'in __getitem__' in str(caught.value.__cause__)


def test_two_sets_and_the_names_of_their_images(tmp_path):
    """Each image has a grey of its own, so a sample shows where it comes from."""
    sets = [
        make(tmp_path, 'A', [np.full((20, 24, 3), 10 + i, np.uint8) for i in range(3)]),
        make(tmp_path, 'B', [np.full((9, 30, 3), 100 + i, np.uint8) for i in range(2)]),
    ]
    greys = {'A/1': 10, 'A/2': 11, 'A/3': 12, 'B/1': 100, 'B/2': 101}
    data = TrainData(sets, 8, seed=3)
    for start in (0, 5, 10):
        assert {data.name(number) for number in range(start, start + 5)} == set(greys)
    for number in range(15):
        for patch in data[number][:2]:
            assert patch.unique().tolist() == [greys[data.name(number)]]


def test_images_smaller_than_the_patch(tmp_path):
    data = TrainData([make(tmp_path, 'A', [picture(1, 10, 50), picture(2, 6, 4)], scale=2)], 32, seed=1)
    for lr, hr, *_ in batches(data, range(6)):
        assert (lr.shape, hr.shape) == ((3, 3, 16, 16), (3, 3, 32, 32))


SHORTAGES = (  # as PyTorch 2.13 says it
    'unable to allocate shared memory(shm) for file </torch_29504_1536389551_1>: No space left on device (28)',
    'unable to write to file </torch_181_3256468104_18>: No space left on device (28)',
)


@pytest.mark.parametrize('said', SHORTAGES)
def test_a_shortage_of_shared_memory_is_one_sentence(tmp_path, monkeypatch, said):
    def fail(_):
        raise RuntimeError(said)

    data = TrainData([make(tmp_path, 'A', pictures(4))], 16, seed=1)
    monkeypatch.setattr('data.traindata.default_collate', fail)
    with pytest.raises(
        UserError, match=r'A loading process could not get shared memory \(.*No space.*\): .*--n_threads'
    ):
        batches(data, range(6), workers=1)


@pytest.mark.skipif(sys.platform != 'linux', reason='elsewhere they start anew')
def test_loading_processes_begin_as_they_are_whatever_python_does_by_itself(tmp_path, monkeypatch):
    """From 3.14 on it would start each anew, and import PyTorch."""
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method('forkserver', force=True)
    try:
        test_a_shortage_of_shared_memory_is_one_sentence(tmp_path, monkeypatch, SHORTAGES[0])
    finally:
        multiprocessing.set_start_method(before, force=True)


def test_another_error_of_a_loading_process_is_no_shortage(tmp_path, monkeypatch):
    def fail(_):
        raise RuntimeError('stack expects each tensor to be equal size')

    data = TrainData([make(tmp_path, 'A', pictures(4))], 16, seed=1)
    monkeypatch.setattr('data.traindata.default_collate', fail)
    with pytest.raises(RuntimeError, match='equal size'):
        batches(data, range(6))


@pytest.mark.parametrize('workers', [0, 2])
def test_no_shared_memory_at_all(tmp_path, monkeypatch, workers):
    def fail(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    data = TrainData([make(tmp_path, 'A', pictures(4))], 16, seed=1)
    monkeypatch.setattr('multiprocessing.synchronize.SemLock.__init__', fail)
    if not workers:
        assert len(batches(data, range(6))) == 2
        return
    with pytest.raises(
        UserError, match=r'2 loading processes could not get shared memory \(No space left.*--n_threads'
    ):
        batches(data, range(6), workers)
