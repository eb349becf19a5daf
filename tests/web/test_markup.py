"""What the page shows, as HTML: names, sentences, and what a screen reader is given."""

import base64
import re
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.image import write_png
from tests.conftest import picture
from web.comparing import Comparison, Pair
from web.enlarging import Result
from web.markup import bar, comparisons, duration, previews, status
from web.work import State


class Elements(HTMLParser):
    """Every element with its attributes, and the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ''
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


def pair(name: str, at: float) -> Pair:
    return Pair(Path(f'/tmp/a b/{name}before.png'), Path(f'/tmp/a b/{name}after.png'), (60, 40), at)


RESULT = Result(Path('photo_x2.png'), '3x2 to 6x4 pixels', Comparison(pair('', 0.25), pair('detail-', 0.7)))


def test_previews_are_small_and_in_the_page(tmp_path):
    write_png(tmp_path / 'a&b.png', picture(1, 300, 400))
    page = Elements(previews([tmp_path / 'a&b.png'], 1))
    (image,) = page.all('img')
    assert image['alt'] == 'Preview of a&b.png'
    kind, content = image['src'].split(',')
    assert kind == 'data:image/jpeg;base64'
    with Image.open(BytesIO(base64.b64decode(content))) as small:
        assert small.size == (160, 120)
    assert page.text == 'a&b.png400x300 pixels'


def test_a_preview_of_what_cannot_be_used(tmp_path):
    (tmp_path / 'bad.png').write_text('no image')
    write_png(tmp_path / 'large.png', np.zeros((1000, 1001), np.uint8))
    page = Elements(previews([tmp_path / 'bad.png', tmp_path / 'large.png'], 1))
    assert not page.all('img')
    assert page.text.startswith('bad.png (8 bytes) is not an image')
    assert page.text.endswith('large.png, 1001x1000 pixels')


@pytest.mark.parametrize('name', ['<img src=x onerror=alert(1)>.png', '"><script>1</script>.png', "' onload='1.png"])
def test_names_are_text(tmp_path, name):
    path = tmp_path / name.replace('/', '')
    write_png(path, picture(1, 4, 4))
    state = State([path.name], [1], results={path.name: RESULT})
    for html in (previews([path], 1), status(state), comparisons(state.results.items())):
        page = Elements(html)
        assert not page.all('script')
        assert all(image['src'].startswith(('data:', 'gradio_api/')) for image in page.all('img'))
        assert not [key for _, attributes in page.found for key in attributes if key.startswith('on')]


def said(**state) -> str:
    return Elements(status(State(['a', 'b'], [10, 30], **state))).text


def test_work_is_told_in_quarters():
    assert said(tiles=(0, 0)) == 'a (1 of 2): 0 percent.'
    assert said(number=1, tiles=(1, 3)) == 'b (2 of 2): 50 percent.'
    assert [said(number=1, tiles=(tile, 30)) for tile in (1, 9)] == ['b (2 of 2): 25 percent.'] * 2
    assert said(number=1, ahead=2) == 'b (2 of 2) waits: 2 images of others go first.'


def test_the_end_is_told():
    done = {'a': RESULT}
    assert said(ended=True, results=done | {'b': RESULT}) == '2 of 2 images are done.'
    assert said(ended=True, results=done, failures=['b is bad.']) == '1 of 2 images is done.b is bad.'
    assert said(ended=True, results=done, stopped=True) == 'Stopped. 1 of 2 images is done.'
    assert Elements(status(State(['a'], [1], ended=True, stopped=True))).text == 'Stopped.'
    assert Elements(status(State(['a'], [1], ended=True, failures=['a is bad.']))).text == 'a is bad.'
    assert Elements(status(State(['a'], [1], ended=True, results=done))).text == 'Done.'


def test_the_bar():
    page = Elements(bar(State(['a', 'b'], [10, 30], number=1, tiles=(2, 6), seconds=20.0)))
    (meter,) = page.all('progress')
    assert float(meter['value']) / float(meter['max']) == pytest.approx(0.5)
    assert meter['aria-label']
    assert page.text == '2 of 6 tiles, about 20 s left'
    assert Elements(bar(State(['a'], [1]))).text == 'starting'
    assert bar(State(['a'], [1], ended=True)) == ''


@pytest.mark.parametrize(('seconds', 'words'), [(0.2, '1 s'), (59, '59 s'), (90.1, '2 min'), (7200, '2.0 h')])
def test_durations(seconds, words):
    assert duration(seconds) == words


def test_both_images_and_the_slider_have_names():
    page = Elements(comparisons([('photo', RESULT)]))
    assert [image['src'] for image in page.all('img')] == [
        f'gradio_api/file=/tmp/a%20b/{name}.png' for name in ('detail-after', 'detail-before', 'after', 'before')
    ]
    assert len({image['alt'] for image in page.all('img')}) == 4
    detail, whole, choice = page.all('input')
    assert [float(control['value']) for control in (detail, whole)] == [70, 25]
    assert all(control['aria-label'].startswith('photo') for control in (detail, whole))
    assert re.search('--at:70', page.all('div')[0]['style'])
    assert choice['type'] == 'checkbox' and 'Whole image' in page.text
    assert (
        len(Elements(comparisons([('a', Result(RESULT.image, '', Comparison(pair('', 0.5), None)))])).all('input')) == 1
    )
