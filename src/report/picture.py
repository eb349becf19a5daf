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
    figure = _figure(6 * len(panels), 5)
    for number, (title, points) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(1, len(panels), number)
        for name, parameters, psnr, multiply_adds in points:
            at, radius = (parameters / 1e6, psnr), multiply_adds**0.5 / 2e5
            axes.scatter(*at, s=(2 * radius) ** 2, alpha=0.5)
            apart = [(abs(p[2] - psnr) + abs(np.log(p[1] / parameters)), p[1]) for p in points if p[0] != name]
            right = parameters >= min(apart, default=(0, 0))[1]  # away from the one that it could collide with
            shift, align = (radius + 2, 'left') if right else (-radius - 2, 'right')
            axes.annotate(name, at, (shift, 0), ha=align, va='center', textcoords='offset points', fontsize=8)
        axes.set(title=title, xlabel='parameters (millions)', ylabel='PSNR (dB)', xscale='log')
        axes.set_xticks([0.5, 1, 2, 5, 10, 20, 50], labels=['0.5', '1', '2', '5', '10', '20', '50'])
        axes.minorticks_off()
        axes.margins(0.3, 0.1)
        axes.grid(alpha=0.3, which='both')
    figure.supxlabel(note, fontsize=8)
    return _png(figure)


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
