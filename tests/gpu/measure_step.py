"""The training step of the program on a GPU, in each of its forms: images a second, memory, how idle the device is.

python tests/gpu/measure_step.py OUT.json [--rehearse] [--only NETWORK] [--compile]

L1, Adam, average of the weights, LR patches of 64 pixels at x2, batches of 16 from pinned memory, as `main.py` makes
them but for reading images. `idle` is the share of the time in which no kernel ran, from PyTorch's profiler.
"""

import argparse
import gc
import json
import statistics
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from data.traindata import Sample
from loss import Loss
from model import Model
from optimizer import make_optimizer
from step import TrainStep
from system.numerics import set_numerics

SCALE = 2
ALL = ('float32', 'tf32', 'graph', 'bf16', 'bf16-graph', 'bf16-graph-channels_last', 'bf16-graph-deterministic')
REPEATING = ('bf16-graph', 'bf16-graph-deterministic')  # what it costs that a run repeats itself to the bit
NETWORKS = {'ASID': ALL, 'ATD-light': REPEATING, 'LCoAN': REPEATING, 'NLSN': REPEATING}
SECONDS, LEAST, MOST = 0.7, 6, 60


def batch(size: int, side: int) -> Sample:
    """A random batch in pinned memory."""
    rng = torch.Generator().manual_seed(0)
    lr, hr = (torch.randint(0, 256, (size, 3, s, s), dtype=torch.uint8, generator=rng) for s in (side, SCALE * side))
    sample = Sample(lr, hr, torch.rand(size, 3, generator=rng) < 0.5, torch.zeros(size, dtype=torch.bool))
    return Sample(*(part.pin_memory() for part in sample)) if torch.cuda.is_available() else sample


def measure(name: str, form: str, device: str, sample: Sample) -> dict:
    """Figures of one form."""
    words = form.split('-')
    set_numerics(1, 'deterministic' in words, 'tf32' in words)
    model = Model(name, SCALE, device, channels_last='channels_last' in words, compiled='compiled' in words)
    dtype = torch.bfloat16 if 'bf16' in words else torch.float32
    step = TrainStep(
        model, Loss('1*L1', model.range).to(device), make_optimizer(model.parameters(), 'ADAM', 1e-4),
        len(sample.lr), dtype=dtype, ema_decay=0.999, graph='graph' in words,
    )  # fmt: skip
    model.net.train()
    cuda = device == 'cuda'
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    first = [step(sample, 1e-4).tolist() for _ in range(5)]  # of which the last are replays
    row = {'network': name, 'form': form, 'batch': len(sample.lr), 'start_s': time.perf_counter() - start}
    row['losses'] = [values[step.names.index('total')] for values in first]
    begin = time.perf_counter()
    step(sample, 1e-4).tolist()
    runs = min(MOST, max(LEAST, int(SECONDS / (time.perf_counter() - begin)))) if cuda else 1
    times = []
    for _ in range(runs):
        begin = time.perf_counter()
        for _ in range(2):
            values = step(sample, 1e-4)
        values.tolist()
        times.append((time.perf_counter() - begin) / 2)
    row |= {'step_s': statistics.median(times), 'images_per_second': len(sample.lr) / statistics.median(times)}
    row['peak_bytes'] = torch.cuda.max_memory_allocated() if cuda else None
    if cuda:
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            begin = time.perf_counter()
            for _ in range(3):
                values = step(sample, 1e-4)
            values.tolist()
            seconds = time.perf_counter() - begin
        kernels = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        spans = sorted((event.time_range.start, event.time_range.end) for event in kernels)
        busy, until = 0.0, 0.0
        for first_us, last_us in spans:
            busy += max(0.0, last_us - max(first_us, until))
            until = max(until, last_us)
        row['busy_s'] = busy / 3e6
        row['idle'] = max(0.0, 1 - busy / (spans[-1][1] - spans[0][0])) if spans else None
        row['profiled_step_s'] = seconds / 3
        times_of: dict[str, float] = {}
        for event in kernels:
            times_of[event.name] = times_of.get(event.name, 0.0) + (event.time_range.end - event.time_range.start) / 3e6
        row['kernels'] = sorted(times_of.items(), key=lambda item: -item[1])[:6]
        row['n_kernels'] = len(kernels) // 3
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('out', type=Path)
    parser.add_argument('--rehearse', action='store_true', help='tiny, on a CPU')
    parser.add_argument('--only', default='')
    parser.add_argument('--forms', default='')
    parser.add_argument('--batch', type=int, default=16)
    args = parser.parse_args()
    device, rows = 'cpu' if args.rehearse else 'cuda', []
    sample = batch(2, 16) if args.rehearse else batch(args.batch, 64)
    for name, forms in NETWORKS.items():
        if args.only and name not in args.only.split('+'):
            continue
        for form in args.forms.split('+') if args.forms else forms:
            if args.rehearse and ('graph' in form or name in ('NLSN', 'RCAN')):
                continue
            try:
                row = measure(name, form, device, sample)
                idle, losses = row.get('idle'), row['losses']
                text = (
                    f'{1e3 * row["step_s"]:9.2f} ms {row["images_per_second"]:9.1f} images/s '
                    f'{(row["peak_bytes"] or 0) / 1e6:8.0f} MB  {row.get("n_kernels", 0)} kernels, '
                    f'idle {"-" if idle is None else f"{idle:.0%}"}, losses {losses[0]:.4g} {losses[-1]:.4g}'
                )
            except Exception as error:
                row = {'network': name, 'form': form, 'failed': f'{type(error).__name__}: {error}'[:400]}
                text = row['failed'][:160].replace('\n', ' ')
            rows.append(row)
            print(f'{name:15}{form:28}{text}', flush=True)
            args.out.write_text(json.dumps(rows, indent=1) + '\n')
            gc.collect()
            if device == 'cuda':
                torch.cuda.empty_cache()


if __name__ == '__main__':
    main()
