"""The training loop: epochs, the log, and the state that a run continues from."""

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from torch import Tensor

from checkpoint import RunFolder
from data.traindata import Failure, Sample, WorkerDied, whole_batches
from error import NotFiniteError, UserError
from evaluation import table
from loss import Loss
from metric import METRICS
from model.loading.description import describe, described
from optimizer import Schedule, load_optimizer
from step import TrainStep
from system import parallel
from system.stopping import Stopped

log = logging.getLogger('frugalsr')


def draw_seed(seed: int, step: int, rank: int) -> int:
    """The seed of what a network draws at random in a step; each process has another one."""
    return int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0])


def duration(seconds: float) -> str:
    """A time as text: 1 d 02 h 03 min from an hour on, else 4 min 05 s."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f'{hours // 24} d {hours % 24:02d} h {minutes:02d} min' if hours else f'{minutes} min {rest:02d} s'


COUNTERS = ('epoch', 'batch', 'step', 'samples')
MOST_NOT_FINITE = 10  # batches in a row


@dataclass
class EpochStats:
    """What the batches of the epoch under way came to so far.

    Attributes:
        totals: sums over the learned batches of the loss terms, their total and the norm of the gradients.
        learned: number of batches that a step was made on.
        skipped: number of batches that were left out for their loss.
        replaced: number of samples whose image could not be used.
        seconds: that the epoch took so far.
        waited: seconds of them that it waited for data.
    """

    totals: dict[str, float]
    learned: int = 0
    skipped: int = 0
    replaced: int = 0
    seconds: float = 0.0
    waited: float = 0.0

    def add(self, values: dict[str, float] | None) -> None:
        """Count a batch with its values, or a skipped one."""
        if values is None:
            self.skipped += 1
            return
        self.learned += 1
        for name in self.totals:
            self.totals[name] += values[name]

    def means(self) -> dict[str, float]:
        """The mean of each total over the learned batches; nan if there are none."""
        return {name: total / self.learned if self.learned else math.nan for name, total in self.totals.items()}


@dataclass(frozen=True)
class Phase:
    """What a run is trained with from one epoch on, until the next phase begins.

    Attributes:
        begin: number of finished epochs with which it begins.
        patch_size: side of the HR patches in pixels.
        batch_size: samples a step, in all processes together.
        loss: between output and target.
    """

    begin: int
    patch_size: int
    batch_size: int
    loss: Loss

    def __str__(self) -> str:
        return f'{self.batch_size} HR patches of {self.patch_size} pixels a step, loss {"+".join(self.loss.terms)}'


@dataclass(frozen=True)
class TrainConfig:
    """How a run is trained.

    Attributes:
        phases: in their order; the first begins with the run.
        steps: steps in an epoch.
        schedule: learning rate of the next step, after numbers of finished epochs and finished steps.
        skip_threshold: a batch is skipped if its loss exceeds this times that of the last epoch.
        print_every: steps between lines in the log; on a GPU also between looks at what the steps came to.
        keep_all: keep the weights of every epoch.
        seed: of what a network draws in training, together with the number of the step.
        save_every: batches between states saved within an epoch; 0: only after each epoch.
        protocol: how epochs are scored; the best one is found among those since it last changed.
    """

    phases: Sequence[Phase]
    steps: int
    schedule: Schedule
    skip_threshold: float = 1e8
    print_every: int = 100
    keep_all: bool = False
    seed: int = 0
    save_every: int = 0
    protocol: Mapping[str, Any] = field(default_factory=dict)


class Trainer:
    """Trains a model; one epoch is a fixed number of steps, followed by an evaluation and a save.

    Args:
        config: how the run is trained.
        train_step: trains the model on a batch, made for the first phase.
        loader: gives the batches of a phase, of the sample numbers of a range.
        name_of: gives the name of the image that a sample number is cut from.
        evaluate: given the number of an epoch, scores the model after it.
        run: the folder that log, weights and state are written to.
        on_epoch_end: called with the record of each epoch, after it is saved.

    Attributes:
        phase: that the epoch under way belongs to.
        epoch, step, samples: how many epochs, steps and samples are done.
        batch: how many batches of the epoch under way are done.
        partial: what these batches came to.
        saved: what the latest state on the disk is of, as text for messages; empty if there is none.
        log: a record of each epoch that is done.
    """

    def __init__(
        self,
        config: TrainConfig,
        train_step: TrainStep,
        loader: Callable[[Phase, range], Iterable[Sample | Failure]],
        name_of: Callable[[int], str],
        evaluate: Callable[[int], dict[str, Any]],
        run: RunFolder,
        on_epoch_end: Callable[[dict[str, Any]], None] = lambda record: None,
    ) -> None:
        self.config, self.train_step, self.model = config, train_step, train_step.model
        self.loader, self.name_of, self.evaluate, self.run = loader, name_of, evaluate, run
        self.on_epoch_end = on_epoch_end
        self.phase = config.phases[0]
        self.epoch = self.step = self.samples = 0
        self.batch = 0
        self.partial = self._fresh()
        self.unread: list[tuple[range, Tensor, Tensor]] = []  # sample numbers, replaced, values of the last batches
        self.not_finite = 0  # how many batches in a row had a loss that is not finite
        self.unusable: set[str] = set()  # names of images that could not be read, each warned of once
        self.saved = self.saved_before = ''
        self.proven = True  # whether the latest state has led to a loss that a step was made on
        self.rewound = False  # whether --resume went back, and nothing is saved yet
        self.best_left = False  # whether it went back before the best epoch
        self.log: list[dict[str, Any]] = []

    def resume(self, state: dict[str, Any]) -> None:
        """Continue from a state that `state` gave; hyperparameters stay those of `optimizer`."""
        try:
            self._restore(state)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise UserError(
                f'The state in {self.run.folder} is not one that can be continued ({error!r}): start another run.'
            ) from error
        self.saved, self.proven = self._place(), False
        self.saved_before = 'the state before it' if self.run.holds_state_before() else ''

    def _restore(self, state: dict[str, Any]) -> None:
        step = self.train_step
        load_optimizer(step.optimizer, state['optimizer'])
        if step.ema and state['average']:
            step.ema.load(state['average'])
        if state['scaler']:
            step.scaler.load_state_dict(state['scaler'])
        for key in COUNTERS:
            setattr(self, key, state[key])
        self._enter_phase()
        step.loss.load_state_dict(state['loss'])
        self.log = state['log']
        fresh, self.partial = self._fresh().totals, EpochStats(**state['partial'])
        if self.partial.totals.keys() != fresh.keys():  # the terms of the loss have changed
            self.partial.totals, self.partial.learned = fresh, 0

    def rewind(self, epoch: int, log_of_run: list[dict[str, Any]]) -> None:
        """Continue after an earlier epoch, whose weights the model already has, with a fresh optimiser."""
        self.log = log_of_run
        self.best_left = self._best() > epoch
        self.log = log_of_run[:epoch]
        self.epoch, self.step, self.samples = epoch, self.log[-1]['step'], self.log[-1]['samples']
        self.saved, self.rewound = f'epoch {len(log_of_run)}', True

    def state(self) -> dict[str, Any]:
        """Everything that the run continues from: weights, optimiser, counters and log, as saved in state.pt."""
        step = self.train_step
        return {
            'model': described(self.model.net.state_dict(), describe(self.model)),
            'average': described(step.ema.state, describe(self.model)) if step.ema else None,
            'optimizer': step.optimizer.state_dict(),
            'loss': step.loss.state_dict(),
            'scaler': step.scaler.state_dict(),
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
        if self.log and self.log[-1].get('protocol', self.config.protocol) != self.config.protocol:
            log.info('Epochs are scored in another way than before: the best one is found among those to come.')
        batches = self._batches(epochs)
        while self.epoch < epochs:
            self._enter_phase()
            try:
                self._train_epoch(batches, epochs, stop)
                results = self._evaluate(epochs)
            except Stopped:
                self._read()
                self._save_state()
                return False
            self._leave_branch()
            self._finish_epoch(results)
            self.run.save_epoch(self.state(), self._is_best(self.epoch), self.config.keep_all)
            self._note_saved()
            self.on_epoch_end(self.log[-1])
        return True

    def _save_state(self) -> None:
        """Save what the run continues from within an epoch, unless the last batches or the weights are not finite."""
        if self.not_finite or not self._weights_are_finite():
            log.warning('Nothing is saved after batch %d, where losses or weights are not finite.', self.batch)
            return
        self._leave_branch()
        self.run.save_state(self.state())
        self._note_saved()

    def _note_saved(self) -> None:
        self.saved, self.saved_before, self.proven = self._place(), self.saved, False

    def _leave_branch(self) -> None:
        """Before a run that went back saves for the first time: take the later epochs out of the log and the best."""
        if self.rewound:
            if self.best_left:
                self.run.keep_best(self._best())
            self.run.write_log(self.log)
            self.rewound = False

    def _enter_phase(self) -> None:
        """Go on as the epoch under way asks for."""
        phase = [phase for phase in self.config.phases if phase.begin <= self.epoch][-1]
        if phase is self.phase:
            return
        self.phase = phase
        self.train_step.change(phase.loss, phase.batch_size)
        if self.batch == 0:
            self.partial = self._fresh()

    def _batches(self, epochs: int) -> Iterator[Sample]:
        """Batches, phase after phase; a loading process that died is replaced, once at one place."""
        died_at, in_epoch = -1, self.config.steps
        while True:
            end = min([epochs, *(phase.begin for phase in self.config.phases if phase.begin > self.epoch)])
            steps = (end - self.epoch) * in_epoch - min(self.batch, in_epoch)
            try:
                numbers = range(self.samples, self.samples + steps * self.phase.batch_size)
                yield from whole_batches(self.loader(self.phase, numbers))
            except WorkerDied as error:
                if self.samples == died_at:
                    raise UserError(
                        f'A loading process died again ({error}): if memory ran out, or shared memory (/dev/shm), give '
                        'a smaller --n_threads.'
                    ) from error
                died_at = self.samples
                log.warning('A loading process died (%s): loading starts again after batch %d.', error, self.batch)

    def _place(self) -> str:
        return f'epoch {self.epoch + 1}, batch {self.batch}' if self.batch else f'epoch {self.epoch}'

    def _fresh(self) -> EpochStats:
        return EpochStats(dict.fromkeys([*self.train_step.loss.names, 'total', 'gradient_norm'], 0.0))

    def _best(self) -> int:
        """The last epoch that was the best one up to it."""
        return max(epoch for epoch in range(1, len(self.log) + 1) if self._is_best(epoch))

    def _is_best(self, epoch: int) -> bool:
        """Whether no epoch up to this one had a better score, by the first metric, on the first test set.

        Epochs before the last change of protocol do not count; those from before it was noted pass for scored alike.
        """
        own, by = self.log[epoch - 1], METRICS[0]
        first, how = next(iter(own['test'])), own.get('protocol')
        before = takewhile(lambda other: other.get('protocol', how) == how, reversed(self.log[: epoch - 1]))
        rivals = [other['test'][first] for other in before if first in other['test']]
        return not any(by.is_better(rival[by.name], own['test'][first][by.name]) for rival in rivals)

    def _train_epoch(self, batches: Iterator[Sample], epochs: int, stop: Callable[[], None]) -> None:
        """Train until the epoch is complete, or `stop` raises."""
        self.model.net.train()
        config, title = self.config, f'Epoch {self.epoch + 1}/{epochs}'
        self.train_step.limit.fill_(self._limit())
        bar = parallel.progress(range(self.batch, config.steps), title, initial=self.batch, total=config.steps)
        for _ in bar:
            rate = self._next_step(batches)
            done, means = self.partial, self.partial.means()
            speed, wait = self.batch * self.phase.batch_size / done.seconds, done.waited / done.seconds
            bar.set_postfix_str(f'loss {means["total"]:.4g}, {speed:.1f} images/s, {wait:.0%} waiting', refresh=False)
            if self.batch % config.print_every == 0:
                losses = ', '.join(f'{name} {means[name]:.5g}' for name in self.train_step.loss.names)
                left = done.seconds / self.batch * ((epochs - self.epoch) * config.steps - self.batch)
                log.info(
                    'Epoch %d, batch %d/%d: %s, lr %.3g, %.1f images/s, %.0f%% waiting for data, %s left',
                    self.epoch + 1, self.batch, config.steps, losses, rate, speed, 100 * wait, duration(left),
                )  # fmt: skip
            stop()
            if config.save_every and self.batch % config.save_every == 0 and self.batch < config.steps:
                self._read()
                self._save_state()

    def _next_step(self, batches: Iterator[Sample]) -> float:
        """Train on the next batch; returns its learning rate."""
        start = time.perf_counter()
        sample = next(batches)
        self.partial.waited += time.perf_counter() - start
        rate = self.config.schedule(self.epoch, self.step)
        torch.manual_seed(draw_seed(self.config.seed, self.step, parallel.rank()))
        numbers = range(self.samples, self.samples + self.phase.batch_size)
        self.unread.append((numbers, sample.replaced, self.train_step(sample, rate, self.step)))
        self.batch += 1
        self.step += 1
        self.samples += self.phase.batch_size
        last = self.batch == self.config.steps
        if self.model.device.type != 'cuda' or last or self.batch % self.config.print_every == 0:
            self._read()
        self.partial.seconds += time.perf_counter() - start
        return rate

    def _read(self) -> None:
        """Take from the device what the last batches came to, and count it."""
        unread, self.unread = self.unread, []
        if not unread:
            return
        rows = torch.stack([values for *_, values in unread]).tolist()
        for (numbers, replaced, _), row in zip(unread, rows, strict=True):
            values = dict(zip(self.train_step.names, row, strict=True))
            if values['replaced']:
                self.partial.replaced += int(values['replaced'])
                self._name_replaced(numbers, replaced)
            self.partial.add(values if self._was_applied(numbers, values) else None)

    def _name_replaced(self, numbers: range, replaced: Tensor) -> None:
        """Name each image once that could not be used for a batch."""
        own = [self.name_of(n) for n, bad in zip(parallel.local_slice(numbers), replaced, strict=True) if bad]
        names = {name for part in parallel.gather(own) for name in part}
        for name in sorted(names - self.unusable):
            log.warning('%s cannot be used: the next image takes its place.', name)
        self.unusable |= names

    def _evaluate(self, epochs: int) -> dict[str, Any]:
        """Scores after an epoch, of the averaged weights if there are any."""
        loss, rate = self.partial.means()['total'], self.config.schedule(self.epoch, self.step - 1)
        log.info('Epoch %d/%d: loss %.5g, lr %.3g, %.0f s', self.epoch + 1, epochs, loss, rate, self.partial.seconds)
        if not self._weights_are_finite():
            raise UserError(f'The weights are no longer finite after epoch {self.epoch + 1}; {self._advice()}')
        self.run.keep_folder()
        ema = self.train_step.ema
        with ema.applied() if ema else nullcontext():
            try:
                results = self.evaluate(self.epoch + 1)
            except NotFiniteError as error:
                if self.model.dtype != torch.float32:  # which is said to be a cure
                    raise
                said = f'What the weights of epoch {self.epoch + 1} give is not finite'
                raise UserError(f'{said}; {self._advice()}') from error
        log.info('%s', table(results))
        return results

    def _finish_epoch(self, results: dict[str, Any]) -> None:
        """Enter an epoch and its scores in the log."""
        done, rate = self.partial, self.config.schedule(self.epoch, self.step - 1)
        self.epoch += 1
        loss = done.means()
        self.log.append({
            'epoch': self.epoch, 'step': self.step, 'samples': self.samples, 'lr': rate,
            'gradient_norm': loss.pop('gradient_norm'), 'loss': loss, 'loss_weights': self.train_step.loss.weights,
            'skipped': done.skipped, 'replaced': done.replaced, 'seconds': done.seconds,
            'images_per_second': self.batch * self.phase.batch_size / done.seconds, 'wait': done.waited / done.seconds,
            'protocol': dict(self.config.protocol),
            'test': {name: {k: v for k, v in r.items() if k != 'images'} for name, r in results.items()},
        })  # fmt: skip
        self.batch, self.partial = 0, self._fresh()

    def _weights_are_finite(self) -> bool:
        return all(bool(value.isfinite().all()) for value in self.model.net.state_dict().values())

    def _limit(self) -> float:
        """The loss above which a batch of this epoch is skipped, by epochs with the same loss."""
        weights = self.train_step.loss.weights
        totals = [record['loss']['total'] for record in self.log if record.get('loss_weights') == weights]
        learned = [total for total in totals if math.isfinite(total)]
        last = abs(learned[-1]) if learned else math.inf  # that of a GAN may be below 0
        return self.config.skip_threshold * last

    def _was_applied(self, numbers: range, values: dict[str, float]) -> bool:
        """Whether a step was made on a batch, or the batch skipped for its loss.

        Raises:
            UserError: its loss is not finite, and nor are the weights, or it is one of many in a row.
        """
        loss = values['total']
        self.not_finite = 0 if math.isfinite(loss) else self.not_finite + 1
        self.proven |= bool(values['applied'])
        where = f'in epoch {self.epoch + 1}, on patches of {self._names(numbers)}'
        if self.not_finite and not self._weights_are_finite():
            raise UserError(f'The loss is {loss} {where}, and so are weights; {self._advice()}')
        if self.not_finite == MOST_NOT_FINITE:
            raise UserError(f'The loss is {loss} {where}, the {self.not_finite}th time in a row; {self._advice()}')
        if values['applied']:
            return True
        if math.isfinite(loss) and loss <= self._limit():  # as in the first steps, until the factor fits
            log.info('Batch skipped, since its gradients exceed float16.')
        else:
            log.warning('Batch skipped for its loss of %.4g: patches of %s.', loss, self._names(numbers))
        return False

    def _advice(self) -> str:
        """What to do about a run that can't go on. A state that no finite loss has followed is given up for it."""
        if not self.proven:
            self.run.give_up_state()
            self.saved = self.saved_before
        if not self.saved:
            return 'start again with a lower --lr or a --gclip.'
        return f'{self.saved} is kept: --load {self.run.folder.name} continues it, with a lower --lr or a --gclip.'

    def _names(self, numbers: range) -> str:
        """The names of the images that samples are cut from, each once, as text."""
        return ', '.join(dict.fromkeys(map(self.name_of, numbers)))
