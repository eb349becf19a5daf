import pytest
import torch

from model import build
from option import network_settings, parse
from template import TEMPLATES

# Parameter counts as the tables of the field give them.
PARAMETERS = {
    'EDSR-baseline_x2': 1.37e6,
    'EDSR-baseline_x3': 1.55e6,
    'EDSR-baseline_x4': 1.52e6,
    'EDSR_x2': 40.7e6,
    'EDSR_x3': 43.7e6,
    'EDSR_x4': 43.1e6,
    'LCoAN_x2': 15.7e6,
    'LCoAN_x4': 16.3e6,
}


@pytest.mark.parametrize('name', TEMPLATES)
def test_a_recipe_is_a_set_of_valid_options(name):
    typed = vars(parse([]))
    assert set(TEMPLATES[name]) <= set(typed)
    args = parse(['--template', name])
    assert name.endswith(f'_x{args.scale}')
    for key, value in TEMPLATES[name].items():
        assert type(getattr(args, key)) is type(typed[key]) or typed[key] is None, key
        assert getattr(args, key) == value


@pytest.mark.parametrize('name', PARAMETERS)
def test_the_published_lr_patch_has_48_pixels(name):
    args = parse(['--template', name])
    assert args.patch_size == 48 * args.scale


@pytest.mark.parametrize('name, expected', PARAMETERS.items())
def test_parameters(name, expected):
    args = parse(['--template', name])
    with torch.device('meta'):
        net = build(args.model, args.scale, **network_settings(args))
    counted = sum(p.numel() for p in net.parameters())
    assert counted == pytest.approx(expected, rel=5e-3)


@pytest.mark.parametrize(
    'name, expected',
    [
        ('LCoAN_x2', {'epochs': 1500, 'decay': [300, 600, 900, 1200], 'lr': 1e-4, 'batch_size': 16, 'chop': True}),
        ('LCoAN_x4', {'epochs': 500, 'decay': [100, 200, 300, 400], 'lr': 1e-4, 'batch_size': 16, 'chop': True}),
        ('EDSR_x2', {'epochs': 300, 'decay': [200], 'lr': 1e-4, 'batch_size': 16, 'test_every': 1000}),
    ],
)
def test_published_schedule(name, expected):
    options = vars(parse(['--template', name]))
    assert {key: options[key] for key in expected} == expected
