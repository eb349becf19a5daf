"""What every network keeps to: the official one's numbers, and the contract that the program relies on."""

import inspect
import re

import pytest
import torch
from torch import Tensor, nn

from error import UserError
from model import NETWORKS, all_settings, build
from model.loading.description import Description
from model.loading.detect import recognise
from model.loading.weights import load_weights
from tests.conftest import slow
from tests.recipe import CASES, layout, worst_error

# Sizes of every class of networks, none of them the published ones, and small enough for double precision.
SMALL = {
    'EDSR': {'n_resblocks': 2, 'n_feats': 8, 'rgb_range': 1.0},
    'RCAN': {'n_resgroups': 2, 'n_resblocks': 3, 'n_feats': 8, 'reduction': 2, 'rgb_range': 1.0},
    'NLSN': {'n_resblocks': 9, 'n_feats': 8, 'reduction': 2, 'chunk_size': 16, 'n_hashes': 2},
    'LCoAN': {'n_resgroups': 3, 'n_resblocks': 1, 'n_feats': 8, 'n_clusters': 4, 'window_size': 16, 'reduction': 2},
    'ASID': {'n_resgroups': 2, 'n_feats': 16},
    'OmniSR': {'n_resgroups': 2, 'n_feats': 16, 'n_heads': 2},
    'DLGSANet': {
        'n_resgroups': 2, 'n_resblocks': 1, 'n_feats': 12, 'n_heads': 2, 'group_channels': 3, 'kernel_size': 5,
        'tlc_size': 5, 'mlp_ratio': 1.0,
    },
    'ATD': {
        'n_resgroups': 2, 'n_resblocks': 2, 'n_feats': 12, 'n_heads': 2, 'window_size': 4, 'category_size': 8,
        'n_tokens': 6, 'reduced_dim': 4, 'kernel_size': 3,
    },
    'ATD-light': {
        'n_resgroups': 1, 'n_resblocks': 3, 'n_feats': 8, 'n_heads': 4, 'window_size': 4, 'category_size': 8,
        'n_tokens': 5, 'reduced_dim': 3, 'kernel_size': 5, 'mlp_ratio': 2.0,
    },
    'CATANet': {
        'n_feats': 8, 'n_resblocks': 2, 'qk_dim': 12, 'n_heads': 2, 'mlp_ratio': 1.5, 'patch_sizes': '4-5',
        'n_centres': '3-4', 'group_sizes': '8-6',
    },
    'HiT-SRF': {
        'n_feats': 20, 'n_resgroups': 2, 'n_resblocks': 2, 'n_heads': 2, 'window_sizes': '8-16', 'mlp_ratio': 1.5,
    },
    'PFT-light': {
        'depths': '3-2', 'topk': '20-5', 'n_feats': 8, 'n_heads': 2, 'window_size': 4, 'kernel_size': 3,
        'mlp_ratio': 1.5,
    },
    'SwinIR-light': {
        'n_resgroups': 2, 'n_resblocks': 2, 'n_feats': 12, 'n_heads': 2, 'window_size': 4, 'mlp_ratio': 1.0,
    },
    'ESC': {
        'n_resgroups': 2, 'n_resblocks': 2, 'n_feats': 12, 'n_heads': 2, 'window_size': 4, 'mlp_ratio': 1.5,
        'kernel_size': 5, 'kernel_feats': 8,
    },
    'ESC-FP': {
        'n_resgroups': 2, 'n_resblocks': 2, 'n_feats': 12, 'n_heads': 3, 'window_size': 4, 'mlp_ratio': 1.5,
        'kernel_size': 5, 'kernel_feats': 8,
    },
    'IMDN': {'n_resblocks': 2, 'n_feats': 22},
    'PAN': {'n_resblocks': 2, 'n_feats': 9, 'n_up_feats': 6},
    'BSRN': {'n_resblocks': 2, 'n_feats': 17},
}  # fmt: skip
SIZES = [(1, 1), (1, 7), (5, 1), (3, 3), (4, 4), (9, 5), (17, 10)]

# Networks whose weights look the same at several scales, so that recognising them takes the scale.
ALIKE = ('PAN',)

# What gets no gradient: official weights that nothing uses, and biases that a softmax cancels.
IDLE = {
    'LCoAN': r'^a$|^body\.[1-9]\d*\.attention\.0\.conv_match\.',
    'ATD': r'\.norm3\.bias$',
    'ATD-light': r'\.norm3\.bias$',
}
ALL = [name for name in NETWORKS if name != 'Bicubic']
small_networks = pytest.mark.parametrize('name', SMALL)


def small(name: str, scale: int = 2, seed: int = 0) -> nn.Module:
    """A small network in double precision, so that rounding decides nothing; every weight counts."""
    torch.manual_seed(seed)
    net = build(name, scale, **SMALL[name]).double()
    with torch.no_grad():
        for key, value in net.named_buffers():
            if key.endswith('initted'):
                value.fill_(True)
        for p in net.parameters():
            if p.requires_grad and (p == p.flatten()[0]).all():  # a bias or factor as it starts
                p += 0.1 * torch.randn_like(p)
    return net.eval()


def images(*shape: int) -> Tensor:
    return torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


# The official networks.


def test_every_network_is_recorded() -> None:
    assert set(CASES) == {f'{name}_x{scale}' for name in ALL for scale in (2, 3, 4)}
    assert {NETWORKS[name].build for name in SMALL} == {NETWORKS[name].build for name in ALL}


@pytest.mark.parametrize('key', CASES)
def test_has_the_official_weights(key: str) -> None:
    with torch.device('meta'):
        net = build(CASES[key]['name'], CASES[key]['scale'])
    assert layout(net) == CASES[key]['layout']


@pytest.mark.parametrize('key', [key for key in CASES if 'pixels' in CASES[key]])
def test_equals_the_official_network(key: str) -> None:
    assert worst_error(build(CASES[key]['name'], CASES[key]['scale']), CASES[key]) < 1e-4


# The contract.


@small_networks
@pytest.mark.parametrize('scale', [2, *slow(3, 4)])
@torch.no_grad()
def test_any_size_and_each_image_on_its_own(name: str, scale: int) -> None:
    net = small(name, scale)
    for height, width in SIZES:
        x = images(3, 3, height, width)
        y = net(x)
        assert y.shape == (3, 3, scale * height, scale * width)
        assert y.isfinite().all()
        alone = torch.cat([net(image) for image in x.split(1)])
        torch.testing.assert_close(y, alone, rtol=0, atol=1e-9)


@small_networks
@torch.no_grad()
def test_evaluation_repeats_itself_and_changes_nothing(name: str) -> None:
    net, x = small(name), images(2, 3, 6, 7)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    first = net(x)
    state = torch.get_rng_state()
    net(images(1, 3, 9, 4))
    assert torch.equal(net(x), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


@small_networks
@torch.no_grad()
def test_every_weight_changes_the_output(name: str) -> None:
    """Also those behind a norm, a gate or a table; but for what is known to be idle."""
    net, x = small(name), images(1, 3, 9, 6)
    expected = net(x)
    for key, value in net.state_dict().items():
        idle = re.search(IDLE.get(name, '^$'), key)
        if idle or not value.is_floating_point() or key.endswith(('attn_mask', '.means')):
            continue
        kept = value.clone()
        value *= 1.5
        assert not torch.equal(net(x), expected), key
        value.copy_(kept)
    assert torch.equal(net(x), expected)


@small_networks
def test_gradients_reach_what_the_paper_trains(name: str) -> None:
    net = small(name).train()
    torch.manual_seed(0)
    (net(images(2, 3, 17, 10)) - images(2, 3, 34, 20)).abs().mean().backward()
    trained = {key: p for key, p in net.named_parameters() if p.requires_grad}
    still = {key for key, p in trained.items() if p.grad is None or p.grad.abs().max() < 1e-12}
    assert still == {key for key in trained if re.search(IDLE.get(name, '^$'), key)}


@small_networks
@torch.no_grad()
def test_state_carries_over(name: str) -> None:
    net, other, x = small(name), small(name, seed=1), images(1, 3, 6, 7)
    assert not torch.equal(net(x), other(x))
    other.load_state_dict(net.state_dict(), strict=True)
    assert torch.equal(net(x), other(x))


@small_networks
@pytest.mark.parametrize('old, new', [(2, 4), *slow((2, 3), (4, 2))])
@torch.no_grad()
def test_weights_carry_over_to_another_scale_but_for_the_upsampler(name: str, old: int, new: int) -> None:
    source, net = small(name, old), small(name, new, seed=1)
    prefix = NETWORKS[name].upsampler_prefix
    interpolated, new = load_weights(net, source.state_dict(), 'x.pt', prefix)
    left = [*interpolated, *new]
    assert all(key.startswith(prefix) for key in left)
    kept = source.state_dict()
    assert all(torch.equal(value, kept[key]) for key, value in net.state_dict().items() if key not in left)


@pytest.mark.slow
@small_networks
@torch.no_grad()
def test_can_be_exported(name: str) -> None:
    net = small(name)
    exported = torch.export.export(net, (images(1, 3, 6, 7),), strict=False).module()
    x = images(1, 3, 6, 7).flip(-1)
    torch.testing.assert_close(exported(x), net(x), rtol=0, atol=1e-9)


@pytest.mark.slow
def test_exported_with_gradients_it_needs_no_operation_of_ours() -> None:
    exported = torch.export.export(small('DLGSANet'), (images(1, 3, 6, 7),), strict=False)
    assert 'frugalsr' not in str(exported.graph)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['LCoAN', 'OmniSR', 'SwinIR-light', 'ATD-light'])  # what indexes most
@torch.no_grad()
def test_torch_compile_gives_the_same(name: str) -> None:
    torch.compiler.reset()
    net, x = small(name), images(1, 3, 24, 32)
    torch.testing.assert_close(torch.compile(net)(x), net(x), rtol=0, atol=1e-12)


@small_networks
@torch.no_grad()
def test_half_precision_stays_close(name: str) -> None:
    net, x = small(name).float(), images(1, 3, 17, 10).float()
    with torch.autocast('cpu', torch.bfloat16):
        low = net(x)
    assert low.isfinite().all()
    assert (low.float() - net(x)).abs().mean() < 0.05 * net(x).abs().mean()


@small_networks
@pytest.mark.parametrize('shape', [(1, 1, 8, 8), (1, 4, 8, 8), (3, 8, 8), (1, 3, 0, 8)])
def test_other_than_images_of_three_channels_are_refused(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=re.escape(f'was given {shape}')):
        small(name)(torch.zeros(shape, dtype=torch.float64))


@pytest.mark.parametrize('name', ALL)
def test_other_scales_are_refused(name: str) -> None:
    known = NETWORKS[name].scales
    with pytest.raises(UserError, match=f'{name} cannot enlarge by 5: choose one of {", ".join(map(str, known))}'):
        build(name, 5)


def defaults(name: str) -> dict[str, object]:
    """The settings of the published network."""
    bound = inspect.signature(NETWORKS[name].build).bind(2, **NETWORKS[name].settings)
    bound.apply_defaults()
    return bound.arguments


@pytest.mark.parametrize('name', ALL)
def test_values_that_the_paper_feeds_it(name: str) -> None:
    known = {'EDSR': (0, 255), 'RCAN': (0, 255), 'ASID': (-1, 1), 'ASIDd8': (-1, 1), 'OmniSR': (-1, 1)}
    white = defaults(name).get('rgb_range')
    found = NETWORKS[name].value_range if white is None else (0, white)
    assert found == known.get(name.removesuffix('-baseline'), (0, 1))


# Recognising weights.


@pytest.mark.parametrize('key', CASES)
def test_official_weights_are_recognised(key: str) -> None:
    with torch.device('meta'):
        state = build(CASES[key]['name'], CASES[key]['scale']).state_dict()
    values = {name: torch.zeros(t.shape) if name.endswith('sub_mean.bias') else t for name, t in state.items()}
    if 'sub_mean.bias' in values:
        black = {'EDSR': 255, 'RCAN': 255}.get(CASES[key]['name'].partition('-')[0], 1)
        values['sub_mean.bias'] = -black * torch.tensor([0.4488, 0.4371, 0.4040])
    found = recognise(values, scale=CASES[key]['scale'] if CASES[key]['name'] in ALIKE else None)
    assert (found.name, found.scale, found.settings) == (CASES[key]['name'], CASES[key]['scale'], {})


@small_networks
@pytest.mark.parametrize('scale', [2, *slow(3, 4)])
def test_other_sizes_are_recognised(name: str, scale: int) -> None:
    state = small(name, scale).state_dict()
    full = all_settings(NETWORKS[name], scale, **SMALL[name])
    # With what weights do not show named by the user, or by the file.
    given_scale = scale if name in ALIKE else None
    for found in (recognise(state, None, full, given_scale), recognise(state, Description(name, scale, full))):
        assert NETWORKS[found.name].build is NETWORKS[name].build
        assert found.scale == scale
        assert all_settings(NETWORKS[found.name], scale, **found.settings) == full


@small_networks
def test_incomplete_weights_are_not_recognised(name: str) -> None:
    state = small(name).state_dict()
    last = list(state)[-1]
    del state[last]
    with pytest.raises(UserError, match=r'^(These weights look like|No network known here)'):
        recognise(state)


@pytest.mark.filterwarnings('ignore:Initializing zero-element')
@small_networks
def test_weights_of_impossible_shapes_are_not_recognised(name: str) -> None:
    state = small(name).state_dict()
    shapes = [(), (7,), (0,), (0, 0, 0, 0), (3, 0, 1, 1)]
    for i, key in enumerate(state):
        with pytest.raises(UserError, match=r'^(These weights look like|No network known here)'):
            recognise({**state, key: torch.zeros(shapes[i % len(shapes)])})


@pytest.mark.parametrize('name', ['ATD', 'SwinIR-light', 'ASID', 'OmniSR', 'ESC', 'ESC-FP'])
def test_windows_that_would_fill_the_memory_are_refused(name: str) -> None:
    with pytest.raises(UserError, match='--window_size 65 makes windows of 65x65 pixels: choose 64 or less'):
        build(name, 2, window_size=65)


def test_foreign_weights_are_named() -> None:
    with pytest.raises(UserError, match=r'No network known here has such weights: 2 tensors, a\.weight, b'):
        recognise({'a.weight': torch.ones(2), 'b': torch.ones(1)})
