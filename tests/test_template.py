import math

import pytest
import torch

from model import build
from option import network_settings, parse
from template import TEMPLATES
from wiring import schedule

# Parameter counts as the tables of the field give them.
PARAMETERS = {
    'EDSR-baseline': (1.37e6, 1.55e6, 1.52e6),
    'EDSR': (40.7e6, 43.7e6, 43.1e6),
    'RCAN': (15.44e6, 15.63e6, 15.59e6),
    'NLSN': (41.8e6, 44.75e6, 44.16e6),
    'LCoAN': (15.67e6, 16.41e6, 16.26e6),
    'ASID': (297.5e3, 304.0e3, 313.1e3),
    'ASIDd8': (732.1e3, 738.6e3, 747.7e3),
    'DLGSANet': (4.73e6, 4.74e6, 4.76e6),
    'DLGSANet-light': (745.2e3, 751.7e3, 760.8e3),
    'DLGSANet-tiny': (565.7e3, 572.2e3, 581.3e3),
    'ATD': (20.1e6, 20.3e6, 20.3e6),
    'ATD-light': (753.2e3, 759.7e3, 768.8e3),
    'CATANet': (477e3, 550e3, 535e3),
    'HiT-SRF': (847e3, 855e3, 866e3),
    'PFT-light': (776e3, 783e3, 792e3),
    'OmniSR': (785e3, 793e3, 805e3),
    'SwinIR-light': (910e3, 918e3, 930e3),
    'ESC': (947e3, 955e3, 968e3),
    'ESC-light': (603e3, 612e3, 624e3),
    'ESC-FP': (524e3, 530e3, 539e3),
    'IMDN': (694e3, 703e3, 715e3),
    'PAN': (261e3, 261e3, 272e3),
    'BSRN': (332e3, 340e3, 352e3),
}

# LR patch, batch, optimiser, betas, weight decay, rate, steps in all, steps at which the rate halves (or the number of
# cosines), warm-up steps, weight average, training sets. In thousands of steps; 3.2 is the epoch of ASID.
K = 1000
ADAM, ADAMW = ('ADAM', [0.9, 0.999], 0.0), ('ADAMW', [0.9, 0.999], 1e-4)
DIV2K, DF2K = ['DIV2K'], ['DIV2K', 'Flickr2K']
FIFTHS = (200, 400, 600, 800)
IMDN = (199, 399, 599, 799, 999)
COSINE, COSINES = 1, 4  # one, or one after the other, down to 1e-7
DLGSANET = (48, 16, 'ADAM', [0.9, 0.99], 0.0, 5e-4, 500, (250, 400, 450, 475), 0, 0.999, DIV2K)
ATD_TUNED = (96, 32, 'ADAMW', [0.9, 0.9], 0.0, 2e-4, 250, (150, 200, 225, 240), 10, 0.999, DF2K)
ASID_SCRATCH = (64, 16, *ADAMW, 5e-4, 1600, (800,), 0, 0, DIV2K)
ASID_TUNED = (64, 16, *ADAMW, 4e-4, 3200, (800, 1600, 2400), 0, 0, DIV2K)
ESC = (64, 64, 'ADAMW', [0.9, 0.9], 0.0, 5e-4, 500, (250, 400, 450, 475, 490), 20, 0.999, DIV2K)
PUBLISHED = {
    'EDSR': (48, 16, *ADAM, 1e-4, 300, (200,), 0, 0, DIV2K),
    'EDSR-baseline': (48, 16, *ADAM, 1e-4, 300, (200,), 0, 0, DIV2K),
    'RCAN': (48, 16, *ADAM, 1e-4, 1000, FIFTHS, 0, 0, DIV2K),
    'NLSN': (48, 16, *ADAM, 1e-4, 1000, FIFTHS, 0, 0, DIV2K),
    'LCoAN_x2': (48, 16, *ADAM, 1e-4, 1500, (300, 600, 900, 1200), 0, 0, DIV2K),
    'LCoAN': (48, 16, *ADAM, 1e-4, 500, (100, 200, 300, 400), 0, 0, DIV2K),
    'ASID': ASID_SCRATCH,
    'ASIDd8': ASID_SCRATCH,
    'ASID-finetune': ASID_TUNED,
    'ASIDd8-finetune': ASID_TUNED,
    'DLGSANet': DLGSANET,
    'DLGSANet-light': DLGSANET,
    'DLGSANet-tiny': DLGSANET,
    'ATD_x2': (64, 32, 'ADAMW', [0.9, 0.9], 0.0, 2e-4, 300, (250,), 10, 0.999, DF2K),
    'ATD': ATD_TUNED,
    'ATD-finetune': ATD_TUNED,
    'ATD-light_x2': (64, 32, 'ADAMW', [0.9, 0.9], 0.0, 5e-4, 500, (250, 400, 450, 475, 490), 20, 0.999, DIV2K),
    'ATD-light': (64, 32, 'ADAMW', [0.9, 0.9], 0.0, 2e-4, 250, (150, 200, 225, 240), 10, 0.999, DIV2K),
    'CATANet_x2': (64, 64, 'ADAM', [0.9, 0.99], 0.0, 2e-4, 800, (300, 500, 650, 700, 750), 0, 0, DIV2K),
    'CATANet': (64, 64, 'ADAM', [0.9, 0.99], 0.0, 2e-4, 250, (125, 200, 225, 237.5), 0, 0, DIV2K),
    'CATANet_x4': (48, 64, 'ADAM', [0.9, 0.99], 0.0, 2e-4, 250, (125, 200, 225, 237.5), 0, 0, DIV2K),
    'HiT-SRF': (64, 64, 'ADAM', [0.9, 0.99], 0.0, 5e-4, 500, (250, 400, 450, 475), 0, 0, DIV2K),
    'PFT-light_x2': (64, 32, 'ADAMW', [0.9, 0.99], 0.0, 5e-4, 500, (250, 400, 450, 475, 490), 20, 0.999, DIV2K),
    'PFT-light': (64, 32, 'ADAMW', [0.9, 0.99], 0.0, 2e-4, 250, (150, 200, 225, 240), 10, 0.999, DIV2K),
    'OmniSR': (64, 64, *ADAMW, 5e-4, 800, (200, 400, 600), 0, 0, DIV2K),
    'OmniSR-DF2K': (64, 64, *ADAMW, 5e-4, 3450, (862.5, 1725, 2587.5), 0, 0, DF2K),
    'SwinIR-light_x2': (64, 64, *ADAM, 2e-4, 500, (250, 400, 450, 475), 0, 0.999, DIV2K),
    'SwinIR-light': (64, 64, *ADAM, 1e-4, 250, (125, 200, 225, 237.5), 0, 0.999, DIV2K),
    'ESC': ESC,
    'ESC-light': ESC,
    'ESC-FP': ESC,
    **{f'IMDN_x{scale}': (192 // scale, 16, *ADAM, 2e-4, 1000, IMDN, 0, 0, DIV2K) for scale in (2, 3, 4)},
    'PAN': (64, 32, 'ADAM', [0.9, 0.99], 0.0, 7e-4, 1000, COSINES, 0, 0, DF2K),
    'BSRN': (48, 64, *ADAM, 1e-3, 1000, COSINE, 0, 0, DF2K),
}
OFFICIAL = [name for name in TEMPLATES if not name.startswith(('LCoAN-small', 'ASID-photo'))]
TILES = {'chop': True, 'chop_size': 64, 'chop_overlap': 24, 'chop_blend': 'mean', 'shave': None}
WHOLE = {'chop': False, 'shave': None}
TESTS = {
    'ASID': TILES, 'ASIDd8': TILES, 'OmniSR': TILES, 'ATD': WHOLE, 'ATD-light': WHOLE, 'SwinIR-light': WHOLE,
    'IMDN': WHOLE, 'PAN': WHOLE, 'BSRN': WHOLE,
    'PFT-light': WHOLE,
    'DLGSANet': {'chop': False, 'shave': 4}, 'DLGSANet-light': {'chop': False, 'shave': 4},
    'DLGSANet-tiny': {'chop': False, 'shave': 4}, 'LCoAN': {'chop': True, 'shave': None},
    'NLSN': {'chop': True, 'shave': None}, 'CATANet': WHOLE, 'HiT-SRF': WHOLE,
    'ESC': {**WHOLE, 'pad_to': 32}, 'ESC-light': {**WHOLE, 'pad_to': 32}, 'ESC-FP': {**WHOLE, 'pad_to': 32},
}  # fmt: skip


@pytest.mark.parametrize('name', TEMPLATES)
def test_a_recipe_is_a_set_of_valid_options(name):
    typed = vars(parse([]))
    assert set(TEMPLATES[name]) <= set(typed)
    args = parse(['--template', name])
    assert name.endswith(f'_x{args.scale}')
    for key, value in TEMPLATES[name].items():
        assert type(getattr(args, key)) is type(typed[key]) or typed[key] is None, key
        assert getattr(args, key) == value


def test_there_is_a_recipe_for_every_network_and_scale():
    for name in PARAMETERS:
        for scale in (2, 3, 4):
            assert parse(['--template', f'{name}_x{scale}']).model == name


@pytest.mark.parametrize('name', OFFICIAL)
def test_training_is_as_published(name):
    args = parse(['--template', name])
    patch, batch, optimizer, betas, decay, rate, steps, halved, warmup, average, data = (
        PUBLISHED.get(name) or PUBLISHED[name.rpartition('_x')[0]]
    )
    assert args.patch_size == patch * args.scale
    assert args.batch_size == batch
    assert (args.optimizer, args.betas, args.weight_decay) == (optimizer, betas, decay)
    assert (args.weight_ema, args.data_train, args.loss) == (average, data, '1*L1')
    assert args.data_range[0] == (1, 800)
    assert args.epochs * args.test_every == steps * K

    def rate_at(step: int) -> float:
        return schedule(args)(step // args.test_every, step)

    if warmup:
        assert rate_at(0) == pytest.approx(rate / (warmup * K))
        assert rate_at(warmup * K // 2 - 1) == pytest.approx(rate / 2)
    assert rate_at(warmup * K) == pytest.approx(rate)
    if isinstance(halved, int):
        for n in range(halved):
            start, length = n * steps * K // halved, steps * K // halved
            assert rate_at(start) == pytest.approx(rate)
            assert rate_at(start + length // 2) == pytest.approx((rate + 1e-7) / 2)
            assert rate_at(start + length - 1) == pytest.approx(1e-7, rel=1e-2)
        return
    for n, milestone in enumerate(halved):
        assert rate_at(int(milestone * K) - 1) == pytest.approx(rate / 2**n)
        assert rate_at(int(milestone * K)) == pytest.approx(rate / 2 ** (n + 1))
    assert rate_at(steps * K - 1) == pytest.approx(rate / 2 ** len(halved))


# What training starts from, by the papers: https://github.com/sanghyun-son/EDSR-PyTorch (demo.sh), yulunzhang/RCAN,
# YigangZhao/LCoAN (README), saturnian77/ASID (README), LabShuHangGU/Adaptive-Token-Dictionary,
# EquationWalker/CATANet, XiangZ-0/HiT-SR, LabShuHangGU/PFT-SR, dslisleedh/ESC and cszn/KAIR (options).
STARTS = {
    **{f'{name}_x{s}': f'{name}_x2.pt' for name in ('EDSR', 'EDSR-baseline', 'RCAN', 'LCoAN') for s in (3, 4)},
    **{f'{name}_x{s}': f'{name}_x2.pt' for name in ('ATD-light', 'CATANet', 'HiT-SRF', 'SwinIR-light') for s in (3, 4)},
    **{f'{name}_x{s}': f'{name}_x2.pt' for name in ('ESC', 'ESC-light', 'ESC-FP', 'PFT-light') for s in (3, 4)},
    **{f'{name}-finetune_x{s}': f'{name}_x{s}.pt' for name in ('ASID', 'ASIDd8') for s in (2, 3, 4)},
    'ATD-finetune_x2': 'ATD_x2.pt', 'ATD_x3': 'ATD-finetune_x2.pt', 'ATD_x4': 'ATD-finetune_x2.pt',
    'LCoAN-small_x4': 'LCoAN-small_x2.pt',
    'ASID-photo_x2': 'ASID_x2.pt',
    'ASID-photo_x4': 'ASID_x4.pt',
}  # fmt: skip


@pytest.mark.parametrize('name', TEMPLATES)
def test_what_training_starts_from(name):
    assert parse(['--template', name]).pre_train == STARTS.get(name, '')
    assert parse(['--template', name, '--pre_train', 'own.pt']).pre_train == 'own.pt'
    assert parse(['--template', name, '--pre_train', '']).pre_train == ''
    # What is tested is never assumed.
    for other in (['--test_only'], ['--export', 'onnx'], ['--score', 'folder', '--no_chop']):
        assert parse(['--template', name, *other]).pre_train == ''
    assert STARTS.get(name, 'EDSR_x2.pt').removesuffix('.pt') in TEMPLATES


@pytest.mark.parametrize('name', OFFICIAL)
def test_published_training_draws_images_equally_often(name):
    assert parse(['--template', name]).sampling == 'image'


@pytest.mark.parametrize('name', OFFICIAL)
def test_tests_are_as_published(name):
    args = parse(['--template', name])
    expected = TESTS.get(args.model, {'shave': None})
    assert {key: getattr(args, key) for key in expected} == expected
    assert not args.self_ensemble


@pytest.mark.parametrize('scale', [2, 3, 4])
@pytest.mark.parametrize('name', PARAMETERS)
def test_parameters(name, scale):
    args = parse(['--template', f'{name}_x{scale}'])
    with torch.device('meta'):
        net = build(args.model, args.scale, **network_settings(args))
    counted = sum(p.numel() for p in net.parameters())
    expected = PARAMETERS[name][scale - 2]
    assert math.isclose(counted, expected, rel_tol=1e-2)
