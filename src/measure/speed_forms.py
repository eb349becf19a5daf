"""--profile with --forms: networks by several forms of running, all in one process, as it is done on a GPU.

A process for each network, as `speed` has them on a CPU, would cost a GPU seconds every time. Networks go one after
another, light ones first, and what fails is named and left out. Times of a GPU are those between events on it. Units
are those of `speed`.
"""

import gc
import multiprocessing
import os
import signal
import tempfile
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.nn.functional import conv2d
from torch.optim import Adam
from torch.profiler import profile, supported_activities

from error import UserError, out_of_memory
from measure.costs import Row, begin_apart, input_size, multiply_adds, timed
from measure.speed import (
    BATCH,
    KINDS,
    MEMORY,
    PATIENCE,
    TIMES,
    Form,
    call_of,
    clocked,
    images_for,
    kind,
    lr_patch,
    make,
    spread,
    step_of,
)
from model import Model, type_name
from system import memory
from system.machine import machine
from system.numerics import precision

LIGHT = (
    'ASID', 'ATD-light', 'DLGSANet-tiny', 'LCoAN', 'OmniSR', 'SwinIR-light', 'CATANet', 'HiT-SRF', 'PFT-light',
    'DLGSANet-light', 'ASIDd8', 'EDSR-baseline', 'ESC', 'ESC-light', 'ESC-FP', 'IMDN', 'PAN', 'BSRN',
)  # fmt: skip
HEAVY = ('DLGSANet', 'NLSN', 'RCAN', 'EDSR', 'ATD')
MOST = (20, 50)  # warm-ups and runs of a measurement, if they fit in its seconds
LATENCY, STEP = 0.7, 0.5  # seconds of a measurement of latency, and of a training step
SLOW = 0.5  # seconds of a call from which on fewer runs have to do
GPU_BATCH, GPU_PATCH = 16, 64  # of a training step on a GPU
CPU_SIDES = (2048, 128, 1)  # of the gauge: side of the matrices; of the image, and its channels; batch
GPU_SIDES = (8192, 256, 16)
COPIED = {'cuda': 2**28}  # float32 values of a copy, far more than a cache holds; elsewhere 2**26
TOP = 3  # operations that are named
DEFAULT = 'float32+tf32+bf16+graph+bf16-graph'  # on a GPU


def parse_forms(text: str, device: str) -> dict[str, Form]:
    """Forms by name, from words joined by '-' and names joined by '+'.

    Raises:
        UserError: there is no such form, or not on this device.
    """
    forms = {name: Form.parse(name) for name in text.split('+')}
    for name, form in forms.items():
        if device != 'cuda' and (form.graph or form.tf32):
            raise UserError(f'--forms {name}: CUDA graphs and TF32 are of GPUs of NVIDIA, and this runs on {device}.')
    return forms


def ordered(pairs: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
    """Networks and scales, light networks first."""
    order = [*LIGHT, *HEAVY]
    return sorted(pairs, key=lambda pair: order.index(pair[0]) if pair[0] in order else len(order))


# Time and memory


def clock(call: Callable[[], object], device: str, runs: int) -> list[float]:
    """Seconds of some calls in a row; on a GPU between events, without waiting for it in between."""
    if device != 'cuda':
        return [timed(call, device) for _ in range(runs)]
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(runs + 1)]
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in pairwise(marks)]


def plan(seconds: float, budget: float) -> tuple[int, int]:
    """How many warm-ups and runs of so many seconds a measurement of `budget` seconds has."""
    fitting = int(budget / max(seconds, 1e-9))
    least = (1, 3) if seconds > SLOW else (2, 5)
    most_warm_ups, most_runs = MOST
    warm_ups = fitting * most_warm_ups // (most_warm_ups + most_runs)
    return min(max(warm_ups, least[0]), most_warm_ups), min(max(fitting - warm_ups, least[1]), most_runs)


def measure(call: Callable[[], object], device: str, budget: float) -> Row:
    """Spread of the seconds of a call, and of how many runs; two more before choose kernels and tell how many fit."""
    timed(call, device)
    with alone(device):
        warm_ups, runs = plan(timed(call, device), budget)
        clock(call, device, warm_ups)
        return {'seconds': spread(clock(call, device, runs)), 'runs': runs}


@contextmanager
def alone(device: str) -> Iterator[None]:
    """Within this block no other program that profiles measures on a GPU of this host: they take turns.

    What comes before a measurement takes far longer than it, for a GPU's libraries build the kernels of every new shape
    one by one on the host. Several programs share that work, each with networks of its own.
    """
    if device != 'cuda' or os.name == 'nt':
        yield
        return
    import fcntl

    with (Path(tempfile.gettempdir()) / f'frugalsr-profile-{os.getuid()}.lock').open('w') as file:
        fcntl.lockf(file, fcntl.LOCK_EX)  # until it is closed
        yield


@contextmanager
def watched(device: str, model: Model) -> Iterator[Callable[[], float | None]]:
    """Gives what tells the peak memory of a GPU since now, in bytes, weights included.

    Of a host it is not known: what one form leaves to the process is where the next one lies.
    """
    weights = sum(tensor.nbytes for tensor in model.net.state_dict().values())
    free(device)
    before = memory.start_peak(device)

    def peak() -> float | None:
        after = memory.peak(device)
        known = device != 'cpu' and before is not None and after is not None
        return weights + after - before if known else None

    yield peak


def free(device: str) -> None:
    """Give back what no tensor needs."""
    if device == 'cuda':
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()


# CUDA graphs


def captured(call: Callable[[Tensor], Any], images: Tensor) -> Callable[[], Any]:
    """What replays a call on `images` as a CUDA graph, and gives its result, always in the same memory.

    Warm-ups on another stream come first. In the last of them what would wait for the GPU, or would have it wait, is an
    error, since a graph cannot hold it; so nothing is captured that is known to fail.

    Raises:
        UserError: it cannot be captured, and why.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call(images)
        torch.cuda.synchronize()
        with no_waiting():
            call(images)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()

    graph = torch.cuda.CUDAGraph()
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    spare = generator.clone_state()
    try:
        with torch.cuda.stream(side):
            graph.capture_begin()
            try:
                result = call(images)
            finally:
                graph.capture_end()  # of a capture that failed it fails too
    except Exception as error:
        with suppress(Exception):
            generator.graphsafe_set_state(spare)  # the one that was captured would refuse to go on
        raise UserError(f'it cannot be captured: {reason(error)}') from error
    torch.cuda.synchronize()

    def replay() -> Any:
        graph.replay()
        return result

    return replay


@contextmanager
def no_waiting() -> Iterator[None]:
    """Within this block what waits for the GPU is an error.

    Raises:
        UserError: what and where it was.
    """
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode('error')
    try:
        yield
    except Exception as error:
        if out_of_memory(error):
            raise
        raise UserError(f'it cannot be captured: {reason(error)}') from error
    finally:
        torch.cuda.set_sync_debug_mode(before)


def reason(error: BaseException) -> str:
    """The first of the errors that led to one, by its first line, and the last line of a network that it came from."""
    while error.__context__ is not None:
        error = error.__context__
    places = [frame for frame in traceback.extract_tb(error.__traceback__) if '/model/' in frame.filename]
    where = f' ({places[-1].filename.rpartition("/")[2]}, line {places[-1].lineno})' if places else ''
    return f'{type(error).__name__}: {(str(error).splitlines() or [""])[0]}{where}'


# What is measured


@torch.inference_mode()
def gauge(device: str, forms: Mapping[str, Form]) -> Row:
    """The ceilings, as `speed.gauge` has them; 'tf32' beside the types. Convolutions in the better of both layouts."""
    side, channels, batch = GPU_SIDES if device == 'cuda' else CPU_SIDES

    def rates(amount: float, call: Callable[[], object]) -> Row:
        timed(call, device)
        with alone(device):
            return spread([amount / seconds for seconds in clock(call, device, 10)[2:]])

    found = {}
    named = {key: form for form in (Form(), *forms.values()) for key in ceilings_of(form)}
    for key, form in named.items():
        dtype = torch.float32 if key == 'tf32' else getattr(torch, key)
        with precision(form.tf32):
            matrix = torch.rand(side, side, device=device, dtype=dtype)
            tried = [rates(2 * side**3, partial(torch.mm, matrix, matrix))]
            del matrix
            for layout in (torch.contiguous_format, torch.channels_last):
                image = torch.rand(batch, channels, channels, channels, device=device, dtype=dtype)
                kernel = torch.rand(channels, channels, 3, 3, device=device, dtype=dtype)
                image, kernel = (x.contiguous(memory_format=layout) for x in (image, kernel))
                call = partial(conv2d, image, kernel, padding=1)
                tried.append(rates(2 * 9 * batch * channels**4, call))
            del image, kernel, call
        found[key] = max(tried, key=lambda rate: rate['median'])
        free(device)
    source, target = torch.rand(2, COPIED.get(device, 2**26), device=device)
    return found | {'copy': rates(2 * source.nbytes, partial(target.copy_, source))}


def ceilings_of(form: Form) -> list[str]:
    """The ceilings that a form may be held against."""
    return ['tf32' if form.tf32 else 'float32', *map(type_name, form.dtypes)]


def ceiling_of(form: Form, dtype: torch.dtype) -> str:
    """The ceiling of a network that computes in `dtype`."""
    return 'tf32' if form.tf32 and dtype == torch.float32 else type_name(dtype)


def latency(model: Model, form: Form, images: Tensor, expected: Tensor, plain: bool) -> Row:
    """Latency, peak memory, and the greatest difference from `expected`, as a share of its greatest value.

    Of a graph also the difference from the same without one; with `plain`, what the time goes into.
    """
    device, call = model.device.type, call_of(model, form)
    with torch.inference_mode(), precision(form.tf32), watched(device, model) as peak:
        run = captured(call, images) if form.graph else partial(call, images)
        found = measure(run, device, LATENCY)
        row: Row = {'latency': found['seconds'], 'runs': found['runs'], 'memory': peak()}
        row['difference'] = difference(run(), expected)
        if form.graph:
            row['graph_difference'] = difference(run(), call(images).float())
        return row | (parts_of(run, device, row['latency']) if plain else {})


def step(model: Model, form: Form, images: Tensor, plain: bool) -> Row:
    """Seconds and peak memory of a training step; with `plain`, what the time goes into."""
    device = model.device.type
    with precision(form.tf32), watched(device, model) as peak:
        optimizer = Adam(
            [p for p in model.parameters() if p.requires_grad], 1e-4, fused=device == 'cuda', capturable=form.graph
        )
        try:
            call = step_of(call_of(model, form), optimizer)
            run = captured(call, images) if form.graph else partial(call, images)
            found = measure(run, device, STEP)
            row = {'step': found['seconds'], 'step_runs': found['runs'], 'step_memory': peak()}
            parts = parts_of(run, device, row['step']) if plain else {}
            return row | {f'step_{key}': value for key, value in parts.items()}
        finally:
            optimizer.zero_grad()


def difference(found: Tensor, expected: Tensor) -> float:
    """The greatest difference of values, as a share of the greatest expected one."""
    return float((found.float() - expected).abs().max() / expected.abs().max())


def parts_of(call: Callable[[], object], device: str, seconds: Row) -> Row:
    """Shares of the time by kind, the share of `seconds` in which a GPU is idle, and what takes longest."""
    operations, kernels = operations_of(call, device)
    busy = sum(operations.values()) or 1e-9
    kinds = dict.fromkeys(KINDS, 0.0)
    for name, taken in operations.items():
        kinds[kind(name)] += taken / busy
    idle = max(0.0, 1 - busy / seconds['median']) if device == 'cuda' else None
    return {'kinds': kinds, 'idle': idle, 'operations': longest(operations), 'kernels': longest(kernels)}


def longest(seconds: Mapping[str, float]) -> list[list]:
    """Names and seconds of what takes longest."""
    return [[name, taken] for name, taken in Counter(seconds).most_common(TOP)]


def operations_of(call: Callable[[], object], device: str) -> tuple[Mapping[str, float], Mapping[str, float]]:
    """Seconds of a call by operation and by kernel; without a GPU those of the CPU, and no kernels.

    From the profiler's records themselves: its own sums take long for networks of some ten thousand kernels.
    """
    if device != 'cuda':
        return clocked(call), {}
    with alone(device), profile(activities=supported_activities()) as profiler:
        call()
        torch.cuda.synchronize()
    return sums_of(profiler.profiler.kineto_results.events())


def sums_of(records: Sequence[Any]) -> tuple[Mapping[str, float], Mapping[str, float]]:
    """Seconds on a GPU by operation and by kernel, of the profiler's records.

    A record on the GPU names the operation that it belongs to, and so does the call that started it; operations
    themselves name none. What the program marks is drawn on the GPU a second time.
    """
    on_gpu = [record for record in records if record.device_type() == DeviceType.CUDA]
    on_cpu = [record for record in records if record.device_type() == DeviceType.CPU]
    calls = ('cu', 'Activity Buffer', 'Lazy', 'Runtime')  # of the driver
    names = {
        record.correlation_id(): record.name()
        for record in on_cpu
        if not record.linked_correlation_id() and not record.name().startswith(calls)
    }
    marks = set(names.values())
    by_operation: dict[str, float] = defaultdict(float)
    by_kernel: dict[str, float] = defaultdict(float)
    for record in on_gpu:
        if record.name() not in marks:
            by_operation[names.get(record.linked_correlation_id(), record.name())] += record.duration_ns() / 1e9
            by_kernel[record.name()] += record.duration_ns() / 1e9
    return by_operation, by_kernel


# All of it


@contextmanager
def counted(pairs: Sequence[tuple[str, int]]) -> Iterator[Callable[[str, int], int]]:
    """Gives the multiply-adds of networks, which other processes count meanwhile: together they take a minute."""
    with multiprocessing.get_context('spawn').Pool(3, _begin_counting) as pool:
        work = {pair: (*pair, *input_size(pair[1])) for pair in pairs}
        counts = {pair: pool.apply_async(multiply_adds, given) for pair, given in work.items()}

        def count(*pair: Any) -> int:
            try:
                return counts[pair].get(PATIENCE)
            except multiprocessing.TimeoutError:  # a process that was killed takes its work along
                return multiply_adds(*work[pair])

        yield count


def _begin_counting() -> None:
    """What a process that counts does first: leave Ctrl-C to the one that started it, with which it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    begin_apart()


def profile_forms(
    pairs: Sequence[tuple[str, int]], device: str, forms: Mapping[str, Form], say: Callable[..., None]
) -> Iterator[Row]:
    """Everything measured so far, after each network at each scale; training at the first scale of each alone."""
    os.environ.setdefault('KINETO_LOG_LEVEL', '99')  # or the profiler says when it starts and stops
    pairs = ordered(pairs)
    with counted(pairs) as count:
        say('Ceiling of arithmetic')
        report: Row = {
            **machine(device),
            'threads': torch.get_num_threads(),
            'form': '+'.join(forms),
            'batch': GPU_BATCH if device == 'cuda' else BATCH,
            'ceiling': gauge(device, forms),
            'networks': [],
        }
        trained: set[str] = set()
        for name, scale in pairs:
            say('%s x%d', name, scale)
            row = measure_forms(name, scale, device, forms, train=name not in trained)
            trained.add(name)
            rate(row, forms, report['ceiling'], count(name, scale))
            report['networks'].append(row)
            for line in summary(row):
                say('%s', line)
            yield report


def measure_forms(name: str, scale: int, device: str, forms: Mapping[str, Form], train: bool) -> Row:
    """All figures of one network at one scale: 'forms' has them by form, and the row itself those of the first."""
    row: Row = {'model': name, 'scale': scale, 'multiply_adds': 0, 'growth': [], 'failed': {}, 'forms': {}}
    row |= dict.fromkeys(('dtype', 'latency', 'kinds', 'rate', 'share', 'patch', *TIMES, *MEMORY))
    models: dict[tuple[bool, bool], Model] = {}

    def model_for(form: Form) -> Model:
        key = (form.compiled, form.channels_last)
        if key not in models:
            models[key] = make(name, scale, device, form)[0]
        return models[key]

    def attempt(what: str, work: Callable[[], Row]) -> None:
        try:
            row['forms'][form_name] |= work()
        except Exception as error:
            row['failed'][what] = 'memory ran out' if out_of_memory(error) else of_user(error)
        if what in row['failed']:
            gc.collect()  # what the error's frames held
            with suppress(Exception):
                free(device)

    def enlarging(form: Form) -> Row:
        model = model_for(form)
        if form.compiled:
            torch.compiler.reset()
        model.net.eval()
        torch.manual_seed(0)
        images = images_for(model, 1, 3, *input_size(scale))
        if 'sr' not in expected:
            with torch.inference_mode(), precision(False):
                expected['sr'] = call_of(model_for(Form()).eval(), Form())(images).float().clone()
        dtype = model.safe(*form.dtypes)
        return {'dtype': type_name(dtype)} | latency(model, form, images, expected['sr'], is_plain(form))

    def training(form: Form) -> Row:
        model = model_for(form)
        if form.compiled:
            torch.compiler.reset()
        model.net.train()
        side = GPU_PATCH if device == 'cuda' else lr_patch(name, scale)
        images = images_for(model, GPU_BATCH if device == 'cuda' else BATCH, 3, side, side)
        return {'patch': side} | step(model, form, images, is_plain(form) and name in LIGHT)

    expected: dict[str, Tensor] = {}
    for form_name, form in forms.items():
        row['forms'][form_name] = {}
        attempt(f'{form_name}, enlarging', partial(enlarging, form))
    expected.clear()
    for form_name, form in forms.items() if train else ():
        attempt(f'{form_name}, training', partial(training, form))
    models.clear()
    gc.collect()
    with suppress(Exception):  # of a GPU that an error left unusable
        free(device)
    return row


def is_plain(form: Form) -> bool:
    """Whether the profiler looks into a form: eager, float32 or a smaller type."""
    return not (form.compiled or form.graph or form.tf32)


def of_user(error: Exception) -> str:
    """Why something could not be measured."""
    return str(error) if isinstance(error, UserError) else reason(error)


def rate(row: Row, forms: Mapping[str, Form], ceiling: Row, count: int) -> None:
    """Fill in operations a second and their share of the ceiling, and the figures of the first form."""
    row['multiply_adds'] = count
    for name, found in row['forms'].items():
        if found.get('latency'):
            found['rate'] = 2 * count / found['latency']['median']
            top = ceiling_of(forms[name], getattr(torch, found['dtype']))
            found['share'] = found['rate'] / ceiling[top]['median']
    first = next(iter(row['forms'].values()))
    row |= {key: value for key, value in first.items() if key in row}


def summary(row: Row) -> list[str]:
    """What was just measured, for who waits."""

    def times(key: str) -> str:
        found = {name: form[key]['median'] for name, form in row['forms'].items() if form.get(key)}
        return ', '.join(f'{name} {seconds * 1e3:.2f}' for name, seconds in found.items())

    lines = {'latency, ms': times('latency'), 'training step, ms': times('step')} | row['failed']
    return [f'  {what}: {text}' for what, text in lines.items() if text]
