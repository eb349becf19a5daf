"""Counted and measured costs."""

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from error import UserError
from measure.costs import apart, cost, find_pairs, input_size, multiply_adds, points, repeated, table
from measure.published import PUBLISHED
from model import NETWORKS
from tests.conftest import ROOT, slow
from tests.system.test_parallel import children

ALL = [name for name in NETWORKS if name != 'Bicubic']


@pytest.mark.parametrize('scale, size', [(2, (360, 640)), (3, (240, 427)), (4, (180, 320))])
def test_input_of_a_1280x720_output(scale, size):
    assert input_size(scale) == size


def test_multiply_adds_of_edsr_by_hand():
    """Every convolution of 3x3 does 9 * inputs * outputs a pixel that it makes; the mean shifts 9 for RGB."""
    height, width, feats, blocks = 5, 7, 8, 2
    body = 9 * feats * (3 + feats * (2 * blocks + 1) + 4 * feats)
    tail = 4 * 9 * feats * 3
    shifts = 9 + 4 * 9
    found = multiply_adds('EDSR', 2, height, width, n_resblocks=blocks, n_feats=feats)
    assert found == height * width * (body + tail + shifts)


def test_dynamic_convolution_is_counted():
    """Its 7x7 products of every channel in every local block, which are no convolution to PyTorch."""
    sizes = {'n_feats': 12, 'n_resgroups': 1, 'group_channels': 3, 'n_heads': 2}
    one, two = (multiply_adds('DLGSANet', 4, 8, 8, n_resblocks=n, **sizes, kernel_size=7) for n in (1, 2))
    block = two - one
    local = 12 * 12 * 2 + 12 * 3 + 3 * 49 + 3 * 49 * 4 + 12 * 49
    ffn = 12 * 48 + 48 * 9 + 24 * 12
    attention = 12 * 36 + 36 * 9 + 12 * 12 + 12 * 6
    maps = 12 * 12 * 6 + 12 * 6 + 12 * 2 + 12 * 12  # last convolution times maps of heads; sums over one window
    assert block == 64 * (local + 2 * ffn + attention) + maps


def test_products_with_kept_keys_are_counted():
    """A layer of PFT that sees 5 of the 16 keys of a window; another one adds nothing but such a layer."""
    sizes = {'n_feats': 12, 'n_heads': 2, 'window_size': 4, 'kernel_size': 3, 'topk': '5'}
    four, six = (multiply_adds('PFT-light', 4, 8, 8, depths=str(n), **sizes) for n in (4, 6))
    layer = 12 * 36 + 9 * 12 + 2 * 5 * 12 + 12 * 12 + 12 * 12 + 9 * 12 + 12 * 12
    assert six - four == 2 * 64 * layer


@pytest.mark.parametrize('name', ALL)
@pytest.mark.parametrize('scale', [4, *slow(2, 3)])
def test_multiply_adds_are_those_of_the_official_networks(name, scale, shared):
    """Counted from the official code; what it does needlessly is left out here."""
    files = (shared / 'reference' / f'{name}.json' for name in ('flops', 'flops_new'))
    official = {key: found for file in files for key, found in json.loads(file.read_text())['macs'].items()}
    expected = official[f'{name}_x{scale}']['macs']
    found = multiply_adds(name, scale, *input_size(scale))
    if name == 'LCoAN':  # match convolutions of groups 2 to 10, whose results nothing uses
        height, width = input_size(scale)
        expected -= 9 * 9 * 128 * 128 * height * width
    if name.startswith('DLGSANet'):  # products of maps and values, which are a part of the convolution after them
        expected -= official[f'{name}_x{scale}']['by_op']['bmm'] // 2
    if name.startswith('ASID'):  # matrices that follow one another are multiplied first: two less, then one less
        height, width = input_size(scale)
        groups = 8 if name == 'ASIDd8' else 3
        expected -= (2 + groups - 1) * 2 * (12**2 + 24**2 + 36**2) * height * width
    if name == 'CATANet':  # linear layers of the 16 / 20 / 24 / 28 pixels of a patch, once for each pixel of the image
        sides = [[math.ceil((side - size) / (size - 2)) + 1 for side in input_size(scale)] for size in (16, 20, 24, 28)]
        pixels = [math.prod(counts) * size**2 for counts, size in zip(sides, (16, 20, 24, 28), strict=True)]
        expected -= 2 * sum(count - math.prod(input_size(scale)) for count in pixels) * (40 * 112 + 40 * 40)
    if name == 'HiT-SRF':  # q (v^T v) in place of (q v^T) v, and no projection of the padding
        for window, cells in ((4, 16), (8, 64), (16, 64), (32, 64), (48, 64), (64, 64)):
            windows = math.prod(math.ceil(side / window) for side in input_size(scale))
            padded = windows * window**2
            expected -= 4 * (padded * cells * 30 - 900 * (padded + windows * cells))
            expected -= 4 * 60**2 * (padded - math.prod(input_size(scale)))
    if name == 'PFT-light':  # products of queries and keys of layers 0 and 1 are made again for layers 2 and 3
        expected += 2 * 1024 * 52 * math.prod(-(-side // 32) * 32 for side in input_size(scale))
    assert found == pytest.approx(expected, rel=5e-3)


def test_published_figures_are_of_known_networks():
    assert set(PUBLISHED) <= set(NETWORKS)
    assert all(set(rows) == {2, 3, 4} for rows in PUBLISHED.values())


def test_deviations_are_marked(monkeypatch):
    """OmniSR's code has more parameters than its table; ATD-light's has as many."""
    monkeypatch.setattr('measure.costs.measure_apart', lambda *_: (0.25, 2e8))
    rows = [cost(name, 4, 'cpu') for name in ('OmniSR', 'ATD-light', 'EDSR-baseline')]
    assert [row['deviates'] for row in rows] == [True, False, False]
    lines = table(rows).splitlines()
    assert ' '.join(lines[3].split()) == 'ATD-light x4 768.8 769.0 99.0 100.1 250.0 189.7 200 753 26.97'
    assert [' * ' in line for line in lines[2:5]] == [True, False, False]
    assert points(rows) == {
        'x4': [('OmniSR', rows[0]['parameters'], 26.64, rows[0]['multiply_adds']),
               ('ATD-light', rows[1]['parameters'], 26.97, rows[1]['multiply_adds'])]
    }  # fmt: skip


@pytest.mark.parametrize('names, scales', [(['ASID'], [8]), (['ASID'], [2, 8]), (['ASID', 'ATD'], [8])])
def test_scales_that_a_network_does_not_have(names, scales):
    with pytest.raises(UserError, match=r'--scale \S*8: ASID enlarges by 2, 3, 4; choose among these'):
        find_pairs(names, scales)


def test_several_networks_are_measured_where_they_can():
    assert find_pairs(['EDSR', 'ASID'], [4, 8]) == [('EDSR', 4), ('EDSR', 8), ('ASID', 4)]


def test_a_network_that_does_not_fit_has_no_latency(monkeypatch):
    def killed(*_: object) -> None:
        raise RuntimeError('not enough memory')

    monkeypatch.setattr('measure.costs.ProcessPoolExecutor', killed)
    row = cost('EDSR-baseline', 2, 'cpu')
    assert (row['latency'], row['memory']) == (None, None)
    assert row['parameters'] == 1369859


@pytest.mark.parametrize(('seconds', 'counted'), [([9, 1, 2], [1, 2]), ([70, 1, 2], [70])])
def test_a_first_call_counts_if_it_is_long(monkeypatch, seconds, counted):
    calls = iter(seconds)
    monkeypatch.setattr('measure.costs.timed', lambda call, device: next(calls))
    monkeypatch.setattr('measure.costs.FIRST', 60.0)
    monkeypatch.setattr('measure.costs.SECONDS', 2.5)
    assert repeated(print, 'cpu') == counted


def test_measuring_processes_compute_float32_in_full():
    # PyTorch itself lets convolutions of a GPU round to 10 bits.
    for backend in ('cudnn', 'cuda.matmul'):
        assert not apart(eval, f"__import__('torch').backends.{backend}.allow_tf32")


@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
def test_a_measuring_process_ends_with_the_program():
    program = 'import time; from measure.costs import apart; apart(time.sleep, 600)'
    process = subprocess.Popen([sys.executable, '-c', program], cwd=ROOT / 'src')

    def wait(until):
        end = time.monotonic() + 60
        while not until():
            assert time.monotonic() < end
            time.sleep(0.1)

    def measuring():
        return [pid for pid in children(process.pid) if b'spawn_main' in Path(f'/proc/{pid}/cmdline').read_bytes()]

    wait(measuring)
    pid = measuring()[0]
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait(lambda: not Path(f'/proc/{pid}').exists())
