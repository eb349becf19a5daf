"""Depthwise convolutions and their gradients on maps in channels_last memory: see `depthwise`, whose form this is.

A vector holds channels of one pixel. The sums of a few pixels in a row stay in registers while these meet one row of
the filter after the other. A task is a few rows of an image, and has sums of its own of the gradients by parameters.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from llvmlite import ir
from torch import Tensor

from model.ops.llvm.code import INT, Code, Kernel, lanes
from model.ops.llvm.fused_linear import gelu, gelu_slope
from model.ops.llvm.kernel_cache import compiled

PIXELS = 8  # in a row, at once
ROWS = 8  # of a task
NAMES = (
    'x', 'weight', 'bias', 'plus', 'grad', 'turned', 'out', 'sums', 'zeros', 'height', 'width', 'strips',
    'tasks',
)  # fmt: skip
Vectors = list[ir.Value]
Place = Callable[[ir.Value], ir.Value]  # of a row: a pointer to its first pixel


class Rows(Code):
    """Code for a few pixels in a row at a time, of maps (N, H, W, C) that a depthwise convolution takes.

    Attributes:
        top, end: rows of a task.
        y, x: of the first of the pixels.
        totals: pointer to the sums of a task.
    """

    def __init__(self, channels: int, size: int, lanes: int) -> None:
        super().__init__(NAMES, lanes)
        self.channels, self.size, self.half = channels, size, size // 2
        self.step = channels + lanes  # from one place of the filters to the next: the last vector may be long
        self.spare, self.kept = self.memory, self.at(self.memory, INT(lanes))  # a vector, and rows

    def strips(self, body: Callable[[], None]) -> None:
        """Write the rest: `body` for the rows of each task."""
        to, given = self.to, self.given

        def task(number: ir.Value) -> None:
            self.image, strip = to.sdiv(number, given['strips']), to.srem(number, given['strips'])
            self.totals = self.at(self.pointer('sums'), to.mul(number, INT((self.size**2 + 1) * self.step)))
            self.top = to.mul(strip, INT(ROWS))
            self.end = self.least(to.add(self.top, INT(ROWS)), given['height'])
            body()

        self.tasks(given['tasks'], task)

    def least(self, x: ir.Value, y: ir.Value) -> ir.Value:
        return self.to.select(self.to.icmp_signed('<', x, y), x, y)

    def most(self, x: ir.Value, y: ir.Value) -> ir.Value:
        return self.to.select(self.to.icmp_signed('>', x, y), x, y)

    def pixels(self, around: int, channels: int, body: Callable[[ir.Value, int], None]) -> None:
        """`body(channel, count)` for all pixels of a task, and of rows `around`; `count` of the channels at a time."""
        rest = channels % self.lanes

        def vector(channel: ir.Value, _: Vectors) -> Vectors:
            body(channel, self.lanes)
            return []

        def some(x: ir.Value, _: Vectors) -> Vectors:
            self.x = x
            self.loop(INT(0), INT(channels - rest), self.lanes, vector)
            if rest:
                body(INT(channels - rest), rest)
            return []

        def row(y: ir.Value, _: Vectors) -> Vectors:
            self.y = y
            self.loop(INT(0), self.given['width'], PIXELS, some)
            return []

        first, end = self.to.sub(self.top, INT(around)), self.to.add(self.end, INT(around))
        self.loop(self.most(first, INT(0)), self.least(end, self.given['height']), 1, row)

    def of_map(self, name: str, channels: int) -> Place:
        """Rows of a map."""

        def place(y: ir.Value) -> ir.Value:
            row = self.to.add(self.to.mul(self.image, self.given['height']), y)
            return self.at(self.pointer(name), self.offset((row, self.given['width'], INT(channels))))

        return place

    def of_kept(self, y: ir.Value) -> ir.Value:
        """Rows in the memory of a thread, from those before the task on."""
        row = self.to.add(self.to.sub(y, self.top), INT(self.half))
        return self.at(self.kept, self.offset((row, self.given['width'], INT(self.channels))))

    def places(self, row: ir.Value, around: int, channels: int, channel: ir.Value, other: ir.Value) -> Vectors:
        """Pointers to a channel of the pixels, and of those `around`; to `other` where the image has none."""
        to, found = self.to, []
        for i in range(-around, PIXELS + around):
            x = to.add(self.x, INT(i))
            place = self.at(row, self.offset((x, INT(channels)), (channel,)))
            found.append(to.select(to.icmp_unsigned('<', x, self.given['width']), place, other))
        return found

    def read(self, row: ir.Value, around: int, channels: int, channel: ir.Value, count: int) -> Vectors:
        places = self.places(row, around, channels, channel, self.pointer('zeros'))
        return [self.padded(self.load(place, count), self.lanes) for place in places]

    def write(self, vectors: Vectors, row: ir.Value, channels: int, channel: ir.Value, count: int) -> None:
        for vector, place in zip(vectors, self.places(row, 0, channels, channel, self.spare), strict=True):
            self.store(self.part(vector, 0, count), place)

    def filter_rows(
        self,
        source: Place,
        channel: ir.Value,
        count: int,
        body: Callable[[ir.Value, Vectors, Vectors], Vectors],
        carried: Vectors,
    ) -> Vectors:
        """`carried = body(i, met, carried)` for the rows i of a filter that meet the image, and the pixels `met`."""
        to, half = self.to, INT(self.half)

        def row(i: ir.Value, carried: Vectors) -> Vectors:
            y = to.add(self.y, to.sub(i, half))
            return body(i, self.read(source(y), self.half, self.channels, channel, count), carried)

        first, end = to.sub(half, self.y), to.add(to.sub(self.given['height'], self.y), half)
        return self.loop(self.most(first, INT(0)), self.least(end, INT(self.size)), 1, row, carried)

    def convolved(self, source: Place, weight: str, start: ir.Value, channel: ir.Value, count: int) -> Vectors:
        """What the filters make of the pixels, plus `start`."""

        def add(i: ir.Value, met: Vectors, sums: Vectors) -> Vectors:
            for j in range(self.size):
                place = self.offset((i, INT(self.size * self.step)), (INT(j * self.step),), (channel,))
                factors = self.load(self.at(self.pointer(weight), place), self.lanes)
                sums = [self.multiply_add(met[p + j], factors, total) for p, total in enumerate(sums)]
            return sums

        return self.filter_rows(source, channel, count, add, [start] * PIXELS)

    def layer(self, channel: ir.Value, count: int) -> Vectors:
        """What the convolution gives for the pixels."""
        bias = self.load(self.at(self.pointer('bias'), channel), self.lanes)
        return self.convolved(self.of_map('x', self.channels), 'weight', bias, channel, count)

    def add_up(self, grads: Vectors, channel: ir.Value, count: int) -> None:
        """Add the gradients by weights and bias to the task's sums, given those by what the convolution gives."""

        def add(place: ir.Value, term: Callable[[int, ir.Value], ir.Value]) -> None:
            pointer = self.at(self.totals, place)
            total = self.load(pointer, self.lanes)
            for p in range(PIXELS):
                total = term(p, total)
            self.store(total, pointer)

        def row(i: ir.Value, met: Vectors, _: Vectors) -> Vectors:
            def product(j: int, p: int, total: ir.Value) -> ir.Value:
                return self.multiply_add(grads[p], met[p + j], total)

            for j in range(self.size):
                place = self.offset((i, INT(self.size * self.step)), (INT(j * self.step),), (channel,))
                add(place, partial(product, j))
            return []

        def last(p: int, total: ir.Value) -> ir.Value:
            return self.to.fadd(total, grads[p])

        self.filter_rows(self.of_map('x', self.channels), channel, count, row, [])
        add(self.offset((INT(self.size**2 * self.step),), (channel,)), last)


@compiled
def kernel(channels: int, size: int, act: str, added: bool, lanes: int) -> Code:
    """A convolution of so many channels by filters of `size` x `size`, and what follows it."""
    code = Rows(channels, size, lanes)
    outs = channels // 2 if act == 'gate' else channels

    def block(channel: ir.Value, count: int) -> None:
        found = code.layer(channel, count)
        if added:
            others = code.read(code.of_map('plus', channels)(code.y), 0, channels, channel, count)
            found = [code.to.fadd(*pair) for pair in zip(found, others, strict=True)]
        if act:
            found = [gelu(code, x) for x in found]
        if act == 'gate':
            others = code.layer(code.to.add(channel, INT(outs)), count)
            found = [code.to.fmul(*pair) for pair in zip(found, others, strict=True)]
        code.write(found, code.of_map('out', outs)(code.y), outs, channel, count)

    code.strips(lambda: code.pixels(0, outs, block))
    return code


@compiled
def gradient_kernel(channels: int, size: int, act: str, lanes: int) -> Code:
    """Its gradients. Those by what the convolution gives are kept for the rows of a task, and those around it."""
    code = Rows(channels, size, lanes)
    to, outs = code.to, channels // 2 if act == 'gate' else channels
    out = code.of_map('out', channels)

    def inner(channel: ir.Value, count: int) -> None:
        grads = code.read(code.of_map('grad', outs)(code.y), 0, outs, channel, count)
        found = [(channel, grads)]
        if act == 'gelu':
            slopes = [gelu_slope(code, x) for x in code.layer(channel, count)]
            found = [(channel, [to.fmul(*pair) for pair in zip(grads, slopes, strict=True)])]
        if act == 'gate':
            other = to.add(channel, INT(outs))
            gates, others = code.layer(channel, count), code.layer(other, count)
            first = [to.fmul(to.fmul(g, b), gelu_slope(code, a)) for g, a, b in zip(grads, gates, others, strict=True)]
            second = [to.fmul(g, gelu(code, a)) for g, a in zip(grads, gates, strict=True)]
            found = [(channel, first), (other, second)]
        for place, vectors in found:
            code.write(vectors, code.of_kept(code.y), channels, place, count)
        own = to.and_(to.icmp_signed('>=', code.y, code.top), to.icmp_signed('<', code.y, code.end))
        with to.if_then(own):
            for place, vectors in found:
                code.add_up(vectors, place, count)

    def back(channel: ir.Value, count: int) -> None:
        found = code.convolved(code.of_kept, 'turned', code.vector(0), channel, count)
        code.write(found, out(code.y), channels, channel, count)

    def strip() -> None:
        code.pixels(code.half, outs, inner)
        code.pixels(0, channels, back)

    code.strips(strip)
    return code


def run(
    made: Kernel,
    vector: int,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    plus: Tensor | None,
    grad: Tensor | None,
    out: Tensor,
) -> Tensor:
    """Run a kernel for vectors of so many numbers; gives the sums, (size^2 + 1, channels)."""
    n, channels, height, width = x.shape
    size = weight.shape[2]
    strips = -(-height // ROWS)
    filters = F.pad(weight.flatten(1).t(), (0, vector))
    biases = x.new_zeros(channels + vector) if bias is None else F.pad(bias, (0, vector))
    sums = x.new_zeros(0 if grad is None else n * strips, size**2 + 1, channels + vector)
    given = [
        x, filters, biases, 0 if plus is None else plus, 0 if grad is None else grad,
        filters.flip(0), out, sums, x.new_zeros(vector), height, width, strips, n * strips,
    ]  # fmt: skip
    kept = 0 if grad is None else (ROWS + size - 1) * width * channels
    made(given, vector + kept, 0.0)
    return sums.sum(0)[:, :channels]


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, act: str, plus: Tensor | None = None) -> Tensor:
    """See `depthwise.forward`."""
    n, channels, height, width = x.shape
    outs, vector = channels // 2 if act == 'gate' else channels, lanes()
    out = torch.empty(n, outs, height, width, memory_format=torch.channels_last, dtype=x.dtype)
    added = None if plus is None else plus.contiguous(memory_format=torch.channels_last)
    made = kernel(channels, weight.shape[2], act, plus is not None, vector)
    run(made, vector, x.contiguous(memory_format=torch.channels_last), weight, bias, added, None, out)
    return out


def gradients(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, act: str) -> list[Tensor]:
    """See `depthwise.gradients`."""
    grad, x = (t.contiguous(memory_format=torch.channels_last) for t in (grad, x))
    by_x = torch.empty_like(x)
    vector = lanes()
    made = gradient_kernel(x.shape[1], weight.shape[2], act, vector)
    *by_weight, by_bias = run(made, vector, x, weight, bias, None, grad, by_x)
    return [by_x, torch.stack(by_weight, 1).view_as(weight), by_bias]
