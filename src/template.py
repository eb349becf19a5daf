"""Recipes: published settings as option defaults (`--template NAME`); what is typed wins."""

EDSR: dict[str, object] = {
    'model': 'EDSR',
    'data_train': ['DIV2K'],
    'data_test': ['DIV2K'],
    'epochs': 300,
    'decay': [200],
}
LCOAN: dict[str, object] = {
    'model': 'LCoAN',
    'data_train': ['DIV2K'],
    'data_range': ((1, 800), (1, 5)),
    'data_test': ['Set5'],
    'chop': True,
}

# EDSR: https://github.com/sanghyun-son/EDSR-PyTorch, demo.sh. LCoAN: https://github.com/YigangZhao/LCoAN, README.
TEMPLATES: dict[str, dict[str, object]] = {
    'EDSR-baseline_x2': {**EDSR, 'model': 'EDSR-baseline', 'scale': 2, 'patch_size': 96},
    'EDSR-baseline_x3': {**EDSR, 'model': 'EDSR-baseline', 'scale': 3, 'patch_size': 144},
    'EDSR-baseline_x4': {**EDSR, 'model': 'EDSR-baseline', 'scale': 4, 'patch_size': 192},
    'EDSR_x2': {**EDSR, 'scale': 2, 'patch_size': 96},
    'EDSR_x3': {**EDSR, 'scale': 3, 'patch_size': 144},
    'EDSR_x4': {**EDSR, 'scale': 4, 'patch_size': 192},
    'LCoAN_x2': {**LCOAN, 'scale': 2, 'patch_size': 96, 'epochs': 1500, 'decay': [300, 600, 900, 1200]},
    'LCoAN_x4': {**LCOAN, 'scale': 4, 'patch_size': 192, 'epochs': 500, 'decay': [100, 200, 300, 400]},
}
