"""Combinations of options that cannot be."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from error import UserError
from loss_language import find_whole_batches, known_terms, parse
from networks import MODELS
from options.measured import ONE_FORM, cost_models
from options.table import NETWORK_SETTINGS
from template import TEMPLATES


def tests_on_training_images(args: argparse.Namespace) -> bool:
    """Whether images of DIV2K are tested that it is trained on, by the ranges."""
    (first, last), (first_tested, last_tested) = args.data_range[0], args.data_range[-1]
    both = 'DIV2K' in args.data_train and 'DIV2K' in args.data_test
    return both and first <= last_tested and first_tested <= last


def check_ranges(args: argparse.Namespace) -> None:
    """No image is for training and for tests, among which the best weights are found."""
    if tests_on_training_images(args):
        given = '/'.join(f'{first}-{last}' for first, last in args.data_range)
        raise UserError(
            f'--data_range {given}: DIV2K would be tested on images that it is trained on; give two ranges that have '
            'none in common, such as 1-800/801-810.'
        )


def check(args: argparse.Namespace) -> None:
    """Combinations of options that cannot be, and names that there are not."""
    measured = next((option for option in ('costs', 'profile', 'compare') if getattr(args, option)), None)
    for name in cost_models(args) if measured else [args.model]:
        if name not in MODELS and (name != 'auto' or measured):
            raise UserError(f'Unknown network {name!r}: choose one of {", ".join(MODELS)}.')
    if args.growth and not args.profile:
        raise UserError('--growth: it is measured with --profile; give both.')
    if args.against:
        if not args.profile:
            raise UserError(f'--against {args.against}: it is measured with --profile; give both.')
        for option in ('compile', 'channels_last', 'amp'):
            if getattr(args, option) not in (False, 'off'):
                raise UserError(f'--{option}: --against compares in float32, eager; give one of them.')
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
        if args.tf32:
            raise UserError(
                f'--tf32: --{measured} measures float32 in full; --profile --forms tf32 measures the other.'
            )
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
        check_recipe(args)
    training = not (args.test_only or args.score)
    if training and args.scale and args.patch_size % args.scale:
        raise UserError(f'--patch_size {args.patch_size} is not a multiple of --scale {args.scale}: choose another.')
    if training and args.split_batch > args.batch_size:
        raise UserError(f'--split_batch {args.split_batch} exceeds --batch_size {args.batch_size}: choose fewer parts.')
    if training:
        check_ranges(args)
        check_losses(args)
        if len(args.patch_schedule) > args.epochs:
            raise UserError(
                f'--patch_schedule has {len(args.patch_schedule)} sizes, and --epochs {args.epochs} not one for each: '
                'give fewer sizes, or more epochs.'
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
        if args.reset and not args.test_only:
            raise UserError(f'--reset deletes the run that --load {args.load} continues: give one of them.')
        if args.save not in ('', args.load) and not args.test_only:
            raise UserError(f'--save {args.save}: the run {args.load} goes on in its own folder; leave it out.')
        if args.save == args.load and args.test_only:
            raise UserError(
                f'--save {args.save}: tests and exports leave the folder of the run as it is; give another name.'
            )
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
    if args.reset and args.test_only and 'Demo' not in args.data_test:
        raise UserError('--reset deletes a run and --test_only measures one: give one of them, or --data_test Demo.')
    for option in ('save', 'load'):
        value = getattr(args, option)
        if Path(value).name != value or value == '..':
            raise UserError(f'--{option} {value}: give a name without folders; --save_dir is the folder of the runs.')


def check_losses(args: argparse.Namespace) -> None:
    """Refuse losses that do not go with each other or with the batches, and a teacher that has none."""
    losses = [args.loss, *([args.loss_final] if args.loss_final else [])]
    for text in losses:
        if (names := find_whole_batches(text)) and args.split_batch > 1:
            raise UserError(
                f'--split_batch {args.split_batch}: {names[0]} of the loss {text} sees whole batches; leave one out.'
            )
    if args.loss_final and args.final_epochs >= args.epochs:
        raise UserError(
            f'--final_epochs {args.final_epochs}: of --epochs {args.epochs} none would be left for --loss {args.loss}; '
            'give fewer.'
        )
    learns = bool(args.distill) or any('Distill' in parse(text, known_terms()) for text in losses)
    if learns and not args.teacher:
        raise UserError('--distill, or a loss with Distill: name the weights of the network to learn from, --teacher.')
    if args.teacher and not learns:
        raise UserError(f'--teacher {args.teacher}: say with --distill how much its output counts, or leave it out.')


def check_phases(args: argparse.Namespace, typed: Sequence[str]) -> None:
    """Refuse settings of a schedule, or of a loss, that is not taken; `typed` is the command line."""
    if args.schedule == 'step':
        for option in ('lr_min', 'restarts'):
            if value := getattr(args, option):
                raise UserError(f'--{option} {value}: it is of --schedule cosine; give that, or --{option} 0.')
    elif given := [option for option in ('--decay', '--gamma') if option in typed]:
        raise UserError(f'{given[0]}: the cosine goes down by itself; leave it out, or give --schedule step.')
    if args.final_epochs > 1 and not args.loss_final:
        raise UserError(
            f'--final_epochs {args.final_epochs}: say with --loss_final what they learn, or give --final_epochs 1.'
        )


def check_recipe(args: argparse.Namespace) -> None:
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
