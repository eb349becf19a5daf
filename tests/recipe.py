"""Weights and inputs of the recorded references (reference.json), and how a network compares with one.

The weights follow from a tensor's key and shape alone, so that two implementations get the same ones without a file
going between them. They keep activations of order one and make every tensor count; they do not restore images.
"""

import hashlib
import json
import math
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

REFERENCE: dict[str, Any] = json.loads(Path(__file__).with_name('reference.json').read_text())
CASES: dict[str, dict[str, Any]] = REFERENCE['networks']

BIAS = {'EDSR': 10.0, 'EDSR-baseline': 10.0, 'RCAN': 10.0}  # these work in [0, 255]; the others 0.1
# Of the weights relative to 1 / sqrt(fan in): the first that is found in the key, otherwise 1.
ESC = {
    r'relative_position_bias$': 94.5, r'^plk_filter$': 2.8, r'\.dwc_proj\.3\.': 0.3, r'\.pconvs\.\d+\.aggr\.': 0.4,
}  # fmt: skip
DYNAMIC = {r'IDynamicDWConv\.conv\.conv2': 0.15}
GAIN = {
    'EDSR': {r'^body\.\d+\.body': 2.0},
    'EDSR-baseline': {r'^body\.\d+\.body': 0.7},
    'RCAN': {
        r'conv_du\.0': 0.05, r'conv_du\.2': 1.0, r'^body\.\d+\.body\.\d+\.body': 0.7, r'^body\.\d+\.body': 0.4,
    },
    'NLSN': {r'^head': 2.0, r'^body\.\d+\.body': 2.0, r'conv_match': 2.0, r'conv_assembly': 3.0},
    'LCoAN': {r'^head': 2.0, r'local_body': 0.7, r'conv_match': 2.0, r'conv_assembly': 3.0, r'^body\.\d+\.m_conv': 3.0},
    'DLGSANet': DYNAMIC,
    'DLGSANet-light': DYNAMIC,
    'DLGSANet-tiny': DYNAMIC,
    'CATANet': {r'\.irca_attn\.': 6.0, r'^mid_convs\.': 0.35},
    'ATD': {r'\.wqkv\.': 0.35, r'\.wv\.': 0.4},
    'ATD-light': {r'\.wqkv\.': 0.5, r'\.wv\.': 0.4},
    'ESC': ESC,
    'ESC-light': ESC,
    'ESC-FP': {r'relative_position_bias$': 94.5, r'\.plk\.proj\.3\.': 0.5},
    'IMDN': {r'\.cca\.conv_du\.': 3.0},
    'BSRN': {r'\.cca\.conv_du\.': 6.0},
    'PFT-light': {r'\.attn_win\.proj\.': 0.1, r'\.wqkv\.': 0.5},  # a key chosen otherwise stays unseen
}  # fmt: skip
# Other parameters, by the end of their key: mean and standard deviation.
OTHERS = {
    '.td': (0, 1), '.sigma': (0, 0.5), '.scale': (0.5, 0.3), '.logit_scale': (math.log(10), 0.1 * math.log(10)),
    '.temperature': (1, 0.1), '.relative_position_bias_table': (0, 1.5), '.rel_pos_bias.weight': (0, 1.5),
}  # fmt: skip
# Left as the network made them: the mean colour, and tables that follow from the sizes.
OWN = re.compile(r'^(sub|add)_mean\.|relative_position_index|attn_mask$')


def uniform(seed: int, shape: tuple[int, ...]) -> Tensor:
    """Input in [0, 1), float32."""
    return torch.from_numpy(np.random.Generator(np.random.PCG64(seed)).random(shape).astype(np.float32))


def weight(name: str, key: str, shape: tuple[int, ...]) -> np.ndarray:
    """The tensor at `key` of network `name`."""
    noise = np.random.Generator(np.random.PCG64(zlib.crc32(key.encode()))).standard_normal(shape)
    if key.endswith('.means'):
        length = 0.8 + 0.1 * noise[..., :1] if name == 'CATANet' else 1  # means of unit vectors are shorter
        return length * noise / np.linalg.norm(noise, axis=-1, keepdims=True)
    for end, (mean, deviation) in OTHERS.items():
        if key.endswith(end):
            return mean + deviation * noise
    if len(shape) < 2:
        return 1 + 0.1 * noise if key.endswith('.weight') else BIAS.get(name, 0.1) * noise
    gain = next((value for pattern, value in GAIN.get(name, {}).items() if re.search(pattern, key)), 1.0)
    return gain / math.sqrt(math.prod(shape[1:])) * noise


def fill(net: nn.Module, name: str) -> None:
    """Load the recipe's weights, strictly."""
    first = weight('EDSR', 'probe.weight', (4, 3, 3, 3))[0, 0, 0, 0]
    assert abs(first - REFERENCE['first_draw']) < 1e-6, 'this numpy draws other numbers than the references used'
    state = net.state_dict()
    for key, tensor in state.items():
        if key.endswith('initted'):
            state[key] = torch.tensor(True)
        elif not OWN.search(key):
            state[key] = torch.from_numpy(np.asarray(weight(name, key, tuple(tensor.shape)), np.float32))
    net.load_state_dict(state, strict=True)


def layout(net: nn.Module) -> dict[str, Any]:
    """Number of parameters, and of the state dict's entries; hash of their names, shapes and types in order."""
    entries = [f'{k} {list(v.shape)} {str(v.dtype).removeprefix("torch.")}\n' for k, v in net.state_dict().items()]
    return {
        'trainable': sum(p.numel() for p in net.parameters() if p.requires_grad),
        'entries': len(entries),
        'sha256': hashlib.sha256(''.join(entries).encode()).hexdigest(),
    }


def worst_error(net: nn.Module, case: dict[str, Any]) -> float:
    """Largest deviation from the recorded pixels, mean and maximum, as a share of the largest output."""
    fill(net, case['name'])
    x = uniform(case['seed'], (1, 3, case['height'], case['width'])) * case['rgb_range']
    with torch.no_grad():
        y = net.eval()(x)[0].double()
    errors = [abs(y.mean().item() - case['mean']), abs(y.abs().max().item() - case['largest'])]
    errors += [abs(y[c, i, j].item() - value) for c, i, j, value in case['pixels']]
    return max(errors) / case['largest']
