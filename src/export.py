"""--export: a network as a file that other programs run, checked against PyTorch before it is kept.

ONNX and TorchScript files both come from a trace, which follows every number that is computed from the size of the
image. What it cannot follow, such as how often a loop turns, it fixes, and the check then fails at other sizes. Such a
network is traced again with images of one size.
"""

import io
import logging
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.onnx import register_custom_op_symbolic
from torch.onnx.symbolic_helper import parse_args

from error import UserError, out_of_memory
from model import Model
from model.loading.description import describe, to_metadata
from system.files import safetensors

SUFFIXES = {'onnx': '.onnx', 'torchscript': '.torchscript', 'safetensors': '.safetensors'}
OPSET = 17
TOLERANCE = 1e-4  # of values in [0, 1]
TRIES = 4  # images of each size

Function = Callable[[Tensor], Tensor]
Shape = tuple[int, int, int]  # images, height, width

log = logging.getLogger('frugalsr')


class Form(NamedTuple):
    """Which images a file is to take, and those that it is made and checked with."""

    takes: str
    example: Shape
    checked: Sequence[Shape]
    free: bool


# Sides that nothing divides, so that a network pads the example.
FREE = Form('images of 24x24 pixels or more', (2, 37, 59), ((1, 24, 24), (2, 29, 34), (1, 64, 48)), free=True)


def fixed(height: int, width: int) -> Form:
    """One image of one size."""
    return Form(f'one image of {width}x{height} pixels', (1, height, width), [(1, height, width)] * 3, free=False)


class Enlarger(nn.Module):
    """RGB (N, 3, H, W) in [0, 1] to RGB (N, 3, scale * H, scale * W) in [0, 1], float32."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, rgb: Tensor) -> Tensor:
        return self.model.upscale_tensor(rgb).clamp(0, 1)


def export(model: Model, kind: str, tile: int) -> bytes:
    """The content of a file of `kind`, a key of `SUFFIXES`.

    Args:
        model: on the CPU.
        kind: with safetensors the weights under their official names, and of what network they are; else the network
            as an `Enlarger`.
        tile: side of the image that a network takes which cannot take every size.

    Raises:
        UserError: a package is missing, there are no weights, or no file gives what PyTorch gives.
    """
    if kind == 'safetensors':
        if not model.net.state_dict():
            raise UserError(f'--export safetensors: {model.name} has no weights; choose another format.')
        return safetensors(model.net.state_dict(), to_metadata(describe(model)))
    make, load = {'onnx': (to_onnx, load_onnx), 'torchscript': (to_torchscript, load_torchscript)}[kind]
    net, fault = Enlarger(model).eval(), ''
    for form in (FREE, fixed(tile, tile)):
        content, fault = attempt(net, make, load, form)
        if not fault:
            return content
        log.info('%s as %s cannot take %s: %s.', model.name, kind, form.takes, fault)
    raise UserError(f'--export {kind}: {model.name} cannot be exported ({fault}); choose another format.')


@torch.no_grad()
def attempt(
    net: Enlarger, make: Callable[[Enlarger, Form], bytes], load: Callable[[bytes], Function], form: Form
) -> tuple[bytes, str]:
    """The content of a file that gives what `net` gives, or what is wrong with it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # of what a trace may fix, and of what PyTorch will give up
            content = make(net, form)
        run = load(content)
        worst = max(difference(run, net, shape) for shape in form.checked)
    except UserError:
        raise
    except Exception as error:  # exporters and what runs their files raise nearly anything
        if out_of_memory(error):
            raise
        return b'', reason(error)
    if worst > TOLERANCE:
        return b'', f'its results differ from those of PyTorch by up to {worst:.1e}'
    log.info('The file takes %s; checked, it differs from PyTorch by up to %.1e.', form.takes, worst)
    return content, ''


def example(shape: Shape) -> Tensor:
    """Random RGB images of this number, height and width: noise of half the full contrast, about a random colour.

    On noise of full contrast, unlike any photograph, the authors' weights of PAN x4 give values of 1e21.
    """
    n, height, width = shape
    return (torch.rand(n, 3, height, width) + torch.rand(n, 3, 1, 1)) / 2


def difference(run: Function, net: Enlarger, shape: Shape) -> float:
    """Largest difference on random images; infinite where one is not finite or of another shape.

    It is the least of several images, until one is within the tolerance. Where pixels are sorted by what they resemble
    most, rounding decides about a few, differently in float64 too, and one that moves takes others along.
    """
    least = float('inf')
    for _ in range(TRIES):
        images = example(shape)
        found, expected = run(images), net(images)
        if found.shape == expected.shape and found.isfinite().all():
            least = min(least, float((found - expected).abs().max()))
        if least <= TOLERANCE:
            break
    return least


def reason(error: Exception) -> str:
    """What an error of several lines says."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    # The interpreter of TorchScript puts where it happened first and what happened last.
    return lines[-1 if 'TorchScript interpreter' in lines[0] else 0][:200].rstrip('.')


# TorchScript


def to_torchscript(net: Enlarger, form: Form) -> bytes:
    """A trace of the network."""
    stream = io.BytesIO()
    torch.jit.save(torch.jit.trace(net, example(form.example), check_trace=False), stream)
    return stream.getvalue()


def load_torchscript(content: bytes) -> Function:
    """What a program does that reads the file."""
    return torch.jit.load(io.BytesIO(content), map_location='cpu')


# ONNX


def packages() -> tuple[Any, Any]:
    """onnx and onnxruntime, which are optional."""
    try:
        return import_module('onnx'), import_module('onnxruntime')
    except ModuleNotFoundError as error:
        raise UserError(f'--export onnx: {error.name} is missing; pip install onnx onnxruntime gets it.') from error


def to_onnx(net: Enlarger, form: Form) -> bytes:
    """The network as ONNX, input 'lr', output 'sr', and in the metadata what they are."""
    onnx, _ = packages()
    for name, symbolic in SYMBOLICS.items():
        register_custom_op_symbolic(f'aten::{name}', symbolic, OPSET)
    names, stream = ('lr', 'sr'), io.BytesIO()
    free = {name: {0: 'n', 2: f'{name}_height', 3: f'{name}_width'} for name in names}
    torch.onnx.export(
        net,
        (example(form.example),),
        stream,  # type: ignore[arg-type]
        input_names=names[:1],
        output_names=names[1:],
        dynamic_axes=free if form.free else None,
        opset_version=OPSET,
        do_constant_folding=False,  # it writes out what is looked up in small tables
        dynamo=False,
    )
    file = onnx.load_from_string(stream.getvalue())
    onnx.helper.set_model_props(
        file,
        {
            'model': net.model.name,
            'scale': str(net.model.scale),
            'lr': f'RGB (N, 3, H, W), float32 in [0, 1]: {form.takes}',
            'sr': 'RGB (N, 3, scale * H, scale * W), float32 in [0, 1]',
        },
    )
    return file.SerializeToString()


def load_onnx(content: bytes) -> Function:
    """What a program does that reads the file."""
    _, onnxruntime = packages()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what fails is told once, by this program
    session = onnxruntime.InferenceSession(content, options, providers=['CPUExecutionProvider'])
    return lambda images: torch.from_numpy(session.run(None, {'lr': images.numpy()})[0])


# Operations of PyTorch that its exporter does not know, or knows in part.


def constant(g: Any, value: Any) -> Any:
    """A number or a list of numbers in the graph."""
    return g.op('Constant', value_t=torch.tensor(value))


@parse_args('v')
def transposed(g: Any, x: Any) -> Any:
    """`x.mT`."""
    *axes, rows, columns = range(x.type().dim())
    return g.op('Transpose', x, perm_i=[*axes, columns, rows])


@parse_args('v', 'b', 'i', 'b')
def argsort(g: Any, x: Any, stable: bool, dim: int, descending: bool) -> Any:
    """`x.argsort`, always stable: TopK puts the first of equal values first."""
    length = g.op('Gather', g.op('Shape', x), constant(g, [dim]))
    return g.op('TopK', x, length, axis_i=dim, largest_i=int(descending), outputs=2)[1]


@parse_args('v', 'i', 'v', 'v')
def unfold(g: Any, x: Any, dim: int, size: Any, step: Any) -> Any:
    """`x.unfold`: windows of `size` along `dim`, which becomes their number, and their pixels the last axis."""
    axes = list(range(x.type().dim() + 1))
    dim %= len(axes) - 1
    zero, one = constant(g, 0), constant(g, 1)
    length = g.op('Gather', g.op('Shape', x), constant(g, dim))
    first = g.op('Range', zero, g.op('Add', g.op('Sub', length, size), one), step)
    index = g.op('Add', g.op('Unsqueeze', first, constant(g, [1])), g.op('Range', zero, size, one))
    axes.append(axes.pop(dim + 1))
    return g.op('Transpose', g.op('Gather', x, index, axis_i=dim), perm_i=axes)


SYMBOLICS: dict[str, Any] = {'mT': transposed, 'argsort': argsort, 'unfold': unfold}
