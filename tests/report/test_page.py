"""The page of a run, read by a parser of HTML."""

import base64
import io
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
from PIL import Image

import main
from checkpoint import RunFolder
from data.image import read_rgb, write_png
from data.imresize import upscale_bicubic
from report import page as report
from report.page import Saved, page
from report.run import write_report
from tests.conftest import picture
from tests.test_main import BICUBIC, results
from tests.test_trainer import EDSR, arguments, train

VOID = {'meta', 'img', 'input', 'br'}
HOSTILE = '<img src=x onerror=alert(1)>"\'&amp;'


class Page(HTMLParser):
    """A page as tags, each with its attributes and the text that stands in it alone; fails if they do not nest."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.open: list[int] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        if tag not in VOID:
            self.open.append(len(self.tags))
        self.tags.append((tag, dict(attributes)))
        self.texts.append('')

    def handle_endtag(self, tag):
        assert self.tags[self.open.pop()][0] == tag

    def handle_data(self, data):
        if self.open:
            self.texts[self.open[-1]] += data

    def all(self, tag: str, **wanted: str) -> list[dict[str, str]]:
        """Attributes of every such tag."""
        return [a for name, a in self.tags if name == tag and wanted.items() <= a.items()]

    def text(self, *tags: str) -> list[str]:
        return [text.strip() for (name, _), text in zip(self.tags, self.texts, strict=True) if name in tags]

    def layer(self, alt: str) -> np.ndarray:
        """Pixels of the image with this alternative text."""
        (image,) = self.all('img', alt=alt)
        content = base64.b64decode(image['src'].partition(';base64,')[2], validate=True)
        return np.array(Image.open(io.BytesIO(content)).convert('RGB'), int)


def read(run: Path) -> Page:
    return Page((run / 'report.html').read_text())


def made(saved: list[Saved], scores: dict | None = None, options: str = '') -> Page:
    found = {'Set': {'psnr': 1.0, 'seconds': 0.1, 'images': scores}} if scores else {}
    return Page(page('net', {}, found, {}, {'Set': saved}, options, ['lr']).decode())


def saved(folder: Path, name: str, height: int = 12, width: int = 16) -> Saved:
    """A saved image, (2 * height, 2 * width)."""
    lr = picture(0, height, width)
    write_png(folder / f'{name}.png', picture(1, 2 * height, 2 * width))
    return Saved(name, folder / f'{name}.png', 2, lambda: lr)


def test_a_training_run(data_folder):
    run = train(data_folder, EDSR, '--epochs 2 --save_results --ssim')
    found = read(run)
    scores = results(run)['sets']['Set5']
    rows = {'Set5': scores} | scores['images']
    cells = [c for row in rows.values() for c in (f'{row["psnr"]:.2f}', f'{row["ssim"]:.4f}', f'{row["seconds"]:.3f}')]
    assert [c for c in found.text('td') if '.' in c] == cells
    assert set(rows) < set(found.text('td'))
    assert found.text('h1') == ['EDSR x2']
    assert {'epoch 2', 'cpu', str(run)} < set(found.text('dd'))
    curves = [image['src'] for image in found.all('img') if 'over the epochs' in image['alt']]
    assert [base64.b64decode(src.partition(',')[2]) for src in curves] == [
        (run / name).read_bytes() for name in ('loss.png', 'gradient_norm.png', 'test_Set5.png')
    ]
    options = found.text('dt')
    assert options.index('n_feats') < options.index('lr')  # what was given comes first
    assert len(options) == len(set(options))
    config = dict(line.split(': ', 1) for line in (run / 'config.txt').read_text().splitlines())
    assert config.items() <= dict(zip(options, found.text('dd'), strict=True)).items()


def test_every_saved_image_has_a_slider(data_folder):
    run = train(data_folder, f'{BICUBIC} --scale 2 --data_test Set5+SR291 --save_results --save_gt')
    found = read(run)
    names = [f'{i:04d}' for i in (1, 2, 1, 2, 3)]
    assert [slider['aria-label'].split(':')[0] for slider in found.all('input', type='range')] == names
    scores = [image for data in results(run)['sets'].values() for image in data['images'].values()]
    assert found.text('figcaption') == [f', {image["psnr"]:.2f} dB | Bicubic x2' for image in scores]


def test_a_slider_lies_between_what_the_files_hold(data_folder):
    """Within what JPEG changes, and nearer to its own file than to any other."""
    run = train(data_folder, EDSR, '--data_test SR291 --save_results --save_gt')
    files = {kind: read_rgb(run / 'results-SR291' / f'0003_x2_{kind}.png') for kind in ('SR', 'LR', 'HR')}
    expected = [files['SR'], upscale_bicubic(files['LR'], 2), files['HR']]
    found = read(run)
    for i, version in enumerate(('EDSR x2', 'Bicubic', 'HR')):
        distances = [np.abs(found.layer(f'0003, {version}') - pixels).mean() for pixels in expected]
        assert np.argmin(distances) == i
        assert distances[i] < 5


def test_nothing_is_fetched(data_folder):
    run = train(data_folder, f'{BICUBIC} --scale 2 --data_test Set5 --save_results')
    found = read(run)
    sources = [value for _, attributes in found.tags for key, value in attributes.items() if key in ('src', 'href')]
    assert len(sources) == 6
    assert all(source.startswith('data:image/') for source in sources)
    text = (run / 'report.html').read_text()
    assert [word for word in ('http:', 'https:', 'url(', '@import', '<link') if word in text] == []
    (policy,) = found.all('meta', **{'http-equiv': 'Content-Security-Policy'})
    assert "default-src 'none'" in policy['content']


def test_names_are_text(tmp_path):
    image = Saved(HOSTILE, saved(tmp_path, 'a').file, 2, lambda: picture(0, 12, 16))
    scores = {HOSTILE: {'psnr': 30.0, 'seconds': 0.1}}
    facts, results = {'Weights': HOSTILE}, {HOSTILE: {'psnr': 1.0, 'seconds': 0.1, 'images': scores}}
    args = (HOSTILE, facts, results, {HOSTILE: b'png'}, {HOSTILE: [image]}, f'save: {HOSTILE}\n', [])
    found = Page(page(*args).decode())
    assert found.text('h1') == found.text('title') == found.text('b') == [HOSTILE]
    assert found.text('dd') == [HOSTILE] * 2
    assert found.text('td').count(HOSTILE) == 2
    assert not [attributes for _, attributes in found.tags if 'onerror' in attributes]
    assert len(found.all('img')) == 3


def test_a_name_that_is_no_text(tmp_path):
    name = b'\xff'.decode('utf-8', 'surrogateescape')
    found = made([saved(tmp_path, 'a'), Saved(name, saved(tmp_path, 'b').file, 2, lambda: picture(0, 12, 16))])
    assert found.text('b') == ['a', '?']


def test_photographs(data_folder, tmp_path):
    """Also where one of them cannot be read."""
    photos = tmp_path / 'photos'
    write_png(photos / 'a.png', picture(0, 20, 30))
    write_png(photos / f'{HOSTILE}.png', picture(1, 20, 30))
    (photos / 'broken.png').write_bytes(b'no image')
    command = f'{BICUBIC} --scale 2 --data_test Demo --dir_demo {photos} --save run'
    assert main.main(arguments(data_folder, command)) == 2
    found = read(data_folder.parent / 'runs' / 'run')
    assert found.text('b') == [HOSTILE, 'a']
    assert found.text('table', 'td') == []


def test_images_of_other_programs(data_folder):
    made = train(data_folder, f'{BICUBIC} --scale 2 --data_test Set5 --save_results', name='made')
    run = train(data_folder, f'--score {made} --scale 2 --data_test Set5', name='scored')
    found = read(run)
    assert found.text('td')[4] == '-'  # nobody knows how long they took
    assert f'{results(run)["sets"]["Set5"]["psnr"]:.2f}' in found.text('td')
    assert found.text('h1') == ['made x2']
    assert found.all('img') == []


def test_at_most_so_many_images(tmp_path, monkeypatch):
    monkeypatch.setattr(report, 'MOST', 2)
    images = [saved(tmp_path, name) for name in 'abc']
    found = made(images)
    assert found.text('b') == ['a', 'b']
    assert found.text('p')[0].startswith('2 of 3: ')
    assert made(images[:2]).text('p')[0].startswith('The middle of each')


def test_a_large_image_is_not_opened(tmp_path, monkeypatch):
    images = [saved(tmp_path, 'a'), saved(tmp_path, 'b', 13)]
    monkeypatch.setattr(report, 'LARGEST', 24 * 32)
    opened = []
    monkeypatch.setattr(report, 'read_rgb', lambda path: opened.append(path.stem) or read_rgb(path))
    assert made(images).text('b') == ['a']
    assert opened == ['a']


def test_the_middle_of_an_image(tmp_path, monkeypatch):
    monkeypatch.setattr(report, 'SIDE', 9)  # 4 LR pixels
    found = made([saved(tmp_path, 'a', 10, 3)])
    whole = picture(1, 20, 6)
    assert found.layer('a, net').shape == (8, 6, 3)
    assert np.abs(found.layer('a, net') - whole[6:14]).mean() < 6
    (image,) = found.all('img', alt='a, net')
    assert (image['width'], image['height']) == ('6', '8')


def test_numbers_that_are_none(tmp_path):
    scores = {'a': {'psnr': float('inf'), 'ssim': float('nan'), 'seconds': float('nan')}}
    assert made([], scores).text('td')[5:] == ['a', 'inf', '-', '-']


def test_only_the_first_process_writes(tmp_path):
    folder = RunFolder(tmp_path / 'run', writes=False)
    write_report(folder, 'EDSR x2', {}, {}, {}, '', [])
    assert not list(tmp_path.iterdir())


def test_a_page_that_cannot_be_written(data_folder, capsys):
    (data_folder.parent / 'runs' / 'run' / 'report.html').mkdir(parents=True)
    assert main.main(arguments(data_folder, f'{BICUBIC} --scale 2 --data_test Set5 --save run')) == 2
    assert 'report.html could not be written' in capsys.readouterr().err
    assert (data_folder.parent / 'runs' / 'run' / 'results.json').is_file()
