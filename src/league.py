"""Train every light network for the same minutes on the same patches, and write docs/LEAGUE.md and docs/league.png.

The same command goes on where it stopped, within a network too. Options that it does not know are those of main.py and
hold for all networks, such as `--amp bf16 --n_threads 8` on a GPU.
"""

import json
import re
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import main as program
import option
from error import UserError, exit_status, run_program
from networks import MODELS, settings_of
from options.kinds import Parser, folder, number
from options.table import ROOT
from system import stopping
from system.files import write_atomic
from system.start import tune_process
from template import TEMPLATES

NETWORKS = (
    'EDSR-baseline', 'IMDN', 'PAN', 'BSRN', 'SwinIR-light', 'OmniSR', 'DLGSANet-tiny', 'DLGSANet-light', 'ASID',
    'ASIDd8', 'ATD-light', 'HiT-SRF', 'CATANet', 'PFT-light', 'ESC', 'ESC-light', 'ESC-FP', 'LCoAN-small',
)  # fmt: skip
SCALE = 2
OUTPUT = (1280, 720)
DONE = 0.02  # of the time: as much may be missing at the end
# LR patches of 64 pixels: a multiple of nearly all windows. One epoch that never ends, so that no test takes time.
RECIPE = (
    '--data_train SR291 --sampling area --patch_size 128 --batch_size 8 --lr 5e-4 --warmup 100 --weight_ema 0.99 '
    '--epochs 1 --test_every 100000000 --data_test Set5 --n_threads 0 --seed 1'
)
NOTE = """# A league of short runs

Written by `python src/league.py`. Every light network from nothing, x{scale}, {minutes:g} minutes each on {where};
on a CPU these are processor time, of which other programs take nothing. The same images, patches, rate and seed.
Options of all runs: `{recipe}`.

This says how far a network comes in a short time on this machine, which is what somebody sees who tries it. It does not
say which one is better after the half million steps of a paper: a fast network has seen many more patches here than a
slow one, the rate suits some better than others, and of one seed differences of a few hundredths of a dB mean nothing.

![PSNR against parameters](league.png)
"""
HEAD = (
    'Network', 'Set5, PSNR / SSIM', 'Parameters', 'Multiply-adds at 1280x720', 'Steps', 'Patches', 'Patches a second',
)  # fmt: skip

Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 2 for an error that the user can fix, 130 after Ctrl-C or SIGTERM."""
    argv = sys.argv[1:] if argv is None else argv
    tune_process()
    return exit_status(lambda: run(*build_parser().parse_known_args(argv)), '--debug' in argv)


def build_parser() -> Parser:
    """The options of league.py."""
    parser = Parser(prog='league.py', description=__doc__.split('\n\n', maxsplit=1)[1])
    parser.add_argument('--minutes', type=number(float, 0, open_low=True), default=60, help='of each network')
    parser.add_argument('--networks', metavar='NAMES', default='+'.join(NETWORKS), help='joined by +')
    for name, place, what in (
        ('save_dir', ROOT / 'experiment' / 'league', 'folder of the runs'),
        ('out', ROOT / 'docs' / 'LEAGUE.md', 'file to write'),
    ):
        parser.add_argument(f'--{name}', metavar='PATH', type=folder, default=place, help=what)
    parser.add_argument('--debug', action='store_true', help='show the traceback of an error')
    return parser


def run(args: Namespace, more: Sequence[str]) -> None:
    """Train and score what is missing, and write the page after each network.

    Raises:
        UserError: options that main.py refuses, or runs of other minutes or options in the folder.
        KeyboardInterrupt: a run was told to stop before its time was up.
    """
    rows: list[Row] = []
    for name in args.networks.split('+'):
        train(args, name, [*RECIPE.split(), *more])
        rows.append(scored(args, name, ['--cpu'] if '--cpu' in more else []))
        write_atomic(args.out.with_name('league.png'), picture(rows))
        write_atomic(args.out, page(rows, args.minutes, more).encode())
    print(f'Written: {args.out}')


def train(args: Namespace, name: str, recipe: Sequence[str]) -> None:
    """Give a network the rest of its minutes; `league.json` in its folder says how many seconds it had.

    On a CPU these are of its threads' processor time, so that other programs take nothing from it.
    """
    from wiring import device

    place = args.save_dir / name / 'league.json'
    asked = {'minutes': args.minutes, 'options': list(recipe)}
    had = json.loads(place.read_text()) if place.is_file() else {**asked, 'seconds': 0.0}
    if {key: had[key] for key in asked} != asked:
        raise UserError(f'{place} is of a run with other minutes or options: give these, or another --save_dir.')
    left = 60 * args.minutes - had['seconds']
    if left <= DONE * 60 * args.minutes:
        return
    on_cpu = device(option.parse([*network(name), *recipe])) == 'cpu'
    clock = processor_seconds if on_cpu else time.monotonic
    new = ['--save', name, '--reset', *network(name), '--scale', str(SCALE), *recipe]
    what = ['--load', name] if had['seconds'] else new
    line = [*what, '--max_time', f'{left:.1f}', '--save_dir', str(args.save_dir)]
    (args.save_dir / f'{name}_test' / 'results.json').unlink(missing_ok=True)  # of the weights that there were
    start, before, stopping.clock = clock(), stopping.clock, clock
    try:
        program.run(option.parse(line), line)
    finally:
        stopping.clock = before
    took = clock() - start
    write_atomic(place, json.dumps({**had, 'seconds': had['seconds'] + took}).encode())
    if took < left:
        raise KeyboardInterrupt


def processor_seconds() -> float:
    """What each thread of this process has computed for, on average."""
    import torch

    return time.process_time() / torch.get_num_threads()


def network(name: str) -> list[str]:
    """The options that choose a network: its name, or the settings of our recipe where no paper has it."""
    recipe = TEMPLATES.get(f'{name}_x{SCALE}')
    if name in MODELS or recipe is None:
        return ['--model', name]
    settings = (
        word for key in settings_of(recipe['model']) if key in recipe for word in (f'--{key}', str(recipe[key]))
    )
    return ['--model', recipe['model'], *settings]


def scored(args: Namespace, name: str, where: Sequence[str]) -> Row:
    """What a trained network costs, has seen and reaches on Set5."""
    from measure.costs import multiply_adds
    from model import build, n_parameters
    from system.files import read_torch

    folder = args.save_dir / name
    if not (args.save_dir / f'{name}_test' / 'results.json').is_file():
        line = ['--load', name, '--test_only', '--save', f'{name}_test', '--save_dir', str(args.save_dir), *where]
        program.run(option.parse(line), line)
    found = json.loads((args.save_dir / f'{name}_test' / 'results.json').read_text())
    state: Any = read_torch(folder / 'state.pt')
    options = option.parse(['--load', name, '--save_dir', str(args.save_dir)])
    settings = option.network_settings(options)
    width, height = (side // SCALE for side in OUTPUT)
    return {
        'name': name,
        'parameters': n_parameters(build(options.model, SCALE, **settings)),
        'multiply_adds': multiply_adds(options.model, SCALE, height, width, **settings),
        'steps': state['step'],
        'patches': state['step'] * options.batch_size,
        'seconds': json.loads((folder / 'league.json').read_text())['seconds'],
        'score': found['sets']['Set5'],
        'machine': found['machine'],
    }


def page(rows: Sequence[Row], minutes: float, more: Sequence[str]) -> str:
    """The whole of LEAGUE.md, the best network first."""
    from results import machines, scores, table

    cells = [
        [
            row['name'], scores(row['score']), f'{row["parameters"] / 1e3:.0f}K', f'{row["multiply_adds"] / 1e9:.1f}G',
            str(row['steps']), str(row['patches']), f'{row["patches"] / row["seconds"]:.1f}',
        ]
        for row in sorted(rows, key=lambda row: -row['score']['psnr'])
    ]  # fmt: skip
    given = re.split(r'\s+(?=--)', ' '.join([RECIPE, *more]))
    options = {option.split()[0]: option for option in given if not option.startswith('--dir_')}  # the last one counts
    recipe = ' '.join(options.values())
    note = NOTE.format(scale=SCALE, minutes=minutes, where=machines(rows), recipe=recipe)
    return '\n'.join([note, *table(HEAD, cells), ''])


def picture(rows: Sequence[Row]) -> bytes:
    """PSNR against parameters."""
    from report.picture import scatter

    points = [(row['name'], row['parameters'], row['score']['psnr'], row['multiply_adds']) for row in rows]
    return scatter({f'Set5 x{SCALE}': points}, 'area: multiply-adds at 1280x720')


if __name__ == '__main__':
    run_program(main)
