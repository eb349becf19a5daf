"""--profile: how near networks come to the arithmetic of a machine, and what their time goes into.

Times are in seconds, memory in bytes, rates in operations (two a multiply-add) or bytes a second. What was measured
several times is a spread {'median', 'quartiles': [lower, upper]}; what could not be measured is None.
"""

import os
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.nn.functional import conv2d, l1_loss
from torch.profiler import profile, supported_activities
from torch.utils._python_dispatch import TorchDispatchMode

from error import UserError, out_of_memory
from measure.costs import WARM_UP, Row, apart, input_size, mark_trained, measured, multiply_adds, repeated
from model import Model, type_name
from optimizer import make_optimizer
from system.machine import machine
from template import TEMPLATES

MATRIX = 4096  # side of the matrices of the gauge
CHANNELS = 256  # of the convolution of the gauge, and side of its image
COPIED = 2**26  # float32 values of a copy
SMALL = (4, 3, 64, 64)  # a batch of small images
BATCH = 4  # patches of a training step
LEAST = 3  # calls, for quartiles
SIDES = (64, 128, 256, 512, 1024)  # of LR squares
PATIENCE = 60.0  # seconds of a call after which larger squares are not tried

# Kinds of operations by words in their names; the first that fits counts.
KINDS = {
    'compiled': 'triton|cpp_fused|compiled',
    'convolution': 'conv(?!ert)|embedding_bag|local_attention|local_block|gated_ffn|distillation',
    'matrix product': r'mm(_|$)|matmul|(?<!bi)linear|attention|einsum|mv(_|$)|dot(_|$)|_tokens|products|correlation',
    'normalisation': 'norm|softmax|contrast',
    'index, sort': 'index|gather|scatter|sort|topk|arg(max|min)|take|search|nonzero',
    'copy, layout': r'copy|memcpy|memset|cat(_|$)|clone|contiguous|(^|::)to(_|$)|pad|unfold|col2im|im2col|shuffle|roll|'
    'stack|flip|repeat|empty|zero|ones|full|fill|resize|view|reshape|alias|permute|transpose|::m?t$|expand|select|slice|'
    'narrow|split|chunk|unbind|flatten|squeeze|strided|arange|detach',
    'elementwise': 'add|sub|mul|div|pow|sqrt|square|exp|log|tanh|[ges][ei]lu|relu|sigmoid|clamp|neg|abs|sum|mean|max|'
    'min|pool|where|lerp|and|or(_|$)|not|remainder|floor|round|sample|::([nlg][et]|eq)_?$',
    'other': '',
}
TIMES = {'latency': 'latency', 'batch': 'small images', 'step': 'training step'}
MEMORY = {'memory': 'memory', 'step_memory': 'training memory'}


# What a form is made of, by the words of --forms.
WORDS: dict[str, dict[str, Any]] = {
    'float32': {},
    'tf32': {'tf32': True},
    'bf16': {'dtypes': (torch.bfloat16,)},
    'fp16': {'dtypes': (torch.float16, torch.bfloat16)},
    'channels_last': {'channels_last': True},
    'compiled': {'compiled': True},
    'graph': {'graph': True},
}


@dataclass(frozen=True)
class Form:
    """How networks are run: as --compile and --channels_last say, in the first of the types that a network supports.

    Attributes:
        tf32: float32 products and convolutions of a GPU may round their factors to 10 bits.
        graph: recorded once as a CUDA graph, and then replayed.
    """

    compiled: bool = False
    channels_last: bool = False
    dtypes: tuple[torch.dtype, ...] = ()
    tf32: bool = False
    graph: bool = False

    def __str__(self) -> str:
        layout = ['channels_last'] if self.channels_last else []
        dtype = type_name(self.dtypes[0] if self.dtypes else torch.float32)
        run = 'compiled' if self.compiled else 'eager'
        return ', '.join([run, *['graph'] * self.graph, *layout, *['TF32'] * self.tf32, dtype])

    @classmethod
    def parse(cls, text: str) -> 'Form':
        """A form by words of `WORDS` joined by '-', as in bf16-channels_last-graph.

        Raises:
            UserError: another word, one that is there twice, or two types.
        """
        words = text.split('-')
        if unknown := [word for word in words if word not in WORDS]:
            raise UserError(f'--forms {text}: {unknown[0]!r} is none of {", ".join(WORDS)}; join these by - and +.')
        if len(set(words)) < len(words) or len({'float32', 'tf32', 'bf16', 'fp16'} & set(words)) > 1:
            raise UserError(f'--forms {text}: it has a word twice, or two types; give each once, and one type.')
        return cls(**{key: value for word in words for key, value in WORDS[word].items()})


def spread(values: Sequence[float]) -> Row:
    """Median and quartiles."""
    low, median, high = statistics.quantiles(values, n=4, method='inclusive') if len(values) > 1 else [*values] * 3
    return {'median': median, 'quartiles': [low, high]}


@torch.inference_mode()
def gauge(device: str, dtypes: Sequence[torch.dtype]) -> Row:
    """The ceilings: operations a second by name of type, float32 and `dtypes`, and bytes a second of a 'copy'.

    Operations are those of a large product of matrices, or of a large 3x3 convolution if that does more.
    """

    def rates(amount: float, call: Callable[[], object]) -> Row:
        return spread([amount / seconds for seconds in repeated(call, device, LEAST)])

    found = {}
    for dtype in (torch.float32, *dtypes):
        matrix = torch.rand(MATRIX, MATRIX, device=device, dtype=dtype)
        image = torch.rand(1, CHANNELS, CHANNELS, CHANNELS, device=device, dtype=dtype)
        kernel = torch.rand(CHANNELS, CHANNELS, 3, 3, device=device, dtype=dtype)
        product = rates(2 * MATRIX**3, partial(torch.mm, matrix, matrix))
        convolution = rates(2 * 9 * CHANNELS**4, partial(conv2d, image, kernel, padding=1))
        found[type_name(dtype)] = max(product, convolution, key=lambda rate: rate['median'])
    source, target = torch.rand(2, COPIED, device=device)
    return found | {'copy': rates(2 * source.nbytes, partial(target.copy_, source))}


def make(name: str, scale: int, device: str, form: Form) -> tuple[Model, Callable[[Tensor], Tensor]]:
    """A network with new weights, and its call on images in its range."""
    torch.manual_seed(0)
    model = Model(name, scale, device, compiled=form.compiled, channels_last=form.channels_last)
    mark_trained(model.net)
    return model, call_of(model, form)


def call_of(model: Model, form: Form) -> Callable[[Tensor], Tensor]:
    """A call of a network, in the type of a form, on images in its range."""
    dtype = model.safe(*form.dtypes)
    low = dtype != torch.float32

    def run(images: Tensor) -> Tensor:
        with torch.autocast(model.device.type, dtype if low else torch.bfloat16, enabled=low):
            return model.calls.train(images)

    return run


def images_for(model: Model, *shape: int) -> Tensor:
    """Random images of a shape (N, 3, H, W) in the range of a network."""
    return model.to_range(torch.randint(0, 256, shape, dtype=torch.uint8))


def measure(call: Callable[[Tensor], object], model: Model, form: Form, *shape: int, least: int = LEAST) -> tuple:
    """Spread of the seconds of a call on images of a shape, and its peak memory."""
    if form.compiled:
        torch.compiler.reset()  # or a second size would be compiled for every size
    images = images_for(model, *shape)
    first = images if form.compiled else images[..., :WARM_UP, :WARM_UP].clone()
    times, memory = measured(call, first, images, model.net, least)
    return spread(times), memory


@torch.inference_mode()
def infer(name: str, scale: int, device: str, form: Form) -> Row:
    """Latency and peak memory for an output of 1280x720, shares of its time by kind, and time of a small batch."""
    model, run = make(name, scale, device, form)
    model.net.eval()
    size = (1, 3, *input_size(scale))
    latency, memory = measure(run, model, form, *size)
    kinds = by_kind(partial(run, images_for(model, *size)), device, form.compiled)
    batch, _ = measure(run, model, form, *SMALL)
    dtype = type_name(model.safe(*form.dtypes))
    return {'dtype': dtype, 'latency': latency, 'memory': memory, 'kinds': kinds, 'batch': batch}


def learn(name: str, scale: int, device: str, form: Form) -> Row:
    """Time and peak memory of a training step at the LR patch of the paper: forward, L1, backward, Adam."""
    side = lr_patch(name, scale)
    model, run = make(name, scale, device, form)
    step = step_of(run, make_optimizer(model.parameters(), 'ADAM', lr=1e-4))
    seconds, memory = measure(step, model, form, BATCH, 3, side, side)
    return {'patch': side, 'step': seconds, 'step_memory': memory}


def step_of(run: Callable[[Tensor], Tensor], optimizer: torch.optim.Optimizer) -> Callable[[Tensor], None]:
    """A training step on images: forward, L1, backward, and the optimiser's part."""

    def step(images: Tensor) -> None:
        optimizer.zero_grad()
        sr = run(images).float()
        l1_loss(sr, torch.zeros_like(sr)).backward()
        optimizer.step()

    return step


def lr_patch(name: str, scale: int) -> int:
    """Side of the LR training patch of a network's recipe; at a scale without one, of that for x4."""
    scale = scale if f'{name}_x{scale}' in TEMPLATES else 4
    recipe: Any = TEMPLATES.get(f'{name}_x{scale}')
    if recipe is None:
        raise UserError('there is no recipe to train it')
    return recipe['patch_size'] // scale


@torch.inference_mode()
def square(name: str, scale: int, device: str, form: Form, side: int) -> Row:
    """Time and peak memory of one LR square."""
    model, run = make(name, scale, device, form)
    model.net.eval()
    seconds, memory = measure(run, model, form, 1, 3, side, side, least=1)
    return {'side': side, 'seconds': seconds, 'memory': memory}


def by_kind(call: Callable[[], object], device: str, compiled: bool = False) -> dict[str, float]:
    """Shares of the time of a call by kind of operation."""
    operations = clocked(call) if device == 'cpu' and not compiled else profiled(call, device)
    times = dict.fromkeys(KINDS, 0.0)
    for operation, seconds in operations.items():
        times[kind(operation)] += seconds
    return {name: seconds / sum(times.values()) for name, seconds in times.items()}


def clocked(call: Callable[[], object]) -> dict[str, float]:
    """Seconds by operation of an eager call on a CPU.

    Not by the profiler: what it writes down lies in the gaps between tensors, so that the next ones no longer fit there
    and are handed over anew by the system. The indexing of ATD-light and SwinIR-light then takes several times as long.
    """
    seconds: dict[str, float] = defaultdict(float)

    class Clock(TorchDispatchMode):
        def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            start = time.perf_counter()
            result = operation(*args, **(kwargs or {}))
            seconds[operation._schema.name] += time.perf_counter() - start
            return result

    with Clock():
        call()
    return seconds


def profiled(call: Callable[[], object], device: str) -> dict[str, float]:
    """Seconds of a call by operation, by PyTorch's profiler."""
    with profile(activities=supported_activities()) as profiler:
        call()
    seconds: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        if event.device_type == DeviceType.CPU:  # kernels of a GPU are counted with the operation that started them
            microseconds = event.self_device_time_total if device == 'cuda' else event.self_cpu_time_total
            seconds[event.key] += microseconds / 1e6
    return seconds


def kind(operation: str) -> str:
    """The kind of an operation by its name, such as aten::add_."""
    return next(name for name, words in KINDS.items() if re.search(words, operation.lower()))


def attempt(work: Callable[..., Row], *given: object) -> Row | str:
    """What `work(*given)` gives in a process of its own, or why it could not."""
    try:
        return apart(_explained, work, *given)
    except MemoryError:
        return 'memory ran out'


def _explained(work: Callable[..., Row], *given: object) -> Row | str:
    """Not every error of a compiler can be handed to another process."""
    try:
        return work(*given)
    except Exception as error:
        if out_of_memory(error):
            return 'memory ran out'
        reason = (str(error).splitlines() or [''])[0]
        return reason if isinstance(error, UserError) else f'{type(error).__name__}: {reason}'


def profile_all(
    pairs: Sequence[tuple[str, int]], device: str, form: Form, growth: bool, say: Callable[..., None]
) -> Iterator[Row]:
    """Everything measured of networks and scales so far, and where it was measured; after each network."""
    os.environ.setdefault('KINETO_LOG_LEVEL', '99')  # or the profiler says when it starts and stops
    say('Ceiling of arithmetic')
    report: Row = {
        **machine(device),
        'threads': torch.get_num_threads(),
        'form': str(form),
        'ceiling': apart(gauge, device, form.dtypes),
        'networks': [],
    }
    for name, scale in pairs:
        say('%s x%d', name, scale)
        report['networks'].append(measure_network(name, scale, device, form, report['ceiling'], growth))
        yield report


def measure_network(name: str, scale: int, device: str, form: Form, ceiling: Row, growth: bool) -> Row:
    """All figures of one network at one scale; 'failed' says why those that are None are."""
    row: Row = {'model': name, 'scale': scale, 'multiply_adds': multiply_adds(name, scale, *input_size(scale))}
    row |= dict.fromkeys(('dtype', 'latency', 'kinds', 'rate', 'share', 'patch', *TIMES, *MEMORY))
    row |= {'growth': [], 'failed': {}}
    for what, work in {'enlarging': infer, 'training': learn}.items():
        found = attempt(work, name, scale, device, form)
        row |= {'failed': row['failed'] | {what: found}} if isinstance(found, str) else found
    if row['latency']:
        row['rate'] = 2 * row['multiply_adds'] / row['latency']['median']
        row['share'] = row['rate'] / ceiling[row['dtype']]['median']
    for side in SIDES if growth else ():
        found = attempt(square, name, scale, device, form, side)
        if isinstance(found, str):
            row['failed'][f'{side}x{side}'] = found
            break
        row['growth'].append(found)
        if found['seconds']['median'] > PATIENCE:
            break
    return row
