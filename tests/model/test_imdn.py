"""IMDN against plain layers, and where its deviations are 0."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from error import UserError
from model import NETWORKS, build
from model.imdn import IMDB, recognise
from tests.conftest import numbers


@torch.no_grad()
def test_a_block_keeps_the_first_quarter_of_each_step() -> None:
    torch.manual_seed(0)
    block, x = IMDB(12).double(), numbers(2, 12, 5, 6)

    def layer(i: int, x: Tensor) -> Tensor:
        own = getattr(block, f'c{i}')
        return F.conv2d(x, own.weight, own.bias, padding=1)

    def act(x: Tensor) -> Tensor:
        return torch.where(x > 0, x, 0.05 * x)

    first = act(layer(1, x))
    second = act(layer(2, first[:, 3:]))
    third = act(layer(3, second[:, 3:]))
    kept = torch.cat((first[:, :3], second[:, :3], third[:, :3], layer(4, third[:, 3:])), 1)
    torch.testing.assert_close(block(x), x + block.c5(block.cca(kept)), rtol=0, atol=1e-12)


@pytest.mark.parametrize('name', ['IMDN', 'BSRN'])
@pytest.mark.parametrize('size', [1, 16])
def test_training_on_a_flat_patch_leaves_finite_weights(name: str, size: int) -> None:
    """Of one pixel, and of many in a network whose features are flat too, since its biases are 0."""
    torch.manual_seed(0)
    net = build(name, 2, n_resblocks=1, n_feats=16)
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d) and layer.bias is not None and size > 1:
            nn.init.zeros_(layer.bias)
    optimizer = torch.optim.Adam(net.parameters())
    y = net(torch.zeros(2, 3, size, size))
    (y - 0.5).abs().mean().backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())
    optimizer.step()
    assert all(p.isfinite().all() for p in net.parameters())
    assert net(torch.rand(1, 3, 8, 8)).isfinite().all()


def test_a_quarter_of_the_channels_is_one_at_least() -> None:
    with pytest.raises(UserError, match='--n_feats 3: a quarter of them is kept at every step, so choose 4 or more'):
        build('IMDN', 2, n_feats=3)


@pytest.mark.parametrize(
    ('scale', 'settings'), [(2, {}), (3, {'n_resblocks': 12}), (4, {'n_resblocks': 1, 'n_feats': 5})]
)
def test_recognises_its_weights(scale: int, settings: dict[str, int]) -> None:
    with torch.device('meta'):
        state = build('IMDN', scale, **settings).state_dict()
    assert recognise(state) == {'scale': scale, 'n_resblocks': 6, 'n_feats': 64, **settings}


def test_recognises_no_other_weights() -> None:
    with torch.device('meta'):
        for name in NETWORKS:
            if name != 'IMDN':
                assert recognise(build(name, 2).state_dict()) is None
        state = build('IMDN', 2).state_dict()
    assert recognise({}) is None
    assert recognise({key: state[key] for key in state if not key.startswith('upsampler.')}) is None
