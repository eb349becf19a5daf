"""--profile --against: networks beside their exported files in other engines, by turns, on a CPU.

Each engine has a process of its own, in which freed memory is kept as in this program. All compute in float32, with the
same number of threads, and enlarge the same images. Times are in seconds.
"""

import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import torch

from error import UserError
from export import FREE, Enlarger, fixed, load_onnx, to_onnx
from export import attempt as try_export
from measure.costs import Row, begin_apart
from measure.speed import Form, attempt, make, spread

SIZES = ((64, 64), (128, 128), (180, 320))  # height and width of an LR image
OURS = 'FrugalSR'
TURNS, CALLS = 5, 2  # measured calls of a turn come after one more, by which an engine finds its memory again
PAUSE = 1.0  # seconds before a turn: those of OpenVINO go on looking for work for some tenths after theirs

Enlarge = Callable[[np.ndarray], np.ndarray]


class Task(NamedTuple):
    """What an engine is to run: an ONNX file of a network at a scale, images of a shape, a number of threads."""

    name: str
    scale: int
    file: bytes
    shape: tuple[int, ...]
    threads: int


def ours(task: Task) -> Enlarge:
    """The network itself, as this program runs it."""
    net = enlarger(task.name, task.scale)

    @torch.inference_mode()
    def enlarge(images: np.ndarray) -> np.ndarray:
        return net(torch.from_numpy(images)).numpy()

    return enlarge


def onnxruntime(task: Task) -> Enlarge:
    """ONNX Runtime, the whole of its optimisations."""
    engine: Any = import_module('onnxruntime')
    options = engine.SessionOptions()
    options.intra_op_num_threads = task.threads
    options.log_severity_level = 4  # what fails is told once, by this program
    session = engine.InferenceSession(task.file, options, providers=['CPUExecutionProvider'])
    return lambda images: session.run(None, {'lr': images})[0]


def openvino(task: Task) -> Enlarge:
    """OpenVINO; it is faster if told of the shape, and would take bfloat16 where a CPU has that."""
    engine: Any = import_module('openvino')
    network = engine.Core().read_model(task.file)
    network.reshape(list(task.shape))
    settings = {'INFERENCE_NUM_THREADS': task.threads, 'INFERENCE_PRECISION_HINT': 'f32', 'PERFORMANCE_HINT': 'LATENCY'}
    run = engine.Core().compile_model(network, 'CPU', settings)
    return lambda images: run(images)[0]


ENGINES: dict[str, Callable[[Task], Enlarge]] = {OURS: ours, 'onnxruntime': onnxruntime, 'openvino': openvino}


def parse_engines(text: str, device: str) -> list[str]:
    """Names of engines, joined by '+'.

    Raises:
        UserError: there is no such engine, a package is missing, or this program runs on another device than a CPU.
    """
    if device != 'cpu':
        raise UserError(f'--against {text}: engines are compared on a CPU, and this runs on {device}; give --cpu.')
    engines = text.split('+')
    known = [name for name in ENGINES if name != OURS]
    for engine in engines:
        if engine not in known:
            raise UserError(f'--against {text}: {engine!r} is none of {", ".join(known)}; join these by +.')
    for package in ('onnx', 'onnxruntime', *engines):  # two that make a file, and check it
        if find_spec(package) is None:
            raise UserError(f'--against {text}: {package} is not installed; pip install {package} gets it.')
    return engines


def beside_engines(reports: Iterator[Row], engines: Sequence[str], say: Callable[..., None]) -> Iterator[Row]:
    """Reports of --profile, with the engines in the last of their networks.

    'against' has for each size of an LR image ('320x180') the times of FrugalSR and of each engine, as spreads or None,
    and 'failed' says why there is none.
    """
    for report in reports:
        row = report['networks'][-1]
        name, scale = row['model'], row['scale']
        say('%s x%d beside %s', name, scale, ' and '.join(engines))
        files = attempt(onnx_files, name, scale)
        row['against'] = {}
        for height, width in SIZES:
            size = f'{width}x{height}'
            file = files if isinstance(files, str) else files[size]
            if isinstance(file, str):
                row['failed'][f'ONNX file for {size}'] = file
                continue
            task = Task(name, scale, file, (1, 3, height, width), torch.get_num_threads())
            row['against'][size], failed = by_turns(task, [OURS, *engines])
            row['failed'] |= {f'{engine} {size}': why for engine, why in failed.items()}
        yield report


@torch.no_grad()
def enlarger(name: str, scale: int) -> Enlarger:
    """A network with new weights, always the same, no two of them equal: PyTorch's exporter loses some of those."""
    net = Enlarger(make(name, scale, 'cpu', Form())[0]).eval()
    for weight in net.parameters():
        weight.add_(torch.randn_like(weight), alpha=1e-3)
    return net


def onnx_files(name: str, scale: int) -> dict[str, bytes | str]:
    """ONNX files by size of the LR image, one for all where that can be, or why there is none."""
    net = enlarger(name, scale)
    file, fault = try_export(net, to_onnx, load_onnx, FREE)
    found: dict[str, bytes | str] = {}
    for height, width in SIZES:
        if fault:
            file, why = try_export(net, to_onnx, load_onnx, fixed(height, width))
            found[f'{width}x{height}'] = why or file
        else:
            found[f'{width}x{height}'] = file
    return found


def by_turns(task: Task, engines: Sequence[str]) -> tuple[dict[str, Row | None], dict[str, str]]:
    """Spreads of the seconds of each engine, and why those that are None could not be measured."""
    times: dict[str, list[float]] = {engine: [] for engine in engines}
    failed: dict[str, str] = {}
    with ExitStack() as stack:
        context = multiprocessing.get_context('spawn')
        processes = {engine: stack.enter_context(ProcessPoolExecutor(1, context, begin_apart)) for engine in engines}

        def ask(engine: str, work: Callable[..., Any], *given: object) -> Any:
            """What `work(*given)` gives in the process of an engine; [] where it or what came before failed."""
            if engine not in failed:
                try:
                    return processes[engine].submit(work, *given).result()
                except Exception as error:  # engines raise nearly anything, or end
                    failed[engine] = (str(error).splitlines() or [type(error).__name__])[0].rstrip('.')
            return []

        for engine in engines:
            ask(engine, begin, engine, task)
        for _ in range(TURNS):
            for engine in engines:
                time.sleep(PAUSE)
                times[engine] += ask(engine, turn)
    return {engine: None if engine in failed else spread(found) for engine, found in times.items()}, failed


# In the process of an engine

_running: list[tuple[Enlarge, np.ndarray]] = []


def begin(engine: str, task: Task) -> None:
    """Have this process run a task."""
    torch.set_num_threads(task.threads)
    images = np.random.default_rng(0).random(task.shape, np.float32)
    _running.append((ENGINES[engine](task), images))


def turn() -> list[float]:
    """Seconds of some calls in a row."""
    enlarge, images = _running[0]
    enlarge(images)
    times = []
    for _ in range(CALLS):
        start = time.perf_counter()
        enlarge(images)
        times.append(time.perf_counter() - start)
    return times
