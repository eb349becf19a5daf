import io
import itertools
import math
import os

import matplotlib.figure
import numpy as np
import pytest
from matplotlib.text import Text
from PIL import Image

from error import UserError
from report import picture as pictures
from report.picture import CROP, Comparison, centre
from tests.conftest import picture


@pytest.fixture
def figures(monkeypatch) -> list:
    """The figures that are drawn, instead of files."""
    drawn: list = []
    monkeypatch.setattr(matplotlib.figure.Figure, 'savefig', lambda self, *_, **__: drawn.append(self))
    return drawn


def record(epoch: int, loss: dict, test: dict) -> dict:
    return {'epoch': epoch, 'loss': loss, 'test': {name: {'psnr': psnr} for name, psnr in test.items()}}


LOG = [
    record(1, {'L1': 0.3, 'total': 0.3}, {'Set5': 30.0}),
    record(2, {'L1': 0.2, 'MSE': 0.1, 'total': 0.3}, {'Set5': math.inf, 'B100': 26.0}),
    record(3, {'L1': math.nan, 'MSE': 0.1, 'total': math.nan}, {'Set5': 32.0, 'B100': 27.0}),
]


def comparison(*sizes: tuple[int, int]) -> list[Comparison]:
    return [
        Comparison(str(i), [picture(i, *size), picture(i + 9, *size), picture(i + 19, *size)], ['HR', 'a', 'b'])
        for i, size in enumerate(sizes)
    ]


def opened(png: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(png))
    image.load()
    assert image.format == 'PNG'
    return image


@pytest.mark.parametrize('epochs', [1, 2, 3])
def test_curves_are_png_files(epochs):
    drawn = pictures.curves(LOG[:epochs])
    assert list(drawn) == ['loss.png', 'test_Set5.png', 'test_B100.png'][: 2 + (epochs > 1)]
    for draw in drawn.values():
        image = opened(draw())
        assert 400 <= image.width <= 2000
        assert 300 <= image.height <= 2000
        assert len(np.unique(np.asarray(image.convert('L')))) > 10


def test_curves_show_the_log(figures, monkeypatch):
    for draw in pictures.curves(LOG).values():
        draw()
    found = [{line.get_label(): line.get_ydata().tolist() for line in figure.axes[0].lines} for figure in figures]
    nan = math.nan
    expected = [
        {'L1': [0.3, 0.2, nan], 'MSE': [nan, 0.1, 0.1], 'total': [0.3, 0.3, nan]},
        {'Set5': [30, math.inf, 32]},
        {'B100': [nan, 26, 27]},
    ]
    assert repr(found) == repr([{k: [float(v) for v in values] for k, values in lines.items()} for lines in expected])
    for figure in figures:
        (axes,) = figure.axes
        assert axes.lines[0].get_xdata().tolist() == [1, 2, 3]
        assert axes.get_xlabel() == 'epoch'
    assert [figure.axes[0].get_ylabel() for figure in figures] == ['loss', 'PSNR (dB)', 'PSNR (dB)']


def test_the_curve_of_a_loss_that_another_one_followed_stays(figures):
    pictures.curves([LOG[0], record(2, {'MSE': 0.1, 'total': 0.1}, {'Set5': 31.0})])['loss.png']()
    lines = {line.get_label(): line.get_ydata().tolist() for line in figures[0].axes[0].lines}
    assert repr(lines) == repr({'L1': [0.3, math.nan], 'MSE': [math.nan, 0.1]})


def test_the_norm_of_the_gradients_is_a_curve(figures):
    """Older records of a run may be without it."""
    log = [LOG[0], LOG[1] | {'gradient_norm': 0.5}, LOG[2] | {'gradient_norm': math.nan}]
    pictures.curves(log)['gradient_norm.png']()
    (axes,) = figures[0].axes
    assert repr(axes.lines[0].get_ydata().tolist()) == repr([math.nan, 0.5, math.nan])


@pytest.mark.parametrize('sizes', [[(120, 130)], [(200, 100), (100, 200), (300, 310)], [(8, 11), (2, 3), (97, 5)]])
def test_sheet(figures, sizes):
    rows = comparison(*sizes)
    pictures.sheet(rows)
    (figure,) = figures
    assert len(figure.axes) == 3 * len(rows)
    for axes, (row, column) in zip(figure.axes, np.ndindex(len(rows), 3), strict=True):
        shown = axes.images[0].get_array()
        height, width = sizes[row]
        assert shown.shape == (min(height, CROP), min(width, CROP), 3)
        assert axes.get_xlabel() == rows[row].captions[column]
        assert axes.get_ylabel() == ('' if column else rows[row].name)


def test_sheet_is_a_png_file():
    image = opened(pictures.sheet(comparison((120, 130), (9, 40))))
    assert image.width > 3 * CROP
    assert image.height > 2 * CROP


@pytest.mark.parametrize('top, left', [(10, 10), (10, 250), (150, 250), (100, 120)])
def test_the_crop_holds_the_detail_and_is_the_same_in_every_version(figures, top, left):
    hr = np.full((200, 300, 3), 90, np.uint8)
    hr[top : top + 30, left : left + 30] = np.random.default_rng(0).integers(0, 256, (30, 30, 3))
    pictures.sheet([Comparison('', [hr, 255 - hr], ['', ''])])
    first, second = (axes.images[0].get_array() for axes in figures[0].axes)
    assert (first != 90).sum() == (hr != 90).sum()  # all of the detail
    assert (second == 255 - first).all()


@pytest.mark.parametrize(
    'size, side, expected', [((5, 9), 5, (0, 5, 2, 7)), ((4, 3), 9, (0, 4, 0, 3)), ((6, 7), 1, (2, 3, 3, 4))]
)
def test_centre(size, side, expected):
    rows, columns = centre(np.zeros((*size, 3)), side)
    assert (rows.start, rows.stop, columns.start, columns.stop) == expected


NAMES = [
    '$5_$10',
    '$',
    r'a\$b$',
    '$$',
    'a_b^{c',
    os.fsdecode(b'\xff\xfe'),
    'a\nb\tc\x01',
    '\u202e\u6f22',
    'long' * 60,
    ' ',
    '_x',
    '%s{}',
]


@pytest.mark.parametrize('name', NAMES, ids=ascii)
def test_every_name_can_be_shown(name):
    (row,) = comparison((30, 40))
    opened(pictures.sheet([Comparison(name, row.images, ['HR', name, 'b'])]))
    for draw in pictures.curves([record(1, {name: 0.3, 'total': 0.3}, {name: 30.0})]).values():
        opened(draw())


def test_names_are_shown_as_they_are(figures):
    (row,) = comparison((30, 40))
    pictures.sheet([Comparison('$5_$10', row.images, ['HR', r'a\$b', 'b'])])
    texts = [figures[0].axes[0].yaxis.label, figures[0].axes[1].xaxis.label]
    assert [text._preprocess_math(text.get_text()) for text in texts] == [('$5_$10', False), (r'a\$b', False)]


def test_what_cannot_be_drawn_is_one_sentence(tmp_path):
    def draw() -> bytes:
        raise ValueError('no such glyph')

    with pytest.raises(UserError, match=r'a\.png could not be drawn \(no such glyph\)'):
        pictures.save(tmp_path / 'a.png', draw)
    assert not list(tmp_path.iterdir())


def test_names_of_a_crowd_can_be_read(figures):
    where = np.random.default_rng(0).uniform(0, 1, (12, 3))  # all but one within a factor of 4 and 1 dB
    crowd = [(f'network {i}', 4e5 * 4**x, 32 + y, 1e10 + 1e11 * size) for i, (x, y, size) in enumerate(where)]
    crowd.append(('large', 4e7, 34.0, 1e13))
    pictures.scatter({'a': crowd, 'b': [('alone', 1e6, 30.0, 1e11)]}, 'note')
    figure = figures[0]
    figure.draw_without_rendering()
    for axes, number in zip(figure.axes, (13, 1), strict=True):
        names = [Text.get_window_extent(text) for text in axes.texts]
        assert len(names) == number
        assert not any(one.overlaps(other) for one, other in itertools.combinations(names, 2))
        assert all(axes.bbox.containsx(x) and axes.bbox.containsy(y) for name in names for x, y in name.corners())
    name, circle = Text.get_window_extent(figure.axes[1].texts[0]), figure.axes[1].transData.transform((1, 30))
    assert 0 < name.x0 - circle[0] < 10 and abs((name.y0 + name.y1) / 2 - circle[1]) < 2
