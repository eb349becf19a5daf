"""What the checks on a GPU share: the device, the networks with recorded weights, and a line a figure."""

import copy
import gc
import json
import os
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from model import NETWORKS, build

ROOT = Path(__file__).resolve().parent.parent.parent
CUDA = torch.cuda.is_available()
REHEARSE = not CUDA and os.environ.get('FRUGALSR_REHEARSE') == '1'
DEVICE = 'cuda' if CUDA else 'cpu'

ALL = [name for name in NETWORKS if name != 'Bicubic']
LIGHT = [
    'EDSR-baseline', 'ASID', 'ASIDd8', 'DLGSANet-tiny', 'DLGSANet-light', 'ATD-light', 'CATANet', 'HiT-SRF',
    'PFT-light', 'OmniSR', 'SwinIR-light', 'ESC', 'ESC-light', 'ESC-FP', 'IMDN', 'PAN', 'BSRN',
]  # fmt: skip
# What sorts pixels by an argmax: of two that are equal up to rounding, another device may find the other one larger.
SORTING = ['NLSN', 'LCoAN', 'ATD', 'ATD-light', 'CATANet']
REHEARSED = ['ASID', 'DLGSANet-tiny', 'EDSR-baseline', 'LCoAN']


def chosen(names: list[str]) -> list[str]:
    """Those of the networks that are to be checked: FRUGALSR_GPU_ONLY, joined by '+'; a few in a rehearsal."""
    only = os.environ.get('FRUGALSR_GPU_ONLY')
    wanted = only.split('+') if only else REHEARSED if REHEARSE else names
    return [name for name in names if name in wanted]


def reference(*parts: str) -> Path:
    """A file or folder of the reference data. On a GPU they have to be there: nothing is to be skipped unseen."""
    places = [Path(place) for place in [os.environ.get('FRUGALSR_SHARED')] if place]
    places += [ROOT / 'gpu_pack', ROOT.parent / 'shared']
    for place in places:
        if (path := place.joinpath(*parts)).exists():
            return path
    message = f'no {"/".join(parts)} in {", ".join(map(str, places))}'
    if CUDA:
        pytest.fail(message)
    pytest.skip(message)
    raise AssertionError


@cache
def checker() -> ModuleType:
    """The comparison that the reference data bring along."""
    sys.path.insert(0, str(reference('reference', 'check.py').parent))
    import check

    return check


FILLED: dict[tuple, nn.Module] = {}  # networks with their weights, which take a while to draw


class Recorded:
    """The recorded inputs and outputs of the official network `name`, and its weights by the recipe."""

    def __init__(self, name: str, scale: int) -> None:
        self.name, self.scale = name, scale
        with np.load(reference('reference', 'golden', f'{name}_x{scale}.npz')) as data:
            self.meta = json.loads(str(data['meta']))
            self.arrays = {key: data[key] for key in data.files if key != 'meta'}
        self.range = self.meta['rgb_range']

    def cases(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Input and output of each case; in a rehearsal of the first one alone."""
        for case in self.meta['cases'][: 1 if REHEARSE else None]:
            yield tuple(torch.from_numpy(self.arrays[f'{what}{case["index"]}']) for what in ('input', 'output'))

    def network(self, **settings: object) -> nn.Module:
        """On the CPU, in float32."""
        key = self.name, self.scale, *settings.items()
        if key not in FILLED:
            FILLED[key] = self._fill(build(self.name, self.scale, **settings))
        return copy.deepcopy(FILLED[key])

    def _fill(self, net: nn.Module) -> nn.Module:
        manifest = json.loads(reference('reference', 'manifests', f'{self.name}_x{self.scale}.json').read_text())
        missing, unexpected, problems = checker().load(net, manifest, self.range)
        assert not (missing or unexpected or problems), (missing, unexpected, problems)
        return net


def note(what: str, **figures: Any) -> None:
    """Print a line of figures, and append it to the file that FRUGALSR_GPU_JSON names."""
    cells = (f'{key} {value:.3g}' if isinstance(value, float) else f'{key} {value}' for key, value in figures.items())
    print(f'\n[{what}] ' + ', '.join(cells), end=' ', flush=True)
    record(what, **figures)


def record(what: str, **figures: Any) -> None:
    """Append figures to the file that FRUGALSR_GPU_JSON names."""
    if file := os.environ.get('FRUGALSR_GPU_JSON'):
        with Path(file).open('a') as stream:
            stream.write(json.dumps({'what': what, 'device': DEVICE, **figures}) + '\n')


def distance(found: Tensor, truth: Tensor) -> float:
    """Euclidean distance, relative to the truth."""
    found, truth = found.detach().cpu().double(), truth.detach().cpu().double()
    return ((found - truth).norm() / truth.norm()).item()


def free_memory() -> None:
    """Give back what earlier tests left, so that what is measured is one's own."""
    gc.collect()
    if CUDA:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def background(function: Callable, *arguments: Any) -> pytest.MarkDecorator:
    """A mark for a test that wants, as `result`, what a program gives that runs beside the other tests."""
    return pytest.mark.background.with_args(function, *arguments)
