"""report.html: a run on one page, which fetches nothing: style, script and images are in it."""

import base64
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np

from data.image import read_rgb, read_size
from data.imresize import upscale_bicubic
from error import UserError
from metric import METRICS
from report import pair
from report.picture import centre

MOST = 20  # images of a set
SIDE = 1024  # of the part of an image that is shown, pixels
LARGEST = 2**24  # pixels of a saved image that is opened
QUALITY = 90  # of the JPEG files in the page
LABELS = {'bicubic': 'Bicubic', 'hr': 'HR'}


@dataclass(frozen=True)
class Saved:
    """An enlarged image in the run folder, and what it is compared with.

    Attributes:
        name: of the image.
        file: the enlarged image.
        scale: how much it was enlarged.
        lr: reads what was enlarged, (H, W, 3) uint8.
        hr: reads what it should be; None: nobody knows.
    """

    name: str
    file: Path
    scale: int
    lr: Callable[[], np.ndarray]
    hr: Callable[[], np.ndarray] | None = None

    def versions(self) -> dict[str, np.ndarray]:
        """The middle of the image, at most SIDE x SIDE pixels, bicubic ('bicubic'), as it was saved ('sr') and 'hr'."""
        lr = self.lr()
        rows, columns = centre(lr, SIDE // self.scale)
        large = tuple(slice(self.scale * s.start, self.scale * s.stop) for s in (rows, columns))
        found = {'bicubic': upscale_bicubic(lr[rows, columns], self.scale), 'sr': read_rgb(self.file)[large]}
        return found | ({'hr': self.hr()[large]} if self.hr else {})


def read_curves(folder: Path) -> dict[str, bytes]:
    """The curves that training left in a run folder: PNG files by name."""
    paths = [folder / 'loss.png', folder / 'gradient_norm.png', *sorted(folder.glob('test_*.png'))]
    return {path.stem: path.read_bytes() for path in paths if path.is_file()}


def page(
    title: str,
    facts: Mapping[str, object],
    results: Mapping[str, Mapping[str, Any]],
    curves: Mapping[str, bytes],
    saved: Mapping[str, Sequence[Saved]],
    options: str,
    changed: Collection[str],
) -> bytes:
    """The file report.html.

    Args:
        title: what the network is called.
        facts: what stands below it, by name.
        results: of an evaluation, by set.
        curves: PNG files by name.
        saved: images by set.
        options: text of a config.txt.
        changed: options that are not at their default.
    """
    parts = [
        f'<h1>{escape(title)}</h1>',
        _pairs(facts.items()),
        _results(results),
        _curves(curves),
        *(_images(name, images, results.get(name, {}).get('images', {}), title) for name, images in saved.items()),
        _options(options, changed),
    ]
    body = '\n'.join(filter(None, parts))
    text = PAGE.format(title=escape(title), style=STYLE + pair.STYLE, script=pair.SCRIPT, body=body)
    return text.encode(errors='replace')  # a file's name may be no text


def _pairs(pairs: Iterable[tuple[str, object]]) -> str:
    return '<dl>' + '\n'.join(f'<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>' for k, v in pairs) + '</dl>'


def _results(results: Mapping[str, Mapping[str, Any]]) -> str:
    if not results:
        return ''
    rows = [(name, len(result['images']), *_scores(result)) for name, result in results.items()]
    titles = [metric.title for metric in METRICS]
    parts = ['<h2>Results</h2>', _table(('Set', 'Images', *titles, 's/image'), rows)]
    for name, result in results.items():
        images = [(image, *_scores(scores)) for image, scores in result['images'].items()]
        table = _table(('Image', *titles, 's'), images)
        parts.append(f'<details><summary>{escape(name)}, each image</summary>{table}</details>')
    return '\n'.join(parts)


def _scores(result: Mapping[str, float]) -> tuple[str, ...]:
    """The cells of a result: a score a metric, and the seconds."""
    seconds = result['seconds']
    return *(metric.text(result.get(metric.name)) for metric in METRICS), '-' if math.isnan(
        seconds
    ) else f'{seconds:.3f}'


def _table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    def cells(tag: str, row: Iterable[object]) -> str:
        return '<tr>' + ''.join(f'<{tag}>{escape(str(cell))}</{tag}>' for cell in row) + '</tr>'

    body = '\n'.join(cells('td', row) for row in rows)
    return f'<div class="wide"><table><thead>{cells("th", head)}</thead>\n<tbody>{body}</tbody></table></div>'


def _curves(curves: Mapping[str, bytes]) -> str:
    if not curves:
        return ''
    images = (
        f'<img src="{_data("png", png)}" alt="{escape(name)} over the epochs" width="720" height="480">'
        for name, png in curves.items()
    )
    return '<h2>Training</h2>\n<div class="row">' + '\n'.join(images) + '</div>'


def _images(name: str, images: Sequence[Saved], scores: Mapping[str, Mapping[str, float]], label: str) -> str:
    figures = list(filter(None, (_figure(image, scores.get(image.name), label) for image in images[:MOST])))
    if not images:
        return ''
    few = f'{len(figures)} of {len(images)}: the first {MOST}, without those above {LARGEST / 1e6:.1f} megapixels. '
    note = f'The middle of each, at most {SIDE}x{SIDE} pixels, as JPEG; the files hold the whole images.'
    return (
        f'<h2>Images of {escape(name)}</h2>\n<p>{few if len(figures) < len(images) else ""}{note}</p>\n'
        f'<div class="row">{"".join(figures)}</div>'
    )


def _figure(image: Saved, scores: Mapping[str, float] | None, label: str) -> str:
    """A slider between the versions of an image; nothing for one that is too large or cannot be read."""
    try:
        if math.prod(read_size(image.file)) > LARGEST:
            return ''
        versions = image.versions()
    except UserError:
        return ''
    height, width = versions['sr'].shape[:2]
    name, right = escape(image.name), escape(label)
    left = [kind for kind in ('hr', 'bicubic') if kind in versions]  # the last one is on top
    sources = {kind: _data('jpeg', _jpeg(pixels)) for kind, pixels in versions.items()}
    layers = ''.join(f'<img class="left {kind}" src="{sources[kind]}" alt="{name}, {LABELS[kind]}">' for kind in left)
    names = ''.join(f'<span class="{kind}">{LABELS[kind]}</span>' for kind in left)
    choice = '<label><input type="checkbox"> HR on the left</label>' if 'hr' in left else ''
    first = METRICS[0]
    score = f', {first.text_with_unit(scores[first.name])}' if scores else ''
    return f"""<figure style="width:{width}px">
<div class="pair"><img src="{sources['sr']}" alt="{name}, {right}" width="{width}" height="{height}">{layers}
{pair.slider(f'{name}: left or right')}
</div>
<figcaption><b>{name}</b>{score}<br>{names} | {right}{choice}</figcaption>
</figure>
"""


def _jpeg(pixels: np.ndarray) -> bytes:
    return iio.imwrite('<bytes>', pixels, extension='.jpg', quality=QUALITY, subsampling=0)


def _data(kind: str, content: bytes) -> str:
    return f'data:image/{kind};base64,{base64.b64encode(content).decode()}'


def _options(config: str, changed: Collection[str]) -> str:
    parts = (line.partition(': ') for line in config.splitlines())
    pairs = [(key, value) for key, _, value in parts]
    own, rest = ([pair for pair in pairs if (pair[0] in changed) == wanted] for wanted in (True, False))
    tables = f'<h3>Given</h3>\n{_pairs(own)}\n<h3>Default</h3>\n{_pairs(rest)}'
    return f'<h2>Options</h2>\n<details><summary>{len(own)} given, {len(rest)} default</summary>{tables}</details>'


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
<script>{script}</script>
</body>
</html>
"""

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 66rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere; }
h1, h2, h3 { line-height: 1.2; }
h2 { margin: 2.5rem 0 1rem; border-bottom: 1px solid #8886; }
dl { display: grid; grid-template-columns: auto 1fr; gap: .2rem 1rem; }
dt { opacity: .7; overflow-wrap: normal; }
dd { margin: 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem 0 .25rem 1rem; text-align: right; border-bottom: 1px solid #8884; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; white-space: normal; min-width: 4rem; }
@media (max-width: 30rem) { table { font-size: .9rem; } th, td { padding-left: .6rem; } }
summary { cursor: pointer; padding: .3rem 0; }
img { display: block; max-width: 100%; height: auto; }
.row { display: flex; flex-wrap: wrap; gap: 1.5rem; }
.row > img { width: 30rem; background: #fff; border-radius: .4rem; }
figure { margin: 0; min-width: min(14rem, 100%); max-width: 100%; }
figcaption { margin-top: .3rem; }
figcaption label { display: block; width: fit-content; }
figure:has(:checked) .bicubic, figure:not(:has(:checked)) span.hr { display: none; }
"""
