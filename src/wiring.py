"""Options -> parts: the network with its weights and tiles, image sets, what trains it, as the options say."""

import hashlib
import logging
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, optim
from torch.utils.data import DataLoader

import option
from checkpoint import RunFolder
from data.degradation import Degradation
from data.download.weights import TABLE, Official, fetch_official
from data.library import Library
from data.srdata import SRData
from data.traindata import TrainData, train_loader
from error import UserError
from loss import Loss
from loss.distill import Teacher
from model import NETWORKS, Model, all_settings, type_name
from model.loading.description import Description
from model.loading.detect import nearest, recognise
from model.loading.weights import Origin, load_model, load_weights, read_weights, weights_in
from model.ops.recompute import recompute
from model.tiles.autotile import AutoTiler
from model.tiles.tiling import MeanTiler, Tiler
from muon import hidden_matrices
from networks import shown
from optimizer import Schedule, make_optimizer
from options.checks import tests_on_training_images
from options.kinds import at_home
from options.table import ROOT, setting_option
from step import TrainStep
from system import parallel
from system.files import some
from system.machine import best_device
from system.numerics import set_numerics
from template import TEMPLATES
from trainer import Phase, TrainConfig, Trainer

# Before, activation checkpointing asks for the state of random numbers, which no CUDA graph allows (PyTorch, #162504).
GRAPHS_CHECKPOINTS = tuple(map(int, torch.__version__.split('.')[:2])) >= (2, 10)

log = logging.getLogger('frugalsr')


def device(args: Namespace) -> str:
    """What networks run on: a GPU if there is one, unless the options say the CPU; else the CPU."""
    return 'cpu' if args.cpu or args.n_GPUs == 0 else best_device()


def apply_detected_network(args: Namespace) -> None:
    """Find out which network the weights of --pre_train belong to."""
    path = weights_file(args)
    state, _, description = read_weights(path)
    try:
        given = option.network_settings(args, nearest(state, description).name)
        found = recognise(state, description, given, args.scale)
    except UserError as error:
        raise UserError(f'{path}: {error}') from error
    option.apply_detected_network(args, found.name, found.scale, found.settings)
    log.info('%s holds weights of %s', path, found)
    if found.settings and found.assumed:
        log.info('What nothing says of them is as in %s: %s', found.like, ', '.join(found.assumed))


def weights_file(args: Namespace, option: str = 'pre_train') -> Path:
    """The file that --pre_train or --teacher means: a path from here, a name in --extend, or what a download has."""
    given = getattr(args, option)
    if given == 'download':
        with parallel.main_process_first():
            return fetch_official(official_weights(args), args.extend, read_weights)
    path = at_home(given)
    if not path.is_file():
        path = args.extend / path
    if not path.is_file():
        there = some([file.name for file in weights_in(args.extend)]) or 'none'
        official = TABLE.get(path.stem)
        known = official is not None and not official.by_hand and official.file == path.name
        fetched = f", or get the authors' with python src/prepare.py weights {path.stem}" if known else ''
        if args.template and given == TEMPLATES[args.template].get(option):
            raise UserError(
                f'--template {args.template} starts from {given}, which is neither here nor in {args.extend} '
                f'(it holds {there}): train these weights first{fetched}, or give a file with --pre_train.'
            )
        raise UserError(f'--{option} {given}: no such file here or in {args.extend}, which holds {there}{fetched}.')
    return path


def official_weights(args: Namespace) -> Official:
    """The authors' weights of the network that the options say, under whatever name of it.

    Raises:
        UserError: none are known.
    """
    if args.model == 'auto':
        raise UserError('--pre_train download: name the network with --model, and the scale with --scale.')
    network = NETWORKS[args.model]
    settings = all_settings(network, args.scale, **option.network_settings(args))
    same = [
        name
        for name, other in NETWORKS.items()
        if other.build is network.build and settings == all_settings(other, args.scale)
    ]
    name = f'{(same or [args.model])[0]}_x{args.scale}'
    if name not in TABLE:
        raise UserError(
            f'--pre_train download: no weights of {name} by its authors are known here; python src/prepare.py weights '
            'list names those that are.'
        )
    return TABLE[name]


def make_model(args: Namespace) -> Model:
    """The network, with random weights from the seed."""
    set_numerics(args.seed, args.deterministic or device(args) == 'cpu', args.tf32)
    settings = option.network_settings(args)
    half = args.precision == 'half'
    return Model(
        args.model, args.scale, device(args), make_tiler(args), args.self_ensemble, half, args.compile,
        args.channels_last, bool(args.graph), args.pad_to, **settings,
    )  # fmt: skip


def make_tiler(args: Namespace) -> Tiler | None:
    """What cuts images into tiles, of one shape for --compile and --graph."""
    if not args.chop:
        return None
    where = device(args)
    fixed = args.compile or (bool(args.graph) and where == 'cuda')
    batch = args.chop_batch if where == 'cuda' and not fixed else 1
    if args.chop == 'auto':
        return AutoTiler(args.chop_overlap, batch, where, args.max_memory, fixed)
    if args.chop_blend == 'mean':
        return MeanTiler(args.chop_size, args.chop_overlap, args.chop_batch)
    return Tiler(args.chop_size, args.chop_overlap, 1 if fixed else args.chop_batch, fixed)


def load(args: Namespace, model: Model) -> tuple[dict[str, Any] | None, Origin]:
    """Fill the network from --load or --pre_train; returns the state of a loaded run, and where the weights are from.

    Raises:
        UserError: no such file or run, weights that do not fit, or none in a test.
    """
    state, origin = _load(args, model)
    model.weights = str(origin)
    return state, origin


def _load(args: Namespace, model: Model) -> tuple[dict[str, Any] | None, Origin]:
    if args.load:
        return load_run(args, model)
    if args.pre_train:
        path = weights_file(args)
        weights, unwrapped, description = read_weights(path)
        upsampler = None if args.test_only else model.network.upsampler_prefix
        left = load_weights(model.net, weights, str(path), upsampler)
        check_description(args, model, path, description)
        inside = f' ({unwrapped})' if unwrapped else ''
        return None, Origin(f'{path}{inside}{left}')
    if args.test_only and model.net.state_dict():
        raise UserError(f'{args.model} has no weights to test: give a file with --pre_train or a run with --load.')
    return None, Origin('new weights' if model.net.state_dict() else 'no weights', read=False)


def check_description(args: Namespace, model: Model, path: Path, description: Description | None) -> None:
    """Refuse a scale, or settings that nobody named, where weights, which do not show them, come with others.

    Settings that depend on the scale unless they are named are left alone; training may go to another scale.
    """
    if args.test_only and description and description.scale != model.scale:
        raise UserError(
            f'{path} says that its network enlarges by {description.scale}: give --scale {description.scale}, or '
            '--model auto.'
        )
    given = option.network_settings(args)
    for key, said in (description.settings if description else {}).items():
        own = model.settings.get(key, said)
        if own == said or None in (own, said):
            continue
        if key not in given:
            raise UserError(
                f'{path} says that the {key} of its network is {shown(said)}; that of {args.model} is {shown(own)} '
                f'unless it is named: give {setting_option(key, said)}, or --model auto.'
            )
        log.info('%s says that the %s of its network is %s; here it is %s.', path, key, shown(said), shown(own))


def load_run(args: Namespace, model: Model) -> tuple[dict[str, Any], Origin]:
    """Fill the network from the run that --load and --resume name; returns its state too."""
    run = RunFolder(args.save_dir / args.load)
    state = run.load_state()
    place = f'epoch {state["epoch"]}' + (f' and {state["batch"]} batches' if state['batch'] else '')
    weights, source = state['model'], f'the run {args.load}, {place}'
    if args.resume > 0:
        if args.resume > state['epoch']:
            raise UserError(f'--resume {args.resume}: the run {args.load} has {state["epoch"]} epochs.')
        path = run.models / f'model_{args.resume}.pt'
        if not path.is_file():
            raise UserError(f'--resume {args.resume}: no {path}; only --save_models keeps every epoch.')
        weights, source = read_weights(path)[0], str(path)
    elif args.test_only:
        weights = state['average'] or weights
    load_weights(model.net, weights, source)
    return state, Origin(source)


def library(args: Namespace) -> Library:
    """Where the image sets are."""
    renew = args.ext == 'sep_reset'
    benchmarks = ROOT / 'benchmark'
    return Library(
        args.dir_data, benchmarks, args.scale, args.lr_border, args.shave, args.n_threads, renew, degradation(args)
    )


def degradation(args: Namespace) -> Degradation | None:
    """What is done to LR images."""
    return Degradation(args.degradation, args.scale, args.lr_border) if args.degradation else None


def test_sets(args: Namespace, prepare: bool = True) -> list[SRData]:
    """The test sets; without `prepare` only their HR images are to be read."""
    if len(args.data_range) > 1 and tests_on_training_images(args):
        log.warning('DIV2K %d-%d, which is tested, shares images with the range for training.', *args.data_range[-1])
    return library(args).open_tests(args.data_test, args.data_range[-1], prepare)


def train_data(args: Namespace) -> TrainData:
    """Patches of the training sets."""
    skip, span, sets = args.skip_bad_images, args.data_range[0], library(args)
    images = [sets.open(name, span, cached=args.ext != 'img', skip_bad=skip) for name in args.data_train]
    return TrainData(
        images, args.patch_size, args.seed, not args.no_augment, skip, args.sampling == 'area', degradation(args)
    )


def optimizer_maker(args: Namespace) -> Callable[..., optim.Optimizer]:
    """Makes the optimiser of some parameters, see `make_optimizer`."""
    return partial(
        make_optimizer, name=args.optimizer, lr=args.lr, weight_decay=args.weight_decay, betas=tuple(args.betas),
        epsilon=args.epsilon, momentum=args.momentum,
    )  # fmt: skip


def make_teacher(args: Namespace, model: Model) -> Teacher | None:
    """The network of --teacher, from and to the range of `model`, if one is named.

    Raises:
        UserError: no such file, no weights of a network known here, or one of another scale or other colours.
    """
    if not args.teacher:
        return None
    path = weights_file(args, 'teacher')
    teacher = load_model(path, model.device, scale=model.scale)
    log.info('%s holds weights of %s x%d', path, teacher.name, teacher.scale)
    if (teacher.scale, teacher.n_colors) != (model.scale, model.n_colors):
        raise UserError(
            f'--teacher {path} holds {teacher.name} x{teacher.scale} of {teacher.n_colors} channels, and {model.name} '
            f'x{model.scale} has {model.n_colors}: give weights of the same scale and number of channels.'
        )
    net, own, others = teacher.net.eval().requires_grad_(False), model.range, teacher.range

    def teach(lr: Tensor) -> Tensor:
        return between_ranges(net(between_ranges(lr, own, others)), others, own)

    return teach


def between_ranges(x: Tensor, source: tuple[float, float], target: tuple[float, float]) -> Tensor:
    """Pixels whose (black, white) are `source` as pixels whose are `target`."""
    (black, white), (low, high) = source, target
    return (x - black) * ((high - low) / (white - black)) + low


def make_phases(args: Namespace, model: Model) -> list[Phase]:
    """What the run is trained with in its course: patches of --patch_schedule by turns, and at its end --loss_final.

    Raises:
        UserError: a loss that cannot be made, or a discriminator that would have to judge patches of several sizes.
    """
    sides = [args.scale * side for side in args.patch_schedule] or [args.patch_size]
    first = f'{args.loss}+{args.distill}*Distill' if args.distill else args.loss
    new_optimizer, teacher = optimizer_maker(args), make_teacher(args, model)
    losses = {
        text: Loss(
            text, model.range, model.n_colors, min(sides), args.gan_k, new_optimizer, args.vgg, teacher
        ).to(model.device)
        for text in (first, args.loss_final) if text
    }  # fmt: skip
    if len(set(sides)) > 1 and (text := next((text for text, loss in losses.items() if loss.adversaries), '')):
        raise UserError(
            f'--patch_schedule: the discriminator of the loss {text} sees patches of one size; leave one of them out.'
        )
    final = args.epochs - args.final_epochs if args.loss_final else args.epochs
    plan = [
        (sides[epoch * len(sides) // args.epochs], first if epoch < final else args.loss_final)
        for epoch in range(args.epochs)
    ]
    return [
        Phase(epoch, side, max(1, round(args.batch_size * (args.patch_size / side) ** 2)), losses[text])
        for epoch, (side, text) in enumerate(plan)
        if epoch == 0 or plan[epoch] != plan[epoch - 1]
    ]


def wants_graph(args: Namespace) -> bool:
    """Whether training steps are to be CUDA graphs where they can."""
    return bool(args.graph) or (args.graph is None and (GRAPHS_CHECKPOINTS or not args.checkpointing))


def make_trainer(
    args: Namespace,
    model: Model,
    phases: list[Phase],
    data: TrainData,
    sets: Sequence[SRData],
    evaluate: Callable[[int], dict[str, Any]],
    folder: RunFolder,
    on_epoch_end: Callable[[dict[str, Any]], None],
) -> Trainer:
    """What trains `model` on `data`, in as many processes as there are; `evaluate` scores it on `sets`, the rest is as
    in `Trainer`.

    Raises:
        UserError: too many processes for the batch or for the loss.
    """
    optimizer = optimizer_maker(args)(model.parameters(), matrices=hidden_matrices(model.net))
    train_step = TrainStep(
        model, phases[0].loss, optimizer, phases[0].batch_size, args.split_batch, args.gclip, args.clip_norm,
        autocast_dtype(args, model), args.weight_ema, graph=wants_graph(args),
    )  # fmt: skip

    def loader(phase: Phase, numbers: range) -> DataLoader:
        batches, patches = parallel.Batches(numbers, phase.batch_size), data.with_patches(phase.patch_size)
        return train_loader(patches, batches, args.n_threads, pin_memory=model.device.type == 'cuda')

    config = TrainConfig(
        phases, args.test_every, schedule(args), args.skip_threshold, args.print_every, args.save_models,
        args.seed, args.save_every, protocol(args, model) | scored_on(sets[0]),
    )  # fmt: skip
    trainer = Trainer(config, train_step, loader, data.name, evaluate, folder, on_epoch_end)
    if args.checkpointing:
        recompute(model.net, model.network.checkpoint_blocks)
    check_processes(args, phases)
    model.calls.train = parallel.wrap_ddp(model.calls.train, model.device, args.split_batch > 1)
    return trainer


def scored_on(images: SRData) -> dict[str, Any]:
    """What has a say in the scores of a set; who made its LR images does not matter."""
    names = hashlib.sha256('\0'.join(images.names).encode()).hexdigest()[:12]
    about = {key: value for key, value in images.protocol().items() if key != 'lr_made'}
    return {**about, 'lr_border': images.border, 'set': images.name, 'images': names}


def check_processes(args: Namespace, phases: list[Phase]) -> None:
    """Refuse more processes or parts than a batch or a loss allows."""
    for phase in phases:
        if phase.batch_size < parallel.world_size() * args.split_batch:
            raise UserError(
                f'--batch_size {args.batch_size} ({phase}) is too small for {parallel.world_size()} processes and '
                f'--split_batch {args.split_batch}: each needs a patch in each part.'
            )
        if parallel.world_size() > 1 and (names := phase.loss.whole_batches):
            raise UserError(f'--loss with {names[0]}: it sees whole batches, which several processes share; use one.')


def schedule(args: Namespace) -> Schedule:
    """The learning rate over the run."""
    total = args.epochs if args.decay_unit == 'epochs' else args.epochs * args.test_every
    return Schedule(
        args.lr, args.schedule, args.decay, args.gamma, args.decay_unit, total, args.lr_min, args.restarts, args.warmup
    )  # fmt: skip


def autocast_dtype(args: Namespace, model: Model) -> torch.dtype:
    """What --amp computes in: what is asked for, or the next that the network supports."""
    return model.safe(*amp_dtypes(args))


def amp_dtypes(args: Namespace) -> list[torch.dtype]:
    """The types that --amp asks for, the first choice first."""
    return {'off': [], 'bf16': [torch.bfloat16], 'fp16': [torch.float16, torch.bfloat16]}[args.amp]


def protocol(args: Namespace, model: Model) -> dict[str, Any]:
    """What has a say in the scores of a network besides its weights and the test sets."""
    auto = args.chop == 'auto'  # when sizes differ between images, and tiles are never averaged
    size, blend = ('auto', 'ramp') if auto else (model.tiler and model.tiler.size, args.chop_blend)
    chop = {'size': size, 'overlap': args.chop_overlap, 'blend': blend}
    return {
        'chop': chop | {'fixed': model.tiler.fixed} if model.tiler else None,
        'self_ensemble': args.self_ensemble,
        'pad_to': args.pad_to,
        'precision': type_name(model.dtype),
        'tf32': args.tf32,
    }
