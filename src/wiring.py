"""Options -> parts: the network with its weights and tiles, image sets, what trains it, as the options say."""

import logging
from argparse import Namespace
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn, optim
from torch.utils.data import DataLoader

import option
from checkpoint import RunFolder
from data.degradation import Degradation
from data.library import Library
from data.srdata import SRData
from data.traindata import TrainData, train_loader
from error import UserError
from loss import Loss
from model import Model, type_name
from model.loading.detect import recognise
from model.loading.weights import Origin, load_weights, read_weights
from model.ops.recompute import recompute
from model.tiles.autotile import AutoTiler
from model.tiles.tiling import MeanTiler, Tiler
from optimizer import Schedule, make_optimizer
from options.table import ROOT
from step import TrainStep
from system import parallel
from system.files import some
from system.machine import best_device
from system.numerics import set_numerics
from template import TEMPLATES
from trainer import TrainConfig, Trainer

log = logging.getLogger('frugalsr')


def device(args: Namespace) -> str:
    """What networks run on: the best that there is (cuda, mps, cpu), or cpu if the options say so."""
    return 'cpu' if args.cpu or args.n_GPUs == 0 else best_device()


def apply_detected_network(args: Namespace) -> None:
    """Find out which network the weights of --pre_train belong to."""
    path = weights_file(args)
    try:
        found = recognise(read_weights(path)[0])
    except UserError as error:
        raise UserError(f'{path}: {error}') from error
    given = option.network_settings(args, found.name)
    assumed = [key for key in found.unseen if key not in given]
    option.apply_detected_network(args, found.name, found.scale, found.shown, found.settings)
    log.info('%s holds weights of %s', path, found)
    if found.settings and assumed:
        log.info('What weights do not show is as in the paper of %s: %s', found.name, ', '.join(assumed))


def weights_file(args: Namespace) -> Path:
    """The file that --pre_train means: a path from here, or a name in --extend."""
    path = Path(args.pre_train).expanduser()
    if not path.is_file():
        path = args.extend / path
    if not path.is_file():
        files = sorted(file.name for file in args.extend.glob('*') if file.suffix in ('.pt', '.pth', '.safetensors'))
        there = some(files) or 'none'
        if args.template and args.pre_train == TEMPLATES[args.template].get('pre_train'):
            raise UserError(
                f'--template {args.template} starts from {args.pre_train}, which is neither here nor in {args.extend} '
                f'(it holds {there}): train these weights first, or give a file with --pre_train.'
            )
        raise UserError(f'--pre_train {args.pre_train}: no such file here or in {args.extend}, which holds {there}.')
    return path


def make_model(args: Namespace) -> Model:
    """The network, with random weights from the seed."""
    set_numerics(args.seed, args.deterministic or device(args) == 'cpu', args.tf32)
    settings = option.network_settings(args)
    half = args.precision == 'half'
    return Model(
        args.model, args.scale, device(args), make_tiler(args), args.self_ensemble, half, args.compile,
        args.channels_last, bool(args.graph), **settings,
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
    if args.load:
        return load_run(args, model)
    if args.pre_train:
        path = weights_file(args)
        weights, unwrapped = read_weights(path)
        upsampler = None if args.test_only else model.network.upsampler_prefix
        new = load_weights(model.net, weights, str(path), upsampler)
        inside = f' ({unwrapped})' if unwrapped else ''
        return None, Origin(f'{path}{inside}' + (f'; new: {", ".join(new)}' if new else ''))
    if args.test_only and model.net.state_dict():
        raise UserError(f'{args.model} has no weights to test: give a file with --pre_train or a run with --load.')
    return None, Origin('new weights' if model.net.state_dict() else 'no weights', read=False)


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
    return library(args).open_tests(args.data_test, args.data_range[-1], prepare)


def train_data(args: Namespace) -> TrainData:
    """Patches of the training sets."""
    skip, span, sets = args.skip_bad_images, args.data_range[0], library(args)
    images = [sets.open(name, span, cached=args.ext != 'img', skip_bad=skip) for name in args.data_train]
    return TrainData(
        images, args.patch_size, args.seed, not args.no_augment, skip, args.sampling == 'area', degradation(args)
    )


def optimizer_maker(args: Namespace) -> Callable[[Iterable[nn.Parameter]], optim.Optimizer]:
    """Makes the optimiser of some parameters."""
    return partial(
        make_optimizer, name=args.optimizer, lr=args.lr, weight_decay=args.weight_decay, betas=tuple(args.betas),
        epsilon=args.epsilon, momentum=args.momentum,
    )  # fmt: skip


def make_loss(args: Namespace, model: Model) -> Loss:
    """The loss, with the discriminators of adversarial terms and their optimisers."""
    new_optimizer = optimizer_maker(args)
    return Loss(args.loss, model.range, model.n_colors, args.patch_size, args.gan_k, new_optimizer, args.vgg)


def make_trainer(
    args: Namespace,
    model: Model,
    loss: Loss,
    data: TrainData,
    evaluate: Callable[[int], dict[str, Any]],
    folder: RunFolder,
    on_epoch_end: Callable[[dict[str, Any]], None],
) -> Trainer:
    """What trains `model` on `data`, in as many processes as there are; the rest is as in `Trainer`.

    Raises:
        UserError: too many processes for the batch or for the loss.
    """
    train_step = TrainStep(
        model, loss.to(model.device), optimizer_maker(args)(model.parameters()), args.batch_size, args.split_batch,
        args.gclip, args.clip_norm, autocast_dtype(args, model), args.weight_ema, graph=args.graph is not False,
    )  # fmt: skip

    def loader(numbers: range) -> DataLoader:
        batches = parallel.Batches(numbers, args.batch_size)
        return train_loader(data, batches, args.n_threads, pin_memory=model.device.type == 'cuda')

    config = TrainConfig(
        args.batch_size, args.test_every, schedule(args), args.skip_threshold, args.print_every, args.save_models,
        args.seed, args.save_every,
    )  # fmt: skip
    trainer = Trainer(config, train_step, loader, data.name, evaluate, folder, on_epoch_end)
    if args.checkpointing:
        recompute(model.net, model.network.checkpoint_blocks)
    check_processes(args, loss)
    model.calls.train = parallel.wrap_ddp(model.calls.train, model.device, args.split_batch > 1)
    return trainer


def check_processes(args: Namespace, loss: Loss) -> None:
    """Refuse more processes than the batch or the loss allows."""
    if args.batch_size < parallel.world_size() * args.split_batch:
        raise UserError(
            f'--batch_size {args.batch_size} is too small for {parallel.world_size()} processes and --split_batch '
            f'{args.split_batch}: each needs a patch in each part.'
        )
    if parallel.world_size() > 1 and loss.whole_batches:
        raise UserError(
            f'--loss {args.loss}: {loss.whole_batches[0]} sees whole batches, which several processes share; use one.'
        )


def schedule(args: Namespace) -> Schedule:
    """The learning rate over the run."""
    total = args.epochs if args.decay_unit == 'epochs' else args.epochs * args.test_every
    return Schedule(args.lr, args.schedule, args.decay, args.gamma, args.decay_unit, total, args.lr_min, args.warmup)


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
    return {
        'chop': {'size': size, 'overlap': args.chop_overlap, 'blend': blend} if args.chop else None,
        'self_ensemble': args.self_ensemble,
        'precision': type_name(model.dtype),
    }
