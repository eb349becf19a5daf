"""--profile with --forms: several forms of running in one process. No test looks at how long something takes."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.autograd import DeviceType
from torch.optim import Adam

from error import UserError
from measure import speed_forms
from measure.speed import Form, make
from measure.speed_forms import (
    HEAVY,
    LIGHT,
    difference,
    ordered,
    parse_forms,
    plan,
    rate,
    reason,
    step,
    sums_of,
    watched,
)
from measure.speed_report import compare, parts, per_second, read_report, table
from model import NETWORKS
from model.common import NetworkSpec
from networks import MODELS
from system.numerics import precision
from tests.measure.test_speed import made, run, tiny  # noqa: F401  a fixture

SPREAD = {'median': 2.0, 'quartiles': [1.0, 4.0]}


@pytest.fixture
def small(tiny, monkeypatch):  # noqa: F811
    """As `tiny`, the multiply-adds counted here."""
    monkeypatch.setattr(speed_forms, 'input_size', lambda scale: (20, 28))
    monkeypatch.setattr(speed_forms, 'CPU_SIDES', (64, 8, 1))
    monkeypatch.setattr(speed_forms, 'COPIED', {'cpu': 2**10})
    monkeypatch.setattr(speed_forms, 'LATENCY', 0.0)
    monkeypatch.setattr(speed_forms, 'STEP', 0.0)

    @contextmanager
    def counted(pairs):
        yield lambda name, scale: 10**6

    monkeypatch.setattr(speed_forms, 'counted', counted)


# Forms


def test_forms_by_words():
    bf16, fp16 = (torch.bfloat16,), (torch.float16, torch.bfloat16)
    assert parse_forms('float32+bf16+fp16-channels_last+compiled-bf16', 'cpu') == {
        'float32': Form(), 'bf16': Form(dtypes=bf16), 'fp16-channels_last': Form(channels_last=True, dtypes=fp16),
        'compiled-bf16': Form(compiled=True, dtypes=bf16),
    }  # fmt: skip
    found = parse_forms(speed_forms.DEFAULT, 'cuda')
    assert list(found) == ['float32', 'tf32', 'bf16', 'graph', 'bf16-graph']
    assert [form.tf32 for form in found.values()] == [False, True, False, False, False]
    assert [form.graph for form in found.values()] == [False, False, False, True, True]
    assert str(Form.parse('bf16-channels_last-graph')) == 'eager, graph, channels_last, bfloat16'
    assert str(Form.parse('tf32')) == 'eager, TF32, float32'


@pytest.mark.parametrize(
    ('text', 'found'),
    [('fast', "'fast'"), ('', "''"), ('bf16-', "''"), ('bf16-fp16', 'bf16-fp16'), ('tf32-float32', 'two types'),
     ('graph-graph', 'twice'), ('graph', 'GPUs'), ('bf16-graph', 'GPUs'), ('tf32', 'TF32')],
)  # fmt: skip
def test_other_forms_are_refused(tmp_path, capsys, text, found):
    with pytest.raises(UserError, match=found):
        parse_forms(text, 'cpu')
    if text:
        assert run(tmp_path, f'--profile --model EDSR --forms {text}') == 2
        message = capsys.readouterr().err
        assert found in message and message.count('\n') == 1
        assert not (tmp_path / 'profile').exists()


def test_tf32_is_on_in_its_form_alone():
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [backend.allow_tf32 for backend in backends]
    for wanted in (False, True):
        with precision(wanted):
            assert [backend.allow_tf32 for backend in backends] == [wanted, wanted]
    with pytest.raises(KeyError), precision(not before[0]):
        raise KeyError
    assert [backend.allow_tf32 for backend in backends] == before


def test_every_network_has_a_place_in_the_order():
    assert sorted([*LIGHT, *HEAVY, 'Bicubic']) == sorted(MODELS)
    found = ordered([('ATD', 4), ('ATD', 2), ('EDSR-baseline', 4), ('ASID', 4), ('ASID', 2), ('Bicubic', 2)])
    assert found == [('ASID', 4), ('ASID', 2), ('EDSR-baseline', 4), ('ATD', 4), ('ATD', 2), ('Bicubic', 2)]


# Measurements


@pytest.mark.parametrize(
    ('seconds', 'budget', 'expected'),
    [(0.001, 0.7, (20, 50)), (0.01, 0.7, (20, 50)), (0.02, 0.7, (10, 25)), (0.1, 0.7, (2, 5)), (0.4, 0.7, (2, 5)),
     (2.0, 0.7, (1, 3)), (0.0, 0.7, (20, 50)), (0.1, 0.0, (2, 5))],
)  # fmt: skip
def test_how_many_runs(seconds, budget, expected):
    assert plan(seconds, budget) == expected


def test_difference_is_relative_to_the_greatest_value():
    expected = torch.tensor([1.0, -4.0])
    assert difference(torch.tensor([1.5, -4.0], dtype=torch.bfloat16), expected) == 0.125
    assert difference(expected, expected) == 0


def test_a_graph_is_asked_for_as_such(monkeypatch, small):
    """The training step and the call that are captured are those that are measured."""
    seen = []

    def captured(call, images):
        seen.append(images.shape)
        call(images)
        return lambda: call(images)

    monkeypatch.setattr(speed_forms, 'captured', captured)
    monkeypatch.setattr(speed_forms, 'Adam', lambda p, lr, **flags: Adam(p, lr))  # a CPU has no capturable one
    row = speed_forms.measure_forms('EDSR', 4, 'cpu', {'graph': Form(graph=True)}, train=True)
    assert seen == [(1, 3, 20, 28), (4, 3, 48, 48)]
    assert row['failed'] == {}
    found = row['forms']['graph']
    assert (found['difference'], found['graph_difference']) == (0, 0)
    assert 'operations' not in found


def test_a_step_changes_the_weights_and_leaves_no_gradients(small):
    model, _ = make('EDSR', 4, 'cpu', Form())
    before = model.net.conv.weight.clone()
    found = step(model, Form(), torch.rand(2, 3, 8, 8), plain=True)
    assert not torch.equal(before, model.net.conv.weight)
    assert all(p.grad is None for p in model.parameters())
    assert sum(found['step_kinds'].values()) == pytest.approx(1)
    assert found['step_idle'] is None


def test_memory_of_a_gpu_counts_weights_and_growth(monkeypatch, small):
    model, _ = make('EDSR', 4, 'cpu', Form())
    weights = 4 * (48 * 3 * 9 + 48)
    monkeypatch.setattr(speed_forms, 'free', lambda device: None)
    monkeypatch.setattr('system.memory.start_peak', lambda device: 100)
    monkeypatch.setattr('system.memory.peak', lambda device: 350)
    for device, expected in {'cuda': weights + 250, 'cpu': None}.items():
        with watched(device, model) as peak:
            assert peak() == expected
    monkeypatch.setattr('system.memory.peak', lambda device: None)
    with watched('cuda', model) as peak:
        assert peak() is None


class Capture:
    """Stands for a GPU's graphs, streams and events on a CPU: a replay calls again what was called in between."""

    def __init__(self, monkeypatch, waits: bool = False, fails: bool = False) -> None:
        self.said: list[str] = []
        self.mode, self.stream, self.waits, self.fails, self.milliseconds = 0, 'main', waits, fails, 0.0
        generator = SimpleNamespace(clone_state=lambda: 'spare', graphsafe_set_state=self.said.append)
        stand_ins = {
            'Stream': lambda: SimpleNamespace(wait_stream=lambda other: None),
            'current_stream': lambda: SimpleNamespace(wait_stream=lambda other: None),
            'stream': self.on, 'synchronize': lambda: None, 'empty_cache': lambda: None, 'current_device': lambda: 0,
            'get_sync_debug_mode': lambda: self.mode, 'set_sync_debug_mode': lambda mode: setattr(self, 'mode', mode),
            'CUDAGraph': lambda: self, 'default_generators': (generator,), 'Event': lambda enable_timing: Mark(self),
        }  # fmt: skip
        for name, stand_in in stand_ins.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)

    @contextmanager
    def on(self, stream):
        self.stream = 'side'
        try:
            yield
        finally:
            self.stream = 'main'

    def capture_begin(self) -> None:
        self.said.append('begin')

    def capture_end(self) -> None:
        self.said.append('end')
        if self.fails:
            raise RuntimeError('a capture that failed before')

    def replay(self) -> None:
        self.said.append('replay')

    def call(self, images):
        self.said.append(f'call on {self.stream}')
        self.milliseconds += 3
        if self.waits and self.mode == 'error':
            raise RuntimeError('called a synchronizing CUDA operation')
        if self.fails and 'begin' in self.said:
            raise RuntimeError('not permitted when stream is capturing')
        return images + 1


class Mark:
    """An event."""

    def __init__(self, gpu: Capture) -> None:
        self.gpu = gpu

    def record(self) -> None:
        self.at = self.gpu.milliseconds

    def elapsed_time(self, end: 'Mark') -> float:
        return end.at - self.at


def test_a_graph_is_warmed_up_captured_and_replayed(monkeypatch):
    gpu = Capture(monkeypatch)
    replay = speed_forms.captured(gpu.call, torch.zeros(2))
    assert gpu.said == ['call on side'] * 3 + ['begin', 'call on side', 'end']
    assert torch.equal(replay(), torch.ones(2))
    assert gpu.said[-1] == 'replay'
    assert (gpu.mode, gpu.stream) == (0, 'main')


def test_what_waits_is_not_captured(monkeypatch):
    gpu = Capture(monkeypatch, waits=True)
    with pytest.raises(UserError, match='it cannot be captured: RuntimeError: called a synchronizing CUDA operation'):
        speed_forms.captured(gpu.call, torch.zeros(2))
    assert 'begin' not in gpu.said
    assert (gpu.mode, gpu.stream) == (0, 'main')


def test_after_a_capture_that_failed_the_rest_goes_on(monkeypatch):
    """The first reason is told, the stream is the one before, and random numbers are those of before."""
    gpu = Capture(monkeypatch, fails=True)
    with pytest.raises(UserError, match='it cannot be captured: RuntimeError: not permitted when stream is capturing'):
        speed_forms.captured(gpu.call, torch.zeros(2))
    assert gpu.said[-3:] == ['call on side', 'end', 'spare']
    assert (gpu.mode, gpu.stream) == (0, 'main')


@pytest.mark.skipif(os.name == 'nt', reason='without turns')
def test_programs_take_turns(tmp_path, monkeypatch):
    """Another process finds the lock taken inside, and free outside; on a CPU there is none."""
    monkeypatch.setattr('tempfile.tempdir', str(tmp_path))
    tries = 'import fcntl, sys; fcntl.lockf(open(sys.argv[1], "w"), fcntl.LOCK_EX | fcntl.LOCK_NB)'

    def free() -> bool:
        (file,) = tmp_path.iterdir()
        return subprocess.run([sys.executable, '-c', tries, str(file)], stderr=subprocess.DEVNULL).returncode == 0

    with speed_forms.alone('cpu'):
        assert not list(tmp_path.iterdir())
    with speed_forms.alone('cuda'):
        assert not free()
    assert free()


def test_times_of_a_gpu_are_those_between_events(monkeypatch):
    gpu = Capture(monkeypatch)
    assert speed_forms.clock(lambda: gpu.call(torch.zeros(2)), 'cuda', 4) == pytest.approx([0.003] * 4)


def test_the_first_reason_is_given():
    try:
        try:
            raise RuntimeError('it synchronised\nhere')
        finally:
            raise ValueError('and so the capture failed')
    except ValueError as error:
        assert reason(error) == 'RuntimeError: it synchronised'
    try:
        NETWORKS['EDSR'].build(4)(torch.zeros(1, 5, 8, 8))
    except UserError as error:
        assert '(common.py, line ' in reason(error)


def record(name: str, kind: DeviceType, number: int, linked: int, nanoseconds: int) -> SimpleNamespace:
    """As the profiler's."""
    return SimpleNamespace(
        name=lambda: name, device_type=lambda: kind, correlation_id=lambda: number,
        linked_correlation_id=lambda: linked, duration_ns=lambda: nanoseconds,
    )  # fmt: skip


def test_kernels_belong_to_operations():
    """Launches of the driver have numbers of their own, and marks of the program are no kernels."""
    cpu, gpu = DeviceType.CPU, DeviceType.CUDA
    found = sums_of([
        record('aten::mm', cpu, 1, 0, 9000), record('aten::add', cpu, 2, 0, 9000), record('Step', cpu, 3, 0, 9000),
        record('cudaLaunchKernel', cpu, 1, 1, 5), record('cudaDeviceSynchronize', cpu, 2, 0, 5),
        record('gemm', gpu, 1, 1, 3000), record('gemm', gpu, 4, 1, 1000), record('split', gpu, 5, 1, 500),
        record('adder', gpu, 6, 2, 2000), record('Step', gpu, 7, 3, 8000), record('Memset', gpu, 8, 0, 100),
    ])  # fmt: skip
    operations, kernels = found
    assert operations == pytest.approx({'aten::mm': 4.5e-6, 'aten::add': 2e-6, 'Memset': 1e-7})
    assert kernels == pytest.approx({'gemm': 4e-6, 'split': 5e-7, 'adder': 2e-6, 'Memset': 1e-7})


class Choosy(nn.Module):
    """Fails in bfloat16, and in training."""

    def __init__(self, scale: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 48, 3, padding=1)

    def forward(self, x):
        y = nn.functional.pixel_shuffle(self.conv(x), 4)
        if self.training or y.dtype == torch.bfloat16:
            raise ValueError('not so')
        return y


def test_what_fails_is_named_and_the_rest_measured(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(NETWORKS, 'RCAN', NetworkSpec(Choosy, (4,)))
    assert run(tmp_path, '--profile --model RCAN+ASID --forms float32+bf16') == 0
    path = tmp_path / 'profile' / 'profile.json'
    report = json.loads(path.read_text())
    assert report == read_report(path)
    asid, rcan = report['networks']
    assert (asid['model'], rcan['model']) == ('ASID', 'RCAN')
    failed = ['bf16, enlarging', 'float32, training', 'bf16, training']
    assert rcan['failed'] == dict.fromkeys(failed, 'ValueError: not so')
    assert rcan['latency'] and rcan['forms']['float32']['runs'] == 5 and rcan['step'] is None
    assert asid['failed'] == {}
    assert asid['forms']['float32']['difference'] == 0 < asid['forms']['bf16']['difference'] < 0.05
    assert [form['dtype'] for form in asid['forms'].values()] == ['float32', 'bfloat16']
    assert asid['latency'] == asid['forms']['float32']['latency']
    assert asid['patch'] == 64 and asid['forms']['bf16']['step_runs'] == 5
    assert asid['forms']['bf16']['step_operations']
    assert asid['share'] == pytest.approx(
        2 * 10**6 / asid['latency']['median'] / report['ceiling']['float32']['median']
    )
    assert set(report['ceiling']) == {'float32', 'bfloat16', 'copy'}
    said = capsys.readouterr().out
    assert 'RCAN x4, bf16, enlarging: ValueError: not so.\n' in said
    assert 'Training step, images a second; batches of 4 LR patches:' in said


def test_training_is_measured_at_the_first_scale(small, monkeypatch):
    monkeypatch.setitem(NETWORKS, 'EDSR', NetworkSpec(NETWORKS['EDSR'].build, (2, 4)))
    *_, report = speed_forms.profile_forms([('EDSR', 4), ('EDSR', 2)], 'cpu', {'float32': Form()}, lambda *_: None)
    assert [bool(row['step']) for row in report['networks']] == [True, False]


def test_what_was_measured_before_an_interrupt_is_shown(small, tmp_path, monkeypatch, capsys):
    measure = speed_forms.measure_forms

    def interrupted(name, *given, **others):
        if name == 'EDSR':
            raise KeyboardInterrupt
        return measure(name, *given, **others)

    monkeypatch.setattr(speed_forms, 'measure_forms', interrupted)
    assert run(tmp_path, '--profile --model EDSR+ASID --forms float32') == 0
    assert [row['model'] for row in json.loads((tmp_path / 'profile' / 'profile.json').read_text())['networks']] == [
        'ASID'
    ]
    said = capsys.readouterr().out
    assert 'Interrupted' in said and 'Latency in ms' in said
    assert run(tmp_path, '--profile --model EDSR --forms float32') == 130


def test_rates_by_form():
    """2e9 operations in 2 s are 1e9 a second: of ceilings of 4e9 and 1e10."""
    ceiling = {key: {'median': value} for key, value in {'float32': 4e9, 'tf32': 1e10, 'bfloat16': 2e9}.items()}
    forms = {name: Form.parse(name) for name in ('float32', 'tf32', 'bf16', 'graph')}
    row = {'latency': None, 'rate': None, 'share': None, 'forms': {
        'float32': {'latency': SPREAD, 'dtype': 'float32'}, 'tf32': {'latency': SPREAD, 'dtype': 'float32'},
        'bf16': {'latency': SPREAD, 'dtype': 'bfloat16'}, 'graph': {},
    }}  # fmt: skip
    rate(row, forms, ceiling, 10**9)
    assert [form.get('share') for form in row['forms'].values()] == [0.25, 0.1, 0.5, None]
    assert (row['latency'], row['rate'], row['share']) == (SPREAD, 1e9, 0.25)


# Text


def of_forms() -> dict:
    """A report of OmniSR x4, which is published with 22.5 ms and 273 MB."""
    forms = {
        'float32': {
            'dtype': 'float32', 'latency': {'median': 0.045, 'quartiles': [0.04, 0.05]}, 'share': 0.25, 'memory': 5e8,
            'difference': 0.0, 'step': SPREAD, 'step_memory': 3e9, 'idle': 0.2,
            'operations': [['aten::mm', 0.01]], 'kernels': [['gemm', 0.009]],
        },
        'bf16-graph': {'latency': None, 'difference': 0.01, 'graph_difference': 0.0},
    }  # fmt: skip
    latency = forms['float32']['latency']
    failed = {'bf16-graph, enlarging': 'it cannot be captured: RuntimeError: no'}
    report = made(0.045, model='OmniSR', batch=None, kinds=None, forms=forms, patch=64, failed=failed)
    report['networks'][0]['latency'] = latency
    return report | {'batch': 16}


def test_tables_by_hand():
    """45 ms are twice 22.5; 16 images in 2 s are 8 a second, in 1 to 4 s 16 to 4."""
    lines = [' '.join(line.split()) for line in table(of_forms())]
    for line in (
        'OmniSR x4 45.00 (40.00-50.00) - 22.5 2.00', 'OmniSR x4 25% -', 'OmniSR x4 500 - 273',
        'OmniSR x4 0.0e+00 1.0e-02, 0.0e+00', 'OmniSR x4 8.0 (4.0-16.0) - 64', 'OmniSR x4 3000 -',
        'OmniSR x4, float32, GPU idle 20%, operations: aten::mm 10.00',
        'OmniSR x4, float32, GPU idle 20%, kernels: gemm 9.00',
        'OmniSR x4, bf16-graph, enlarging: it cannot be captured: RuntimeError: no.',
    ):  # fmt: skip
        assert line in lines
    assert per_second(SPREAD, 16) == {'median': 8.0, 'quartiles': [4.0, 16.0]}
    assert parts(of_forms()) == {}


def test_reports_with_and_without_forms_are_compared():
    assert any('OmniSR' in line for line in compare(of_forms(), made(1.0, model='OmniSR')))
    assert compare(made(1.0), of_forms())
    assert not any('Latency in ms' in line for line in table(made(1.0)))


def test_multiply_adds_are_counted_in_other_processes():
    """Nothing of bicubic is counted."""
    with speed_forms.counted([('Bicubic', 4)]) as count:
        assert isinstance(count('Bicubic', 4), int)
