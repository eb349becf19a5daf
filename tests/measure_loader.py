"""Patches a second that the loader hands over, by number of workers, and its memory over many batches.

    python tests/measure_loader.py [--workers 0 1 2] [--batches 300] [--long 10000]

Eight random 2040x1356 images are cached as in training; batches of 16 patches of 192 HR pixels, x2, are read as fast as
they come. Memory is that of this process and its worker without pages of files, as Linux counts it (RssAnon, RssShmem).
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / 'src'))
from data.image import write_png
from data.sets import find_set
from data.srdata import SRData
from data.traindata import Sample, TrainData, train_loader, whole_batches
from system.parallel import Batches

BATCH = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--workers', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--batches', type=int, default=300, help='timed for each number of workers')
    parser.add_argument('--long', type=int, default=0, help='batches over which memory is watched, with one worker')
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        data = make_data(Path(folder))
        for workers in args.workers:
            stream = batches(data, args.batches + 20, workers)
            for _ in range(20):
                next(stream)
            start = time.perf_counter()
            for _ in stream:
                pass
            print(
                f'{workers} workers: {args.batches * BATCH / (time.perf_counter() - start):.0f} patches/s', flush=True
            )
        for i, _ in enumerate(batches(data, args.long, 1)):
            if i % max(1, args.long // 10) == 0 or i == args.long - 1:
                print(f'batch {i}: {resident():.1f} MiB', flush=True)


def make_data(folder: Path) -> TrainData:
    rng = np.random.default_rng(1)
    for i in range(8):
        write_png(folder / 'A' / 'HR' / f'{i}.png', rng.integers(0, 256, (1356, 2040, 3)).astype(np.uint8))
    images = SRData(find_set('A', folder, folder), 2, cached=True)
    images.prepare(2)
    return TrainData([images], 192, seed=1)


def batches(data: TrainData, number: int, workers: int) -> Iterator[Sample]:
    return whole_batches(train_loader(data, Batches(range(number * BATCH), BATCH), workers, pin_memory=False))


def resident() -> float:
    """MiB of this process and the processes it started."""
    own = Path('/proc/self')
    pids = [own.resolve().name, *(own / 'task' / own.resolve().name / 'children').read_text().split()]
    lines = [line for pid in pids for line in Path(f'/proc/{pid}/status').read_text().splitlines()]
    return sum(int(line.split()[1]) for line in lines if line.startswith(('RssAnon', 'RssShmem'))) / 2**10


if __name__ == '__main__':
    main()
