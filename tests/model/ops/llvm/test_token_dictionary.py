"""Kernels for ATD's dictionary of tokens, against the plain forms in float64."""

import pytest
import torch
from torch import Tensor, nn

from model.ops import token_dictionary
from model.ops.llvm import token_dictionary as token_dictionary_llvm
from model.ops.token_dictionary import Reading, read_tokens, refine_tokens

pytestmark = pytest.mark.usefixtures('no_gradients')
KERNELS = (token_dictionary_llvm,)
CASES = {  # pixels, channels, channels of the linear layer, of the queries, tokens
    'ATD-light': (50, 48, 144, 8, 64),
    'ATD': (25, 210, 630, 20, 128),
    'odd': (29, 13, 7, 3, 16),
    'one pixel': (1, 5, 15, 17, 32),
}


@pytest.fixture(autouse=True)
def only_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call in float32 that takes the plain form is a failure."""

    def form(plain):
        def call(x: Tensor, *others: object) -> object:
            assert x.dtype == torch.float64
            return plain(x, *others)

        call.__name__ = plain.__name__
        return call

    for name in ('read', 'refine'):
        monkeypatch.setattr(token_dictionary, name, form(getattr(token_dictionary, name)))


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def close(found: Tensor, truth: Tensor) -> None:
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), truth, rtol=0, atol=1e-5 * float(truth.abs().max()))


def reading(case: str, dtype: torch.dtype, biased: bool = True) -> Reading:
    torch.manual_seed(0)
    length, channels, outputs, reduced, tokens = CASES[case]
    norm = nn.LayerNorm(channels)
    norm.weight.copy_(normal(channels))
    norm.bias.copy_(normal(channels))
    layers = [(normal(width, channels), normal(width) if biased else None) for width in (outputs, reduced)]
    tensors = normal(2, length, channels), normal(2, tokens, reduced) * 2, normal(2, tokens, channels)
    x, keys, values = (tensor.to(dtype) for tensor in tensors)
    qkv, query = ((weight.to(dtype), bias if bias is None else bias.to(dtype)) for weight, bias in layers)
    return read_tokens(x, norm.to(dtype), qkv, query, keys, values)


@pytest.mark.parametrize('case', CASES)
def test_what_pixels_read(case: str, lanes: int) -> None:
    found, truth = (reading(case, dtype) for dtype in (torch.float32, torch.float64))
    for name in ('qkv', 'x', 'similarity'):
        close(getattr(found, name), getattr(truth, name))
    assert torch.equal(found.category, truth.similarity.argmax(-1))


def test_layers_without_bias() -> None:
    found, truth = (reading('odd', dtype, biased=False) for dtype in (torch.float32, torch.float64))
    close(found.qkv, truth.qkv)
    close(found.x, truth.x)


def test_of_equal_tokens_the_first_one_is_the_category() -> None:
    norm, layer = nn.LayerNorm(4), (torch.eye(4), None)
    keys = torch.zeros(1, 64, 4)
    keys[0, 20:60] = 3 * torch.eye(4)[0]
    found = read_tokens(torch.tensor([[[9.0, 0, 0, 0]]]), norm, layer, layer, keys, torch.zeros(1, 64, 4))
    assert found.category.tolist() == [[20]]


def test_pixels_of_one_colour_have_queries_of_length_0() -> None:
    norm, layer = nn.LayerNorm(4), (torch.eye(4), None)
    found = read_tokens(torch.ones(1, 3, 4), norm, layer, layer, torch.randn(1, 16, 4), torch.ones(1, 16, 4))
    torch.testing.assert_close(found.similarity, torch.full((1, 3, 16), 1 / 16))
    torch.testing.assert_close(found.x, torch.full((1, 3, 4), 2.0))


def refined(length: int, channels: int, tokens: int, dtype: torch.dtype, spread: float = 1.0) -> Tensor:
    torch.manual_seed(0)
    norm = nn.InstanceNorm1d(tokens, affine=True)
    norm.weight.copy_(3 * normal(tokens))  # also below 0
    norm.bias.copy_(normal(tokens))
    similarity = (spread * normal(2, length, tokens)).softmax(-1)
    tensors = normal(2, tokens, channels), similarity, normal(2, length, channels)
    before, similarity, x = (tensor.to(dtype) for tensor in tensors)
    return refine_tokens(before, similarity, x, norm.to(dtype), normal(tokens, 1).sigmoid().to(dtype))


@pytest.mark.parametrize('spread', [0.01, 3.0])  # variances of the order of the epsilon, and far above
@pytest.mark.parametrize('size', [(1, 5, 16), (300, 48, 64), (1501, 13, 32)], ids=str)
def test_tokens_that_are_refined(size: tuple[int, int, int], spread: float, lanes: int) -> None:
    found, truth = (refined(*size, dtype, spread) for dtype in (torch.float32, torch.float64))
    close(found, truth)


def test_results_do_not_depend_on_threads() -> None:
    threads, first = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            first.append([*reading('ATD-light', torch.float32), refined(5000, 48, 64, torch.float32)])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(*pair) for other in first for pair in zip(other, first[0], strict=True))


def test_tokens_that_fill_no_vectors_take_the_plain_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    found, truth = (refined(20, 6, 5, dtype) for dtype in (torch.float32, torch.float64))
    close(found, truth)
