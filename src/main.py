"""FrugalSR: options -> parts -> run.

The parts are imported inside the functions that wire them, so that `--help` and a mistyped option do without torch.
"""

from __future__ import annotations

import logging
import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import option
from error import UserError, exit_status, noting, out_of_memory, raise_noted, run_program
from options.config import changes, write_config
from options.measured import cost_models, cost_scales, several_forms
from system.start import share, tune_process

if TYPE_CHECKING:
    from pathlib import Path

    from checkpoint import RunFolder
    from data.srdata import SRData
    from evaluation import Evaluation
    from model import Model
    from report.page import Saved
    from trainer import Trainer

log = logging.getLogger('frugalsr')


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status: 0, 2 for an error that the user can fix, 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    tune_process()
    resuming = '--load NAME continues a training run from its last state.'
    try:
        return exit_status(lambda: run(option.parse(argv), argv), '--debug' in argv, resuming)
    except (MemoryError, RuntimeError) as error:
        said = explain(error)
        if not said or '--debug' in argv:
            raise
        print(f'Error: {said}', file=sys.stderr)
        return 2


def explain(error: Exception) -> str:
    """What the user can do about an error of PyTorch, or nothing."""
    from torch._dynamo.exc import TorchDynamoException

    if out_of_memory(error):
        less = 'a smaller --batch_size or --patch_size or a larger --split_batch in training, --chop in tests'
        return f'Memory ran out: give {less}.'
    if not isinstance(error, TorchDynamoException):
        return ''
    reason = str(error).partition('\n')[0]
    compiler = 'install a C++ compiler, such as g++, if there is none, or leave --compile out'
    return f'PyTorch could not compile the network ({reason}): {compiler}.'


def run(args: Namespace, argv: Sequence[str] = ()) -> None:
    """Do what the options say: measure costs, score files, test, or train; in several processes if they say so."""
    share(__file__, argv, args.n_GPUs, args.cpu, lambda: run_here(args))


def run_here(args: Namespace) -> None:
    """Do what the options say with this process alone, or with it as one of several that share the run."""
    from checkpoint import RunFolder, start_screen
    from model.ops.fast import leave_out_kernels
    from system import parallel
    from wiring import apply_detected_network

    start_screen(quiet=parallel.rank() > 0)
    if args.kernels == 'off':
        leave_out_kernels()
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
            option.continue_run(args)
        with folder.locked():
            train(args, folder)


def costs(args: Namespace, folder: RunFolder) -> None:
    """Print what networks cost, and write it as JSON and as a picture."""
    import json

    from measure.costs import find_pairs, measure_all, points, table
    from report.picture import scatter
    from wiring import device

    pairs = find_pairs(cost_models(args), cost_scales(args))
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
    from measure.engines import beside_engines, parse_engines
    from measure.speed import Form, profile_all
    from measure.speed_forms import DEFAULT, parse_forms, profile_forms
    from measure.speed_report import NOTE, compare, growths, parts, read_report, table
    from report.picture import bars, growth
    from wiring import amp_dtypes, device

    old = read_report(args.compare) if args.compare else None
    if args.profile:
        pairs, where = find_pairs(cost_models(args), cost_scales(args)), device(args)
        several = several_forms(args, where)
        forms = parse_forms(args.forms or DEFAULT, where) if several else {}
        engines = parse_engines(args.against, where) if args.against else []
        folder.start_log()
        if (before := folder.folder / 'profile.json').is_file():
            folder.write('profile_before.json', before.read_text())
        form = Form(args.compile, args.channels_last, tuple(amp_dtypes(args)))
        if several:
            reports = profile_forms(pairs, where, forms, log.info)
        else:
            reports = profile_all(pairs, where, form, args.growth, log.info)
        if engines:
            reports = beside_engines(reports, engines, log.info)
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


def score(args: Namespace, folder: RunFolder) -> None:
    """Score images that any program made."""
    from evaluation import read_outputs, table
    from wiring import test_sets

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
    from data.outputs import claim
    from evaluation import SHEET_ROWS, table, timed
    from photo.demo import enlarge_folder, find_photos
    from report import attention
    from report.run import describe, facts, show_attention
    from system import parallel
    from wiring import load, make_model, test_sets

    model = make_model(args)
    if args.show_attention:
        attention.source(model)  # which complains
    _, origin = load(args, model)
    evaluation = make_evaluation(args, test_sets(args), folder, save=args.save_results, ssim=True)
    if 'Demo' in args.data_test:
        find_photos(args.dir_demo)  # which complains
        with parallel.main_process_first():
            if folder.writes:
                claim(demo_folder(folder), args.dir_demo, args.reset)
    folder.start_log()
    describe(model, folder, origin)
    if not folder.holds_training():
        folder.write('config.txt', write_config(args, model.settings))
    if evaluation.sets:
        results = evaluation(timed(model), label(args))
        log.info('%s', table(results))
        write_results(args, folder, evaluation, results, model, str(origin))
    failures = [*evaluation.failures]
    with noting(failures):
        if 'Demo' in args.data_test:
            limit = args.max_memory if model.device.type == 'cpu' else None
            enlarge_folder(model, args.dir_demo, demo_folder(folder), limit)
    with noting(failures):
        if args.show_attention and folder.writes:
            show_attention(model, saved_images(args, folder, evaluation), SHEET_ROWS)
    with noting(failures):
        write_report(args, folder, evaluation, facts(model, origin.source), model.settings)
    raise_noted(failures)


def export(args: Namespace, folder: RunFolder) -> None:
    """Write a network as a file for other programs."""
    from export import SUFFIXES, export
    from report.run import describe
    from wiring import load, make_model

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
    from evaluation import timed
    from model import type_name
    from report.board import Board
    from report.run import describe, facts
    from system import parallel
    from system.stopping import Stop
    from wiring import autocast_dtype, load, make_model, make_phases, make_trainer, test_sets, train_data

    check_is_free(args, folder)
    model = make_model(args)
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError(f'{args.model} has nothing to train: use it with --test_only.')
    phases = make_phases(args, model)
    folder.config = write_config(args, model.settings)
    state, origin = load(args, model)
    data, sets = train_data(args), test_sets(args)
    evaluation = make_evaluation(args, sets, folder, save=args.save_results, ssim=args.ssim)
    stop, board = Stop(args.max_time), Board(folder.folder / 'tensorboard')

    def evaluate(epoch: int) -> dict[str, Any]:
        model.weights = f'the weights of epoch {epoch}'
        results = evaluation(timed(model), label(args), stop.check)
        write_results(args, folder, evaluation, results, model, f'epoch {epoch}')
        for failure in evaluation.failures:  # no reason to end a run
            log.warning('%s', failure)
        return results

    def on_epoch_end(record: dict[str, Any]) -> None:
        if parallel.rank() == 0:
            board.write(record, evaluation.shown)
            try:
                write_report(args, folder, evaluation, facts(model, f'epoch {record["epoch"]}'), model.settings)
            except UserError as error:
                log.warning('%s', error)

    trainer = make_trainer(args, model, phases, data, sets, evaluate, folder, on_epoch_end)
    if args.reset:
        folder.clear()
    folder.start_log()
    describe(model, folder, origin)
    if args.amp != 'off':
        log.info('--amp %s: %s computes in %s.', args.amp, args.model, type_name(autocast_dtype(args, model)))
    for phase in phases if len(phases) > 1 else ():
        log.info('From epoch %d on: %s', phase.begin + 1, phase)
    if state is None:
        if not args.template:
            log.info('%s', option.recipe_note(args))
        folder.write('config.txt', folder.config)
    else:
        resume(args, folder, trainer, state)
    with stop:
        finished = trainer.train(args.epochs, stop.check)
    if not finished and trainer.saved:
        log.info('%s: stopped, and saved in %s; --load %s continues.', stop.name, trainer.saved, args.save)
    elif not finished:
        log.warning('%s: stopped, and nothing is saved that could be continued.', stop.name)


def check_is_free(args: Namespace, folder: RunFolder) -> None:
    """Refuse to train over another run."""
    if folder.holds_training() and not (args.load or args.reset):
        raise UserError(
            f'{folder.folder} holds a training run: --load {args.save} continues it, --reset deletes it, '
            'another --save keeps it.'
        )


def resume(args: Namespace, folder: RunFolder, trainer: Trainer, state: dict[str, Any]) -> None:
    """Go on from a state, or from the epoch that --resume names."""
    for change in changes(state['options'], folder.config):
        log.info('Changed: %s', change)
    if args.resume > 0:
        trainer.rewind(args.resume, state['log'])
    else:
        trainer.resume(state)


def make_evaluation(args: Namespace, sets: list[SRData], folder: RunFolder, save: bool, ssim: bool) -> Evaluation:
    """The scores of the test sets, and their images if `save`."""
    from evaluation import Evaluation
    from metric import METRICS

    metrics = [each for each in METRICS if ssim or not each.slow]
    return Evaluation(sets, metrics, folder.folder if save else None, args.save_gt)


def label(args: Namespace) -> str:
    """What pictures call the network: its recipe, or its name."""
    return args.template.rpartition('_x')[0] or args.model


def write_results(
    args: Namespace, folder: RunFolder, evaluation: Evaluation, results: dict, model: Model, weights: str
) -> None:
    """Write results.json, and say where the images are."""
    from report import run
    from wiring import protocol

    run.write_results(folder, model, weights, protocol(args, model) | {'sets': evaluation.protocol()}, results)
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
    from report import run

    title = f'{args.score.name if args.score else label(args)} x{args.scale}'
    saved, config = saved_images(args, folder, evaluation), write_config(args, settings)
    run.write_report(folder, title, about, evaluation.results, saved, config, option.changed(args))


def saved_images(args: Namespace, folder: RunFolder, evaluation: Evaluation) -> dict[str, list[Saved]]:
    """The enlarged images that a run left in its folder, by set."""
    from photo.demo import saved_photos

    found = evaluation.saved()
    if 'Demo' in args.data_test and args.max_memory is None:  # which they might exceed
        found['Demo'] = saved_photos(args.dir_demo, demo_folder(folder), args.scale)
    return found


def demo_folder(folder: RunFolder) -> Path:
    """Where the images of the Demo folder go."""
    return folder.folder / 'results-Demo'


if __name__ == '__main__':
    run_program(main)
