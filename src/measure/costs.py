"""What networks cost: parameters, multiply-adds, latency and peak memory for an output of 1280x720."""

import math
import multiprocessing
import os
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from error import UserError, out_of_memory
from measure.published import PUBLISHED, SOURCES, Published
from model import build, find, n_parameters
from system import memory
from system.allocator import tune_malloc

WIDTH, HEIGHT = 1280, 720  # of the output
WARM_UP = 64  # side of the input of a first call that is not measured
TOLERANCE = 0.01
SECONDS, RUNS = 2.0, 10  # a latency is the median of as many calls as fit, at most so many
FIRST = 60.0  # seconds; a first call, which gets its memory from the system, counts only if it takes longer

Row = dict[str, Any]
T = TypeVar('T')


def input_size(scale: int) -> tuple[int, int]:
    """Height and width of the input whose output is 1280x720; at x3 it is 1281x720."""
    return HEIGHT // scale, math.ceil(WIDTH / scale)


@torch.inference_mode()
def multiply_adds(name: str, scale: int, height: int, width: int, **settings: object) -> int:
    """Multiply-adds of a network on one (3, height, width) image: those of its convolutions and matrix products.

    Counted operator by operator as they run, padding included; nothing is computed.
    """
    with torch.device('meta'):
        net = build(name, scale, **settings).eval().requires_grad_(False)
        image = torch.empty(1, 3, height, width)
    with FlopCounterMode(display=False, custom_mapping=OPERATIONS) as counter:
        net(image)
    return counter.get_total_flops() // 2


def _elementwise(target: torch.Size, *_: object, **__: object) -> int:
    """Operations of `addcmul_`, of which a dynamic convolution consists here."""
    return 2 * math.prod(target)


def _kept_logits(q: torch.Size, k: torch.Size, bias: object, keys: torch.Size, **_: object) -> int:
    """Operations of PFT's products of queries and the keys that they have kept."""
    return 2 * math.prod(keys) * q[-1]


def _kept_values(weights: torch.Size, v: torch.Size, *_: object, **__: object) -> int:
    """Operations of PFT's weighted sums of the values of these keys."""
    return 2 * math.prod(weights) * v[-1]


# What the counter does not know.
OPERATIONS = {
    torch.ops.aten.addcmul_: _elementwise,
    torch.ops.frugalsr.logits_at: _kept_logits,
    torch.ops.frugalsr.values_at: _kept_values,
}


@torch.inference_mode()
def measure(name: str, scale: int, device: str) -> tuple[float, float | None]:
    """Seconds of a call, and its peak memory in bytes, weights included; to be run in a process of its own.

    On a CPU the memory is what the process grew by, which is an estimate.
    """
    torch.manual_seed(0)
    net = build(name, scale).eval()
    mark_trained(net)
    net.to(device)
    image = torch.rand(1, 3, *input_size(scale), device=device)
    times, memory = measured(net, image[..., :WARM_UP, :WARM_UP].contiguous(), image, net)
    return statistics.median(times), memory


def mark_trained(net: nn.Module) -> None:
    """Have LCoAN run, which refuses to with centroids that were never trained."""
    for key, buffer in net.named_buffers():
        if key.endswith('initted'):
            buffer.fill_(True)


def measured(
    call: Callable[[Tensor], object], first: Tensor, images: Tensor, net: nn.Module, least: int = 1
) -> tuple[list[float], float | None]:
    """Seconds of `least` or more calls with `images`, and their peak memory in bytes, weights of `net` included.

    What a process does only once is done in a call with `first`, which is not measured.
    """
    device = images.device.type
    weights = sum(p.nbytes for p in net.state_dict().values())
    before = memory.start_peak(device)
    timed(partial(call, first), device)
    times = repeated(partial(call, images), device, least)
    after = memory.peak(device)
    known = before is not None and after is not None
    return times, weights + after - before if known else None


def repeated(call: Callable[[], object], device: str, least: int = 1) -> list[float]:
    """Seconds of as many calls as fit in `SECONDS`, but at least `least` and at most `RUNS`.

    A first call is extra, unless it takes `FIRST` seconds.
    """
    times = [timed(call, device)]
    if times[0] < FIRST:
        times.clear()
    while len(times) < least or (sum(times) < SECONDS and len(times) < RUNS):
        times.append(timed(call, device))
    return times


def timed(call: Callable[[], object], device: str) -> float:
    """Seconds of a call, to its end on the device."""
    at: Any = torch.cuda if device == 'cuda' else torch.cpu
    at.synchronize()
    start = time.perf_counter()
    call()
    at.synchronize()
    return time.perf_counter() - start


def find_pairs(names: Sequence[str], scales: Sequence[int]) -> list[tuple[str, int]]:
    """Networks and scales to measure; of several networks each at those of the scales that it has.

    Raises:
        UserError: there is none.
    """
    pairs = [(name, scale) for name in names for scale in scales if scale in find(name).scales]
    if not pairs or (len(names) == 1 and len(pairs) < len(scales)):
        known = ', '.join(map(str, find(names[0]).scales))
        raise UserError(f'--scale {"+".join(map(str, scales))}: {names[0]} enlarges by {known}; choose among these.')
    return pairs


def measure_all(pairs: Sequence[tuple[str, int]], device: str, say: Callable[..., None]) -> list[Row]:
    """A row for each network and scale."""
    rows = []
    for name, scale in pairs:
        say('%s x%d', name, scale)
        rows.append(cost(name, scale, device))
    return rows


def cost(name: str, scale: int, device: str) -> Row:
    """All figures of one network at one scale, in units, seconds and bytes; None: not known."""
    with torch.device('meta'):
        count = n_parameters(build(name, scale))
    latency, memory = measure_apart(name, scale, device)
    published = PUBLISHED.get(name, {}).get(scale, Published())
    return {
        'model': name,
        'scale': scale,
        'device': device_name(device),
        'parameters': count,
        'multiply_adds': multiply_adds(name, scale, *input_size(scale)),
        'latency': latency,
        'memory': memory,
        'published': vars(published),
        'deviates': deviates(count, published),
    }


def deviates(count: int, published: Published) -> bool:
    """Whether a number of parameters is not the one that was published."""
    if published.parameters is None or published.sources[0] == 'code':
        return False
    return abs(count / published.parameters - 1) > TOLERANCE


def measure_apart(name: str, scale: int, device: str) -> tuple[float | None, float | None]:
    """`measure` in a process of its own; None, None if its memory does not suffice."""
    try:
        return apart(measure, name, scale, device)
    except MemoryError:
        return None, None


def apart(work: Callable[..., T], *given: object) -> T:
    """`work(*given)` in a process of its own.

    Raises:
        MemoryError: its memory does not suffice, for which it may have been killed.
    """
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context('spawn'), begin_apart) as pool:
            return pool.submit(work, *given).result()
    except (BrokenProcessPool, RuntimeError) as error:
        if not isinstance(error, BrokenProcessPool) and not out_of_memory(error):
            raise
        raise MemoryError(f'{work.__name__}{given} ran out of memory') from error


def begin_apart() -> None:
    """What a process beside the program does first."""
    tune_malloc()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # PyTorch's convolutions would
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process when the one that started it has ended, however that was."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def device_name(device: str) -> str:
    """What ran: the GPU, or the number of CPU threads."""
    return torch.cuda.get_device_name() if device == 'cuda' else f'{device}, {torch.get_num_threads()} threads'


def table(rows: Sequence[Row]) -> str:
    """The rows as text, each figure followed by the published one."""
    lines = [
        ['', '', 'parameters', 'publ.', '', 'mult-adds', 'publ.', 'latency', 'publ.', 'memory', 'publ.', 'Urban100'],
        ['', '', 'K', 'K', '', 'G', 'G', 'ms', 'ms', 'MB', 'MB', 'publ. dB'],
    ]
    for row in rows:
        published = row['published']
        lines.append([
            row['model'], f'x{row["scale"]}',
            *(number(value, 1e3, 1) for value in (row['parameters'], published['parameters'])),
            '*' if row['deviates'] else '',
            *(number(value, 1e9, 1) for value in (row['multiply_adds'], published['multiply_adds'])),
            *(number(value, 1e-3, 1) for value in (row['latency'], published['latency'])),
            *(number(value, 1e6, 0) for value in (row['memory'], published['memory'])),
            number((published['psnr'] or {}).get('Urban100'), 1, 2),
        ])  # fmt: skip
    where = ', '.join(dict.fromkeys(row['device'] for row in rows))
    notes = [
        f'Output of {WIDTH}x{HEIGHT}, float32, one image, on {where}. Memory: the peak, weights included.',
        f'* more than {TOLERANCE:.0%} from the published number of parameters.',
        'Published latency and memory: on a GPU that is not named (ESC, ICCV 2025, table 2).',
        *sources(rows),
    ]
    return '\n'.join([*aligned(lines), *notes])


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Cells under each other, those of the first two columns to the left."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    justified = [
        [cell.ljust(width) if column < 2 else cell.rjust(width) for column, (cell, width) in enumerate(pairs)]
        for pairs in (zip(line, widths, strict=True) for line in lines)
    ]
    return ['  '.join(line).rstrip() for line in justified]


def sources(rows: Sequence[Row]) -> list[str]:
    """Where the published figures are from, a line a source."""
    names: dict[str, dict[str, None]] = {}
    for row in rows:
        for source in row['published']['sources']:
            names.setdefault(source, {})[row['model']] = None
    return [f'{", ".join(names[source])}: {SOURCES[source]}.' for source in SOURCES if source in names]


def number(value: float | None, unit: float, digits: int) -> str:
    """A figure in multiples of `unit`; None: not known."""
    return '-' if value is None else f'{value / unit:.{digits}f}'


def points(rows: Sequence[Row]) -> dict[str, list[tuple[str, float, float, float]]]:
    """(name, parameters, published PSNR on Urban100, multiply-adds) of the networks that have one, by scale."""
    panels: dict[str, list[tuple[str, float, float, float]]] = {f'x{row["scale"]}': [] for row in rows}
    for row in rows:
        psnr = (row['published']['psnr'] or {}).get('Urban100')
        if psnr is not None:
            name = row['model'] + (f' ({row["published"]["data"]})' if row['published']['data'] != 'DIV2K' else '')
            panels[f'x{row["scale"]}'].append((name, row['parameters'], psnr, row['multiply_adds']))
    return panels
