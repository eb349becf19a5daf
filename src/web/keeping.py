"""Files that are deleted when they are old."""

import os
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from pathlib import Path

import anyio


def sweep(folder: Path, age: float) -> None:
    """Delete what is below a folder and was last changed `age` seconds ago or earlier; of folders the empty ones."""
    oldest = time.time() - age
    for path in folder.rglob('*'):
        with suppress(OSError):  # it may be gone, or not be empty
            if path.lstat().st_mtime <= oldest:
                path.rmdir() if path.is_dir() else path.unlink()


def keep(paths: Iterable[Path]) -> None:
    """Have files, and those in folders, count as new."""
    for path in paths:
        with suppress(OSError):
            for each in (path, *path.rglob('*')):
                os.utime(each)


def sweeping(folder: Path, age: float) -> Callable[[object], AbstractAsyncContextManager[None]]:
    """The lifespan of an ASGI application that keeps files below a folder for `age` seconds, or a sixth more."""

    @asynccontextmanager
    async def lifespan(app: object) -> AsyncIterator[None]:
        async with anyio.create_task_group() as group:
            group.start_soon(sweep_always, folder, age)
            yield
            group.cancel_scope.cancel()

    return lifespan


async def sweep_always(folder: Path, age: float) -> None:
    """`sweep`, again and again."""
    while True:
        await anyio.sleep(age / 6)
        await anyio.to_thread.run_sync(sweep, folder, age)
