"""The exceptions a user is meant to see."""


class UserError(Exception):
    """Something the user can mend: one sentence naming the thing, what was found, and what to do.

    `main` prints it without a traceback (`--debug` shows the traceback) and exits with status 2.
    """


class WriteError(UserError):
    """A file could not be written; what was there before is unchanged."""
