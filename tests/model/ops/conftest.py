import platform
from collections.abc import Iterator
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

x86_alone = pytest.mark.skipif(
    platform.machine() not in ('x86_64', 'AMD64'), reason='only on x86 do subnormals count as 0 in a kernel'
)


class Call(NamedTuple):
    """Of a function of a module of kernels, with its first tensor."""

    module: ModuleType
    function: str
    first: Tensor


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


@pytest.fixture
def calls(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """What is called of the functions in `CALLED` of the module, which are pairs of a module and a name."""
    found: list[Call] = []

    def watch(module: ModuleType, name: str) -> None:
        function = getattr(module, name)

        def watched(first: Tensor, *others: Any) -> Any:
            found.append(Call(module, name, first))
            return function(first, *others)

        monkeypatch.setattr(module, name, watched)

    for module, name in request.module.CALLED:
        watch(module, name)
    return found


def functions(calls: list[Call]) -> list[str]:
    """Their names."""
    return [call.function for call in calls]
