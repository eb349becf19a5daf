"""Scoring on test sets: of a network, or of images that another program made."""

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

import metric
from data.image import read_rgb, write_png
from data.imresize import upscale_bicubic
from data.outputs import match_outputs
from data.srdata import SRData
from error import UserError, noting
from metric import Metric
from model import Model
from report import picture
from report.page import Saved
from system import parallel
from system.background import Prefetcher, WorkerPool
from system.files import some

log = logging.getLogger('frugalsr')

SHEET_ROWS = 5
SHOWN = 3

T = TypeVar('T')

Upscale = Callable[[SRData, int], tuple[np.ndarray, float]]


class Evaluation:
    """Scores a way of enlarging on test sets, and saves its images where that is wanted.

    Args:
        sets: prepared paired images.
        metrics: what is measured.
        folder: where images go, as `results-<Set>/<name>_x<scale>_SR.png`, and a comparison sheet a set; None: nowhere.
        ground_truth: save LR and HR beside them.

    Attributes:
        shown: the last outputs for the first images of each set, (H, W, 3) uint8 as '<Set>/<name>'.
        results: the last ones.
        failures: why images or sheets could not be saved the last time; the scores are there all the same.
    """

    def __init__(
        self, sets: Sequence[SRData], metrics: Sequence[Metric], folder: Path | None = None, ground_truth: bool = False
    ) -> None:
        self.sets, self.metrics, self.folder, self.ground_truth = sets, metrics, folder, ground_truth
        self.shown: dict[str, np.ndarray] = {}
        self.results: dict[str, Any] = {}
        self._named: set[tuple[str, str]] = set()  # set and metric of which the images without a value were named
        self.failures: list[UserError] = []

    def __call__(self, upscale: Upscale, label: str, check: Callable[[], None] = lambda: None) -> dict[str, Any]:
        """Results by set: {metric: its mean, 'seconds': an image, 'images': {name: {metric: value, 'seconds'}}}.

        Args:
            upscale: gives the image of a set at an index, (H, W, 3) uint8, and the seconds that it took.
            label: what to call it in pictures.
            check: called before each image; what it raises ends the evaluation.

        Raises:
            UserError: an image could not be read or enlarged.
        """
        self.failures = []
        found = {images.name: self._set(images, upscale, label, check) for images in self.sets}
        self.results = parallel.broadcast(found)
        return self.results

    def protocol(self) -> dict[str, dict[str, Any]]:
        """What each set's scores are measured on."""
        return {s.name: s.protocol() for s in self.sets}

    def saved(self) -> dict[str, list[Saved]]:
        """The images that it saves, by set."""
        return {images.name: self._saved(images, self.folder) for images in self.sets} if self.folder else {}

    def _saved(self, images: SRData, folder: Path) -> list[Saved]:
        place, scale = folder / f'results-{images.name}', images.scale
        return [
            Saved(name, place / f'{name}_x{scale}_SR.png', scale, partial(images.lr, i), partial(images.hr, i))
            for i, name in enumerate(images.names)
        ]

    def _set(self, images: SRData, upscale: Upscale, label: str, check: Callable[[], None]) -> dict[str, Any]:
        outputs = in_turn(len(images), lambda index: upscale(images, index), check)
        with WorkerPool() as background:
            for index, (sr, seconds) in parallel.progress(outputs, f'{images.name} x{images.scale}', total=len(images)):
                if index < SHOWN:
                    self.shown[f'{images.name}/{images.names[index]}'] = sr
                background.start(self._finish, images, index, sr, seconds, label)
        if parallel.rank():
            return {}
        scores, rows = zip(*background.results, strict=True)
        if self.folder is not None:
            with noting(self.failures):
                found = [row for row in rows if row]
                picture.save(self.folder / f'comparison-{images.name}.png', lambda: picture.sheet(found))
        means = {key: metric.mean(score[key] for score in scores) for key in scores[0]}
        self._name_unscored(images, scores)
        return means | {'images': dict(zip(images.names, scores, strict=True))}

    def _name_unscored(self, images: SRData, scores: Sequence[dict[str, float]]) -> None:
        """Say, once a set, which images are too small for a metric and so have no part in its mean."""
        for each in self.metrics:
            lacking = [name for name, found in zip(images.names, scores, strict=True) if math.isnan(found[each.name])]
            if lacking and (images.name, each.name) not in self._named:
                self._named.add((images.name, each.name))
                log.warning(
                    '%s: %s is the mean of %d of %d images; too small for it: %s',
                    images.name, each.title, len(scores) - len(lacking), len(scores), some(lacking),
                )  # fmt: skip

    def _finish(
        self, images: SRData, index: int, sr: np.ndarray, seconds: float, label: str
    ) -> tuple[dict[str, float], picture.Comparison | None]:
        """Score an image and save it; also a row of the comparison sheet, for the first ones."""
        hr = images.hr(index)
        scores = self._score(images, sr, hr) | {'seconds': seconds}
        if self.folder is None:
            return scores, None
        self._save(images, index, hr, sr)
        return scores, compare(images, index, hr, {label: sr}) if index < SHEET_ROWS else None

    def _score(self, images: SRData, sr: np.ndarray, hr: np.ndarray) -> dict[str, float]:
        return {each.name: score(each, images, sr, hr) for each in self.metrics}

    def _save(self, images: SRData, index: int, hr: np.ndarray, sr: np.ndarray) -> None:
        assert self.folder is not None
        place, stem = self.folder / f'results-{images.name}', f'{images.names[index]}_x{images.scale}'
        versions = {'SR': sr} | ({'LR': images.lr(index), 'HR': hr} if self.ground_truth else {})
        for kind, image in versions.items():
            with noting(self.failures):
                write_png(place / f'{stem}_{kind}.png', image)


def score(measured: Metric, images: SRData, sr: np.ndarray, hr: np.ndarray) -> float:
    """The value of an image (H, W, 3) uint8 by the set's protocol; nan where nothing is left to score."""
    if min(hr.shape[:2]) <= 2 * images.shave:
        return math.nan
    return measured.measure(sr, hr, images.shave, images.channels)


def compare(images: SRData, index: int, hr: np.ndarray, outputs: dict[str, np.ndarray]) -> picture.Comparison:
    """HR, bicubic and `outputs` of one image, with their scores; bicubic once if that is one of the outputs."""
    first = metric.METRICS[0]
    versions = {'Bicubic': upscale_bicubic(images.lr(index), images.scale)} | outputs
    scores = [score(first, images, image, hr) for image in versions.values()]
    captions = [
        name if math.isnan(value) else f'{name}  {first.text_with_unit(value)}'
        for name, value in zip(versions, scores, strict=True)
    ]
    return picture.Comparison(images.names[index], [hr, *versions.values()], ['HR', *captions])


def in_turn(count: int, work: Callable[[int], T], check: Callable[[], None] = lambda: None) -> Iterator[tuple[int, T]]:
    """Pieces of work and their results in order, dealt out to all processes; only the first one is given them."""
    for first, own in parallel.rank_indices(count):
        check()
        found = parallel.gather(None if own is None else work(own))
        yield from ((first + i, result) for i, result in enumerate(found) if result is not None)


def table(results: dict[str, Any]) -> str:
    """Results by set, as text."""
    width = max([len(name) for name in results] + [3])
    titles = ''.join(f'{each.title:>8}' for each in metric.METRICS)
    lines = [f'{"Set":<{width}}  images{titles}  s/image']
    for name, result in results.items():
        cells = ''.join(f'{each.text(result.get(each.name)):>8}' for each in metric.METRICS)
        cells += f'{result["seconds"]:9.3f}' if not math.isnan(result['seconds']) else f'{"-":>9}'
        lines.append(f'{name:<{width}}  {len(result["images"]):6d}{cells}')
    return '\n'.join(lines)


def read_outputs(sets: Sequence[SRData], folder: Path) -> Upscale:
    """Images that another program made, found by name, in place of a network.

    `folder` holds the images of all sets, or a folder `<Set>` or `results-<Set>` for each.
    """
    files = {}
    for images in sets:
        own = [path for path in (folder / images.name, folder / f'results-{images.name}') if path.is_dir()]
        files[images.name] = match_outputs(own[0] if own else folder, images.names)

    def read(images: SRData, index: int) -> tuple[np.ndarray, float]:
        path = files[images.name][images.names[index]]
        sr, expected = read_rgb(path), images.hr(index).shape
        if sr.shape != expected:
            raise UserError(
                f'{path} is {sr.shape[1]}x{sr.shape[0]} pixels, but {images.names[index]} of {images.name} cropped for '
                f'x{images.scale} is {expected[1]}x{expected[0]}: check --scale and the file.'
            )
        return sr, math.nan

    return read


def timed(model: Model) -> Upscale:
    """A network as a way of enlarging the images of a set; reading them is not timed."""
    ahead = Prefetcher()

    def upscale(images: SRData, index: int) -> tuple[np.ndarray, float]:
        lr = ahead(images.lr, index, len(images))
        start = time.perf_counter()
        try:
            sr = model.upscale(lr)
        except UserError as error:
            raise type(error)(f'{images.names[index]} of {images.name}: {error}') from error
        return sr, time.perf_counter() - start

    return upscale
