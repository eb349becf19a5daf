"""Recipes: published settings as option defaults (`--template NAME`); what is typed wins."""

Recipe = dict[str, object]

# https://github.com/sanghyun-son/EDSR-PyTorch, demo.sh; x3 and x4 start from x2 (--pre_train)
EDSR: Recipe = {'model': 'EDSR', 'data_train': ['DIV2K'], 'data_test': ['DIV2K'], 'epochs': 300, 'decay': [200]}
BASELINE = {**EDSR, 'model': 'EDSR-baseline'}

# https://github.com/YigangZhao/LCoAN, README; x4 starts from x2
LCOAN: Recipe = {'model': 'LCoAN', 'data_train': ['DIV2K'], 'data_range': ((1, 800), (1, 5)), 'chop': True}

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
    'epochs': 20,
    'decay': [10, 14, 17, 19],
}

TEMPLATES: dict[str, Recipe] = {
    'EDSR-baseline_x2': {**BASELINE, 'scale': 2, 'patch_size': 96},
    'EDSR-baseline_x3': {**BASELINE, 'scale': 3, 'patch_size': 144},
    'EDSR-baseline_x4': {**BASELINE, 'scale': 4, 'patch_size': 192},
    'EDSR_x2': {**EDSR, 'scale': 2, 'patch_size': 96},
    'EDSR_x3': {**EDSR, 'scale': 3, 'patch_size': 144},
    'EDSR_x4': {**EDSR, 'scale': 4, 'patch_size': 192},
    'LCoAN_x2': {**LCOAN, 'scale': 2, 'patch_size': 96, 'epochs': 1500, 'decay': [300, 600, 900, 1200]},
    'LCoAN_x4': {**LCOAN, 'scale': 4, 'patch_size': 192, 'epochs': 500, 'decay': [100, 200, 300, 400]},
    'LCoAN-small_x2': {**SMALL, 'scale': 2, 'patch_size': 64},
    'LCoAN-small_x4': {**SMALL, 'scale': 4, 'patch_size': 128, 'epochs': 12, 'decay': [6, 9, 11]},
}
