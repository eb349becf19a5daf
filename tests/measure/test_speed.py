"""--profile: what is measured, and what is made of it. No test looks at how long something takes."""

import io
import json
import os
import re

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import conv2d, pixel_shuffle

import main
from error import UserError
from measure import speed
from measure.costs import apart
from measure.speed import KINDS, Form, attempt, by_kind, clocked, kind, lr_patch, profiled, spread
from measure.speed_report import compare, exponent, growths, judged, parts, ratio, read_report, scaled, table
from model import NETWORKS
from model.common import NetworkSpec
from networks import MODELS
from report.picture import bars, growth

CPU = ('cpu', Form())
SQUARES = (64, 128, 256)


class Tiny(nn.Module):
    """One convolution, enlarged by 4, with a softmax and a product of matrices after it."""

    def __init__(self, scale: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 48, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = pixel_shuffle(self.conv(x), 4)
        return x + x.softmax(1) @ torch.eye(x.shape[-1])


class Untrainable(Tiny):
    """Fails in training and in large images."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training or x.shape[-1] == 32:
            raise ValueError('not here\nnor there')
        return super().forward(x)


@pytest.fixture
def tiny(monkeypatch):
    """Small networks in place of published ones, in this process, on small images, with few calls."""
    for name, network in {'EDSR': Tiny, 'RCAN': Untrainable, 'ASID': Tiny}.items():
        monkeypatch.setitem(NETWORKS, name, NetworkSpec(network, (4,)))
    monkeypatch.setattr('measure.speed.apart', lambda work, *given: work(*given))
    monkeypatch.setattr('measure.speed.input_size', lambda scale: (20, 28))
    monkeypatch.setattr('measure.costs.SECONDS', 0.0)
    monkeypatch.setattr('measure.costs.FIRST', 0.0)
    for constant, value in {'MATRIX': 64, 'CHANNELS': 8, 'COPIED': 2**10, 'SIDES': (8, 16, 32)}.items():
        monkeypatch.setattr(speed, constant, value)
    monkeypatch.setattr('measure.speed_report.SIDES', (8, 16, 32))


def run(tmp_path, options: str) -> int:
    return main.main([*options.split(), '--cpu', '--save_dir', str(tmp_path)])


def flat(value: object) -> list:
    """All numbers in a JSON value."""
    if isinstance(value, dict | list):
        return [n for item in (value.values() if isinstance(value, dict) else value) for n in flat(item)]
    return [value] if isinstance(value, int | float) else []


def made(latency: float, ceiling: float = 1e9, width: float = 0.01, **changes) -> dict:
    """A report of one network, with quartiles `width` of a time to both sides."""

    def around(value: float) -> dict:
        return {'median': value, 'quartiles': [value * (1 - width), value * (1 + width)]}

    row = {
        'model': 'EDSR', 'scale': 4, 'multiply_adds': 10**8, 'dtype': 'float32', 'latency': around(latency),
        'batch': around(0.1), 'step': None, 'memory': 2e6, 'step_memory': None, 'patch': None, 'rate': 2e8 / latency,
        'share': 2e8 / latency / ceiling, 'kinds': dict.fromkeys(KINDS, 0.0) | {'convolution': 0.75, 'other': 0.25},
        'growth': [{'side': side, 'seconds': around(side**4 / 1e9), 'memory': side**2 * 1000} for side in SQUARES],
        'failed': {'training': 'memory ran out'},
    }  # fmt: skip
    exact = {'median': ceiling, 'quartiles': [ceiling, ceiling]}
    return {
        'device': 'a machine', 'threads': 1, 'torch': '2.13.0', 'date': '2026-11-20', 'form': 'eager, float32',
        'ceiling': {'float32': exact, 'copy': exact}, 'networks': [row | changes],
    }  # fmt: skip


# What is measured


def test_all_figures_are_measured(tiny, tmp_path, capsys):
    assert run(tmp_path, '--profile --growth --model EDSR+ASID') == 0
    folder = tmp_path / 'profile'
    report = json.loads((folder / 'profile.json').read_text())
    assert report == read_report(folder / 'profile.json')
    for row in report['networks']:
        assert None not in row.values()
        assert row['failed'] == {}
        assert row['patch'] == {'EDSR': 48, 'ASID': 64}[row['model']]
        assert [at['side'] for at in row['growth']] == [8, 16, 32]
        spreads = [row['latency'], row['batch'], row['step'], *(at['seconds'] for at in row['growth'])]
        assert all(low <= s['median'] <= high for s in spreads for low, high in [s['quartiles']])
        assert sum(row['kinds'].values()) == pytest.approx(1)
        measured = [value for key, value in row.items() if key not in ('kinds', 'growth', 'memory', 'step_memory')]
        assert min(flat(measured)) > 0
        assert row['memory'] >= 0
        macs = 20 * 28 * 9 * 3 * 48 + 3 * 80 * 112 * 112
        assert row['multiply_adds'] == macs
        assert row['share'] == pytest.approx(
            2 * macs / row['latency']['median'] / report['ceiling']['float32']['median']
        )
    assert min(flat(report['ceiling'])) > 0
    assert (report['threads'], report['form'], report['torch']) == (
        torch.get_num_threads(), 'eager, float32', torch.__version__
    )  # fmt: skip
    assert re.fullmatch(r'\d{4}-\d\d-\d\d', report['date'])
    for name in ('profile.png', 'growth.png'):
        assert Image.open(folder / name).format == 'PNG'
    said = capsys.readouterr().out
    assert (folder / 'log.txt').read_text() == said
    assert 'Time by kind of operation' in said
    assert 'LR squares by side' in said


def test_what_fails_is_named_and_the_rest_measured(tiny, tmp_path, capsys):
    assert run(tmp_path, '--profile --growth --model RCAN+EDSR') == 0
    first, second = json.loads((tmp_path / 'profile' / 'profile.json').read_text())['networks']
    assert first['failed'] == {'training': 'ValueError: not here', '32x32': 'ValueError: not here'}
    assert (first['step'], first['step_memory'], [at['side'] for at in first['growth']]) == (None, None, [8, 16])
    assert first['latency'] and first['share'] and second['step']
    said = capsys.readouterr().out
    assert 'RCAN x4, training: ValueError: not here.\n' in said
    assert 'RCAN x4, 32x32: ValueError: not here.\n' in said


def test_no_network_works(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr('measure.speed.attempt', lambda *_: 'memory ran out')
    assert run(tmp_path, '--profile --growth --model EDSR') == 0
    row = json.loads((tmp_path / 'profile' / 'profile.json').read_text())['networks'][0]
    assert row['failed'] == dict.fromkeys(('enlarging', 'training', '8x8'), 'memory ran out')


def test_large_squares_are_not_waited_for(tiny, monkeypatch):
    monkeypatch.setattr('measure.speed.PATIENCE', 0.0)
    row = speed.measure_network('EDSR', 4, *CPU, made(1.0)['ceiling'], growth=True)
    assert [at['side'] for at in row['growth']] == [8]


def test_a_killed_process():
    with pytest.raises(MemoryError):
        apart(os._exit, 9)


def failing(error: Exception) -> dict:
    raise error


def test_every_failure_has_a_sentence(monkeypatch):
    monkeypatch.setattr('measure.speed.apart', lambda work, *given: work(*given))
    errors = [RuntimeError('not enough memory: 5 bytes'), UserError('it cannot be'), KeyError('a'), OSError()]
    said = [attempt(failing, error) for error in errors]
    assert said == ['memory ran out', 'it cannot be', "KeyError: 'a'", 'OSError: ']
    monkeypatch.setattr('measure.speed.apart', lambda *_: failing(MemoryError()))
    assert attempt(failing, OSError()) == 'memory ran out'


def test_forms(tiny):
    """What --channels_last and --amp say reaches the network."""
    form = Form(channels_last=True, dtypes=(torch.bfloat16,))
    model, call = speed.make('EDSR', 4, 'cpu', form)
    seen = []
    model.net.conv.register_forward_hook(lambda net, inputs, output: seen.append((*inputs, output)))
    call(speed.images_for(model, 2, 3, 8, 8))
    images, output = seen[0]
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert output.dtype == torch.bfloat16
    assert speed.infer('EDSR', 4, 'cpu', form)['dtype'] == 'bfloat16'
    assert set(speed.gauge('cpu', form.dtypes)) == {'float32', 'bfloat16', 'copy'}
    assert [str(f) for f in (form, Form(compiled=True))] == ['eager, channels_last, bfloat16', 'compiled, float32']


def test_patches_are_those_of_the_papers():
    assert [lr_patch(name, 2) for name in ('RCAN', 'ASID', 'ATD', 'DLGSANet-tiny')] == [48, 64, 64, 48]
    assert [lr_patch(name, 4) for name in ('LCoAN', 'ATD', 'SwinIR-light')] == [48, 96, 64]
    assert lr_patch('EDSR', 8) == 48
    assert all(lr_patch(name, scale) in (48, 64, 96) for name in MODELS[1:] for scale in (2, 3, 4))
    with pytest.raises(UserError, match='no recipe'):
        lr_patch('Bicubic', 4)


NAMES = {
    'convolution': 'aten::mkldnn_convolution aten::_slow_conv2d_forward aten::cudnn_convolution DynamicConv '
    'aten::embedding_bag aten::_embedding_bag_forward_only',
    'matrix product': 'aten::mm aten::addmm aten::bmm aten::baddbmm aten::_scaled_dot_product_flash_attention_for_cpu',
    'normalisation': 'aten::native_layer_norm aten::_softmax aten::linalg_vector_norm aten::native_batch_norm '
    'frugalsr::contrast',
    'index, sort': 'aten::index_select aten::gather aten::scatter_ aten::sort aten::argmax aten::index',
    'copy, layout': 'aten::copy_ aten::cat aten::pixel_shuffle aten::unbind aten::to aten::t aten::mT '
    'aten::constant_pad_nd aten::empty',
    'elementwise': 'aten::add_ aten::mul aten::addcmul_ aten::gelu aten::relu_ aten::clamp_min aten::exp_ aten::sum '
    'aten::eq aten::upsample_bilinear2d aten::max_pool2d_with_indices aten::silu aten::__or__ aten::rsqrt',
    'compiled': 'triton_poi_fused_convolution_relu_0 Torch-Compiled CompiledFxGraph',
    'other': 'aten::item aten::resolve_conj cudaLaunchKernel',
}  # fmt: skip


def test_kinds_of_operations():
    assert set(NAMES) == set(KINDS)
    found = {name: [kind(operation) for operation in names.split()] for name, names in NAMES.items()}
    assert found == {name: [name] * len(names.split()) for name, names in NAMES.items()}


def test_nearly_all_time_is_of_a_known_kind():
    """Of a real network that sorts, gathers, convolves, multiplies and normalises."""
    model, call = speed.make('ATD-light', 4, 'cpu', Form())
    model.net.eval()
    images = speed.images_for(model, 1, 3, 16, 16)
    with torch.inference_mode():
        call(images)
        # Another program may come between, once.
        shares = min((by_kind(lambda: call(images), 'cpu') for _ in range(3)), key=lambda found: found['other'])
    assert list(shares) == list(KINDS)
    assert sum(shares.values()) == pytest.approx(1)
    assert shares['other'] < 0.05
    assert shares['compiled'] == 0
    assert all(shares[name] > 0 for name in KINDS if name not in ('other', 'compiled'))


def test_both_clocks_see_what_runs():
    x = torch.randn(2, 3, 8, 8)

    def call() -> None:
        conv2d(x, x[:1, :, :3, :3]).exp_().sort()

    for found in (clocked(call), profiled(call, 'cpu')):
        assert {'aten::exp_', 'aten::sort'} <= set(found)
        assert any(kind(name) == 'convolution' for name in found)
        assert all(seconds >= 0 for seconds in found.values())


# What is made of it


def test_median_and_quartiles():
    assert spread([5.0, 1.0, 2.0, 4.0, 3.0]) == {'median': 3.0, 'quartiles': [2.0, 4.0]}
    assert spread([1.0, 3.0, 2.0]) == {'median': 2.0, 'quartiles': [1.5, 2.5]}
    assert spread([7.0]) == {'median': 7.0, 'quartiles': [7.0, 7.0]}


@pytest.mark.parametrize('power', [0.5, 1.0, 2.0])
def test_exponent_is_that_of_the_last_points(power):
    points = [(8, 1e9), *((side, 3 * (side * side) ** power) for side in (64, 128, 256))]
    assert exponent(points) == pytest.approx(power)
    assert exponent(points[:1]) is None


def test_time_that_grows_faster_than_the_image_is_marked():
    """Seconds as the square of the number of pixels, memory as the number; then both as the number."""
    cells = '0.02 s, 4 MB 0.27 s, 16 MB 4.29 s, 66 MB - -'
    assert ' '.join(table(made(1.0))[-2].split()) == f'EDSR x4 {cells} 2.00 * 1.00'
    linear = [{'side': side, 'seconds': spread([side * side / 1e3]), 'memory': None} for side in SQUARES]
    cells = '4.10 s, - MB 16.38 s, - MB 65.54 s, - MB - -'
    assert ' '.join(table(made(1.0, growth=linear))[-2].split()) == f'EDSR x4 {cells} 1.00 -'
    assert list(growths(made(1.0))['seconds']) == ['EDSR x4, pixels^2.00 *']
    assert growths(made(1.0, growth=[])) == {'seconds': {}, 'MB': {}}


def test_table_by_hand():
    """1e8 multiply-adds in 0.5 s are 0.4 GFLOP/s, 40% of a ceiling of 1."""
    lines = [' '.join(line.split()) for line in table(made(0.5, growth=[]))]
    assert 'EDSR x4 0.1 500.0 (495.0-505.0) 0.4 40% 2 40.00 - - -' in lines
    assert 'EDSR x4 0% 75% 0% 0% 0% 0% 0% 25%' in lines
    assert 'EDSR x4, training: memory ran out.' in lines
    assert not any('LR squares' in line for line in lines)


def test_bars_are_the_share_of_the_ceiling():
    row = parts(made(0.5))['EDSR x4']
    assert (row['convolution'], row['other'], sum(row.values())) == pytest.approx((0.3, 0.1, 0.4))
    assert parts(made(0.5, share=None)) == {}


def test_pictures_are_png_files():
    for png in (bars(parts(made(0.5)), 'note'), bars({}, 'note'), growth(growths(made(0.5)))):
        assert Image.open(io.BytesIO(png)).format == 'PNG'


# Comparison


def test_ratio_by_hand():
    new, old = ({'median': m, 'quartiles': [m - 1, m + 1]} for m in (9.0, 3.0))
    assert ratio(new, old) == {'median': 3.0, 'quartiles': [2.0, 5.0]}
    rate = {'median': 10.0, 'quartiles': [5.0, 20.0]}
    assert scaled(old, rate) == {'median': 30.0, 'quartiles': [10.0, 80.0]}


@pytest.mark.parametrize(
    'ranges', [((1, 2), (3, 4)), ((1, 3), (2, 4)), ((2, 4), (1, 3)), ((3, 4), (1, 2)), ((1, 4), (2, 3))]
)
def test_no_change_is_an_overlap(ranges):
    new, old = ({'median': sum(r) / 2, 'quartiles': list(r)} for r in ranges)
    (a, b), (c, d) = ranges
    assert judged(ratio(new, old)).endswith('=') == (max(a, c) <= min(b, d))


def test_comparison():
    """Half the time at twice the ceiling is no change; half the time at the same ceiling is half."""
    same = compare(made(0.5, 2e9, batch=None), made(1.0, 1e9))
    assert any(line.startswith('The ceilings differ by a factor of 2.0: ') for line in same)
    assert any(re.fullmatch(r'EDSR +x4 +1\.00 \(0\.98-1\.02\) = +- +- +1\.00 +-', line) for line in same)
    faster = compare(made(0.5, memory=1e6), made(1.0))
    assert any(
        re.fullmatch(r'EDSR +x4 +0\.50 \(0\.49-0\.51\) +1\.00 \(0\.98-1\.02\) = +- +0\.50 +-', s) for s in faster
    )
    assert not any('differ' in line for line in compare(made(1.0, 1.1e9), made(1.0, 1e9)))
    other = compare(made(1.0, model='RCAN'), made(1.0))
    assert 'In one of them alone: EDSR x4, RCAN x4.' in other
    assert 'Old: EDSR x4, training: memory ran out.' in other
    assert all(
        sum(key in line for line in faster) == 1
        for key in ('New: a machine, 1', 'Old: a machine, 1', 'float32 ceiling')
    )


@pytest.mark.parametrize('changes', [{'patch': 48}, {'batch': 16}])
def test_steps_of_other_batches_or_patches_are_not_compared(changes):
    step = {'step': {'median': 1.0, 'quartiles': [1.0, 1.0]}, 'step_memory': 1e6, 'patch': 64}
    new, old = made(0.5, **step), made(1.0, **step)
    assert any(re.fullmatch(r'EDSR +x4 .* 1\.00 \(1\.00-1\.00\) = +1\.00 +1\.00', line) for line in compare(new, old))
    old |= {key: value for key, value in changes.items() if key == 'batch'}
    old['networks'][0] |= {key: value for key, value in changes.items() if key == 'patch'}
    lines = compare(new, old)
    assert any(re.fullmatch(r'EDSR +x4 +0\.50 .* = +- +1\.00 +-', line) for line in lines)
    assert 'Trained on other batches or patches: EDSR x4.' in lines


def test_compare_measures_only_if_asked(tiny, tmp_path, capsys):
    """Given the file of the run folder itself, which is read, and kept, before it is written anew."""
    assert run(tmp_path, '--profile --model EDSR') == 0
    path = tmp_path / 'profile' / 'profile.json'
    before = path.read_bytes()
    old = tmp_path / 'old.json'
    old.write_text(json.dumps(made(1.0)))
    assert run(tmp_path, f'--compare {old}') == 0
    assert path.read_bytes() == before
    assert 'Old: a machine, 1 threads, torch 2.13.0, 2026-11-20; eager, float32;' in capsys.readouterr().out
    assert run(tmp_path, f'--profile --model EDSR --compare {path}') == 0
    assert 'New / old' in capsys.readouterr().out
    assert (tmp_path / 'profile' / 'profile_before.json').read_bytes() == before


@pytest.mark.parametrize(
    'text', [None, '', 'x', '[]', '{}', '{"networks": [1]}', '{"ceiling": {}, "networks": []}', '3', '\x00']
)
def test_other_files_are_refused(tmp_path, capsys, text):
    path = tmp_path / 'old.json'
    if text is not None:
        path.write_text(text)
    assert run(tmp_path, f'--profile --model EDSR --compare {path}') == 2
    message = capsys.readouterr().err
    assert message == f'Error: {path} is missing, or no profile.json of this program: measure one with --profile.\n'
    assert not (tmp_path / 'profile').exists()
