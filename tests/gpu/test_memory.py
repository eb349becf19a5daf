"""Memory of the GPU: running out of it, and keeping below a limit."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.image import read_rgb
from model import Model
from model.loading.weights import read_weights
from model.tiles.tiling import Tiler
from tests.conftest import picture
from tests.gpu import programs
from tests.gpu.parts import CUDA, DEVICE, REHEARSE, ROOT, background, free_memory, note

LIMIT = '600M'
BYTES = 600 * 2**20


def limit(size: int | None) -> None:
    """Most bytes that PyTorch may take of the device; None: any."""
    free_memory()
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction(1.0 if size is None else size / total)


def asid(tiler: Tiler | None) -> Model:
    model = Model('ASID', 2, DEVICE, tiler)
    model.net.load_state_dict(read_weights(ROOT / 'models' / 'ASID_x2.pt')[0])
    return model


def edsr(tiler: Tiler | None) -> Model:
    torch.manual_seed(0)
    return Model('EDSR-baseline', 2, DEVICE, tiler, n_resblocks=2)


@pytest.mark.only_gpu
@pytest.mark.parametrize('part', [0.6, 0.3, 0.2])
@pytest.mark.parametrize('make', [edsr, asid])
def test_out_of_memory_halves_the_tiles_and_keeps_the_image(
    make: Any, part: float, caplog: pytest.LogCaptureFixture
) -> None:
    """With a part of what the tiles asked for take; EDSR's tiles are exact, ASID's are those of the size found."""
    image = picture(5, 500, 600)
    free_memory()
    model = make(Tiler(256, 32, 4))
    before = torch.cuda.memory_allocated()
    whole = model.upscale(image)
    taken = torch.cuda.max_memory_allocated() - before
    try:
        limit(before + int(part * taken))
        with caplog.at_level('WARNING', 'frugalsr'):
            found = model.upscale(image)
        peak = torch.cuda.max_memory_reserved()
    finally:
        limit(None)
    tiler = model.tiler
    assert 'Out of memory' in caplog.text
    assert (tiler.size, tiler.batch) != (256, 4)
    assert peak <= before + int(part * taken) + 4096  # of which a fraction is made
    model.tiler = Tiler(tiler.size, 32, tiler.batch)
    truth = whole if make is edsr else model.upscale(image)
    off = np.abs(found.astype(int) - truth.astype(int))
    note(
        'out of memory', network=model.name, part=part, size=tiler.size, batch=tiler.batch, taken=taken,
        differing=float((off > 0).mean()),
    )  # fmt: skip
    assert (off > 1).mean() <= (0 if make is edsr else 0.01)  # which may have finished rows in tiles of the size before
    assert (off > 0).mean() < (3e-3 if make is edsr else 0.03)


@pytest.mark.only_gpu
def test_what_does_not_fit_at_all_is_told() -> None:
    free_memory()
    model = edsr(Tiler(257, 240, 1))
    try:
        limit(torch.cuda.memory_allocated() + 2**21)
        with pytest.raises(torch.OutOfMemoryError):
            model.upscale(picture(5, 300, 300))
    finally:
        limit(None)
    assert model.upscale(picture(5, 300, 300)).shape == (600, 600, 3)


@background(programs.limited, LIMIT if CUDA else '1500M')
def test_a_limit_is_held(result: dict[str, Any]) -> None:
    note('limited', limit=LIMIT if CUDA else '1500M', **result)
    assert result['code'] == 0
    assert 0 < result['reserved'] <= (BYTES if CUDA else 1500 * 2**20)


@background(programs.limited, '')
def test_without_a_limit_it_takes_more(result: dict[str, Any]) -> None:
    """Else the test above would show nothing."""
    note('unlimited', **result)
    assert result['code'] == 0
    if not REHEARSE:
        assert result['allocated'] > 1.5 * BYTES
    height, width = (240, 300) if REHEARSE else (900, 1300)
    lr, sr = picture(3, height, width), read_rgb(Path(result['image']))
    assert sr.shape == (4 * height, 4 * width, 3)
    # It is the picture, enlarged.
    assert np.abs(sr.reshape(height, 4, width, 4, 3).mean((1, 3)) - lr).mean() < 10
