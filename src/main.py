"""FrugalSR: options -> parts -> run.

The parts are imported inside the functions that wire them, so that `--help` and a mistyped option do without torch.
"""

from __future__ import annotations

import logging
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import option
from error import UserError, report_error
from system.allocator import tune_malloc

if TYPE_CHECKING:
    import torch

    from checkpoint import RunFolder
    from data.srdata import SRData
    from evaluation import Evaluation
    from model import Model
    from model.tiles.tiling import Tiler
    from optimizer import Schedule
    from report.page import Saved

log = logging.getLogger('frugalsr')


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status: 0, 2 for an error that the user can mend, 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    tune_malloc()
    try:
        run(option.parse(argv), argv)
    except UserError as error:
        return report_error(error, '--debug' in argv)
    except KeyboardInterrupt:
        print('Interrupted: --load NAME continues a training run from its last state.', file=sys.stderr)
        return 130
    except (MemoryError, RuntimeError) as error:
        from model.tiles.tiling import out_of_memory

        if not out_of_memory(error) or '--debug' in argv:
            raise
        less = 'a smaller --batch_size or --patch_size or a larger --split_batch in training, --chop in tests'
        print(f'Error: Memory ran out: give {less}.', file=sys.stderr)
        return 2
    return 0


def run(args: Namespace, argv: Sequence[str] = ()) -> None:
    """Do what the options say: measure costs, score files, test, or train; in several processes if they say so."""
    try:
        from system import parallel
    except ModuleNotFoundError as error:
        raise UserError(
            f'{error.name} is missing in {sys.executable}: use .venv/bin/python, or pip install -r requirements.txt.'
        ) from error

    if parallel.launched():
        parallel.start(device(args) == 'cpu')
        run_here(args)
        parallel.finish()
    elif args.n_GPUs > 1:
        if not args.cpu and (found := parallel.gpus()) < args.n_GPUs:
            raise UserError(f'--n_GPUs {args.n_GPUs}: this host has {found}; give as many or fewer, or --cpu.')
        parallel.launch(os.path.abspath(__file__), args.n_GPUs, argv)  # noqa: PTH100
    else:
        run_here(args)


def run_here(args: Namespace) -> None:
    """Do what the options say in this process."""
    from checkpoint import RunFolder, start_screen
    from system import parallel

    start_screen(quiet=parallel.rank() > 0)
    if args.model == 'auto':
        apply_detected_network(args)
    folder = RunFolder(args.save_dir / args.save, writes=parallel.rank() == 0)
    if args.costs:
        costs(args, folder)
    elif args.profile or args.compare:
        profile(args, folder)
    elif args.score:
        score(args, folder)
    elif args.export:
        export(args, folder)
    elif args.test_only:
        test(args, folder)
    else:
        if parallel.restarted() and folder.saved_by_this_launch():
            args.load, args.resume, args.reset = args.save, -1, False
        with folder.locked():
            train(args, folder)


def costs(args: Namespace, folder: RunFolder) -> None:
    """Print what networks cost, and write it as JSON and as a picture."""
    import json

    from measure.costs import find_pairs, measure_all, points, table
    from report.picture import scatter

    pairs = find_pairs(option.cost_models(args), option.cost_scales(args))
    folder.start_log()
    rows = measure_all(pairs, device(args), log.info)
    for line in table(rows).splitlines():
        log.info('%s', line)
    folder.write('costs.json', json.dumps(rows, indent=1) + '\n')
    note = 'Urban100 as published, where a score was found; area: multiply-adds at 1280x720'
    folder.write_bytes('costs.png', scatter(points(rows), note))
    log.info('Written: %s', folder.folder)


def profile(args: Namespace, folder: RunFolder) -> None:
    """Measure how near networks come to what this machine can do, and compare that with an older measurement."""
    import json

    from measure.costs import find_pairs
    from measure.speed import Form, profile_all
    from measure.speed_forms import DEFAULT, parse_forms, profile_forms
    from measure.speed_report import NOTE, compare, growths, parts, read_report, table
    from report.picture import bars, growth

    old = read_report(args.compare) if args.compare else None
    if args.profile:
        pairs, where = find_pairs(option.cost_models(args), option.cost_scales(args)), device(args)
        several = option.several_forms(args, where)
        forms = parse_forms(args.forms or DEFAULT, where) if several else {}
        folder.start_log()
        if (before := folder.folder / 'profile.json').is_file():
            folder.write('profile_before.json', before.read_text())
        form = Form(args.compile, args.channels_last, tuple(amp_dtypes(args)))
        if several:
            reports = profile_forms(pairs, where, forms, log.info)
        else:
            reports = profile_all(pairs, where, form, args.growth, log.info)
        for report in until_interrupted(reports):
            folder.write('profile.json', json.dumps(report, indent=1) + '\n')
        folder.write_bytes('profile.png', bars(parts(report), NOTE))
        if args.growth:
            folder.write_bytes('growth.png', growth(growths(report)))
        lines = table(report)
    else:
        report = read_report(folder.folder / 'profile.json')
        folder.start_log()
        lines = []
    for line in [*lines, *(compare(report, old) if old else [])]:
        log.info('%s', line)
    log.info('Written: %s', folder.folder)


def until_interrupted(reports: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The reports that there are before Ctrl-C, if there is one."""
    known = False
    try:
        for report in reports:
            yield report
            known = True
    except KeyboardInterrupt:
        if not known:
            raise
        log.info('Interrupted: the rest was not measured.')


def apply_detected_network(args: Namespace) -> None:
    """Find out which network the weights of --pre_train belong to."""
    from model.loading.detect import recognise
    from model.loading.weights import read_weights

    path = weights_file(args)
    try:
        found = recognise(read_weights(path)[0])
    except UserError as error:
        raise UserError(f'{path}: {error}') from error
    assumed = [key for key in found.unseen if getattr(args, key) is None]
    option.apply_detected_network(args, found.name, found.scale, found.shown, found.settings)
    log.info('%s holds weights of %s', path, found)
    if found.settings and assumed:
        log.info('What weights do not show is as in the paper of %s: %s', found.name, ', '.join(assumed))


def score(args: Namespace, folder: RunFolder) -> None:
    """Score images that any program made."""
    from evaluation import read_outputs, table

    sets = test_sets(args, prepare=False)
    upscale = read_outputs(sets, args.score)
    folder.start_log()
    log.info('Scores of %s x%d; run folder %s', args.score, args.scale, folder.folder)
    evaluation = make_evaluation(args, sets, folder, save=False, ssim=True)
    results = evaluation(upscale, args.score.name)
    log.info('%s', table(results))
    protocol = {'scored': str(args.score), 'sets': evaluation.protocol()}
    folder.write_results({'model': None, 'scale': args.scale, 'protocol': protocol, 'sets': results})
    write_report(args, folder, evaluation, {'Scored': args.score})


def test(args: Namespace, folder: RunFolder) -> None:
    """Score a network on the test sets, and enlarge the Demo folder."""
    from enlarge import enlarge_folder
    from evaluation import table, timed
    from report import attention

    model = make_model(args)
    if args.show_attention:
        attention.source(model)  # which complains
    _, origin = load(args, model)
    evaluation = make_evaluation(args, test_sets(args), folder, save=args.save_results, ssim=True)
    folder.start_log()
    describe(model, folder, origin)
    if not folder.holds_training():
        folder.write('config.txt', option.write_config(args, model.settings))
    if evaluation.sets:
        results = evaluation(timed(model), label(args))
        log.info('%s', table(results))
        write_results(args, folder, evaluation, results, model, origin)
    try:
        if 'Demo' in args.data_test:
            limit = args.max_memory if model.device.type == 'cpu' else None
            enlarge_folder(model, args.dir_demo, folder.folder / 'results-Demo', limit)
        if args.show_attention and folder.writes:
            show_attention(model, saved_images(args, folder, evaluation))
    finally:
        write_report(args, folder, evaluation, facts(model, origin), model.settings)


def show_attention(model: Model, saved: Mapping[str, Sequence[Saved]]) -> None:
    """Save what the network takes together in the first images of each set."""
    from evaluation import SHEET_ROWS
    from report import attention

    for images in saved.values():
        for image in images[:SHEET_ROWS]:
            name = f'{image.name}_x{image.scale}_attention.png'
            attention.save(model, image.lr(), image.file.with_name(name))


def export(args: Namespace, folder: RunFolder) -> None:
    """Write a network as a file for other programs."""
    from export import SUFFIXES, export

    args.cpu, args.compile, args.precision = True, False, 'single'  # a file does not depend on these
    model = make_model(args)
    _, origin = load(args, model)
    folder.start_log()
    describe(model, folder, origin)
    content = export(model, args.export, args.chop_size)
    name = f'{label(args)}_x{args.scale}{SUFFIXES[args.export]}'
    folder.write_bytes(name, content)
    log.info('Written: %s, %.2f MB', folder.folder / name, len(content) / 1e6)


def train(args: Namespace, folder: RunFolder) -> None:
    """Train a network, testing after every epoch."""
    from data.traindata import train_loader
    from evaluation import timed
    from loss import Loss
    from model import type_name
    from model.ops.recompute import recompute
    from optimizer import make_optimizer
    from report.board import Board
    from step import TrainStep
    from system import parallel
    from system.stopping import Stop
    from trainer import TrainConfig, Trainer

    if folder.holds_training() and not (args.load or args.reset):
        raise UserError(
            f'{folder.folder} holds a training run: --load {args.save} continues it, --reset deletes it, '
            'another --save keeps it.'
        )
    model = make_model(args)
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError(f'{args.model} has nothing to train: use it with --test_only.')
    new_optimizer = partial(
        make_optimizer, name=args.optimizer, lr=args.lr, weight_decay=args.weight_decay, betas=tuple(args.betas),
        epsilon=args.epsilon, momentum=args.momentum,
    )  # fmt: skip
    loss = Loss(args.loss, model.range, model.n_colors, args.patch_size, args.gan_k, new_optimizer, args.vgg)
    folder.config = option.write_config(args, model.settings)
    state, origin = load(args, model)
    data, sets = train_data(args), test_sets(args)
    evaluation = make_evaluation(args, sets, folder, save=args.save_results, ssim=args.ssim)

    stop, dtype, board = Stop(args.max_time), autocast_dtype(args, model), Board(folder.folder / 'tensorboard')

    def evaluate(epoch: int) -> dict[str, Any]:
        results = evaluation(timed(model), label(args), stop.check)
        write_results(args, folder, evaluation, results, model, f'epoch {epoch}')
        return results

    def on_epoch_end(record: dict[str, Any]) -> None:
        if parallel.rank() == 0:
            board.write(record, evaluation.shown)
            write_report(args, folder, evaluation, facts(model, f'epoch {record["epoch"]}'), model.settings)

    step = TrainStep(
        model, loss.to(model.device), new_optimizer(model.parameters()), args.batch_size, args.split_batch,
        args.gclip, args.clip_norm, dtype, args.weight_ema, graph=args.graph is not False,
    )  # fmt: skip
    trainer = Trainer(
        TrainConfig(
            args.batch_size, args.test_every, schedule(args), args.skip_threshold, args.print_every, args.save_models,
            args.seed, args.save_every,
        ),
        step,
        lambda numbers: train_loader(
            data, parallel.Batches(numbers, args.batch_size), args.n_threads, pin_memory=model.device.type == 'cuda'
        ),
        data.name, evaluate, folder, on_epoch_end,
    )  # fmt: skip
    if args.checkpointing:
        recompute(model.net, model.network.checkpoint_blocks)
    if args.batch_size < parallel.world_size() * args.split_batch:
        raise UserError(
            f'--batch_size {args.batch_size} is too small for {parallel.world_size()} processes and --split_batch '
            f'{args.split_batch}: each needs a patch in each part.'
        )
    if parallel.world_size() > 1 and 'GAN' in args.loss:
        raise UserError(f'--loss {args.loss}: adversarial terms train their discriminator in one process; use one.')
    model.calls.train = parallel.wrap_ddp(model.calls.train, model.device, args.split_batch > 1)
    if args.reset:
        folder.clear()
    folder.start_log()
    describe(model, folder, origin)
    if args.amp != 'off':
        log.info('--amp %s: %s computes in %s.', args.amp, args.model, type_name(dtype))
    if state is None:
        folder.write('config.txt', folder.config)
    else:
        for change in option.changes(state['options'], folder.config):
            log.info('Changed: %s', change)
        if args.resume > 0:
            trainer.rewind(args.resume, state['log'])
        else:
            trainer.resume(state)
    with stop:
        finished = trainer.train(args.epochs, stop.check)
    if not finished:
        log.info('%s: stopped, and saved in %s; --load %s continues.', stop.name, trainer.saved, args.save)


def schedule(args: Namespace) -> Schedule:
    """The learning rate over the run."""
    from optimizer import Schedule

    total = args.epochs if args.decay_unit == 'epochs' else args.epochs * args.test_every
    return Schedule(args.lr, args.schedule, args.decay, args.gamma, args.decay_unit, total, args.lr_min, args.warmup)


def autocast_dtype(args: Namespace, model: Model) -> torch.dtype:
    """What --amp computes in: what is asked for, or the next that the network stands."""
    return model.safe(*amp_dtypes(args))


def amp_dtypes(args: Namespace) -> list[torch.dtype]:
    """The types that --amp asks for, the first choice first."""
    import torch

    return {'off': [], 'bf16': [torch.bfloat16], 'fp16': [torch.float16, torch.bfloat16]}[args.amp]


def device(args: Namespace) -> str:
    """What networks run on: the best that there is (cuda, mps, cpu), or cpu if the options say so."""
    from system.machine import best_device

    return 'cpu' if args.cpu or args.n_GPUs == 0 else best_device()


def make_model(args: Namespace) -> Model:
    """The network, with random weights from the seed."""
    from model import Model
    from system.numerics import set_numerics

    set_numerics(args.seed, args.deterministic or device(args) == 'cpu', args.tf32)
    settings = option.network_settings(args)
    half = args.precision == 'half'
    return Model(
        args.model,
        args.scale,
        device(args),
        make_tiler(args),
        args.self_ensemble,
        half,
        args.compile,
        args.channels_last,
        bool(args.graph),
        **settings,
    )


def make_tiler(args: Namespace) -> Tiler | None:
    """What cuts images into tiles, of one shape for --compile and --graph."""
    from model.tiles.autotile import AutoTiler
    from model.tiles.tiling import MeanTiler, Tiler

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


def load(args: Namespace, model: Model) -> tuple[dict[str, Any] | None, str]:
    """Fill the network from --load or --pre_train; returns the state of a loaded run, and what the weights are."""
    from checkpoint import RunFolder
    from model.loading.weights import load_weights, read_weights

    if args.load:
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
        return state, f'weights from {source}'
    if args.pre_train:
        path = weights_file(args)
        weights, unwrapped = read_weights(path)
        upsampler = None if args.test_only else model.network.upsampler_prefix
        new = load_weights(model.net, weights, str(path), upsampler)
        inside = f' ({unwrapped})' if unwrapped else ''
        return None, f'weights from {path}{inside}' + (f'; new: {", ".join(new)}' if new else '')
    if args.test_only and model.net.state_dict():
        raise UserError(f'{args.model} has no weights to test: give a file with --pre_train or a run with --load.')
    return None, 'new weights' if model.net.state_dict() else 'no weights'


def weights_file(args: Namespace) -> Path:
    """The file that --pre_train means: a path from here, or a name in --extend."""
    from system.files import some

    path = Path(args.pre_train).expanduser()
    if not path.is_file():
        path = args.extend / path
    if not path.is_file():
        files = sorted(file.name for file in args.extend.glob('*') if file.suffix in ('.pt', '.pth', '.safetensors'))
        there = some(files) or 'none'
        raise UserError(f'--pre_train {args.pre_train}: no such file here or in {args.extend}, which holds {there}.')
    return path


def test_sets(args: Namespace, prepare: bool = True) -> list[SRData]:
    """The test sets; Demo is not one, it has no HR. Without `prepare` only their HR images are to be read."""
    sets = [make_set(args, name, args.data_range[-1], prepare) for name in args.data_test if name != 'Demo']
    twice = {images.name for images in sets if [other.name for other in sets].count(images.name) > 1}
    if twice:
        raise UserError(f'--data_test names {twice.pop()} twice: give each set once, or folders of different names.')
    return sets


def train_data(args: Namespace) -> Any:
    """Patches of the training sets."""
    from data.traindata import TrainData

    cached = args.ext != 'img'
    skip = args.skip_bad_images
    sets = [make_set(args, name, args.data_range[0], cached=cached, skip_bad=skip) for name in args.data_train]
    return TrainData(sets, args.patch_size, args.seed, not args.no_augment, skip, args.sampling == 'area')


def make_set(
    args: Namespace,
    name: str,
    span: tuple[int, int],
    prepare: bool = True,
    cached: bool = False,
    skip_bad: bool = False,
) -> SRData:
    """Find one set, and prepare it."""
    from data.sets import find_set
    from data.srdata import SRData
    from system import parallel

    images = find_set(name, args.dir_data, option.ROOT / 'benchmark', span)
    data = SRData(images, args.scale, args.lr_border, cached, args.shave, skip_bad)
    if prepare:
        with parallel.main_process_first():  # it makes what is missing
            data.prepare(args.n_threads, renew_cache=args.ext == 'sep_reset' and parallel.rank() == 0)
    return data


def make_evaluation(args: Namespace, sets: list[SRData], folder: RunFolder, save: bool, ssim: bool) -> Evaluation:
    """The scores of the test sets, and their images if `save`."""
    from evaluation import Evaluation

    return Evaluation(sets, ssim, folder.folder if save else None, args.save_gt)


def label(args: Namespace) -> str:
    """What pictures call the network: its recipe, or its name."""
    return args.template.rpartition('_x')[0] or args.model


def facts(model: Model, origin: str) -> dict[str, str]:
    """What runs where."""
    from model import n_parameters
    from system import parallel

    where = f'{model.device}, {parallel.world_size()} processes' if parallel.world_size() > 1 else str(model.device)
    network = f'{model.name} x{model.scale}, {n_parameters(model):,} parameters'
    return {'Network': network, 'Weights': origin.removeprefix('weights from '), 'Device': where}


def describe(model: Model, folder: RunFolder, origin: str) -> None:
    """Say what runs where."""
    from model import type_name

    network, _, where = facts(model, origin).values()
    log.info('%s, on %s, %s; run folder %s', network, where, origin, folder.folder)
    if model.wants_half:
        log.info('Half precision: computed in %s.', type_name(model.dtype))
    if model.tiler and not model.network.tiling_exact:
        log.info('Tiles change the result of %s: its attention sees one tile at a time.', model.name)


def write_results(
    args: Namespace, folder: RunFolder, evaluation: Evaluation, results: dict, model: Model, weights: str
) -> None:
    """Write results.json: the scores, and everything that has a say in them."""
    from model import type_name
    from system.machine import machine

    auto = args.chop == 'auto'  # when sizes differ between images, and tiles are never averaged
    size, blend = ('auto', 'ramp') if auto else (model.tiler and model.tiler.size, args.chop_blend)
    protocol = {
        'chop': {'size': size, 'overlap': args.chop_overlap, 'blend': blend} if args.chop else None,
        'self_ensemble': args.self_ensemble,
        'precision': type_name(model.dtype),
        'sets': evaluation.protocol(),
    }
    about = {'model': args.model, 'scale': args.scale, 'settings': model.settings, 'weights': weights}
    about |= {'machine': machine(model.device.type)}
    folder.write_results(about | {'protocol': protocol, 'sets': results})
    if evaluation.folder:
        log.info('Images: %s', folder.folder)


def write_report(
    args: Namespace,
    folder: RunFolder,
    evaluation: Evaluation,
    about: Mapping[str, object],
    settings: Mapping[str, object] = MappingProxyType({}),
) -> None:
    """Write report.html: `about` the run, and what is in its folder."""
    from report.page import page, read_curves

    if not folder.writes:
        return
    now = datetime.now().astimezone()
    about = {**about, 'Run folder': folder.folder, 'Date': f'{now:%Y-%m-%d %H:%M %Z}'}
    title = args.score.name if args.score else label(args)
    content = page(
        f'{title} x{args.scale}',
        about,
        evaluation.results,
        read_curves(folder.folder),
        saved_images(args, folder, evaluation),
        option.write_config(args, settings),
        option.changed(args),
    )
    folder.write_bytes('report.html', content)


def saved_images(args: Namespace, folder: RunFolder, evaluation: Evaluation) -> dict[str, list[Saved]]:
    """The enlarged images that a run left in its folder, by set."""
    from data.image import find_images, read_rgb
    from enlarge import output_names
    from report.page import Saved

    def saved(images: str, name: str, *sources: Callable) -> Saved:
        file = folder.folder / f'results-{images}' / f'{name}_x{args.scale}_SR.png'
        return Saved(name, file, args.scale, *sources)

    found = {}
    if evaluation.folder:
        for data in evaluation.sets:
            found[data.name] = [
                saved(data.name, name, partial(data.lr, i), partial(data.hr, i)) for i, name in enumerate(data.names)
            ]
    if 'Demo' in args.data_test and args.dir_demo.is_dir() and args.max_memory is None:  # which they might exceed
        files = find_images(args.dir_demo)
        demo = [saved('Demo', n, partial(read_rgb, file)) for n, file in zip(output_names(files), files, strict=True)]
        found['Demo'] = [image for image in demo if image.file.is_file()]
    return found


if __name__ == '__main__':
    sys.exit(main())
