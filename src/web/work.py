"""Images enlarged one after the other, among those of other visitors: whose turn it is, how far it is, its end."""

import logging
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from threading import Event, Lock

from data.image import read_size
from data.outputs import output_names
from error import UserError, out_of_memory
from model.tiles.tiling import Report
from web.enlarging import Result, Stopped

log = logging.getLogger('frugalsr')

POLL = 0.3  # seconds between two looks at how far it is

Enlarge = Callable[[Path, Path, Report, Callable[[], bool]], Result]


class Line:
    """Those who wait for their turn, one image each, the first one at work.

    Args:
        most: who may wait.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._waiting: list[object] = []
        self._lock = Lock()

    def join(self, one: object) -> None:
        """Be the last one.

        Raises:
            UserError: the line is full.
        """
        with self._lock:
            if len(self._waiting) >= self.most:
                raise UserError(f'At most {self.most} visitors can wait: try again later.')
            self._waiting.append(one)

    def ahead(self, one: object) -> int:
        """How many are before it; 0: it is its turn, or was."""
        with self._lock:
            return self._waiting.index(one) if one in self._waiting else 0

    def leave(self, one: object, then: object | None = None, unless: Event | None = None) -> None:
        """Make room for the next one, if it is there; `then` takes a place at the end at once, `unless` that is set."""
        with self._lock:
            if one in self._waiting:
                self._waiting.remove(one)
                if then is not None and not (unless and unless.is_set()):
                    self._waiting.append(then)


@dataclass
class State:
    """How far the work is.

    Attributes:
        names: of the images, each a different one.
        weights: how much work each is, in any unit.
        number: of the image at work, from 0.
        ahead: images of others before it.
        tiles: of that image that are done, and all of them.
        seconds: that were worked.
        results: by name.
        failures: a sentence for each image that could not be enlarged.
        ended: nothing more will happen.
        stopped: it ended before its end.
    """

    names: list[str]
    weights: list[int]
    number: int = 0
    ahead: int = 0
    tiles: tuple[int, int] = (0, 0)
    seconds: float = 0.0
    results: dict[str, Result] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    ended: bool = False
    stopped: bool = False

    @property
    def share(self) -> float:
        """The part of the work that is done, from 0 to 1."""
        done, total = self.tiles
        finished = sum(self.weights[: self.number]) + self.weights[self.number] * done / max(total, 1)
        return finished / max(sum(self.weights), 1)

    @property
    def left(self) -> float | None:
        """Seconds that the rest will take at the pace so far, without waiting for others; None: nobody knows."""
        return self.seconds * (1 - self.share) / self.share if self.share else None


class Turn:
    """A place in line for one image, and the work when it is reached."""

    def __init__(self, line: Line, state: State, stop: Event) -> None:
        self.line, self.state, self.stop = line, state, stop
        self.began: float | None = None

    @property
    def seconds(self) -> float:
        """How long it has been at work."""
        return time.monotonic() - self.began if self.began else 0.0

    def use(self, enlarge: Callable[[Report, Callable[[], bool]], Result], following: 'Turn | None') -> Result:
        """Wait, work, and leave the line, whose last place is then that of the turn which follows.

        Raises:
            Stopped: it was stopped meanwhile. Errors of `enlarge` pass through.
        """
        try:
            while self.line.ahead(self):
                if self.stop.wait(POLL):
                    raise Stopped
            self.began = time.monotonic()
            return enlarge(self._note, self.stop.is_set)
        finally:
            self.line.leave(self, following, self.stop)

    def _note(self, done: int, total: int) -> None:
        self.state.tiles = done, total


def work(images: Sequence[Path], enlarge: Enlarge, folder: Path, line: Line, stop: Event) -> Iterator[State]:
    """Enlarge images, each when it is its turn; gives the state of the work, one object, whenever it may have changed.

    An image that fails does not keep the others from being done. What ends this generator ends the work, at the next
    tile.

    Args:
        images: the files.
        enlarge: an image into a folder, telling and asking after each tile, as `web.enlarging` has it.
        folder: for the results, each in a folder in it.
        line: that the images wait in.
        stop: ends the work at the next tile; what was finished stays.
    """
    state = State(output_names(images), [pixels_of(image) for image in images])
    pool, turns, waits = ThreadPoolExecutor(1), [Turn(line, state, stop) for _ in images], False
    try:
        for state.number, image in enumerate(images):
            state.tiles, worked = (0, 0), state.seconds
            turn, following = turns[state.number], (*turns, None)[state.number + 1]
            try:
                if not waits:
                    line.join(turn)
                waits = True  # and so will the next one
                task = pool.submit(turn.use, partial(enlarge, image, folder / str(state.number)), following)
                while not task.done():
                    state.ahead = line.ahead(turn)
                    state.seconds = worked + turn.seconds
                    yield state
                    wait([task], POLL)
                state.results[state.names[state.number]] = task.result()
            except Stopped:
                state.stopped = True
                break
            except Exception as error:
                state.failures.append(sentence(error, image, folder))
            state.seconds = worked + turn.seconds
            yield state
        state.ended = True
        yield state
    finally:
        stop.set()
        for turn in turns[state.number + 1 :]:
            line.leave(turn)
        pool.shutdown(wait=False)


def pixels_of(image: Path) -> int:
    """Pixels of an image file; 1 if it is none, which takes no time."""
    try:
        return prod(read_size(image))
    except UserError:
        return 1


def sentence(error: Exception, image: Path, results: Path | None = None) -> str:
    """What a visitor is told of an error; it does not tell folders: not that of the image, that of results, nor others
    without spaces.
    """
    if isinstance(error, UserError):
        folders = sorted({str(folder.absolute()) for folder in (image.parent, results or image.parent)}, key=len)
        known = '|'.join(map(re.escape, reversed(folders)))  # one may be in the other
        return re.sub(rf'({known})[/\\](\S+[/\\])?|([A-Za-z]:)?[/\\]\S+[/\\]', '', str(error))
    if isinstance(error, MemoryError | RuntimeError) and out_of_memory(error):
        return f'{image.name}: memory ran out: give a smaller image.'
    log.error('%s could not be enlarged', image, exc_info=error)
    return f'{image.name} could not be enlarged, by a fault of this program, which has noted it.'
