"""--profile --against. No test looks at how long something takes."""

import numpy as np
import pytest

import main
from error import UserError
from measure import engines
from measure.engines import ENGINES, OURS, Task, beside_engines, by_turns, onnx_files, parse_engines
from measure.speed_report import engines_table

SIZE = (24, 40)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small images, in few calls."""
    monkeypatch.setattr(engines, 'SIZES', (SIZE,))
    monkeypatch.setattr(engines, 'TURNS', 2)
    monkeypatch.setattr(engines, 'PAUSE', 0.0)


@pytest.fixture(scope='module')
def task() -> Task:
    """PAN, which is small and takes any size."""
    file = onnx_files('PAN', 2)['128x128']
    assert isinstance(file, bytes)
    return Task('PAN', 2, file, (1, 3, *SIZE), 1)


def test_all_engines_enlarge_alike(task: Task) -> None:
    images = np.random.default_rng(1).random(task.shape, np.float32)
    mine, *others = (enlarger(task)(images) for enlarger in ENGINES.values())
    assert mine.shape == (1, 3, 48, 80)
    assert len(others) == 2
    for other in others:
        np.testing.assert_allclose(other, mine, rtol=0, atol=2e-5)


def test_each_engine_has_its_times(task: Task) -> None:
    found, failed = by_turns(task, [*ENGINES])
    assert [*found] == ['FrugalSR', 'onnxruntime', 'openvino']
    assert not failed
    for times in found.values():
        low, high = times['quartiles']
        assert 0 < low <= times['median'] <= high


def test_an_engine_that_fails_leaves_the_others(task: Task) -> None:
    found, failed = by_turns(task._replace(file=b'no file of ONNX'), [OURS, 'onnxruntime'])
    assert found['FrugalSR'] is not None
    assert found['onnxruntime'] is None
    assert [*failed] == ['onnxruntime']


def test_networks_of_a_fixed_size_have_a_file_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, 'SIZES', ((16, 16), (16, 24)))
    import onnxruntime

    for size, file in onnx_files('DLGSANet-tiny', 4).items():
        width, height = map(int, size.split('x'))
        assert onnxruntime.InferenceSession(file).get_inputs()[0].shape == [1, 3, height, width]


def test_the_report_has_sizes_times_and_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    spread = {'median': 0.5, 'quartiles': [0.4, 0.6]}
    times = {'FrugalSR': spread, 'onnxruntime': {'median': 1.0, 'quartiles': [0.9, 1.2]}, 'openvino': None}
    monkeypatch.setattr(engines, 'onnx_files', lambda *_: {'40x24': b'file'})
    monkeypatch.setattr(engines, 'attempt', lambda work, *given: engines.onnx_files(*given))
    monkeypatch.setattr(engines, 'by_turns', lambda *_: (times, {'openvino': 'no reason'}))
    report = {'networks': [{'model': 'PAN', 'scale': 2, 'failed': {}}]}
    (found,) = beside_engines(iter([report]), ['onnxruntime', 'openvino'], lambda *_: None)
    (row,) = found['networks']
    assert row['against'] == {'40x24': times}
    assert row['failed'] == {'openvino 40x24': 'no reason'}
    _, head, line = engines_table(found)
    assert head.split() == ['FrugalSR', 'onnxruntime', 'openvino', 'ratio']
    # 1.0 / 0.5, between 0.9 / 0.6 and 1.2 / 0.4
    assert line.split('  ')[-1].strip() == '2.00 (1.50-3.00)'
    assert '500.0 (400.0-600.0)' in line and line.split()[:3] == ['PAN', 'x2', '40x24']
    times['FrugalSR'] = None  # ours may fail, too
    assert engines_table(found)[2].split() == ['PAN', 'x2', '40x24', '-', '1000.0', '(900.0-1200.0)', '-', '-']


@pytest.mark.parametrize(
    'text, device, said',
    [
        ('onnxruntime+tensorrt', 'cpu', "'tensorrt' is none of onnxruntime, openvino"),
        ('FrugalSR', 'cpu', "'FrugalSR' is none of"),
        ('openvino', 'cuda', 'give --cpu'),
    ],
)
def test_what_is_no_engine(text: str, device: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse_engines(text, device)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, 'find_spec', lambda name: None if name == 'openvino' else True)
    assert parse_engines('onnxruntime', 'cpu') == ['onnxruntime']
    with pytest.raises(UserError, match='openvino is not installed; pip install openvino gets it'):
        parse_engines('onnxruntime+openvino', 'cpu')


@pytest.mark.parametrize('others', [[], ['--profile', '--amp', 'bf16'], ['--profile', '--compile']])
def test_options_that_it_does_not_go_with(others: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(['--cpu', '--model', 'PAN', '--against', 'onnxruntime', *others]) == 2
    assert '--against' in capsys.readouterr().err
