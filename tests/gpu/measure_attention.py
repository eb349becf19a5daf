"""Window attention on a GPU: PyTorch's kernels for it beside each other, with the shapes of the networks here.

python tests/gpu/measure_attention.py OUT.json [--rehearse]

Each line is a shape at an output of 1280x720 (x2 where nothing else is said), a type and a kernel: milliseconds of a
forward call and of forward and backward, medians of CUDA events. `padded`: channels of a head filled up to whole 16
bytes, without which a kernel may refuse.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

# Windows, heads, tokens, channels a head, with a position bias.
SHAPES = {
    'ATD-light windows': (920, 4, 256, 12, True),
    'ATD-light categories': (1840, 4, 128, 12, False),
    'SwinIR-light': (3600, 6, 64, 10, True),
    'OmniSR': (3600, 4, 64, 16, True),
    'ESC 32x32': (240, 4, 1024, 16, True),
}
KERNELS = {
    'efficient': SDPBackend.EFFICIENT_ATTENTION,
    'cudnn': SDPBackend.CUDNN_ATTENTION,
    'flash': SDPBackend.FLASH_ATTENTION,
    'math': SDPBackend.MATH,
}
WARM_UP, RUNS = 5, 20


def timed(call, device: str) -> float:
    """Median milliseconds of a call."""
    for _ in range(WARM_UP if device == 'cuda' else 1):
        call()
    if device != 'cuda':
        return 0.0
    times = []
    for _ in range(RUNS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def measure(shape: tuple, dtype: torch.dtype, kernel: SDPBackend, padded: bool, device: str) -> dict:
    """Times of one form, and how far its result is from one in float64."""
    windows, heads, tokens, d, with_bias = shape
    torch.manual_seed(0)
    q, k, v = (torch.randn(windows, heads, tokens, d, device=device, dtype=dtype) for _ in range(3))
    bias = torch.randn(1, heads, tokens, tokens, device=device, dtype=dtype) if with_bias else None
    exact = reference(*(x[:2] for x in (q, k, v)), bias)
    missing = -d % (16 // q.element_size()) if padded else 0
    leaves = [q, k, v, *([bias] if with_bias else [])]

    def forward() -> Tensor:
        parts = [F.pad(x, (0, missing)) if missing else x for x in (q, k, v)]
        return F.scaled_dot_product_attention(*parts, attn_mask=bias, scale=d**-0.5)[..., :d]

    def both() -> None:
        torch.autograd.grad(forward().float().sum(), leaves)

    with sdpa_kernel(kernel):
        with torch.no_grad():
            error = float((forward()[:2].double() - exact).abs().max() / exact.abs().max())
            row = {'forward_ms': timed(forward, device), 'both_ms': None, 'error': error}
        for x in leaves:  # cuDNN's takes a mask without a gradient alone
            x.requires_grad_()
        try:
            row['both_ms'] = timed(both, device)
        except RuntimeError as error_of_both:
            row['failed_both'] = str(error_of_both).splitlines()[0][:120]
        return row


def flex(shape: tuple, dtype: torch.dtype, device: str) -> dict:
    """FlexAttention, compiled, with the bias as a function of head and places."""
    from torch.nn.attention.flex_attention import flex_attention

    windows, heads, tokens, d, _ = shape
    torch.manual_seed(0)
    q, k, v = (torch.randn(windows, heads, tokens, d, device=device, dtype=dtype) for _ in range(3))
    bias = torch.randn(heads, tokens, tokens, device=device, dtype=dtype)
    exact = reference(*(x[:2] for x in (q, k, v)), bias[None])
    call = torch.compile(flex_attention, dynamic=False)

    def forward() -> Tensor:
        return call(q, k, v, score_mod=lambda score, b, h, i, j: score + bias[h, i, j], scale=d**-0.5)

    with torch.no_grad():
        error = float((forward()[:2].double() - exact).abs().max() / exact.abs().max())
        return {'forward_ms': timed(forward, device), 'both_ms': None, 'error': error}


def reference(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """In float64, step by step."""
    q, k, v = (x.detach().double() for x in (q, k, v))
    logits = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    return (logits if bias is None else logits + bias.detach().double()).softmax(-1) @ v


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('out', type=Path)
    parser.add_argument('--rehearse', action='store_true', help='tiny, on a CPU')
    parser.add_argument('--only', default='', help='a part of the names of the shapes')
    args = parser.parse_args()
    device, rows = 'cpu' if args.rehearse else 'cuda', []
    for name, shape in SHAPES.items():
        if args.only not in name:
            continue
        if args.rehearse:
            shape = (2, *shape[1:])
        for dtype in (torch.float32, torch.bfloat16):
            forms = [(kernel, padded) for kernel in KERNELS for padded in (False, True)]
            for kernel, padded in [*forms, ('flex', False)]:
                if padded and shape[3] % 8 == 0:
                    continue
                row = {'shape': name, 'dtype': str(dtype).removeprefix('torch.'), 'kernel': kernel, 'padded': padded}
                try:
                    if kernel == 'flex':
                        if shape[2] < 1024 or args.rehearse:
                            continue
                        row |= flex(shape, dtype, device)
                    else:
                        row |= measure(shape, dtype, KERNELS[kernel], padded, device)
                    text = f'{row["forward_ms"]:8.3f} ms  {row["both_ms"] or 0:8.3f} ms  error {row["error"]:.1e}'
                except Exception as error:
                    text = row['failed'] = (str(error).splitlines() or [''])[0][:120]
                rows.append(row)
                print(f'{name:22}{row["dtype"]:10}{kernel:10}{"padded" if padded else "":8}{text}', flush=True)
                args.out.write_text(json.dumps(rows, indent=1) + '\n')


if __name__ == '__main__':
    main()
