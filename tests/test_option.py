import json
import os
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

import model
import networks
import option
from error import UserError
from networks import MODELS
from option import parse
from options.config import read_config, write_config
from options.kinds import data_range, epochs_list, names
from options.measured import cost_models, cost_scales, several_forms
from options.table import setting_option
from template import TEMPLATES
from tests.conftest import ROOT

# The options of EDSR and LCoAN, as issue 2 lists them.
OLD = """
    debug template n_threads cpu n_GPUs seed dir_data dir_demo data_train data_test data_range ext scale patch_size
    rgb_range n_colors chop no_augment model act pre_train extend n_resblocks n_feats res_scale shift_mean dilation
    precision n_clusters window_size ema_decay n_hashes chunk_size n_resgroups reduction reset test_every epochs
    batch_size split_batch self_ensemble test_only gan_k lr decay gamma optimizer momentum betas epsilon weight_decay
    gclip loss skip_threshold save_dir save load resume save_models print_every save_results save_gt ssim
"""
NEW = """
    lr_border chop_size chop_overlap chop_batch chop_blend score shave costs warmup weight_ema n_heads mlp_ratio
    kernel_size pad_to group_channels tlc_size category_size n_tokens reduced_dim direct_upsampler drop_path save_every
    graph deterministic kernels tf32 max_time sampling degradation
    compile channels_last schedule decay_unit lr_min clip_norm amp checkpointing vgg skip_bad_images profile growth
    against compare max_memory show_attention export forms net restarts patch_schedule loss_final final_epochs teacher
    distill
"""
ALL = {*OLD.split(), *NEW.split()}

NETWORK = (
    '--chop --n_resgroups 10 --n_resblocks 4 --reduction 1 --n_feats 128 --n_clusters 128 --window_size 384 '
    '--ema_decay 0.999 --res_scale 0.1'
)
HEAD = '--model LCoAN --data_test Set5 --save_dir ../output/ --dir_data ../../SrTrainingData --n_GPUs 1 --n_threads 8'
TRAIN = f'{HEAD} --rgb_range 1 --save_models --save_results --lr 1e-4 {NETWORK} --batch_size 16 --data_train DIV2K'
TRAIN_X2 = (
    f'{TRAIN} --epochs 1500 --save LCoAN_x2 --decay 300-600-900-1200 --scale 2 --patch_size 96 --data_range 1-800/1-5'
)
TRAIN_X4 = (
    f'{TRAIN} --epochs 500 --save LCoAN_x4 --decay 100-200-300-400 --scale 4 --patch_size 192 --data_range 1-800/1-5 '
    '--pre_train ../LCoAN_x2.pt'
)
TEST_X4 = (
    '--test_only --data_test Set5+Set14+B100+Urban100+Manga109 --save_results --pre_train ../LCoAN_x4.pt '
    f'--model LCoAN --scale 4 --rgb_range 1 {NETWORK}'
)

DEFAULTS = {
    'debug': False, 'template': '', 'cpu': False, 'n_GPUs': 1, 'seed': 1, 'dir_demo': None, 'data_train': ['DIV2K'],
    'data_test': ['Set5'], 'data_range': ((1, 800), (801, 810)), 'ext': 'sep', 'scale': 4, 'patch_size': 192,
    'rgb_range': None, 'n_colors': None, 'chop': False, 'no_augment': False, 'model': 'LCoAN', 'act': None,
    'pre_train': '', 'n_resblocks': None, 'n_feats': None, 'res_scale': None, 'shift_mean': None, 'dilation': None,
    'precision': 'single', 'n_clusters': None, 'window_size': None, 'ema_decay': None, 'n_hashes': None,
    'chunk_size': None, 'n_resgroups': None, 'reduction': None, 'reset': False, 'test_every': 1000, 'epochs': 300,
    'batch_size': 16, 'split_batch': 1, 'self_ensemble': False, 'test_only': False, 'gan_k': 1, 'lr': 1e-4,
    'decay': [200], 'gamma': 0.5, 'optimizer': 'ADAM', 'momentum': None, 'betas': [0.9, 0.999], 'epsilon': 1e-8,
    'weight_decay': 0.0, 'gclip': 0.0, 'loss': '1*L1', 'skip_threshold': 1e8, 'load': '', 'resume': -1,
    'save_models': False, 'print_every': 100, 'save_results': False, 'save_gt': False, 'ssim': False,
    'lr_border': 'mirror', 'chop_size': 192, 'chop_overlap': 20, 'chop_batch': 4, 'score': None, 'chop_blend': 'ramp',
    'shave': None, 'costs': False, 'export': None, 'warmup': 0, 'weight_ema': 0.0, 'n_heads': None, 'mlp_ratio': None,
    'kernel_size': None, 'pad_to': 1, 'group_channels': None, 'tlc_size': None, 'category_size': None,
    'n_tokens': None, 'reduced_dim': None, 'direct_upsampler': None, 'drop_path': None, 'save_every': 0, 'graph': None,
    'deterministic': False, 'tf32': False, 'max_time': None, 'sampling': 'image', 'degradation': '', 'compile': False,
    'channels_last': False, 'schedule': 'step', 'decay_unit': 'epochs', 'lr_min': 0.0, 'clip_norm': 0.0, 'amp': 'off',
    'checkpointing': False, 'vgg': None, 'skip_bad_images': False, 'profile': False, 'growth': False, 'compare': None,
    'against': None, 'max_memory': None, 'show_attention': False, 'forms': None, 'net': [], 'restarts': 0,
    'patch_schedule': [], 'loss_final': '', 'final_epochs': 1, 'teacher': '', 'distill': 0.0, 'kernels': 'auto',
}  # fmt: skip
LCOAN = {
    'model': 'LCoAN', 'chop': True, 'n_resgroups': 10, 'n_resblocks': 4, 'reduction': 1, 'n_feats': 128,
    'n_clusters': 128, 'window_size': 384, 'ema_decay': 0.999, 'res_scale': 0.1, 'rgb_range': 1,
}  # fmt: skip
TRAINED = LCOAN | {
    'n_threads': 8, 'n_GPUs': 1, 'save_models': True, 'save_results': True, 'lr': 1e-4, 'batch_size': 16,
    'data_train': ['DIV2K'], 'data_test': ['Set5'], 'data_range': ((1, 800), (1, 5)),
}  # fmt: skip


def options(command: str) -> Namespace:
    return parse(command.split())


def help_page() -> tuple[str, set[str]]:
    """What --help prints in a process of its own, and the modules that were imported for it."""
    code = (
        'import sys, atexit, main\natexit.register(lambda: print(*sys.modules, file=sys.stderr))\nmain.main(["--help"])'
    )
    environment = os.environ | {'PYTHONPATH': str(ROOT / 'src'), 'COLUMNS': '200'}
    done = subprocess.run([sys.executable, '-c', code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0
    return done.stdout, set(done.stderr.split())


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A --save_dir that holds the options of one run, called old."""
    args = options('--model EDSR --scale 2 --n_feats 16 --lr 0.01 --batch_size 3 --data_range 2-9 --decay 5-7')
    (tmp_path / 'old').mkdir()
    (tmp_path / 'old' / 'config.txt').write_text(write_config(args))
    return tmp_path


@pytest.mark.parametrize(
    'command, expected',
    [
        (TRAIN_X2, {'epochs': 1500, 'save': 'LCoAN_x2', 'decay': [300, 600, 900, 1200], 'scale': 2, 'patch_size': 96}),
        (
            TRAIN_X4,
            {'epochs': 500, 'save': 'LCoAN_x4', 'decay': [100, 200, 300, 400], 'pre_train': '../LCoAN_x2.pt'},
        ),
    ],
)
def test_published_training(command, expected):
    paths = {'save_dir': Path('../output').absolute(), 'dir_data': Path('../../SrTrainingData').absolute()}
    found = vars(options(command))
    assert found == DEFAULTS | {'extend': ROOT / 'models'} | paths | TRAINED | expected


def test_published_benchmark():
    found = vars(options(TEST_X4))
    sets = ['Set5', 'Set14', 'B100', 'Urban100', 'Manga109']
    expected = {'test_only': True, 'data_test': sets, 'save_results': True, 'pre_train': '../LCoAN_x4.pt'}
    paths = {'extend': ROOT / 'models', 'dir_data': ROOT / 'dataset', 'save_dir': ROOT / 'experiment'}
    own = {'save': 'LCoAN_x4_test', 'n_threads': found['n_threads']}
    assert found == DEFAULTS | paths | LCOAN | expected | own


def test_every_option_has_its_old_name():
    assert set(vars(parse([]))) == ALL


def test_networks():
    assert tuple(model.NETWORKS) == MODELS


def test_help():
    text, modules = help_page()
    groups = [line for line in text.splitlines() if line.endswith(':') and not line.startswith((' ', 'usage'))]
    assert [group.split()[0] for group in groups[1:7]] == ['train', 'test:', 'score:', 'export:', 'measure:', 'data:']
    assert [group.split()[0] for group in groups[7:]] == ['network:', 'hardware:', 'optimisation:', 'run', 'examples:']
    entries = [entry.split('\n\n')[0] for entry in text.split('\n  --')[1:]]
    described = {entry.split()[0]: re.split(r'\s{2,}', entry, maxsplit=1)[1:] for entry in entries}
    assert set(described) == {*ALL, 'no_chop', 'no_graph'}
    assert [name for name, description in described.items() if not description] == []
    for name, default in {'lr': '0.0001', 'epochs': '300', 'data_test': 'Set5', 'decay': '200'}.items():
        assert f'(default: {default})' in described[name][0]
    assert 'pixels' in described['patch_size'][0]
    assert 'main' in modules
    assert not {'torch', 'numpy', 'matplotlib'} & modules


def test_importing_parses_nothing(monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['main.py', '--nonsense'])
    assert parse([]).model == 'LCoAN'


def test_typed_before_saved_before_recipe_before_default(saved):
    args = options(f'--save_dir {saved} --load old --lr 0.5')
    assert args.lr == 0.5  # typed, though the run has 0.01
    assert args.batch_size == 3  # of the run
    assert args.decay == [5, 7]  # of the run
    assert args.gamma == 0.5  # default
    assert options('--template EDSR_x2 --epochs 7').epochs == 7
    assert options('--template LCoAN_x2').epochs == 1500
    assert parse([]).epochs == 300


@pytest.mark.parametrize('typed', ['300', '200'])
def test_typing_the_default_wins_over_the_recipe(typed):
    assert options(f'--template LCoAN_x4 --epochs {typed}').epochs == int(typed)


def test_load_restores_the_run(saved):
    args = options(f'--save_dir {saved} --load old')
    expected = ('EDSR', 2, 16, 0.01, ((2, 9),), 'old', 'old')
    assert expected == (args.model, args.scale, args.n_feats, args.lr, args.data_range, args.save, args.load)


def test_a_time_is_that_of_one_command(saved):
    """Or a run that was given an hour would end after each further hour."""
    args = options(f'--save_dir {saved} --load old --max_time 5')
    (saved / 'old' / 'config.txt').write_text(write_config(args))
    assert options(f'--save_dir {saved} --load old').max_time is None


def test_reset_and_load_exclude_each_other(saved):
    with pytest.raises(UserError, match='--reset deletes the run that --load old continues'):
        options(f'--save_dir {saved} --load old --reset')


def test_a_loaded_run_is_tested_under_another_name(saved):
    assert options(f'--save_dir {saved} --load old --test_only').save == 'old_test'
    with pytest.raises(UserError, match='--save old: tests and exports leave the folder of the run as it is'):
        options(f'--save_dir {saved} --load old --test_only --save old')
    assert options(f'--save_dir {saved} --load old --test_only --save new').save == 'new'


@pytest.mark.parametrize('change', ['--model LCoAN', '--scale 4', '--n_feats 32', '--act gelu', '--optimizer SGD'])
def test_what_cannot_change_in_a_run(saved, change):
    with pytest.raises(UserError, match=f'{change}: the run old has .*cannot change'):
        options(f'--save_dir {saved} --load old {change}')


def test_paths_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'a+b').mkdir()
    args = options('--dir_data data --save_dir ../runs --extend w --data_train my/HR --data_test ./a+b --score s')
    assert args.dir_data == tmp_path / 'data'
    assert args.save_dir.resolve() == tmp_path.parent / 'runs'
    assert args.save_dir.is_absolute()
    assert args.extend == tmp_path / 'w'
    assert args.data_train == [str(tmp_path / 'my' / 'HR')]
    assert args.data_test == [str(tmp_path / 'a+b')]
    assert args.score == tmp_path / 's'


def test_default_paths_do_not_depend_on_where_one_is(tmp_path, monkeypatch):
    before = parse([])
    monkeypatch.chdir(tmp_path)
    assert vars(parse([])) == vars(before)
    assert before.dir_data == ROOT / 'dataset'


def test_default_name_of_a_run():
    assert options('--model EDSR --scale 2').save == 'EDSR_x2'
    assert options('--template LCoAN-small_x4').save == 'LCoAN-small_x4'
    assert options('--model EDSR --scale 2 --test_only').save == 'EDSR_x2_test'
    assert options('--score some/results --scale 2').save == 'results_score'
    assert options('--test_only --save mine').save == 'mine'
    assert options('--test_only --template ASID_x4').save == 'ASID_x4_test'


def test_tests_of_two_files_have_two_names():
    names = [options(f'--test_only --template ASID_x4 --pre_train {file}').save for file in ('a/one.pt', 'b/two.pth')]
    assert names == ['ASID_x4_one_test', 'ASID_x4_two_test']
    assert options('--test_only --template ASID_x4 --pre_train models/ASID_x4.pt').save == 'ASID_x4_test'
    names = [options(f'--test_only --pre_train runs/{run}/model/model_best.pt').save for run in 'ab']
    assert names == ['LCoAN_x4_a_model_best_test', 'LCoAN_x4_b_model_best_test']
    assert options('--export onnx --template ASID_x4 --pre_train one.pt').save == 'ASID_x4_one_export'


def test_photographs_of_two_folders_and_a_benchmark_have_three_names():
    demo = '--test_only --template ASID_x4 --pre_train ASID_x4.pt --data_test Demo --dir_demo'
    assert [options(f'{demo} {folder}').save for folder in ('a/summer', 'winter')] == [
        'ASID_x4_summer_demo',
        'ASID_x4_winter_demo',
    ]
    assert options(f'{demo} summer --pre_train one.pt').save == 'ASID_x4_one_summer_demo'
    assert options('--test_only --template ASID_x4 --data_test Set5').save == 'ASID_x4_test'


def test_an_export_of_a_run_has_a_folder_of_its_own(saved):
    assert options(f'--save_dir {saved} --load old --export safetensors').save == 'old_export'
    with pytest.raises(UserError, match='--save old: tests and exports leave the folder of the run as it is'):
        options(f'--save_dir {saved} --load old --export safetensors --save old')


def test_reset_is_for_photographs_too(saved):
    demo = f'--save_dir {saved} --test_only --data_test Demo --dir_demo x --reset'
    assert options(demo).reset
    assert options(f'{demo} --load old').reset


def test_costs_of_several():
    args = options('--costs --model EDSR+ATD-light --scale 2+4')
    assert (cost_models(args), args.scale, args.save) == (['EDSR', 'ATD-light'], [2, 4], 'costs')
    args = options('--costs --model all')
    assert (cost_models(args), args.scale) == (list(MODELS[1:]), 4)


def test_forms_are_for_a_gpu_or_asked_for():
    """By default on CUDA, unless one form is described."""
    asked = {'': False, '--forms bf16': True, '--amp bf16': False, '--growth': False, '--compile': False}
    for text, on_cpu in asked.items():
        args = options(f'--profile {text}')
        assert several_forms(args, 'cpu') == on_cpu
        assert several_forms(args, 'cuda') == (text in ('', '--forms bf16'))


def test_profile_of_several():
    args = options('--profile --growth --model EDSR+ATD-light --scale 2+4 --amp bf16 --compile --channels_last')
    assert (cost_models(args), cost_scales(args), args.save) == (['EDSR', 'ATD-light'], [2, 4], 'profile')
    args = options('--compare old.json --save mine')
    assert (args.compare, args.save, cost_scales(args)) == (Path('old.json').absolute(), 'mine', [4])


def test_recognised_network_settles_the_options():
    args = options('--model auto --pre_train x.pt --test_only --res_scale 0.5')
    assert (args.scale, args.save) == (None, '')
    option.apply_detected_network(args, 'EDSR', 3, {'n_feats': 8})
    assert (args.model, args.scale, args.n_feats, args.res_scale, args.save) == ('EDSR', 3, 8, 0.5, 'EDSR_x3_x_test')


def test_training_takes_weights_to_another_scale():
    args = options('--model auto --pre_train x.pt --scale 4')
    option.apply_detected_network(args, 'EDSR', 2, {})
    assert (args.model, args.scale) == ('EDSR', 4)


def test_tiles_of_a_recipe_can_be_left_out():
    assert options('--template ASID_x4').chop is True
    assert options('--template ASID_x4 --no_chop').chop is False


DEMO = f'--test_only --data_test Demo --dir_demo {Path(__file__).parent}'


@pytest.mark.parametrize(
    ('line', 'chop'),
    [
        (DEMO, 'auto'), (f'{DEMO} --template ASID_x4', 'auto'), (f'{DEMO} --no_chop', False), (f'{DEMO} --chop', True),
        ('--test_only --chop auto', 'auto'), ('--test_only', False), (f'{DEMO} --max_memory 2G', 'auto'),
        (f'{DEMO} --data_test Set5+Demo', False), (f'{DEMO} --data_test Set5+Demo --template ASID_x4', True),
    ],
)  # fmt: skip
def test_tiles_are_automatic_for_photographs_unless_typed(line, chop):
    assert options(line).chop == chop


def test_memory_is_in_units():
    found = [options(f'{DEMO} --max_memory {text}').max_memory for text in ('2G', '700m', '1.5G')]
    assert found == [2**31, 700 * 2**20, 3 * 2**29]


def auto(command: str) -> Namespace:
    return options(f'--model auto --pre_train x.pt {command}')


def test_recognised_network_meets_the_checks_of_any_other():
    with pytest.raises(UserError, match=r'--scale 2: x\.pt holds weights of EDSR x3; leave it out'):
        option.apply_detected_network(auto('--scale 2 --test_only'), 'EDSR', 3, {})
    with pytest.raises(UserError, match='--patch_size 100 is not a multiple of --scale 3'):
        option.apply_detected_network(auto('--patch_size 100'), 'EDSR', 3, {})


@pytest.mark.parametrize(
    'parser, text, value',
    [
        (data_range, '1-800/801-810', ((1, 800), (801, 810))),
        (data_range, '3-3', ((3, 3),)),
        (epochs_list, '200', [200]),
        (epochs_list, '1-2-30', [1, 2, 30]),
        (names, 'Set5', ['Set5']),
        (names, 'Set5+Set14+', ['Set5', 'Set14']),
    ],
)
def test_values(parser, text, value):
    assert parser(text) == value


def test_more_values():
    args = options('--betas 0.5 0.25 --shift_mean False --dilation --gclip 0 --resume -1 --momentum 1')
    assert args.betas == [0.5, 0.25]
    assert args.shift_mean is False
    assert args.dilation is True
    assert parse(['--shift_mean', 'true']).shift_mean is True


COUNTS = """
    scale patch_size chop_size chop_batch n_resgroups n_resblocks n_feats reduction n_clusters window_size n_hashes
    chunk_size epochs test_every batch_size split_batch gan_k print_every n_heads kernel_size group_channels tlc_size
    category_size n_tokens reduced_dim final_epochs pad_to
"""
NATURALS = 'n_threads n_GPUs seed chop_overlap shave warmup save_every restarts'
POSITIVES = 'res_scale rgb_range lr gamma epsilon skip_threshold mlp_ratio'
BAD = [
    *[(name, text) for name in COUNTS.split() for text in ('0', '-1', '1.5', 'many', '')],
    *[(name, text) for name in NATURALS.split() for text in ('-1', '0.5', 'inf')],
    *[(name, text) for name in POSITIVES.split() for text in ('0', '-1', 'nan', 'inf', 'x')],
    ('mlp_ratio', '101'),
    *[(name, text) for name in ('ema_decay', 'momentum', 'drop_path') for text in ('-0.1', '1.1', 'nan')],
    *[(name, text) for name in ('weight_decay', 'gclip', 'clip_norm', 'lr_min') for text in ('-1', 'nan', 'inf')],
    *[('weight_ema', text) for text in ('-1', '1', 'nan')],
    *[('betas', text) for text in ('0.9', '0.9 1', '-0.1 0.9', '0.9 0.99 0.999', '(0.9, 0.99)')],
    *[('data_range', text) for text in ('0-5', '5-1', '5', '1-2-3', '1-2/3-4/5-6', 'all', '')],
    *[('decay', text) for text in ('0', '200-100', '100-100', '1.5', 'never', '')],
    *[(name, text) for name in ('data_train', 'data_test') for text in ('', '+')],
    ('seed', str(2**64)), ('resume', '-2'), ('n_colors', '2'), ('shift_mean', 'maybe'), ('ext', 'npy'),
    ('optimizer', 'Lion'), ('precision', 'double'), ('lr_border', 'wrap'), ('lr', '1e31'),
    ('chop', 'FOLDER'), *[('max_memory', text) for text in ('2', '2K', 'G', '0G', '')],
    ('chop_blend', 'max'), ('scale', '2+'), ('scale', '2+x'),
]  # fmt: skip


@pytest.mark.parametrize('name', ['lr', 'save', 'epochs', 'template', 'data_test', 'patch_schedule', 'help'])
def test_two_dashes_are_no_value(name):
    """Python up to 3.12 takes them for an empty list."""
    with pytest.raises(UserError, match=f'^Argument --{name}: -- is no value; '):
        parse([f'--{name}=--'])


@pytest.mark.parametrize('name', ['pad_to', 'batch_size', 'patch_size', 'patch_schedule', 'n_feats', 'save_every'])
def test_numbers_that_no_library_takes(name):
    with pytest.raises(UserError, match=f'^Argument --{name}: .*is not a '):
        parse([f'--{name}', str(10**20)])


@pytest.mark.parametrize('name', ['dir_demo', 'dir_data', 'save_dir', 'score', 'extend'])
def test_an_empty_path_is_not_the_current_folder(name):
    """As of a variable of the shell that is not set."""
    with pytest.raises(UserError, match=f"^Argument --{name}: '' is not a path"):
        parse([f'--{name}', ''])


def test_a_path_from_a_folder_that_was_deleted(tmp_path, monkeypatch):
    gone = tmp_path / 'gone'
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(UserError, match=r'^photos: the folder that this shell is in was deleted: '):
        parse(['--dir_demo', 'photos'])


@pytest.mark.parametrize('name, text', BAD)
def test_out_of_range(name, text):
    values = text.split(' ') if name == 'betas' else [text]
    with pytest.raises(UserError, match=r'^\S.*\.$') as caught:
        parse([f'--{name}', *values])
    message = str(caught.value)
    assert '\n' not in message
    assert name in message or text == '0.9 0.99 0.999'  # what is one too many is named instead
    assert values[0] in message or values[-1] in message or text in ('0.9', '0.9 1')


@pytest.mark.parametrize(
    'command, words',
    [
        ('--model Foo', ['Foo', *MODELS]),
        ('--nonsense 3', ['--nonsense', '--help']),
        ('--n_feat 3', ['--n_feat', '--n_feats', '--help']),  # no guessing from a beginning, only an offer
        ('--batchsize=3', ['--batchsize', '--batch_size']),
        ('--template Foo', ['Foo', '--template list']),
        ('--template LCOAN_x2', ["'LCOAN_x2'", 'LCoAN_x2', '--template list']),
        ('--template ASID_x4 --scale 2', ['--scale 2', 'ASID x4', '--template ASID_x2']),
        ('--template ASID_x4 --scale 3', ['--scale 3', '--template ASID_x3']),  # not that 3 does not divide 256
        ('--template ASID-finetune_x4 --scale 2', ['--template ASID-finetune_x2']),
        ('--template ASID_x4 --scale 5', ['--scale 5', 'leave --template out']),
        ('--template ASID_x4 --model EDSR', ['--model EDSR', 'ASID x4', '--template EDSR_x4']),
        ('--template ASID_x4 --model EDSR --scale 2', ['--model EDSR', '--template EDSR_x2']),
        ('--template ASID_x4 --model Bicubic --test_only', ['--model Bicubic', 'leave --template out']),
        ('--model ASID --net n_clusters=4', ['--net n_clusters', 'ASID', 'n_feats, n_resgroups, window_size']),
        ('--model Bicubic --net n_feats=4', ['--net n_feats', 'Bicubic', 'no settings']),
        ('--net n_feats=many', ['n_feats', "'many'", 'whole number']),
        ('--net n_feats', ['--net', "'n_feats'", 'n_feats=64']),
        ('--net n_feats=8 --n_feats 16', ['--net n_feats=8', '--n_feats 16']),
        ('--costs --net n_feats=8', ['--n_feats', '--costs']),
        ('--loss L1+0.1*GAN --split_batch 2', ['--split_batch 2', 'GAN', 'whole batches']),
        ('--patch_size 97 --scale 2', ['97', '--scale 2']),
        ('--batch_size 2 --split_batch 3', ['--split_batch 3', '--batch_size 2']),
        ('--chop_overlap 32 --chop_size 32', ['--chop_overlap 32', '--chop_size 32']),
        (f'{DEMO} --chop --max_memory 2G', ['--max_memory', '--chop']),
        ('--test_only --chop auto --max_memory 2G', ['--max_memory', 'Demo']),
        ('--data_test Demo --test_only', ['--dir_demo']),
        ('--data_test Demo --dir_demo .', ['Demo', '--test_only']),
        ('--resume 3', ['--resume 3', '--load']),
        ('--reset --test_only', ['--reset', '--test_only']),
        ('--save a/b', ['a/b', '--save_dir']),
        ('--save ..', ['..', '--save_dir']),
        ('--scale 2+4', ['--scale 2+4', '--costs']),
        ('--model all', ["'all'", *MODELS]),
        ('--model auto', ['--model auto', '--pre_train']),
        ('--costs --model LCoAN+Foo', ["'Foo'", *MODELS]),
        ('--costs --test_only', ['--test_only', '--costs']),
        ('--costs --pre_train x.pt', ['--pre_train', '--costs']),
        ('--costs --template ASID_x4', ['--template', '--costs']),
        ('--costs --n_feats 8', ['--n_feats', '--costs']),
        ('--costs --model auto', ["'auto'"]),
        ('--costs --n_GPUs 2', ['--n_GPUs 2', '--costs']),
        ('--costs --profile', ['--profile', '--costs']),
        ('--costs --compare x.json', ['--compare', '--costs']),
        ('--costs --export onnx', ['--export', '--costs']),
        ('--export onnx --score .', ['--score', '--export']),
        ('--export onnx --test_only', ['--test_only', '--export']),
        ('--export onnx --reset', ['--reset', '--export']),
        ('--export onnx --self_ensemble', ['--self_ensemble', '--export']),
        ('--export tflite', ['--export', 'tflite', 'onnx', 'torchscript', 'safetensors']),
        ('--profile --model Foo', ["'Foo'", *MODELS]),
        ('--profile --pre_train x.pt', ['--pre_train', '--profile']),
        ('--profile --n_feats 8', ['--n_feats', '--profile']),
        ('--compare x.json --test_only', ['--test_only', '--compare']),
        ('--growth', ['--growth', '--profile']),
        ('--forms bf16', ['--forms bf16', '--profile']),
        ('--profile --forms bf16 --compile', ['--compile', '--forms']),
        ('--profile --forms bf16 --amp bf16', ['--amp', '--forms']),
        ('--profile --forms bf16 --growth', ['--growth', '--forms']),
        ('--growth --compare x.json', ['--growth', '--profile']),
        ('--model auto --pre_train x.pt --template ASID_x4', ['--template ASID_x4', 'auto']),
        ('--costs --tf32', ['--tf32', '--costs']),
        ('--lr_min 1e-7', ['--lr_min 1e-07', '--schedule cosine']),
        ('--restarts 2', ['--restarts 2', '--schedule cosine']),
        ('--template PAN_x4 --schedule step', ['--lr_min 1e-07', '--lr_min 0']),
        ('--template PAN_x4 --decay 200-400', ['--decay', '--schedule step']),
        ('--schedule cosine --gamma=0.2', ['--gamma', '--schedule step']),
        ('--final_epochs 5', ['--final_epochs 5', '--loss_final']),
    ],
)
def test_what_cannot_be(command, words):
    with pytest.raises(UserError) as caught:
        options(command)
    message = str(caught.value)
    assert '\n' not in message
    assert [word for word in words if word not in message] == []


def test_config_round_trip(tmp_path):
    args = options(f'{TRAIN_X4} --betas 0.8 0.99 --dilation --shift_mean False --dir_demo photos')
    path = tmp_path / 'config.txt'
    path.write_text(write_config(args))
    expected = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    assert read_config(path) == expected


def test_config_is_one_option_a_line():
    lines = write_config(parse([])).splitlines()
    pairs = dict(line.split(': ', 1) for line in lines)
    assert set(pairs) == ALL
    assert json.loads(pairs['betas']) == [0.9, 0.999]


@pytest.mark.parametrize(
    'content',
    [
        None,
        b'',
        b'\xff\xfe\x00garbage',
        b'2024-01-01-12:00:00\n\ndebug: False\ntemplate: .\nmodel: EDSR\nscale: [2]\n',  # as EDSR writes it
        b'scale: 2\n',
        b'model: "EDSR"\nscale: {\n',
    ],
)
def test_config_of_another_program(tmp_path, content):
    (tmp_path / 'run').mkdir()
    if content is not None:
        (tmp_path / 'run' / 'config.txt').write_bytes(content)
    with pytest.raises(UserError, match='run is not a run of this program'):
        options(f'--save_dir {tmp_path} --load run')


def test_load_names_the_runs_there_are(saved):
    with pytest.raises(UserError, match=r'No run at .*other: the runs there are old\.'):
        options(f'--save_dir {saved} --load other')


def test_settings_left_out_are_left_to_the_network():
    assert option.network_settings(parse([])) == {}
    given = option.network_settings(options('--n_feats 8 --shift_mean False --res_scale 0.5'))
    assert given == {'n_feats': 8, 'shift_mean': False, 'res_scale': 0.5}


def test_net_is_another_way_to_give_a_setting():
    args = options('--model LCoAN --net n_feats=64 --net window_size=16 --net shift_mean=false --net dilation=True')
    assert (args.n_feats, args.window_size, args.shift_mean, args.dilation, args.net) == (64, 16, False, True, [])
    assert options('--template LCoAN-small_x2 --net n_feats=8').n_feats == 8  # typed before the recipe
    assert options('--net n_feats=8 --net n_feats=16').n_feats == 16
    assert options('--dilation --model EDSR').dilation is True


@pytest.fixture
def new_network(monkeypatch):
    """A network with settings that have no option of their own."""
    settings = {'depth': 3, 'rate': 0.5, 'mode': 'a', 'wide': False, 'side': None}
    monkeypatch.setitem(networks.TABLE, 'ASID', {'scales': [2], 'settings': settings})


def test_net_reaches_settings_without_an_option(new_network, tmp_path):
    line = '--model ASID --net depth=4 --net rate=1 --net mode=b --net wide=True --net side=7'
    found = option.network_settings(options(line))
    assert found == {'depth': 4, 'rate': 1.0, 'mode': 'b', 'wide': True, 'side': 7}
    assert [type(value) for value in found.values()] == [int, float, str, bool, int]
    (tmp_path / 'old').mkdir()
    (tmp_path / 'old' / 'config.txt').write_text(write_config(options(line), found))
    assert option.network_settings(options(f'--save_dir {tmp_path} --load old')) == found
    with pytest.raises(UserError, match=r'--net .*the run old has net .*cannot change'):
        options(f'--save_dir {tmp_path} --load old --net depth=5')


@pytest.mark.parametrize('text', ['depth=1.5', 'rate=x', 'wide=1', 'side=x', 'n_feats=4'])
def test_what_is_no_value_of_a_setting(new_network, text):
    with pytest.raises(UserError, match=rf'^--net {text.partition("=")[0]}.*\.$'):
        options(f'--model ASID --net {text}')


def test_recognised_weights_may_show_settings_without_an_option(new_network):
    args = options('--model auto --pre_train x.pt --test_only')
    option.apply_detected_network(args, 'ASID', 2, {'depth': 4})
    assert option.network_settings(args) == {'depth': 4}


def test_how_a_setting_is_typed(new_network):
    for name, value in (('n_feats', 64), ('res_scale', 1.0), ('shift_mean', False), ('depth', 4), ('wide', True)):
        typed = setting_option(name, value).split()
        assert option.network_settings(parse(['--model', 'ASID', *typed])) == {name: value}
    sizes = {'mode': '2-2'}
    for typed in ('', ' --net mode=2-2'):
        args = options(f'--model auto --pre_train x.pt --test_only{typed}')
        option.apply_detected_network(args, 'ASID', 2, sizes)
        assert option.network_settings(args) == sizes


def test_a_run_from_before_net_is_continued(saved):
    path = saved / 'old' / 'config.txt'
    path.write_text(''.join(line for line in path.read_text().splitlines(True) if not line.startswith('net:')))
    assert options(f'--save_dir {saved} --load old').net == []


def test_list_of_recipes(capsys):
    with pytest.raises(SystemExit) as left:
        options('--template list')
    assert left.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(TEMPLATES)
    (atd,) = (line for line in lines if line.startswith('ATD_x4 '))
    assert 'ATD x4 on DIV2K+Flickr2K: 250 epochs of 1000 batches of 32, HR patches of 384' in atd
    assert atd.endswith(', from ATD-finetune_x2.pt')


def test_training_without_a_recipe_names_it():
    assert "EDSR's defaults; --template LCoAN_x2 trains as published." in option.recipe_note(options('--scale 2'))
    assert 'there is none named EDSR_x8' in option.recipe_note(options('--model EDSR --scale 8'))


def test_an_export_takes_nothing_from_how_networks_are_run():
    args = options('--export onnx --model EDSR --compile --precision half --n_GPUs 2')
    assert (args.cpu, args.compile, args.precision, args.n_GPUs) == (True, False, 'single', 1)
