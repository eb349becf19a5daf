"""A command line -> options: what is typed, what a loaded run had, what a recipe says, defaults."""

import argparse
import difflib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import networks
from error import UserError
from networks import MODELS
from options.checks import check, check_phases
from options.config import NOT_RESTORED, read_config
from options.kinds import Parser
from options.table import NETWORK_SETTINGS, SETTINGS, build_parser
from template import TEMPLATES, Recipe

FIXED_IN_A_RUN = ('model', 'scale', 'optimizer', 'net', *NETWORK_SETTINGS)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Options of a command line: what is typed, else what the loaded run had, else the recipe's, else the default.

    Raises:
        UserError: unknown option, value out of range, unknown recipe, or a combination that cannot be.
    """
    argv, parser = sys.argv[1:] if argv is None else argv, build_parser()
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
                _check_kind(args.load, key, value, parser.get_default(key))
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
    check(args)
    if not (args.test_only or args.score or args.costs or args.profile or args.compare):
        check_phases(args, [word.partition('=')[0] for word in argv])
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


def _check_kind(run: str, key: str, value: object, default: object) -> None:
    """Refuse what is no number or no switch in config.txt where there is one; texts are checked like typed ones."""
    kinds = {bool: (bool,), int: (int, float, str), float: (int, float, str)}.get(type(default))
    if kinds and type(value) not in kinds:
        raise UserError(f'config.txt of the run {run} has {key}: {json.dumps(value)}, which cannot be: mend that line.')


def apply_detected_network(args: argparse.Namespace, name: str, scale: int, settings: Mapping[str, object]) -> None:
    """Put the network that --model auto found into the options.

    Args:
        args: what was typed; in training the scale stays.
        name: of the network.
        scale: of the weights.
        settings: those that are not as in the paper.

    Raises:
        UserError: the options do not go with it.
    """
    if args.test_only and args.scale not in (None, scale):
        raise UserError(f'--scale {args.scale}: {args.pre_train} holds weights of {name} x{scale}; leave it out.')
    args.model, args.scale = name, args.scale or scale
    for key, value in settings.items():
        if key in SETTINGS:
            setattr(args, key, value)
        else:
            args.net.append(f'{key}={value}')
    check(args)
    args.save = args.save or _default_name(args)


def continue_run(args: argparse.Namespace) -> None:
    """Have a run that was started anew by its launcher go on from its own last state."""
    args.load, args.resume, args.reset = args.save, -1, False


def _default_name(args: argparse.Namespace) -> str:
    """Name of a run that was given none; tests and exports never write into the folder of a training run."""
    if args.score:
        return f'{args.score.name}_score'
    if args.costs:
        return 'costs'
    if args.profile or args.compare:
        return 'profile'
    name = args.load or args.template or f'{args.model}_x{args.scale}'
    if not args.test_only:
        return name
    weights, demo = _weights_name(Path(args.pre_train)), 'Demo' in args.data_test
    parts = [name, '' if weights == name else weights, args.dir_demo.name if demo else '']
    return '_'.join([*filter(None, parts), 'export' if args.export else 'demo' if demo else 'test'])


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


def network_settings(args: argparse.Namespace, model: str | None = None) -> dict[str, object]:
    """The network settings that were given, of `model` if that is not yet known; others are as in its paper.

    Raises:
        UserError: --net names one that the network does not have, or gives a value of another type.
    """
    given = {key: value for key in NETWORK_SETTINGS if (value := getattr(args, key)) is not None}
    return given | networks.parse_settings(model or args.model, args.net)


def changed(args: argparse.Namespace) -> list[str]:
    """The options that are not at their default, whether typed, of a recipe or of a loaded run."""
    default = vars(parse([]))
    return [key for key, value in vars(args).items() if value != default[key]]
