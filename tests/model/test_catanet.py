"""What is special to CATANet, beside plain loops over tokens and pixels."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from error import UserError
from model import build
from model.catanet import PatchAttention, TokenAggregation, cover, shortest
from tests.conftest import numbers
from tests.recipe import fill, uniform


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """In double precision and with weights of order one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.double().parameters():
            p.copy_(torch.randn(p.shape, dtype=torch.float64, generator=generator) / max(p[0].numel(), 1) ** 0.5)
    return module


def tab(
    n_centres: int = 3, group_size: int = 4, n_iters: int = 3, initted: bool = True, decay: float = 0.9
) -> nn.Module:
    """A small block in evaluation; its centres are no unit vectors."""
    torch.manual_seed(0)
    module = randomised(TokenAggregation(6, 4, 2, 8, n_centres, group_size, n_iters, decay)).eval()
    module.initted.fill_(initted)
    return module


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


# Groups and centres.


def plain_groups(codes: list[int], size: int) -> list[tuple[list[int], list[int]]]:
    """Queries and keys of each group: tokens by centre, and after the last one the same backwards, forwards, ..."""
    order = sorted(range(len(codes)), key=lambda i: codes[i])
    size = min(size, len(order))
    groups = math.ceil(len(order) / size)
    endless = (order + order[::-1]) * (2 * size)
    return [(endless[g * size : (g + 1) * size], endless[g * size : (g + 2) * size]) for g in range(groups)]


def plain_tab(x: np.ndarray, module: TokenAggregation) -> np.ndarray:
    """What the two attentions of TAB make of the normed tokens (L, C) of an image."""
    w = {key: value.numpy() for key, value in module.state_dict().items()}
    q, k, v = (x @ w[f'iasa_attn.to_{of}.weight'].T for of in 'qkv')
    centre_k, centre_v = (w['means'] @ w[f'irca_attn.to_{of}.weight'].T for of in 'kv')
    codes = [int((unit(w['means']) @ unit(token)).argmax()) for token in x]
    out = np.full_like(x, np.nan)
    for queries, keys in plain_groups(codes, module.iasa_attn.group_size):
        for i in queries:
            if not np.isnan(out[i]).any():  # a copy that fills up
                continue
            for head in range(2):
                few, many = slice(2 * head, 2 * head + 2), slice(3 * head, 3 * head + 3)  # of 4 and 6 channels
                near = softmax(np.array([q[i, few] @ k[j, few] for j in keys]) / 2**0.5)
                far = softmax(centre_k[:, few] @ q[i, few] / 2**0.5)
                out[i, many] = near @ v[keys][:, many] + far @ centre_v[:, many]
    return out @ w['iasa_attn.proj.weight'].T @ w['conv1x1.weight'][:, :, 0, 0].T


# Groups of four: a tail of three, none, fewer tokens than a group, a tail that needs more than all tokens.
@pytest.mark.parametrize('size', [(3, 5), (4, 4), (1, 3), (1, 5), (1, 1)])
@torch.no_grad()
def test_tokens_attend_to_their_group_and_the_next_and_to_all_centres(size: tuple[int, int]) -> None:
    module, x = tab(), numbers(2, size[0] * size[1], 6)
    out = module(x, *size)
    for image in range(2):
        normed = F.layer_norm(x[image], (6,), module.norm.weight, module.norm.bias)
        between = x[image] + torch.from_numpy(plain_tab(normed.numpy(), module))
        expected = module.mlp(between.unsqueeze(0), *size)[0]
        torch.testing.assert_close(out[image], expected, rtol=0, atol=1e-11)


def test_the_groups_of_five_tokens_by_hand() -> None:
    """Centres 1, 0, 1, 0, 0 put tokens 1, 3, 4 before 0, 2; the last group of four lacks three."""
    groups = plain_groups([1, 0, 1, 0, 0], 4)
    assert groups[0] == ([1, 3, 4, 0], [1, 3, 4, 0, 2, 2, 0, 4])
    assert groups[1] == ([2, 2, 0, 4], [2, 2, 0, 4, 3, 1, 1, 3])


# The centres in training.


def plain_centres(x: np.ndarray, centres: np.ndarray, steps: int) -> np.ndarray:
    """Steps of spherical k-means of tokens (L, C), of which an empty centre only keeps its direction."""
    tokens = unit(x)
    for _ in range(steps):
        centres = unit(centres)
        codes = (tokens @ centres.T).argmax(1)
        own = [tokens[codes == k].sum(0) if (codes == k).any() else centres[k] for k in range(len(centres))]
        centres = unit(np.array(own))
    return centres


def normed(module: nn.Module, x: Tensor) -> np.ndarray:
    """The tokens of all images (L, C) that the block clusters."""
    return F.layer_norm(x, (6,), module.norm.weight, module.norm.bias).detach().flatten(0, 1).numpy()


def test_training_clusters_the_whole_batch_and_moves_the_centres() -> None:
    module, x = tab(n_centres=4).train(), numbers(2, 12, 6)
    module.means[3] = -100 * torch.from_numpy(normed(module, x).sum(0))  # nobody's
    old = module.means.numpy().copy()
    out = module(x, 3, 4)
    centres = plain_centres(normed(module, x), old, 3)
    assert np.abs(module.means.numpy() - (0.9 * old + 0.1 * centres)).max() < 1e-12
    assert np.abs(plain_centres(normed(module, x), old, 2) - centres).max() > 1e-3  # the number of steps counts
    # What the tokens attend to are the new centres, not the average.
    module.means.copy_(torch.from_numpy(centres))
    torch.testing.assert_close(out, module.eval()(x, 3, 4), rtol=0, atol=1e-12)


def test_the_last_step_has_a_gradient() -> None:
    """By finite differences, along one direction; no token changes its centre."""
    x, direction = numbers(2, 12, 6), numbers(2, 12, 6, seed=2)

    def loss(step: float) -> Tensor:
        return (tab(n_iters=1).train()(x + step * direction, 3, 4) * direction).sum()

    given = x.clone().requires_grad_()
    (tab(n_iters=1).train()(given, 3, 4) * direction).sum().backward()
    with torch.no_grad():
        slope = (loss(1e-5) - loss(-1e-5)) / 2e-5
    assert (given.grad * direction).sum().item() == pytest.approx(slope.item(), rel=1e-7)


@pytest.mark.parametrize(
    'length, runs', [(12, [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]), (6, [0, 0, 1, 2, 2, 3]), (3, [0, 1, 2])]
)
def test_the_first_batch_starts_from_runs_of_tokens(length: int, runs: list[int]) -> None:
    """Of three tokens the fourth centre starts where it was drawn."""
    module, x = tab(n_centres=4, initted=False).train(), numbers(2, length, 6)
    tokens, start = normed(module, x).reshape(2, length, 6), module.means.numpy().copy()
    for run in set(runs):
        start[run] = tokens[:, np.array(runs) == run].mean((0, 1))
    module(x, 1, length)
    assert module.initted
    assert np.abs(module.means.numpy() - plain_centres(tokens.reshape(-1, 6), start, 3)).max() < 1e-12


def test_a_network_that_was_never_trained_is_not_evaluated() -> None:
    net = build('CATANet', 2, n_resblocks=1)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(
        UserError, match='centroids of CATANet were never initialised: train it, or load trained weights'
    ):
        net.eval()(torch.rand(1, 3, 9, 9))
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_centres_are_those_of_float32_under_autocast() -> None:
    torch.manual_seed(0)
    module, x, seen = TokenAggregation(40, 36, 4, 96, 128, 32, 5, 0.999).eval(), torch.randn(1, 2000, 40), []
    module.initted.fill_(True)
    module.iasa_attn.register_forward_pre_hook(lambda _, given: seen.append(given[1]))
    module(x, 40, 50)
    with torch.autocast('cpu', torch.bfloat16):
        module(x, 40, 50)
        narrow = (F.layer_norm(x, (40,)) @ F.normalize(module.means, dim=-1).t()).argmax(-1)
    assert torch.equal(*seen)
    assert not torch.equal(seen[0], narrow)  # what the cast is for


# Patches that overlap.


def plain_cover(side: int, size: int) -> list[range]:
    """The pixels of each patch along an axis."""
    size, starts = min(size, side), [0]
    while starts[-1] + size < side:
        starts.append(min(starts[-1] + size - 2, side - size))
    return [range(start, start + size) for start in starts]


def plain_weights(patches: list[range], side: int) -> list[float]:
    """What each of the patches of a pixel counts: a third counts as if there were four of them."""
    return [{1: 1, 2: 1 / 2, 3: 1 / 4}[sum(i in patch for patch in patches)] for i in range(side)]


def plain_patches(x: np.ndarray, module: PatchAttention, height: int, width: int) -> np.ndarray:
    """LRSA's attention with its input, of tokens (L, C): all within each patch, then averaged."""
    w = {key: value.numpy() for key, value in module.state_dict().items()}
    tokens = F.layer_norm(torch.from_numpy(x), (6,), module.norm.weight, module.norm.bias).numpy()
    rows, columns = plain_cover(height, module.patch_size), plain_cover(width, module.patch_size)
    of_row, of_column = plain_weights(rows, height), plain_weights(columns, width)
    out = np.zeros_like(x)
    for own_rows in rows:
        for own_columns in columns:
            pixels = [i * width + j for i in own_rows for j in own_columns]
            q, k, v = (tokens[pixels] @ w[f'fn.to_{of}.weight'].T for of in 'qkv')
            for place, pixel in enumerate(pixels):
                parts = []
                for head in range(2):
                    few, many = slice(2 * head, 2 * head + 2), slice(3 * head, 3 * head + 3)
                    parts.append(softmax(k[:, few] @ q[place, few] / 2**0.5) @ v[:, many])
                value = np.concatenate(parts) @ w['fn.proj.weight'].T + x[pixel]
                out[pixel] += value * of_row[pixel // width] * of_column[pixel % width]
    return out


# Of patches of 5: fewer pixels than a patch, one patch, two, three of which the last overlaps two others, more.
@pytest.mark.parametrize('size', [(3, 4), (5, 2), (5, 6), (9, 8), (11, 12)])
@torch.no_grad()
def test_patches_overlap_and_are_averaged(size: tuple[int, int]) -> None:
    module, x = randomised(PatchAttention(6, 4, 2, 5)), numbers(2, size[0] * size[1], 6)
    out = module(x, *size)
    for image in range(2):
        expected = plain_patches(x[image].numpy(), module, *size)
        assert np.abs(out[image].numpy() - expected).max() < 1e-11


@pytest.mark.parametrize('patch', [16, 20, 24, 28])
@torch.no_grad()
def test_no_pixel_is_lost_at_any_side_and_the_official_seams_are_at_three_quarters(patch: int) -> None:
    """Where the attention adds nothing all is as before, also at the sides where the official code makes zeros."""
    seams = {16: (31, 45, 59), 20: (39, 57), 24: (47,), 28: (55,)}[patch]
    module = PatchAttention(4, 4, 2, patch)
    nn.init.zeros_(module.fn.proj.weight)
    for side in range(1, 61):
        x = torch.rand(1, 2 * side, 4)
        expected = x.view(2, side, 4).clone()
        if side in seams:
            expected[:, side - patch] *= 0.75
        torch.testing.assert_close(module(x, 2, side), expected.view(1, -1, 4), rtol=1e-6, atol=0)
        torch.testing.assert_close(
            module(x.view(2, side, 4).transpose(0, 1).reshape(1, -1, 4), side, 2),
            expected.transpose(0, 1).reshape(1, -1, 4), rtol=1e-6, atol=0,
        )  # fmt: skip


def test_the_patches_of_thirty_one_pixels() -> None:
    along = cover(31, 16, torch.device('cpu'))
    assert along.pixels[:, 0].tolist() == [0, 14, 15]
    assert along.pixels[:, -1].tolist() == [15, 29, 30]
    assert along.seam.nonzero().flatten().tolist() == [15]
    assert cover(30, 16, torch.device('cpu')).seam is None


# The official network where it was recorded beside what check.py reads.


def official(name: str, shared) -> tuple[nn.Module, dict[str, np.ndarray]]:
    """CATANet x2 with the recipe's weights, and recorded arrays."""
    with np.load(shared / 'reference' / 'extra' / f'{name}.npz') as file:
        arrays = {key: file[key] for key in file.files if key != 'meta'}
    net = build('CATANet', 2)
    fill(net, 'CATANet')
    return net, arrays


@torch.no_grad()
def test_eight_pixels_are_as_in_the_official_network(shared) -> None:
    net, arrays = official('CATANet_small_x2', shared)
    y = net.eval()(torch.from_numpy(arrays['input1'])).numpy()
    assert arrays['input1'].shape == (1, 3, 8, 7)
    assert np.abs(y - arrays['output1']).max() < 1e-4 * np.abs(y).max()


@torch.no_grad()
def test_centres_after_a_pass_of_training_are_as_in_the_official_network(shared) -> None:
    net, arrays = official('CATANet_centres_x2', shared)
    case = json.loads((shared / 'reference' / 'train' / 'CATANet_x2.json').read_text())
    before = [block[0].means.clone() for block in net.blocks]
    net.train()(uniform(case['input_seed'], tuple(case['input_shape'])))
    for i, (tab, _) in enumerate(net.blocks):
        assert (tab.means - before[i]).abs().max() > 1e-4
        assert np.abs(tab.means.numpy() - arrays[f'initialised_means{i}']).max() < 1e-6


# Settings.


@pytest.mark.parametrize(
    'settings, says',
    [
        ({'patch_sizes': '16-3'}, 'patch_sizes=16-3: 3 is not from 4 to 64'),
        ({'patch_sizes': '65'}, 'patch_sizes=65: 65 is not from 4 to 64'),
        ({'group_sizes': '16x4'}, 'group_sizes=16x4: whole numbers from 1 on with a dash between two'),
        ({'n_centres': '0'}, 'n_centres=0: whole numbers from 1 on'),
        ({'n_heads': 3}, '--n_heads 3 does not divide --n_feats 40'),
        ({'n_heads': 5}, '--n_heads 5 does not divide --net qk_dim=36'),
        ({'n_iters': 0}, '--net n_iters=0: choose 1 or more'),
        ({'qk_dim': 0}, '--net qk_dim=0: choose 1 or more'),
        ({'qk_dim': -4}, '--net qk_dim=-4: choose 1 or more'),
    ],
)
def test_settings_that_make_no_network(settings: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        build('CATANet', 2, **settings)


def test_blocks_take_the_numbers_by_turns() -> None:
    net = build('CATANet', 2, n_resblocks=5, patch_sizes='8-12', group_sizes='7', n_centres='3-4-5')
    assert [local.layer[0].patch_size for _, local in net.blocks] == [8, 12, 8, 12, 8]
    assert [tab.iasa_attn.group_size for tab, _ in net.blocks] == [7] * 5
    assert [len(tab.means) for tab, _ in net.blocks] == [3, 4, 5, 3, 4]


@pytest.mark.parametrize(
    'numbers, text',
    [([5], '5'), ([5, 5, 5], '5'), ([1, 2, 1, 2, 1], '1-2'), ([1, 2, 3], '1-2-3'), ([1, 1, 2], '1-1-2')],
)
def test_numbers_that_repeat_are_named_once(numbers: list[int], text: str) -> None:
    assert shortest(numbers) == text
