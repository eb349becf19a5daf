"""Skips what has no GPU, and runs programs in the background while the other checks run in this process."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from tests.gpu import programs
from tests.gpu.parts import CUDA, REHEARSE, note, record

HERE = Path(__file__).resolve().parent
ORDER = ['test_precision', 'test_memory', 'test_kernels', 'test_parity']
AT_ONCE = 12 if CUDA else 2
PATIENCE = 130 if CUDA else 900  # seconds for a program, from when the tests wait for it
START = time.monotonic()
SECONDS = float(os.environ.get('FRUGALSR_GPU_SECONDS', 'inf'))  # for all checks together
KEPT = 20  # of them, to look at what ran in the background
THREADS = 6  # of this process; the programs have one each


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line('markers', 'only_gpu: cannot be rehearsed on a CPU')
    config.addinivalue_line('markers', 'background(function, *arguments): a program that the test wants the result of')
    if os.environ.get('FRUGALSR_GPU_JSON'):  # by run.sh, whose limit of time ends the tests by this signal

        def end(*_: object) -> NoReturn:
            programs.end_all()
            pytest.exit('the time is up', pytest.ExitCode.INTERRUPTED)

        signal.signal(signal.SIGTERM, end)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent != HERE:
            continue
        if not (CUDA or REHEARSE):
            item.add_marker(pytest.mark.skip(reason='no CUDA device'))
        elif not CUDA and item.get_closest_marker('only_gpu'):
            item.add_marker(pytest.mark.skip(reason='only on a GPU'))
    items.sort(key=place)


def place(item: pytest.Item) -> int:
    """The longest checks late, should the time run out; what runs in the background is waited for last."""
    if item.path.parent != HERE:
        return 0
    if item.get_closest_marker('background'):
        return 9
    return ORDER.index(item.path.stem) if item.path.stem in ORDER else 8


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """One line for each test at once, should all be ended before pytest can sum up."""
    if report.nodeid.startswith('tests/gpu/') and (report.when == 'call' or not report.passed):
        why = '' if report.passed else (report.longreprtext.strip().splitlines() or [''])[-1][:300]
        record('test', id=report.nodeid, outcome=report.outcome, seconds=round(report.duration, 2), why=why)


def work(item: pytest.Item) -> tuple[Callable, tuple] | None:
    marker = item.get_closest_marker('background')
    return (marker.args[0], marker.args[1:]) if marker else None


@pytest.fixture(scope='session')
def programs_under_way(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[tuple[Callable, tuple], Future]]:
    """All programs that the selected tests want; each in a folder of its own."""
    pool = ThreadPoolExecutor(AT_ONCE)
    here = [item for item in request.session.items if item.path.parent == HERE and not item.get_closest_marker('skip')]
    wanted = dict.fromkeys(key for item in here if (key := work(item)))
    futures = {}
    for function, arguments in wanted:
        folder = tmp_path_factory.mktemp(function.__name__)
        futures[function, arguments] = pool.submit(timed, function, folder, *arguments)
    yield futures
    programs.end_all()
    pool.shutdown(cancel_futures=True)


def timed(function: Callable, folder: Path, *arguments: Any) -> Any:
    start = time.monotonic()
    try:
        return function(folder, *arguments)
    finally:
        note('background', program=' '.join([function.__name__, *map(str, arguments)]), s=time.monotonic() - start)


@pytest.fixture
def result(request: pytest.FixtureRequest, programs_under_way: dict[tuple[Callable, tuple], Future]) -> Any:
    """What the program of this test gave."""
    return programs_under_way[work(request.node)].result(
        min(PATIENCE, max(START + SECONDS - time.monotonic() - 3, 0.1))
    )


@pytest.fixture(autouse=True)
def as_it_was(request: pytest.FixtureRequest) -> Iterator[None]:
    """Start the programs with the first test; float32 is float32, and settings of PyTorch stay in their test."""
    if CUDA or REHEARSE:
        request.getfixturevalue('programs_under_way')
    left = START + SECONDS - time.monotonic()
    if left < KEPT and not request.node.get_closest_marker('background'):
        pytest.fail('no time is left for this check')
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(THREADS if CUDA else threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)
