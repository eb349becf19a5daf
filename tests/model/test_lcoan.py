import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

from error import UserError
from model import build, find
from model.lcoan import CollaborativeAttention, KMeans
from tests.recipe import CASES, layout, worst_error

KEYS = [key for key in CASES if key.startswith('LCoAN')]
SMALL = {'n_resgroups': 3, 'n_resblocks': 1, 'n_feats': 8, 'n_clusters': 4, 'window_size': 16}


def small(initted: bool = True, **settings: object) -> nn.Module:
    """A small LCoAN in double precision, so that rounding decides nothing."""
    torch.manual_seed(0)
    net = build('LCoAN', 2, **{**SMALL, **settings}).double()
    kmeans(net).initted.fill_(initted)
    return net


def kmeans(net: nn.Module) -> KMeans:
    return net.body[0].attention[0].kmeans


def images(*shape: int) -> Tensor:
    return torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def snapshot(net: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in net.state_dict().items()}


def unit(x: np.ndarray, eps: float = 1e-12) -> np.ndarray:
    return x / max(np.linalg.norm(x), eps)


# The official network, recorded.


@pytest.mark.parametrize('key', KEYS)
def test_has_the_official_weights(key: str) -> None:
    with torch.device('meta'):
        net = build('LCoAN', CASES[key]['scale'])
    assert layout(net) == CASES[key]['layout']


@pytest.mark.parametrize('key', KEYS)
def test_equals_the_official_network(key: str) -> None:
    assert worst_error(build('LCoAN', CASES[key]['scale']), CASES[key]) < 1e-4


# The contract of every network.


@pytest.mark.parametrize('n_hashes', [1, 2])
@torch.no_grad()
def test_any_size_and_each_image_on_its_own(n_hashes: int) -> None:
    net = small(n_hashes=n_hashes).eval()
    for height, width in [(1, 1), (1, 7), (5, 1), (3, 3), (4, 4), (9, 5)]:
        x = images(3, 3, height, width)
        y = net(x)
        assert y.shape == (3, 3, 2 * height, 2 * width)
        alone = torch.cat([net(image) for image in x.split(1)])
        assert torch.allclose(y, alone, rtol=0, atol=1e-12)


@torch.no_grad()
def test_evaluation_repeats_itself_and_changes_nothing() -> None:
    net = small().eval()
    before, x = snapshot(net), images(2, 3, 6, 7)
    assert torch.equal(net(x), net(x))
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_a_trained_state_carries_over() -> None:
    net, copy = small(initted=False), small(initted=False)
    x = images(2, 3, 6, 7)
    net.train()(x)
    copy.load_state_dict(net.state_dict(), strict=True)
    with torch.no_grad():
        assert torch.equal(net.eval()(x), copy.eval()(x))


def test_can_be_exported() -> None:
    net = small().eval()
    exported = torch.export.export(net, (images(1, 3, 6, 7),), strict=False).module()
    x = images(1, 3, 6, 7).flip(-1)
    assert torch.allclose(exported(x), net(x), rtol=0, atol=1e-12)


# The attention, against plain loops over pixels.


def plain_round(e: np.ndarray, means: np.ndarray, size: int) -> tuple[list[tuple[list[int], np.ndarray]], np.ndarray]:
    """One clustering of an image: each pixel's key pixels with their weights, and each pixel's score."""
    length = len(e)
    codes = [int(np.argmax([unit(pixel) @ mean for mean in means])) for pixel in e]
    order = sorted(range(length), key=lambda i: codes[i])
    missing = -length % size
    order += (order * size)[-missing:] if missing else []
    windows = [order[i : i + size] for i in range(0, len(order), size)]
    found: dict[int, tuple[list[int], np.ndarray]] = {}
    score = np.zeros(length)
    for i, window in enumerate(windows):
        keys = window + windows[i - 1] + windows[(i + 1) % len(windows)]
        for query in window:
            if query in found:  # an appended copy
                continue
            logits = np.array([e[query] @ unit(e[key], 5e-5) for key in keys])
            score[query] = np.log(np.exp(logits).sum())
            found[query] = keys, np.exp(logits - score[query])
    return [found[i] for i in range(length)], score


def plain_attention(
    x: Tensor, attention: CollaborativeAttention, pattern: list | None, res_scale: float
) -> tuple[np.ndarray, list]:
    """What the attention adds to one image (C, H, W), all in loops; the pattern is found if there is none yet."""

    def tokens(layer: nn.Conv2d) -> np.ndarray:
        y = F.conv2d(x[None], layer.weight, layer.bias, padding=layer.weight.shape[-1] // 2)[0]
        return np.array([y[:, i, j].tolist() for i in range(y.shape[1]) for j in range(y.shape[2])])

    if pattern is None:
        e = tokens(attention.conv_match[0])
        pattern = [plain_round(e, means, attention.window_size) for means in attention.kmeans.means.numpy()]
    values = tokens(attention.conv_assembly[0])
    out = np.zeros_like(values)
    for i in range(len(values)):
        scores = np.exp([score[i] for _, score in pattern])
        for (found, _), share in zip(pattern, scores / scores.sum(), strict=True):
            keys, weights = found[i]
            out[i] += share * (weights @ values[keys])
    return x.numpy() + res_scale * out.T.reshape(x.shape), pattern


@pytest.mark.parametrize('rounds', [1, 2])
# Five windows of which the last is filled up, two full ones, a single one, and fewer pixels than half a window.
@pytest.mark.parametrize('size', [(5, 7), (4, 4), (2, 4), (1, 3), (1, 1)])
@torch.no_grad()
def test_attention_equals_plain_loops(size: tuple[int, int], rounds: int) -> None:
    torch.manual_seed(0)
    first, second = (CollaborativeAttention(6, 2, rounds, 4, 8, 0.999, 0.3).double().eval() for _ in range(2))
    first.kmeans.initted.fill_(True)
    # Long queries, so that the softmax is far from uniform and rounds differ in score.
    first.conv_match[0].weight *= 8
    x = torch.randn(2, 6, *size, dtype=torch.float64)
    y, pattern = first(x, None)
    z, _ = second(y, pattern)
    for image in range(2):
        plain_y, plain_pattern = plain_attention(x[image], first, None, 0.3)
        plain_z, _ = plain_attention(torch.from_numpy(plain_y), second, plain_pattern, 0.3)
        assert np.abs(y[image].numpy() - plain_y).max() < 1e-12
        assert np.abs(z[image].numpy() - plain_z).max() < 1e-12


def test_only_the_first_group_runs_its_match_convolution() -> None:
    net = small().eval()
    calls = [0, 0, 0]

    def count(group: int) -> None:
        calls[group] += 1

    for i, group in enumerate(net.body):
        group.attention[0].conv_match.register_forward_hook(lambda *_, i=i: count(i))
    net(images(2, 3, 6, 7))
    assert calls == [1, 0, 0]


def test_gradients_reach_what_the_paper_trains() -> None:
    net = small().train()
    net(images(2, 3, 6, 7)).abs().mean().backward()
    idle = {key for key, p in net.named_parameters() if p.grad is None}
    expected = {'a', *(f'{mean}_mean.{kind}' for mean in ('sub', 'add') for kind in ('weight', 'bias'))}
    expected |= {f'body.{i}.attention.0.conv_match.0.{kind}' for i in (1, 2) for kind in ('weight', 'bias')}
    assert idle == expected
    assert all(p.grad.abs().max() > 0 for key, p in net.named_parameters() if key not in expected)


def test_all_groups_train_the_shared_map() -> None:
    net = small().train()
    for parameter in net.body[0].m_conv.parameters():  # what the first group attends to goes nowhere
        nn.init.zeros_(parameter)
    net(images(2, 3, 6, 7)).abs().mean().backward()
    assert net.body[0].attention[0].conv_match[0].weight.grad.abs().max() > 0


# The centroids.


def plain_centroids(x: np.ndarray, means: np.ndarray) -> np.ndarray:
    """Normalised sums of the pixels (L, dim) nearest to each centroid (clusters, dim), which an empty cluster keeps."""
    codes = (x @ means.T).argmax(1)
    return np.array([unit(x[codes == k].sum(0)) if (codes == k).any() else means[k] for k in range(len(means))])


def test_training_moves_the_centroids_by_a_running_average() -> None:
    torch.manual_seed(0)
    model = KMeans(2, 4, 3, decay=0.9).double().train()
    model.initted.fill_(True)
    x = torch.rand(2, 10, 3, dtype=torch.float64) + 0.1
    model.means[:, 3] = -1  # opposite to every pixel: nobody's cluster
    old = model.means.numpy().copy()
    codes = model(x)
    pixels = np.array([unit(pixel) for pixel in x.flatten(0, 1).numpy()])
    for r in range(2):
        assert np.array_equal(codes[:, r].flatten().numpy(), (pixels @ old[r].T).argmax(1))
        expected = 0.9 * old[r] + 0.1 * plain_centroids(pixels, old[r])
        assert np.abs(model.means[r].numpy() - expected).max() < 1e-12
    assert np.array_equal(model.means[:, 3].numpy(), old[:, 3])
    assert np.abs(model.means.numpy() - old).max() > 1e-3


@pytest.mark.parametrize('value', [math.inf, math.nan])
def test_an_embedding_that_is_not_finite_moves_no_centroid(value: float) -> None:
    torch.manual_seed(0)
    model = KMeans(2, 4, 3, decay=0.9).train()
    model.initted.fill_(True)
    model.means.copy_(F.normalize(model.means, dim=-1))
    x, before = torch.rand(2, 10, 3), model.means.clone()
    x[1, 4, 0] = value
    model(x)
    torch.testing.assert_close(model.means, before, rtol=0, atol=1e-6)
    model(torch.rand(2, 10, 3))
    assert model.means.isfinite().all()
    assert (model.means - before).abs().max() > 1e-3


def test_the_centroids_move_in_every_batch_of_training() -> None:
    net = small()
    before = kmeans(net).means.clone()
    net.train()(images(2, 3, 6, 7))
    assert not torch.equal(kmeans(net).means, before)


@pytest.mark.parametrize('seed', range(5))
def test_first_batch_finds_separated_clusters(seed: int) -> None:
    torch.manual_seed(seed)
    # Two groups of pixels around two directions; their lengths differ, since the sums are over raw pixels.
    directions = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0]], dtype=torch.float64).repeat(20, 1)
    x = (directions + 0.1 * torch.randn(40, 4, dtype=torch.float64)) * (1 + 2 * torch.rand(40, 1, dtype=torch.float64))
    model = KMeans(2, 2, 4, decay=1.0).double().train()  # with decay 1 the running average moves nothing
    codes = model(x.view(4, 10, 4))
    assert model.initted
    expected = np.array([unit(x[i::2].numpy().sum(0)) for i in (0, 1)])
    for r in range(2):
        means = model.means[r].numpy()
        assert np.abs(means[means[:, 0].argsort()[::-1]] - expected).max() < 1e-12
        members = codes[:, r].flatten().tolist()
        assert members == members[:2] * 20
        assert members[0] != members[1]


def test_first_batch_runs_ten_steps_from_pixels_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    picks = torch.randperm(900)
    monkeypatch.setattr(torch, 'randperm', lambda n: picks)
    x = torch.randn(3, 300, 3, dtype=torch.float64)
    model = KMeans(1, 12, 3, decay=1.0).double().train()
    model(x)
    pixels = x.flatten(0, 1).numpy()
    steps = [pixels[picks[:12].numpy()]]
    for _ in range(11):
        steps.append(plain_centroids(pixels, steps[-1]))
    assert np.abs(model.means[0].numpy() - steps[10]).max() < 1e-12
    assert all(np.abs(steps[10] - steps[i]).max() > 1e-3 for i in (9, 11))  # not settled: the number of steps counts


def test_first_batch_may_have_fewer_pixels_than_clusters() -> None:
    torch.manual_seed(0)
    model = KMeans(2, 8, 3, decay=0.9).double().train()
    codes = model(torch.randn(1, 3, 3, dtype=torch.float64))
    assert model.initted
    assert model.means.isfinite().all()
    assert codes.shape == (1, 2, 3)
    assert 0 <= codes.min() <= codes.max() < 8


def test_clusters_are_those_of_float32_under_autocast() -> None:
    torch.manual_seed(0)
    model = KMeans(1, 64, 3, decay=0.9).eval()
    model.initted.fill_(True)
    x = torch.randn(1, 2000, 3)
    with torch.autocast('cpu', torch.bfloat16):
        codes = model(x)
        narrow = torch.einsum('nld,rkd->nrlk', F.normalize(x, dim=-1), model.means).argmax(-1)
    assert torch.equal(codes, model(x))
    assert not torch.equal(codes, narrow)  # what the cast is for


def test_only_training_initialises() -> None:
    net = small(initted=False)
    before = snapshot(net)
    with pytest.raises(UserError, match='never initialised'):
        net.eval()(images(1, 3, 6, 7))
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    net.train()(images(1, 3, 6, 7))
    assert [bool(group.attention[0].kmeans.initted) for group in net.body] == [True, False, False]
    assert torch.allclose(kmeans(net).means.norm(dim=-1), torch.ones(1, 4, dtype=torch.float64), atol=1e-3)


# Settings and weights.


def test_images_of_other_channels_are_refused() -> None:
    for n_colors, other in ((3, 1), (1, 3)):
        with pytest.raises(UserError, match=f'images of {n_colors} channels'):
            small(n_colors=n_colors).eval()(images(1, other, 4, 4))


@torch.no_grad()
def test_shapes_pass_through_without_values() -> None:
    net = small().float().eval().to('meta')
    assert net(torch.empty(2, 3, 5, 7, device='meta')).shape == (2, 3, 10, 14)


@pytest.mark.parametrize('scale', [2, 3, 4, 8])
@pytest.mark.parametrize(
    'settings',
    [
        {},
        {'n_resgroups': 1, 'n_resblocks': 2, 'n_feats': 6, 'reduction': 3, 'n_hashes': 2, 'rgb_range': 255},
        {'act': 'prelu', 'n_colors': 1, 'n_clusters': 5},
        {'shift_mean': False},
    ],
)
def test_weights_show_their_settings(scale: int, settings: dict[str, object]) -> None:
    settings = {**{key: value for key, value in SMALL.items() if key != 'window_size'}, **settings}
    found = find('LCoAN').recognise(build('LCoAN', scale, **settings).state_dict())
    default = {'shift_mean': True, 'n_colors': 3, 'rgb_range': 1, 'reduction': 1, 'n_hashes': 1}
    shown = {**default, **settings, 'scale': scale}
    if not shown['shift_mean']:
        del shown['rgb_range']
    assert found == shown


def test_other_weights_are_not_recognised() -> None:
    recognise = find('LCoAN').recognise
    blocks = {'n_resblocks': 1, 'n_feats': 8}
    others = [
        build('EDSR', 2, **blocks),
        build('RCAN', 2, n_resgroups=1, reduction=2, **blocks),
        build('NLSN', 2, **blocks),
    ]
    assert all(recognise(net.state_dict()) is None for net in others)
    assert recognise({}) is None
    state = small().state_dict()
    for key in state:  # parts of its own: whatever comes, no exception
        recognise({key: state[key]})
        recognise({other: value for other, value in state.items() if other != key})


# Several processes.


def batches() -> Iterator[Tensor]:
    yield images(3, 3, 6, 7)
    yield images(3, 3, 6, 7).flip(-1)


def train_rank(rank: int, folder: Path) -> None:
    """One of two processes; the first has one image of every batch, the second two."""
    torch.set_num_threads(1)
    distributed.init_process_group('gloo', f'file://{folder}/meet', rank=rank, world_size=2)
    part = slice(0, 1) if rank == 0 else slice(1, 3)
    torch.manual_seed(rank)
    fresh = KMeans(1, 18, 3, decay=1.0).double().train()
    fresh(images(3, 6, 3)[part] - 0.5)
    net = small().train()
    for x in batches():
        net(x[part])
    torch.save((fresh.means[0], kmeans(net).means[0]), folder / f'{rank}.pt')
    distributed.destroy_process_group()


def test_processes_agree_on_the_centroids(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(train_rank, (tmp_path,), nprocs=2)
    (fresh, moved), (other_fresh, other_moved) = (torch.load(tmp_path / f'{rank}.pt') for rank in (0, 1))
    assert torch.equal(fresh, other_fresh)
    assert torch.equal(moved, other_moved)

    # With as many clusters as pixels in all processes, all of them are picked, in some order.
    pixels = (images(3, 6, 3) - 0.5).flatten(0, 1).numpy()
    means = pixels
    for _ in range(10):
        means = plain_centroids(pixels, means)
    distance = np.abs(fresh.numpy()[:, None] - means).max(-1)
    assert distance.min(0).max() < 1e-12
    assert distance.min(1).max() < 1e-12

    whole = small().train()
    for x in batches():
        whole(x)
    assert torch.allclose(moved, kmeans(whole).means[0], rtol=0, atol=1e-12)
    assert (moved - kmeans(small()).means[0]).abs().max() > 1e-4
