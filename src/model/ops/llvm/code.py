"""Kernels for CPUs, written in LLVM's language and compiled in memory by llvmlite: `pip install llvmlite`, no compiler.

A vector holds `lanes()` numbers of float32. What is written vector by vector stays in registers, where PyTorch's
operations go through memory, and needs no luck with the vectorisation of loops.
"""

import ctypes
import math
import os
import struct
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import torch
from llvmlite import ir

FLOAT, INT, WORD, BIT = ir.FloatType(), ir.IntType(64), ir.IntType(32), ir.IntType(1)
ROUNDING = 1.5 * 2**23  # a float32 plus this has no room for digits after the point: its last bits are an integer
CACHE_LINE = 16  # numbers of float32 that come from memory at once
FLUSH = 1 << 15 | 1 << 6  # bits of x86's MXCSR: results that are subnormal are 0 (FTZ), and so are operands (DAZ)
BETWEEN_COUNTERS = CACHE_LINE // 2  # of int64, one in each such line, or threads would wait for each other's
TERMS = 7  # of the series of 2^x for |x| <= 1/2, whose rest is 2^-23 of it


@cache
def has(feature: str) -> bool:
    """Whether this machine's processor has it, by LLVM's name."""
    return bool(llvm.get_host_cpu_features().get(feature))


@cache
def lanes() -> int:
    """Numbers of float32 that a vector register holds, as far as kernels make use of that."""
    return 16 if has('avx512f') else 8


def size_of(kind: ir.Type) -> int:
    """Bytes of a number."""
    return 4 if kind == FLOAT else kind.width // 8


def filled_up(widths: Sequence[int], lanes: int) -> list[int]:
    """Numbers of channels, each as that of whole vectors."""
    return [-(-width // lanes) * lanes for width in widths]


class Code:
    """A function `run(arguments, memory, factor, counters, thread, threads)` that is being written, for each thread.

    Counters are zeros when it is called, one for a thread, `BETWEEN_COUNTERS` apart.

    Attributes:
        given: the arguments by their names, int64.
        memory: pointer to float32 that a thread has for itself.
        factor: a number of float32.
    """

    def __init__(self, names: Sequence[str], lanes: int) -> None:
        self.module, self.lanes = ir.Module(), lanes
        self.module.triple = llvm.get_process_triple()
        self.vector_type = ir.VectorType(FLOAT, lanes)
        kind = ir.FunctionType(ir.VoidType(), [INT.as_pointer(), FLOAT.as_pointer(), FLOAT, INT.as_pointer(), INT, INT])
        function = ir.Function(self.module, kind, 'run')
        arguments, self.memory, self.factor, *self._team = function.args
        self.memory.add_attribute('noalias')
        multiply_add = ir.FunctionType(self.vector_type, [self.vector_type] * 3)
        self._multiply_add = ir.Function(self.module, multiply_add, f'llvm.fmuladd.v{lanes}f32')
        self.to = ir.IRBuilder(function.append_basic_block())
        self.given = {name: self.to.load(self.to.gep(arguments, [INT(i)])) for i, name in enumerate(names)}

    def vector(self, x: float) -> ir.Value:
        """The same number in all lanes."""
        return self.vector_type([x] * self.lanes)

    def numbers(self) -> ir.Value:
        """The number of each lane."""
        return self.vector_type(list(map(float, range(self.lanes))))

    def integers(self, x: int) -> ir.Value:
        return ir.VectorType(WORD, self.lanes)([x] * self.lanes)

    def spread(self, number: ir.Value, count: int | None = None) -> ir.Value:
        """A number in all lanes, or `count` times."""
        nothing = ir.VectorType(number.type, self.lanes)(ir.Undefined)
        return self.shuffled(self.to.insert_element(nothing, number, INT(0)), nothing, [0] * (count or self.lanes))

    def padded(self, vector: ir.Value, count: int) -> ir.Value:
        """Filled up by zeros to `count` numbers."""
        given = vector.type.count
        return self.shuffled(vector, vector.type([0.0] * given), [min(i, given) for i in range(count)])

    def pointer(self, name: str, to: ir.Type = FLOAT) -> ir.Value:
        """An argument that is an address."""
        return self.to.inttoptr(self.given[name], to.as_pointer())

    def offset(self, *products: Sequence[ir.Value]) -> ir.Value:
        """A sum of products of integers."""
        total = INT(0)
        for first, *others in products:
            for other in others:
                first = self.to.mul(first, other)
            total = self.to.add(total, first)
        return total

    def part_of(self, count: ir.Value, number: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Where a part of `count` things begins and ends, if they are cut into as many as the argument `parts` says."""
        parts, after = self.given['parts'], self.to.add(number, INT(1))
        first, stop = (self.to.sdiv(self.to.mul(n, count), parts) for n in (number, after))
        return first, stop

    def at(self, pointer: ir.Value, offset: ir.Value) -> ir.Value:
        return self.to.gep(pointer, [offset])

    def load(self, pointer: ir.Value, count: int) -> ir.Value:
        """`count` numbers that follow one another, of the type that is pointed to."""
        kind = pointer.type.pointee
        return self.to.load(self.to.bitcast(pointer, ir.VectorType(kind, count).as_pointer()), align=size_of(kind))

    def store(self, vector: ir.Value, pointer: ir.Value) -> None:
        kind, element = vector.type, vector.type.element
        if kind.count == 1:  # as a number: LLVM's optimiser fails an assertion where a vector of one is selected
            vector, kind = self.to.extract_element(vector, INT(0)), element
        self.to.store(vector, self.to.bitcast(pointer, kind.as_pointer()), align=size_of(element))

    def prefetch(self, pointer: ir.Value, count: int, written: bool = False) -> None:
        """Have `count` numbers brought into the first cache, to be read or `written`."""
        kind = ir.FunctionType(ir.VoidType(), [ir.IntType(8).as_pointer(), *[WORD] * 3])
        function = self.module.declare_intrinsic('llvm.prefetch', [ir.IntType(8).as_pointer()], kind)
        for i in range(0, count, CACHE_LINE):
            place = self.to.bitcast(self.at(pointer, INT(i)), ir.IntType(8).as_pointer())
            self.to.call(function, [place, *(WORD(x) for x in (int(written), 3, 1))])

    def load_row(self, pointer: ir.Value, width: int) -> list[ir.Value]:
        """`width` numbers that follow one another, as vectors of which the last one is filled up by zeros."""
        places = range(0, width, self.lanes)
        parts = [self.load(self.at(pointer, INT(i)), min(self.lanes, width - i)) for i in places]
        return [*parts[:-1], self.padded(parts[-1], self.lanes)]

    def store_row(self, vectors: Sequence[ir.Value], pointer: ir.Value, width: int) -> None:
        """The first `width` numbers of vectors."""
        for i, vector in zip(range(0, width, self.lanes), vectors, strict=True):
            count = min(self.lanes, width - i)
            self.store(self.part(vector, 0, count), self.at(pointer, INT(i)))

    def fold(self, vector: ir.Value, join: Callable[[ir.Value, ir.Value], ir.Value]) -> ir.Value:
        """One number of all lanes: the halves of a vector joined, again and again."""
        while (half := vector.type.count // 2) > 0:
            vector = join(self.part(vector, 0, half), self.part(vector, half, half))
        return self.to.extract_element(vector, INT(0))

    def sum(self, vector: ir.Value) -> ir.Value:
        """Of all lanes."""
        return self.fold(vector, self.to.fadd)

    def sums(self, vectors: Sequence[ir.Value]) -> ir.Value:
        """Of all lanes of each of as many vectors as there are lanes: neighbours added, again and again."""
        while len(vectors) > 1:
            pairs = zip(vectors[::2], vectors[1::2], strict=True)
            vectors = [
                self.to.fadd(*(self.shuffled(x, y, range(first, 2 * self.lanes, 2)) for first in (0, 1)))
                for x, y in pairs
            ]
        return vectors[0]

    def compress(self, vector: ir.Value, bits: ir.Value) -> ir.Value:
        """The lanes of a vector whose bit in an integer is set, one after the other, and then whatever."""
        mask = self.to.bitcast(bits, ir.VectorType(BIT, self.lanes))
        letter = 'f' if vector.type.element == FLOAT else 'i'
        kind = ir.FunctionType(vector.type, [vector.type, mask.type, vector.type])
        name = f'llvm.experimental.vector.compress.v{self.lanes}{letter}32'
        function = self.module.globals.get(name) or ir.Function(self.module, kind, name)
        return self.to.call(function, [vector, mask, vector.type(ir.Undefined)])

    def sqrt(self, x: ir.Value) -> ir.Value:
        """Of a number, or of each lane."""
        kind = 'f32' if x.type == FLOAT else f'v{x.type.count}f32'
        function = ir.FunctionType(x.type, [x.type])
        return self.to.call(self.module.declare_intrinsic(f'llvm.sqrt.{kind}', (), function), [x])

    def transposed(self, rows: Sequence[ir.Value]) -> list[ir.Value]:
        """Vectors of what stands at the same place of each row."""
        count, side = rows[0].type.count, self.lanes
        columns: list[list[ir.Value]] = [[] for _ in range(count)]
        for top in range(0, len(rows), side):
            for left in range(0, count, side):
                square = self._transposed([self.part(row, left, side) for row in rows[top : top + side]])
                for column, found in zip(columns[left : left + side], square, strict=False):
                    column.append(found)
        return [self.joined(parts, len(rows)) for parts in columns]

    def _transposed(self, rows: list[ir.Value]) -> list[ir.Value]:
        """Of at most as many rows as they have numbers: they swap halves, quarters, and so on."""
        count = rows[0].type.count
        rows = rows + [rows[0].type(ir.Undefined)] * (count - len(rows))
        step = count // 2
        while step:
            first = [lane - step + count if lane & step else lane for lane in range(count)]
            for i in range(count):
                if not i & step:
                    pair = rows[i], rows[i + step]
                    rows[i], rows[i + step] = (
                        self.shuffled(*pair, [place + step * later for place in first]) for later in (0, 1)
                    )
            step //= 2
        return rows

    def shuffled(self, x: ir.Value, y: ir.Value, places: Sequence[int]) -> ir.Value:
        """The numbers at these places of `x`, which `y` follows."""
        return self.to.shuffle_vector(x, y, ir.VectorType(WORD, len(places))(list(places)))

    def part(self, vector: ir.Value, first: int, count: int) -> ir.Value:
        """`count` numbers of a vector, from number `first` on; after its end they may be any."""
        given = vector.type.count
        return self.shuffled(vector, vector.type(ir.Undefined), [min(i, given) for i in range(first, first + count)])

    def joined(self, vectors: Sequence[ir.Value], count: int) -> ir.Value:
        """The first `count` numbers of vectors of the same length, one after the other."""
        first, *others = vectors
        for other in others:
            have = first.type.count
            wide = self.part(other, 0, have)
            first = self.shuffled(first, wide, range(have + other.type.count))
        return self.part(first, 0, count)

    def multiply_add(self, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
        """x * y + z, in one instruction where there is one."""
        return self.to.call(self._multiply_add, [x, y, z])

    def select_less(self, x: ir.Value, y: ir.Value) -> ir.Value:
        """The lesser in each lane; `y` where one is not a number."""
        return self.to.select(self.to.fcmp_ordered('<', x, y), x, y)

    def select_greater(self, x: ir.Value, y: ir.Value) -> ir.Value:
        """The greater in each lane; `y` where one is not a number."""
        return self.to.select(self.to.fcmp_ordered('>', x, y), x, y)

    def exp2(self, x: ir.Value) -> ir.Value:
        """2^x to 2^-22 of it: 2^n, with n the nearest integer, times the series of the rest.

        0 takes the place of numbers below 2^-126, infinity that of those from 2^127.5 on, or 2^128.
        """
        if self.lanes == 16 and has('avx512dq'):
            rest = self._by_avx512('reduce', x, WORD(0))
            normal = self.to.fcmp_unordered('>=', x, self.vector(-126))  # the others have fewer digits, which is slow
            return self._by_avx512('scalef', self._series(rest), self.to.fsub(x, rest), normal)
        x = self.select_less(self.vector(128), self.select_greater(self.vector(-127), x))
        shifted = self.to.fadd(x, self.vector(ROUNDING))
        power = self._series(self.to.fsub(x, self.to.fsub(shifted, self.vector(ROUNDING))))
        exponent = self.to.shl(self.to.bitcast(shifted, self.integers(0).type), self.integers(23))
        return self.to.fmul(power, self.to.bitcast(self.to.add(exponent, self.integers(127 << 23)), self.vector_type))

    def _series(self, x: ir.Value) -> ir.Value:
        """2^x for |x| <= 1/2."""
        *others, found = (self.vector(math.log(2) ** n / math.factorial(n)) for n in range(TERMS))
        for factor in reversed(others):
            found = self.multiply_add(found, x, factor)
        return found

    def _by_avx512(self, name: str, x: ir.Value, argument: ir.Value, where: ir.Value | None = None) -> ir.Value:
        """An instruction of AVX-512 that has two operands, in all lanes, or `where` a bit says so, and else 0."""
        bits, zero = ir.IntType(self.lanes), self.vector(0)
        mask = bits(-1) if where is None else self.to.bitcast(where, bits)
        kind = ir.FunctionType(x.type, [x.type, argument.type, x.type, bits, WORD])
        name = f'llvm.x86.avx512.mask.{name}.ps.512'
        function = self.module.globals.get(name) or ir.Function(self.module, kind, name)
        return self.to.call(function, [x, argument, zero, mask, WORD(4)])

    def loop(
        self,
        start: ir.Value,
        stop: ir.Value,
        step: int,
        body: Callable[[ir.Value, list[ir.Value]], Sequence[ir.Value]],
        carried: Sequence[ir.Value] = (),
    ) -> list[ir.Value]:
        """Write `for i in range(start, stop, step): carried = body(i, carried)`; what is carried in the end."""
        before, head, inside, after = self.to.block, *(self.to.append_basic_block() for _ in range(3))
        self.to.branch(head)
        self.to.position_at_end(head)
        variables = [self.to.phi(x.type) for x in (start, *carried)]
        self.to.cbranch(self.to.icmp_signed('<', variables[0], stop), inside, after)
        self.to.position_at_end(inside)
        found = [*body(variables[0], variables[1:]), self.to.add(variables[0], INT(step))]
        for variable, first, later in zip(variables, (start, *carried), (found[-1], *found[:-1]), strict=True):
            variable.add_incoming(first, before)
            variable.add_incoming(later, self.to.block)
        self.to.branch(head)
        self.to.position_at_end(after)
        return variables[1:]

    def repeat(
        self, body: Callable[[list[ir.Value]], tuple[ir.Value, Sequence[ir.Value]]], carried: Sequence[ir.Value]
    ) -> list[ir.Value]:
        """Write `go_on = True; while go_on: go_on, carried = body(carried)`; what is carried in the end."""
        before, inside, after = self.to.block, self.to.append_basic_block(), self.to.append_basic_block()
        self.to.branch(inside)
        self.to.position_at_end(inside)
        variables = [self.to.phi(x.type) for x in carried]
        go_on, found = body(variables)
        for variable, first, later in zip(variables, carried, found, strict=True):
            variable.add_incoming(first, before)
            variable.add_incoming(later, self.to.block)
        self.to.cbranch(go_on, inside, after)
        self.to.position_at_end(after)
        return [*found]

    def tasks(self, count: ir.Value, body: Callable[[ir.Value], None]) -> None:
        """Write the rest: `body(i)` for numbers i below `count`, each of them in one thread.

        They are shared out in order: a thread finds in its cache what it wrote there in a kernel before, if that went
        through pixels in the same order. One that has done its share helps with those of others.

        On x86 subnormal numbers, nearer to 0 than 2^-126, count as 0 here: with one of them an instruction takes a
        hundred times as long, and memory that is not written, at the border of a tile, holds whatever was there before,
        such as integers, which as float32 are mostly subnormal.
        """
        to, (counters, thread, threads) = self.to, self._team
        restore = self._flush_subnormals()

        def share(k: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
            owner = to.srem(to.add(thread, k), threads)
            first, end = (to.sdiv(to.mul(n, count), threads) for n in (owner, to.add(owner, INT(1))))
            counter = self.at(counters, to.mul(owner, INT(BETWEEN_COUNTERS)))
            head, work, after = (to.append_basic_block() for _ in range(3))
            # Read first: with many threads additions to counters that have reached the end would take long.
            before = to.add(first, to.load_atomic(counter, 'monotonic', 8))
            to.cbranch(to.icmp_signed('<', before, end), head, after)
            to.position_at_end(head)
            task = to.add(first, to.atomic_rmw('add', counter, INT(1), 'monotonic'))
            to.cbranch(to.icmp_signed('<', task, end), work, after)
            to.position_at_end(work)
            body(task)
            to.branch(head)
            to.position_at_end(after)
            return []

        self.loop(INT(0), threads, 1, share)
        restore()
        to.ret_void()

    def _flush_subnormals(self) -> Callable[[], None]:
        """Have this thread take subnormal numbers as 0; gives what writes that it does as before again."""
        if not self.module.triple.startswith('x86_64'):
            return lambda: None
        byte = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte])
        read, write = (self.module.declare_intrinsic(f'llvm.x86.sse.{x}mxcsr', (), kind) for x in ('st', 'ld'))
        before, after = (self.to.alloca(WORD) for _ in range(2))
        old, new = (self.to.bitcast(place, byte) for place in (before, after))
        self.to.call(read, [old])
        self.to.store(self.to.or_(self.to.load(before), WORD(FLUSH)), after)
        self.to.call(write, [new])
        return lambda: self.to.call(write, [old])


@cache
def host() -> tuple[str, str]:
    """Name and features of this machine's CPU."""
    return llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()


def target_machine() -> llvm.TargetMachine:
    """This machine as LLVM knows it; an engine takes it for its own."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    cpu, features = host()
    return llvm.Target.from_default_triple().create_target_machine(cpu=cpu, features=features, opt=3)


def object_file(code: Code) -> bytes:
    """`Code` compiled for this machine, with `write_member` where there is OpenMP."""
    if openmp():
        write_member(code.module)
    machine = target_machine()
    module = llvm.parse_assembly(str(code.module))
    options = llvm.create_pipeline_tuning_options(speed_level=2)
    options.loop_unrolling = False  # is done where it pays
    builder = llvm.create_pass_builder(machine, options)
    builder.getModulePassManager().run(module, builder)
    return machine.emit_object(module)


class Kernel:
    """An `object_file` as a function of this process."""

    def __init__(self, compiled: bytes) -> None:
        machine = target_machine()
        self._engine = llvm.create_mcjit_compiler(llvm.parse_assembly(''), machine)  # which owns the function's memory
        self._openmp = openmp()
        if self._openmp:
            llvm.add_symbol('omp_get_thread_num', address(self._openmp.omp_get_thread_num))
        self._engine.add_object_file(llvm.ObjectFileRef.from_data(compiled))
        self._engine.finalize_object()
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        function = ctypes.CFUNCTYPE(None, pointer, pointer, ctypes.c_float, pointer, number, number)
        self._run = function(self._engine.get_function_address('run'))
        self._member = self._engine.get_function_address('member') if self._openmp else None

    def __call__(self, given: Sequence[int | torch.Tensor], memory: int, factor: float) -> None:
        """Run it in as many threads as PyTorch has.

        Args:
            given: numbers, and tensors that stand for their addresses.
            memory: numbers of float32 that each thread needs.
            factor: see `Code`.
        """
        threads = torch.get_num_threads()
        arguments = array('q', [x if isinstance(x, int) else x.data_ptr() for x in given])
        memories, counters = (
            torch.empty(threads * memory, dtype=torch.float32),
            array('q', [0]) * (BETWEEN_COUNTERS * threads),
        )
        place, first, counter = arguments.buffer_info()[0], memories.data_ptr(), counters.buffer_info()[0]
        if threads == 1:
            self._run(place, first, factor, counter, 0, 1)
        elif self._openmp:
            (bits,) = struct.unpack('i', struct.pack('f', factor))
            team = array('q', [place, first, 4 * memory, bits, counter, threads])
            self._openmp.GOMP_parallel(self._member, team.buffer_info()[0], threads, 0)
        else:
            calls = [(place, first + 4 * memory * i, factor, counter, i, threads) for i in range(threads)]
            for work in [pool(threads).submit(self._run, *call) for call in calls]:
                work.result()


@cache
def openmp() -> ctypes.CDLL | None:
    """The OpenMP of GNU, if PyTorch has loaded it.

    Its threads then run kernels too: others would share the cores with them while they look for the next operation.
    """
    if not hasattr(os, 'RTLD_NOLOAD'):
        return None
    place = Path(torch.__file__).parent
    own = (*place.glob('lib/libgomp*'), *place.parent.glob('torch.libs/libgomp*'))  # of x86, and of ARM
    for name in (*map(str, own), 'libgomp.so.1'):
        with suppress(OSError):
            found = ctypes.CDLL(name, os.RTLD_NOLOAD | os.RTLD_NOW)
            found.GOMP_parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
            return found
    return None


def address(what: Any) -> int:
    return ctypes.cast(what, ctypes.c_void_p).value or 0


def write_member(module: ir.Module) -> None:
    """Write `member(team)`, which every thread of a team calls: `run` in the memory of this thread.

    A team is six int64: addresses of the arguments and of the first thread's memory, bytes that each thread has, the
    factor's bits, the address of the counters, and the number of threads.
    """
    to = ir.IRBuilder(
        ir.Function(module, ir.FunctionType(ir.VoidType(), [INT.as_pointer()]), 'member').append_basic_block()
    )
    number = ir.Function(module, ir.FunctionType(WORD, []), 'omp_get_thread_num')
    arguments, memory, size, bits, counters, threads = (
        to.load(to.gep(to.function.args[0], [INT(i)])) for i in range(6)
    )
    thread, factor = to.zext(to.call(number, []), INT), to.bitcast(to.trunc(bits, ir.IntType(32)), FLOAT)
    memory = to.inttoptr(to.add(memory, to.mul(size, thread)), FLOAT.as_pointer())
    arguments, counters = (to.inttoptr(x, INT.as_pointer()) for x in (arguments, counters))
    to.call(module.get_global('run'), [arguments, memory, factor, counters, thread, threads])
    to.ret_void()


@cache
def pool(threads: int) -> ThreadPoolExecutor:
    """Threads for kernels where PyTorch's are not to be had."""
    return ThreadPoolExecutor(threads, 'kernel')
