"""The exceptions a user is meant to see."""

import sys
import traceback


class UserError(Exception):
    """Something the user can fix: one sentence naming the thing, what was found, and what to do.

    `main` prints it without a traceback (`--debug` shows the traceback) and exits with status 2.
    """


class WriteError(UserError):
    """A file could not be written; what was there before is unchanged."""


def report_error(error: UserError, debug: bool) -> int:
    """Print an error, after its traceback if `debug`; returns the exit status of the program, 2."""
    if debug:
        traceback.print_exception(error)
    print(f'Error: {error}', file=sys.stderr)
    return 2
