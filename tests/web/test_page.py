"""The page: over HTTP as several visitors, and in headless Chromium as one."""

import json
import os
import re
import secrets
import shutil
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator, Sequence
from html import unescape
from http.cookiejar import CookieJar
from io import BytesIO
from itertools import chain
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image

from data.image import write_png
from tests.conftest import ROOT, picture
from tests.test_app import Program

BEST = ''  # of the networks
WAIT = 60  # seconds, at most
BROWSER = [
    '--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-sync',
    '--disable-background-networking', '--disable-component-update', '--disable-dev-shm-usage',
]  # fmt: skip


@pytest.fixture(scope='module')
def program(tmp_path_factory):
    program = Program(tmp_path_factory.mktemp('app'), '--max_upload', '1', '--max_pixels', '1')
    yield program
    assert program.end() == 0
    assert 'Traceback' not in program.said, program.said


class Visitor:
    """A browser with cookies that does what the script of the page does."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(CookieJar()))
        page = self.get('/').decode()
        config, _ = json.JSONDecoder().raw_decode(page[page.index('window.gradio_config = ') + 23 :])
        self.events = {event['api_name']: event['id'] for event in config['dependencies']}
        self.session = secrets.token_hex(5)

    def get(self, path: str) -> bytes:
        with self.opener.open(self.url + path, timeout=WAIT) as answer:
            return answer.read()

    def post(self, path: str, content: bytes, kind: str = 'application/json'):
        request = urllib.request.Request(self.url + path, content, {'Content-Type': kind})
        with self.opener.open(request, timeout=WAIT) as answer:
            return json.load(answer)

    def upload(self, name: str, content: bytes) -> str:
        """The path of an uploaded file."""
        head = f'--edge\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'.encode()
        (path,) = self.post(
            '/gradio_api/upload', head + content + b'\r\n--edge--\r\n', 'multipart/form-data; boundary=edge'
        )
        return path

    def start(self, event: str, *data: object) -> str:
        """Have something done; returns its name."""
        body = {'data': data, 'fn_index': self.events[event], 'session_hash': self.session}
        return self.post('/gradio_api/queue/join', json.dumps(body).encode())['event_id']

    def send(self, event: str, *data: object) -> Iterator[dict]:
        """What the server says until it is done."""
        name = self.start(event, *data)
        with self.opener.open(f'{self.url}/gradio_api/queue/data?session_hash={self.session}', timeout=WAIT) as answer:
            for line in answer:
                message = json.loads(line.removeprefix(b'data: ')) if line.strip() else {}
                if message.get('event_id') != name:
                    continue
                if message.get('msg') in ('process_generating', 'process_completed'):
                    yield message
                if message.get('msg') == 'process_completed':
                    return
        raise AssertionError('no answer')

    def ask(self, event: str, *data: object) -> dict:
        """What the server says in the end: 'success', and 'output' with 'data' or an 'error'."""
        *_, done = self.send(event, *data)
        return done

    def drop(self, paths: list[str], scale: int = 4, weights: str = BEST, ticked: Sequence[str] = ()) -> list[str]:
        """Show images to the page; returns those that it takes for photographs."""
        _, kind = self.ask('look', self.files(paths), None, list(ticked), scale, weights)['output']['data']
        assert kind['visible'] == (weights == BEST)
        return kind['value']

    def enlarge(self, paths: list[str], scale: int, weights: str, format: str = 'PNG') -> 'Shown':
        """Choose, and press the button."""
        self.ask('rescale', None, [], scale)
        return self.press(paths, scale, weights, format)

    def press(
        self, paths: list[str], scale: int, weights: str, format: str = 'PNG', ticked: Sequence[str] = ()
    ) -> 'Shown':
        """Press the button."""
        return Shown(self.start_work(paths, scale, weights, format, ticked))

    def start_work(
        self, paths: list[str], scale: int, weights: str, format: str = 'PNG', ticked: Sequence[str] = ()
    ) -> Iterator[dict]:
        """What the server says after the button is pressed."""
        return self.send('click', self.files(paths), None, list(ticked), scale, weights, format)

    def files(self, paths: list[str]) -> list[dict]:
        """Uploaded files, as Gradio names them."""
        return [{'path': path, 'meta': {'_type': 'gradio.FileData'}} for path in paths]

    def status(self, path: str, content: bytes | None = None) -> int:
        try:
            with self.opener.open(self.url + path, content, timeout=WAIT) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            return error.code


class Shown:
    """What the page shows after a click on the button, at the end of the work.

    Attributes:
        told: what is said, each time that it changed.
        bars: what the bar was, likewise.
        images: addresses of what is shown.
        captions: below them.
        download: address of the file to take along; None if there is none.
    """

    def __init__(self, messages: Iterator[dict]) -> None:
        self.told, self.bars, self.images, self.captions = [], [], [], []
        self.download: str | None = None
        values: list = []
        for message in messages:
            assert message['success'], message
            data = message['output'].get('data', [])
            if message['msg'] == 'process_generating' and values:  # from the second on, what has changed
                values = [changed(*pair) for pair in zip(values, data, strict=True)]
            else:
                values = data or values
            told, bar, shown, download, _ = values
            for seen, value in ((self.told, told), (self.bars, bar)):
                if isinstance(value, str) and value and seen[-1:] != [value]:
                    seen.append(value)
            if isinstance(shown, str):
                self.images = re.findall('src="(gradio_api/file=[^"]*)"', shown)
                self.captions = re.findall('<figcaption><b>(.*?)</b>: .*? by (.*?), ', shown)
            if isinstance(download, dict) and isinstance(download.get('value'), dict):
                self.download = download['value']['path']

    @property
    def text(self) -> str:
        """What is said in the end, without elements."""
        return unescape(re.sub('<[^>]*>', '', self.told[-1]))


def changed(value, edits):
    """A value after what Gradio sends of its changes: operation, path, new value."""
    for operation, path, new in edits if isinstance(edits, list) else []:
        if not path:
            value = value + new if operation == 'append' else new
            continue
        *above, last = path
        inner = value
        for key in above:
            inner = inner[key]
        if operation == 'delete':
            del inner[last]
        else:
            inner[last] = inner[last] + new if operation == 'append' else new
    return value


def png(image: np.ndarray) -> bytes:
    file = BytesIO()
    Image.fromarray(image).save(file, 'png')
    return file.getvalue()


PHOTO = png(picture(5, 24, 32))


def test_a_result_is_served_to_its_visitor_alone(program):
    a, b = Visitor(program.url), Visitor(program.url)
    path = a.upload('my photo.png', PHOTO)
    shown = a.enlarge([path], 2, 'LCoAN-small_x2.pt')
    assert shown.text == 'Done.'
    files = [f'/{image}' for image in shown.images] + [served(shown.download)]
    sizes = []
    for file in files:
        with Image.open(BytesIO(a.get(file))) as image:
            sizes.append(image.size)
    assert sizes == [(64, 48)] * 3
    assert files[-1].endswith('/my%20photo_x2.png')
    assert [b.status(file) for file in [*files, served(path)]] == [404] * 4
    with pytest.raises(urllib.error.HTTPError, match='403'):
        b.enlarge([path], 2, 'Bicubic_x2')


def test_several_results_are_a_zip_file_of_their_visitor(program):
    a, b = Visitor(program.url), Visitor(program.url)
    paths = [a.upload(name, content) for name, content in (('x.png', PHOTO), ('bad.png', b'no'), ('x.jpg', PHOTO))]
    shown = a.enlarge(paths, 3, 'Bicubic_x3', 'WebP')
    assert shown.text.startswith('2 of 3 images are done.bad.png (2 bytes) is not an image')
    with zipfile.ZipFile(BytesIO(a.get(served(shown.download)))) as archive:
        assert archive.namelist() == ['x.png_x3.webp', 'x.jpg_x3.webp']
        for name in archive.namelist():
            with Image.open(BytesIO(archive.read(name))) as image:
                assert (image.format, image.size) == ('WEBP', (96, 72))
    assert len(shown.images) == 4
    assert [b.status(file) for file in [served(shown.download), *(f'/{image}' for image in shown.images)]] == [404] * 5


def jpeg(image: np.ndarray) -> bytes:
    file = BytesIO()
    Image.fromarray(image).save(file, 'jpeg')
    return file.getvalue()


def test_each_image_is_enlarged_by_weights_for_its_kind(program):
    """By its file, whatever its name is; as the visitor says where they say it; weights that are named are for all."""
    a = Visitor(program.url)
    content = picture(5, 8, 9)
    names = {'a.jpg': jpeg(content), 'b.png': png(content), 'c.png': jpeg(content), 'd.jpg': png(content)}
    paths = [a.upload(name, content) for name, content in names.items()]
    photo, clean = 'ASID-photo_x4.pt', 'ASID_x4.pt'

    def weights_of(shown: Shown) -> list[str]:
        assert [name for name, _ in shown.captions] == ['a', 'b', 'c', 'd']
        return [weights for _, weights in shown.captions]

    assert weights_of(a.press(paths, 4, BEST)) == [photo, clean, photo, clean]  # before anybody was asked
    ticked = a.drop(paths[:3])
    assert ticked == [paths[0], paths[2]]
    ticked = a.drop(paths, ticked=paths[1:3])  # after a click on two boxes one more is dropped
    assert ticked == paths[1:3]
    assert weights_of(a.press(paths, 4, BEST, ticked=[paths[1], paths[3]])) == [clean, photo, clean, photo]
    assert weights_of(a.press(paths, 4, photo, ticked=ticked)) == [photo] * 4


def test_it_is_asked_only_where_it_matters(program):
    a = Visitor(program.url)
    path = a.upload('a.jpg', jpeg(picture(5, 8, 9)))
    a.drop([path])  # which looks at what is visible
    a.drop([path], 3)
    a.drop([path], 4, 'ASID_x4.pt')
    network, kind = a.ask('rescale', None, [path], 3)['output']['data']
    assert network['choices'][0] == ['The best: ASID_x3, for photographs ASID-photo_x4', BEST]
    assert kind['visible']
    network, kind = a.ask('rescale', None, [path], 2)['output']['data']
    assert network['choices'][0] == ['The best: ASID_x2, for photographs ASID-photo_x2', BEST]
    assert network['value'] == BEST
    assert kind['visible'] and kind['value'] == [path]
    assert not a.ask('kinds', None, [path], 2, 'ASID_x2.pt')['output']['data'][0]['visible']


def test_progress_is_told_by_tiles(program):
    a = Visitor(program.url)
    shown = a.enlarge([a.upload('wide.png', png(np.zeros((8, 15000), np.uint8)))], 2, 'ASID_x2.pt')
    assert shown.told[0] == '<p>wide: 0 percent.</p>'
    assert any('<progress max="1"' in bar for bar in shown.bars)
    assert any(re.search(r'\d of \d+ tiles, about \d+ s left', bar) for bar in shown.bars)


def test_stopped_work_leaves_nothing(program):
    a = Visitor(program.url)
    path = a.upload('large.png', png(np.zeros((8, 15000), np.uint8)))
    folder = Path(path).parents[1]
    before = set(folder.glob('*/0/*'))
    a.ask('rescale', None, [], 2)
    messages = a.start_work([path], 2, 'ASID_x2.pt')
    first = next(messages)
    a.start('end', None)
    shown = Shown(chain([first], messages))
    assert shown.text == 'Stopped.'
    assert shown.download is None and not shown.images
    assert set(folder.glob('*/0/*')) == before


def test_leaving_ends_the_work(program):
    a, b = Visitor(program.url), Visitor(program.url)
    path = a.upload('left.png', png(np.zeros((8, 15000), np.uint8)))
    a.ask('rescale', None, [], 2)
    messages = a.start_work([path], 2, 'ASID_x2.pt')
    next(messages)
    messages.close()  # and with it the connection
    assert (
        b.enlarge([b.upload('photo.png', PHOTO)], 2, 'Bicubic_x2').text == 'Done.'
    )  # whose turn comes after that work
    assert not list(Path(path).parents[1].glob('*/0/left*'))


def test_other_files_are_served_to_nobody(program):
    a = Visitor(program.url)
    path = a.upload('photo.png', PHOTO)
    folder = Path(path).parents[1]
    for file in (
        '/etc/passwd',
        ROOT / 'models' / 'LCoAN-small_x2.pt',
        ROOT / 'README.md',
        f'{folder}/../{folder.name}',
    ):
        assert a.status(f'/gradio_api/file={file}') == 404
        with pytest.raises(urllib.error.HTTPError, match='403'):
            a.enlarge([str(file)], 2, 'Bicubic_x2')
    for closed in (
        'config',
        'docs',
        'openapi.json',
        'monitoring/summary',
        'gradio_api/info',
        'gradio_api/proxy=http://a',
    ):
        assert a.status(f'/{closed}') == 404
    assert a.status('/gradio_api/run/click', b'{}') == 404
    assert folder.stat().st_mode & 0o077 == 0  # for other users of this machine


@pytest.mark.parametrize(
    'name, content, sentence',
    [
        ('text.png', b'no image', 'text.png (8 bytes) is not an image that can be read: replace it by a PNG'),
        ('empty.png', b'', 'empty.png (0 bytes) is not an image'),
        ('cut.png', PHOTO[:-60], 'cut.png cannot be read ('),
        ('bomb.png', png(np.zeros((9000, 9000), bool)), 'bomb.png has 9000x9000 pixels, which'),
        ('<b>.png', b'no image', 'b.png (8 bytes) is not an image'),
    ],
)
def test_a_bad_file_gets_a_sentence(program, name, content, sentence):
    a = Visitor(program.url)
    shown = a.enlarge([a.upload(name, content)], 2, 'Bicubic_x2')
    assert shown.text.startswith(sentence)
    assert shown.download is None


def test_a_choice_there_is_not(program):
    a = Visitor(program.url)
    a.ask('rescale', None, [], 4)
    shown = a.press([a.upload('photo.png', PHOTO)], 2, 'LCoAN-small_x4.pt')
    assert shown.text == 'This network is not of that scale: choose again.'


def test_no_image_and_too_many(program):
    a = Visitor(program.url)
    assert a.enlarge([], 2, 'Bicubic_x2').text == 'No image: drop one first.'
    path = a.upload('photo.png', PHOTO)
    said = '21 images; at most 20 are enlarged at once: leave some out.'
    assert a.enlarge([path] * 21, 2, 'Bicubic_x2').text == said
    many = a.files([a.upload(f'{i}.png', PHOTO) for i in range(21)])
    previews, kind = a.ask('look', many, None, [], 4, BEST)['output']['data']
    assert said in previews
    assert '<img' not in previews  # none of them is opened
    assert not kind['value']


def test_ticks_stay_while_there_are_too_many(program):
    a = Visitor(program.url)
    paths = [a.upload(f'{name}.jpg', jpeg(picture(5, 8, 9))) for name in 'ab']
    ticked = a.drop(paths)
    assert ticked == paths
    many = a.files([*paths, *(a.upload(f'{i}.png', PHOTO) for i in range(19))])
    _, kind = a.ask('look', many, None, ticked, 4, BEST)['output']['data']
    assert kind['value'] == paths
    assert a.drop(paths, ticked=kind['value']) == paths


def test_an_upload_that_is_too_large(program):
    with pytest.raises(urllib.error.HTTPError, match='413'):
        Visitor(program.url).upload('a.png', bytes(2**20 + 1))
    assert Visitor(program.url).upload('a.png', bytes(2**20))


def served(path: str) -> str:
    """The address of a file."""
    return f'/gradio_api/file={quote(path)}'


@pytest.fixture
def browser(tmp_path):
    """Chromium with an empty profile that downloads into `tmp_path`; without it a test is skipped, in CI it fails."""
    from selenium import webdriver

    chromium, driver = shutil.which('chromium'), shutil.which('chromedriver')
    if not (chromium and driver):
        message = 'no chromium and chromedriver: apt-get install chromium chromium-driver'
        if os.environ.get('CI'):
            pytest.fail(message)
        pytest.skip(message)
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for option in [*BROWSER, f'--user-data-dir={tmp_path}/profile', '--window-size=1280,1000']:
        options.add_argument(option)
    options.add_experimental_option('prefs', {'download.default_directory': str(tmp_path)})
    options.set_capability('goog:loggingPrefs', {'performance': 'ALL'})
    browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield browser
    browser.quit()


@pytest.mark.slow
def test_in_a_browser(program, browser, tmp_path):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    def find(path: str):
        return WebDriverWait(browser, WAIT).until(lambda browser: browser.find_element(By.XPATH, path), path)

    def wait(condition, what: str):
        return WebDriverWait(browser, WAIT).until(lambda browser: condition(), what)

    write_png(tmp_path / 'photo.png', picture(5, 24, 32))
    browser.get(program.url)
    wait(lambda: browser.find_elements(By.XPATH, '//input[@type="file"]'), 'page')
    find('//input[@type="file"]').send_keys(str(tmp_path / 'photo.png'))
    assert find('//img[@alt="Preview of photo.png"]').get_property('naturalWidth') == 32
    find(
        '//fieldset[@aria-label="Network"]//label[normalize-space()="The best: ASID_x4, for photographs ASID-photo_x4"]'
    )
    assert find('//fieldset[@aria-label="Photographs"]//label[normalize-space()="photo"]/input').is_selected() is False
    find('//label[.//input[@type="radio"] and normalize-space()="x3"]').click()
    find('//label[normalize-space()="The best: ASID_x3, for photographs ASID-photo_x4"]')
    find('//label[normalize-space()="Bicubic_x3"]').click()
    wait(lambda: not browser.find_elements(By.XPATH, '//fieldset[@aria-label="Photographs"]'), 'no kinds')
    find('//a[@aria-label="Download photo.png"]')
    find('//label[normalize-space()="JPEG"]').click()
    find('//button[normalize-space()="Enlarge"]').send_keys(Keys.ENTER)
    wait(lambda: '32x24 to 96x72 pixels' in find('//body').text, 'result')
    wait(lambda: find('//*[@id="live"][@role="status"]').get_property('textContent') == 'Done.', 'what is read aloud')
    images = browser.find_elements(By.XPATH, '//img[contains(@src, "gradio_api/file=")]')
    wait(lambda: [image.get_property('naturalWidth') for image in images] == [96, 96], 'before and after')
    slider = find('//*[@class="pair whole"]/input')
    place = float(slider.get_property('value'))
    slider.send_keys(Keys.HOME, *[Keys.ARROW_RIGHT] * 3)
    assert 0 < float(slider.get_property('value')) < 15 <= place <= 85
    at = slider.get_property('value')
    assert f'--at: {at}%' in find('//*[@class="pair whole"]').get_attribute('style')
    find('//button[normalize-space()="Download photo_x3.jpg"]').click()
    wait((tmp_path / 'photo_x3.jpg').is_file, 'download')
    with Image.open(tmp_path / 'photo_x3.jpg') as image:
        assert image.size == (96, 72)
    browser.execute_cdp_cmd(
        'Emulation.setDeviceMetricsOverride', {'width': 360, 'height': 800, 'deviceScaleFactor': 2, 'mobile': True}
    )
    wait(lambda: browser.execute_script('return innerWidth') == 360, 'narrow window')
    assert browser.execute_script('return document.documentElement.scrollWidth') == 360
    assert {re.match(r'\w+:(//[^/]*)?', url)[0] for url in asked(browser, program.url)} <= {
        program.url,
        'data:',
        'blob:',
    }


def asked(browser, page: str) -> list[str]:
    """Every address that the page asked for."""
    events = [json.loads(entry['message'])['message'] for entry in browser.get_log('performance')]
    requests = [event['params'] for event in events if event['method'] == 'Network.requestWillBeSent']
    own = [request['request']['url'] for request in requests if request['documentURL'].startswith(page)]
    assert len(own) > 10
    return own
