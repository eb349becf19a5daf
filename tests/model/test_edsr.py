import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from error import UserError
from model import build, find
from tests.recipe import CASES, layout, worst_error

SMALL = {'n_resblocks': 2, 'n_feats': 8}


def plain_edsr(state: dict[str, Tensor], x: Tensor, res_scale: float, slope: float, dilation: int) -> Tensor:
    """The small EDSR at x2 from its weights, one line a layer; `slope` of the leaky ReLU."""

    def conv(x: Tensor, name: str, dilation: int = 1) -> Tensor:
        weight = state[f'{name}.weight']
        return F.conv2d(x, weight, state[f'{name}.bias'], padding=dilation * (weight.shape[-1] // 2), dilation=dilation)

    head = conv(conv(x, 'sub_mean'), 'head.0')
    x = head
    for i in range(2):
        inner = F.leaky_relu(conv(x, f'body.{i}.body.0', dilation), slope)
        x = x + res_scale * conv(inner, f'body.{i}.body.2', dilation)
    x = conv(x, 'body.2') + head
    x = F.pixel_shuffle(conv(x, 'tail.0.0'), 2)
    return conv(conv(x, 'tail.1'), 'add_mean')


@pytest.mark.parametrize('key', [key for key in CASES if key.startswith('EDSR')])
def test_has_the_official_weights(key: str) -> None:
    case = CASES[key]
    with torch.device('meta'):
        net = build(case['name'], case['scale'])
    assert layout(net) == case['layout']


# The large network is slow: one scale of it; its upsamplers are those of the baseline.
@pytest.mark.parametrize('key', ['EDSR-baseline_x2', 'EDSR-baseline_x3', 'EDSR-baseline_x4', 'EDSR_x4'])
def test_equals_the_official_network(key: str) -> None:
    case = CASES[key]
    assert worst_error(build(case['name'], case['scale']), case) < 1e-4


@pytest.mark.parametrize('n_colors', [1, 3])
@pytest.mark.parametrize(
    ('settings', 'res_scale', 'slope', 'dilation'),
    [
        ({'res_scale': 0.3}, 0.3, 0.0, 1),
        ({'act': 'leaky_relu', 'rgb_range': 1}, 0.1, 0.2, 1),
        ({'dilation': True}, 0.1, 0.0, 2),
    ],
)
@torch.no_grad()
def test_settings_do_what_they_say(
    settings: dict[str, object], res_scale: float, slope: float, dilation: int, n_colors: int
) -> None:
    torch.manual_seed(0)
    net = build('EDSR', 2, n_colors=n_colors, **SMALL, **settings).double()
    x = torch.rand(2, n_colors, 7, 9, dtype=torch.float64)
    expected = plain_edsr(net.state_dict(), x, res_scale, slope, dilation)
    assert torch.allclose(net(x), expected, rtol=0, atol=1e-12)


def test_without_shift_mean_the_mean_colour_is_gone() -> None:
    keys = build('EDSR', 2, shift_mean=False, **SMALL).state_dict()
    assert not [key for key in keys if 'mean' in key]


@pytest.mark.parametrize('scale', [2, 3, 4, 8])
@torch.no_grad()
def test_any_size_and_each_image_on_its_own(scale: int) -> None:
    torch.manual_seed(0)
    net = build('EDSR-baseline', scale, **SMALL).double()
    for height, width in [(1, 1), (1, 5), (6, 3)]:
        x = torch.rand(3, 3, height, width, dtype=torch.float64) * 255
        y = net(x)
        assert y.shape == (3, 3, scale * height, scale * width)
        alone = torch.cat([net(image) for image in x.split(1)])
        assert torch.allclose(y, alone, rtol=0, atol=1e-10)


def test_images_of_other_channels_are_refused() -> None:
    for n_colors, other in ((3, 1), (1, 3)):
        with pytest.raises(UserError, match=f'images of {n_colors} channels'):
            build('EDSR', 2, n_colors=n_colors, **SMALL)(torch.rand(1, other, 4, 4))


@pytest.mark.parametrize('scale', [2, 3, 4, 8])
@pytest.mark.parametrize(
    'settings',
    [
        {},
        {'n_resblocks': 1, 'n_feats': 3, 'rgb_range': 0.3},
        {'act': 'prelu', 'n_colors': 1, 'rgb_range': 1},
        {'shift_mean': False},
    ],
)
def test_weights_show_their_settings(scale: int, settings: dict[str, object]) -> None:
    settings = {**SMALL, **settings}
    found = find('EDSR').recognise(build('EDSR', scale, **settings).state_dict())
    shown = {'shift_mean': True, 'n_colors': 3, 'rgb_range': 255, **settings, 'scale': scale}
    if not shown['shift_mean']:
        del shown['rgb_range']
    assert found == shown


def test_weights_without_values_show_their_shapes() -> None:
    with torch.device('meta'):
        state = build('EDSR-baseline', 3).state_dict()
    shapes = {'scale': 3, 'n_resblocks': 16, 'n_feats': 64, 'n_colors': 3, 'shift_mean': True}
    assert find('EDSR-baseline').recognise(state) == shapes


def test_other_weights_are_not_recognised() -> None:
    recognise = find('EDSR').recognise
    others = [
        build('RCAN', 2, n_resgroups=1, reduction=2, **SMALL),
        build('NLSN', 2, **SMALL),
        build('LCoAN', 2, n_resgroups=1, **SMALL),
    ]
    assert all(recognise(net.state_dict()) is None for net in others)
    assert recognise({}) is None
    # A head and a body of the same names, but not of convolutions.
    assert recognise({key: torch.zeros(4, 4) for key in build('EDSR', 2, **SMALL).state_dict()}) is None
    state = build('EDSR', 2, **SMALL).state_dict()
    for key in state:  # parts of its own: whatever comes, no exception
        recognise({key: state[key]})
        recognise({other: value for other, value in state.items() if other != key})


@torch.no_grad()
def test_half_precision_leaves_the_mean_colour_exact() -> None:
    net = build('EDSR', 2, **SMALL)
    with torch.autocast('cpu', torch.bfloat16):
        y = net.add_mean(torch.full((1, 3, 4, 4), 0.375, dtype=torch.bfloat16))
    expected = 0.375 + 255 * torch.tensor([0.4488, 0.4371, 0.4040]).view(1, 3, 1, 1)
    assert torch.allclose(y, expected.expand_as(y), rtol=0, atol=1e-4)
