import pytest
import torch
from torch import Tensor

from error import UserError
from model import build
from model.blocks.windows import Insisting, attention, relative_positions, window_attention, window_partition
from tests.conftest import numbers


@pytest.mark.parametrize('n_tokens', [1, 6])
# Which mask each of the five windows has; [] for none.
@pytest.mark.parametrize('masks_of', [[], [0, 0, 0, 0, 0], [0, 1, 1, 1, 1], [0, 0, 1, 2, 2]])
@pytest.mark.parametrize('scale', [None, 0.7])
def test_attention_is_a_mean_weighted_by_a_softmax(n_tokens: int, masks_of: list[int], scale: float | None) -> None:
    q, k, v = numbers(3, 5, n_tokens, 2, 5)
    masks = numbers(2, max(masks_of) + 1, n_tokens, n_tokens) if masks_of else None
    logits = torch.einsum('bqhd,bkhd->bhqk', q, k) * (5**-0.5 if scale is None else scale)
    weights = (logits if masks is None else logits + masks[:, masks_of].transpose(0, 1)).exp()
    expected = torch.einsum('bhqk,bkhd->bqhd', weights / weights.sum(-1, keepdim=True), v).flatten(2)
    counts = torch.tensor(masks_of).unique(return_counts=True)[1].tolist() if any(masks_of) else None
    torch.testing.assert_close(attention(q, k, v, masks, counts, scale), expected, rtol=0, atol=1e-12)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, masks, counts, scale)

    example = (q, k, v) if counts else (q[:1], k[:1], v[:1])  # with which any number of windows of one kind has to do
    traced = torch.jit.trace(attend, example)
    torch.testing.assert_close(traced(q, k, v), expected, rtol=0, atol=1e-12)
    masks = masks if masks is None else masks.bfloat16()
    half = attend(q.bfloat16(), k.bfloat16(), v.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), expected, rtol=0.1, atol=0.1)


class Looking(torch.autograd.Function):
    """Its input; notes on the way back whether PyTorch insists on algorithms that repeat themselves."""

    seen: list[bool]

    @staticmethod
    def forward(ctx, *tensors: Tensor) -> Tensor:
        return tensors[0].clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:
        Looking.seen.append(not torch.is_deterministic_algorithms_warn_only_enabled())
        return grad, grad, grad


@pytest.fixture
def warning_only():
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def test_gradients_of_what_is_marked_alone_have_to_repeat_themselves(warning_only: None) -> None:
    x = torch.ones(2, 3, requires_grad=True)
    Looking.seen = []
    first = Looking.apply(x, x, x)
    inside = Looking.apply(*Insisting.apply(False, 2 * first, 3 * first, 4 * first))
    (out,) = Insisting.apply(True, inside)
    Looking.apply(out, x, x).sum().backward()
    assert Looking.seen == [False, True, False]  # after, within and before the marks
    assert torch.equal(x.grad, torch.full((2, 3), 9.0 * 3 + 2))
    assert torch.is_deterministic_algorithms_warn_only_enabled()


def test_weights_with_other_positions_are_refused() -> None:
    net = build('SwinIR-light', 2, n_resgroups=1, n_resblocks=1)
    state = net.state_dict()
    net.load_state_dict(state)
    name = next(key for key in state if key.endswith('relative_position_index'))
    state[name] = state[name].mT.contiguous()
    with pytest.raises(UserError, match=f'{name} of these weights has other positions'):
        net.load_state_dict(state)


@torch.no_grad()
def test_windows_too_large_for_a_map_in_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but PyTorch's kernel takes them, also where those in LLVM have failed."""
    monkeypatch.setattr('model.blocks.windows.CACHED_LOGITS', 200 * 200)
    qkv, table = torch.randn(1, 512, 18), torch.randn(31**2, 2)
    windows = window_partition(torch.empty(1, 1, 16, 32), 16, 0)
    given = table, relative_positions(16), windows
    truth = window_attention(qkv.double(), given[0].double(), *given[1:])
    monkeypatch.setattr('model.blocks.windows.is_for_kernel', None)  # is not asked
    torch.testing.assert_close(window_attention(qkv, *given), truth.float(), rtol=1e-5, atol=1e-5)
