import threading
import time
from collections.abc import Iterator

import pytest

from system import background as background_module
from system.background import Prefetcher, WorkerPool


def test_results_of_the_background_keep_their_order():
    with WorkerPool() as background:
        for i in range(7):
            background.start(lambda n: (time.sleep(0.001 * (7 - n)), n)[1], i)
    assert background.results == list(range(7))


def test_an_error_of_one_piece_of_work_surfaces():
    with pytest.raises(ZeroDivisionError), WorkerPool() as background:
        for i in (1, 0, 2, 3):
            background.start(lambda n: 1 / n, i)


@pytest.mark.parametrize('processes', [1, 3])
def test_the_next_item_is_loaded_while_one_is_in_use(monkeypatch, processes):
    monkeypatch.setattr('system.parallel.world_size', lambda: processes)
    loaded = [threading.Event() for _ in range(10)]

    def load(index: int) -> int:
        loaded[index].set()
        if index == 4:
            raise ValueError
        return 2 * index

    ahead, own = Prefetcher(), range(1, 10, processes)
    for index in own:
        if index == 4:
            with pytest.raises(ValueError):
                ahead(load, index, 10)
        else:
            assert ahead(load, index, 10) == 2 * index
        if index + processes < 10:
            assert loaded[index + processes].wait(10)
    assert ahead(load, 0, 1) == 0  # another set begins
    assert [event.is_set() for event in loaded] == [index in (0, *own) for index in range(10)]


def test_what_is_fed_arrives_in_order_and_is_not_made_far_ahead():
    made, used, ahead = [], [], []

    def items() -> Iterator[int]:
        for i in range(100):
            made.append(i)
            ahead.append(len(made) - len(used))
            yield i

    with WorkerPool() as background:
        background.feed(items(), lambda numbers, sign: [used.append(sign * n) for n in numbers], -1)
    assert used == [-i for i in range(100)]
    assert max(ahead) <= 11  # eight wait, and one is in each hand


def test_an_error_in_making_items_ends_the_work_with_it():
    ended = []

    def items() -> Iterator[int]:
        yield 1
        raise ZeroDivisionError

    def work(numbers: Iterator[int]) -> None:
        try:
            list(numbers)
        except ZeroDivisionError:
            ended.append(True)
            raise

    with pytest.raises(ZeroDivisionError), WorkerPool() as background:
        background.feed(items(), work)
    assert ended == [True]


def test_an_error_of_the_work_ends_the_making():
    made = []

    def items() -> Iterator[int]:
        for i in range(10**6):
            made.append(i)
            yield i

    def work(numbers: Iterator[int]) -> None:
        raise ZeroDivisionError(next(numbers))

    with pytest.raises(ZeroDivisionError), WorkerPool() as background:
        background.feed(items(), work)
    assert len(made) < 1000


def test_an_error_in_making_items_is_raised_once_and_spoils_nothing_else():
    def broken() -> Iterator[int]:
        yield 1
        raise ZeroDivisionError

    with WorkerPool() as background:
        with pytest.raises(ZeroDivisionError):
            background.feed(broken(), list)
        for i in range(4):
            background.feed(iter([i]), list)
    assert background.results == [[i] for i in range(4)]


def test_a_second_interruption_leaves_no_thread_waiting(monkeypatch):
    """Also where the queue was full at the first one."""
    begun = threading.Event()

    def items() -> Iterator[int]:
        yield from range(8)
        begun.set()
        raise KeyboardInterrupt

    def work(numbers: Iterator[int]) -> None:
        begun.wait()
        list(numbers)

    plain = background_module._put

    def put(queue, item, reader):
        if isinstance(item, BaseException):
            raise KeyboardInterrupt
        return plain(queue, item, reader)

    monkeypatch.setattr(background_module, '_put', put)
    with pytest.raises(KeyboardInterrupt), WorkerPool() as background:
        background.feed(items(), work)
