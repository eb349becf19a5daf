"""The option set: EDSR's and LCoAN's options under their old names, and a few of our own."""

import argparse
import difflib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import networks
from error import UserError
from loss_language import find_whole_batches, list_names
from networks import MODELS
from template import TEMPLATES, Recipe

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = """examples:
  score bicubic on photographs that come with scikit-image
    python main.py --model Bicubic --test_only --data_test Sample
  enlarge a folder of images
    python main.py --template ASID_x4 --pre_train ASID_x4.pt --test_only --data_test Demo --dir_demo FOLDER
  train the LCoAN of the paper, continue it, and test it
    python main.py --template LCoAN_x2 --dir_data /data --save LCoAN_x2
    python main.py --load LCoAN_x2
    python main.py --load LCoAN_x2 --test_only
"""

NOT_RESTORED = ('load', 'save', 'save_dir', 'resume', 'reset', 'debug', 'template', 'test_only', 'pre_train', 'score')
ONE_FORM = ('compile', 'channels_last', 'amp', 'growth')  # which --forms excludes


Group = argparse._ArgumentGroup


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Adds the default to an option's help where there is one to speak of; keeps the lines of the examples."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        silent = action.default is None or action.default is False or action.default in ('', [])
        if silent or 'default:' in (action.help or ''):
            return action.help
        if isinstance(action.default, list):
            return f'{action.help} (default: {" ".join(map(str, action.default))})'
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """A parser of one of the programs, whose complaints are one sentence."""

    def __init__(self, prog: str, description: str, usage: str = '[options]', epilog: str | None = None) -> None:
        super().__init__(
            prog, f'python {prog} {usage}', description, epilog, formatter_class=Formatter, allow_abbrev=False
        )

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As in the base class, but an unknown option is answered with those of a similar name."""
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            first = next((word for word in unknown if word.startswith('-')), unknown[0])
            self.error(f'unknown option {first}{self._similar(first)}')
        return found

    def _similar(self, word: str) -> str:
        name = word.partition('=')[0]
        near = difflib.get_close_matches(name, self._option_string_actions, 3, 0.75)
        return f', similar to {" and ".join(near)}' if near else ''

    def error(self, message: str) -> NoReturn:
        raise UserError(f'{message[0].upper()}{message[1:]}; {self.prog} --help lists the options.')


def number(kind: type, low: float, high: float = float('inf'), open_low: bool = False) -> Callable[[str], float]:
    """Type of an option: a finite number in [low, high], or (low, high] if `open_low`."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = None
        fits = value is not None and abs(value) < float('inf') and value <= high
        if not fits or not (low < value if open_low else low <= value):
            what = 'a whole number' if kind is int else 'a number'
            bound = f'above {low:g}' if open_low else f'of {low:g} or more'
            bound += '' if high == float('inf') else f', at most {high:g}'
            raise argparse.ArgumentTypeError(f'{text!r} is not {what} {bound}')
        return value

    return parse


count = number(int, 1)
natural = number(int, 0)
positive = number(float, 0, 1e30, open_low=True)
fraction = number(float, 0, 1)


def truth(text: str) -> bool:
    """'True' or 'False', as EDSR writes them."""
    if text.lower() not in ('true', 'false'):
        raise argparse.ArgumentTypeError(f'{text!r} is neither True nor False')
    return text.lower() == 'true'


def automatic(text: str) -> str:
    """'auto'."""
    if text != 'auto':
        raise argparse.ArgumentTypeError(f'{text!r} is not auto; --chop alone takes tiles of --chop_size')
    return text


def memory_size(text: str) -> int:
    """Bytes, from a number with the unit M or G (2**20, 2**30)."""
    units = {'M': 2**20, 'G': 2**30}
    try:
        return int(positive(text[:-1]) * units[text[-1:].upper()])
    except (KeyError, argparse.ArgumentTypeError) as error:
        raise argparse.ArgumentTypeError(f'{text!r} is not an amount of memory such as 2G or 700M') from error


def names(text: str) -> list[str]:
    """Sets joined by '+', or one path to a folder; paths are made absolute."""
    found = [text] if Path(text).is_dir() and os.sep in text else [name for name in text.split('+') if name]
    if not found:
        raise argparse.ArgumentTypeError(f'{text!r} names no set')
    return [str(folder(name)) if os.sep in name or '/' in name else name for name in found]


def scales(text: str) -> int | list[int]:
    """One factor, or several joined by '+'."""
    try:
        factors = [int(count(part)) for part in text.split('+')]
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f'{text!r} is not a factor such as 4, or several such as 2+3+4') from error
    return factors[0] if len(factors) == 1 else factors


def assignment(text: str) -> str:
    """'name=value'."""
    if not re.fullmatch(r'\w+=.+', text):
        raise argparse.ArgumentTypeError(f'{text!r} is not a setting and its value such as n_feats=64')
    return text


def epochs_list(text: str) -> list[int]:
    """Increasing epochs joined by '-'."""
    try:
        values = [int(part) for part in text.split('-')]
    except ValueError:
        values = []
    if not values or values[0] < 1 or values != sorted(set(values)):
        raise argparse.ArgumentTypeError(f'{text!r} is not a list of rising epochs such as 200-400')
    return values


def data_range(text: str) -> tuple[tuple[int, int], ...]:
    """'first-last' or 'first-last/first-last', counted from 1."""
    try:
        spans = tuple((int(first), int(last)) for first, last in (part.split('-') for part in text.split('/')))
    except ValueError:
        spans = ()
    if len(spans) not in (1, 2) or any(not 1 <= first <= last for first, last in spans):
        raise argparse.ArgumentTypeError(f'{text!r} is not a range of images such as 1-800/801-810')
    return spans


def folder(text: str) -> Path:
    """A path, made absolute so that a run can be continued from anywhere."""
    return Path(text).expanduser().absolute()


COUNT: dict[str, Any] = {'metavar': 'N', 'type': count}
POSITIVE: dict[str, Any] = {'metavar': 'X', 'type': positive}
TRUTH: dict[str, Any] = {'metavar': 'True|False', 'type': truth}

# The settings of networks that have an option of their own: its help, and how it is read.
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    'n_resgroups': ('groups of blocks', COUNT),
    'n_resblocks': ('blocks a group, or in all where there are no groups', COUNT),
    'n_feats': ('feature channels', COUNT),
    'reduction': ('divisor of n_feats: channels of the matching embedding, in RCAN of the channel attention', COUNT),
    'n_clusters': ('k-means clusters', COUNT),
    'window_size': ('window of the attention: clustered pixels in LCoAN, pixels a side in others', COUNT),
    'ema_decay': ('decay a step of the moving average of the centroids', {'metavar': 'X', 'type': fraction}),
    'n_hashes': ('rounds of clustering or hashing', COUNT),
    'chunk_size': ('window of hashed attention, pixels', COUNT),
    'res_scale': ('factor of residual branches', POSITIVE),
    'act': ('activation: relu, leaky_relu, prelu, gelu, silu', {'metavar': 'NAME'}),
    'dilation': (
        'dilate the convolutions of the residual blocks by 2',
        {'metavar': 'True|False', 'type': truth, 'nargs': '?', 'const': True},
    ),
    'n_heads': ('attention heads', COUNT),
    'mlp_ratio': (
        'channels inside the feed-forward networks, times n_feats',
        {'metavar': 'X', 'type': number(float, 0, 100, open_low=True)},
    ),
    'kernel_size': ('side of the dynamic or depthwise kernels', COUNT),
    'group_channels': ('channels that share a dynamic kernel', COUNT),
    'tlc_size': ('window of the channel attention in tests, pixels a side; 96 / 72 / 48 at x2 / x3 / x4', COUNT),
    'category_size': ('pixels a group of one category', COUNT),
    'n_tokens': ('tokens of the dictionary', COUNT),
    'reduced_dim': ('channels of queries and keys of the dictionary', COUNT),
    'direct_upsampler': ('one convolution to all pixels of the output', TRUTH),
    'drop_path': ('largest rate of stochastic depth in training', {'metavar': 'X', 'type': fraction}),
    'rgb_range': ('value of white inside the network', POSITIVE),
    'n_colors': ('3: RGB; 1: luma, with the colour enlarged by bicubic', {'type': count, 'choices': (1, 3)}),
    'shift_mean': ('subtract the mean colour of DIV2K', TRUTH),
}
NETWORK_SETTINGS = tuple(SETTINGS)  # left out, these are as in the network's paper
FIXED_IN_A_RUN = ('model', 'scale', 'optimizer', 'net', *NETWORK_SETTINGS)


def build_parser() -> Parser:
    """All options, in groups, with their defaults and units: first what to do, then with what and how."""
    parser = Parser(
        prog='main.py',
        description='FrugalSR: train, test and use super-resolution networks.',
        epilog=EXAMPLES,
    )
    for title, add in GROUPS.items():
        add(parser.add_argument_group(title))
    return parser


def _add_train(g: Group) -> None:
    g.add_argument(
        '--template',
        default='',
        metavar='NAME',
        help='recipe that sets defaults, such as ASID_x4; list: print all of them',
    )
    g.add_argument('--load', default='', metavar='NAME', help='run to continue or to test, with its options')
    g.add_argument(
        '--resume',
        type=number(int, -1),
        default=-1,
        metavar='EPOCH',
        help='with --load: from the weights of this epoch (kept by --save_models); -1 or 0: the latest state',
    )
    g.add_argument('--reset', action='store_true', help='delete what an earlier run of this name left, and start over')
    g.add_argument('--epochs', metavar='N', type=count, default=300, help='epochs to train for')
    g.add_argument(
        '--max_time',
        metavar='SECONDS',
        type=positive,
        help='end training after so many seconds as SIGTERM does: in good order and saved, for --load to continue',
    )
    g.add_argument('--test_every', metavar='N', type=count, default=1000, help='batches an epoch; a test follows each')
    g.add_argument('--ssim', action='store_true', help='measure SSIM in the tests during training too')
    g.add_argument('--save_models', action='store_true', help='keep the weights of every epoch')
    g.add_argument(
        '--save_every',
        metavar='N',
        type=natural,
        default=0,
        help='batches between states saved within an epoch, for --load after a crash; 0: only after each epoch',
    )


def _add_test(g: Group) -> None:
    g.add_argument('--test_only', action='store_true', help='test, do not train')
    g.add_argument('--self_ensemble', action='store_true', help='average over the eight flips and rotations')
    g.add_argument(
        '--shave',
        metavar='N',
        type=natural,
        help='pixels left out of the scores at each border (default: the scale; 6 more on DIV2K and Flickr2K)',
    )
    g.add_argument(
        '--precision',
        choices=('single', 'half'),
        default='single',
        help='of the network in tests; half: float16, on a CPU bfloat16',
    )
    g.add_argument('--save_results', action='store_true', help='save the enlarged images')
    g.add_argument('--save_gt', action='store_true', help='save LR and HR beside them (and with it the enlarged ones)')
    g.add_argument(
        '--show_attention',
        action='store_true',
        help='in tests of LCoAN and ATD: save its clusters or categories as colours over the first images of each set '
        '(and with it the enlarged ones)',
    )
    g.add_argument(
        '--dir_demo', metavar='FOLDER', type=folder, help='folder of the images that --data_test Demo enlarges'
    )
    g.add_argument(
        '--max_memory',
        metavar='N',
        type=memory_size,
        help='with --data_test Demo: most memory of a process on a CPU, or of the GPU, such as 2G or 700M',
    )
    g.add_argument(
        '--chop',
        nargs='?',
        const=True,
        type=automatic,
        metavar='auto',
        help='enlarge in tiles, for small memories; auto: as large as memory allows (default: as the recipe says, or '
        'for Demo alone auto)',
    )
    g.add_argument(
        '--no_chop', action='store_false', dest='chop', default=None, help='whole images, where a recipe says tiles'
    )
    g.add_argument('--chop_size', metavar='N', type=count, default=192, help='largest side of a tile, LR pixels')
    g.add_argument(
        '--chop_overlap', metavar='N', type=natural, default=20, help='overlap of neighbouring tiles, LR pixels'
    )
    g.add_argument('--chop_batch', metavar='N', type=count, default=4, help='tiles a call')
    g.add_argument(
        '--chop_blend',
        choices=('ramp', 'mean'),
        default='ramp',
        help='where tiles overlap: a short cross-fade of equal tiles, or the plain mean of tiles of exactly chop_size',
    )


def _add_score(g: Group) -> None:
    g.add_argument('--score', type=folder, metavar='FOLDER', help='score the images in this folder, whatever made them')


def _add_export(g: Group) -> None:
    g.add_argument(
        '--export',
        choices=('onnx', 'torchscript', 'safetensors'),
        help='write the network as a file for other programs, from RGB in [0, 1] to RGB in [0, 1], or its weights; one '
        'that cannot take every size takes squares of chop_size',
    )


def _add_measure(g: Group) -> None:
    g.add_argument(
        '--costs',
        action='store_true',
        help='print parameters, multiply-adds, latency and memory of networks beside the published ones',
    )
    g.add_argument(
        '--profile',
        action='store_true',
        help="measure how near networks come to this machine's arithmetic, as they run with --compile, --channels_last "
        'and --amp: latency, memory, time by kind of operation, training step',
    )
    g.add_argument(
        '--forms',
        metavar='FORMS',
        help='with --profile: measure forms of running beside each other, in one process; forms joined by +, each of '
        'float32, tf32, bf16, fp16, channels_last, compiled and graph (a CUDA graph) joined by -; training at the '
        'first scale alone (default: on a GPU of NVIDIA float32+tf32+bf16+graph+bf16-graph, unless --compile, '
        '--channels_last, --amp or --growth are given)',
    )
    g.add_argument(
        '--growth',
        action='store_true',
        help='with --profile: also time and memory of LR squares of 64 to 1024 pixels a side',
    )
    g.add_argument(
        '--compare',
        metavar='FILE',
        type=folder,
        help='an older profile.json to compare with what --profile measures, or without it with the one in the run '
        'folder',
    )


def _add_data(g: Group) -> None:
    g.add_argument(
        '--dir_data', metavar='FOLDER', type=folder, default=ROOT / 'dataset', help='folder of the image sets'
    )
    g.add_argument(
        '--data_train',
        type=names,
        default='DIV2K',
        metavar='SETS',
        help='training sets joined by +, or a path to a folder of HR images',
    )
    g.add_argument(
        '--data_test',
        type=names,
        default='Set5',
        metavar='SETS',
        help='test sets joined by +: Set5 Set14 B100 Urban100 Manga109 DIV2K Flickr2K Sample Demo, or a path',
    )
    g.add_argument(
        '--data_range',
        metavar='TRAIN/TEST',
        type=data_range,
        default='1-800/801-810',
        help='images of DIV2K to train / to test on, counted from 1',
    )
    g.add_argument(
        '--scale',
        metavar='N',
        type=scales,
        help='factor of enlargement (default: 4, or that of the weights with --model auto); with --costs or '
        '--profile also 2+3+4',
    )
    g.add_argument('--patch_size', metavar='N', type=count, default=192, help='side of the HR training patch, pixels')
    g.add_argument(
        '--sampling',
        choices=('image', 'area'),
        default='image',
        help='of training patches: every image equally often, as in all papers, or as often as it has pixels',
    )
    g.add_argument(
        '--lr_border',
        choices=('mirror', 'clamp'),
        default='mirror',
        help='border of the bicubic that makes missing LR: mirror as in the files of EDSR, clamp as in those of RCAN',
    )
    g.add_argument(
        '--ext',
        choices=('sep', 'sep_reset', 'img'),
        default='sep',
        help='training images: keep decoded copies, make them anew, or decode each time',
    )
    g.add_argument(
        '--skip_bad_images',
        action='store_true',
        help='train without images that cannot be read, count them, and let the next image take their place',
    )
    g.add_argument('--no_augment', action='store_true', help='no flips and rotations of training patches')


def _add_network(g: Group) -> None:
    g.add_argument(
        '--model',
        default='LCoAN',
        metavar='NAME',
        help=f'{", ".join(MODELS)}; auto: what the file given with --pre_train holds; with --costs or --profile also '
        'all, or names joined by +',
    )
    g.add_argument(
        '--pre_train',
        default='',
        metavar='FILE',
        help='weights to start from, or to test (default: in training those that the recipe starts from)',
    )
    g.add_argument(
        '--extend',
        metavar='FOLDER',
        type=folder,
        default=ROOT / 'models',
        help='folder in which --pre_train is looked up when it is not a path from here',
    )
    g.add_argument(
        '--net',
        metavar='NAME=VALUE',
        type=assignment,
        action='append',
        default=[],
        help='any setting of the network, also one that has no option of its own here; may be given several times '
        "(default: as in the network's paper, which holds for those below too)",
    )
    for name, (help_text, keywords) in SETTINGS.items():
        values = networks.defaults(name)
        g.add_argument(f'--{name}', help=f'{help_text} (default: {values})', **keywords)


def _add_hardware(g: Group) -> None:
    g.add_argument('--cpu', action='store_true', help='use the CPU even if there is a GPU')
    g.add_argument(
        '--n_GPUs',
        metavar='N',
        type=natural,
        default=1,
        help='GPUs of this host to use, a process each, or with --cpu processes; 0: the CPU',
    )
    g.add_argument(
        '--n_threads',
        metavar='N',
        type=natural,
        default=min(6, os.cpu_count() or 1),
        help='processes that load data (default: as many as there are cores, at most 6)',
    )
    g.add_argument(
        '--compile', action='store_true', help='run the network through torch.compile; on a CPU most are slower so'
    )
    g.add_argument('--channels_last', action='store_true', help='keep weights and images in channels_last memory')
    g.add_argument(
        '--graph',
        action='store_const',
        const=True,
        help='on CUDA: a training step as one CUDA graph (default: where that can be), and in tests tiles of one '
        'shape as one, with --chop',
    )
    g.add_argument('--no_graph', action='store_const', const=False, dest='graph', help='no CUDA graphs')
    g.add_argument(
        '--amp',
        choices=('off', 'bf16', 'fp16'),
        default='off',
        help='mixed precision in training; where a network does not support float16 it is bf16, or none',
    )
    g.add_argument(
        '--checkpointing', action='store_true', help='compute activations again for the gradients, to save memory'
    )
    g.add_argument('--tf32', action='store_true', help='on a GPU: float32 products in TensorFloat-32, faster, 10 bits')
    g.add_argument(
        '--deterministic',
        action='store_true',
        help='on a GPU: the same bits in every run, which costs time; on a CPU always so',
    )
    g.add_argument(
        '--seed', metavar='N', type=number(int, 0, 2**63 - 1), default=1, help='of everything that is random'
    )


def _add_optimisation(g: Group) -> None:
    g.add_argument('--batch_size', metavar='N', type=count, default=16, help='patches a step')
    g.add_argument(
        '--split_batch',
        metavar='N',
        type=count,
        default=1,
        help='gradient accumulation: parts of a batch, computed one after the other',
    )
    g.add_argument(
        '--loss',
        metavar='TERMS',
        default='1*L1',
        help=f'weight*NAME joined by +; NAME is {list_names()}',
    )
    g.add_argument(
        '--gan_k',
        metavar='N',
        type=count,
        default=1,
        help='steps of the discriminator a step of the network, with the losses GAN, WGAN_GP and RGAN',
    )
    g.add_argument(
        '--vgg',
        metavar='FILE',
        type=folder,
        help="weights of VGG19 for VGG22 and VGG54: torchvision's vgg19-dcbb9e9d.pth (default: torchvision has it)",
    )
    g.add_argument('--optimizer', choices=('SGD', 'ADAM', 'ADAMW', 'RMSprop'), default='ADAM', help='optimiser')
    g.add_argument('--lr', metavar='X', type=positive, default=1e-4, help='learning rate')
    g.add_argument(
        '--schedule',
        choices=('step', 'cosine'),
        default='step',
        help='of the learning rate: a factor gamma at each decay, or half a cosine down to lr_min',
    )
    g.add_argument(
        '--decay',
        type=epochs_list,
        default='200',
        metavar='E-E-...',
        help='epochs, or steps, after which the rate is multiplied by gamma',
    )
    g.add_argument(
        '--decay_unit', choices=('epochs', 'steps'), default='epochs', help='what decay and the cosine are counted in'
    )
    g.add_argument('--gamma', metavar='X', type=positive, default=0.5, help='factor of the decay')
    g.add_argument(
        '--lr_min', metavar='X', type=number(float, 0), default=0.0, help='learning rate at the end of the cosine'
    )
    g.add_argument(
        '--restarts',
        metavar='N',
        type=natural,
        default=0,
        help='times that the cosine begins again at the full rate, at equal distances',
    )
    g.add_argument(
        '--warmup', metavar='N', type=natural, default=0, help='steps over which the rate rises linearly to its value'
    )
    g.add_argument('--momentum', metavar='X', type=fraction, default=0.9, help='of SGD')
    g.add_argument(
        '--betas',
        metavar=('B1', 'B2'),
        type=number(float, 0, 0.999999),
        nargs=2,
        default=[0.9, 0.999],
        help='of ADAM and ADAMW',
    )
    g.add_argument('--epsilon', metavar='X', type=positive, default=1e-8, help='of ADAM, ADAMW and RMSprop')
    g.add_argument(
        '--weight_decay', metavar='X', type=number(float, 0), default=0.0, help='pull of the weights towards 0'
    )
    g.add_argument(
        '--gclip',
        metavar='X',
        type=number(float, 0),
        default=0.0,
        help='gradients are clipped to +-gclip; 0: not at all',
    )
    g.add_argument(
        '--clip_norm',
        metavar='X',
        type=number(float, 0),
        default=0.0,
        help='gradients together are scaled down to this Euclidean norm; 0: not at all',
    )
    g.add_argument(
        '--weight_ema',
        metavar='X',
        type=number(float, 0, 0.999999),
        default=0.0,
        help='decay a step of the moving average of the weights, which is then tested and saved; 0: no average',
    )
    g.add_argument(
        '--skip_threshold',
        metavar='X',
        type=positive,
        default='1e8',
        help='a batch is skipped if its loss exceeds this times that of the last epoch',
    )


def _add_run_folder(g: Group) -> None:
    g.add_argument('--save_dir', metavar='FOLDER', type=folder, default=ROOT / 'experiment', help='folder of the runs')
    g.add_argument(
        '--save',
        default='',
        metavar='NAME',
        help="name of the run (default: recipe, loaded run or <model>_x<scale>; in tests with the weights' name and "
        '_test)',
    )
    g.add_argument('--print_every', metavar='N', type=count, default=100, help='batches between lines in the log')
    g.add_argument('--debug', action='store_true', help='show the traceback of an error')


GROUPS: dict[str, Callable[[Group], None]] = {
    'train (which the program does unless told otherwise)': _add_train,
    'test': _add_test,
    'score': _add_score,
    'export': _add_export,
    'measure': _add_measure,
    'data': _add_data,
    'network': _add_network,
    'hardware': _add_hardware,
    'optimisation': _add_optimisation,
    'run folder': _add_run_folder,
}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Options of a command line: what is typed, else what the loaded run had, else the recipe's, else the default.

    Raises:
        UserError: unknown option, value out of range, unknown recipe, or a combination that cannot be.
    """
    parser = build_parser()
    typed = args = parser.parse_args(argv)
    if args.template == 'list':
        print(recipes(parser))
        parser.exit()
    if args.template:
        parser.set_defaults(**_recipe(args))
    saved: dict[str, Any] = {}
    if args.load:
        saved = {'net': [], **read_config(args.save_dir / args.load / 'config.txt')}
        for key, value in saved.items():
            if key in args and key not in NOT_RESTORED:  # numbers as text, to be checked like typed ones
                parser.set_defaults(**{key: str(value) if type(value) in (int, float) else value})
    chop = args.chop
    args = parser.parse_args(argv)
    _apply_net(parser, args, typed)
    if chop is None and args.data_test == ['Demo']:
        args.chop = 'auto'
    args.chop = args.chop or False
    if args.scale is None and args.model != 'auto':
        args.scale = 4
    if args.export:
        for option in ('score', 'test_only', 'reset', 'self_ensemble'):
            if getattr(args, option):
                raise UserError(f'--{option}: --export only writes a network as a file; leave it out.')
        args.test_only, args.n_GPUs = True, 1
        args.cpu, args.compile, args.precision = True, False, 'single'  # a file does not depend on these
    _check(args)
    for key in FIXED_IN_A_RUN:
        if saved and getattr(args, key) != saved.get(key):
            raise UserError(
                f'--{key} {getattr(args, key)}: the run {args.load} has {key} {saved.get(key)}, '
                'which cannot change in a run; leave it out, or start another run.'
            )
    args.save_results |= args.save_gt or args.show_attention
    if args.model != 'auto':
        network_settings(args)  # which complains
        args.save = args.save or _default_name(args)
    return args


def apply_detected_network(
    args: argparse.Namespace, name: str, scale: int, shown: Mapping[str, object], settings: Mapping[str, object]
) -> None:
    """Put the network that --model auto found into the options.

    Args:
        args: what was typed; settings that weights do not show stay, and in training so does the scale.
        name: of the network.
        scale: of the weights.
        shown: settings that the weights show.
        settings: those of them that are not as in the paper.

    Raises:
        UserError: the options do not go with it.
    """
    if args.test_only and args.scale not in (None, scale):
        raise UserError(f'--scale {args.scale}: {args.pre_train} holds weights of {name} x{scale}; leave it out.')
    given = network_settings(args, name)
    for key, value in shown.items():
        if (typed := given.get(key)) not in (None, value):
            raise UserError(f'--{key} {typed}: {args.pre_train} holds weights of {name} with {value}; leave it out.')
    args.model, args.scale = name, args.scale or scale
    for key, value in settings.items():
        if key in SETTINGS:
            setattr(args, key, value)
        else:
            args.net.append(f'{key}={value}')
    _check(args)
    args.save = args.save or _default_name(args)


def continue_run(args: argparse.Namespace) -> None:
    """Have a run that was started anew by its launcher go on from its own last state."""
    args.load, args.resume, args.reset = args.save, -1, False


def _default_name(args: argparse.Namespace) -> str:
    """Name of a run that was given none; a test never writes into the folder of a training run."""
    if args.score:
        return f'{args.score.name}_score'
    if args.costs:
        return 'costs'
    if args.profile or args.compare:
        return 'profile'
    name = args.load or args.template or f'{args.model}_x{args.scale}'
    if args.export:
        return args.load or f'{name}_export'
    if not args.test_only:
        return name
    weights = _weights_name(Path(args.pre_train))
    return f'{name}_test' if weights in ('', name) else f'{name}_{weights}_test'


def _weights_name(path: Path) -> str:
    """What to call a file of weights: its stem, after the name of the run whose folder it is in."""
    run = path.parent.parent.name if path.parent.name == 'model' else ''
    return f'{run}_{path.stem}' if run else path.stem


def _recipe(args: argparse.Namespace) -> Recipe:
    """The recipe that --template names; what weights it starts from counts in training alone.

    Raises:
        UserError: there is none of that name.
    """
    if args.template not in TEMPLATES:
        near = difflib.get_close_matches(args.template, TEMPLATES, 3)
        similar = f'; similar are {", ".join(near)}' if near else ''
        raise UserError(f'Unknown template {args.template!r}{similar}; --template list names all recipes.')
    recipe = TEMPLATES[args.template]
    training = not (args.test_only or args.score or args.export)
    return {key: value for key, value in recipe.items() if key != 'pre_train' or training}


def _check_recipe(args: argparse.Namespace) -> None:
    """Refuse another network or scale than that of the recipe."""
    recipe = TEMPLATES[args.template]
    wrong = next((key for key in ('model', 'scale') if getattr(args, key) != recipe[key]), None)
    if not wrong:
        return
    same = f'{args.template.rpartition("_x")[0]}_x{args.scale}'  # the family of the recipe at another scale
    own = same if wrong == 'scale' else f'{args.model}_x{args.scale}'
    instead = f'give --template {own} instead' if own in TEMPLATES else 'leave --template out'
    raise UserError(
        f'--{wrong} {getattr(args, wrong)}: the recipe {args.template} is for {recipe["model"]} x{recipe["scale"]}; '
        f'{instead}.'
    )


def recipe_note(args: argparse.Namespace) -> str:
    """What to know of a training run for which no recipe was named."""
    own = f'{args.model}_x{args.scale}'
    there_is = f'--template {own} trains as published' if own in TEMPLATES else f'there is none named {own}'
    return f"No recipe: what is not given is as EDSR's defaults; {there_is}."


def recipes(parser: Parser) -> str:
    """A line for each recipe: network and scale, data, length, and what weights it starts from."""
    lines = []
    for name, recipe in TEMPLATES.items():
        steps, batch, epochs, patch, start = (
            recipe.get(key, parser.get_default(key))
            for key in ('test_every', 'batch_size', 'epochs', 'patch_size', 'pre_train')
        )
        line = (
            f'{name:<22}{recipe["model"]} x{recipe["scale"]} on {"+".join(recipe["data_train"])}: {epochs} epochs of '
            f'{steps} batches of {batch}, HR patches of {patch}'
        )
        lines.append(line + (f', from {start}' if start else ''))
    return '\n'.join(lines)


def _apply_net(parser: Parser, args: argparse.Namespace, typed: argparse.Namespace) -> None:
    """Take the settings of --net that have an option of their own as that option; `typed` is the command line alone."""
    others = []
    for text in args.net:
        name, _, value = text.partition('=')
        if args.model in MODELS:
            networks.check_setting(args.model, name)
        if name not in SETTINGS:
            others.append(text)
            continue
        found = getattr(parser.parse_args([f'--{name}={value}']), name)
        if getattr(typed, name) not in (None, found):
            raise UserError(f'--net {text}: --{name} {getattr(typed, name)} says otherwise; give one of them.')
        setattr(args, name, found)
    args.net = others


def cost_models(args: argparse.Namespace) -> list[str]:
    """The networks of --costs or --profile: one, several joined by +, or all that have weights."""
    return [name for name in MODELS if name != 'Bicubic'] if args.model == 'all' else args.model.split('+')


def several_forms(args: argparse.Namespace, device: str) -> bool:
    """Whether --profile measures forms of running beside each other: where they are given, else on a GPU of NVIDIA."""
    return bool(args.forms) or (device == 'cuda' and all(getattr(args, key) in (False, 'off') for key in ONE_FORM))


def cost_scales(args: argparse.Namespace) -> list[int]:
    """The scales of --costs or --profile."""
    return args.scale if isinstance(args.scale, list) else [args.scale]


def network_settings(args: argparse.Namespace, model: str | None = None) -> dict[str, object]:
    """The network settings that were given, of `model` if that is not yet known; others are as in its paper.

    Raises:
        UserError: --net names one that the network does not have, or gives a value of another type.
    """
    given = {key: value for key in NETWORK_SETTINGS if (value := getattr(args, key)) is not None}
    return given | networks.parse_settings(model or args.model, args.net)


def write_config(args: argparse.Namespace, settings: Mapping[str, object] = MappingProxyType({})) -> str:
    """The text of config.txt: one `option: value` a line, the value as JSON; `settings` are those of the network."""
    lines = (f'{key}: {json.dumps(value, default=str)}' for key, value in sorted({**vars(args), **settings}.items()))
    return '\n'.join(lines) + '\n'


def changed(args: argparse.Namespace) -> list[str]:
    """The options that are not at their default, whether typed, of a recipe or of a loaded run."""
    default = vars(parse([]))
    return [key for key, value in vars(args).items() if value != default[key]]


def read_config(path: Path) -> dict[str, object]:
    """The options in a config.txt.

    Raises:
        UserError: no such file, or not one that this program wrote.
    """
    if not path.parent.is_dir():
        runs = sorted(p.parent.name for p in path.parent.parent.glob('*/config.txt'))
        raise UserError(f'No run at {path.parent}: the runs there are {", ".join(runs) or "none"}.')
    try:
        pairs = (line.split(': ', 1) for line in path.read_text().splitlines())
        options = {key: json.loads(value) for key, value in pairs}
        options['data_range'] = tuple((int(first), int(last)) for first, last in options['data_range'])
        known = options.keys() >= {'model', 'scale'}
    except (OSError, ValueError, TypeError, KeyError):
        known = False
    if not known:
        raise UserError(f'{path.parent} is not a run of this program: its config.txt is missing or unreadable.')
    return options


def changes(old: str, new: str) -> list[str]:
    """What differs between the texts of two config.txt, of what a continued run takes over: 'lr 0.001 -> 0.0001'."""
    before, after = (dict(line.split(': ', 1) for line in text.splitlines()) for text in (old, new))
    keys = [key for key in after if key in before and key not in NOT_RESTORED]
    return [f'{key} {before[key]} -> {after[key]}' for key in keys if json.loads(before[key]) != json.loads(after[key])]


def _check(args: argparse.Namespace) -> None:
    """Combinations of options that cannot be, and names that there are not."""
    measured = next((option for option in ('costs', 'profile', 'compare') if getattr(args, option)), None)
    for name in cost_models(args) if measured else [args.model]:
        if name not in MODELS and (name != 'auto' or measured):
            raise UserError(f'Unknown network {name!r}: choose one of {", ".join(MODELS)}.')
    if args.growth and not args.profile:
        raise UserError('--growth: it is measured with --profile; give both.')
    if args.forms:
        if not args.profile:
            raise UserError(f'--forms {args.forms}: they are measured with --profile; give both.')
        for option in ONE_FORM:
            if getattr(args, option) not in (False, 'off'):
                raise UserError(f'--{option}: --forms says how networks run, and what is measured; give one of them.')
    if args.costs and (args.profile or args.compare):
        raise UserError(f'--{"profile" if args.profile else "compare"}: --costs is another measurement; give one.')
    if measured:
        others = ('export', 'load', 'pre_train', 'template', 'test_only', 'score', 'reset', 'chop', 'self_ensemble')
        for option in (*others, 'net', *NETWORK_SETTINGS):
            if getattr(args, option):
                raise UserError(f'--{option}: --{measured} measures the published networks alone; leave it out.')
        if args.n_GPUs > 1:
            raise UserError(f'--n_GPUs {args.n_GPUs}: --{measured} measures on one device; leave it out.')
        return
    if args.model == 'auto' and not args.pre_train:
        raise UserError('--model auto: give the weights to recognise with --pre_train.')
    if args.model == 'auto' and args.template:
        raise UserError(f'--template {args.template} names a network, which --model auto finds: give one of them.')
    if isinstance(args.scale, list):
        raise UserError(f'--scale {"+".join(map(str, args.scale))}: only --costs and --profile take several; give one.')
    if args.template and not args.load:
        _check_recipe(args)
    training = not (args.test_only or args.score)
    if training and args.scale and args.patch_size % args.scale:
        raise UserError(f'--patch_size {args.patch_size} is not a multiple of --scale {args.scale}: choose another.')
    if training and args.split_batch > args.batch_size:
        raise UserError(f'--split_batch {args.split_batch} exceeds --batch_size {args.batch_size}: choose fewer parts.')
    if training and args.split_batch > 1 and (names := find_whole_batches(args.loss)):
        raise UserError(
            f'--split_batch {args.split_batch}: {names[0]} of --loss {args.loss} sees whole batches; leave one out.'
        )
    if args.chop_overlap >= args.chop_size:
        raise UserError(
            f'--chop_overlap {args.chop_overlap} is not below --chop_size {args.chop_size}: choose larger tiles.'
        )
    if 'Demo' in args.data_test:
        if args.dir_demo is None:
            raise UserError('--data_test Demo: give the folder of images with --dir_demo.')
        if not args.test_only or args.score:
            raise UserError('--data_test Demo: these images have no scores; use it with --test_only.')
    if args.max_memory is not None and (args.data_test != ['Demo'] or args.chop != 'auto'):
        raise UserError('--max_memory chooses the tiles of --data_test Demo alone: leave out --chop and other sets.')
    if args.load:
        for option in ('template', 'pre_train'):
            if getattr(args, option):
                raise UserError(f'--{option} {getattr(args, option)}: the run {args.load} has its own; leave it out.')
        if args.reset:
            raise UserError(f'--reset deletes the run that --load {args.load} continues: give one of them.')
        if args.save not in ('', args.load) and not args.test_only:
            raise UserError(f'--save {args.save}: the run {args.load} goes on in its own folder; leave it out.')
        if args.save == args.load and args.test_only and not args.export:
            raise UserError(f'--save {args.save}: a test leaves the folder of the run as it is; give another name.')
    if args.score:
        network = ('load', 'pre_train', 'reset', 'save_results', 'save_gt', 'show_attention', 'chop', 'self_ensemble')
        for option in network:
            if getattr(args, option):
                raise UserError(f'--{option}: --score measures files and runs no network; leave it out.')
    if args.max_memory is not None and args.show_attention:
        raise UserError('--show_attention: what it takes --max_memory does not bound; give one of them.')
    if args.show_attention and not args.test_only:
        raise UserError('--show_attention: its pictures are made in tests; use it with --test_only.')
    if args.resume > 0 and not args.load:
        raise UserError(f'--resume {args.resume}: name the run with --load.')
    if args.reset and args.test_only:
        raise UserError('--reset deletes a run and --test_only measures one: give one of them.')
    for option in ('save', 'load'):
        value = getattr(args, option)
        if Path(value).name != value or value == '..':
            raise UserError(f'--{option} {value}: give a name without folders; --save_dir is the folder of the runs.')


def page() -> str:
    """docs/OPTIONS.md: what --help says, in Markdown, with paths from the checkout."""
    parser = build_parser()
    formatter = parser._get_formatter()
    parts = ['# Options of src/main.py', 'Written by `python src/tables.py` from what `--help` prints.']
    for group in parser._action_groups:
        options = [action for action in group._group_actions if action.dest != 'help']
        if not options:
            continue
        rows = []
        for action in options:
            words = ' '.join(formatter._format_action_invocation(action).split())
            text = formatter._expand_help(action).replace(f'{ROOT}{os.sep}', '')
            rows.append(f'- `{words}`: {text}')
        parts += [f'## {group.title}', '\n'.join(rows)]
    return '\n\n'.join(parts) + '\n'


if __name__ == '__main__':
    print(page(), end='')
