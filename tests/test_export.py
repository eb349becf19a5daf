"""Exported files, run by what other programs run them with and compared with enlarged images."""

import io
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.onnx import register_custom_op_symbolic

import export
import main
from error import UserError
from model import Model
from model.loading.description import describe, described
from tests.conftest import picture, slow
from tests.model.test_networks import SMALL

DLGSANET = {**SMALL['DLGSANet'], 'n_resgroups': 1, 'kernel_size': 3, 'tlc_size': 96}


def make(name: str, **settings: object) -> Model:
    """A small network that runs, no weight of which is as it starts."""
    torch.manual_seed(0)
    model = Model(name, 2, **settings)
    with torch.no_grad():
        for key, value in model.net.state_dict().items():
            if key.endswith('initted'):
                value.fill_(True)
            elif value.is_floating_point() and 'mean' not in key:
                value.add_(0.01 * torch.randn_like(value))
    return model


def session(content: bytes) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(content, providers=['CPUExecutionProvider'])


def run(kind: str, content: bytes) -> Callable[[np.ndarray], np.ndarray]:
    if kind == 'onnx':
        found = session(content)
        return lambda images: found.run(None, {'lr': images})[0]
    script = torch.jit.load(io.BytesIO(content))
    return lambda images: script(torch.from_numpy(images)).detach().numpy()


def enlarge(kind: str, content: bytes, images: np.ndarray) -> np.ndarray:
    return run(kind, content)(images)


def assert_enlarges(kind: str, content: bytes, model: Model, n: int, height: int, width: int) -> None:
    """The file's values round to the pixels of `Model.upscale`."""
    images = np.stack([picture(seed, height, width) for seed in range(n)])
    found = run(kind, content)(np.float32(images.transpose(0, 3, 1, 2) / 255))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, found.clip(0, 1))
    expected = np.stack([model.upscale(image) for image in images]).transpose(0, 3, 1, 2)
    assert np.abs(found * 255 - expected).max() < 0.5 + 255e-4


@pytest.mark.parametrize('kind', ['onnx', 'torchscript'])
def test_images_are_continued_before_a_network(kind: str) -> None:
    model = make('EDSR', **SMALL['EDSR'], pad_to=32)
    content = export.export(model, kind, 16)
    for shape in ((3, 27, 40), (1, 64, 24), (2, 32, 64)):
        assert_enlarges(kind, content, model, *shape)


@pytest.mark.parametrize('kind', ['onnx', 'torchscript'])
@pytest.mark.parametrize(
    'name, settings',
    [
        ('Bicubic', {}),
        ('EDSR', {**SMALL['EDSR'], 'rgb_range': 255.0}),
        ('EDSR', {**SMALL['EDSR'], 'n_colors': 1}),
        ('LCoAN', SMALL['LCoAN']),
        *slow(('OmniSR', {**SMALL['OmniSR'], 'n_resgroups': 1})),
        *slow(('SwinIR-light', {**SMALL['SwinIR-light'], 'n_resgroups': 1})),
        *slow(('ESC', {**SMALL['ESC'], 'n_resgroups': 1}), ('ESC-FP', {**SMALL['ESC-FP'], 'n_resgroups': 1})),
        *slow(*((name, SMALL[name]) for name in ('IMDN', 'BSRN'))),
    ],
)
def test_a_network_of_free_sizes(kind: str, name: str, settings: dict) -> None:
    model = make(name, **settings)
    content = export.export(model, kind, 16)
    for shape in ((3, 27, 40), (1, 50, 24), (2, 48, 32)):
        assert_enlarges(kind, content, model, *shape)


@pytest.mark.parametrize('kind', ['onnx', 'torchscript'])
@pytest.mark.parametrize('name', ['ASID', *slow('OmniSR', 'ATD-light', 'SwinIR-light', 'LCoAN')])
def test_images_of_any_size_do_no_harm(kind: str, name: str) -> None:
    """In another process, since onnxruntime divides by zero where a map has no pixel left."""
    model = make(name, **{**SMALL[name], 'n_resgroups': 1})
    content = export.export(model, kind, 16)
    with ProcessPoolExecutor(1, get_context('spawn')) as process:
        for height, width in ((1, 1), (8, 8), (3, 24), (24, 5)):
            image = picture(0, height, width)
            found = process.submit(enlarge, kind, content, np.float32(image.transpose(2, 0, 1)[None] / 255)).result()
            expected = model.upscale(image).transpose(2, 0, 1)
            assert np.abs(found[0] * 255 - expected).max() < 0.5 + 255e-4


@pytest.mark.parametrize('kind', ['onnx', 'torchscript'])
def test_a_network_of_a_fixed_size(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The windows of DLGSANet are counted in Python."""
    model, said = make('DLGSANet', **DLGSANET), []
    monkeypatch.setattr(export.log, 'info', lambda text, *values: said.append(text % values))
    content = export.export(model, kind, 16)
    assert said[0].startswith(f'DLGSANet as {kind} cannot take images of 24x24 pixels or more: ')
    assert said[1].startswith('The file takes one image of 16x16 pixels')
    assert_enlarges(kind, content, model, 1, 16, 16)
    if kind == 'onnx':
        assert session(content).get_inputs()[0].shape == [1, 3, 16, 16]


def test_the_file_says_what_it_is() -> None:
    content = export.export(make('EDSR', **SMALL['EDSR']), 'onnx', 16)
    onnx.checker.check_model(onnx.load_from_string(content), full_check=True)
    said = session(content).get_modelmeta().custom_metadata_map
    assert (said['model'], said['scale']) == ('EDSR', '2')
    assert said['lr'] == 'RGB (N, 3, H, W), float32 in [0, 1]: images of 24x24 pixels or more'
    assert session(content).get_inputs()[0].shape == ['n', 3, 'lr_height', 'lr_width']


class Sorts(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return x.argsort(dim=1, stable=True), x.argsort(dim=-1, stable=True, descending=True), x.unfold(1, 6, 3), x.mT


def test_operations_that_the_exporter_lacks() -> None:
    """Of three values many are equal, and have to stay in order."""
    for name, symbolic in export.SYMBOLICS.items():
        register_custom_op_symbolic(f'aten::{name}', symbolic, export.OPSET)
    stream, x = io.BytesIO(), torch.randint(3, (2, 50, 40))
    axes = {'x': {1: 'rows', 2: 'columns'}}
    torch.onnx.export(
        Sorts(), (x,), stream, input_names=['x'], dynamic_axes=axes, opset_version=export.OPSET, dynamo=False
    )
    for shape in ((2, 50, 40), (2, 31, 90)):
        x = torch.randint(3, shape)
        for found, expected in zip(session(stream.getvalue()).run(None, {'x': x.numpy()}), Sorts()(x), strict=True):
            np.testing.assert_array_equal(found, expected.numpy())


# The program, and what it refuses.

NAME = 'EDSR_x2'  # what --model auto finds in the file


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A file of weights of a small EDSR x2."""
    path = tmp_path / 'weights.pt'
    model = make('EDSR', **SMALL['EDSR'])
    torch.save(described(model.net.state_dict(), describe(model)), path)
    return path


def export_file(weights: Path, kind: str) -> tuple[int, Path]:
    """Run the program; its exit status and the run folder."""
    runs = weights.parent / 'runs'
    status = main.main(f'--model auto --pre_train {weights} --save_dir {runs} --export {kind}'.split())
    return status, runs / f'{NAME}_weights_export'


@pytest.mark.parametrize('kind', ['onnx', 'torchscript'])
def test_the_program_writes_a_file(weights: Path, kind: str, capsys: pytest.CaptureFixture) -> None:
    status, folder = export_file(weights, kind)
    file = folder / f'{NAME}{export.SUFFIXES[kind]}'
    assert status == 0
    assert sorted(path.name for path in folder.iterdir()) == sorted([file.name, 'log.txt'])
    assert f'Written: {file}, {file.stat().st_size / 1e6:.2f} MB' in capsys.readouterr().out
    assert_enlarges(kind, file.read_bytes(), make('EDSR', **SMALL['EDSR']), 1, 20, 30)


def test_safetensors_hold_the_weights(tmp_path: Path) -> None:
    """Read by their own library, and by this program, strictly."""
    state, file = make('LCoAN', **SMALL['LCoAN']).net.state_dict(), tmp_path / 'weights.pt'
    torch.save(state, file)
    runs = tmp_path / 'runs'
    written = [runs / f'LCoAN_x2{which}_export' / 'LCoAN_x2.safetensors' for which in ('_weights', '')]
    for source, target in zip((file, written[0]), written, strict=True):
        options = f'--pre_train {source} --save_dir {tmp_path / "runs"} --export safetensors --window_size 16 --cpu'
        assert main.main(['--model', 'auto', *options.split()]) == 0
        found = load_file(target)
        assert found.keys() == state.keys()
        assert all(torch.equal(found[key], value) and found[key].dtype == value.dtype for key, value in state.items())


def test_a_network_without_weights_has_none_to_write() -> None:
    with pytest.raises(UserError, match='--export safetensors: Bicubic has no weights; choose another format'):
        export.export(Model('Bicubic', 2), 'safetensors', 16)


@pytest.mark.parametrize('old', [None, b'an older file'])
def test_a_wrong_file_is_not_kept(
    weights: Path, old: bytes | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    trace, other = export.to_torchscript, export.Enlarger(make('EDSR', **{**SMALL['EDSR'], 'res_scale': 0.5})).eval()
    monkeypatch.setattr(export, 'to_torchscript', lambda net, form: trace(other, form))
    file = weights.parent / 'runs' / f'{NAME}_weights_export' / f'{NAME}.torchscript'
    if old:
        file.parent.mkdir(parents=True)
        file.write_bytes(old)
    assert export_file(weights, 'torchscript')[0] == 2
    assert '--export torchscript: EDSR cannot be exported (its results differ' in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in file.parent.iterdir() if path.name != 'log.txt'} == (
        {file.name: old} if old else {}
    )


def test_a_network_that_cannot_be_traced_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make('EDSR', **SMALL['EDSR'])
    monkeypatch.setattr(model.net, 'forward', lambda x: torch.from_numpy(np.linalg.pinv(x.numpy())))
    with pytest.raises(UserError, match=r'^--export onnx: EDSR cannot be exported \(.+\); choose another format\.$'):
        export.export(model, 'onnx', 16)


@pytest.mark.parametrize('package', ['onnx', 'onnxruntime'])
def test_a_missing_package_is_named(
    weights: Path, package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    status, folder = export_file(weights, 'onnx')
    assert status == 2
    assert capsys.readouterr().err.endswith(
        f'Error: --export onnx: {package} is missing; pip install onnx onnxruntime gets it.\n'
    )
    assert [path.name for path in folder.iterdir()] == ['log.txt']


def test_onnxscript_is_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, 'onnxscript', None)
    assert export.export(Model('Bicubic', 2), 'onnx', 16)


def test_a_network_without_weights_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main.main(f'--model EDSR --scale 2 --export onnx --cpu --save_dir {tmp_path / "runs"}'.split()) == 2
    assert 'EDSR has no weights to test: give a file with --pre_train' in capsys.readouterr().err
    assert not (tmp_path / 'runs').exists()
