"""The run folder: options, log, metrics, curves, results, weights and the state a run continues from.

config.txt      the resolved options
log.txt         for people
metrics.jsonl   for machines: one line an epoch
results.json    the last evaluation
report.html     all of it on one page
loss.png, gradient_norm.png, test_<Set>.png, comparison-<Set>.png
model/          model_latest.pt, model_best.pt, model_<epoch>.pt
state.pt        everything a run continues from: weights and their average, optimiser, counters, log, options
state_before.pt the state before it
lock            locked while a process trains here
results-<Set>/  images
tensorboard/    event files, where TensorBoard is installed
"""

import contextlib
import io
import json
import logging
import math
import os
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
from tqdm import tqdm

from data.outputs import KINDS, SOURCE
from data.source import name_warnings
from error import UserError
from report import picture
from system import parallel
from system.files import lock_file, read_torch, rename, sweep, write_atomic

log = logging.getLogger('frugalsr')

STATES = ('state.pt', 'state_before.pt')
STATE = {
    'model', 'average', 'optimizer', 'scaler', 'loss', 'epoch', 'batch', 'partial', 'step', 'samples', 'log', 'options',
}  # fmt: skip

OURS = (
    *STATES,
    'config.txt',
    'log.txt',
    'metrics.jsonl',
    'results.json',
    'report.html',
    'loss.png',
    'gradient_norm.png',
)


def finite(value: Any) -> Any:
    """`value` with null for every number that JSON does not know (infinite or not a number)."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def serialized(content: object) -> memoryview:
    """Tensors and plain values in PyTorch's file format."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getbuffer()


class RunFolder:
    """Files of one run, below `folder`; `config` is the text of its config.txt. Without `writes` nothing is written."""

    def __init__(self, folder: Path, writes: bool = True) -> None:
        self.folder, self.models, self.writes = folder, folder / 'model', writes
        self.config = ''
        self._lock: IO[str] | None = None

    def holds_training(self) -> bool:
        """Whether a training run left its state here."""
        return any((self.folder / name).exists() for name in STATES)

    def holds_state_before(self) -> bool:
        """Whether the state before the latest is here too."""
        return all((self.folder / name).exists() for name in STATES)

    def clear(self) -> None:
        """Delete what a run leaves, and nothing else.

        Raises:
            UserError: a file could not be deleted.
        """
        if not self.writes:
            return
        try:
            self._clear()
        except OSError as error:
            raise UserError(f'{error.filename} could not be deleted ({error.strerror}): see to it.') from error

    def _clear(self) -> None:
        for name in OURS:
            (self.folder / name).unlink(missing_ok=True)
        images = (f'results-*/{name}' for name in (*(f'*_x*_{kind}.png' for kind in KINDS), SOURCE))
        for pattern in ('test_*.png', 'comparison-*.png', 'model/model_*.pt', 'tensorboard/events.*', *images):
            for path in list(self.folder.glob(pattern)):
                path.unlink()
        for path in [self.models, self.folder / 'tensorboard', *self.folder.glob('results-*')]:
            with contextlib.suppress(OSError):  # not a folder, or a stranger's file is in it
                path.rmdir()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Within this block no other process can train here, however this one ends.

        Raises:
            UserError: another one is at it, or the folder cannot be written.
        """
        if self.writes:
            self._take_lock()
        try:
            yield
        finally:
            if self._lock:
                self._lock.close()
                self._lock = None

    @contextlib.contextmanager
    def _made(self) -> Iterator[None]:
        """The folder, made if need be, for a file to be opened in within this block."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            yield
        except OSError as error:
            raise UserError(
                f'The run folder {self.folder} cannot be written ({error.strerror}): choose another --save or '
                '--save_dir.'
            ) from error

    def _take_lock(self) -> None:
        with self._made():
            file = self._lock = (self.folder / 'lock').open('a')
        try:
            lock_file(file)
        except (BlockingIOError, PermissionError) as error:
            raise UserError(
                f'{self.folder} is being trained by another process: wait for it, or choose another --save.'
            ) from error
        except OSError as error:
            raise UserError(f'{self.folder} cannot be locked ({error.strerror}): choose another --save_dir.') from error

    def saved_by_this_launch(self) -> bool:
        """Whether the state here is of the same launch of several processes as this one, after a restart perhaps."""
        there = self.holds_training() and self.load_state().get('launch')
        return parallel.broadcast(there == parallel.launch_name())  # the first process has saved it

    def keep_folder(self) -> None:
        """Make the folder again if it was deleted under the run.

        Raises:
            UserError: another run was started there since.
        """
        if not self._lock:
            return
        try:
            now = (self.folder / 'lock').stat()
        except FileNotFoundError:
            self._lock.close()
            self._take_lock()
            self.start_log()
            log.warning('%s was deleted under the run and is made again, without what was kept in it.', self.folder)
            return
        if not os.path.samestat(os.fstat(self._lock.fileno()), now):
            raise UserError(f'{self.folder} was deleted under this run, and another one was started in it: end one.')

    def start_log(self) -> None:
        """Send the program's messages to log.txt as well as to the screen, with those that there were before.

        What a killed run left aside is deleted.
        """
        if not self.writes:
            return
        with self._made():
            log_file = logging.FileHandler(self.folder / 'log.txt', encoding='utf-8', errors='backslashreplace')
        for earlier in log.handlers:
            if isinstance(earlier, Remembered):
                for record in earlier.records:
                    log_file.handle(record)
        log.handlers = [*(h for h in log.handlers if not isinstance(h, logging.FileHandler | Remembered)), log_file]
        for folder in (self.folder, self.models, *self.folder.glob('results-*')):
            sweep(folder)

    def write(self, name: str, text: str) -> None:
        """Write a text file."""
        if self.writes:
            write_atomic(self.folder / name, text.encode())

    def write_bytes(self, name: str, content: bytes) -> None:
        """Write any other file."""
        if self.writes:
            write_atomic(self.folder / name, content)

    def write_results(self, results: dict[str, Any]) -> None:
        """Write results.json."""
        self.write('results.json', json.dumps(finite(results), indent=1) + '\n')

    def save_epoch(self, state: dict[str, Any], best: bool, keep: bool) -> None:
        """Write everything that an epoch leaves: weights, state, metrics and curves.

        Args:
            state: with 'model' (state dict), 'average' (another, or None), 'epoch' and 'log' (one record an epoch).
            best: these are the best weights so far.
            keep: keep the weights of this epoch under its number.
        """
        if not self.writes:
            return
        self.keep_folder()
        names = ['latest', *(['best'] if best else []), *([str(state['epoch'])] if keep else [])]
        weights = serialized(state['average'] or state['model'])
        for name in names:
            write_atomic(self.models / f'model_{name}.pt', weights)
        self.save_state(state)
        self.write_log(state['log'])

    def write_log(self, records: list[dict[str, Any]]) -> None:
        """Write metrics and curves of the epochs of a run."""
        self.write('metrics.jsonl', ''.join(json.dumps(finite(record)) + '\n' for record in records))
        if not self.writes:
            return
        for name, draw in picture.curves(records).items():
            try:
                picture.save(self.folder / name, draw)
            except UserError as error:  # no reason to end a run
                log.warning('%s', error)

    def save_state(self, state: dict[str, Any]) -> None:
        """Write what the run continues from; the state before it is kept beside it."""
        if not self.writes:
            return
        self.keep_folder()
        self.write('config.txt', self.config)
        content = serialized(state | {'options': self.config, 'launch': parallel.launch_name()})
        latest, before = (self.folder / name for name in STATES)
        write_atomic(latest, content, before if zipfile.is_zipfile(latest) else None)  # not a torn one

    def give_up_state(self) -> None:
        """Let the state before the latest take its place, if there is one: the latest led to nothing."""
        if not self.writes:
            return
        latest, before = (self.folder / name for name in STATES)
        if before.exists():
            rename(before, latest)
        else:
            latest.unlink(missing_ok=True)

    def keep_best(self, epoch: int) -> None:
        """Make the kept weights of `epoch` the best ones; without them there are none until an epoch is better."""
        path, best = self.models / f'model_{epoch}.pt', self.models / 'model_best.pt'
        if not self.writes:
            return
        if path.is_file():
            write_atomic(best, path.read_bytes())
        elif best.is_file():
            best.unlink()
            log.warning(
                '%s was of a later epoch and is removed; those of epoch %d, the best, were not kept.', best, epoch
            )

    def load_state(self) -> dict[str, Any]:
        """What `save_state` wrote last; if that is missing or damaged, what it wrote before.

        Raises:
            UserError: no state, both damaged, or not this program's.
        """
        paths = [path for name in STATES if (path := self.folder / name).exists()]
        if not paths:
            raise UserError(
                f'{self.folder} holds no state (state.pt) to continue from: train it first, without --load.'
            )
        try:
            state = read_state(paths[0])
        except UserError as error:
            if len(paths) == 1:
                raise
            log.warning('%s The state before it is taken.', error)
            return read_state(paths[1])
        if paths[0].name != STATES[0]:
            log.warning('%s is missing: the state before it is taken.', self.folder / STATES[0])
        return state


def read_state(path: Path) -> dict[str, Any]:
    """One state file."""
    state = read_torch(path)
    if not isinstance(state, dict) or not state.keys() >= STATE or not isinstance(state['model'], dict):
        raise UserError(f'{path} is not a state of this program: name another run with --load.')
    if not all(bool(value.isfinite().all()) for value in state['model'].values()):
        raise UserError(f'{path} holds weights that are not finite: name another run with --load.')
    return state


class Remembered(logging.Handler):
    """The first messages of the program, for a log.txt that is begun after them."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        if len(self.records) < 1000:  # a program without a run folder may say much
            if record.exc_info:  # as text, or the traceback would keep what was in memory then
                record.exc_text = logging.Formatter().formatException(record.exc_info)
                record.exc_info = None
            self.records.append(record)


class Screen(logging.StreamHandler):
    """Writes each message in place of a progress bar, which goes on below it."""

    def emit(self, record: logging.LogRecord) -> None:
        """As in the base class."""
        with tqdm.external_write_mode(self.stream):
            super().emit(record)


def start_screen(quiet: bool = False) -> None:
    """Send the program's messages to standard output, or nowhere; warnings on image files are among them."""
    log.setLevel(logging.INFO)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors='backslashreplace')  # a line with a name that it cannot show would be lost
    log.handlers = [logging.NullHandler() if quiet else Screen(sys.stdout), Remembered()]
    name_warnings()
    log.propagate = False
    logging.raiseExceptions = False  # a log on a full disk is no reason to stop, nor for a traceback a line
