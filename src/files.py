"""Files written whole or not at all."""

import os
import tempfile
from pathlib import Path

from error import WriteError


def write_atomic(path: Path, content: bytes | memoryview) -> None:
    """Write a file aside, flush it to the disk and rename it, so that `path` is the old or the new file, never a part.

    Folders are made as needed.

    Raises:
        WriteError: the disk is full or the folder cannot be written; the old file is whole and nothing is left over.
    """
    aside = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file, aside = tempfile.mkstemp(prefix=f'.{path.name}.', suffix='.tmp', dir=path.parent)
        with os.fdopen(file, 'wb') as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        umask = os.umask(0)
        os.umask(umask)
        Path(aside).chmod(0o666 & ~umask)
        Path(aside).replace(path)
        aside = None
    except OSError as error:
        reason = error.strerror or error
        raise WriteError(f'{path} could not be written ({reason}); what was there before is unchanged.') from error
    finally:
        if aside is not None:
            Path(aside).unlink(missing_ok=True)
