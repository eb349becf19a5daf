import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from error import UserError
from model import build, find

SMALL = {'n_resgroups': 2, 'n_resblocks': 3, 'n_feats': 8, 'reduction': 4}
MEAN = {f'{mean}_mean.{kind}' for mean in ('sub', 'add') for kind in ('weight', 'bias')}


def plain_rcan(state: dict[str, Tensor], x: Tensor, slope: float) -> Tensor:
    """The small RCAN at x3 from its weights, one line a layer, one image; `slope` of the leaky ReLU in the blocks."""

    def conv(x: Tensor, name: str) -> Tensor:
        weight = state[f'{name}.weight']
        return F.conv2d(x, weight, state[f'{name}.bias'], padding=weight.shape[-1] // 2)

    def attention(x: Tensor, name: str) -> Tensor:
        means = torch.stack([channel.sum() / channel.numel() for channel in x[0]])
        hidden = state[f'{name}.0.weight'][:, :, 0, 0] @ means + state[f'{name}.0.bias']
        hidden = hidden * (hidden > 0)
        logits = state[f'{name}.2.weight'][:, :, 0, 0] @ hidden + state[f'{name}.2.bias']
        return torch.stack([channel / (1 + torch.exp(-logit)) for channel, logit in zip(x[0], logits, strict=True)])

    head = x = conv(conv(x, 'sub_mean'), 'head.0')
    for i in range(2):
        group = x
        for j in range(3):
            block = f'body.{i}.body.{j}.body'
            inner = conv(F.leaky_relu(conv(x, f'{block}.0'), slope), f'{block}.2')
            x = x + attention(inner, f'{block}.3.conv_du')
        x = conv(x, f'body.{i}.body.3') + group
    x = conv(x, 'body.2') + head
    x = F.pixel_shuffle(conv(x, 'tail.0.0'), 3)
    return conv(conv(x, 'tail.1'), 'add_mean')


@pytest.mark.parametrize('n_colors', [1, 3])
@pytest.mark.parametrize(('settings', 'slope'), [({}, 0.0), ({'act': 'leaky_relu', 'rgb_range': 1}, 0.2)])
@torch.no_grad()
def test_equals_plain_layers(settings: dict[str, object], slope: float, n_colors: int) -> None:
    torch.manual_seed(0)
    net = build('RCAN', 3, n_colors=n_colors, **SMALL, **settings).double()
    x = torch.rand(2, n_colors, 7, 9, dtype=torch.float64)
    y = net(x)
    for image, result in zip(x.split(1), y.split(1), strict=True):
        assert torch.allclose(result, plain_rcan(net.state_dict(), image, slope), rtol=0, atol=1e-12)


def test_gradients_reach_everything_but_the_mean_colour() -> None:
    torch.manual_seed(0)
    net = build('RCAN', 2, **{**SMALL, 'act': 'prelu'}).double()
    net(torch.rand(2, 3, 6, 7, dtype=torch.float64) * 255).abs().mean().backward()
    assert {key for key, p in net.named_parameters() if p.grad is None} == MEAN
    silent = {key for key, p in net.named_parameters() if key not in MEAN and not p.grad.abs().max() > 0}
    # A bottleneck of two channels is silent where both ReLUs are.
    assert all('conv_du.0' in key or 'conv_du.2.weight' in key for key in silent)
    assert len(silent) < 6


def test_images_of_other_channels_are_refused() -> None:
    for n_colors, other in ((3, 1), (1, 3)):
        with pytest.raises(UserError, match=f'images of {n_colors} channels'):
            build('RCAN', 2, n_colors=n_colors, **SMALL)(torch.rand(1, other, 4, 4))


def test_reduction_divides_the_features() -> None:
    with pytest.raises(UserError, match=r'--reduction 3 does not divide --n_feats 8: choose a divisor\.'):
        build('RCAN', 2, **{**SMALL, 'reduction': 3})


@pytest.mark.parametrize('scale', [2, 3, 4, 8])
@pytest.mark.parametrize(
    'settings',
    [
        {},
        {'n_resgroups': 1, 'n_resblocks': 1, 'n_feats': 6, 'reduction': 6, 'rgb_range': 1.5},
        {'act': 'prelu', 'n_colors': 1, 'rgb_range': 1},
        {'shift_mean': False},
    ],
)
def test_weights_show_their_settings(scale: int, settings: dict[str, object]) -> None:
    settings = {**SMALL, **settings}
    found = find('RCAN').recognise(build('RCAN', scale, **settings).state_dict())
    shown = {'shift_mean': True, 'n_colors': 3, 'rgb_range': 255, **settings, 'scale': scale}
    if not shown['shift_mean']:
        del shown['rgb_range']
    assert found == shown


def test_other_weights_are_not_recognised() -> None:
    recognise = find('RCAN').recognise
    small = {'n_resblocks': 1, 'n_feats': 8}
    others = [build('EDSR', 2, **small), build('NLSN', 2, **small), build('LCoAN', 2, n_resgroups=1, **small)]
    assert all(recognise(net.state_dict()) is None for net in others)
    assert recognise({}) is None
    state = build('RCAN', 2, **SMALL).state_dict()
    for key in state:  # parts of its own: whatever comes, no exception
        recognise({key: state[key]})
        recognise({other: value for other, value in state.items() if other != key})
