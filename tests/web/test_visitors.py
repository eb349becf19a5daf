"""Who is let through to Gradio, and to which files, with a small application in its place."""

import json
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.testclient import TestClient

from web.visitors import Visitors

MAX_BYTES = 4000


@pytest.fixture
def visitors(tmp_path: Path) -> Visitors:
    """In front of an application that keeps what is uploaded as a file named by its content, and serves any file."""

    async def upload(request: Request) -> Response:
        path = tmp_path / (await request.body()).decode()
        path.write_text('mine')
        return JSONResponse([str(path)])

    async def join(request: Request) -> Response:
        return JSONResponse({'seen': await request.json()})

    async def file(request: Request) -> Response:
        return Response(Path(request.path_params['path']).read_bytes())

    async def other(request: Request) -> Response:
        return Response('reached')

    routes = [
        Route('/gradio_api/upload', upload, methods=['POST']),
        Route('/gradio_api/queue/join', join, methods=['POST']),
        Route('/gradio_api/file={path:path}', file),
        Route('/{path:path}', other, methods=['GET', 'POST', 'PUT']),
    ]
    compressed = Middleware(GZipMiddleware, minimum_size=1)
    return Visitors(Starlette(routes=routes, middleware=[compressed]), MAX_BYTES)


def client(visitors: Visitors) -> TestClient:
    """A new visitor, who has loaded the page."""
    client = TestClient(visitors)
    assert client.get('/').text == 'reached'
    return client


def join(visitor: TestClient, data: object) -> int:
    return visitor.post('/gradio_api/queue/join', content=json.dumps(data)).status_code


def test_files_are_their_visitor_s(visitors, tmp_path):
    a, b = client(visitors), client(visitors)
    (path,) = a.post('/gradio_api/upload', content='photo').json()
    assert a.get(f'/gradio_api/file={path}').text == 'mine'
    assert b.get(f'/gradio_api/file={path}').status_code == 404
    assert TestClient(visitors).get(f'/gradio_api/file={path}').status_code == 404
    assert join(a, {'data': [{'path': path}]}) == 200
    assert join(b, {'data': [{'path': path}]}) == 403
    assert b.post('/gradio_api/upload', content='photo').json() == [path]  # who has the content may have it back
    assert b.get(f'/gradio_api/file={path}').text == 'mine'


def test_granted_files(visitors, tmp_path):
    a, b = client(visitors), client(visitors)
    path = tmp_path / 'a result, 100 %.png'
    path.write_text('mine')
    visitors.grant(a.cookies['visitor'], [path])
    answer = a.get(f'/gradio_api/file={str(path).replace("%", "%25")}')
    assert (answer.status_code, answer.text, answer.headers['cache-control']) == (200, 'mine', 'private, no-store')
    assert b.get(f'/gradio_api/file={str(path).replace("%", "%25")}').status_code == 404


def test_deleted_files_are_forgotten(visitors, tmp_path):
    path = tmp_path / 'old'
    path.write_text('')
    visitors.grant('a', [path])
    path.unlink()
    visitors.grant('b', [])
    path.write_text("another's")
    assert not visitors.owns('a', str(path))


@pytest.mark.parametrize('path', ['{}/%2e%2e/{}', '{}//photo', '{}/%2e/photo', '', '/etc/passwd', 'http://a/x'])
def test_only_the_very_path_is_served(visitors, tmp_path, path):
    a = client(visitors)
    a.post('/gradio_api/upload', content='photo')
    path = path.format(tmp_path, f'{tmp_path.name}/photo')
    assert a.get(f'/gradio_api/file={path}').status_code == 404


@pytest.mark.parametrize(
    'body',
    [
        '{"data": [[{"deep": {"path": "/etc/passwd"}}]]}',
        '{"data": [{"path": "https://example.org/x.png"}]}',
        '{"data": [{"path": "/etc/passwd", "path": "%s"}]}',
        '{"data": [{"path": ["%s"]}]}',
        '{"data": [{"path": null}]}',
        '{"data": [{"p\\u0061th": "/etc/passwd"}]}',
        'no JSON',
        '[' * 3000,
    ],
)
def test_requests_that_name_other_files(visitors, tmp_path, body):
    a = client(visitors)
    (own,) = a.post('/gradio_api/upload', content='photo').json()
    answer = a.post('/gradio_api/queue/join', content=body.replace('%s', own))
    assert (answer.status_code, answer.text) == (403, 'This file is not yours: upload it again.')


def test_request_arrives_as_it_was_sent(visitors):
    data = {'data': ['é', 4, None], 'session_hash': 'x'}
    answer = client(visitors).post('/gradio_api/queue/join', content=json.dumps(data))
    assert answer.json() == {'seen': data}


def test_size_of_a_request(visitors):
    a = client(visitors)
    assert a.post('/gradio_api/upload', content=b'x' * 200).status_code == 200
    assert a.post('/gradio_api/upload', content=b'x' * (MAX_BYTES + 1)).status_code == 413
    assert a.post('/gradio_api/queue/join', content=b' ' * MAX_BYTES + b'   {}').status_code == 200
    assert a.post('/gradio_api/queue/join', content=b' ' * 2**20 + b'{}').status_code == 413  # kept in memory
    assert a.post('/gradio_api/upload', content=iter([b'x'])).status_code == 413  # chunks, of a length not told
    both = {'content-length': '1', 'transfer-encoding': 'chunked'}  # of which the second one counts
    for path in ('upload', 'queue/join'):
        assert a.post(f'/gradio_api/{path}', content=iter([b'x' * 9]), headers=both).status_code == 413


def test_cookie(visitors):
    first = TestClient(visitors).get('/').headers['set-cookie']
    value, *attributes = first.split('; ')
    # With Strict those who follow a link to the page would get another one, and lose their files.
    assert set(attributes) == {'Path=/', 'HttpOnly', 'SameSite=Lax'}
    assert len(value) > 40
    assert value not in TestClient(visitors).get('/').headers['set-cookie']
    assert 'set-cookie' not in client(visitors).get('/').headers
    stranger = TestClient(visitors)
    assert stranger.post('/gradio_api/upload', content='x').status_code == 403
    assert join(stranger, {}) == 403


@pytest.mark.parametrize('path', ['/config', '/docs', '/monitoring', '/gradio_api/run/click', '/gradio_api/info', '//'])
@pytest.mark.parametrize('method', ['GET', 'POST', 'PUT'])
def test_closed_routes(visitors, path, method):
    answer = client(visitors).request(method, f'http://testserver{path}')
    assert (answer.status_code, answer.text) == (404, 'No such page.')


def test_browser_may_load_nothing_from_elsewhere(visitors):
    policy = client(visitors).get('/').headers['content-security-policy']
    assert "default-src 'self'" in policy
    assert 'http' not in policy
