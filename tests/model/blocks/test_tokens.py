import pytest
import torch
import torch.nn.functional as F

from model.blocks.tokens import ConvFFN, TokenLinear, stable_order
from tests.conftest import numbers


@pytest.mark.parametrize('n', [1, 3])
def test_linear_layer_of_tokens(n: int) -> None:
    layer, x = TokenLinear(5, 7).double(), numbers(n, 6, 5)
    out = layer(x)
    torch.testing.assert_close(out, x @ layer.weight.t() + layer.bias, rtol=0, atol=1e-12)
    assert out.is_contiguous()


def test_order_of_codes() -> None:
    codes = torch.randint(0, 2**15, (2, 3, 50), generator=torch.Generator().manual_seed(0))
    codes[:, :, 10:30] = codes[:, :, 20:40]  # some come again
    order = stable_order(codes)
    assert order.dtype == torch.int64
    for row, found in zip(codes.flatten(0, 1).tolist(), order.flatten(0, 1).tolist(), strict=True):
        assert found == sorted(range(50), key=lambda i, row=row: row[i])


@torch.no_grad()
def test_feed_forward_network_by_plain_layers() -> None:
    network = ConvFFN(6, 9, 5).double()
    x = torch.randn(2, 12, 6, dtype=torch.float64)
    conv = network.dwconv.depthwise_conv[0]
    hidden = F.gelu(F.linear(x, network.fc1.weight, network.fc1.bias))
    image = hidden.reshape(2, 3, 4, 9).permute(0, 3, 1, 2).contiguous()
    image = image + F.gelu(F.conv2d(image, conv.weight, conv.bias, padding=2, groups=9))
    plain = F.linear(image.permute(0, 2, 3, 1).reshape(2, 12, 9), network.fc2.weight, network.fc2.bias)
    assert torch.allclose(network(x, 3, 4), plain, rtol=0, atol=1e-12)
