import logging

import pytest
import torch
from torch import Tensor

from error import UserError
from model.tiles.autotile import RESERVE, AutoTiler

BYTES = 10_000  # a pixel that the network below takes
CALL = 500_000  # and a call


class Machine:
    """Stands for memory: what the network takes is a known linear function of the pixels of a call."""

    def __init__(self, monkeypatch, free: int = 10**10, used: int = 10**6) -> None:
        self.used, self.top, self.shapes = used, used, []
        monkeypatch.setattr('system.memory.start_peak', lambda device: self.start())
        monkeypatch.setattr('system.memory.in_use', lambda device: self.used)
        monkeypatch.setattr('system.memory.peak', lambda device: self.top)
        monkeypatch.setattr('system.memory.free', lambda device: free)

    def start(self) -> int:
        self.top = self.used
        return self.used

    def run(self, tiles: Tensor) -> Tensor:
        self.shapes.append(tuple(tiles.shape))
        self.top = max(self.top, self.used + CALL + BYTES * tiles[:, 0].numel())
        return tiles.float()

    def tiles(self, tiler: AutoTiler, height: int, width: int) -> set[tuple[int, ...]]:
        """Shapes of the calls for an image, whose result is checked; without those of the measurement."""
        image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
        self.shapes.clear()
        assert torch.equal(tiler(self.run, image, 1, lambda rows: rows.to(torch.uint8)), image)
        measured = [(1, 3, 64, 64), (1, 3, 64, 64), (1, 3, 128, 128)]
        return set(self.shapes[3:] if self.shapes[:3] == measured else self.shapes)


@pytest.fixture
def machine(monkeypatch) -> Machine:
    return Machine(monkeypatch)


def needed(height: int, width: int, image_width: int) -> int:
    """What a tile takes by itself, and a row of them as floats."""
    return CALL + BYTES * height * width + 4 * 3 * height * image_width


@pytest.mark.parametrize('limit', [200, 300, 600, 4000])
def test_tiles_are_as_large_as_the_limit_allows(machine, limit):
    limit = limit * 10**6 + RESERVE
    tiler = AutoTiler(8, 1, 'cpu', limit)
    ((_, _, height, width),) = machine.tiles(tiler, 1100, 1300)
    room = limit - RESERVE - machine.used
    assert needed(height, width, 1300) <= room
    if tiler.size < 512:
        assert needed(2 * height, 2 * width, 1300) > room


def test_without_a_limit_what_is_free_bounds_the_tiles(monkeypatch):
    for free, sides in ((10**8, range(40, 100)), (10**11, range(500, 513))):
        machine = Machine(monkeypatch, free)
        tiler = AutoTiler(8, 1, 'cpu')
        ((_, _, height, width),) = machine.tiles(tiler, 1500, 1500)
        assert height in sides
        assert width in sides


def test_an_image_of_measured_size_is_enlarged_whole_and_nothing_measured(machine):
    assert machine.tiles(AutoTiler(8, 1, 'cpu'), 128, 100) == {(1, 3, 128, 100)}
    assert len(machine.shapes) == 1


def test_the_network_is_measured_once(machine):
    tiler = AutoTiler(8, 1, 'cpu', RESERVE + 2 * 10**8)
    machine.tiles(tiler, 200, 200)
    assert machine.shapes[:3] == [(1, 3, 64, 64), (1, 3, 64, 64), (1, 3, 128, 128)]
    machine.tiles(tiler, 300, 200)
    assert (1, 3, 128, 128) not in machine.shapes


def test_more_tiles_a_call_where_memory_is_left(machine):
    machine.tiles(tiler := AutoTiler(8, 4, 'cuda'), 1100, 1300)
    assert (tiler.size, tiler.batch) == (512, 2)  # 3 * 1.5 * 512 * 512 * 10_000 bytes are more than 0.8 * 10**10


def test_a_limit_that_cannot_be_held_is_told(machine):
    with pytest.raises(UserError, match=r'--max_memory \d+M: 1300x1100 pixels need .*give more memory'):
        machine.tiles(AutoTiler(8, 1, 'cpu', RESERVE + 1_500_000), 1100, 1300)


def test_a_square_that_would_exceed_the_limit_is_not_tried(machine):
    with pytest.raises(UserError, match=r'--max_memory .*give more memory'):
        machine.tiles(AutoTiler(8, 1, 'cpu', RESERVE + machine.used + 128 * 128 * BYTES), 1100, 1300)
    assert machine.shapes == [(1, 3, 64, 64), (1, 3, 64, 64)]


def test_a_system_that_does_not_tell(monkeypatch):
    machine = Machine(monkeypatch)
    monkeypatch.setattr('system.memory.in_use', lambda device: None)
    with pytest.raises(UserError, match='--max_memory: this system does not tell'):
        machine.tiles(AutoTiler(8, 1, 'cpu', 10**9), 300, 300)
    assert all(max(shape[2:]) <= 192 for shape in machine.tiles(AutoTiler(8, 1, 'cpu'), 700, 500))


@pytest.mark.parametrize(('height', 'width'), [(30, 40), (100, 700), (1100, 1300)])
def test_fixed_tiles_have_one_shape_for_all_images(machine, height, width):
    tiler = AutoTiler(8, 1, 'cpu', 10**9, fixed=True)
    first = machine.tiles(tiler, 900, 900)
    assert machine.tiles(tiler, height, width) == first
    ((_, _, tile_height, tile_width),) = first
    assert tile_height == tile_width == tiler.size


def test_memory_that_runs_out_all_the_same_makes_later_tiles_smaller(machine, monkeypatch, caplog):
    plain = machine.run

    def run(tiles: Tensor) -> Tensor:
        if tiles.shape[-1] > 200:
            raise torch.OutOfMemoryError('out')
        return plain(tiles)

    monkeypatch.setattr(machine, 'run', run)
    tiler = AutoTiler(8, 1, 'cpu')
    with caplog.at_level(logging.WARNING, 'frugalsr'):
        assert max(shape[-1] for shape in machine.tiles(tiler, 900, 900)) <= 200
    assert caplog.records
    caplog.clear()
    with caplog.at_level(logging.WARNING, 'frugalsr'):
        machine.tiles(tiler, 900, 900)
    assert not caplog.records


def test_fixed_tiles_have_one_shape_also_after_a_small_image(machine):
    tiler = AutoTiler(8, 1, 'cpu', fixed=True)
    assert machine.tiles(tiler, 40, 50) == machine.tiles(tiler, 700, 600)


def test_a_wide_image_that_fixed_tiles_do_not_fit_is_told(machine):
    tiler = AutoTiler(8, 1, 'cpu', RESERVE + 200 * 10**6, fixed=True)
    machine.tiles(tiler, 200, 200)
    with pytest.raises(UserError, match='give more memory'):
        machine.tiles(tiler, 100, 100_000)


def test_processes_of_a_host_share_what_is_free(monkeypatch):
    monkeypatch.setattr('system.parallel.world_size', lambda: 4)
    machine = Machine(monkeypatch, 4 * 10**8)
    ((_, _, height, _),) = machine.tiles(AutoTiler(8, 1, 'cpu'), 1500, 1500)
    assert height in range(40, 100)
