"""Maps of clusters and categories, beside what is worked out from the weights."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import evaluation
import main
from data.image import read_rgb, write_png
from data.imresize import shrink
from error import UserError
from model import Model
from report import attention
from report.attention import draw, maps, palette, source
from tests.conftest import picture
from tests.model.test_networks import SMALL
from tests.test_main import BICUBIC
from tests.test_trainer import LCOAN, TINY, arguments, train

SIZES = pytest.mark.parametrize('size', [(13, 18), (16, 8), (1, 3)])


def small(name: str, **settings: object) -> Model:
    """A small network with random weights; the centroids of LCoAN count as learned."""
    torch.manual_seed(0)
    model = Model(name, 2, **{**SMALL[name], **settings})
    for key, value in model.net.named_buffers():
        if key.endswith('initted'):
            value.fill_(True)
    return model


def tensor(image: np.ndarray) -> torch.Tensor:
    """In [0, 1]."""
    return torch.from_numpy(image.transpose(2, 0, 1)[None] / 255).float()


def nearest(pixels: torch.Tensor, references: torch.Tensor) -> np.ndarray:
    """Of each pixel (1, C, H, W) the index of that of (K, C) with which it has the largest product."""
    rows = pixels[0].permute(1, 2, 0)
    return np.array([[int((references @ pixel).argmax()) for pixel in row] for row in rows])


@SIZES
@torch.no_grad()
def test_clusters_are_the_nearest_centroids(size):
    model = small('LCoAN', n_hashes=2)
    image, net = picture(0, *size), model.net
    group = net.body[0]
    features = group.attention[0].conv_match(group.local_body(net.head(net.sub_mean(tensor(image)))))
    found = maps(model, image)
    assert list(found) == ['clusters']
    assert found['clusters'].shape == size
    assert (found['clusters'] == nearest(features, group.attention[0].kmeans.means[0])).all()
    assert size == (1, 3) or len(np.unique(found['clusters'])) > 1


@SIZES
@torch.no_grad()
def test_categories_are_the_most_similar_tokens(size):
    """Of the first layer, on the image with its padding, which is cut off again."""
    model = small('ATD', n_resgroups=1, n_resblocks=1)
    image, net = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8), model.net
    net.conv_first.weight *= 20  # so that not all pixels look alike
    layer = net.layers[0].residual_group.layers[0]
    padded = np.pad(image, [(0, -side % 4) for side in size] + [(0, 0)], 'symmetric')
    pixels = net.conv_first(tensor(padded) - net.mean).permute(0, 2, 3, 1)
    query, key = (lambda x, to=to: F.linear(x, to.weight, to.bias) for to in (layer.attn_atd.wq, layer.attn_atd.wk))
    queries = F.normalize(query(layer.norm1(net.patch_embed.norm(pixels))), dim=-1).permute(0, 3, 1, 2)
    keys = F.normalize(key(net.layers[0].residual_group.td), dim=-1)  # one factor for all as it starts
    found = maps(model, image)
    assert list(found) == ['block 1']
    assert (found['block 1'] == nearest(queries, keys)[: size[0], : size[1]]).all()
    assert size == (1, 3) or len(np.unique(found['block 1'])) > 1


@SIZES
@torch.no_grad()
def test_groups_are_those_of_the_most_similar_centres(size):
    """Of the first block: the centres are unit vectors as they start, and all are as long here."""
    model = small('CATANet', n_resblocks=1, n_centres='5')
    image, net = picture(0, *size), model.net
    tab = net.blocks[0][0]
    tab.means.div_(tab.means.norm(dim=-1, keepdim=True))
    pixels = F.layer_norm(net.first_conv(tensor(image)).permute(0, 2, 3, 1), (8,)).permute(0, 3, 1, 2)
    found = maps(model, image)
    assert list(found) == ['block 1']
    assert (found['block 1'] == nearest(pixels, tab.means)).all()
    assert size == (1, 3) or len(np.unique(found['block 1'])) > 1


@pytest.mark.parametrize('blocks, shown', [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (6, [1, 3, 6])])
def test_three_blocks_are_shown(blocks, shown):
    names = [f'block {i}' for i in shown]
    assert list(maps(small('ATD-light', n_resgroups=blocks), picture(0, 5, 9))) == names
    assert list(maps(small('CATANet', n_resblocks=blocks), picture(0, 5, 9))) == names


@pytest.mark.parametrize(
    'name, settings',
    [
        ('LCoAN', {'n_resgroups': 1}),
        ('ATD', {'n_resgroups': 1, 'n_resblocks': 1}),
        ('CATANet', {'n_resblocks': 1}),
    ],
)
def test_equal_pixels_are_taken_together(name, settings):
    """Away from the border, which the convolutions see."""
    (found,) = maps(small(name, **settings), np.full((16, 20, 3), 90, np.uint8)).values()
    assert len(np.unique(found[4:-4, 4:-4])) == 1


def test_nothing_stays_in_the_network():
    model, image = small('LCoAN'), picture(0, 9, 9)
    before = model.upscale(image)
    maps(model, image)
    assert (model.upscale(image) == before).all()
    model.net.body[0].attention[0].kmeans.initted.fill_(False)
    with pytest.raises(UserError):
        maps(model, image)
    assert not any(module._forward_hooks for module in model.net.modules())


def test_colours():
    colours = palette(512)
    assert (palette(7) == colours[:7]).all()
    assert len(np.unique(colours, axis=0)) == 512
    assert np.abs(np.diff(colours.astype(int), axis=0)).max(1).min() > 60  # of neighbours
    assert colours[:2].tolist() == [[255, 0, 0], [128, 165, 255]]


def test_draw():
    image = np.array([[[0, 0, 0], [255, 255, 255]]], np.uint8)
    drawn = draw(image, {'a': np.array([[0, 1]]), 'b': np.array([[1, 1]])}, 3)
    assert drawn.shape == (3, 6 + 8 + 6 + 8 + 6, 3)
    assert drawn.dtype == np.uint8
    over_black = [(16 + np.array(colour)) // 2 for colour in ([255, 0, 0], [128, 165, 255])]
    over_white = (235 + np.array([128, 165, 255])) // 2
    gap = [255] * 3
    columns = [[0] * 3] * 3 + [gap] * 3 + [gap] * 8
    columns += [over_black[0]] * 3 + [over_white] * 3 + [gap] * 8 + [over_black[1]] * 3 + [over_white] * 3
    assert (drawn == np.array(columns)).all()


@pytest.fixture
def lcoan(data_folder, monkeypatch) -> str:
    """Options that test a small LCoAN with random weights, without the comparison sheets that take most of the time."""
    monkeypatch.setattr('report.picture.sheet', lambda rows: b'')
    file = data_folder.parent / 'lcoan.pt'
    torch.save(small('LCoAN').net.state_dict(), file)
    return f'--model auto --pre_train {file} --window_size 16 --test_only --cpu --n_threads 0'


def test_the_first_images_of_each_set(data_folder, lcoan, monkeypatch):
    """Also of photographs; the middle of large ones."""
    monkeypatch.setattr(evaluation, 'SHEET_ROWS', 2)
    monkeypatch.setattr(attention, 'SIDE', 33)
    photos = data_folder.parent / 'photos'
    write_png(photos / 'small.png', picture(4, 20, 11))
    run = train(data_folder, lcoan, f'--data_test SR291+Demo --dir_demo {photos} --show_attention')
    assert sorted(path.name for path in (run / 'results-SR291').iterdir()) == [
        '0001_x2_SR.png', '0001_x2_attention.png', '0002_x2_SR.png', '0002_x2_attention.png', '0003_x2_SR.png',
    ]  # fmt: skip
    lr = shrink(read_rgb(data_folder / 'SR291' / 'HR' / '0001.png'), 2)  # 36x32 pixels
    drawn = read_rgb(run / 'results-SR291' / '0001_x2_attention.png')
    assert drawn.shape == (66, 64 + 8 + 64, 3)
    assert (drawn[:, :64] == lr[1:34].repeat(2, 0).repeat(2, 1)).all()
    assert '0001_x2_attention.png shows the middle of its image, 32x33 pixels of LR' in (run / 'log.txt').read_text()
    assert read_rgb(run / 'results-Demo' / 'small_x2_attention.png').shape == (40, 22 + 8 + 22, 3)
    train(data_folder, f'--score {run} --scale 2 --data_test SR291', name='scored')  # by the enlarged images


def test_maps_are_of_whole_images(data_folder, lcoan):
    drawn = []
    for how in ('', '--chop --chop_size 16 --chop_overlap 4', '--precision half', '--self_ensemble'):
        run = train(data_folder, lcoan, how, '--data_test Set5 --show_attention')
        drawn.append(read_rgb(run / 'results-Set5' / '0002_x2_attention.png'))
    assert all((image == drawn[0]).all() for image in drawn)


@pytest.mark.parametrize('name', ['Bicubic', 'EDSR', 'SwinIR-light', 'NLSN'])
def test_networks_without_clusters(name):
    with pytest.raises(UserError, match=f'{name} has neither .* LCoAN, ATD, ATD-light and CATANet have; leave it out'):
        source(Model(name, 2, **SMALL.get(name, {})))


@pytest.mark.parametrize(
    'command, says',
    [
        (f'{BICUBIC} --scale 2 --data_test Set5', 'Bicubic has neither clusters nor categories'),
        (LCOAN, 'use it with --test_only'),
        (f'{TINY} --score .', '--score measures files'),
    ],
)
def test_refusals(data_folder, capsys, command, says):
    assert main.main(arguments(data_folder, command, '--show_attention --save run')) == 2
    assert says in capsys.readouterr().err
    assert not (data_folder.parent / 'runs').exists()
