"""The program as a user runs it."""

import errno
import hashlib
import json
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import default_collate

import main
import metric
import model
import networks
import option
import wiring
from data.image import read_rgb, write_png
from data.traindata import turn
from error import UserError
from options.config import read_config
from report import picture as pictures
from tests.conftest import ROOT, picture, slow
from tests.test_checkpoint import Malice, full_disk, strict
from tests.test_option import TEST_X4, TRAIN_X2, TRAIN_X4
from tests.test_trainer import EDSR, LCOAN, TINY, arguments, equal, learned, log, metrics, state, train, weights

BICUBIC = '--model Bicubic --test_only --cpu --n_threads 0'
SMALL = (
    '--cpu --n_threads 0 --epochs 1 --test_every 2 --batch_size 2 --data_range 1-4/5-6 --n_resgroups 2 --n_resblocks 1 '
    '--n_feats 8 --n_clusters 4 --window_size 16'
)


@pytest.fixture
def no_curves(monkeypatch):
    """Drawing them takes five times as long as the training."""
    monkeypatch.setattr(pictures, 'curves', lambda records: {})


def results(run: Path) -> dict:
    return strict((run / 'results.json').read_text())


def without_times(value: object) -> object:
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key != 'seconds'}
    return value


def fingerprint(folder: Path) -> dict[str, str]:
    """Every file and folder below `folder`, with what is in it."""
    paths = {str(path.relative_to(folder)): path for path in folder.rglob('*')}
    return {n: hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else 'folder' for n, p in paths.items()}


# The published commands


def test_published_commands(data_folder):
    """Train at x2, train at x4 from its weights, test on five sets; only paths, length and sizes are changed."""
    for i, name in enumerate(('Set14', 'B100', 'Urban100', 'Manga109')):
        write_png(data_folder / 'benchmark' / name / 'HR' / f'{name}.png', picture(i, 50, 61))
    runs = data_folder.parent / 'runs'
    train_x2, train_x4, benchmark = (' '.join(arguments(data_folder, SMALL)) for _ in range(3))
    assert main.main(f'{TRAIN_X2} {train_x2} --patch_size 32'.split()) == 0
    x2 = weights(runs / 'LCoAN_x2')
    published = runs / 'LCoAN_x2' / 'model' / 'model_1.pt'
    assert main.main(f'{TRAIN_X4} {train_x4} --patch_size 64 --pre_train {published} --lr 1e-25'.split()) == 0

    x4 = weights(runs / 'LCoAN_x4')
    new = sorted(set(x4) - set(x2))
    assert new == ['tail.0.2.bias', 'tail.0.2.weight']
    said = re.search(r'weights from \S*model_1\.pt; interpolated from another scale: (.*); run', log(runs / 'LCoAN_x4'))
    assert sorted(said[1].split(', ')) == new
    assert all(torch.allclose(x4[key], x2[key.replace('2', '0')]) for key in new)
    moving = {key for key in x2 if key.endswith('kmeans.means')}  # follow the images whatever the learning rate
    assert [key for key in set(x2) - moving if not torch.equal(x2[key], x4[key])] == []
    for key in moving:
        torch.testing.assert_close(x4[key], x2[key], rtol=0, atol=0.01)

    published = runs / 'LCoAN_x4' / 'model' / 'model_best.pt'
    assert main.main(f'{TEST_X4} {benchmark} --pre_train {published} --save bench'.split()) == 0
    found = results(runs / 'bench')
    assert (found['model'], found['scale']) == ('LCoAN', 4)
    assert found['protocol']['chop'] == {'size': 192, 'overlap': 20, 'blend': 'ramp', 'fixed': False}
    assert list(found['sets']) == ['Set5', 'Set14', 'B100', 'Urban100', 'Manga109']
    for name, values in found['sets'].items():
        assert {'psnr', 'ssim', 'seconds', 'images'} == set(values)
        names = [path.stem for path in sorted((data_folder / 'benchmark' / name / 'HR').iterdir())]
        assert list(values['images']) == names
        assert sorted(path.name for path in (runs / 'bench' / f'results-{name}').iterdir()) == [
            f'{image}_x4_SR.png' for image in names
        ]
        for key in ('psnr', 'ssim'):
            assert values[key] == pytest.approx(np.mean([image[key] for image in values['images'].values()]))
        assert re.search(
            rf'^{name} +{len(names)} +{values["psnr"]:.2f} +{values["ssim"]:.4f} ', log(runs / 'bench'), re.M
        )
    sr = runs / 'bench' / 'results-B100' / 'B100_x4_SR.png'
    assert read_rgb(sr).shape == (48, 60, 3)


def test_what_a_run_leaves(data_folder):
    run = train(data_folder, LCOAN, '--save_models --save_results')
    assert sorted(str(path.relative_to(run)) for path in run.rglob('*') if path.is_file()) == [
        'comparison-Set5.png', 'config.txt', 'gradient_norm.png', 'lock', 'log.txt', 'loss.png', 'metrics.jsonl',
        'model/model_1.pt', 'model/model_best.pt', 'model/model_latest.pt', 'report.html',
        'results-Set5/0001_x2_SR.png', 'results-Set5/0002_x2_SR.png', 'results.json', 'state.pt',
        *(f'tensorboard/{path.name}' for path in (run / 'tensorboard').glob('events.*')), 'test_Set5.png',
    ]  # fmt: skip
    for path in run.rglob('*.png'):
        with Image.open(path) as image:
            image.load()
    assert read_config(run / 'config.txt')['n_clusters'] == 4


def test_from_the_root_and_from_src(data_folder):
    found = []
    for folder, script in ((ROOT, 'src/main.py'), (ROOT / 'src', 'main.py')):
        command = [sys.executable, script, *arguments(data_folder, BICUBIC, f'--scale 2 --save {folder.name}')]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, '')
        run = data_folder.parent / 'runs' / folder.name
        assert (run / 'log.txt').read_text() == done.stdout
        found.append(without_times(results(run)))
    assert found[0] == found[1]
    assert set(found[0]['sets']['Set5']['images']) == {'0001', '0002'}


# Scores


@pytest.fixture
def benchmarks(shared, tmp_path) -> Path:
    """A data folder with the official HR and LR files of Set5 and Set14."""
    for name in ('Set5', 'Set14'):
        (tmp_path / 'data' / name).mkdir(parents=True)
        for part in ('HR', 'LR_bicubic'):
            (tmp_path / 'data' / name / part).symlink_to(shared / 'benchmark' / name / part)
    return tmp_path / 'data'


@pytest.mark.parametrize(
    'scale, expected',
    [
        *slow((2, {'Set5': (33.67, 0.9303), 'Set14': (30.32, 0.8699)})),
        *slow((3, {'Set5': (30.40, 0.8689), 'Set14': (27.63, 0.7759)})),
        (4, {'Set5': (28.43, 0.8111), 'Set14': (26.09, 0.7048)}),
    ],
)
def test_bicubic_has_the_scores_of_the_literature(benchmarks, scale, expected):
    run = train(benchmarks, f'{BICUBIC} --scale {scale} --data_test Set5+Set14')
    sets = results(run)['sets']
    for name, (psnr, ssim) in expected.items():
        assert sets[name]['psnr'] == pytest.approx(psnr, abs=0.01)
        assert sets[name]['ssim'] == pytest.approx(ssim, abs=5e-4)
        assert len(sets[name]['images']) == {'Set5': 5, 'Set14': 14}[name]


@pytest.mark.parametrize('scale', [2, 3, 4])
def test_scores_of_published_images_are_those_of_matlab(benchmarks, shared, scale):
    folder = shared / 'reference' / 'metrics'
    run = train(benchmarks, f'--score {folder}/x{scale} --scale {scale} --data_test Set5')
    expected = json.loads((folder / 'expected.json').read_text())[f'x{scale}']
    found = results(run)['sets']['Set5']
    for name, scores in (found['images'] | {'mean': found}).items():
        assert scores['psnr'] == pytest.approx(expected[name]['psnr'], rel=0, abs=1e-4)
        assert scores['ssim'] == pytest.approx(expected[name]['ssim'], rel=0, abs=1e-6)
    assert len(found['images']) == 5


def test_a_perfect_image(data_folder):
    """Its PSNR is infinite, which JSON cannot say."""
    write_png(data_folder / 'Even' / 'HR' / 'a.png', picture(0, 40, 44))
    run = train(data_folder, f'--score {data_folder}/Even/HR --scale 2 --data_test Even')
    assert without_times(results(run)['sets']) == {
        'Even': {'psnr': None, 'ssim': 1, 'images': {'a': {'psnr': None, 'ssim': 1}}}
    }
    assert re.search(r'Even +1 +inf +1.0000', log(run))


def test_our_own_images_score_as_when_they_were_made(data_folder):
    made = train(data_folder, f'{BICUBIC} --scale 3 --save_results --data_test Set5+SR291', name='made')
    scored = train(data_folder, f'--score {made} --scale 3 --data_test Set5+SR291', name='scored')
    assert without_times(results(scored)['sets']) == without_times(results(made)['sets'])


def test_an_image_of_the_wrong_size_is_not_scored(data_folder, capsys):
    hr = data_folder / 'benchmark' / 'Set5' / 'HR'  # 0002 has 67x77 pixels, of which x2 takes 66x76
    assert main.main(arguments(data_folder, f'--score {hr} --scale 2 --data_test Set5')) == 2
    message = capsys.readouterr().err
    assert '67x77' in message
    assert '66x76' in message
    assert str(hr / '0002.png') in message


def test_what_changes_a_score_is_recorded(data_folder, no_curves):
    train(data_folder, LCOAN)
    plain = train(data_folder, '--load run --test_only')
    expected = {'Set5': {'channels': 'Y', 'shave': 2, 'lr_made': 2, 'lr_border': 'mirror'}}
    assert results(plain)['protocol'] == {
        'chop': None, 'self_ensemble': False, 'pad_to': 1, 'precision': 'float32', 'tf32': False, 'sets': expected,
    }  # fmt: skip
    scores = {'plain': results(plain)['sets']['Set5']['psnr']}
    tiled = {'size': 16, 'overlap': 2, 'blend': 'ramp', 'fixed': False}
    recorded = {'chop': tiled, 'pad_to': 32, 'precision': 'bfloat16'}
    tiles = '--chop --chop_size 16 --chop_overlap 2 --chop_batch 3'
    changes = {'self_ensemble': '--self_ensemble', 'pad_to': '--pad_to 32', 'precision': '--precision half'}
    for what, flags in {'chop': tiles, **changes}.items():
        changed = results(train(data_folder, '--load run --test_only', flags))
        assert changed['protocol'][what] == recorded.get(what, True)
        scores[what] = changed['sets']['Set5']['psnr']
    assert len(set(scores.values())) == 5
    assert scores['precision'] == pytest.approx(scores['plain'], abs=0.1)


def test_div2k_is_scored_on_rgb(data_folder):
    run = train(data_folder, f'{BICUBIC} --scale 4 --data_test DIV2K --data_range 1-2/5-6 --lr_border clamp')
    found = results(run)
    assert found['protocol']['sets'] == {'DIV2K': {'channels': 'RGB', 'shave': 10, 'lr_made': 2, 'lr_border': 'clamp'}}
    assert list(found['sets']['DIV2K']['images']) == ['0005', '0006']
    hr = read_rgb(data_folder / 'DIV2K' / 'DIV2K_train_HR' / '0005.png')
    lr = read_rgb(data_folder / 'DIV2K' / 'DIV2K_train_LR_bicubic' / 'X4' / '0005x4.png')
    assert lr.shape[:2] == (hr.shape[0] // 4, hr.shape[1] // 4)


def test_tests_on_training_images_are_told(data_folder, capsys):
    said = 'DIV2K 4-6, which is tested, shares images with the range for training'
    for sets, warns in (('DIV2K', True), ('SR291', False)):
        options = f'--data_train {sets} --data_test DIV2K --data_range 1-4/4-6'
        train(data_folder, f'{BICUBIC} --scale 4 {options} --save {sets}')
        assert (said in capsys.readouterr().out) == warns


@pytest.mark.parametrize(
    ('options', 'able', 'wanted'),
    [
        ('', False, True),
        ('--checkpointing', True, True),
        ('--checkpointing', False, False),
        ('--checkpointing --graph', False, True),
        ('--no_graph', True, False),
    ],
)
def test_a_graph_where_pytorch_can(options, able, wanted, monkeypatch):
    """Of steps with checkpointing it cannot before 2.10."""
    monkeypatch.setattr(wiring, 'GRAPHS_CHECKPOINTS', able)
    assert wiring.wants_graph(option.parse(f'--model EDSR {options}'.split())) == wanted


def test_the_protocol_of_a_paper_is_recorded(data_folder):
    tiles = '--chop --chop_size 32 --chop_overlap 24 --chop_blend mean'
    run = train(data_folder, f'{BICUBIC} --scale 3 --shave 4 --data_test Set5 {tiles}')
    protocol = results(run)['protocol']
    assert protocol['chop'] == {'size': 32, 'overlap': 24, 'blend': 'mean', 'fixed': False}
    assert protocol['sets']['Set5']['shave'] == 4


@pytest.mark.parametrize('shave', [0, 1, 9])
def test_shave_leaves_out_a_border(data_folder, shave):
    run = train(data_folder, f'{BICUBIC} --scale 2 --data_test Set5 --shave {shave} --save_results --save_gt')
    for name, scores in results(run)['sets']['Set5']['images'].items():
        sr, hr = (read_rgb(run / 'results-Set5' / f'{name}_x2_{kind}.png') for kind in ('SR', 'HR'))
        inside = slice(shave, -shave or None)
        expected = metric.psnr(sr[inside, inside], hr[inside, inside], 0)
        assert scores['psnr'] == pytest.approx(expected, abs=1e-9)


def test_auto_finds_the_network_in_its_weights(data_folder, no_curves, capsys):
    run = train(data_folder, LCOAN)
    expected = results(run)['sets']['Set5']['psnr']
    content = {'params_ema': {f'module.{key}': value for key, value in torch.load(run / 'model/model_best.pt').items()}}
    torch.save(content, data_folder / 'x.pth')
    capsys.readouterr()
    typed = f'--cpu --n_threads 0 --data_test Set5 --pre_train {data_folder}/x.pth --window_size 16 --test_only'
    found = train(data_folder, f'--model auto {typed}', name='auto')
    assert results(found)['sets']['Set5']['psnr'] == expected
    assert results(found)['model'] == 'LCoAN'
    assert results(found)['settings'] == results(run)['settings']
    said = capsys.readouterr().out
    assert 'holds weights of LCoAN x2 (n_feats 8, n_resgroups 2, n_resblocks 1, n_clusters 4, window_size 16)' in said
    assert 'What nothing says of them is as in LCoAN: ema_decay, res_scale, act, dilation' in said
    assert "(params_ema, without the prefix 'module.')" in said


def test_auto_says_what_it_saw(data_folder, capsys):
    torch.save({'some.weight': torch.ones(3), 'other': torch.ones(1)}, data_folder / 'x.pt')
    assert main.main(arguments(data_folder, f'--model auto --pre_train {data_folder}/x.pt --test_only')) == 2
    message = capsys.readouterr().err
    assert 'No network known here has such weights: 2 tensors, some.weight, other' in message
    assert main.main(arguments(data_folder, '--model auto --pre_train missing.pt --test_only')) == 2
    assert '--pre_train missing.pt: no such file' in capsys.readouterr().err


@pytest.mark.slow
def test_costs(data_folder, capsys):
    run = train(data_folder, '--costs --model ASID+ASIDd8 --scale 4 --cpu', name='costs')
    said = capsys.readouterr().out
    rows = json.loads((run / 'costs.json').read_text())
    assert [(row['model'], row['scale'], row['parameters']) for row in rows] == [
        ('ASID', 4, 313104), ('ASIDd8', 4, 747734)
    ]  # fmt: skip
    before = (run / 'costs.json').read_bytes()
    assert main.main(arguments(data_folder, '--costs --model ASID --scale 8 --save costs --cpu')) == 2
    assert '--scale 8: ASID enlarges by 2, 3, 4' in capsys.readouterr().err
    assert (run / 'costs.json').read_bytes() == before
    assert all(row['latency'] > 0 and row['memory'] > 4 * row['parameters'] for row in rows)
    assert re.search(r'ASID +x4 +313\.1 +313\.1 +19\.8 +20\.8 ', said)
    assert read_rgb(run / 'costs.png').size


def test_weights_are_looked_up_in_a_folder(data_folder, no_curves, monkeypatch, tmp_path):
    run = train(data_folder, EDSR)
    name = 'model_latest.pt'
    expected = results(run)['sets']['Set5']['psnr']
    looked_up = train(data_folder, EDSR, f'--test_only --extend {run}/model --pre_train {name}', name='extend')
    assert results(looked_up)['sets']['Set5']['psnr'] == expected
    monkeypatch.chdir(run / 'model')
    from_here = train(data_folder, EDSR, f'--test_only --pre_train {name}', name='here')
    assert results(from_here)['sets']['Set5']['psnr'] == expected


# Where training starts

TINY_LCOAN = (
    '--cpu --n_threads 0 --data_test Set5 --patch_size 16 --batch_size 2 --test_every 1 --epochs 1 --n_resgroups 1 '
    '--n_resblocks 1 --n_feats 8 --n_clusters 4 --window_size 16'
)


def test_training_without_a_recipe_says_so_once(data_folder, no_curves):
    run = train(data_folder, EDSR)
    train(data_folder, '--load run --epochs 2')
    assert log(run).count('No recipe: ') == log(run).count('--template EDSR_x2 trains as published.') == 1
    other = train(data_folder, f'--template LCoAN-small_x2 {TINY_LCOAN}', name='other')
    assert 'No recipe' not in log(other)


def test_a_recipe_starts_from_its_weights(data_folder, no_curves):
    x2 = train(data_folder, f'--template LCoAN-small_x2 {TINY_LCOAN}', name='x2')
    (data_folder / 'LCoAN-small_x2.pt').write_bytes((x2 / 'model' / 'model_latest.pt').read_bytes())
    x4 = train(data_folder, f'--template LCoAN-small_x4 {TINY_LCOAN} --lr 1e-25 --extend {data_folder}', name='x4')
    assert f'weights from {data_folder}/LCoAN-small_x2.pt; interpolated from another scale: tail.0.2.' in log(x4)
    assert torch.equal(weights(x2)['head.0.weight'], weights(x4)['head.0.weight'])


def test_what_is_said_of_the_weights(data_folder, no_curves):
    file = train(data_folder, EDSR) / 'model' / 'model_latest.pt'
    tested = train(data_folder, EDSR, f'--test_only --pre_train {file}', name='tested')
    assert f'weights from {file}' in log(tested)
    assert results(tested)['weights'] == f'weights from {file}'
    assert f'<dt>Weights</dt><dd>{file}</dd>' in (tested / 'report.html').read_text()


# What is trained on


def pieces(data: Path, *options: str) -> list[tuple[str, np.ndarray]]:
    """The first HR patches that a training run learns from, with the image each is cut from."""
    patches = wiring.train_data(option.parse(arguments(data, EDSR, *options)))
    batch = default_collate([patches[i] for i in range(30)])
    hr = turn(batch.hr, batch.flips)
    return [(patches.name(i), patch.permute(1, 2, 0).numpy()) for i, patch in enumerate(hr)]


@pytest.mark.parametrize('flag, upright', [('--no_augment', 30), ('', 0)])
def test_augmentation(data_folder, flag, upright):
    """Without it every patch is a piece of its image as it is; with it one in eight is."""
    found = 0
    for name, patch in pieces(data_folder, flag):
        image = read_rgb(data_folder / 'SR291' / 'HR' / f'{name.split("/")[1]}.png')
        windows = np.lib.stride_tricks.sliding_window_view(image, (16, 16), (0, 1))
        found += (windows == patch.transpose(2, 0, 1)).all((2, 3, 4)).any()
    assert found == upright if upright else found < 20


def test_the_seed_chooses_the_pieces(data_folder):
    def total(seed: int) -> list[int]:
        return [int(patch.sum()) for _, patch in pieces(data_folder, f'--seed {seed}')]

    assert total(1) == total(1) != total(2)


def test_sets_and_their_range(data_folder):
    names = {name for name, _ in pieces(data_folder, '--data_train SR291+DIV2K --data_range 2-3/5-6')}
    assert names == {'SR291/0001', 'SR291/0002', 'SR291/0003', 'DIV2K/0002', 'DIV2K/0003'}
    folder = data_folder / 'SR291' / 'HR'
    assert {name for name, _ in pieces(data_folder, f'--data_train {folder}')} == {f'SR291/000{i}' for i in (1, 2, 3)}


# A folder of photographs


def png_header(path: Path) -> tuple[int, int, int, int]:
    """Width, height, bits a channel, colour type (0 grey, 2 RGB, 6 RGBA) of a PNG file."""
    head = path.read_bytes()[16:26]
    return int.from_bytes(head[:4], 'big'), int.from_bytes(head[4:8], 'big'), head[8], head[9]


@pytest.fixture
def photos(tmp_path) -> Path:
    """Flat images of 7x5 pixels of every kind, and one of a single pixel."""
    folder = tmp_path / 'photos'
    folder.mkdir()
    Image.new('RGB', (7, 5), (10, 200, 30)).save(folder / 'rgb.png')
    Image.new('RGB', (7, 5), (10, 200, 30)).save(folder / 'twice.png')
    Image.new('RGB', (7, 5), (90, 90, 90)).save(folder / 'twice.jpg')
    Image.new('L', (7, 5), 77).save(folder / 'grey.png')
    Image.new('RGBA', (7, 5), (10, 200, 30, 128)).save(folder / 'alpha.png')
    Image.new('RGB', (7, 5), (10, 200, 30)).quantize(4).save(folder / 'palette.png')
    Image.new('RGB', (1, 1), (1, 2, 3)).save(folder / 'dot.bmp')
    write_png(folder / 'deep.png', np.full((5, 7, 3), 40001, np.uint16))
    Image.fromarray(np.full((5, 7), 40001, np.uint16)).save(folder / 'deepgrey.png')
    return folder


KINDS = {
    'rgb': (21, 15, 8, 2), 'twice.png': (21, 15, 8, 2), 'twice.jpg': (21, 15, 8, 2), 'grey': (21, 15, 8, 0),
    'alpha': (21, 15, 8, 6), 'palette': (21, 15, 8, 2), 'dot': (3, 3, 8, 2), 'deep': (21, 15, 16, 2),
    'deepgrey': (21, 15, 16, 0),
}  # fmt: skip


def demo(data: Path, photos: Path, *options: str) -> int:
    more = f'--data_test Demo --dir_demo {photos} --test_only --scale 3 --save demo --cpu'
    return main.main(arguments(data, *(options or [BICUBIC]), more))


def test_photographs_keep_their_kind(data_folder, photos):
    assert demo(data_folder, photos) == 0
    folder = data_folder.parent / 'runs' / 'demo' / 'results-Demo'
    assert {path.name: png_header(path) for path in folder.glob('*.png')} == {
        f'{name}_x3_SR.png': header for name, header in KINDS.items()
    }
    colours = {
        'rgb': (10, 200, 30),
        'alpha': (10, 200, 30, 128),
        'palette': (10, 200, 30),
        'dot': (1, 2, 3),
        'grey': 77,
    }
    for name, colour in colours.items():
        with Image.open(folder / f'{name}_x3_SR.png') as image:
            assert (np.asarray(image) == colour).all(), name
    with Image.open(folder / 'deepgrey_x3_SR.png') as image:
        assert (np.asarray(image) == 40001).all()


def test_photographs_through_a_network(data_folder, photos, no_curves):
    run = train(data_folder, LCOAN, '--scale 3 --patch_size 24')
    network = LCOAN.replace('--scale 2', '').replace('--data_test Set5', '')
    assert demo(data_folder, photos, network, f'--pre_train {run}/model/model_best.pt --patch_size 24 --chop') == 0
    folder = data_folder.parent / 'runs' / 'demo' / 'results-Demo'
    assert {path.name: png_header(path) for path in folder.glob('*.png')} == {
        f'{name}_x3_SR.png': header for name, header in KINDS.items()
    }


def test_what_is_opaque_stays_opaque(data_folder, tmp_path, no_curves):
    run = train(data_folder, LCOAN)
    (tmp_path / 'photos').mkdir()
    Image.fromarray(np.full((20, 30, 4), 255, np.uint8)).save(tmp_path / 'photos' / 'a.png')
    assert (
        main.main(arguments(data_folder, f'--load run --test_only --data_test Demo --dir_demo {tmp_path}/photos')) == 0
    )
    with Image.open(run.with_name('run_photos_demo') / 'results-Demo' / 'a_x2_SR.png') as image:
        assert (np.asarray(image)[..., 3] == 255).all()


def test_photographs_of_one_name(data_folder, tmp_path):
    for name in ('a.png', 'a.bmp', 'a.png.bmp', 'b.png'):
        Image.fromarray(np.zeros((2, 2, 3), np.uint8)).save(tmp_path / name)
    assert demo(data_folder, tmp_path) == 0
    assert len(list((data_folder.parent / 'runs' / 'demo' / 'results-Demo').glob('*.png'))) == 4


def test_a_broken_photograph_does_not_keep_the_others(data_folder, photos, capsys):
    good = (photos / 'rgb.png').read_bytes()
    (photos / 'cut.png').write_bytes(good[: len(good) // 2])
    (photos / 'text.jpg').write_text('not a picture')
    assert demo(data_folder, photos) == 2
    message = capsys.readouterr().err
    assert message.startswith('Error: 2 of 11 images could not be enlarged:\n')
    assert message.count('\n') == 3
    assert str(photos / 'cut.png') in message
    assert str(photos / 'text.jpg') in message
    folder = data_folder.parent / 'runs' / 'demo' / 'results-Demo'
    assert {path.name for path in folder.glob('*.png')} == {f'{name}_x3_SR.png' for name in KINDS}


def test_a_result_that_cannot_be_written_does_not_keep_the_others(data_folder, photos, capsys):
    """A name of 246 bytes is one for an image, and with `_x3_SR.png` none for its result."""
    for length in (232, 246):
        shutil.copy(photos / 'rgb.png', photos / f'{length * "a"}.png')
    assert demo(data_folder, photos) == 2
    message = capsys.readouterr().err
    assert re.fullmatch(r'Error: 1 of 11 images could not be enlarged: \S+/a{246}\.png: .*name too long.*\n', message)
    folder = data_folder.parent / 'runs' / 'demo'
    assert {path.name for path in (folder / 'results-Demo').glob('*.png')} == {
        f'{name}_x3_SR.png' for name in (*KINDS, 232 * 'a')
    }
    assert 'twice.jpg' in (folder / 'report.html').read_text()


def test_a_full_disk_names_every_photograph(data_folder, photos, capsys):
    """Though the page that is written after them fits no more."""
    for path in photos.iterdir():
        noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
    with full_disk(5_500):
        assert demo(data_folder, photos) == 2
    message = capsys.readouterr().err
    assert message.startswith('Error: 9 of 9 images could not be enlarged:\n')
    assert [path.name for path in photos.iterdir() if f'{path}: ' not in message] == []
    assert 'report.html could not be written' in message
    assert not list((data_folder.parent / 'runs' / 'demo' / 'results-Demo').glob('*.png'))


@pytest.mark.parametrize('error', [MemoryError(), torch.OutOfMemoryError('CUDA out of memory')])
def test_a_photograph_too_large_for_memory_does_not_keep_the_others(data_folder, photos, capsys, monkeypatch, error):
    plain = model.Model.rows

    def rows(self, image, *report):
        if image.shape[0] == 1:
            raise error
        return plain(self, image, *report)

    monkeypatch.setattr(model.Model, 'rows', rows)
    assert demo(data_folder, photos) == 2
    message = capsys.readouterr().err
    assert re.fullmatch(
        r'Error: 1 of 9 images could not be enlarged: \S+/dot\.bmp: memory ran out: .*--chop.*\n', message
    )
    assert len(list((data_folder.parent / 'runs' / 'demo' / 'results-Demo').glob('*.png'))) == 8


@pytest.fixture
def overflowing(tmp_path) -> str:
    """Options of a network whose weights are finite and whose results are not."""
    weights = model.build('EDSR', 3, n_feats=4, n_resblocks=1).state_dict()
    weights['tail.1.weight'].fill_(3e38)
    torch.save(weights, tmp_path / 'large.pt')
    return f'--model EDSR --n_feats 4 --n_resblocks 1 --scale 3 --cpu --test_only --pre_train {tmp_path}/large.pt'


def test_a_photograph_whose_result_is_not_finite_is_named(data_folder, photos, overflowing, capsys):
    assert demo(data_folder, photos, overflowing) == 2
    message = capsys.readouterr().err
    assert message.startswith('Error: 9 of 9 images could not be enlarged:\n')
    for path in photos.iterdir():
        assert (
            f'{path}: EDSR x3 with weights from {data_folder.parent}/large.pt gives values that are not fin' in message
        )
    assert not list((data_folder.parent / 'runs' / 'demo' / 'results-Demo').glob('*.png'))


def test_a_result_that_is_not_finite_is_not_scored(data_folder, overflowing, capsys):
    assert main.main(arguments(data_folder, overflowing, '--save run --save_results')) == 2
    message = capsys.readouterr().err
    assert re.match(r'Error: 0001 of Set5: EDSR x3 with weights from \S+/large\.pt gives values that are not', message)
    assert not (data_folder.parent / 'runs' / 'run' / 'results.json').exists()


def test_photographs_of_another_folder_are_not_replaced(data_folder, photos, tmp_path, capsys):
    other = tmp_path / 'other'
    other.mkdir()
    Image.new('RGB', (7, 5), (1, 1, 1)).save(other / 'rgb.png')
    assert demo(data_folder, photos) == 0
    folder = data_folder.parent / 'runs' / 'demo' / 'results-Demo'
    before = fingerprint(folder)
    assert demo(data_folder, other) == 2
    assert re.search(rf'{folder} holds images made from {photos}, .*--reset .*--save', capsys.readouterr().err)
    assert fingerprint(folder) == before
    assert demo(data_folder, photos) == 0
    assert demo(data_folder, other, BICUBIC, '--reset') == 0
    assert [path.name for path in folder.glob('*.png')] == ['rgb_x3_SR.png']
    assert read_rgb(folder / 'rgb_x3_SR.png').max() == 1


def test_images_of_two_folders_of_one_name_are_told_apart(data_folder, photos, tmp_path, capsys):
    """The default name of the run has that of the folder alone."""
    shutil.copytree(photos, tmp_path / 'b' / 'photos')
    for folder, status in ((photos, 0), (tmp_path / 'b' / 'photos', 2)):
        command = f'{BICUBIC} --scale 3 --data_test Demo --dir_demo {folder}'
        assert main.main(arguments(data_folder, command)) == status
    assert f'Bicubic_x3_photos_demo/results-Demo holds images made from {photos}' in capsys.readouterr().err


# Names and pictures


NAMES = ('$5_$10', os.fsdecode(b'\xff\xfe'), 'a\nb\x01', 'plain')


def test_every_name_of_an_image_can_be_saved_and_shown(data_folder, no_curves):
    folder = data_folder / 'Odd' / 'HR'
    for i, name in enumerate(NAMES):
        write_png(folder / f'{name}.png', picture(i, 30, 40))
    assert main.main(arguments(data_folder, BICUBIC, '--data_test Odd --scale 2 --save run --save_results')) == 0
    run = data_folder.parent / 'runs' / 'run'
    assert set(results(run)['sets']['Odd']['images']) == set(NAMES)
    for name in NAMES:
        assert (run / 'results-Odd' / f'{name}_x2_SR.png').is_file()
    with Image.open(run / 'comparison-Odd.png') as image:
        image.load()


def test_a_name_that_the_screen_cannot_show_is_told_all_the_same(data_folder, photos):
    (photos / os.fsdecode(b'\xff\xfe.txt')).touch()
    command = [sys.executable, ROOT / 'src' / 'main.py', *arguments(data_folder, BICUBIC)]
    more = f'--scale 3 --data_test Demo --dir_demo {photos} --save demo'.split()
    done = subprocess.run([*command, *more], capture_output=True, check=True)
    line = rb'Left out, no image files of a known kind: \udcff\udcfe.txt'
    assert line in done.stdout
    assert line in (data_folder.parent / 'runs' / 'demo' / 'log.txt').read_bytes()


def test_a_picture_that_fails_loses_no_scores(data_folder, monkeypatch, capsys):
    monkeypatch.setattr(pictures, 'sheet', lambda rows: 1 / 0)
    command = f'{BICUBIC} --data_test Set5+SR291 --scale 2 --save run --save_results'
    assert main.main(arguments(data_folder, command)) == 2
    run = data_folder.parent / 'runs' / 'run'
    message = capsys.readouterr().err
    for name in ('Set5', 'SR291'):
        assert f'comparison-{name}.png could not be drawn' in message
        assert len(list((run / f'results-{name}').glob('*.png'))) == len(results(run)['sets'][name]['images'])
    assert (run / 'report.html').is_file()


def test_an_image_that_cannot_be_saved_loses_no_scores(data_folder, capsys):
    write_png(data_folder / 'Odd' / 'HR' / f'{"a" * 246}.png', picture(0, 30, 40))
    write_png(data_folder / 'Odd' / 'HR' / 'b.png', picture(1, 30, 40))
    assert main.main(arguments(data_folder, BICUBIC, '--data_test Odd --scale 2 --save run --save_results')) == 2
    assert re.search(r'a{246}_x2_SR\.png could not be written \(File name too long\)', capsys.readouterr().err)
    run = data_folder.parent / 'runs' / 'run'
    assert results(run)['sets']['Odd']['images'].keys() == {'a' * 246, 'b'}
    assert [path.name for path in (run / 'results-Odd').iterdir()] == ['b_x2_SR.png']


@pytest.mark.parametrize('broken', ['report.picture._curve', 'report.picture.sheet', 'report.run.page'])
def test_a_picture_that_fails_does_not_end_training(data_folder, monkeypatch, broken):
    def fail(*_: object) -> bytes:
        raise UserError('It is broken.')

    monkeypatch.setattr(broken, fail)
    run = train(data_folder, EDSR, '--epochs 2 --save_results')
    assert [record['epoch'] for record in metrics(run)] == [1, 2]
    assert log(run).count('It is broken.') >= 2
    assert len(list((run / 'results-Set5').iterdir())) == 2


# Bad input


@pytest.fixture
def trained(data_folder, no_curves) -> Path:
    """A folder with data, weights of a small EDSR and LCoAN at x2 in runs/edsr and runs/lcoan, and room for trouble."""
    train(data_folder, EDSR, name='edsr')
    train(data_folder, LCOAN, name='lcoan')
    return data_folder.parent


def edit(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(change(path.read_bytes() if path.is_file() else b''))

    return apply


def put(name: str, content: object) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, folder / name)

    return apply


def malice(name: str) -> Callable[[Path], None]:
    return lambda folder: torch.save({'model': Malice(folder / 'proof')}, folder / name)


def not_finite(folder: Path) -> None:
    state = torch.load(folder / 'runs/edsr/model/model_best.pt', weights_only=True)
    state['head.0.weight'][0, 0, 0, 0] = torch.nan
    torch.save(state, folder / 'w.pt')


def wrong_lr(folder: Path) -> None:
    write_png(folder / 'data' / 'SR291' / 'LR_bicubic' / 'X2' / '0002x2.png', picture(0, 9, 8))


def tiny_hr(folder: Path) -> None:
    write_png(folder / 'data' / 'Dots' / 'HR' / 'dot.png', picture(0, 1, 5))


def nothing(folder: Path) -> None:
    pass


def half(content: bytes) -> bytes:
    return content[: len(content) // 2]


HR = 'data/SR291/HR/0002.png'
GARBAGE = bytes(range(256)) * 20
TEST_EDSR = f'{EDSR} --test_only'

BAD = {
    'unknown network': (nothing, f'{TINY} --model Foo', ['Foo', 'Bicubic', 'EDSR', 'EDSR-baseline', 'LCoAN']),
    'unknown option': (nothing, f'{EDSR} --nonsense', ['--nonsense', '--help']),
    'unknown recipe': (nothing, '--template LCoAN_x5', ['LCoAN_x5', 'LCoAN_x2']),
    'weights of a recipe': (nothing, f'{TINY} --template EDSR_x4 --scale 4', ['EDSR_x4', 'EDSR_x2.pt', '--pre_train']),
    'value out of range': (nothing, f'{EDSR} --lr -1', ['--lr', "'-1'", 'above 0']),
    'many GPUs': (nothing, f'{EDSR.replace("--cpu", "")} --n_GPUs 99', ['--n_GPUs 99', 'this host has']),
    'parts for a GAN': (nothing, f'{EDSR} --loss L1+0.1*GAN --split_batch 2', ['--split_batch 2']),
    'scale': (nothing, f'{EDSR} --scale 5 --patch_size 20', ['EDSR', '5', '2, 3, 4, 8']),
    'setting of another network': (nothing, f'{EDSR} --n_clusters 4', ['EDSR', 'n_clusters', 'n_resblocks']),
    'settings for bicubic': (nothing, f'{BICUBIC} --scale 2 --n_feats 4', ['Bicubic', 'n_feats']),
    'activation': (nothing, f'{EDSR} --act foo', ['foo', 'relu', 'gelu']),
    'reduction': (nothing, f'{LCOAN} --reduction 3', ['--reduction 3', '--n_feats 8']),
    'nothing to train': (nothing, f'{TINY} --model Bicubic', ['Bicubic', '--test_only']),
    'loss term': (nothing, f'{EDSR} --loss 1*SSIM', ['SSIM', 'L1', 'VGG54', 'WGAN_GP']),
    'no file for VGG': (nothing, f'{EDSR} --loss 1*VGG22 --vgg FOLDER/none.pth', ['FOLDER/none.pth']),
    'luma for VGG': (nothing, f'{EDSR} --loss 1*VGG22 --n_colors 1', ['VGG22', '--n_colors 1']),
    'loss weight': (nothing, f'{EDSR} --loss x*L1', ["'x'", 'L1']),
    'demo without folder': (nothing, f'{BICUBIC} --data_test Demo', ['--dir_demo']),
    'demo of nothing': (
        nothing, f'{BICUBIC} --scale 2 --data_test Demo --dir_demo none', ['--dir_demo', '/none', 'not a folder'],
    ),
    'demo without images': (
        nothing, f'{BICUBIC} --scale 2 --data_test Demo --dir_demo FOLDER/runs', ['--dir_demo', 'runs', 'no images'],
    ),
    'no data folder': (
        nothing, f'{EDSR} --dir_data FOLDER/none', ['SR291', 'FOLDER/none', 'does not exist', 'HR', 'LR', '--dir_data'],
    ),
    'no such set': (nothing, f'{EDSR} --data_train Nix', ['Nix', 'FOLDER/data/Nix/HR', 'SR291', '*.png', 'LR']),
    'no such test set': (nothing, f'{EDSR} --data_test Nix', ['Nix', 'FOLDER/data/benchmark/Nix/HR', 'DIV2K']),
    'no such path': (nothing, f'{EDSR} --data_train FOLDER/nix/HR', ['FOLDER/nix/HR']),
    'folder without images': (nothing, f'{EDSR} --data_train FOLDER/runs/edsr', ['FOLDER/runs/edsr', '.png', '.jpg']),
    'range beyond the set': (nothing, f'{EDSR} --data_train DIV2K --data_range 1-800/1-5', ['1-800', '6 images']),
    'tests on training images': (
        nothing, f'{EDSR} --data_train DIV2K --data_test DIV2K --data_range 1-4/4-5', ['1-4/4-5', 'is trained on'],
    ),
    'one range for both': (
        nothing, f'{EDSR} --data_train DIV2K --data_test Set5+DIV2K --data_range 1-4', ['1-4', 'such as 1-800/801-810'],
    ),
    'LR of the wrong size': (wrong_lr, EDSR, ['0002x2.png', '8x9', '33x38', '0002.png']),
    'HR too small': (tiny_hr, f'{BICUBIC} --scale 2 --data_test Dots', ['dot.png', '5x1', 'x2']),
    'truncated image': (edit(HR, half), EDSR, [HR]),
    'truncated image, not cached': (edit(HR, half), f'{EDSR} --ext img', [HR]),
    'not an image': (edit(HR, lambda _: b'hello'), EDSR, [HR]),
    'empty image': (edit(HR, lambda _: b''), EDSR, [HR]),
    'truncated test image': (
        edit('data/benchmark/Set5/HR/0001.png', half), f'{BICUBIC} --scale 3', ['data/benchmark/Set5/HR/0001.png'],
    ),
    'no weights': (nothing, TEST_EDSR, ['EDSR', '--pre_train', '--load']),
    'no such weights': (nothing, f'{TEST_EDSR} --pre_train none.pt', ['none.pt']),
    'weights of another network': (
        nothing, f'{TEST_EDSR} --pre_train FOLDER/runs/lcoan/model/model_best.pt',
        ['model_best.pt', 'body.0.body.0.weight', 'weights of LCoAN x2 (n_feats 8, n_resgroups 2,'],
    ),
    'training from another network': (
        nothing, f'{LCOAN} --pre_train FOLDER/runs/edsr/model/model_best.pt',
        ['model_best.pt', 'weights of EDSR x2 (n_feats 8', ' a, '],
    ),
    'weights of another size': (
        nothing, f'{TEST_EDSR} --n_feats 4 --pre_train FOLDER/runs/edsr/model/model_best.pt',
        ['another shape', 'head.0.weight'],
    ),
    'weights of another scale': (
        nothing, f'{TEST_EDSR} --scale 4 --pre_train FOLDER/runs/edsr/model/model_best.pt',
        ['weights of EDSR x2 (n_feats 8', 'tail.0.2.weight', '--model auto'],
    ),
    'weights with code': (malice('w.pt'), f'{TEST_EDSR} --pre_train FOLDER/w.pt', ['w.pt', 'run code']),
    'training from code': (malice('w.pt'), f'{EDSR} --pre_train FOLDER/w.pt', ['w.pt', 'run code']),
    'a bare pickle with code': (
        lambda folder: (folder / 'w.pt').write_bytes(pickle.dumps(Malice(folder / 'proof'), 2)),
        f'{TEST_EDSR} --pre_train FOLDER/w.pt', ['w.pt'],
    ),
    'garbage as weights': (
        edit('w.pt', lambda _: GARBAGE), f'{TEST_EDSR} --pre_train FOLDER/w.pt', ['w.pt', 'damaged'],
    ),
    'truncated weights': (
        edit('runs/edsr/model/model_best.pt', half), f'{TEST_EDSR} --pre_train FOLDER/runs/edsr/model/model_best.pt',
        ['model_best.pt', 'damaged'],
    ),
    'weights that are not finite': (
        not_finite, f'{TEST_EDSR} --pre_train FOLDER/w.pt', ['w.pt', 'head.0.weight', 'not finite'],
    ),
    'training from weights that are not finite': (
        not_finite, f'{EDSR} --pre_train FOLDER/w.pt', ['w.pt', 'head.0.weight', 'not finite'],
    ),
    'weights of a user who is none': (
        nothing, f'{TEST_EDSR} --pre_train ~nobody.here/w.pt', ['~nobody.here/w.pt', 'without ~'],
    ),
    'images of a user who is none': (
        nothing, f'{BICUBIC} --scale 2 --data_test Demo --dir_demo ~nobody.here', ['~nobody.here', 'without ~'],
    ),
    'a folder whose name cannot be': (
        nothing, f'{BICUBIC} --scale 2 --data_test Demo --dir_demo FOLDER/{"x" * 300}', ['x' * 300],
    ),
    'no state dict': (put('w.pt', [1, 2]), f'{TEST_EDSR} --pre_train FOLDER/w.pt', ['w.pt', 'no state dict']),
    'a run in the way': (nothing, f'{EDSR} --save edsr', ['runs/edsr', '--load edsr', '--reset', '--save']),
    'no such run': (nothing, '--load none', ['FOLDER/runs/none', 'edsr, lcoan']),
    'a folder of something else': (nothing, '--save_dir FOLDER --load data', ['FOLDER/data', 'config.txt']),
    'a run of EDSR-PyTorch': (
        edit('runs/old/config.txt', lambda _: b'2024-01-01-12:00:00\n\nmodel: EDSR\nscale: [2]\n'), '--load old',
        ['FOLDER/runs/old', 'config.txt'],
    ),
    'garbage as options': (edit('runs/edsr/config.txt', lambda _: GARBAGE), '--load edsr', ['runs/edsr', 'config.txt']),
    'garbage as state': (edit('runs/edsr/state.pt', lambda _: GARBAGE), '--load edsr', ['state.pt', 'damaged']),
    'truncated state': (edit('runs/edsr/state.pt', half), '--load edsr --epochs 2', ['state.pt', 'damaged']),
    'code as state': (malice('runs/edsr/state.pt'), '--load edsr --epochs 2', ['state.pt', 'run code']),
    'state of something else': (put('runs/edsr/state.pt', {'a': 1}), '--load edsr', ['state.pt', 'not a state']),
    'no state': (lambda folder: (folder / 'runs/edsr/state.pt').unlink(), '--load edsr', ['runs/edsr', 'state.pt']),
    'another network in a run': (nothing, '--load edsr --model LCoAN', ['--model LCoAN', 'EDSR', 'cannot change']),
    'another scale in a run': (nothing, '--load edsr --scale 4', ['--scale 4', 'scale 2', 'cannot change']),
    'another optimiser in a run': (nothing, '--load edsr --optimizer SGD', ['--optimizer SGD', 'ADAM']),
    'an epoch to come': (nothing, '--load edsr --resume 7 --epochs 9', ['--resume 7', '1 epochs']),
    'an epoch not kept': (nothing, '--load edsr --resume 1 --epochs 2', ['--resume 1', 'model_1.pt', '--save_models']),
    'numbers that are none': (
        edit('runs/edsr/config.txt', lambda text: text.replace(b'\nlr: ', b'\nlr: -')), '--load edsr',
        ['--lr', "'-0.0"],
    ),
    'null for a number': (
        edit('runs/edsr/config.txt', lambda text: re.sub(rb'\nlr: .*', b'\nlr: null', text)), '--load edsr',
        ['run edsr', 'lr: null', 'mend'],
    ),
    'a text for a switch': (
        edit('runs/edsr/config.txt', lambda text: re.sub(rb'\nssim: .*', b'\nssim: "no"', text)), '--load edsr',
        ['run edsr', 'ssim: "no"', 'mend'],
    ),
    'a range that is none': (
        edit('runs/edsr/config.txt', lambda text: re.sub(rb'data_range: .*', b'data_range: 5', text)), '--load edsr',
        ['runs/edsr', 'config.txt'],
    ),
    'a run under another name': (nothing, '--load edsr --save other', ['--save other', 'edsr']),
    'a run with other weights': (nothing, '--load edsr --pre_train w.pt', ['--pre_train w.pt', 'edsr']),
    'a run with a recipe': (nothing, '--load edsr --template EDSR_x2', ['--template EDSR_x2', 'edsr']),
    'a set twice': (nothing, f'{BICUBIC} --scale 2 --data_test Set5+Set5', ['Set5', 'twice']),
    'a score of a network': (nothing, '--score FOLDER --scale 2 --chop', ['--chop', '--score']),
    'a run folder that is a file': (
        edit('file', lambda _: b'x'), f'{EDSR} --save_dir FOLDER/file', ['FOLDER/file', '--save_dir'],
    ),
    'no folder to score': (nothing, '--score FOLDER/none --scale 2 --cpu', ['FOLDER/none']),
    'an image to score is missing': (
        lambda folder: shutil.copytree(folder / 'data/SR291/HR', folder / 'sr'),
        '--score FOLDER/sr --scale 2 --data_test DIV2K --data_range 1-6', ['FOLDER/sr', '0004'],
    ),
}  # fmt: skip


@pytest.mark.parametrize('trouble', BAD)
def test_bad_input(trained, capsys, monkeypatch, trouble):
    """One sentence on the screen, status 2, and nothing that was on disk is changed; only LR and a log may be new."""
    prepare, command, words = BAD[trouble]
    prepare(trained)
    monkeypatch.chdir(trained)
    before = fingerprint(trained)
    capsys.readouterr()
    typed = command.replace('FOLDER', str(trained))
    own = [] if '--load' in typed else ['--save', 'new']
    assert main.main([*arguments(trained / 'data'), *own, *typed.split()]) == 2
    message = capsys.readouterr().err
    assert re.fullmatch(r'Error: \S.*\.?\n', message)
    assert [word for word in words if word.replace('FOLDER', str(trained)) not in message] == []
    after = fingerprint(trained)
    assert {name: after.get(name) for name in before} == before
    assert [name for name in set(after) - set(before) if not name.startswith('runs/new') and 'LR_' not in name] == []
    assert not (trained / 'runs' / 'new' / 'state.pt').exists()


@pytest.mark.parametrize('command', ['Demo --dir_demo FOLDER/data/SR291/HR', 'FOLDER/data/SR291/HR', 'SR291'])
def test_a_folder_that_may_not_be_read(trained, capsys, monkeypatch, command):
    folder = trained / 'data' / 'SR291' / 'HR'

    def refuse(path: Path, *args: object) -> None:
        raise PermissionError(errno.EACCES, 'Permission denied', str(folder))

    monkeypatch.setattr(Path, 'iterdir', refuse)
    typed = f'{BICUBIC} --scale 2 --save new --data_test {command}'.replace('FOLDER', str(trained))
    assert main.main(arguments(trained / 'data', typed)) == 2
    said = f'Error: {folder} cannot be used (Permission denied): check the path and its permissions.\n'
    assert capsys.readouterr().err == said


def test_an_error_of_the_system_that_names_no_file_is_none_of_the_users(monkeypatch):
    monkeypatch.setattr(main, 'run', lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, 'Input/output error')))
    with pytest.raises(OSError, match='Input/output error'):
        main.main([])


def test_a_test_in_the_folder_of_a_training_run_leaves_the_run_whole(trained):
    before = fingerprint(trained / 'runs' / 'edsr')
    weights = trained / 'runs' / 'edsr' / 'model' / 'model_best.pt'
    command = f'{TEST_EDSR} --save edsr --pre_train {weights} --batch_size 7'
    assert main.main(arguments(trained / 'data', command)) == 0
    after = fingerprint(trained / 'runs' / 'edsr')
    assert {name for name in before if after[name] != before[name]} <= {'log.txt', 'results.json', 'report.html'}


def test_a_loaded_run_is_tested_elsewhere(trained):
    before = fingerprint(trained / 'runs' / 'edsr')
    assert main.main(arguments(trained / 'data', '--load edsr --test_only --save elsewhere')) == 0
    assert main.main(arguments(trained / 'data', '--load edsr --test_only')) == 0
    assert fingerprint(trained / 'runs' / 'edsr') == before
    assert (trained / 'runs' / 'elsewhere' / 'results.json').is_file()
    assert (trained / 'runs' / 'edsr_test' / 'results.json').is_file()


def test_without_torch_is_one_sentence():
    command = [sys.executable, '-S', ROOT / 'src' / 'main.py', '--model', 'Bicubic', '--test_only']
    result = subprocess.run(command, capture_output=True, text=True, env={})
    assert result.returncode == 2
    assert re.fullmatch(r'Error: \S+ is missing in .*requirements\.txt\.\n', result.stderr)


def test_config_holds_the_settings_of_the_network(trained):
    lines = (trained / 'runs' / 'edsr' / 'config.txt').read_text().splitlines()
    assert {'res_scale: 0.1', 'rgb_range: 255', 'act: "relu"', 'n_colors: 3', 'shift_mean: true'} <= set(lines)


def test_debug_shows_the_traceback(capsys):
    assert main.main(['--model', 'Foo', '--debug']) == 2
    message = capsys.readouterr().err
    assert message.startswith('Traceback')
    assert message.endswith(f'choose one of {", ".join(networks.MODELS)}.\n')


def test_the_status_of_the_process(tmp_path):
    command = [sys.executable, str(ROOT / 'src' / 'main.py'), '--model', 'Foo']
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, '')
    assert done.stderr == f"Error: Unknown network 'Foo': choose one of {', '.join(networks.MODELS)}.\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('closed', ['2>&-', '>&- 2>&-'])
def test_closed_output_ends_nothing(tmp_path, closed):
    """As in a task of cron that closes it: no file is opened in its place, and the work is done."""
    write_png(tmp_path / 'HR' / 'a.png', picture(0, 8, 9))
    command = [sys.executable, ROOT / 'src' / 'main.py', '--model', 'Bicubic', '--scale', '2', '--test_only', '--cpu']
    more = ['--data_test', 'Demo', '--dir_demo', tmp_path / 'HR', '--save_dir', tmp_path, '--save', 'run']
    line = f'{shlex.join(map(str, [*command, *more]))} {closed}'
    assert subprocess.run(line, shell=True).returncode == 0
    assert read_rgb(tmp_path / 'run' / 'results-Demo' / 'a_x2_SR.png').shape == (16, 18, 3)


def test_output_into_a_closed_pipe_ends_quietly(tmp_path):
    """With the status that a shell gives a program that SIGPIPE ended; a run does its work."""
    run = f'{BICUBIC} --scale 2 --data_test {tmp_path}/HR --save_dir {tmp_path} --save run'
    write_png(tmp_path / 'HR' / 'a.png', picture(0, 20, 30))
    for command, status in (('--template list', 141), (run, 0), ('--nonsense', 2)):
        program = [sys.executable, str(ROOT / 'src' / 'main.py'), *command.split()]
        process = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        process.stdout.close()
        said = process.stderr.read()
        assert process.wait() == status
        assert said.count('\n') == (status == 2)
    assert results(tmp_path / 'run')


def test_errors_into_a_closed_pipe_end_quietly():
    program = [sys.executable, str(ROOT / 'src' / 'main.py'), '--nonsense']
    process = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    process.stdout.close()
    assert process.wait() == 141


def test_without_a_compiler_is_one_sentence(data_folder, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr('torch._inductor.config.cpp.cxx', (str(tmp_path / 'no-compiler'),))
    monkeypatch.setenv('TORCHINDUCTOR_CACHE_DIR', str(tmp_path / 'cache'))
    weights = model.build('EDSR', 2, n_feats=4, n_resblocks=1).state_dict()
    torch.save(weights, tmp_path / 'w.pt')
    command = f'--model EDSR --n_feats 4 --n_resblocks 1 --scale 2 --cpu --test_only --pre_train {tmp_path}/w.pt'
    assert main.main(arguments(data_folder, command, '--compile --save run')) == 2
    message = capsys.readouterr().err
    assert re.fullmatch(r'Error: PyTorch could not compile the network \(.*compiler.*\): .*--compile.*\n', message)


def test_ctrl_c(monkeypatch, capsys):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(main, 'run', interrupt)
    assert main.main([]) == 130
    assert capsys.readouterr().err == 'Interrupted: --load NAME continues a training run from its last state.\n'


def test_lcoan_that_was_never_trained_is_not_tested(trained, capsys):
    settings = {'n_resgroups': 2, 'n_resblocks': 1, 'n_feats': 8, 'n_clusters': 4, 'window_size': 16}
    torch.save(model.build('LCoAN', 2, **settings).state_dict(), trained / 'new.pt')
    before = fingerprint(trained / 'runs' / 'lcoan')
    assert main.main(arguments(trained / 'data', LCOAN, f'--test_only --pre_train {trained}/new.pt --save new')) == 2
    assert 'centroids of LCoAN were never initialised' in capsys.readouterr().err
    assert fingerprint(trained / 'runs' / 'lcoan') == before


@pytest.mark.parametrize('room', [10, 10_000, 40_000])
def test_a_full_disk_while_saving(trained, capsys, room):
    """The last epoch stays whole; with room again, the run continues as if nothing had happened."""
    run = trained / 'runs' / 'edsr'
    kept = {path: path.read_bytes() for path in (run / 'state.pt', run / 'metrics.jsonl')}
    with full_disk(room):
        assert main.main(arguments(trained / 'data', '--load edsr --epochs 3')) == 2
    message = capsys.readouterr().err
    assert re.fullmatch(r'Error: \S+ could not be written \(.*\); what was there before is unchanged\.\n', message)
    assert {path: path.read_bytes() for path in kept} == kept
    for path in run.glob('model/*.pt'):
        torch.load(path, weights_only=True)
    assert not [path for path in run.rglob('*') if 'tmp' in path.name]
    train(trained / 'data', '--load edsr --epochs 3')
    unbroken = train(trained / 'data', EDSR, '--epochs 3', name='unbroken')
    assert equal(state(run)['model'], state(unbroken)['model'])
    assert learned(run) == learned(unbroken)
    assert len(metrics(run)) == 3
