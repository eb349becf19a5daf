"""Large files from the web: broken connections are continued, sizes and checksums checked."""

import hashlib
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse, responses
from pathlib import Path
from ssl import SSLCertVerificationError
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from tqdm import tqdm

from error import UserError, WriteError
from system.files import rename

log = logging.getLogger('frugalsr')

AGENT = 'FrugalSR'
CHUNK = 2**20
TIMEOUT = 60  # seconds without a byte
PAUSES = (1, 2, 4, 8, 16)  # seconds before the next try; something new on the disk starts the list anew
PASSING = (408, 425, 429, 500, 502, 503, 504)  # HTTP answers that may be others a little later


class BrokenError(Exception):
    """A connection that could not be made or did not last; the next may."""


@dataclass(frozen=True)
class Advice:
    """What a user can do about a file that does not arrive.

    Attributes:
        instead: how else to get it.
        option: what names another folder for it.
    """

    instead: str
    option: str


ARCHIVE = Advice(
    'name another place of the archives with --mirror, or put the archive into the data folder yourself', '--dir_data'
)


def fetch(
    url: str,
    path: Path,
    checksum: str | None,
    size: int | None = None,
    advice: Advice = ARCHIVE,
    check: Callable[[Path], object] = lambda path: None,
) -> None:
    """Download a file; what arrives is kept in `<path>.part` until it is whole, and continued from there.

    Args:
        url: http or https.
        path: where the file goes; folders are made as needed.
        checksum: of the whole file, `<algorithm of hashlib>:<hexadecimal digest>`; None: not known.
        size: of the whole file in bytes; None: what the server says.
        advice: for messages.
        check: raises UserError if the whole file is not what it should be; it is removed then.

    Raises:
        UserError: no such file, no connection after some tries, or not the file of this size and checksum.
        WriteError: the disk is full or the folder cannot be written.
    """
    part = path.with_name(f'{path.name}.part')
    furthest, pauses = _stored(part), iter(PAUSES)
    while True:
        try:
            _receive(url, part, size, advice)
            break
        except BrokenError as error:
            if _stored(part) > furthest:
                furthest, pauses = _stored(part), iter(PAUSES)
            pause = next(pauses, None)
            if pause is None:
                kept = f'; {_stored(part):,} bytes are kept in {part}' if _stored(part) else ''
                raise UserError(
                    f'{url} could not be fetched ({error}): check the connection and run this again{kept}.'
                ) from error
            log.info('%s: %s; next try in %s s', path.name, error, pause)
            time.sleep(pause)
    if checksum:
        verify(part, checksum)
    try:
        check(part)
    except UserError as error:
        with suppress(OSError):
            part.unlink()
        raise UserError(f'{url} gave another file than it should ({error}): {advice.instead}.') from error
    with _writing(part, advice):
        rename(part, path)


def verify(path: Path, checksum: str) -> None:
    """Compare a file with its checksum, `<algorithm of hashlib>:<hexadecimal digest>`; it is left where it is.

    Raises:
        UserError: it is another file.
    """
    algorithm, _, published = checksum.partition(':')
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with path.open('rb') as stream, _bar(f'Checking {path.name}', path.stat().st_size) as bar:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
            bar.update(len(chunk))
    if digest.hexdigest() != published:
        raise UserError(
            f'{path} is damaged or another file: its {algorithm} is {digest.hexdigest()}, published is {published}; '
            'remove it and run this again, or put it in place yourself if you trust it.'
        )


def _receive(url: str, part: Path, size: int | None, advice: Advice) -> None:
    """Add to `part` what it lacks.

    Raises:
        BrokenError: the connection did not last to the end.
    """
    have = _stored(part)
    if have and have == size:
        return
    response, asked = _open(url, have, advice)
    if response is None:
        return
    with response, _writing(part, advice):
        start, whole = _span(response)
        is_page = response.headers.get_content_type() == 'text/html'
        is_short = whole is not None and whole < have and whole != size
        if asked and response.status == 200 and (is_page or is_short):
            what = 'a page' if is_page else f'{whole:,} bytes'
            raise UserError(
                f'{url} gives {what} in place of what the {have:,} bytes in {part} lack: {advice.instead}, or remove '
                f'{part.name} to start over.'
            )
        if start > have:
            raise BrokenError(f'the server sends byte {start:,} first instead of {have:,}')
        if size is not None and whole not in (None, size):
            raise UserError(
                f'{url} has {whole:,} bytes, published are {size:,}, so it is another file: {advice.instead}.'
            )
        part.parent.mkdir(parents=True, exist_ok=True)
        with part.open('ab') as stream, _bar(part.stem, whole, start) as bar:
            stream.truncate(start)
            for chunk in _chunks(response):
                stream.write(chunk)
                bar.update(len(chunk))
            stream.flush()
            os.fsync(stream.fileno())
    whole = size if whole is None else whole
    if whole is not None and _stored(part) != whole:
        raise BrokenError(f'the connection ended after {_stored(part):,} of {whole:,} bytes')


def _open(url: str, start: int, advice: Advice) -> tuple[HTTPResponse | None, int]:
    """The server's answer from byte `start` on, if it knows how to, or None if the file ends there; what was asked for.

    That is the whole file instead, from 0 on, where the server says that the file ends before `start`.
    """
    headers = {'User-Agent': AGENT} | ({'Range': f'bytes={start}-'} if start else {})
    try:
        return urlopen(Request(url, headers=headers), timeout=TIMEOUT), start
    except HTTPError as error:
        if error.code == 416 and start:  # nothing at `start` or beyond
            ends = error.headers.get('Content-Range') == f'bytes */{start}'
            return (None, start) if ends else _open(url, 0, advice)
        answer = f'the server answers {error.code} {responses.get(error.code, "")}'.strip()
        if error.code in PASSING:
            raise BrokenError(answer) from error
        raise UserError(f'{url} could not be fetched ({answer}): {advice.instead}.') from error
    except (OSError, HTTPException, ValueError) as error:  # ValueError: a host's name that cannot be one
        if isinstance(getattr(error, 'reason', error), SSLCertVerificationError):
            raise UserError(
                f'{url} could not be fetched ({_reason(error)}): the server could not be trusted; if that is so of all '
                f"servers, on a Mac run Python's Install Certificates.command; or {advice.instead}."
            ) from error
        raise BrokenError(_reason(error)) from error


def _span(response: HTTPResponse) -> tuple[int, int | None]:
    """Which byte of the file comes first, and how many it has, if the server says so."""
    if response.status == 206:
        match = re.fullmatch(r'bytes (\d+)-\d+/(\d+|\*)', response.headers.get('Content-Range', ''))
        if match is None:
            raise BrokenError('the server does not say which part it sends')
        return int(match[1]), None if match[2] == '*' else int(match[2])
    length = response.headers.get('Content-Length', '')
    return 0, int(length) if length.isdigit() else None


def _chunks(response: HTTPResponse) -> Iterator[bytes]:
    try:
        while chunk := response.read1(CHUNK):
            yield chunk
    except (OSError, HTTPException) as error:
        raise BrokenError(_reason(error)) from error


def _reason(error: Exception) -> str:
    """The system's words for a failure, which urllib wraps in an exception of its own."""
    cause = getattr(error, 'reason', error)
    return getattr(cause, 'strerror', None) or str(cause) or type(cause).__name__


def _stored(part: Path) -> int:
    return part.stat().st_size if part.is_file() else 0


def _bar(title: str, total: int | None, start: int = 0) -> tqdm:
    # disable=None: shown on a terminal only
    return tqdm(desc=title, total=total, initial=start, unit='B', unit_scale=True, leave=False, disable=None)


@contextmanager
def _writing(path: Path, advice: Advice) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise WriteError(
            f'{path} could not be written ({error.strerror or error}): make room or name another folder with '
            f'{advice.option}, and run this again.'
        ) from error
