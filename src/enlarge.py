"""Enlarges photographs: files, folders, several of them, to a factor or a size, with all that their files say."""

from __future__ import annotations

import logging
import sys
import time
from argparse import ArgumentTypeError, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from error import UserError, exit_status, run_program
from options.kinds import Parser, count, folder, memory_size, natural, number
from options.table import ROOT
from photo.size import LARGEST
from system.start import share, tune_process

if TYPE_CHECKING:
    from photo.choice import Networks

log = logging.getLogger('frugalsr')

EXAMPLES = """examples:
  python enlarge.py photo.jpg                                  photo_x4.png beside it
  python enlarge.py HOLIDAY -r -o BIG --scale 2 --format jpg   a folder and its folders
  python enlarge.py *.jpg --fit 3840x2160                      as large as a screen
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status: 0, 2 for an error that the user can fix, 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    tune_process()
    return exit_status(lambda: run(parse(argv), argv), '--debug' in argv, 'the same command goes on with what is left.')


def build_parser() -> Parser:
    """The options."""
    parser = Parser('enlarge.py', 'Enlarge photographs.', 'PHOTO... [options]', EXAMPLES)
    add = parser.add_argument_group('what and where to').add_argument
    add('photos', metavar='PHOTO', nargs='+', help='files, folders, or patterns such as "*.jpg"')
    add('-r', '--recursive', action='store_true', help='the folders in a folder too')
    add('-o', '--output', metavar='PATH', type=folder, help='folder, or for a single photograph file, of the results; '
        'left out: beside each photograph')  # fmt: skip
    add('--name', metavar='PATTERN', help='of the names, without suffix, with {stem}, {name} (with suffix), {scale}, '
        '{width}, {height} (default: {stem}_x{scale}, for a size {stem}_{width}x{height})')  # fmt: skip
    add('--again', action='store_true', help='make what is done already too, and replace files of other programs')
    add = parser.add_argument_group('size').add_argument
    factor = number(float, 0, LARGEST, open_low=True)
    add('--scale', metavar='X', type=factor, help='factor, such as 2 or 1.5 (default: 4)')
    add('--fit', metavar='WxH', type=frame, help='as large as fits into a frame, such as 3840x2160')
    add('--width', metavar='N', type=count, help='pixels of the result')
    add('--height', metavar='N', type=count, help='pixels of the result')
    add = parser.add_argument_group('format').add_argument
    add('--format', choices=('png', 'jpg', 'webp', 'tif', 'gif', 'same'), help='of the results; same: that of each '
        'photograph (default: png, for several pages tif, or as -o FILE says)')  # fmt: skip
    add('--quality', metavar='N', type=number(int, 1, 100), default=95, help='of jpg and webp')
    add('--background', metavar='COLOUR', default='white', help='behind what is transparent, in jpg')
    add = parser.add_argument_group('network').add_argument
    add('--model', metavar='NAME', help='network whose weights in models/ to take (default: the best there by Set5)')
    add('--weights', metavar='FILE', help='weights of any network known here')
    add('--self_ensemble', action='store_true', help='average over flips and rotations: slower, a little better')
    add('--seamless', action='store_true', help='for textures that are laid out in tiles: the border goes on at the '
        'opposite one')  # fmt: skip
    add(
        '--precision',
        choices=('single', 'half'),
        default='single',
        help='half: faster on a GPU, mostly slower on a CPU',
    )
    add = parser.add_argument_group('machine').add_argument
    add('--cpu', action='store_true', help='leave the GPU alone')
    add('--n_GPUs', metavar='N', type=natural, default=1, help='GPUs that share the photographs')
    add('--max_memory', metavar='N', type=memory_size, help='most memory of a process on a CPU, or of the GPU, such '
        'as 2G or 700M')  # fmt: skip
    add('--debug', action='store_true', help='show the traceback of an error')
    return parser


def frame(text: str) -> tuple[int, int]:
    """Width and height, from text such as 3840x2160."""
    try:
        width, height = (int(count(part)) for part in text.lower().split('x'))
    except (ValueError, ArgumentTypeError) as error:
        raise ArgumentTypeError(f'{text!r} is not a frame such as 3840x2160') from error
    return width, height


def colour(text: str) -> tuple[int, int, int]:
    """Red, green and blue, from a name or #rrggbb.

    Raises:
        UserError: it is none.
    """
    from PIL import ImageColor

    try:
        return ImageColor.getrgb(text)[:3]
    except ValueError as error:
        raise UserError(f'--background {text} is not a colour: give one such as white or #808080.') from error


def parse(argv: Sequence[str]) -> Namespace:
    """Options of a command line.

    Raises:
        UserError: one that is unknown or out of range, or a combination that cannot be.
    """
    args = build_parser().parse_args(argv)
    sizes = [name for name in ('scale', 'fit', 'width', 'height') if getattr(args, name)]
    if len(sizes) > 1:
        raise UserError(f'--{sizes[0]} and --{sizes[1]}: give one of them; --fit WxH has both width and height.')
    if args.model and args.weights:
        raise UserError('--model and --weights: weights say their network; give one of them.')
    return args


def run(args: Namespace, argv: Sequence[str]) -> None:
    """Enlarge what the options say, in several processes if they say so."""
    share(__file__, argv, args.n_GPUs, args.cpu, lambda: enlarge(args))


def enlarge(args: Namespace) -> None:
    """Enlarge what the options say, with this process alone or with it as one of several.

    Raises:
        UserError: a mistake in the options, before anything is done; or photographs that were not enlarged, at the end.
    """
    from checkpoint import start_screen
    from photo.engine import enlarge_photos, raise_failures
    from photo.plan import make_plan
    from photo.size import Size
    from photo.targets import check_name, choose_place, find_sources
    from photo.writing import Format
    from system import parallel
    from system.files import sweep

    start_screen(quiet=parallel.rank() > 0)
    start = time.perf_counter()
    scale = args.scale if args.fit or args.width or args.height else args.scale or 4
    width, height = args.fit or (args.width, args.height)
    name = check_name(args.name or ('{stem}_x{scale}' if scale else '{stem}_{width}x{height}'))
    format = Format(args.format, args.quality, colour(args.background))
    networks = make_networks(args)
    plan = None
    if parallel.rank() == 0:
        sources, failures = find_sources(args.photos, args.recursive, args.output)
        place, format = choose_place(args.output, name, format, sources)
        settings = f'{args.self_ensemble} {args.precision} {args.seamless}'
        size = Size(scale, width, height)
        plan = make_plan(sources, size, place, format, networks, settings, args.again)
        plan.failures[:0] = failures
        for target in {job.target.parent for job in plan.jobs}:
            sweep(target)
    plan, format = parallel.broadcast((plan, format))
    limit = args.max_memory if networks.device == 'cpu' else None
    outcome = enlarge_photos(plan.jobs, networks, format, limit, args.seamless)
    if parallel.rank():
        return
    there = f'; {plan.done} were done before (--again makes them anew)' if plan.done else ''
    where = {str(job.target.parent) for job in plan.jobs}
    seconds = time.perf_counter() - start
    log.info(
        'Enlarged in %.1f s: %d%s%s', seconds, outcome.done, f' in {where.pop()}' if len(where) == 1 else '', there
    )
    raise_failures(plan.failures + outcome.failures, outcome.left, plan.done + len(plan.jobs) + len(plan.failures))


def make_networks(args: Namespace) -> Networks:
    """The networks that the options leave to choose from."""
    from api import BATCH, OVERLAP, find_weights
    from model import Model
    from model.loading.weights import load_model
    from model.tiles.autotile import AutoTiler
    from photo.choice import Networks, Weights, named_scale, weights_of
    from system.machine import best_device
    from system.numerics import set_numerics

    device = 'cpu' if args.cpu or args.n_GPUs == 0 else best_device()
    set_numerics(seed=1, deterministic=device == 'cpu', tf32=False)
    half = args.precision == 'half'

    def tiler() -> AutoTiler:
        return AutoTiler(OVERLAP, BATCH if device == 'cuda' else 1, device, args.max_memory)

    def load(file: Path, scale: int | None) -> Model:
        return load_model(file, device, tiler(), scale=scale, ensemble=args.self_ensemble, half=half)

    def load_known(weights: Weights) -> Model:
        if weights.file is None:
            return Model(weights.network, weights.scale, device, tiler(), args.self_ensemble, half)
        return load(weights.file, weights.scale)

    if not args.weights:
        return Networks(weights_of(args.model, ROOT / 'models'), load_known, device)
    file = find_weights(args.weights)
    whole = int(args.scale) if args.scale and args.scale == int(args.scale) else None
    model = load(file, named_scale(file) or whole)
    return Networks([Weights(model.name, model.scale, file)], lambda _: model, device)


if __name__ == '__main__':
    run_program(main)
