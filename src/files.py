"""Files written whole or not at all."""

import os
import secrets
from contextlib import suppress
from pathlib import Path

from error import WriteError


def write_atomic(path: Path, content: bytes | memoryview) -> None:
    """Write a file aside, flush it to the disk and rename it, so that `path` is the old or the new file, never a part.

    Folders are made as needed.

    Raises:
        WriteError: the disk is full or the folder cannot be written; the old file is whole and nothing is left over.
    """
    # Not tempfile: it makes private files, and the umask that an ordinary one needs cannot be read safely by threads.
    aside = path.with_name(f'.{path.name}.{secrets.token_hex(4)}.tmp')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with aside.open('xb') as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        aside.replace(path)
    except OSError as error:
        reason = error.strerror or error
        raise WriteError(f'{path} could not be written ({reason}); what was there before is unchanged.') from error
    finally:
        with suppress(OSError):
            aside.unlink()
