"""The training loop and the evaluation loop."""

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

import metric
from checkpoint import RunFolder
from data.image import read_rgb, write_png
from data.imresize import enlarge
from data.outputs import match_outputs
from data.srdata import SRData
from data.traindata import Sample, WorkerDied, whole_batches
from error import UserError
from loss import Loss
from model import Model
from optimizer import Schedule, WeightAverage, set_learning_rate
from report import picture
from system import parallel
from system.background import Ahead, Background
from system.files import write_atomic
from system.stopping import Stopped

log = logging.getLogger('frugalsr')

SHEET_ROWS = 5
SHOWN = 3

T = TypeVar('T')

Upscale = Callable[[SRData, int], tuple[np.ndarray, float]]


class Evaluation:
    """Scores a way of enlarging on test sets, and saves its images where that is wanted.

    Args:
        sets: prepared paired images.
        ssim: measure SSIM too.
        folder: where images go, as `results-<Set>/<name>_x<scale>_SR.png`, and a comparison sheet a set; None: nowhere.
        ground_truth: save LR and HR beside them.

    Attributes:
        shown: the last outputs for the first images of each set, (H, W, 3) uint8 as '<Set>/<name>'.
        results: the last ones.
    """

    def __init__(
        self, sets: Sequence[SRData], ssim: bool, folder: Path | None = None, ground_truth: bool = False
    ) -> None:
        self.sets, self.ssim, self.folder, self.ground_truth = sets, ssim, folder, ground_truth
        self.shown: dict[str, np.ndarray] = {}
        self.results: dict[str, Any] = {}

    def __call__(self, upscale: Upscale, label: str, check: Callable[[], None] = lambda: None) -> dict[str, Any]:
        """Results by set: {'psnr', 'ssim', 'seconds' (an image), 'images': {name: the same}}.

        Args:
            upscale: gives the image of a set at an index, (H, W, 3) uint8, and the seconds that it took.
            label: what to call it in pictures.
            check: called before each image; what it raises ends the evaluation.
        """
        found = {images.name: self._set(images, upscale, label, check) for images in self.sets}
        self.results = parallel.spread(found)
        return self.results

    def protocol(self) -> dict[str, dict[str, Any]]:
        """What each set's scores are measured on."""
        return {s.name: {'channels': s.channels, 'shave': s.shave, 'lr_border': s.lr_border} for s in self.sets}

    def _set(self, images: SRData, upscale: Upscale, label: str, check: Callable[[], None]) -> dict[str, Any]:
        outputs = in_turn(len(images), lambda index: upscale(images, index), check)
        with Background() as background:
            for index, (sr, seconds) in parallel.progress(outputs, f'{images.name} x{images.scale}', total=len(images)):
                if index < SHOWN:
                    self.shown[f'{images.name}/{images.names[index]}'] = sr
                background.start(self._finish, images, index, sr, seconds, label)
        if parallel.rank():
            return {}
        scores, rows = zip(*background.results, strict=True)
        if self.folder is not None:
            write_atomic(self.folder / f'comparison-{images.name}.png', picture.sheet([row for row in rows if row]))
        means = {key: metric.mean(score[key] for score in scores) for key in scores[0]}
        return means | {'images': dict(zip(images.names, scores, strict=True))}

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
        scores = {'psnr': score(metric.psnr, images, sr, hr)}
        if self.ssim:
            scores['ssim'] = score(metric.ssim, images, sr, hr)
        return scores

    def _save(self, images: SRData, index: int, hr: np.ndarray, sr: np.ndarray) -> None:
        assert self.folder is not None
        stem = self.folder / f'results-{images.name}' / f'{images.names[index]}_x{images.scale}'
        write_png(stem.with_name(f'{stem.name}_SR.png'), sr)
        if self.ground_truth:
            write_png(stem.with_name(f'{stem.name}_LR.png'), images.lr(index))
            write_png(stem.with_name(f'{stem.name}_HR.png'), hr)


def score(measure: Callable[..., float], images: SRData, sr: np.ndarray, hr: np.ndarray) -> float:
    """PSNR or SSIM (`metric.psnr`, `metric.ssim`) by the set's protocol; nan where nothing is left to score."""
    if min(hr.shape[:2]) <= 2 * images.shave:
        return math.nan
    return measure(sr, hr, images.shave, images.channels)


def compare(images: SRData, index: int, hr: np.ndarray, outputs: dict[str, np.ndarray]) -> picture.Comparison:
    """HR, bicubic and `outputs` of one image, with their PSNR; bicubic once if that is one of the outputs."""
    versions = {'Bicubic': enlarge(images.lr(index), images.scale)} | outputs
    scores = [score(metric.psnr, images, image, hr) for image in versions.values()]
    captions = [
        name if math.isnan(psnr) else f'{name}  {psnr:.2f} dB' for name, psnr in zip(versions, scores, strict=True)
    ]
    return picture.Comparison(images.names[index], [hr, *versions.values()], ['HR', *captions])


def in_turn(count: int, work: Callable[[int], T], check: Callable[[], None] = lambda: None) -> Iterator[tuple[int, T]]:
    """Pieces of work and their results in order, dealt out to all processes; only the first one is given them."""
    for first, own in parallel.deal(count):
        check()
        found = parallel.gather(None if own is None else work(own))
        yield from ((first + i, result) for i, result in enumerate(found) if result is not None)


def table(results: dict[str, Any]) -> str:
    """Results by set, as text."""
    width = max([len(name) for name in results] + [3])
    lines = [f'{"Set":<{width}}  images    PSNR    SSIM  s/image']
    for name, result in results.items():
        psnr, ssim = result['psnr'], result.get('ssim', math.nan)
        cells = f'{psnr:8.2f}' if not math.isnan(psnr) else f'{"-":>8}'
        cells += f'{ssim:8.4f}' if not math.isnan(ssim) else f'{"-":>8}'
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
    ahead = Ahead()

    def upscale(images: SRData, index: int) -> tuple[np.ndarray, float]:
        lr = ahead(images.lr, index, len(images))
        start = time.perf_counter()
        sr = model.upscale(lr)
        return sr, time.perf_counter() - start

    return upscale


def draw_seed(seed: int, step: int, rank: int) -> int:
    """Seed of what a network draws in a step: of its own in each process."""
    return int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0])


def duration(seconds: float) -> str:
    """As days, hours and minutes, or minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f'{hours // 24} d {hours % 24:02d} h {minutes:02d} min' if hours else f'{minutes} min {rest:02d} s'


COUNTERS = ('epoch', 'batch', 'step', 'samples')
MOST_NOT_FINITE = 10  # batches in a row


@dataclass
class Partial:
    """What the batches of the epoch under way came to so far.

    Attributes:
        totals: sums of the loss terms.
        learned, skipped: numbers of batches.
        replaced: number of samples whose image could not be used.
        seconds, waited: in all, and for data.
    """

    totals: dict[str, float]
    learned: int = 0
    skipped: int = 0
    replaced: int = 0
    seconds: float = 0.0
    waited: float = 0.0

    def add(self, values: dict[str, float] | None) -> None:
        """Count a batch with its loss terms, or a skipped one."""
        if values is None:
            self.skipped += 1
            return
        self.learned += 1
        for name, value in values.items():
            self.totals[name] += value

    def means(self) -> dict[str, float]:
        """Loss terms a batch; nan if none was learned from."""
        return {name: total / self.learned if self.learned else math.nan for name, total in self.totals.items()}


class Trainer:
    """Trains a model; one epoch is a fixed number of steps, followed by an evaluation and a save.

    Args:
        model: with its weights.
        loss: between its output and the target.
        optimizer: over its parameters.
        loader: gives the batches of the sample numbers of a range.
        name_of: which image a sample number is cut from.
        evaluate: scores the model after an epoch of this number.
        run: where everything goes.
        batch_size: samples a step.
        steps: steps an epoch.
        rate: learning rate of the next step, after numbers of finished epochs and finished steps.
        parts: a batch is computed in this many parts.
        clip: largest absolute value of a gradient; 0: any.
        clip_norm: largest Euclidean norm of all gradients together; 0: any.
        dtype: type that the network computes in under autocast, float32 for none; losses and weights are float32.
        skip_threshold: a batch is skipped if its loss exceeds this times that of the last epoch.
        print_every: steps between lines in the log.
        keep_all: keep the weights of every epoch.
        average_decay: of the average of the weights, which is what is tested and saved as weights; 0: none.
        seed: of what a network draws in training, together with the number of the step.
        save_every: batches between states saved within an epoch; 0: only after each epoch.
        watch: given the record of each epoch.
    """

    def __init__(
        self,
        model: Model,
        loss: Loss,
        optimizer: torch.optim.Optimizer,
        loader: Callable[[range], Iterable[Sample]],
        name_of: Callable[[int], str],
        evaluate: Callable[[int], dict[str, Any]],
        run: RunFolder,
        batch_size: int,
        steps: int,
        rate: Schedule,
        parts: int = 1,
        clip: float = 0.0,
        clip_norm: float = 0.0,
        dtype: torch.dtype = torch.float32,
        skip_threshold: float = 1e8,
        print_every: int = 100,
        keep_all: bool = False,
        average_decay: float = 0.0,
        seed: int = 0,
        save_every: int = 0,
        watch: Callable[[dict[str, Any]], None] = lambda record: None,
    ) -> None:
        self.watch = watch
        self.model, self.loss, self.optimizer = model, loss, optimizer
        self.loader, self.name_of, self.evaluate, self.run = loader, name_of, evaluate, run
        self.batch_size, self.steps, self.parts, self.rate = batch_size, steps, parts, rate
        self.clip, self.clip_norm, self.skip_threshold = clip, clip_norm, skip_threshold
        self.print_every, self.keep_all, self.dtype = print_every, keep_all, dtype
        # Keeps small gradients of float16 from becoming zero.
        self.scaler = torch.amp.GradScaler(model.device.type, enabled=dtype == torch.float16)
        self.seed, self.save_every = seed, save_every
        self.average = WeightAverage(model.net, average_decay) if average_decay else None
        self.epoch = self.step = self.samples = 0
        self.batch = 0  # batches done in the epoch that is under way
        self.partial = self._fresh()  # and what they came to
        self.not_finite = 0  # batches in a row whose loss was not
        self.unusable: set[str] = set()  # images that others took the place of
        self.saved = ''  # what the state on the disk is of
        self.rewound = False
        self.log: list[dict[str, Any]] = []

    def resume(self, state: dict[str, Any]) -> None:
        """Continue from a state that `state` gave; hyperparameters stay those of `optimizer`."""
        own = [{key: value for key, value in g.items() if key != 'params'} for g in self.optimizer.param_groups]
        try:
            self.optimizer.load_state_dict(state['optimizer'])
        except (ValueError, KeyError) as error:
            raise UserError(f'The optimiser of {self.run.folder} does not fit ({error}): start another run.') from error
        for group, hyperparameters in zip(self.optimizer.param_groups, own, strict=True):
            group.update(hyperparameters)
        if self.average and state['average']:
            self.average.load(state['average'])
        self.loss.load_state_dict(state['loss'])
        if state['scaler']:
            self.scaler.load_state_dict(state['scaler'])
        for key in COUNTERS:
            setattr(self, key, state[key])
        self.log = state['log']
        fresh, self.partial = self.partial.totals, Partial(**state['partial'])
        if self.partial.totals.keys() != fresh.keys():  # the terms of the loss have changed
            self.partial.totals, self.partial.learned = fresh, 0
        self.saved = self._place()

    def rewind(self, epoch: int, log_of_run: list[dict[str, Any]]) -> None:
        """Continue after an earlier epoch, whose weights the model already has, with a fresh optimiser."""
        self.log = log_of_run[:epoch]
        self.epoch, self.step, self.samples = epoch, self.log[-1]['step'], self.log[-1]['samples']
        self.saved, self.rewound = f'epoch {len(log_of_run)}', True

    def state(self) -> dict[str, Any]:
        """Everything that the run continues from."""
        return {
            'model': self.model.net.state_dict(),
            'average': self.average.state if self.average else None,
            'optimizer': self.optimizer.state_dict(),
            'loss': self.loss.state_dict(),
            'scaler': self.scaler.state_dict(),
            **{key: getattr(self, key) for key in COUNTERS},
            'partial': asdict(self.partial),
            'log': self.log,
        }

    def train(self, epochs: int, stop: Callable[[], None] = lambda: None) -> bool:
        """Train until `epochs` epochs are done in all, or `stop`, which is called after each step, raises `Stopped`.

        Returns whether all epochs are done; if not, the state is saved where the run stopped.
        """
        if self.epoch >= epochs:
            log.info('All %d epochs are done; a larger --epochs continues.', epochs)
            if not self.rewound:
                self.run.write_log(self.log)
            return True
        steps = (epochs - self.epoch) * self.steps - min(self.batch, self.steps)
        batches = self._batches(self.samples + steps * self.batch_size)
        while self.epoch < epochs:
            try:
                self._train_epoch(batches, epochs, stop)
                results = self._evaluate(epochs)
            except Stopped:
                self._save_state()
                return False
            self._leave_branch()
            self._finish_epoch(results)
            self.run.save_epoch(self.state(), self._is_best(self.epoch), self.keep_all)
            self.saved = self._place()
            self.watch(self.log[-1])
        return True

    def _save_state(self) -> None:
        """Save what the run continues from within an epoch."""
        self._leave_branch()
        self.run.save_state(self.state())
        self.saved = self._place()

    def _leave_branch(self) -> None:
        """Before a run that went back saves for the first time: take the later epochs out of the log and the best."""
        if self.rewound:
            self.run.keep_best(max(epoch for epoch in range(1, self.epoch + 1) if self._is_best(epoch)))
            self.run.write_log(self.log)
            self.rewound = False

    def _batches(self, end: int) -> Iterator[Sample]:
        """Batches up to sample number `end`; a loading process that died is replaced, once at one place."""
        died_at = -1
        while True:
            try:
                yield from whole_batches(self.loader(range(self.samples, end)))
                return
            except WorkerDied as error:
                if self.samples == died_at:
                    raise UserError(
                        f'A loading process died again ({error}): if memory ran out, give a smaller --n_threads.'
                    ) from error
                died_at = self.samples
                log.warning('A loading process died (%s): loading starts again after batch %d.', error, self.batch)

    def _place(self) -> str:
        return f'epoch {self.epoch + 1}, batch {self.batch}' if self.batch else f'epoch {self.epoch}'

    def _fresh(self) -> Partial:
        return Partial(dict.fromkeys([*self.loss.names, 'total'], 0.0))

    def _is_best(self, epoch: int) -> bool:
        """Whether no epoch up to this one had a better PSNR on the first test set."""
        tests = [record['test'] for record in self.log[:epoch]]
        first = next(iter(tests[-1]))
        return not any(test[first]['psnr'] > tests[-1][first]['psnr'] for test in tests if first in test)

    def _train_epoch(self, batches: Iterator[Sample], epochs: int, stop: Callable[[], None]) -> None:
        """Train until the epoch is complete, or `stop` raises."""
        self.model.net.train()
        title = f'Epoch {self.epoch + 1}/{epochs}'
        bar = parallel.progress(range(self.batch, self.steps), title, initial=self.batch, total=self.steps)
        for _ in bar:
            rate = self._next_step(batches)
            done, means = self.partial, self.partial.means()
            speed, wait = self.batch * self.batch_size / done.seconds, done.waited / done.seconds
            bar.set_postfix_str(f'loss {means["total"]:.4g}, {speed:.1f} images/s, {wait:.0%} waiting', refresh=False)
            if self.batch % self.print_every == 0:
                losses = ', '.join(f'{name} {value:.5g}' for name, value in means.items() if name != 'total')
                left = done.seconds / self.batch * ((epochs - self.epoch) * self.steps - self.batch)
                log.info(
                    'Epoch %d, batch %d/%d: %s, lr %.3g, %.1f images/s, %.0f%% waiting for data, %s left',
                    self.epoch + 1, self.batch, self.steps, losses, rate, speed, 100 * wait, duration(left),
                )  # fmt: skip
            stop()
            if self.save_every and self.batch % self.save_every == 0 and self.batch < self.steps:
                self._save_state()

    def _next_step(self, batches: Iterator[Sample]) -> float:
        """Train on the next batch; returns its learning rate."""
        start = time.perf_counter()
        sample = next(batches)
        self.partial.waited += time.perf_counter() - start
        rate = self.rate(self.epoch, self.step)
        set_learning_rate(self.optimizer, rate)
        self.loss.scale_rates(rate / self.optimizer.defaults['lr'])
        torch.manual_seed(draw_seed(self.seed, self.step, parallel.rank()))
        self._note_replaced(sample.replaced)
        self.partial.add(self._step(*sample.flipped(self.model.device)))
        self.batch += 1
        self.step += 1
        self.samples += self.batch_size
        self.partial.seconds += time.perf_counter() - start
        return rate

    def _note_replaced(self, replaced: Tensor) -> None:
        """Count the samples of a batch whose image could not be used, and name each such image once."""
        count = sum(parallel.total([float(replaced.sum())]))
        if not count:
            return
        self.partial.replaced += int(count)
        own = [self.name_of(n) for n, bad in zip(parallel.part(self._numbers()), replaced, strict=True) if bad]
        names = {name for part in parallel.gather(own) for name in part}
        for name in sorted(names - self.unusable):
            log.warning('%s cannot be used: the next image takes its place.', name)
        self.unusable |= names

    def _evaluate(self, epochs: int) -> dict[str, Any]:
        """Scores after an epoch, of the averaged weights if there are any."""
        loss, rate = self.partial.means()['total'], self.rate(self.epoch, self.step - 1)
        log.info('Epoch %d/%d: loss %.5g, lr %.3g, %.0f s', self.epoch + 1, epochs, loss, rate, self.partial.seconds)
        if not self._weights_are_finite():
            raise UserError(f'The weights are no longer finite after epoch {self.epoch + 1}; {self._advice()}')
        self.run.keep_folder()
        with self.average.applied() if self.average else nullcontext():
            results = self.evaluate(self.epoch + 1)
        log.info('%s', table(results))
        return results

    def _finish_epoch(self, results: dict[str, Any]) -> None:
        """Enter an epoch and its scores in the log."""
        done, rate = self.partial, self.rate(self.epoch, self.step - 1)
        self.epoch += 1
        self.log.append({
            'epoch': self.epoch, 'step': self.step, 'samples': self.samples, 'lr': rate, 'loss': done.means(),
            'skipped': done.skipped, 'replaced': done.replaced, 'seconds': done.seconds,
            'images_per_second': self.batch * self.batch_size / done.seconds, 'wait': done.waited / done.seconds,
            'test': {name: {k: v for k, v in r.items() if k != 'images'} for name, r in results.items()},
        })  # fmt: skip
        self.batch, self.partial = 0, self._fresh()

    def _weights_are_finite(self) -> bool:
        return all(bool(value.isfinite().all()) for value in self.model.net.state_dict().values())

    def _step(self, lr: Tensor, hr: Tensor) -> dict[str, float] | None:
        """One step on a batch; its loss terms, or None if it was skipped."""
        self.optimizer.zero_grad(set_to_none=True)
        terms = torch.zeros(len(self.loss.names), device=self.model.device)
        parts = list(zip(lr.tensor_split(self.parts), hr.tensor_split(self.parts), strict=True))
        for i, (lr_part, hr_part) in enumerate(parts):
            with parallel.unsynchronised(self.model.run) if i < len(parts) - 1 else nullcontext():
                terms += self._gradients(lr_part, hr_part)
        values = dict(zip(self.loss.names, parallel.total(terms.tolist()), strict=True))
        values['total'] = sum(values[name] for name in self.loss.terms)
        if self._is_unusable(values['total']):
            return None
        self.scaler.unscale_(self.optimizer)
        if self.clip:
            torch.nn.utils.clip_grad_value_(self.model.net.parameters(), self.clip)
        if self.clip_norm:
            torch.nn.utils.clip_grad_norm_(self.model.net.parameters(), self.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average:
            self.average.update()
        return values

    def _gradients(self, lr: Tensor, hr: Tensor) -> Tensor:
        """Add the gradients of a part of a batch; returns its share of what the loss names, on the device."""
        share, low = len(lr) / self.batch_size, self.dtype != torch.float32
        with torch.autocast(self.model.device.type, self.dtype if low else torch.bfloat16, enabled=low):
            sr = self.model(lr)
        losses = self.loss(sr, self.model.to_range(hr))
        total = sum(losses.values(), torch.zeros((), device=self.model.device)) * share
        # The gradient is averaged over the processes, each of which has its share of the batch.
        self.scaler.scale(total * parallel.size()).backward()
        return torch.stack([*losses.values(), *self.loss.watched()]).detach() * share

    def _is_unusable(self, loss: float) -> bool:
        """Whether a batch is to be skipped for its loss.

        Raises:
            UserError: its loss is not finite, and nor are the weights, or it is one of many in a row.
        """
        self.not_finite = 0 if math.isfinite(loss) else self.not_finite + 1
        where = f'in epoch {self.epoch + 1}, on patches of {self._names()}'
        if self.not_finite and not self._weights_are_finite():
            raise UserError(f'The loss is {loss} {where}, and so are weights; {self._advice()}')
        if self.not_finite == MOST_NOT_FINITE:
            raise UserError(f'The loss is {loss} {where}, the {self.not_finite}th time in a row; {self._advice()}')
        totals = [record['loss']['total'] for record in self.log]
        learned = [total for total in totals if math.isfinite(total)]
        last = abs(learned[-1]) if learned else math.inf  # that of a GAN may be below 0
        if not self.not_finite and loss <= self.skip_threshold * last:
            return False
        log.warning('Batch skipped for its loss of %.4g: patches of %s.', loss, self._names())
        return True

    def _advice(self) -> str:
        if not self.saved:
            return 'start again with a lower --lr or a --gclip.'
        return f'{self.saved} is kept: --load {self.run.folder.name} continues it, with a lower --lr or a --gclip.'

    def _names(self) -> str:
        return ', '.join(dict.fromkeys(map(self.name_of, self._numbers())))

    def _numbers(self) -> range:
        """Samples of the batch under way."""
        return range(self.samples, self.samples + self.batch_size)
