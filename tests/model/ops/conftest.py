from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(params=[8, 16])
def lanes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Numbers in a vector, in `KERNELS` of the module: where registers hold others, one takes several, or a part."""
    for module in request.module.KERNELS:
        monkeypatch.setattr(module, 'lanes', lambda: request.param)
    return request.param
