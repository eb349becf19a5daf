"""The door to kernels: in Triton on a GPU, in LLVM on a CPU, where these work; else the plain form of the operation.

With FRUGALSR_KERNELS=off in the environment, as --kernels off has it, none is used.
"""

import importlib
import logging
import os
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
from torch import Tensor

from error import out_of_memory

T = TypeVar('T')
Function = TypeVar('Function', bound=Callable[..., Any])
library = torch.library.Library('frugalsr', 'FRAGMENT')
log = logging.getLogger('frugalsr')
TRITON = find_spec('triton') is not None  # a constant, for traces of a network ask for it
failed: set[str] = set()  # modules whose kernels did not run
wanted = os.environ.get('FRUGALSR_KERNELS') != 'off'


def operation(name: str) -> Callable[[Function], Function]:
    """Makes a function an operation of PyTorch, by whose name its time is told from that of others.

    It is called in half the time of a `torch.library.custom_op`, or less, but not with gradients, nor compiled.
    """

    def named(function: Function) -> Function:
        library.define(name + torch.library.infer_schema(function, mutates_args=()))
        library.impl(name, function, 'CPU')
        return getattr(torch.ops.frugalsr, name).default

    return named


def leave_out_kernels() -> None:
    """Have this program, and those that it starts, use plain PyTorch alone."""
    global wanted
    wanted = False
    os.environ['FRUGALSR_KERNELS'] = 'off'


@cache
def is_installed(package: str) -> bool:
    return find_spec(package) is not None


def is_exporting() -> bool:
    """Whether the network is traced for a file, by TorchScript or torch.export, and not to be run."""
    if torch.jit.is_tracing():
        return True
    if hasattr(torch.compiler, 'is_exporting'):
        return torch.compiler.is_exporting()
    return torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()  # PyTorch 2.6


def is_for_triton(x: Tensor) -> bool:
    """Whether `x` is on a GPU of NVIDIA or AMD, with Triton, which PyTorch for Windows does not bring."""
    return wanted and x.is_cuda and TRITON


def wants_llvm() -> bool:
    """Whether kernels for CPUs are used, where llvmlite is installed."""
    return wanted and is_installed('llvmlite')


def has_llvm(x: Tensor) -> bool:
    """Whether `x` is on a CPU with llvmlite, in an eager call."""
    return x.is_cpu and not (torch.jit.is_tracing() or torch.compiler.is_compiling()) and wants_llvm()


def is_for_llvm(x: Tensor) -> bool:
    """Whether `has_llvm` in a call without gradients, as within an `autograd.Function`."""
    return has_llvm(x) and not torch.is_grad_enabled()


def by_triton(module: str, plain: Callable[..., T], first: Tensor, *others: Any) -> T:
    """What `plain` gives; on a GPU by the function of its name in a module of `triton`, until one fails."""
    return by_kernel(f'triton.{module}', plain, first, *others) if is_for_triton(first) else plain(first, *others)


def by_llvm(module: str, plain: Callable[..., T], first: Tensor, *others: Any) -> T:
    """What `plain` gives; where `is_for_llvm` by the function of its name in a module of `llvm`, until one fails."""
    return by_kernel(f'llvm.{module}', plain, first, *others) if is_for_llvm(first) else plain(first, *others)


def float32_by_llvm(module: str, plain: Callable[..., T], first: Tensor, *others: Any) -> T:
    """As `by_llvm` where all tensors are float32 and no autocast has others in their place; else what `plain` gives."""
    return by_llvm(module, plain, first, *others) if are_float32(first, *others) else plain(first, *others)


def are_float32(*given: Any) -> bool:
    """Whether all tensors among these are, on a CPU, and no autocast has others in their place."""
    tensors = [x for x in given if isinstance(x, Tensor)]
    return all(x.is_cpu and x.dtype == torch.float32 for x in tensors) and not torch.is_autocast_enabled('cpu')


def by_kernel(module: str, plain: Callable[..., T], *arguments: Any) -> T:
    """What `plain` gives, by the function of its name in a module here, until one there fails."""
    if module not in failed:
        try:
            # Only where they are needed: Triton and llvmlite are optional.
            return getattr(importlib.import_module(f'model.ops.{module}'), plain.__name__)(*arguments)
        except Exception as error:  # Triton, its compiler, the C compiler that it calls and the driver have their own
            if out_of_memory(error):
                raise
            failed.add(module)
            how, what = module.split('.')
            how, what = {'triton': 'Triton', 'llvm': 'llvmlite'}[how], what.replace('_', ' ')
            log.warning('The %s runs without %s, slower: %s: %s', what, how, type(error).__name__, error)
    return plain(*arguments)
