import pytest
import torch

from model.blocks.tokens import TokenLinear
from tests.conftest import numbers


@pytest.mark.parametrize('n', [1, 3])
def test_linear_layer_of_tokens(n: int) -> None:
    layer, x = TokenLinear(5, 7).double(), numbers(n, 6, 5)
    out = layer(x)
    torch.testing.assert_close(out, x @ layer.weight.t() + layer.bias, rtol=0, atol=1e-12)
    assert out.is_contiguous()
