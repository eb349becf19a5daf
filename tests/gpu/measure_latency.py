"""Latency and peak memory of all networks for an output of 1280x720, form by form.

python tests/gpu/measure_latency.py OUT.json [--rehearse] [--only NETWORKS] [--scale 2+4] [--forms FORMS] [--seconds S]

Medians of calls between events of the GPU, after warm-ups, on random images and weights; the short form of
`main.py --profile --forms`, which also counts operations. What the time does not suffice for is left out.
"""

import argparse
import gc
import json
import statistics
import time
from functools import partial
from pathlib import Path

import torch

from measure.costs import input_size
from measure.published import PUBLISHED
from measure.speed_forms import HEAVY, LIGHT, Form, call_of, captured, clock, free, images_for, make, parse_forms, plan
from model import Model
from system.numerics import precision

FORMS = 'float32+graph+tf32+tf32-graph+bf16+bf16-graph'
BUDGET = 0.3  # seconds of a measurement


def measure(model: Model, form: Form, images: torch.Tensor, device: str) -> dict:
    """Milliseconds, quartiles and megabytes of a form."""
    free(device)
    if device == 'cuda':
        torch.cuda.reset_peak_memory_stats()
    call = call_of(model, form)
    with torch.inference_mode(), precision(form.tf32):
        run = captured(call, images) if form.graph else partial(call, images)
        clock(run, device, 2)
        warm_ups, runs = plan(clock(run, device, 1)[0], BUDGET)
        clock(run, device, warm_ups)
        times = sorted(1e3 * t for t in clock(run, device, max(runs, 2)))
    peak = torch.cuda.max_memory_allocated() / 1e6 if device == 'cuda' else None
    return {'ms': statistics.median(times), 'quartiles': statistics.quantiles(times)[::2], 'runs': runs, 'MB': peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('out', type=Path)
    parser.add_argument('--rehearse', action='store_true', help='one network, tiny, on a CPU')
    parser.add_argument('--only', default='')
    parser.add_argument('--scale', default='2+4')
    parser.add_argument('--forms', default='')
    parser.add_argument('--seconds', type=float, default=float('inf'))
    args = parser.parse_args()
    start, device, rows = time.monotonic(), 'cpu' if args.rehearse else 'cuda', []
    names = args.only.split('+') if args.only else ['EDSR-baseline'] if args.rehearse else [*LIGHT, *HEAVY]
    forms = parse_forms(args.forms or ('float32+bf16' if args.rehearse else FORMS), device)
    for name, scale in [(name, int(scale)) for name in names for scale in args.scale.split('+')]:
        if time.monotonic() - start > args.seconds:
            print(f'{name} x{scale}: no time was left')
            continue
        model, _ = make(name, scale, device, Form())
        model.eval()
        images = images_for(model, 1, 3, *((16, 16) if args.rehearse else input_size(scale)))
        row = {'network': name, 'scale': scale, 'forms': {}}
        published = PUBLISHED.get(name, {}).get(scale)
        row['published_ms'] = 1e3 * published.latency if published and published.latency else None
        for key, form in forms.items():
            try:
                row['forms'][key] = measure(model, form, images, device)
            except Exception as error:
                row['forms'][key] = {'failed': f'{type(error).__name__}: {error}'[:300]}
        cells = [f'{key} {found.get("ms", float("nan")):.2f}' for key, found in row['forms'].items()]
        print(f'{name:15} x{scale}  ', *cells, f' published {row["published_ms"]}', sep='  ', flush=True)
        rows.append(row)
        args.out.write_text(json.dumps(rows, indent=1) + '\n')
        del model, images
        gc.collect()
        free(device)


if __name__ == '__main__':
    main()
