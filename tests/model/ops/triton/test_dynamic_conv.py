"""The Triton kernels of the dynamic convolution: compiled where there is a GPU, else in Triton's interpreter."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.conftest import ROOT, numbers

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
pytestmark = pytest.mark.skipif(sys.platform != 'linux' and DEVICE == 'cpu', reason='Triton is made for Linux')

# batch, channels, groups, kernel, height, width; a program has 128 pixels at 6 channels and 32 at 33.
SHAPES = [
    (1, 6, 1, 7, 3, 5),
    (2, 4, 2, 3, 4, 7),
    (1, 1, 1, 7, 1, 1),
    (2, 4, 2, 1, 3, 2),
    (1, 6, 1, 3, 3, 150),
    (1, 33, 1, 3, 5, 8),
    *([(2, 48, 8, 7, 65, 130), (1, 90, 15, 7, 48, 48)] if DEVICE == 'cuda' else []),
]


def operands(n: int, c: int, g: int, k: int, h: int, w: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient, input and kernels."""
    return numbers(n, c, h, w, seed=3), numbers(n, c, h, w, seed=1), numbers(n, g, k, k, h, w, seed=2)


def expected(grad: Tensor, x: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
    """Result and gradients by `unfold` and PyTorch's own differentiation."""
    x, weights = (t.detach().cpu().double().requires_grad_() for t in (x, weights))
    (n, c, h, w), (g, k) = x.shape, weights.shape[1:3]
    patches = F.unfold(x, k, padding=k // 2).view(n, g, c // g, k * k, h, w)
    out = (patches * weights.flatten(2, 3).unsqueeze(2)).sum(3).flatten(1, 2)
    return out.detach(), *torch.autograd.grad(out, (x, weights), grad.cpu().double())


def by_kernels(grad: Tensor, x: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
    from model.ops.triton import dynamic_conv as dynamic_conv_triton

    grad, x, weights = (t.to(DEVICE) for t in (grad, x, weights))
    out = dynamic_conv_triton.forward(x, weights), *dynamic_conv_triton.backward(grad, x, weights)
    return tuple(t.cpu() for t in out)


@pytest.mark.parametrize('shape', SHAPES)
def test_equals_unfold(shape: tuple[int, ...]) -> None:
    for found, truth in zip(by_kernels(*operands(*shape)), expected(*operands(*shape)), strict=True):
        assert (found - truth).abs().max() < 1e-12


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_sums_in_float32(dtype: torch.dtype) -> None:
    tensors = [t.to(dtype) for t in operands(1, 6, 1, 5, 5, 7)]
    for found, truth in zip(by_kernels(*tensors), expected(*tensors), strict=True):
        assert found.dtype == dtype
        # A unit in the last place, since the interpreter cuts bfloat16 off, and what float32 leaves where terms cancel.
        assert ((found - truth).abs() <= truth.abs() * torch.finfo(dtype).eps + 1e-5).all()


COMPILE = """
import sys
sys.path.insert(0, {source!r})
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from model.ops.triton.dynamic_conv import convolve, correlate

for kernel, options in [(convolve, dict(ADJOINT=False)), (convolve, dict(ADJOINT=True)), (correlate, dict())]:
    constants = dict(CHANNELS=6, SIZE=7, WIDE=tl.float32, ROWS=8, BLOCK=128) | options
    types = ['*bf16'] * 3 + ['i32'] * 2 + ['constexpr'] * len(constants)
    source = ASTSource(kernel, dict(zip(kernel.arg_names, types, strict=True)), constants)
    print(len(triton.compile(source, target=GPUTarget('cuda', 90, 32)).asm['cubin']) > 0)
"""


@pytest.mark.slow
def test_compiles_for_a_gpu_that_need_not_be_there(tmp_path) -> None:
    environment = {**os.environ, 'TRITON_INTERPRET': '0', 'TRITON_CACHE_DIR': str(tmp_path)}
    command = [sys.executable, '-c', COMPILE.format(source=str(ROOT / 'src'))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ['True'] * 3, done.stderr
