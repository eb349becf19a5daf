import gc
import logging
from collections.abc import Callable, Iterator
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from model.tiles.tiling import Function, MeanTiler, Tiler, _bring, split

SETTINGS = [(16, 4, 3), (32, 8, 4), (7, 0, 2), (10, 9, 1), (9, 1, 2)]
# All small sizes, every height and every width of 1..100 beside a small one, and two large images.
SIZES = [(h, w) for h in range(1, 25) for w in range(1, 25)]
SIZES += [size for n in range(25, 101) for size in [(n, 37 * n % 13 + 1), (37 * n % 13 + 1, n)]]
SIZES += [(100, 99), (67, 100)]


def identity(tiles: Tensor) -> Tensor:
    return tiles


def enlarge(tiles: Tensor, scale: int = 2) -> Tensor:
    return tiles.repeat_interleave(scale, -2).repeat_interleave(scale, -1)


def to_uint8(rows: Tensor) -> Tensor:
    return rows.clamp_(0, 255).round_().to(torch.uint8)


def noise(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


class Limited:
    """An identity network that can hold a given number of pixels, and counts what it saw."""

    def __init__(self, limit: int, error: type[Exception] = torch.OutOfMemoryError, text: str = 'out') -> None:
        self.limit, self.error, self.text = limit, error, text
        self.shapes: list[torch.Size] = []

    def __call__(self, tiles: Tensor) -> Tensor:
        self.shapes.append(tiles.shape)
        if tiles[:, 0].numel() > self.limit:
            raise self.error(self.text)
        return tiles


@pytest.mark.parametrize(('size', 'overlap'), [(s, o) for s, o, _ in SETTINGS] + [(64, 16), (100, 99), (5, 3), (2, 1)])
def test_split_covers_the_axis_with_equal_overlapping_tiles(size: int, overlap: int) -> None:
    for length in range(1, 300):
        side, starts = split(length, size, overlap)
        assert 1 <= side <= size
        assert starts[0] == 0
        assert starts[-1] + side == length
        steps = [right - left for left, right in pairwise(starts)]
        assert all(1 <= step <= side - overlap for step in steps)
        assert not steps or max(steps) - min(steps) <= 1
        # One tile fewer, even of the full size, would not reach the end.
        assert len(starts) == 1 or (len(starts) - 1) * (size - overlap) + overlap < length


@pytest.mark.parametrize(('size', 'overlap', 'batch'), SETTINGS)
def test_identity_is_exact_at_every_size(size: int, overlap: int, batch: int) -> None:
    tiler = Tiler(size, overlap, batch)
    whole = noise(2, 100, 100)
    for height, width in SIZES:
        image = whole[:, :height, :width]
        assert torch.equal(tiler(identity, image, 1, identity), image), (height, width)


@pytest.mark.parametrize(('size', 'overlap', 'batch'), SETTINGS)
def test_enlarging_is_exact(size: int, overlap: int, batch: int) -> None:
    tiler = Tiler(size, overlap, batch)
    whole = (256 * noise(3, 100, 100)).to(torch.uint8)
    for height, width in SIZES[::5]:
        image = whole[:, :height, :width]
        result = tiler(enlarge, image, 2, to_uint8)
        assert result.dtype == torch.uint8
        assert torch.equal(result, enlarge(image)), (height, width)


def test_uint16_passes() -> None:
    image = (65536 * noise(3, 45, 38)).to(torch.int32).to(torch.uint16)
    seen = []

    def run(tiles: Tensor) -> Tensor:
        seen.append(tiles.dtype)
        return tiles

    result = Tiler(16, 4, 3)(run, image, 1, lambda rows: rows.to(torch.int32).to(torch.uint16))
    assert set(seen) == {torch.uint16}
    assert result.dtype == torch.uint16
    assert result.numpy().tolist() == image.numpy().tolist()


def test_whatever_the_network_returns_is_left_alone() -> None:
    image = noise(1, 20, 30)
    kept = []

    @torch.inference_mode()
    def run(tiles: Tensor) -> Tensor:
        tiles = tiles + 0
        kept.append((tiles, tiles.tolist()))
        return tiles

    result = Tiler(8, 4, 2)(run, image, 1, identity)
    assert torch.equal(result, image)
    assert not result.is_inference()
    assert all(tiles.tolist() == values for tiles, values in kept)


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 12, 3, padding=1)]
    return nn.Sequential(*layers, nn.PixelShuffle(2)).double()


@pytest.mark.parametrize(('height', 'width'), [(50, 71), (20, 90), (90, 13), (23, 24), (1, 100)])
@pytest.mark.parametrize('overlap', [8, 9, 13])
def test_an_overlap_beyond_the_reach_changes_nothing(height: int, width: int, overlap: int) -> None:
    net, image = network(), noise(3, height, width).double()
    whole = net(image[None])[0].detach().float()
    result = Tiler(20, overlap, 3)(net, image, 2, identity)
    torch.testing.assert_close(result, whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize('overlap', [0, 2, 4])
def test_a_smaller_overlap_shows(overlap: int) -> None:
    net, image = network(), noise(3, 50, 71).double()
    whole = net(image[None])[0].detach().float()
    result = Tiler(20, overlap, 3)(net, image, 2, identity)
    assert (result - whole).abs().max() > 1e-4


def test_the_seam_is_a_linear_fade_of_two_pixels() -> None:
    """Two tiles of 6 pixels share 4; the first tile is all 0, the second all 1, at scale 2."""
    constants = iter([0.0, 1.0])

    def run(tiles: Tensor) -> Tensor:
        return torch.full_like(enlarge(tiles), next(constants))

    result = Tiler(6, 4, 1)(run, torch.zeros(1, 1, 8), 2, identity)
    assert result[0, 0].tolist() == [0] * 6 + [0.125, 0.375, 0.625, 0.875] + [1] * 6
    constants = iter([0.0, 1.0])
    result = Tiler(6, 4, 1)(run, torch.zeros(1, 8, 1), 2, identity)
    assert result[0, :, 1].tolist() == [0] * 6 + [0.125, 0.375, 0.625, 0.875] + [1] * 6


@pytest.mark.parametrize(('size', 'overlap', 'batch'), SETTINGS)
def test_tiles_have_one_shape_and_calls_at_most_batch_tiles(size: int, overlap: int, batch: int) -> None:
    run = Limited(10**9)
    Tiler(size, overlap, batch)(run, noise(3, 61, 83), 1, identity)
    assert len({shape[1:] for shape in run.shapes}) == 1
    assert max(run.shapes[0][2:]) <= size
    assert max(shape[0] for shape in run.shapes) == batch


def test_finish_gets_every_row_once_in_order_and_never_more_than_a_row_of_tiles() -> None:
    image = torch.arange(97.0)[None, :, None].expand(1, 97, 50)
    heights, rows_seen = [], []

    def finish(rows: Tensor) -> Tensor:
        assert rows.dtype == torch.float32
        assert rows.shape[-1] == 100
        heights.append(rows.shape[-2])
        rows_seen.extend(rows[0, :, 0].tolist())
        return rows.zero_()

    result = Tiler(16, 4, 3)(enlarge, image, 2, finish)
    assert rows_seen == [row // 2 for row in range(194)]
    assert max(heights) <= 32
    assert not result.any()


@pytest.fixture
def held_floats() -> Iterator[Callable[[], int]]:
    """A count of the bytes in all float32 storages made from now on; collects no garbage meanwhile."""

    def count() -> int:
        tensors = [item for item in gc.get_objects() if type(item) is Tensor and item.dtype == torch.float32]
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    gc.collect()
    gc.disable()
    gc.freeze()
    yield count
    gc.unfreeze()
    gc.enable()


def test_one_row_of_tiles_is_held_as_floats(held_floats: Callable[[], int]) -> None:
    image = torch.zeros(1, 256, 2048, dtype=torch.uint8)
    held = []

    def run(tiles: Tensor) -> Tensor:
        held.append(held_floats())
        return tiles

    def finish(rows: Tensor) -> Tensor:
        held.append(held_floats())
        return to_uint8(rows)

    Tiler(32, 8, 2)(run, image, 1, finish)
    strip = 4 * 32 * 2048
    assert strip <= max(held) <= 1.2 * strip


@pytest.mark.parametrize(
    ('error', 'text'),
    [
        (torch.OutOfMemoryError, 'CUDA out of memory.'),
        (RuntimeError, "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you"),
        (RuntimeError, 'DefaultCPUAllocator: not enough memory: you tried to allocate 16 bytes.'),
        (MemoryError, 'Unable to allocate 8.00 GiB for an array with shape (2**30,)'),
    ],
)
def test_out_of_memory_shrinks_the_work_for_good(
    error: type[Exception], text: str, caplog: pytest.LogCaptureFixture
) -> None:
    image = noise(3, 150, 170)
    tiler = Tiler(100, 8, 8)
    run = Limited(40 * 40, error, text)
    with caplog.at_level(logging.WARNING, 'frugalsr'):
        assert torch.equal(tiler(run, image, 1, identity), image)
    refused = [shape for shape in run.shapes if shape[0] * shape[2] * shape[3] > run.limit]
    assert len(caplog.records) == len(refused) > 1
    assert str(tiler.size) in caplog.messages[-1]
    assert [shape[0] for shape in refused][:2] == [2, 1]
    again = Limited(run.limit, error, text)
    assert torch.equal(tiler(again, image, 1, identity), image)
    assert {shape[2:] for shape in again.shapes} == {run.shapes[-1][2:]}
    assert all(shape[0] * shape[2] * shape[3] <= run.limit for shape in again.shapes)


def test_the_failed_attempt_is_freed_before_the_next(held_floats: Callable[[], int]) -> None:
    seen = []

    def run(tiles: Tensor) -> Tensor:
        activations = tiles.float()
        seen.append(held_floats())
        if tiles.shape[-1] > 32:
            raise torch.OutOfMemoryError('out')
        return activations

    Tiler(512, 0, 1)(run, torch.zeros(1, 512, 512, dtype=torch.uint8), 1, to_uint8)
    assert seen[:5] == [4 * side * (side + 512) for side in (512, 256, 128, 64, 32)]  # a tile, and a row of them


def test_a_low_image_goes_on_in_smaller_fixed_tiles() -> None:
    """What it was continued by, for tiles that no longer are, has no rows."""
    image, given = noise(3, 10, 10), []

    def finish(rows: Tensor) -> Tensor:
        given.append(rows.shape[-2])
        return identity(rows)

    assert torch.equal(Tiler(64, 4, 1, fixed=True)(Limited(32 * 32), image, 1, finish), image)
    assert sum(given) == 10 and min(given) > 0


def test_copies_are_waited_for_on_the_device_that_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on the current one, which is another where somebody asks for cuda:1."""
    asked: list[object] = []

    def stop(device: object = None) -> None:
        asked.append(device)
        raise InterruptedError

    monkeypatch.setattr(torch.cuda, 'Stream', stop)
    monkeypatch.setattr(torch, 'empty', lambda *_, **__: None)
    with pytest.raises(InterruptedError):
        _bring(SimpleNamespace(device='cuda:1', shape=(1,)))
    assert asked == ['cuda:1']


def test_hopeless_memory_ends_in_the_error() -> None:
    run = Limited(0)
    with pytest.raises(torch.OutOfMemoryError):
        Tiler(100, 8, 8)(run, noise(3, 150, 170), 1, identity)
    assert min(min(shape[2:]) for shape in run.shapes) >= 16
    assert len(run.shapes) < 12


def test_an_image_below_the_smallest_tile_is_tried_once() -> None:
    run = Limited(0)
    with pytest.raises(torch.OutOfMemoryError):
        Tiler(1000, 8, 8)(run, noise(3, 20, 20), 1, identity)
    assert len(run.shapes) == 1


@pytest.mark.parametrize('error', [RuntimeError, ValueError])
def test_other_errors_pass_through(error: type[Exception]) -> None:
    run = Limited(0, error, 'mat1 and mat2 shapes cannot be multiplied')
    tiler = Tiler(16, 4, 3)
    with pytest.raises(error, match='cannot be multiplied'):
        tiler(run, noise(3, 40, 40), 1, identity)
    assert len(run.shapes) == 1
    assert (tiler.size, tiler.batch) == (16, 3)


@pytest.mark.parametrize(('size', 'overlap', 'batch'), [(8, 8, 1), (8, 9, 1), (8, -1, 1), (0, 0, 1), (8, 2, 0)])
def test_settings_are_checked(size: int, overlap: int, batch: int) -> None:
    with pytest.raises(ValueError, match='need'):
        Tiler(size, overlap, batch)


@pytest.mark.parametrize(('height', 'width'), [(1, 1), (5, 40), (16, 16), (17, 15), (60, 83)])
def test_fixed_tiles_have_exactly_their_size_and_give_the_same(height: int, width: int) -> None:
    image, run = noise(3, height, width), Limited(10**9)
    assert torch.equal(Tiler(16, 4, 1, fixed=True)(run, image, 1, identity), image)
    assert set(run.shapes) == {(1, 3, 16, 16)}
    assert torch.equal(Tiler(16, 4, 1, fixed=True)(enlarge, image, 2, identity), enlarge(image[None])[0])


def test_a_small_image_is_continued_by_its_mirror_image() -> None:
    seen = []
    Tiler(5, 2, 1, fixed=True)(lambda tiles: seen.append(tiles) or tiles, torch.tensor([[[1.0, 2.0]]]), 1, identity)
    assert seen[0][0, 0].tolist() == [[1, 2, 2, 1, 1]] * 5


def test_rows_come_from_top_to_bottom_few_at_a_time() -> None:
    image, found = noise(3, 83, 61), []
    for rows in Tiler(32, 4, 2).rows(enlarge, image, 2, identity):
        assert rows.shape[-2] <= 32
        found.append(rows.clone())
    assert torch.equal(torch.cat(found, -2), enlarge(image))


# Tiles of one size and their plain mean, as OmniSR and ASID are tested.


def plain_mean(image: Tensor, size: int, overlap: int, run: Function, scale: int) -> Tensor:
    """Pixel by pixel: the mean of all square tiles at steps of size - overlap, or moved back to the edge."""
    _, height, width = image.shape
    side = min(size, height, width)
    found: dict[tuple[int, int], list[Tensor]] = {}
    for y in [*range(0, height - side, side - overlap), height - side]:
        for x in [*range(0, width - side, side - overlap), width - side]:
            tile = run(image[None, :, y : y + side, x : x + side])[0]
            for i in range(side * scale):
                for j in range(side * scale):
                    found.setdefault((y * scale + i, x * scale + j), []).append(tile[:, i, j])
    result = torch.zeros(image.shape[0], height * scale, width * scale)
    for (i, j), values in found.items():
        result[:, i, j] = torch.stack(values).mean(0)
    return result


def shaded(tiles: Tensor) -> Tensor:
    """An enlargement whose values depend on where in the tile they are."""
    y = enlarge(tiles)
    return y + torch.linspace(0, 1, y.shape[-1]) * torch.linspace(0, 2, y.shape[-2])[:, None]


@pytest.mark.parametrize('size', [(16, 16), (17, 16), (8, 30), (23, 11), (9, 9), (40, 7)])
def test_mean_of_tiles_equals_plain_loops(size: tuple[int, int]) -> None:
    image = noise(2, *size)
    found = MeanTiler(8, 3, 2)(shaded, image, 2, identity)
    torch.testing.assert_close(found, plain_mean(image, 8, 3, shaded, 2))


@pytest.mark.parametrize('size', [(1, 1), (2, 9), (3, 3), (1, 50)])
def test_mean_of_tiles_of_images_smaller_than_the_overlap(size: tuple[int, int]) -> None:
    image = noise(2, *size)
    torch.testing.assert_close(MeanTiler(8, 3, 2)(enlarge, image, 2, identity), enlarge(image))


def test_mean_of_tiles_keeps_its_size_when_memory_runs_out() -> None:
    net = Limited(limit=2 * 64)
    image = noise(1, 40, 40)
    tiler = MeanTiler(8, 2, 8)
    assert torch.allclose(tiler(net, image, 1, identity), image)
    assert {shape[-2:] for shape in net.shapes} == {(8, 8)}
    with pytest.raises(torch.OutOfMemoryError):
        tiler(Limited(limit=63), image, 1, identity)


def test_memory_that_runs_out_in_finishing_loses_no_rows() -> None:
    image, calls = noise(3, 100, 40), []

    def finish(rows: Tensor) -> Tensor:
        calls.append(rows)
        if len(calls) == 2:
            raise torch.OutOfMemoryError('out')
        return rows.clone()

    assert torch.equal(Tiler(32, 8, 4)(lambda tiles: tiles, image, 1, finish), image)


def test_no_rows_are_empty_after_memory_ran_out() -> None:
    image, calls = noise(3, 100, 40), []

    def run(tiles: Tensor) -> Tensor:
        calls.append(tiles)
        if len(calls) == 4:
            raise torch.OutOfMemoryError('out')
        return tiles

    found = [rows.clone() for rows in MeanTiler(32, 8, 4).rows(run, image, 1, identity)]
    assert all(rows.shape[-2] for rows in found)
    assert torch.allclose(torch.cat(found, -2), image)


def reports(tiler: Tiler, image: Tensor, network: Function = identity) -> list[tuple[int, int]]:
    told: list[tuple[int, int]] = []
    rows = tiler.rows(network, image, 1, to_uint8, lambda done, total: told.append((done, total)))
    assert sum(piece.shape[-2] for piece in rows) == image.shape[-2]
    return told


@pytest.mark.parametrize('kind', [Tiler, MeanTiler])
@pytest.mark.parametrize('batch', [1, 4])
def test_tiles_are_counted(kind: type[Tiler], batch: int) -> None:
    seen: list[int] = []

    def network(tiles: Tensor) -> Tensor:
        seen.append(len(tiles))
        return tiles

    told = reports(kind(16, 4, batch), noise(3, 70, 45), network)
    assert told[0] == (0, sum(seen))
    assert [done for done, _ in told[1:]] == [sum(seen[: i + 1]) for i in range(len(seen))]
    assert {total for _, total in told} == {sum(seen)}


@pytest.mark.parametrize('size', [(1, 1), (5, 40), (16, 16)])
@pytest.mark.parametrize('fixed', [False, True])
def test_tiles_of_small_images_are_counted(size: tuple[int, int], fixed: bool) -> None:
    done, total = reports(Tiler(16, 4, 1, fixed), noise(3, *size))[-1]
    assert done == total


def test_tiles_are_counted_when_memory_runs_out() -> None:
    told = reports(Tiler(64, 4, 2), noise(3, 150, 150), Limited(1000))
    assert told[-1][0] == told[-1][1]
    assert all(done <= total for done, total in told)
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def test_what_a_report_raises_ends_the_work() -> None:
    calls = Limited(10**6)

    def report(done: int, total: int) -> None:
        if done == 2:
            raise KeyError

    with pytest.raises(KeyError):
        list(Tiler(16, 4, 1).rows(calls, noise(3, 70, 45), 1, to_uint8, report))
    assert len(calls.shapes) == 2
