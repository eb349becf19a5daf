"""Files written whole or not at all, and files of tensors read without running anything they contain."""

import json
import math
import os
import pickle
import secrets
import sys
import time
import unicodedata
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from error import UserError, WriteError

REFUSED = (0.1, 0.2, 0.5, 1, 2, 4) if sys.platform == 'win32' else ()  # seconds to the next try to rename
ASIDE = '.frugalsr-*.tmp'  # files not yet whole; short, since the name of the file itself may be as long as one can be


def some(names: Sequence[str]) -> str:
    """Names for a message: the first three, and how many more."""
    return ', '.join(names[:3]) + (f' and {len(names) - 3} more' if len(names) > 3 else '')


def is_there(path: Path) -> bool:
    """Whether something has this path, if only a link that leads nowhere; nothing has a name that is too long."""
    with suppress(OSError):
        path.lstat()
        return True
    return False


def identity(path: Path) -> object:
    """What two paths share that lead to one file, by whatever name; None: to none."""
    with suppress(OSError):
        status = path.stat()
        return (status.st_dev, status.st_ino) if status.st_ino else path.resolve()
    return None


def folded(name: str) -> str:
    """What names share that a file system of macOS or Windows may take for one: they differ in case or in how letters
    with accents are put together.
    """
    return unicodedata.normalize('NFC', name).lower()


def write_atomic(path: Path, content: bytes | memoryview | Iterator[bytes], before: Path | None = None) -> None:
    """Write a file aside, flush it to the disk and rename it, so that `path` is the old or the new file, never a part.

    `content` may come in pieces; errors of what makes them pass through. Folders are made as needed. The old file is
    kept as `before`, if that is given; a process that is killed between the two renames leaves it there and nothing at
    `path`.

    Raises:
        WriteError: the disk is full or the folder cannot be written; the old file is whole and nothing is left over.
    """
    # Not tempfile: it makes private files, and the umask that an ordinary one needs cannot be read safely by threads.
    aside = path.with_name(ASIDE.replace('*', secrets.token_hex(4)))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with aside.open('xb') as stream:
            with suppress(OSError):  # a file system without locks
                lock_file(stream)
            for piece in [content] if isinstance(content, bytes | memoryview) else content:
                stream.write(piece)
            stream.flush()
            os.fsync(stream.fileno())
            if sys.platform == 'win32':
                stream.close()  # which cannot rename an open file
            kept = before if path.exists() else None
            if kept is not None:
                rename(path, kept)
            try:
                rename(aside, path)
            except OSError:
                if kept is not None:
                    rename(kept, path)
                raise
        _flush_folder(path.parent)
    except OSError as error:
        reason = error.strerror or error
        raise WriteError(f'{path} could not be written ({reason}); what was there before is unchanged.') from error
    finally:
        with suppress(OSError):
            aside.unlink()


def rename(old: Path, new: Path) -> None:
    """Rename a file, which may replace another one.

    On Windows it is tried again for some seconds if it is refused: others, such as virus scanners, open what is new.
    """
    for pause in REFUSED:
        with suppress(PermissionError):
            old.replace(new)
            return
        time.sleep(pause)
    old.replace(new)


def sweep(folder: Path) -> None:
    """Delete the files that `write_atomic` left aside in a folder when its process was killed.

    Those that another process is writing are locked and stay; this one must not be writing there.
    """
    for path in folder.glob(ASIDE):
        with suppress(OSError):
            with path.open('ab') as file:
                lock_file(file)
            path.unlink()


def lock_file(file: IO) -> None:
    """Lock an open file for this process until it is closed, and not for those that it starts.

    Raises:
        BlockingIOError, PermissionError: another process has it.
        OSError: it cannot be locked.
    """
    if sys.platform == 'win32':
        import msvcrt

        file.seek(0)  # from where on it locks
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _flush_folder(folder: Path) -> None:
    """Have the names in a folder on the disk too, where the system can do that."""
    with suppress(OSError):  # Windows cannot open a folder
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _check_there(path: Path) -> None:
    try:
        there = path.is_file()
        if there:
            path.open('rb').close()
    except OSError as error:
        raise UserError(f'{path} cannot be read ({error.strerror}): check its permissions.') from error
    if not there:
        raise UserError(f'No weights at {path}: check the path.')


class _Inert:
    """Stands in for a NumPy scalar and its type, whose place is beside the tensors; what it is made of is dropped.

    NumPy itself is not called: a type that was made up has it take the bytes of a scalar for an address, and crash.
    """

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...


INERT = [(_Inert, name) for name in ('numpy.dtype', 'numpy.core.multiarray.scalar', 'numpy._core.multiarray.scalar')]


def read_torch(path: Path, mapped: bool = False) -> object:
    """What a file written by `torch.save` holds, on the CPU; only tensors and plain values are unpickled.

    A scalar of NumPy is replaced by an object without a value. With `mapped` tensors stay in the file until they are
    used, where its format allows that: as long as there are any the file must not change.

    Raises:
        UserError: no such file, not a file of PyTorch, damaged, or with anything but tensors and plain values in it.
    """
    _check_there(path)
    try:
        with path.open('rb') as stream, torch.serialization.safe_globals(INERT):  # type: ignore[arg-type]
            # Else of the stream, since some releases of PyTorch take a name that ends in .safetensors at its word.
            mapped = mapped and path.suffix != '.safetensors' and zipfile.is_zipfile(stream)
            stream.seek(0)
            return torch.load(path if mapped else stream, map_location='cpu', weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        if 'GLOBAL' in str(error):  # the name of what the file wants to call
            raise UserError(
                f'{path} holds Python objects besides tensors and was not opened, since they could run code: '
                'ask its author for a plain state dict.'
            ) from error
        raise UserError(f'{path} is not a file of weights, or it is damaged: fetch or make it again.') from error
    except Exception as error:  # on a damaged file torch raises nearly anything
        raise UserError(f'{path} is not a file of weights, or it is damaged: fetch or make it again.') from error


SAFETENSORS = {
    'F64': torch.float64, 'F32': torch.float32, 'F16': torch.float16, 'BF16': torch.bfloat16,
    'I64': torch.int64, 'I32': torch.int32, 'I16': torch.int16, 'I8': torch.int8, 'U8': torch.uint8, 'BOOL': torch.bool,
}  # fmt: skip


def is_safetensors(path: Path) -> bool:
    """Whether a file begins as one in the safetensors format does, a length and then a JSON object, whatever its name.

    Where the beginning is neither that nor one of PyTorch's, the name decides.

    Raises:
        UserError: no such file.
    """
    _check_there(path)
    with path.open('rb') as stream:
        start = stream.read(9)
    if start[8:] == b'{' and int.from_bytes(start[:8], 'little') < path.stat().st_size:
        return True
    return path.suffix == '.safetensors' and not start.startswith((b'PK', b'\x80'))  # a zip archive, a pickle


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file in the safetensors format: a length, a JSON header of that length, the raw data.

    Raises:
        UserError: no such file, or not one of that format.
    """
    _check_there(path)
    content = path.read_bytes()
    try:
        start = 8 + int.from_bytes(content[:8], 'little')
        header = json.loads(content[8:start])
        metadata = header.pop('__metadata__', None) or {}
        data = memoryview(content)[start:]
        return {key: _tensor(data, **entry) for key, entry in header.items()}, metadata
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, RecursionError) as error:
        raise UserError(f'{path} is not a whole file of safetensors: fetch or make it again.') from error


def safetensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The content of a file in the safetensors format, as `read_safetensors` reads it."""
    kinds = {kind: name for name, kind in SAFETENSORS.items()}
    header: dict[str, Mapping[str, object]] = {'__metadata__': {'format': 'pt', **metadata}}
    data = bytearray()
    for key, tensor in tensors.items():
        start = len(data)
        data += tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        header[key] = {'dtype': kinds[tensor.dtype], 'shape': [*tensor.shape], 'data_offsets': [start, len(data)]}
    text = json.dumps(header).encode()
    text += b' ' * (-len(text) % 8)  # the data begins at a multiple of 8 bytes
    return len(text).to_bytes(8, 'little') + text + data


def _tensor(data: memoryview, dtype: str, shape: list[int], data_offsets: tuple[int, int]) -> Tensor:
    start, end = data_offsets
    kind = SAFETENSORS[dtype]
    if not 0 <= start <= end <= len(data) or end - start != math.prod(shape) * kind.itemsize:
        raise ValueError(f'{shape} of {dtype} at {data_offsets}')
    return (
        torch.frombuffer(bytearray(data[start:end]), dtype=kind).view(shape)
        if end > start
        else torch.empty(shape, dtype=kind)
    )
