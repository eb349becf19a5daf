"""The page: over HTTP as several visitors, and in headless Chromium as one."""

import json
import os
import re
import secrets
import shutil
import urllib.error
import urllib.request
from http.cookiejar import CookieJar
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.image import write_png
from tests.conftest import ROOT, picture
from tests.test_app import Program
from web.page import without_folders

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

    def ask(self, event: str, *data: object) -> dict:
        """What the server says in the end: 'success', and 'output' with 'data' or an 'error'."""
        body = {'data': data, 'fn_index': self.events[event], 'session_hash': self.session}
        self.post('/gradio_api/queue/join', json.dumps(body).encode())
        for line in self.get(f'/gradio_api/queue/data?session_hash={self.session}').decode().splitlines():
            message = json.loads(line.removeprefix('data: ')) if line else {}
            if message.get('msg') == 'process_completed':
                return message
        raise AssertionError('no answer')

    def enlarge(self, path: str, network: str, scale: int, weights: str) -> dict:
        """Choose, and press the button."""
        self.ask('narrow_weights', network, scale)
        return self.press(path, network, scale, weights)

    def press(self, path: str, *chosen: object) -> dict:
        """Press the button."""
        return self.ask('click', {'path': path, 'meta': {'_type': 'gradio.FileData'}}, *chosen)

    def status(self, path: str, content: bytes | None = None) -> int:
        try:
            with self.opener.open(self.url + path, content, timeout=WAIT) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            return error.code


def png(image: np.ndarray) -> bytes:
    file = BytesIO()
    Image.fromarray(image).save(file, 'png')
    return file.getvalue()


PHOTO = png(picture(5, 24, 32))


def test_a_result_is_served_to_its_visitor_alone(program):
    a, b = Visitor(program.url), Visitor(program.url)
    path = a.upload('my photo.png', PHOTO)
    done = a.enlarge(path, 'LCoAN', 2, 'LCoAN-small_x2.pt')
    assert done['success'], done
    shown, about, download = done['output']['data']
    files = [image['url'].removeprefix(program.url) for image in (*shown, download['value'])]
    sizes = []
    for file in files:
        with Image.open(BytesIO(a.get(file))) as image:
            sizes.append(image.size)
    assert sizes == [(64, 48)] * 3
    assert about.startswith('32x24 to 64x48 pixels in ')
    assert files[-1].endswith('/my%20photo_x2.png')
    assert [b.status(file) for file in [*files, f'/gradio_api/file={path.replace(" ", "%20")}']] == [404] * 4
    with pytest.raises(urllib.error.HTTPError, match='403'):
        b.enlarge(path, 'Bicubic', 2, 'none')


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
            a.enlarge(str(file), 'Bicubic', 2, 'none')
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
    done = a.enlarge(a.upload(name, content), 'Bicubic', 2, 'none')
    assert not done['success']
    assert done['output']['error'].startswith(sentence)


def test_a_choice_there_is_not(program):
    a = Visitor(program.url)
    a.ask('narrow_weights', 'LCoAN', 4)
    done = a.press(a.upload('photo.png', PHOTO), 'LCoAN', 2, 'LCoAN-small_x4.pt')
    assert done['output']['error'].startswith('These weights are not of that network and scale')


def test_an_upload_that_is_too_large(program):
    with pytest.raises(urllib.error.HTTPError, match='413'):
        Visitor(program.url).upload('a.png', bytes(2**20 + 1))
    assert Visitor(program.url).upload('a.png', bytes(2**20))


def test_messages_do_not_tell_folders():
    assert without_folders('/tmp/a-b/c d.png is no image, and/or x/y') == 'c d.png is no image, and/or x/y'


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
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    def find(path: str):
        return WebDriverWait(browser, WAIT).until(lambda browser: browser.find_element(By.XPATH, path), path)

    def wait(condition, what: str):
        return WebDriverWait(browser, WAIT).until(lambda browser: condition(), what)

    write_png(tmp_path / 'photo.png', picture(5, 24, 32))
    browser.get(program.url)
    wait(lambda: browser.find_elements(By.XPATH, '//input[@type="file"]'), 'page')
    find('//input[@type="file"]').send_keys(str(tmp_path / 'photo.png'))
    wait(lambda: 'photo' in find('//body').text, 'upload')
    weights = find('//input[@aria-label="Weights"]')
    scale = '//label[.//input[@type="radio"] and normalize-space()="3"]'
    find('//input[@aria-label="Network"]').click()
    find('//*[@role="option"][contains(., "Bicubic")]').click()
    find(scale).click()  # at once, which what follows from the network must leave alone
    wait(lambda: weights.get_attribute('value') == 'none', 'weights of the network')
    find('//input[@aria-label="Network"]').click()
    find('//*[@role="option"][contains(., "ASID")]').click()
    wait(lambda: weights.get_attribute('value') == 'ASID_x3.pt', 'weights of network and scale')
    find('//input[@aria-label="Network"]').click()
    find('//*[@role="option"][contains(., "Bicubic")]').click()
    wait(lambda: weights.get_attribute('value') == 'none', 'weights of the network again')
    assert find(f'{scale}/input').is_selected()
    find('//button[normalize-space()="Enlarge"]').click()
    wait(lambda: '32x24 to 96x72 pixels' in find('//body').text, 'result')
    slider = find('//*[@data-testid="slider"]')
    images = browser.find_elements(By.XPATH, '//img[contains(@src, "/gradio_api/file=")]')
    wait(lambda: [image.get_property('naturalWidth') for image in images] == [96, 96], 'before and after')
    place = slider.rect['x']
    ActionChains(browser).drag_and_drop_by_offset(find('//*[@data-testid="slider"]/span'), 100, 0).perform()
    wait(lambda: slider.rect['x'] > place + 50, 'slider that moves')
    find('//button[normalize-space()="Download PNG"]').click()
    wait((tmp_path / 'photo_x3.png').is_file, 'download')
    with Image.open(tmp_path / 'photo_x3.png') as image:
        assert image.size == (96, 72)
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
