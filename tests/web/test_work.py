"""The work on several images: turns, ends, errors, with plain functions in place of networks."""

import logging
from collections.abc import Callable
from pathlib import Path
from threading import Event
from time import monotonic, sleep

import numpy as np
import pytest

from data.image import write_png
from error import UserError
from web import work as working
from web.comparing import Comparison, Pair
from web.enlarging import Result, Stopped
from web.work import Line, State, work

SHOWN = Comparison(Pair(Path('before.png'), Path('after.png'), (4, 4), 0.5), None)
PATIENCE = 20  # seconds


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(working, 'POLL', 0.002)


@pytest.fixture
def images(tmp_path) -> list[Path]:
    """Three, of 10, 20 and 10 pixels, two of which have one name."""
    files = [tmp_path / 'a' / 'cat.png', tmp_path / 'b' / 'dog.png', tmp_path / 'c' / 'cat.png']
    for file, width in zip(files, (10, 20, 10), strict=True):
        write_png(file, np.zeros((1, width, 3), np.uint8))
    return files


def make(image: Path, folder: Path, progress, stop) -> Result:
    """Two tiles, at once."""
    for done in (0, 1, 2):
        if stop():
            raise Stopped
        progress(done, 2)
    return Result(folder / f'{image.stem}_x2.png', 'done', SHOWN)


def wait_for(condition: Callable[[], bool]) -> None:
    end = monotonic() + PATIENCE
    while not condition():
        assert monotonic() < end
        sleep(0.002)


class Paused:
    """Work whose second tile waits until it may go on."""

    def __init__(self) -> None:
        self.reached, self.go, self.ended = Event(), Event(), Event()

    def __call__(self, image: Path, folder: Path, progress, stop) -> Result:
        try:
            progress(1, 4)
            self.reached.set()
            assert self.go.wait(PATIENCE)
            return make(image, folder, progress, stop)
        finally:
            self.ended.set()


def test_all_are_done_one_after_the_other(images, tmp_path):
    *_, state = work(images, make, tmp_path, Line(1), Event())
    assert state.ended and not state.stopped and not state.failures
    assert len(set(state.names)) == 3
    assert [state.results[name].image for name in state.names] == [
        tmp_path / '0' / 'cat_x2.png',
        tmp_path / '1' / 'dog_x2.png',
        tmp_path / '2' / 'cat_x2.png',
    ]


def test_how_far_it_is_goes_by_pixels_and_tiles(images):
    state = State(['a', 'b', 'c'], [10, 20, 10], number=1, tiles=(1, 4), seconds=30.0)
    assert state.share == pytest.approx((10 + 20 / 4) / 40)
    assert state.left == pytest.approx(30 * 25 / 15)
    assert State(['a'], [5]).left is None


def test_tiles_and_share_are_told_meanwhile(images, tmp_path):
    paused = Paused()
    running = work(images[:2], paused, tmp_path, Line(1), Event())
    state = next(running)
    assert paused.reached.wait(PATIENCE)
    assert next(running) is state
    assert state.tiles == (1, 4)
    assert state.share == pytest.approx(10 / 4 / 30)
    assert state.left is not None and state.left > 0
    paused.go.set()
    list(running)
    assert state.ended


def test_stopped_work_keeps_what_was_finished(images, tmp_path):
    stop, paused = Event(), Paused()

    def second_waits(image: Path, *rest) -> Result:
        return make(image, *rest) if image == images[0] else paused(image, *rest)

    running, line = work(images, second_waits, tmp_path, Line(1), stop), Line(1)
    state = next(running)
    while not paused.reached.is_set():
        next(running)
    stop.set()
    paused.go.set()
    *_, state = running
    assert state.ended and state.stopped
    assert list(state.results) == state.names[:1]
    line.join(self := object())  # and others may go on
    assert line.ahead(self) == 0


def test_a_visitor_who_leaves_ends_the_work_and_makes_room(images, tmp_path):
    line, paused = Line(2), Paused()
    running = work(images, paused, tmp_path, line, Event())
    next(running)
    assert paused.reached.wait(PATIENCE)
    line.join(other := object())
    running.close()  # at once, without waiting for the tile
    assert not paused.ended.is_set()
    assert line.ahead(other) == 1  # two networks never work at the same time
    paused.go.set()
    wait_for(lambda: line.ahead(other) == 0)


def test_two_visitors_take_turns(images, tmp_path):
    line, order, first = Line(2), [], Paused()

    def noting(who: str):
        def one(image: Path, *rest) -> Result:
            order.append(who)
            return first(image, *rest) if len(order) == 1 else make(image, *rest)

        return one

    a = work(images[:2], noting('a'), tmp_path, line, Event())
    next(a)
    assert first.reached.wait(PATIENCE)
    b = work(images[1:], noting('b'), tmp_path, line, Event())
    state = next(b)
    assert state.ahead == 1
    first.go.set()
    while not all(state.ended for state in (next(a, state), next(b, state))):
        pass
    assert order == ['a', 'b', 'a', 'b']


def test_a_place_is_kept_until_the_last_image(images, tmp_path):
    """However many come meanwhile, and however late it is asked how far the work is."""
    line, order = Line(2), []

    def one(image: Path, *rest) -> Result:
        order.append(image)
        return make(image, *rest)

    running = work(images[:2], one, tmp_path, line, Event())
    next(running)
    wait_for(lambda: line.ahead(running) == 0 and len(order) == 1)
    line.join(other := object())
    with pytest.raises(UserError, match='At most 2 visitors'):  # the second image has the other place
        line.join(object())
    line.leave(other)
    *_, state = running
    assert (len(state.results), state.failures) == (2, [])
    for _ in range(2):
        line.join(object())  # no place is left behind


def test_waiting_can_be_stopped_too(images, tmp_path):
    line, stop = Line(2), Event()
    line.join(object())
    running = work(images, make, tmp_path, line, stop)
    assert next(running).ahead == 1
    stop.set()
    *_, state = running
    assert state.stopped and not state.results
    line.join(object())  # there is room again


def test_a_full_line(images, tmp_path):
    line = Line(1)
    line.join(object())
    *_, state = work(images[:1], make, tmp_path, line, Event())
    assert state.failures == ['At most 1 visitors can wait: try again later.']


def test_an_image_that_fails_leaves_the_others(images, tmp_path, caplog):
    images[1].write_text('no image')

    def one(image: Path, *rest) -> Result:
        if image == images[0]:
            raise UserError(f'{image} is not to be had: take another.')
        if image == images[1]:
            raise RuntimeError('a fault')
        return make(image, *rest)

    with caplog.at_level(logging.ERROR):
        *_, state = work(images, one, tmp_path, Line(1), Event())
    assert state.failures == [
        'cat.png is not to be had: take another.',
        'dog.png could not be enlarged, by a fault of this program, which has noted it.',
    ]
    assert list(state.results) == state.names[2:]
    assert 'a fault' in caplog.text


def test_memory_that_ran_out_is_said(images):
    said = working.sentence(RuntimeError("DefaultCPUAllocator: can't allocate memory"), images[0])
    assert said == 'cat.png: memory ran out: give a smaller image.'


def test_messages_do_not_tell_folders():
    visit = Path('a visit').absolute()
    for told, said in (
        ('/tmp/a-b/c d.png is no image, and/or x/y', 'c d.png is no image, and/or x/y'),
        (r'C:\Users\anna\c d.png is no image', 'c d.png is no image'),
        (f'{visit / "c d.png"} is no image', 'c d.png is no image'),
        (f'{visit / "big one" / "0" / "c d_x4.png"} could not be written', 'c d_x4.png could not be written'),
    ):
        assert working.sentence(UserError(told), visit / 'c d.png', visit / 'big one') == said
