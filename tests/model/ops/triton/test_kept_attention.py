"""The Triton kernels of the attention to kept keys: compiled where there is a GPU, else in Triton's interpreter."""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from tests.conftest import ROOT, numbers

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
pytestmark = pytest.mark.skipif(sys.platform != 'linux' and DEVICE == 'cpu', reason='Triton is made for Linux')

# windows, tokens, heads, channels, kept keys; a program reads 4 keys at once here.
SHAPES = [
    (1, 1, 1, 1, 1),
    (2, 4, 3, 5, 3),
    (1, 6, 1, 16, 6),
    (1, 9, 2, 2, 7),
    *([(3, 1024, 4, 13, 256)] if DEVICE == 'cuda' else []),
]


def operands(b: int, t: int, heads: int, d: int, kept: int) -> tuple[Tensor, ...]:
    """Queries, keys, values, bias, weights, and which keys are kept, in no order."""
    q, k, v = (numbers(b, t, heads, d, seed=seed) for seed in (1, 2, 3))
    keys = numbers(b, t, heads, t, seed=4).argsort(-1)[..., :kept].short()
    return q, k, v, numbers(t, t, seed=5), numbers(b, t, heads, kept, seed=6), keys


@pytest.mark.parametrize('shape', SHAPES)
def test_equals_gathered_rows(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    from model.ops.triton import kept_attention as kept_attention_triton

    monkeypatch.setattr(kept_attention_triton, 'BLOCK', 4)
    q, k, v, bias, weights, keys = operands(*shape)
    heads = torch.arange(shape[2]).view(1, 1, -1, 1)
    windows, index = torch.arange(shape[0]).view(-1, 1, 1, 1), keys.long()
    products = (k[windows, index, heads] * q.unsqueeze(-2)).sum(-1)
    biased = products + bias[torch.arange(shape[1]).view(1, -1, 1, 1), index]
    sums = (v[windows, index, heads] * weights.unsqueeze(-1)).sum(-2)
    q, k, v, bias, weights, keys = (x.to(DEVICE) for x in (q, k, v, bias, weights, keys))
    found = [
        kept_attention_triton.logits_at(q, k, None, keys),
        kept_attention_triton.logits_at(q, k, bias, keys),
        kept_attention_triton.values_at(weights, v, keys),
    ]
    for one, truth in zip(found, (products, biased, sums), strict=True):
        assert (one.cpu() - truth).abs().max() < 1e-12


COMPILE = """
import sys
sys.path.insert(0, {source!r})
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from model.ops.triton.kept_attention import add_up, multiply

sizes = dict(HEADS=4, CHANNELS=13, KEPT=256, ROWS=128, COLUMNS=16, WIDE=tl.float32)
for kernel, options in [(multiply, dict(BIASED=True)), (multiply, dict(BIASED=False)), (add_up, dict())]:
    constants = options | sizes
    types = ['*i16' if name == 'keys' else '*fp32' for name in kernel.arg_names[: -len(constants) - 1]]
    types += ['i32'] + ['constexpr'] * len(constants)
    source = ASTSource(kernel, dict(zip(kernel.arg_names, types, strict=True)), constants)
    print(len(triton.compile(source, target=GPUTarget('cuda', 90, 32)).asm['cubin']) > 0)
"""


@pytest.mark.slow
def test_compiles_for_a_gpu_that_need_not_be_there(tmp_path) -> None:
    environment = {**os.environ, 'TRITON_INTERPRET': '0', 'TRITON_CACHE_DIR': str(tmp_path)}
    command = [sys.executable, '-c', COMPILE.format(source=str(ROOT / 'src'))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ['True'] * 3, done.stderr
