"""Every option, in groups: EDSR's and LCoAN's under their old names, and those of this program."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import networks
from loss_language import known_terms, list_names
from networks import MODELS
from options.kinds import (
    Group,
    Parser,
    assignment,
    automatic,
    count,
    data_range,
    epochs_list,
    folder,
    fraction,
    memory_size,
    names,
    natural,
    number,
    positive,
    scales,
    sides,
    truth,
    weights,
)

ROOT = Path(__file__).resolve().parent.parent.parent
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
    'kernel_size': ('side of the dynamic, depthwise or large kernels', COUNT),
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


def setting_option(name: str, value: object) -> str:
    """What is typed for a setting of a network to have a value."""
    return f'--{name} {networks.shown(value)}' if name in SETTINGS else f'--net {name}={networks.shown(value)}'


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
    g.add_argument(
        '--reset',
        action='store_true',
        help='delete what an earlier run of this name left, with --data_test Demo its enlarged images, and start over',
    )
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
        '--pad_to',
        metavar='N',
        type=number(int, 1, 1024),
        default=1,
        help='continue images by reflection to multiples of N pixels before the network, in tests',
    )
    g.add_argument(
        '--precision',
        choices=('single', 'half'),
        default='single',
        help='of the network in tests; half: bfloat16 (LCoAN on a GPU: float16), on a CPU mostly slower with llvmlite',
    )
    g.add_argument('--save_results', action='store_true', help='save the enlarged images')
    g.add_argument('--save_gt', action='store_true', help='save LR and HR beside them (and with it the enlarged ones)')
    g.add_argument(
        '--show_attention',
        action='store_true',
        help='in tests of LCoAN, ATD and CATANet: save its clusters, categories or groups as colours over the first '
        'images of each set (and with it the enlarged ones)',
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
        '--against',
        metavar='ENGINES',
        help='with --profile on a CPU: also the time of exported files in other engines, by turns with that of this '
        'program: onnxruntime, openvino, or both joined by +',
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
        help='images of DIV2K to train / to test on, by their numbers',
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
        '--patch_schedule',
        metavar='N-N-...',
        type=sides,
        default=[],
        help='sides of the LR training patch in the course of the run, such as 32-48-64, each for an equal part of the '
        'epochs; batches keep about the pixels of batch_size patches of patch_size (default: patch_size all the time)',
    )
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
        '--degradation',
        metavar='TERMS',
        default='',
        help='what is done to LR images in training and tests, [chance*]KIND[range] joined by +, such as '
        'blur0.2-1.2+0.5*noise0-6+jpeg40-95; KIND is blur, resize, noise, poisson or jpeg; photo: a choice for '
        'photographs from cameras and the web',
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
        help='weights to start from, or to test; download: those of the authors of the network, fetched into --extend '
        '(default: in training those that the recipe starts from)',
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
        '--kernels',
        choices=('auto', 'off'),
        default='auto',
        help="auto: where they work, this program's kernels, in Triton on a GPU and, with llvmlite, in LLVM on a CPU; "
        'off: plain PyTorch',
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
        help=f'weight*NAME joined by +; NAME is {list_names(known_terms())}',
    )
    g.add_argument(
        '--loss_final',
        default='',
        metavar='TERMS',
        help='loss of the last final_epochs epochs, such as 1*MSE (default: as before)',
    )
    g.add_argument('--final_epochs', metavar='N', type=count, default=1, help='epochs that loss_final is for')
    g.add_argument(
        '--teacher',
        default='',
        metavar='FILE',
        type=weights,
        help='weights of a larger network, found like those of pre_train and recognised, from whose output to learn',
    )
    g.add_argument(
        '--distill',
        metavar='X',
        type=number(float, 0, 1e6),
        default=0.0,
        help='weight of the mean absolute difference to the output of the teacher: adds X*Distill to loss; loss_final '
        'says for itself',
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
    g.add_argument(
        '--optimizer',
        choices=('SGD', 'ADAM', 'ADAMW', 'RMSprop', 'MUON'),
        default='ADAM',
        help='optimiser; MUON: orthogonalised momentum for the matrices between features, AdamW for all else',
    )
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
    g.add_argument('--momentum', metavar='X', type=fraction, help='of SGD and MUON (default: SGD 0.9; MUON 0.95)')
    g.add_argument(
        '--betas',
        metavar=('B1', 'B2'),
        type=number(float, 0, 0.999999),
        nargs=2,
        default=[0.9, 0.999],
        help='of ADAM, ADAMW and MUON',
    )
    g.add_argument('--epsilon', metavar='X', type=positive, default=1e-8, help='of ADAM, ADAMW, RMSprop and MUON')
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
        help="name of the run (default: recipe, loaded run or <model>_x<scale>; in tests and exports with the weights' "
        "name and _test or _export, with --data_test Demo with the folder's name and _demo)",
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
