"""Descriptions in files of weights: there for this program, and no hindrance to others."""

import json
from collections import OrderedDict
from pathlib import Path

import pytest
import safetensors
import torch
from torch import Tensor

import main
from model import build
from model.loading.description import KEY, Description, described, from_metadata, from_options, from_state
from model.loading.weights import read_weights
from tests.conftest import ROOT

EDSR = Description('EDSR', 2, {'n_resblocks': 1, 'n_feats': 4, 'res_scale': 0.5, 'act': 'relu', 'n_colors': 3})


def weights() -> OrderedDict[str, Tensor]:
    torch.manual_seed(0)
    return build('EDSR', 2, n_resblocks=1, n_feats=4).state_dict()


@pytest.mark.parametrize('zipped', [True, False])
@pytest.mark.parametrize('plain', [True, False])
def test_other_programs_find_a_plain_state_dict(tmp_path: Path, zipped: bool, plain: bool) -> None:
    state, path = weights(), tmp_path / 'x.pt'
    torch.save(described(dict(state) if plain else state, EDSR), path, _use_new_zipfile_serialization=zipped)
    found = torch.load(path, weights_only=True)
    assert list(found) == list(state)
    assert all(type(value) is Tensor and torch.equal(value, state[key]) for key, value in found.items())
    net = build('EDSR', 2, n_resblocks=1, n_feats=4)
    for assign in (False, True):
        net.load_state_dict(found, strict=True, assign=assign)
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    assert read_weights(path).description == EDSR


def test_it_stays_where_a_program_wraps_or_saves_again(tmp_path: Path) -> None:
    torch.save(described(weights(), EDSR), tmp_path / 'x.pt')
    torch.save({'params_ema': torch.load(tmp_path / 'x.pt', weights_only=True)}, tmp_path / 'y.pt')
    found = read_weights(tmp_path / 'y.pt')
    assert found.description == EDSR
    assert found.unwrapped == 'params_ema'


def test_what_is_described_stays_as_it_is() -> None:
    state = weights()
    versions = dict(state._metadata)
    described(state, EDSR)
    assert state._metadata == versions


@pytest.mark.parametrize(
    'wrong',
    [
        7,
        'EDSR',
        {},
        {'model': 'EDSR', 'scale': 2},
        {'model': 'EDSR', 'scale': '2', 'settings': {}},
        {'model': 'EDSR', 'scale': True, 'settings': {}},
        {'model': ['EDSR'], 'scale': 2, 'settings': {}},
        {'model': 'EDSR', 'scale': 2, 'settings': 3},
    ],
    ids=str,
)
def test_what_is_no_description_says_nothing(wrong: object) -> None:
    state = weights()
    state._metadata[KEY] = wrong
    assert from_state(state) is None
    assert from_metadata({KEY: json.dumps(wrong)}) is None


@pytest.mark.parametrize(
    'metadata', [None, {}, {KEY: '{'}, {KEY: '[' * 100_000}, {KEY: 3}, [KEY]], ids=lambda m: str(m)[:20]
)
def test_other_metadata_says_nothing(metadata: object) -> None:
    assert from_metadata(metadata) is None


@pytest.mark.parametrize(
    'options', ['', 'model', 'model: "EDSR"', 'model: EDSR\nscale: 2', 'model: "VDSR"\nscale: 2', 3]
)
def test_other_options_say_nothing(options: object) -> None:
    assert from_options({'options': options}) is None
    assert from_options({}) is None


def test_every_file_in_models_says_what_its_recipe_does() -> None:
    said = {path.stem: read_weights(path).description for path in (ROOT / 'models').glob('*.pt')}
    assert (said['LCoAN-small_x2'].model, said['LCoAN-small_x2'].settings['window_size']) == ('LCoAN', 96)
    assert said['LCoAN-small_x4'].settings['window_size'] == 96
    assert said['ATD-light_x2'].settings['category_size'] == 128
    for stem, description in said.items():
        assert description.scale == int(stem[-1])
        assert description.model == stem[:-3].removesuffix('-small').removesuffix('-photo')


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Folder of a run of an EDSR-baseline in other sizes, with an average of its weights."""
    from data.image import write_png
    from tests.conftest import picture

    for i in range(2):
        write_png(tmp_path / 'DIV2K' / 'DIV2K_train_HR' / f'000{i + 1}.png', picture(i, 40, 48))
    options = f'--model EDSR-baseline --scale 2 --n_resblocks 1 --n_feats 4 --dir_data {tmp_path} --data_test DIV2K '
    options += '--data_range 1-1/2-2 --patch_size 24 --batch_size 1 --test_every 1 --epochs 1 --n_threads 0 --cpu '
    options += f'--weight_ema 0.5 --save_dir {tmp_path} --save run'
    assert main.main(options.split()) == 0
    return tmp_path / 'run'


def test_what_a_run_writes_says_its_network(run: Path) -> None:
    for name in ('model/model_best.pt', 'model/model_latest.pt', 'state.pt'):
        found = read_weights(run / name)
        assert (found.description.model, found.description.scale) == ('EDSR-baseline', 2)
        assert (found.description.settings['res_scale'], found.description.settings['n_feats']) == (1, 4)
    assert found.unwrapped.startswith('average')


def test_a_state_from_before_says_it_by_its_options(run: Path) -> None:
    state = torch.load(run / 'state.pt', weights_only=True)
    state |= {key: dict(state[key]) for key in ('model', 'average')}
    torch.save(state, run / 'state.pt')
    found = read_weights(run / 'state.pt').description
    assert (found.model, found.scale, found.settings['res_scale'], found.settings['n_resblocks']) == (
        'EDSR-baseline', 2, 1, 1,
    )  # fmt: skip


def test_exported_weights_say_their_network(run: Path) -> None:
    options = f'--export safetensors --load run --save_dir {run.parent}'
    assert main.main(options.split()) == 0
    (path,) = run.parent.glob('*_export/*.safetensors')
    assert read_weights(path).description.settings['res_scale'] == 1
    with safetensors.safe_open(path, 'pt') as file:
        assert file.metadata()['format'] == 'pt'
        assert set(file.keys()) == set(build('EDSR', 2, n_resblocks=1, n_feats=4).state_dict())
