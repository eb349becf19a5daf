"""What a run leaves for TensorBoard, read by TensorBoard."""

import io
import logging
import os
import shutil
import sys
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest

from data.image import read_rgb
from report.board import Board
from tests.test_trainer import EDSR, metrics, train


@pytest.fixture
def read():
    accumulators = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')

    def read(folder: Path) -> object:
        found = accumulators.EventAccumulator(str(folder))
        found.Reload()
        return found

    return read


def test_a_run_is_logged_and_a_continued_one_goes_on(data_folder, read):
    train(data_folder, EDSR, '--epochs 2 --loss 2*L1+0.5*MSE --ssim')
    run = train(data_folder, '--load run --epochs 3 --save_results')
    board, records = read(run / 'tensorboard'), metrics(run)
    expected = {
        'psnr/Set5': lambda record: record['test']['Set5']['psnr'],
        'ssim/Set5': lambda record: record['test']['Set5']['ssim'],
        'loss/MSE': lambda record: record['loss']['MSE'],
        'lr': lambda record: record['lr'],
        'gradient_norm': lambda record: record['gradient_norm'],
    }
    for tag, value in expected.items():
        events = board.Scalars(tag)
        assert [event.step for event in events] == [1, 2, 3]
        assert [event.value for event in events] == pytest.approx([value(record) for record in records])
    assert sorted(board.Tags()['images']) == ['Set5/0001', 'Set5/0002']
    shown = iio.imread(io.BytesIO(board.Images('Set5/0002')[-1].encoded_image_string))
    np.testing.assert_array_equal(shown, read_rgb(run / 'results-Set5' / '0002_x2_SR.png'))


def test_epochs_that_are_done_again_replace_the_old(tmp_path, read):
    record = {'epoch': 1, 'lr': 1.0, 'skipped': 0, 'images_per_second': 1.0, 'wait': 0.0, 'loss': {}, 'test': {}}
    first = Board(tmp_path)
    for epoch in (1, 2, 3):
        first.write(record | {'epoch': epoch, 'lr': 1.0}, {})
    Board(tmp_path).write(record | {'epoch': 2, 'lr': 5.0}, {})
    assert [(event.step, event.value) for event in read(tmp_path).Scalars('lr')] == [(1, 1.0), (2, 5.0)]


def test_a_folder_that_goes_or_cannot_be_written(tmp_path, read, caplog):
    record = {'epoch': 1, 'lr': 1.0, 'skipped': 0, 'images_per_second': 1.0, 'wait': 0.0, 'loss': {}, 'test': {}}
    board, folder = Board(tmp_path / 'board'), tmp_path / 'board'
    board.write(record, {})
    shutil.rmtree(folder)
    board.write(record | {'epoch': 2}, {})
    assert [event.step for event in read(folder).Scalars('lr')] == [2]
    shutil.rmtree(folder)
    folder.write_text('a file where the folder should be')
    board.write(record | {'epoch': 3}, {})
    assert 'The log for TensorBoard could not be written (File exists)' in caplog.text
    folder.unlink()
    board.write(record | {'epoch': 4}, {})
    assert [event.step for event in read(folder).Scalars('lr')] == [4]


@pytest.mark.parametrize('name', ['$5_$10', os.fsdecode(b'\xff\xfe'), 'a\nb\x01', 'long' * 60], ids=ascii)
def test_every_name_can_be_logged(tmp_path, read, name, caplog):
    record = {'epoch': 1, 'lr': 1.0, 'loss': {}, 'test': {name: {'psnr': 30.0}}}
    Board(tmp_path).write(record, {f'{name}/{name}': np.zeros((4, 4, 3), np.uint8)})
    assert not caplog.text
    found = read(tmp_path).Tags()
    assert len(found['scalars']) == 2
    assert len(found['images']) == 1


def test_an_error_of_the_library_is_a_warning(tmp_path, read, caplog, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise ValueError('no such thing')

    logging.getLogger('frugalsr').propagate = True
    monkeypatch.setattr('torch.utils.tensorboard.SummaryWriter.add_scalar', fail)
    Board(tmp_path).write({'epoch': 1, 'lr': 1.0, 'loss': {}, 'test': {}}, {})
    assert 'The log for TensorBoard could not be written (no such thing)' in caplog.text


def test_without_tensorboard_nothing_is_written(data_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', None)
    run = train(data_folder, EDSR)
    assert not (run / 'tensorboard').exists()
    assert len(metrics(run)) == 1
