"""Networks in bfloat16 and float16 on a GPU, where their facts say that they stand it."""

from typing import Any

import numpy as np
import pytest
import torch

from api import load
from data.image import read_rgb
from metric import psnr
from model import NETWORKS, type_name
from tests.gpu import programs
from tests.gpu.parts import (
    ALL,
    DEVICE,
    REHEARSE,
    ROOT,
    SORTING,
    Recorded,
    background,
    chosen,
    distance,
    note,
    reference,
)

CARDS = ['LCoAN-small_x2', 'LCoAN-small_x4', 'ASID_x2', 'ASID_x3', 'ASID_x4', 'DLGSANet-tiny_x2', 'ATD-light_x2']
CARDS = CARDS[:1] if REHEARSE else CARDS
LOSS = {'ATD-light_x2': 0.02}  # dB; that of the others 0.01. On a CPU bfloat16 costs these weights 0.013 dB.
# Of untrained networks: what rounding may come to through all layers. ASIDd8's come to 0.16 on a CPU too.
LIMIT = 0.1
LIMITS = {'ASIDd8': 0.3} | dict.fromkeys(SORTING, 0.5)  # where pixels are sorted by it, they end in other groups
NAMES = ['bird'] if REHEARSE else ['baby', 'bird', 'butterfly', 'head', 'woman']


def set5(scale: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """LR and HR, this cropped to a multiple of the scale."""
    pairs = []
    for name in NAMES:
        lr = read_rgb(reference('benchmark', 'Set5', 'LR_bicubic', f'X{scale}', f'{name}x{scale}.png'))
        hr = read_rgb(reference('benchmark', 'Set5', 'HR', f'{name}.png'))
        pairs.append((lr, hr[: lr.shape[0] * scale, : lr.shape[1] * scale]))
    return pairs


@pytest.mark.parametrize('card', CARDS)
def test_trained_weights_lose_next_to_nothing(card: str) -> None:
    model = load(card, DEVICE, tiles=None).model
    images = set5(model.scale)

    def scores(dtype: torch.dtype) -> float:
        model.dtype = dtype
        return float(np.mean([psnr(model.upscale(lr), hr, model.scale, 'Y') for lr, hr in images]))

    single = scores(torch.float32)
    losses = {type_name(dtype): single - scores(dtype) for dtype in model.network.autocast_dtypes}
    # What is not declared safe is measured too, for the facts to be completed.
    others = [dtype for dtype in (torch.bfloat16, torch.float16) if dtype not in model.network.autocast_dtypes]
    also = {f'undeclared_{type_name(dtype)}': single - scores(dtype) for dtype in others if not REHEARSE}
    note('half', weights=card, float32=round(single, 4), **losses, **also)
    assert losses
    for loss in losses.values():
        assert abs(loss) < (2 if REHEARSE else 1) * LOSS.get(card, 0.01)  # there of one image


@pytest.mark.parametrize('name', chosen(ALL))
@torch.no_grad()
def test_untrained_networks_stay_close(name: str) -> None:
    recorded = Recorded(name, 2)
    net = recorded.network().to(DEVICE).eval()
    x, truth = next(recorded.cases())
    for dtype in NETWORKS[name].autocast_dtypes:
        with torch.autocast(DEVICE, dtype):
            y = net(x.to(DEVICE))
        note('untrained', network=name, type=type_name(dtype), distance=(error := distance(y, truth)))
        assert y.isfinite().all()
        assert 1e-6 < error < LIMITS.get(name, LIMIT)  # it did compute in less than float32


@pytest.mark.parametrize('card', [pytest.param(card, marks=background(programs.on_the_card, card)) for card in CARDS])
def test_scores_are_those_on_the_card(card: str, result: dict[str, Any]) -> None:
    """By main.py and the recipe's protocol, against what was measured on a CPU."""
    import re

    line = re.search(r'^\| Set5 \| ([\d.]+) \| (\.\d+) \|', (ROOT / 'models' / f'{card}.md').read_text(), re.MULTILINE)
    found = result['sets']['Set5']
    note('card', weights=card, psnr=round(found['psnr'], 4), ssim=round(found['ssim'], 5), seconds=found['seconds'])
    assert found['psnr'] == pytest.approx(float(line[1]), abs=0.006)
    assert found['ssim'] == pytest.approx(float(line[2]), abs=0.0001)
