"""PAN against plain layers, and its weights, which do not show whether they are of x2 or of x3."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import api
from error import UserError
from model import NETWORKS, build
from model.loading import detect
from model.loading.description import Description
from model.loading.weights import load_weights
from model.pan import SCPA, recognise
from option import parse
from tests.conftest import numbers
from wiring import apply_detected_network

SMALL = {'n_resblocks': 1, 'n_feats': 6, 'n_up_feats': 4}


def act(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 0.2 * x)


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


@torch.no_grad()
def test_a_block_has_two_branches() -> None:
    torch.manual_seed(0)
    block, x = SCPA(6).double(), numbers(2, 6, 5, 7)
    state = block.state_dict()

    def layer(x: Tensor, key: str) -> Tensor:
        weight = state[f'{key}.weight']
        return F.conv2d(x, weight, state.get(f'{key}.bias'), padding=weight.shape[-1] // 2)

    a = layer(act(layer(x, 'conv1_a')), 'k1.0')
    b = act(layer(x, 'conv1_b'))
    b = layer(layer(b, 'PAConv.k3') * sigmoid(layer(b, 'PAConv.k2')), 'PAConv.k4')
    expected = x + layer(act(torch.cat((a, b), 1)), 'conv3')
    torch.testing.assert_close(block(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(('scale', 'steps'), [(2, [2]), (3, [3]), (4, [2, 2])])
@torch.no_grad()
def test_enlarges_by_repeated_pixels_before_the_convolutions(scale: int, steps: list[int]) -> None:
    torch.manual_seed(0)
    net, x = build('PAN', scale, **SMALL).double().eval(), numbers(2, 3, 5, 4)
    y = net.conv_first(x)
    y = y + net.trunk_conv(net.SCPA_trunk(y))
    for i, step in enumerate(steps, 1):
        y = y.repeat_interleave(step, 2).repeat_interleave(step, 3)
        y = getattr(net, f'upconv{i}')(y)
        y = act(y * sigmoid(getattr(net, f'att{i}').conv(y)))
        y = act(getattr(net, f'HRconv{i}')(y))
    y = net.conv_last(y) + F.interpolate(x, size=y.shape[2:], mode='bilinear', align_corners=False)
    torch.testing.assert_close(net(x), y, rtol=0, atol=1e-12)


@torch.no_grad()
def test_its_reach_ends() -> None:
    """Which is why tiles that overlap enough are exact."""
    torch.manual_seed(0)
    net, x = build('PAN', 4, **SMALL).double().eval(), numbers(1, 3, 8, 20)
    other = x.clone()
    other[..., 0] += 1
    difference = (net(x) - net(other)).abs().amax((0, 1, 2))
    # From pixel 0 four 3x3 convolutions reach pixel 4, which becomes 8 and 9; two more reach 11, which becomes 22 and
    # 23; three more reach 26.
    assert difference[27:].max() == 0 < difference[26]


def test_a_branch_has_one_channel_at_least() -> None:
    with pytest.raises(UserError, match='--n_feats 1: the branches have half of them each, so choose 2 or more'):
        build('PAN', 2, n_feats=1)
    with pytest.raises(UserError, match='--net n_up_feats=0: choose 1 or more'):
        build('PAN', 2, n_up_feats=0)


@pytest.mark.parametrize(
    ('scale', 'settings'), [(2, {}), (3, {'n_resblocks': 11}), (4, {}), (4, SMALL), (2, {'n_feats': 7})]
)
def test_recognises_its_weights(scale: int, settings: dict[str, int]) -> None:
    with torch.device('meta'):
        state = build('PAN', scale, **settings).state_dict()
    sizes = {'n_resblocks': 16, 'n_feats': 40, 'n_up_feats': 24, **settings}
    assert recognise(state) == {'scale': 4 if scale == 4 else (2, 3), **sizes}


def test_recognises_no_other_weights() -> None:
    with torch.device('meta'):
        for name in NETWORKS:
            if name != 'PAN':
                assert recognise(build(name, 2).state_dict()) is None
        state = build('PAN', 2).state_dict()
    assert recognise({}) is None
    assert recognise({key: state[key] for key in state if not key.startswith('upconv1.')}) is None


# The scale has to be said.

ASKED = 'These are weights of PAN at x2 or x3, which look the same: give the scale (--scale 2 or 3).'


@pytest.mark.parametrize('scale', [2, 3])
def test_weights_that_do_not_show_their_scale_are_asked_about(scale: int) -> None:
    state = build('PAN', scale, **SMALL).state_dict()
    for unknown in (None, 4):
        with pytest.raises(UserError) as error:
            detect.recognise(state, scale=unknown)
        assert str(error.value) == ASKED
    found = detect.recognise(state, scale=scale)
    assert (found.name, found.scale, found.settings) == ('PAN', scale, SMALL)


@pytest.mark.parametrize('scale', [2, 3])
def test_a_file_says_its_scale(scale: int) -> None:
    found = detect.recognise(build('PAN', scale, **SMALL).state_dict(), Description('PAN', scale, SMALL))
    assert (found.name, found.scale, found.settings) == ('PAN', scale, SMALL)


def test_what_shows_its_scale_needs_none() -> None:
    found = detect.recognise(build('PAN', 4, **SMALL).state_dict(), scale=2)
    assert (found.name, found.scale) == ('PAN', 4)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    torch.save(build('PAN', 3, **SMALL).state_dict(), tmp_path / 'weights.pt')
    return tmp_path / 'weights.pt'


def test_the_program_asks(file: Path) -> None:
    line = ['--model', 'auto', '--test_only', '--pre_train', str(file)]
    with pytest.raises(UserError) as error:
        apply_detected_network(parse(line))
    assert str(error.value) == f'{file}: {ASKED}'
    args = parse([*line, '--scale', '3'])
    apply_detected_network(args)
    assert (args.model, args.scale, args.n_feats) == ('PAN', 3, 6)


def test_the_library_asks(file: Path) -> None:
    with pytest.raises(UserError, match='which look the same'):
        api.load(file, 'cpu')
    assert (api.load(file, 'cpu', scale=3).scale, api.load(file, 'cpu', scale=2).scale) == (3, 2)


def test_the_library_refuses_another_scale(tmp_path: Path) -> None:
    torch.save(build('PAN', 4, **SMALL).state_dict(), tmp_path / 'weights.pt')
    with pytest.raises(UserError, match='holds weights of PAN x4, not x2: leave the scale out'):
        api.load(tmp_path / 'weights.pt', 'cpu', scale=2)


def test_what_x4_has_of_its_own() -> None:
    left = load_weights(
        build('PAN', 4, **SMALL), build('PAN', 2, **SMALL).state_dict(), 'x.pt', NETWORKS['PAN'].upsampler_prefix
    )
    assert {key.split('.')[0] for keys in left for key in keys} == {'upconv2', 'att2', 'HRconv2'}
