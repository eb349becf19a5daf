"""Fixtures that several test modules use."""

import logging
import os
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor

from data.image import write_png

if TYPE_CHECKING:
    from model.blocks.pixels import LayerNorm2d

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / 'shared'

if not torch.cuda.is_available():
    os.environ['TRITON_INTERPRET'] = '1'  # before anything imports Triton: its kernels run on a CPU, slowly


WITHOUT_A_GPU = ('no CUDA device', 'only on a GPU')


def pytest_configure(config: pytest.Config) -> None:
    """What is compiled is kept for one session, and not shared with others on this machine."""
    for name in ('TORCHINDUCTOR_CACHE_DIR', 'FRUGALSR_CACHE'):
        if name not in os.environ:  # as it is in workers
            folder = tempfile.TemporaryDirectory(prefix='frugalsr-cache-', ignore_cleanup_errors=True)
            os.environ[name] = folder.name
            config.add_cleanup(folder.cleanup)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Generator[None, pytest.TestReport, Any]:
    """In CI nothing is left out but what needs a GPU."""
    report = yield
    if os.environ.get('CI') and report.skipped and isinstance(report.longrepr, tuple):  # not: known to fail
        *_, why = report.longrepr
        if not why.endswith(WITHOUT_A_GPU):
            report.outcome, report.longrepr = 'failed', f'In CI, yet {why}'
    return report


@pytest.fixture
def shared() -> Path:
    """The folder of reference data beside the checkout; without it a test is skipped, in CI it fails."""
    if not SHARED.is_dir():
        message = f'no reference data at {SHARED}'
        if os.environ.get('CI'):
            pytest.fail(message)
        pytest.skip(message)
    return SHARED


@pytest.fixture
def messages() -> Generator[list[str]]:
    """What the program logs while the test runs."""
    found: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger('frugalsr')
    before, level = log.handlers, log.level
    log.handlers = [handler]
    log.setLevel(logging.INFO)
    yield found
    log.handlers = before
    log.setLevel(level)


def slow(*cases: object) -> list:
    """Cases of a test with parameters that only `bash test.sh full` tries."""
    return [pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow) for case in cases]


def numbers(*shape: int, seed: int = 1) -> Tensor:
    """Normally distributed float64 numbers."""
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def some_norm(n_feats: int) -> 'LayerNorm2d':
    """A float64 norm whose weight and bias are not those that it starts with."""
    from model.blocks.pixels import LayerNorm2d  # which imports Triton

    norm = LayerNorm2d(n_feats, 1e-5).double()
    for seed, parameter in enumerate(norm.parameters()):
        parameter.data = numbers(n_feats, seed=seed)
    return norm


def picture(seed: int, height: int, width: int) -> np.ndarray:
    """A smooth random colour image with edges, (height, width, 3) uint8."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = sum(np.sin(y * a + x * b + c) for a, b, c in rng.uniform(-0.4, 0.4, (6, 3)))
    colours = rng.uniform(0, 255, (2, 3))
    return np.where((waves > 0)[..., None], colours[0], colours[1]).round().astype(np.uint8)


@pytest.fixture
def one_thread():
    """As in processes that are started with one: another number of threads sums in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def data_folder(tmp_path: Path) -> Path:
    """A small --dir_data in EDSR's layout: DIV2K (6 images), SR291 (3) and Set5 (2), HR only."""
    folder = tmp_path / 'data'
    sizes = {'DIV2K/DIV2K_train_HR': 6, 'SR291/HR': 3, 'benchmark/Set5/HR': 2}
    for name, number in sizes.items():
        for i in range(number):
            write_png(folder / name / f'{i + 1:04d}.png', picture(i, 72 + 5 * i, 64 + 3 * i))
    return folder


def kept_for_gradients(call) -> list[Tensor]:
    """What `call()` saves for its backward pass."""
    kept = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        call()
    return kept
