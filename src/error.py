"""The exceptions a user is meant to see, and how a program ends."""

import os
import select
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import TextIOWrapper
from typing import NoReturn, TextIO

CLOSED_PIPE = 128 + 13  # what a shell says of a program that SIGPIPE ended


class UserError(Exception):
    """Something the user can fix: one sentence naming the thing, what was found, and what to do.

    `main` prints it without a traceback (`--debug` shows the traceback) and exits with status 2.
    """


class WriteError(UserError):
    """A file could not be written; what was there before is unchanged."""


class NotFiniteError(UserError):
    """What a network gives is infinite or not a number."""


@contextmanager
def noting(failures: list[UserError]) -> Iterator[None]:
    """Within this block a `UserError` is noted, so that what follows is done all the same."""
    try:
        yield
    except UserError as error:
        failures.append(error)


def raise_noted(failures: Sequence[UserError]) -> None:
    """Raise one `UserError` that says what all of them say, if there are any."""
    if failures:
        raise UserError(' '.join(map(str, failures))) from failures[0]


def report_error(error: UserError | OSError, debug: bool) -> int:
    """Print an error, after its traceback if `debug`; returns the exit status of the program, 2.

    Of the system's errors those are the user's that name a file, as a folder that may not be read; others are raised.
    """
    said = str(error)
    if isinstance(error, OSError):
        if not isinstance(error.filename, str | bytes):
            raise error
        said = f'{os.fsdecode(error.filename)} cannot be used ({error.strerror}): check the path and its permissions.'
    if debug:
        traceback.print_exception(error)
    print(f'Error: {said}', file=sys.stderr)
    return 2


def exit_status(
    work: Callable[[], int | None],
    debug: bool,
    interrupted: str = 'the same command goes on where this one stopped.',
) -> int:
    """Do the work of a program; its status: what the work gives or 0, 2 after an error of the user, 130 after Ctrl-C.

    `debug` is as of `report_error`; `interrupted` says after Ctrl-C how to go on.
    """
    try:
        return work() or 0
    except (UserError, OSError) as error:
        return report_error(error, debug)
    except KeyboardInterrupt:
        print(f'Interrupted: {interrupted}', file=sys.stderr)
        return 130


def run_program(main: Callable[[], int]) -> NoReturn:
    """Run a program and exit with its status, or with 141 if what it printed found no reader any more.

    A log finds that no reason to stop: a run goes on, and has its own status. What the screen cannot show, as a name
    that is no UTF-8, is written in escapes.
    """
    for name in ('stdout', 'stderr'):
        if getattr(sys, name) is None:  # closed by who started it, and its place would be taken by a file
            setattr(sys, name, open(os.devnull, 'w'))  # noqa: PTH123, SIM115
    for stream in _screens():
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors='backslashreplace')
    try:
        status = main()
    except SystemExit as end:  # of the parser
        status = end.code  # type: ignore[assignment]
    except BrokenPipeError:
        if not any(_is_closed(stream) for stream in _screens()):  # it was another pipe
            raise
        status = CLOSED_PIPE
    closed = silence_closed()
    sys.exit(status or closed)


def silence_closed() -> int:
    """Write out what was printed, nowhere if nobody reads it any more; returns 141 then, else 0."""
    status = 0
    for stream in _screens():
        try:
            stream.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            status = CLOSED_PIPE
    return status


def _screens() -> list[TextIO]:
    return [stream for stream in (sys.stdout, sys.stderr) if stream]


def _is_closed(stream: TextIO) -> bool:
    """Whether nobody reads a stream any more."""
    if not hasattr(select, 'poll'):  # Windows
        return True
    poll = select.poll()
    poll.register(stream.fileno(), 0)  # faults are always reported
    return bool(poll.poll(0))


def out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out, of the device or of the host."""
    import torch  # takes a second, and who has seen an error of it has it already

    # The allocator of the CPU raises a plain RuntimeError; its wording depends on the platform.
    said = str(error)
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or 'not enough memory' in said or "can't allocate memory" in said
