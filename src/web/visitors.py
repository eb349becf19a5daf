"""Keep the files of each visitor of a Gradio page to that visitor, and close every route that the page does not need.

Gradio serves any file of its cache to whoever knows the path, which follows from the content, takes such paths from
anyone as inputs, and has many routes besides. Here a visitor is who has a random cookie, and a file is theirs if they
uploaded it or it was granted to them.
"""

import json
import secrets
from collections.abc import Iterable
from pathlib import Path
from threading import Lock

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

COOKIE = 'visitor'
API = '/gradio_api/'
FILE, JOIN, UPLOAD = f'{API}file=', f'{API}queue/join', f'{API}upload'
PAGES = ('/', '/theme.css', '/manifest.json', '/favicon.ico', f'{API}queue/data', f'{API}upload_progress')
MAX_JOIN = 2**20  # bytes of a request to run something, which names files and holds none
FOLDERS = ('/assets/', '/static/')
HEADERS = {
    'content-security-policy': "default-src 'self' 'unsafe-inline' data: blob:; frame-ancestors 'none'",
    'referrer-policy': 'no-referrer',
    'x-content-type-options': 'nosniff',
}


class Visitors:
    """An ASGI application in front of that of Gradio.

    Args:
        app: of Gradio.
        max_bytes: of an upload.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app, self.max_bytes = app, max_bytes
        self._files: set[tuple[str, str]] = set()
        self._lock = Lock()

    def grant(self, visitor: str, files: Iterable[object]) -> None:
        """Let a visitor have files; those that were deleted since are forgotten."""
        with self._lock:
            self._files = {(owner, file) for owner, file in self._files if Path(file).exists()}
            self._files |= {(visitor, str(file)) for file in files}

    def owns(self, visitor: str, file: object) -> bool:
        """Whether a visitor may have a file, of which exactly this is the path."""
        return isinstance(file, str) and (visitor, file) in self._files

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope['type'] != 'http':
            await self.app(scope, receive, send)
            return
        request = Request(scope, receive)
        visitor = request.cookies.get(COOKIE, '')
        if refusal := self._refusal(request, visitor):
            await refusal(scope, receive, send)
            return
        if scope['path'] == JOIN:
            body = await request.body()
            if not all(self.owns(visitor, file) for file in named(body)):
                await refuse(403, 'This file is not yours: upload it again.')(scope, receive, send)
                return
            receive = replay(body, receive)
        if scope['path'] == UPLOAD:
            plain = [header for header in scope['headers'] if header[0] != b'accept-encoding']
            scope = {**scope, 'headers': plain}
            send = self._granting(visitor, send)
        await self.app(scope, receive, with_headers(send, scope['path'], new=not visitor))

    def _refusal(self, request: Request, visitor: str) -> PlainTextResponse | None:
        """The answer to a request that is not let through; None: it is, as far as one sees without its body."""
        path = request.scope['path']
        if request.method == 'POST' and path in (JOIN, UPLOAD):
            if not visitor:
                return refuse(403, 'Cookies are needed: allow them, and load the page again.')
            length = request.headers.get('content-length', '')
            most = self.max_bytes if path == UPLOAD else MAX_JOIN
            # A body in chunks ends where it will, whatever length is told besides.
            if 'transfer-encoding' in request.headers or not length.isdecimal() or int(length) > most:
                return refuse(413, f'At most {most} bytes can be sent.')
            return None
        if request.method not in ('GET', 'HEAD'):
            return refuse(404, 'No such page.')
        mine = path.startswith(FILE) and self.owns(visitor, path.removeprefix(FILE))
        return None if mine or path in PAGES or path.startswith(FOLDERS) else refuse(404, 'No such page.')

    def _granting(self, visitor: str, send: Send) -> Send:
        """`send`, which also grants the paths that the answer to an upload lists."""
        content = bytearray()

        async def grant_and_send(message: Message) -> None:
            content.extend(message.get('body', b''))
            if message['type'] == 'http.response.body' and not message.get('more_body'):
                self.grant(visitor, listed(content))
            await send(message)

        return grant_and_send


def refuse(status: int, sentence: str) -> PlainTextResponse:
    """A short answer."""
    return PlainTextResponse(sentence, status)


def named(body: bytes) -> list[object]:
    """Every 'path' in a request to run something, at any depth; one that is never granted if it is no JSON."""
    found: list[object] = []

    def note(pairs: list[tuple[str, object]]) -> None:
        found.extend(value for key, value in pairs if key == 'path')

    try:
        json.loads(body, object_pairs_hook=note)
    except (ValueError, RecursionError):
        return ['']
    return found


def listed(content: bytes | bytearray) -> list[str]:
    """The paths in the answer to an upload; none if it was refused."""
    try:
        paths = json.loads(content)
    except ValueError:
        return []
    return paths if isinstance(paths, list) else []


def replay(body: bytes, receive: Receive) -> Receive:
    """`receive` of a request whose body was read."""
    messages: list[Message] = [{'type': 'http.request', 'body': body}]

    async def first_the_body() -> Message:
        return messages.pop() if messages else await receive()

    return first_the_body


def with_headers(send: Send, path: str, new: bool) -> Send:
    """`send` that adds HEADERS, a cookie to the page for a new visitor, and keeps files out of caches on the way."""

    async def add_and_send(message: Message) -> None:
        if message['type'] == 'http.response.start':
            headers = MutableHeaders(scope=message)
            headers.update(HEADERS)
            if path.startswith(FILE):
                headers['cache-control'] = 'private, no-store'
            if path == '/' and new:
                headers.append('set-cookie', f'{COOKIE}={secrets.token_urlsafe()}; Path=/; HttpOnly; SameSite=Lax')
        await send(message)

    return add_and_send
