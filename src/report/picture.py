"""Pictures of a run: curves over the epochs, and crops side by side."""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from error import UserError
from metric import METRICS
from system.files import write_atomic

CROP = 96  # side of a crop in HR pixels
LONGEST = 40  # characters of a name
COLOURS = 10  # of lines, before they come again
LABEL_GAPS = (2, 9, 18, 30, 44, 60)  # from the edge of a circle to its name, in points
FAR = 3  # square pixels that a name may cover to be a point nearer to its circle
LABEL_WAYS = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1))  # right, up


@dataclass(frozen=True)
class Comparison:
    """One row of a comparison sheet: images (H, W, 3) uint8 of equal size, with a caption each."""

    name: str
    images: Sequence[np.ndarray]
    captions: Sequence[str]


def save(path: Path, draw: Callable[[], bytes]) -> None:
    """Write a picture, the PNG file that `draw` gives.

    Raises:
        UserError: it could not be drawn.
        WriteError: it could not be written.
    """
    try:
        content = draw()
    except Exception as error:  # matplotlib raises nearly anything
        raise UserError(f'{path} could not be drawn ({error}).') from error
    write_atomic(path, content)


def curves(records: Sequence[dict[str, Any]]) -> dict[str, Callable[[], bytes]]:
    """What draws PNG files, by their names.

    They show losses, norm of the gradients, and scores of each test set, over the epochs of a run's log.
    """
    epochs = [record['epoch'] for record in records]
    terms = list(dict.fromkeys(term for record in records for term in record['loss'] if term != 'total'))
    if any(len(record['loss']) > 2 for record in records):  # else the only term is the total
        terms.append('total')
    losses = {term: [record['loss'].get(term) for record in records] for term in terms}
    pictures: dict[str, Callable[[], bytes]] = {'loss.png': partial(_curve, epochs, losses, 'loss')}
    if 'gradient_norm' in records[-1]:
        norms = [record.get('gradient_norm') for record in records]
        pictures['gradient_norm.png'] = partial(
            _curve, epochs, {'all gradients': norms}, 'Euclidean norm before clipping'
        )
    metric = METRICS[0]
    for name in records[-1]['test']:
        scores = [record['test'].get(name, {}).get(metric.name) for record in records]
        pictures[f'test_{name}.png'] = partial(_curve, epochs, {name: scores}, metric.label)
    return pictures


def _curve(epochs: Sequence[int], lines: dict[str, list], label: str) -> bytes:
    figure = _figure(6, 4)
    axes = figure.add_subplot()
    for name, values in lines.items():
        axes.plot(epochs, np.array(values, dtype=float), label=_plain(name), marker='.' if len(epochs) < 30 else '')
    axes.set(xlabel='epoch', ylabel=label)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend()
    return _png(figure)


def scatter(panels: Mapping[str, Sequence[tuple[str, float, float, float]]], note: str) -> bytes:
    """PNG of one panel a title: PSNR against the number of parameters, as (name, parameters, PSNR, multiply-adds)."""
    figure = _figure(6 * len(panels), 6)
    for number, (title, points) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(1, len(panels), number)
        for _, parameters, psnr, multiply_adds in points:
            axes.scatter(parameters / 1e6, psnr, s=(2 * _radius(multiply_adds)) ** 2, alpha=0.5)
        axes.set(title=title, xlabel='parameters (millions)', ylabel='PSNR (dB)', xscale='log')
        axes.set_xticks([0.2, 0.5, 1, 2, 5, 10, 20, 50], labels=['0.2', '0.5', '1', '2', '5', '10', '20', '50'])
        axes.minorticks_off()
        axes.margins(0.15, 0.1)
        axes.grid(alpha=0.3, which='both')
    figure.supxlabel(note, fontsize=8)
    figure.draw_without_rendering()  # from here on a point has its place on the paper
    for axes, points in zip(figure.axes, panels.values(), strict=True):
        _name_circles(axes, [(name, (n / 1e6, psnr), _radius(size)) for name, n, psnr, size in points])
    return _png(figure)


def _radius(multiply_adds: float) -> float:
    """Of the circle of a network, in points."""
    return multiply_adds**0.5 / 2e5


def _name_circles(axes: Any, circles: Sequence[tuple[str, tuple[float, float], float]]) -> None:
    """Write names beside circles, as (name, place, radius in points), the nearest where they cover the least.

    A line leads from a name to its circle where another one had to go between.
    """
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    def shared(one: Bbox, other: Bbox) -> float:
        both = Bbox.intersection(one, other)
        return both.width * both.height if both else 0.0

    pixels = axes.figure.dpi / 72  # of a point
    places = [axes.transData.transform(at) for _, at, _ in circles]
    taken = [Bbox([at - pixels * r, at + pixels * r]) for at, (_, _, r) in zip(places, circles, strict=True)]
    for place, (name, at, radius) in zip(places, circles, strict=True):
        line = {'arrowstyle': '-', 'linewidth': 0.5, 'alpha': 0.5, 'shrinkA': 0, 'shrinkB': radius}
        text = axes.annotate(
            name, at, (0, 0), textcoords='offset points', ha='center', va='center', fontsize=8, arrowprops=line
        )
        text.set_in_layout(False)
        half = np.array(Text.get_window_extent(text).size) / 2
        choices = []
        for gap in LABEL_GAPS:
            for way in LABEL_WAYS:
                shift = np.array(way) * (pixels * (radius + gap) + half)
                box = Bbox([place + shift - half, place + shift + half])
                covered = sum(shared(box, other) for other in taken) - shared(box, axes.bbox)
                choices.append((round(covered + FAR * gap), gap, shift / pixels, box))
        _, gap, shift, box = min(choices, key=lambda choice: choice[0])
        text.set_position(shift)
        text.arrow_patch.set_visible(gap > LABEL_GAPS[0])
        taken.append(box)


def bars(rows: Mapping[str, Mapping[str, float]], note: str) -> bytes:
    """PNG of a bar a row, stacked from its named shares of one whole."""
    figure = _figure(8, 1.5 + 0.3 * len(rows))
    axes = figure.add_subplot()
    ends = np.zeros(len(rows))
    for name in next(iter(rows.values()), {}):
        lengths = np.array([100 * shares[name] for shares in rows.values()])
        axes.barh(list(rows), lengths, left=ends, label=name)
        ends += lengths
    for row, end in enumerate(ends):
        axes.annotate(f'{end:.0f}%', (end, row), (3, 0), va='center', textcoords='offset points', fontsize=8)
    axes.set(xlabel=note, xlim=(0, 1.1 * ends.max(initial=1)))
    axes.invert_yaxis()
    axes.grid(alpha=0.3, axis='x')
    figure.legend(*axes.get_legend_handles_labels(), loc='outside upper center', ncols=4, fontsize=8)
    return _png(figure)


def growth(panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]]) -> bytes:
    """PNG of one panel a quantity: by network, its points (side of the LR square, value) on logarithmic axes."""
    figure = _figure(6 * len(panels), 5 + 0.1 * max(map(len, panels.values()), default=0))
    for number, (title, lines) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(1, len(panels), number)
        for i, (name, points) in enumerate(lines.items()):
            style = '-' if i < COLOURS else '--'
            axes.loglog(*zip(*points, strict=True), label=name, marker='.', linestyle=style, base=2)
        sides = sorted({side for points in lines.values() for side, _ in points})
        axes.set_xticks(sides, labels=[f'{side:g}' for side in sides])
        axes.set_yscale('log', base=10)
        axes.set(xlabel='side of the LR square', ylabel=title)
        axes.grid(alpha=0.3, which='both')
        if lines:
            axes.legend(fontsize=8, loc='lower center', bbox_to_anchor=(0.5, 1), ncols=2)
    return _png(figure)


def sheet(rows: Sequence[Comparison]) -> bytes:
    """PNG of one row per image: a crop full of detail, the same in every version of the image."""
    columns = len(rows[0].images)
    figure = _figure(2.4 * columns, 2.75 * len(rows))
    for row, comparison in enumerate(rows):
        top, left = _detail(comparison.images[0])
        for column, (image, caption) in enumerate(zip(comparison.images, comparison.captions, strict=True)):
            axes = figure.add_subplot(len(rows), columns, row * columns + column + 1)
            axes.imshow(image[top : top + CROP, left : left + CROP], interpolation='nearest')
            axes.set(xticks=[], yticks=[], xlabel=_plain(caption), ylabel='' if column else _plain(comparison.name))
    return _png(figure)


def _detail(image: np.ndarray) -> tuple[int, int]:
    """Top left corner of the crop with the most edges, among crops half a side apart."""
    edges = sum(np.abs(step) for step in np.gradient(image.mean(-1)))
    corners = [
        (top, left)
        for top in range(0, max(1, image.shape[0] - CROP + 1), CROP // 2)
        for left in range(0, max(1, image.shape[1] - CROP + 1), CROP // 2)
    ]
    return max(corners, key=lambda at: edges[at[0] : at[0] + CROP, at[1] : at[1] + CROP].sum())


def centre(image: np.ndarray, side: int) -> tuple[slice, slice]:
    """Rows and columns of the middle of (H, W, ...), at most `side` each."""
    starts = (max(0, (size - side) // 2) for size in image.shape[:2])
    rows, columns = (slice(start, min(start + side, size)) for start, size in zip(starts, image.shape[:2], strict=True))
    return rows, columns


def _plain(name: str) -> str:
    """A name as matplotlib shows it: nothing in it is a formula, a line of its own, or no character at all."""
    name = name if len(name) <= LONGEST else f'{name[: LONGEST // 2]}…{name[-LONGEST // 2 :]}'
    return ''.join(c if c.isprintable() else '\N{REPLACEMENT CHARACTER}' for c in name).replace('$', r'\$')


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure  # matplotlib takes a third of a second to import

    return Figure(figsize=(width, height), layout='constrained')


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120)
    return buffer.getvalue()
