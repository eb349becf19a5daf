"""Ending a run when the system or the user asks for it."""

import math
import os
import signal
import time
from collections.abc import Callable
from types import FrameType, TracebackType

from system import parallel

SIGNALS = (signal.SIGINT, signal.SIGTERM)
clock: Callable[[], float] = time.monotonic  # that --max_time goes by, in seconds


class Stopped(Exception):
    """Work was given up between two steps because the run is to end."""


class Stop:
    """Within this block SIGTERM and Ctrl-C are noted, for the run to end by itself; a second Ctrl-C ends it at once.

    Calling it tells whether the run is to end; `name` is what said so, a signal or --max_time.

    Args:
        seconds: from now on, by `clock`, after which the run is to end; None: never.
    """

    def __init__(self, seconds: float | None = None) -> None:
        self.name = ''
        self.end = math.inf if seconds is None else clock() + seconds

    def __call__(self) -> bool:
        if not self.name and clock() > self.end:
            self.name = '--max_time'
        return bool(self.name)

    def check(self) -> None:
        """Raise `Stopped` if the run is to end, in this process or in another one that shares it."""
        if sum(parallel.all_reduce_sum([float(self())])):
            self.name = self.name or 'another process'
            raise Stopped

    def __enter__(self) -> 'Stop':
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.name and number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.name = signal.Signals(number).name

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
