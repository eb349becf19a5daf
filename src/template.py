"""Recipes: published settings as option defaults (`--template NAME`); what is typed wins.

A recipe is the training of a network, and its paper's way to test as far as this program has it (docs/PROTOCOLS.md).
Where training starts from other weights, `pre_train` names them. Published recipes draw all images equally often, as in
their papers; one of this project's own may set `'sampling': 'area'`.
"""

from typing import Any

Recipe = dict[str, Any]

DIV2K: Recipe = {'data_train': ['DIV2K'], 'data_range': ((1, 800), (801, 810))}
DF2K: Recipe = {'data_train': ['DIV2K', 'Flickr2K'], 'data_range': ((1, 800), (801, 810))}


def milestones(*values: int) -> Recipe:
    """Epochs after which the rate is halved, and the last epoch."""
    return {'decay': list(values[:-1]), 'epochs': values[-1]}


def at_scales(name: str, recipe: Recipe, lr_patch: int, scales: tuple[int, ...] = (2, 3, 4)) -> dict[str, Recipe]:
    """One recipe a scale, whose HR patch is `scale` times the LR patch of the paper."""
    return {f'{name}_x{scale}': {**recipe, 'scale': scale, 'patch_size': scale * lr_patch} for scale in scales}


def from_x2(name: str, recipe: Recipe, lr_patch: int, scales: tuple[int, ...] = (2, 3, 4)) -> dict[str, Recipe]:
    """Recipes of which those above x2 start from the weights of x2, `name`_x2.pt."""
    found = at_scales(name, recipe, lr_patch, scales)
    return {key: own if own['scale'] == 2 else {**own, 'pre_train': f'{name}_x2.pt'} for key, own in found.items()}


def tuned(
    name: str, recipe: Recipe, lr_patch: int, scales: tuple[int, ...] = (2, 3, 4), kind: str = 'finetune'
) -> dict[str, Recipe]:
    """Recipes `name`-`kind`, which start from the weights of `name` at the same scale."""
    found = at_scales(f'{name}-{kind}', recipe, lr_patch, scales)
    return {key: {**own, 'pre_train': f'{name}_x{own["scale"]}.pt'} for key, own in found.items()}


# https://github.com/sanghyun-son/EDSR-PyTorch, demo.sh; x3 and x4 start from x2
EDSR: Recipe = {'model': 'EDSR', **DIV2K, 'data_test': ['DIV2K'], **milestones(200, 300)}
BASELINE: Recipe = {**EDSR, 'model': 'EDSR-baseline'}

# https://github.com/yulunzhang/RCAN, RCAN_TrainCode (option.py, TrainRCAN_scripts.sh); x3 and x4 start from x2
RCAN: Recipe = {
    'model': 'RCAN', 'data_train': ['DIV2K'], 'data_test': ['DIV2K'], 'data_range': ((1, 800), (801, 805)),
    'chop': True, **milestones(200, 400, 600, 800, 1000),
}  # fmt: skip

# https://github.com/HarukiYqM/Non-Local-Sparse-Attention, README; published for x2 only, x3 and x4 by its pattern
NLSN: Recipe = {'model': 'NLSN', **DIV2K, 'chop': True, **milestones(200, 400, 600, 800, 1000)}

# https://github.com/YigangZhao/LCoAN, README; x4 starts from x2; x3 (not published) by the pattern of x4
LCOAN: Recipe = {'model': 'LCoAN', 'data_train': ['DIV2K'], 'data_range': ((1, 800), (1, 5)), 'chop': True}

# https://github.com/saturnian77/ASID, README and yamls: an epoch is 64 patches of each of the 800 images; its
# augmentation flips two of three images, here all eight orientations are equally likely. Tested in tiles, as OmniSR.
# Fine-tuning is as in the README; the weights of ASIDd8 x2 were fine-tuned at 1.5e-4, halved at 125 and 250.
TILES: Recipe = {'chop': True, 'chop_size': 64, 'chop_overlap': 24, 'chop_blend': 'mean'}
ADAMW: Recipe = {'optimizer': 'ADAMW', 'weight_decay': 1e-4}
ASID: Recipe = {
    'model': 'ASID', **DIV2K, **TILES, **ADAMW, 'lr': 5e-4, 'batch_size': 16, 'test_every': 3200,
    **milestones(250, 500),
}  # fmt: skip
ASID_TUNED: Recipe = {**ASID, 'lr': 4e-4, **milestones(250, 500, 750, 1000)}

# https://github.com/Francis0625/Omni-SR, train_yamls
OMNISR: Recipe = {
    'model': 'OmniSR', **DIV2K, **TILES, **ADAMW, 'lr': 5e-4, 'batch_size': 64, 'test_every': 800,
    **milestones(250, 500, 750, 1000),
}  # fmt: skip

OMNISR_DF2K: Recipe = {**OMNISR, **DF2K, 'test_every': 3450}

# https://github.com/NeonLeexiang/DLGSANet, options; every scale from scratch; scores leave out 4 pixels at every scale
DLGSANET: Recipe = {
    'model': 'DLGSANet', **DIV2K, 'lr': 5e-4, 'betas': [0.9, 0.99], 'batch_size': 16, 'weight_ema': 0.999, 'shave': 4,
    **milestones(250, 400, 450, 475, 500),
}  # fmt: skip

# https://github.com/LabShuHangGU/Adaptive-Token-Dictionary, options; x2 is trained, then fine-tuned on larger patches,
# x3 and x4 start from x2; tested on whole images
ATD_COMMON: Recipe = {
    'optimizer': 'ADAMW', 'betas': [0.9, 0.9], 'batch_size': 32, 'weight_ema': 0.999,
}  # fmt: skip
ATD: Recipe = {
    'model': 'ATD', **DF2K, **ATD_COMMON, 'lr': 2e-4, 'warmup': 10000, **milestones(250, 300),
}  # fmt: skip
ATD_TUNED: Recipe = {**ATD, **milestones(150, 200, 225, 240, 250)}
ATD_LIGHT: Recipe = {
    'model': 'ATD-light', **DIV2K, **ATD_COMMON, 'lr': 5e-4, 'warmup': 20000,
    **milestones(250, 400, 450, 475, 490, 500),
}  # fmt: skip
ATD_LIGHT_TUNED: Recipe = {**ATD_LIGHT, 'lr': 2e-4, 'warmup': 10000, **milestones(150, 200, 225, 240, 250)}

# https://github.com/EquationWalker/CATANet, options; x3 and x4 start from x2 (in epochs of 500, since a milestone is at
# step 237,500); tested on whole images
CATANET: Recipe = {
    'model': 'CATANet', **DIV2K, 'lr': 2e-4, 'betas': [0.9, 0.99], 'batch_size': 64,
    **milestones(300, 500, 650, 700, 750, 800),
}  # fmt: skip
CATANET_TUNED: Recipe = {**CATANET, 'test_every': 500, **milestones(250, 400, 450, 475, 500)}

# https://github.com/XiangZ-0/HiT-SR, options; x3 and x4 start from x2; tested on whole images
HITSRF: Recipe = {
    'model': 'HiT-SRF', **DIV2K, 'lr': 5e-4, 'betas': [0.9, 0.99], 'batch_size': 64,
    **milestones(250, 400, 450, 475, 500),
}  # fmt: skip
# https://github.com/LabShuHangGU/PFT-SR, options; x3 and x4 start from x2; tested on whole images
PFT_LIGHT: Recipe = {**ATD_LIGHT, 'model': 'PFT-light', 'betas': [0.9, 0.99]}
PFT_LIGHT_TUNED: Recipe = {**ATD_LIGHT_TUNED, 'model': 'PFT-light', 'betas': [0.9, 0.99]}

# https://github.com/cszn/KAIR, options/swinir/train_swinir_sr_lightweight.json; x3 and x4 start from x2, with half the
# rate and half the steps (there in epochs of 500, since a milestone is at step 237,500)
SWINIR: Recipe = {
    'model': 'SwinIR-light', **DIV2K, 'lr': 2e-4, 'batch_size': 64, 'weight_ema': 0.999,
    **milestones(250, 400, 450, 475, 500),
}  # fmt: skip
SWINIR_TUNED: Recipe = {**SWINIR, 'lr': 1e-4, 'test_every': 500}

# https://github.com/dslisleedh/ESC, options: 4 x 16 patches; x3 and x4 start from x2 and are trained as long; tests
# continue images to whole windows
ESC: Recipe = {
    'model': 'ESC', **DIV2K, **ATD_COMMON, 'lr': 5e-4, 'batch_size': 64, 'warmup': 20000, 'pad_to': 32,
    **milestones(250, 400, 450, 475, 490, 500),
}  # fmt: skip

# https://github.com/Zheng222/IMDN, train_IMDN.py: every scale from scratch, with HR patches of one size; the rate falls
# as the 200th, 400th, ... epoch begins
IMDN: Recipe = {
    'model': 'IMDN', **DIV2K, 'lr': 2e-4, 'patch_size': 192, **milestones(199, 399, 599, 799, 999, 1000),
}  # fmt: skip

# https://github.com/zhaohengyuan1/PAN, codes/options/train; https://github.com/xiaom233/BSRN, options/train: every
# scale from scratch
COSINE: Recipe = {'schedule': 'cosine', 'decay_unit': 'steps', 'lr_min': 1e-7, 'epochs': 1000}
PAN: Recipe = {'model': 'PAN', **DF2K, **COSINE, 'restarts': 3, 'lr': 7e-4, 'betas': [0.9, 0.99], 'batch_size': 32}
BSRN: Recipe = {'model': 'BSRN', **DF2K, **COSINE, 'lr': 1e-3, 'batch_size': 64}

# Ours: sized for an hour on two CPU cores; the weights in models/
SMALL: Recipe = {
    'model': 'LCoAN',
    'n_resgroups': 4,
    'n_resblocks': 2,
    'n_feats': 32,
    'n_clusters': 32,
    'window_size': 96,
    'data_train': ['SR291'],
    'batch_size': 8,
    'lr': 5e-4,
    'test_every': 500,
}

# Ours: from the weights for clean images to those for photographs, in short runs
PHOTO: Recipe = {
    'model': 'ASID', **TILES, 'degradation': 'photo', 'data_train': ['SR291', 'W216'], 'sampling': 'area',
    'batch_size': 8, 'optimizer': 'MUON', 'lr': 5e-4, 'schedule': 'cosine', 'decay_unit': 'steps', 'warmup': 100,
    'weight_ema': 0.998, 'test_every': 500, 'epochs': 6,
}  # fmt: skip

TEMPLATES: dict[str, Recipe] = {
    **from_x2('EDSR-baseline', BASELINE, 48),
    **from_x2('EDSR', EDSR, 48),
    **from_x2('RCAN', RCAN, 48),
    **at_scales('NLSN', NLSN, 48),
    **at_scales('LCoAN', {**LCOAN, **milestones(300, 600, 900, 1200, 1500)}, 48, (2,)),
    **from_x2('LCoAN', {**LCOAN, **milestones(100, 200, 300, 400, 500)}, 48, (3, 4)),
    **at_scales('ASID', ASID, 64),
    **tuned('ASID', ASID_TUNED, 64),
    **at_scales('ASIDd8', {**ASID, 'model': 'ASIDd8'}, 64),
    **tuned('ASIDd8', {**ASID_TUNED, 'model': 'ASIDd8'}, 64),
    **at_scales('DLGSANet', DLGSANET, 48),
    **at_scales('DLGSANet-light', {**DLGSANET, 'model': 'DLGSANet-light'}, 48),
    **at_scales('DLGSANet-tiny', {**DLGSANET, 'model': 'DLGSANet-tiny'}, 48),
    **at_scales('ATD', ATD, 64, (2,)),
    **tuned('ATD', ATD_TUNED, 96, (2,)),
    **at_scales('ATD', {**ATD_TUNED, 'pre_train': 'ATD-finetune_x2.pt'}, 96, (3, 4)),
    **at_scales('ATD-light', ATD_LIGHT, 64, (2,)),
    **from_x2('ATD-light', ATD_LIGHT_TUNED, 64, (3, 4)),
    **at_scales('CATANet', CATANET, 64, (2,)),
    **from_x2('CATANet', CATANET_TUNED, 64, (3,)),
    **from_x2('CATANet', CATANET_TUNED, 48, (4,)),
    **from_x2('HiT-SRF', HITSRF, 64),
    **at_scales('PFT-light', PFT_LIGHT, 64, (2,)),
    **from_x2('PFT-light', PFT_LIGHT_TUNED, 64, (3, 4)),
    **at_scales('OmniSR', OMNISR, 64),
    **at_scales('OmniSR-DF2K', OMNISR_DF2K, 64),
    **at_scales('SwinIR-light', SWINIR, 64, (2,)),
    **from_x2('SwinIR-light', SWINIR_TUNED, 64, (3, 4)),
    **from_x2('ESC', ESC, 64),
    **from_x2('ESC-light', {**ESC, 'model': 'ESC-light'}, 64),
    **from_x2('ESC-FP', {**ESC, 'model': 'ESC-FP'}, 64),
    **{f'IMDN_x{scale}': {**IMDN, 'scale': scale} for scale in (2, 3, 4)},
    **at_scales('PAN', PAN, 64),
    **at_scales('BSRN', BSRN, 48),
    **at_scales('LCoAN-small', {**SMALL, **milestones(10, 14, 17, 19, 20)}, 32, (2,)),
    **from_x2('LCoAN-small', {**SMALL, **milestones(6, 9, 11, 12)}, 32, (4,)),
    **tuned('ASID', PHOTO, 48, (2, 4), 'photo'),
}
