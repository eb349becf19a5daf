"""What is done beside the network: reading what comes next, and scoring and writing what it gave."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import chain
from queue import Empty, Full, Queue
from typing import Any, TypeVar

from system import parallel

AHEAD = 8

T = TypeVar('T')


class WorkerPool:
    """Does what follows the network in threads, at most two pieces behind it; errors surface at the end at the latest.

    Attributes:
        results: of the pieces in the order they were started, once the block has ended.
    """

    def __enter__(self) -> 'WorkerPool':
        self._pool = ThreadPoolExecutor(2)
        self._futures: list[Future] = []
        self.results: list[Any] = []
        return self

    def start(self, work: Callable[..., Any], *arguments: object) -> Future:
        """Begin a piece of work, after waiting until not more than one other is left."""
        if len(self._futures) > 1:
            self.results.append(self._futures.pop(0).result())
        self._futures.append(self._pool.submit(work, *arguments))
        return self._futures[-1]

    def feed(self, items: Iterable[T], work: Callable[..., Any], *arguments: object) -> None:
        """Begin `work(iterator, *arguments)` and give it the items as they are made here, at most eight ahead of it.

        An error in making them ends the work with the same error, which is raised here and not once more at the end.
        """
        queue: Queue = Queue(AHEAD)
        failed: list[BaseException] = []
        future = self.start(work, _received(queue, failed), *arguments)
        try:
            all(_put(queue, item, future) for item in chain(items, [None]))
        except BaseException as error:
            failed.append(error)
            self._futures.remove(future)
            raise

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()
        self.results += [future.result() for future in self._futures]


def _put(queue: Queue, item: object, reader: Future) -> bool:
    """Hand an item over; False if nobody reads any more."""
    while not reader.done():
        with suppress(Full):
            queue.put(item, timeout=0.1)
            return True
    return False


def _received(queue: Queue, failed: list[BaseException]) -> Iterator[Any]:
    """The items up to None; raises what `failed` holds, for which nothing need be put into a queue that may be full."""
    while not failed:
        with suppress(Empty):
            if (item := queue.get(timeout=0.1)) is None:
                return
            yield item
    raise failed[0]


class Prefetcher:
    """Loads the item that comes next while the one before it is in use."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._coming: dict[Any, Future] = {}

    def __call__(self, load: Callable[[int], T], index: int, count: int) -> T:
        """`load(index)`, of `count` items that are asked for as `parallel.rank_indices` deals them."""
        now = self._coming.pop((load, index), None) or self._pool.submit(load, index)
        after = index + parallel.world_size()
        self._coming = {(load, after): self._pool.submit(load, after)} if after < count else {}
        return now.result()
