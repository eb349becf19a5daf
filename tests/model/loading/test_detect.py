"""Networks of weights: who decides what keys and shapes do not show, and that nobody guesses."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import api
import main
import option
import wiring
from error import UserError
from model import NETWORKS, all_settings, build
from model.common import NetworkSpec
from model.loading import detect
from model.loading.description import Description, described
from model.loading.detect import Found, recognise
from photo.choice import list_weights
from tests.conftest import ROOT, picture

State = dict[str, Tensor]
SIZES = {'n_resblocks': 8, 'n_feats': 32}  # of which EDSR and EDSR-baseline are equally far


def weights(name: str, scale: int = 2, **settings: object) -> State:
    torch.manual_seed(0)
    return dict(build(name, scale, **settings).state_dict())


def say(name: str, scale: int = 2, **settings: object) -> Description:
    return Description(name, scale, all_settings(NETWORKS[name], scale, **settings))


def test_what_the_file_says_counts() -> None:
    state = weights('EDSR-baseline', **SIZES)
    for name, res_scale in (('EDSR', 0.1), ('EDSR-baseline', 1), ('EDSR', 0.3)):
        found = recognise(state, say(name, **SIZES, res_scale=res_scale))
        assert found.name == name
        assert {**all_settings(NETWORKS[name], 2), **found.settings}['res_scale'] == res_scale
        assert found.assumed == ()


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('name', ['EDSR-baseline', 'NLSN'])  # white is 255 in one, 1 in the other
def test_white_is_not_taken_from_rounded_numbers(name: str, dtype: torch.dtype) -> None:
    state = {key: value.to(dtype) for key, value in weights(name).items()}
    assert recognise(state) == Found(name, 2, {}, recognise(state).assumed, name)


def test_nobody_guesses_the_factor_of_residual_branches() -> None:
    state = weights('EDSR-baseline', **SIZES)
    said = r'^Nothing shows the res_scale of these weights, .*\(0\.1 in EDSR, 1 in EDSR-baseline\).*--res_scale 0\.1 or'
    with pytest.raises(UserError, match=said):
        recognise(state)
    for value, name in ((1.0, 'EDSR-baseline'), (0.1, 'EDSR'), (0.5, 'EDSR')):
        found = recognise(state, given={'res_scale': value})
        assert (found.name, {**all_settings(NETWORKS[name], 2), **found.settings}['res_scale']) == (name, value)
        assert 'res_scale' not in found.assumed


@pytest.mark.parametrize(
    ('name', 'sizes', 'key'),
    [
        ('EDSR-baseline', {'n_resblocks': 8}, 'res_scale'),  # nearer to one of them is not it
        ('LCoAN', {'n_resgroups': 3, 'n_resblocks': 1, 'n_feats': 8, 'n_clusters': 4}, 'window_size'),
        ('ATD-light', {'n_resgroups': 1, 'n_resblocks': 1, 'n_feats': 8}, 'category_size'),
    ],
)
def test_nobody_guesses_what_networks_of_a_kind_differ_in(name: str, sizes: dict[str, int], key: str) -> None:
    with pytest.raises(UserError, match=f'Nothing shows the {key} of these weights'):
        recognise(weights(name, **sizes))
    assert recognise(weights(name, **sizes), given={key: 24}).settings[key] == 24


def test_sizes_of_a_published_network_bring_its_settings() -> None:
    for name in ('EDSR-baseline', 'ATD-light'):
        found = recognise(weights(name, 3))
        assert (found.name, found.settings, found.like) == (name, {}, name)


def test_sizes_of_a_recipe_bring_its_settings() -> None:
    sizes = {'n_resgroups': 4, 'n_resblocks': 2, 'n_feats': 32, 'n_clusters': 32}
    for scale in (3, 4):
        found = recognise(weights('LCoAN', scale, **sizes))
        assert found == Found('LCoAN', scale, {**sizes, 'window_size': 96}, found.assumed, 'the recipe LCoAN-small_x2')
        assert 'window_size' in found.assumed


def test_settings_that_are_not_theirs_are_refused() -> None:
    state = weights('EDSR-baseline', **SIZES)
    for description in (None, say('EDSR-baseline', **SIZES)):
        with pytest.raises(UserError, match=r'n_feats 4: these are weights of EDSR.* x2 \(.*n_feats 32.*leave it out'):
            recognise(state, description, {'n_feats': 4, 'res_scale': 1})
        with pytest.raises(UserError, match=r"EDSR.* has no setting 'window_size'"):
            recognise(state, description, {'window_size': 4, 'res_scale': 1})


def test_what_is_typed_counts_more_than_what_the_file_says() -> None:
    found = recognise(weights('EDSR-baseline', **SIZES), say('EDSR-baseline', **SIZES), {'res_scale': 0.5})
    assert (found.name, found.settings['res_scale']) == ('EDSR-baseline', 0.5)


@pytest.mark.parametrize(
    'description',
    [
        say('EDSR', n_resblocks=8, n_feats=16),
        say('EDSR', 3, **SIZES),
        say('ASID'),
        Description('EDSR', 5, {}),
        Description('EDSR', 2, {}),
        Description('EDSR', 2, {**SIZES, 'depth': 3}),
        Description('EDSR', 2, {'n_resblocks': 10**12, 'n_feats': 32}),
        Description('EDSR', 2, {'n_resblocks': 'many', 'n_feats': 32}),
        Description('EDSR', 2, {**SIZES, 'res_scale': 'large', 'act': 3}),
        Description('EDSR', 2, {**SIZES, 'act': 'none'}),
    ],
    ids=str,
)
def test_a_file_that_says_other_than_its_weights_is_refused(description: Description) -> None:
    with pytest.raises(
        UserError, match=r'^(The file says that these are weights of|These weights look like|No network)'
    ):
        recognise(weights('EDSR', **SIZES), description)


def test_a_network_that_only_a_later_version_knows_is_found_by_its_shapes() -> None:
    assert recognise(weights('EDSR-baseline'), Description('VDSR', 2, {'depth': 20})).name == 'EDSR-baseline'


def test_nobody_chooses_between_networks_that_both_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    def twin(scale: int, **settings: object) -> torch.nn.Module:
        return build('ASID', scale, **settings)

    asid = NETWORKS['ASID']
    twin.__signature__ = __import__('inspect').signature(asid.build)  # type: ignore[attr-defined]
    monkeypatch.setitem(detect.NETWORKS, 'Twin', NetworkSpec(twin, (2, 3, 4), recognise=asid.recognise))
    with pytest.raises(UserError, match='These weights fit ASID and Twin equally well: name one, as --model ASID'):
        recognise(weights('ASID'))


def test_many_keys_are_named_where_nothing_fits() -> None:
    state = {f'{letter}.weight': torch.ones(1) for letter in 'abcdefghijk'}
    with pytest.raises(UserError, match=r'has such weights: 11 tensors, a\.weight, b\.weight, .*, h\.weight, \.\.\.'):
        recognise(state)


@pytest.mark.parametrize('name', [name for name in NETWORKS if name != 'Bicubic'])
def test_no_network_has_a_prefix_that_all_its_keys_share(name: str) -> None:
    """So what all keys of a file share is a wrapping."""
    with torch.device('meta'):
        assert len({key.partition('.')[0] for key in build(name, 2).state_dict()}) > 1


# Every door.


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """Weights of an EDSR-baseline in other sizes: one file says its network, one does not."""
    state = weights('EDSR-baseline', **SIZES)
    torch.save(described(state, say('EDSR-baseline', **SIZES)), tmp_path / 'says.pt')
    torch.save(state, tmp_path / 'silent.pt')
    return tmp_path / 'says.pt', tmp_path / 'silent.pt'


def test_as_a_library(files: tuple[Path, Path]) -> None:
    image = picture(1, 12, 15)
    expected = api.load(files[0], 'cpu').upscale(image)
    with pytest.raises(UserError, match=r'silent\.pt: Nothing shows the res_scale.*in Python, res_scale=0\.1'):
        api.load(files[1], 'cpu')
    assert (api.load(files[1], 'cpu', res_scale=1.0).upscale(image) == expected).all()
    assert (api.load(files[1], 'cpu', res_scale=0.1).upscale(image) != expected).any()
    with pytest.raises(UserError, match="no setting 'half'"):
        api.load('Bicubic_x2', half=True)


def test_in_a_folder(files: tuple[Path, Path], caplog: pytest.LogCaptureFixture) -> None:
    assert [(each.network, each.scale, each.name) for each in list_weights(files[0].parent)] == [
        ('EDSR-baseline', 2, 'says.pt')
    ]
    assert re.search(r'silent\.pt is left out: Nothing shows the res_scale', caplog.text)


@pytest.fixture
def program(files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[[str, int], str]:
    def run(options: str, status: int = 0) -> str:
        assert main.main(f'{options} --save_dir {tmp_path} --save run'.split()) == status
        out, err = capsys.readouterr()
        return err if status else out

    return run


def test_with_the_program(files: tuple[Path, Path], program: Callable[..., str]) -> None:
    says, silent = files
    export = '--export torchscript --model auto --pre_train'
    assert 'EDSR-baseline x2' in program(f'{export} {says}')
    assert 'Nothing shows the res_scale' in program(f'{export} {silent}', 2)
    assert 'EDSR-baseline x2' in program(f'{export} {silent} --res_scale 1')
    assert 'n_feats 4: these are weights of EDSR' in program(f'{export} {silent} --res_scale 1 --n_feats 4', 2)
    assert '--res_scale 0.5' not in program(f'{export} {says} --res_scale 0.5')


def test_with_the_network_named(files: tuple[Path, Path], program: Callable[..., str]) -> None:
    edsr = f'--export torchscript --model EDSR --scale 2 --n_resblocks 8 --n_feats 32 --pre_train {files[0]}'
    said = program(edsr, 2)
    assert 'says.pt says that the res_scale of its network is 1; that of EDSR is 0.1 unless it is named' in said
    assert 'give --res_scale 1, or --model auto' in said
    program(f'{edsr} --res_scale 1')
    assert 'says that the res_scale of its network is 1; here it is 0.5' in program(f'{edsr} --res_scale 0.5')


def test_another_scale_is_refused_where_weights_do_not_show_it(tmp_path: Path, program: Callable[..., str]) -> None:
    """PAN's have the same shapes at x2 and x3, from one of which the other may be trained."""
    file = tmp_path / 'pan.pt'
    torch.save(described(weights('PAN'), say('PAN')), file)
    said = program(f'--export torchscript --model PAN --scale 3 --pre_train {file}', 2)
    assert 'pan.pt says that its network enlarges by 2: give --scale 2, or --model auto' in said
    program(f'--export torchscript --model PAN --scale 2 --pre_train {file}')
    args = option.parse(['--model', 'PAN', '--scale', '3', '--pre_train', str(file), '--cpu'])
    wiring.load(args, wiring.make_model(args))


def test_our_small_lcoan_has_its_own_window() -> None:
    for scale in (2, 4):
        assert api.load(f'LCoAN-small_x{scale}', 'cpu').model.settings['window_size'] == 96
    assert any(each.stem == 'LCoAN-small_x2' for each in list_weights(ROOT / 'models'))
