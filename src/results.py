"""Measure the weights in models/ and bicubic on the benchmarks, and write docs/RESULTS.md from their results.json."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import sys
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import main as program
import option
from data.sets import find_set
from error import UserError, exit_status, run_program
from measure.published import PUBLISHED, SAME_IMAGES, SETS, SIZES
from metric import METRICS
from options.kinds import Parser, folder
from options.table import ROOT
from system.files import write_atomic
from system.start import tune_process
from template import TEMPLATES

log = logging.getLogger('frugalsr')

MEASURED = SETS[:4]  # for Manga109 there are no images here
WHOLE_SETS = SETS[:3]  # of which all images are here
STUDIED = ('Set5',)
WHOLE = '--no_chop'
STUDIES = {
    'whole images': WHOLE,
    'tiles of 48': '--chop --chop_blend ramp --chop_overlap 20 --chop_size 48',
    'tiles of 96': '--chop --chop_blend ramp --chop_overlap 20 --chop_size 96',
    'tiles of 192': '--chop --chop_blend ramp --chop_overlap 20 --chop_size 192',
    'self-ensemble': f'{WHOLE} --self_ensemble',
    'bfloat16': f'{WHOLE} --precision half',
}
TRAINED_ON = {'DIV2K': ['DIV2K'], 'DF2K': ['DIV2K', 'Flickr2K']}
DEGRADATIONS = ('jpeg75', 'jpeg40', 'noise5+jpeg60')
NOTE = """# Results

Written by `python src/results.py --dir_data DATA` from the `results.json` of its runs. Measured on {where}.

PSNR in dB / SSIM on luma, LR by MATLAB's bicubic, borders and tiles as the recipe of each network says
([docs/PROTOCOLS.md](PROTOCOLS.md)). The weights are those of [models/](../models), tested as the recipe of their name
says. Their cards say how they were trained: in short runs on few images. Published figures stand in tables of
their own: they are of networks trained for long on DIV2K (800 images), DF2K (3,450 images) or SR291, and are
copied from their sources ([src/measure/published.py](../src/measure/published.py)), not measured. A column of fewer
images than a set has, as its title says, cannot be held against a published one.
"""

PHOTOS = """## Photographs as they are

PSNR in dB / SSIM where the LR images are degraded as `--degradation` says ([docs/PROTOCOLS.md](PROTOCOLS.md)), in the
same way in every run: bicubic, weights for clean images, and those trained with `--degradation photo`.
"""

STUDY = """## Self-ensemble, tiles, bfloat16

Seconds are of the machine where that file was tested: the ratios can be compared from file to file, the seconds cannot.
"""

AUTHORS = """## The authors' weights

Files of the networks' authors, tested as the recipe of their name says: PSNR in dB / SSIM as above, and the PSNR that
was published. Measured on {where}.
"""

Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 2 for an error that the user can fix, 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    tune_process()
    return exit_status(lambda: run(build_parser().parse_args(argv)), '--debug' in argv)


def build_parser() -> Parser:
    """The options of results.py."""
    parser = Parser(
        prog='results.py',
        description='Measure weights on the benchmarks and write docs/RESULTS.md; what is measured of them already is '
        'kept.',
    )
    for name, place, what in (
        ('dir_data', ROOT / 'dataset', 'folder of the image sets'),
        ('extend', ROOT / 'models', 'folder of the weights'),
        ('save_dir', ROOT / 'experiment' / 'results', 'folder of the runs'),
        ('out', ROOT / 'docs' / 'RESULTS.md', 'file to write'),
    ):
        parser.add_argument(f'--{name}', metavar='PATH', type=folder, default=place, help=what)
    parser.add_argument(
        '--authors',
        metavar='PATH',
        type=folder,
        help="folder of weights of the networks' authors, each file named after its recipe, such as IMDN_x2.pth",
    )
    parser.add_argument('--cpu', action='store_true', help='use the CPU even if there is a GPU')
    parser.add_argument('--debug', action='store_true', help='show the traceback of an error')
    return parser


def run(args: Namespace) -> None:
    """Measure what is missing, and write the page."""
    weights = {path.stem: network(path) for path in files(args.extend, '*.pt', '--extend')}
    scales = sorted({scale_of(name) for name in weights})
    theirs = {path.stem: network(path) for path in files(args.authors, '*.pth', '--authors')} if args.authors else {}
    found = {
        f'Bicubic_x{s}': measured(args, f'Bicubic_x{s}', ['--model', 'Bicubic', '--scale', str(s)]) for s in scales
    }
    found |= {name: measured(args, name, options) for name, options in weights.items()}
    studied = {
        (name, what): measured(args, f'{name} {what}', [*options, *more.split()], STUDIED)
        for name, options in weights.items()
        for what, more in STUDIES.items()
    }
    photos = {
        (name, what): measured(args, f'{name} {what}', [*options, '--degradation', what])
        for name, options in degraded(weights).items()
        for what in DEGRADATIONS
    }
    authors = {name: measured(args, f'authors {name}', options, WHOLE_SETS) for name, options in theirs.items()}
    write_atomic(args.out, page(found, studied, photos, authors).encode())
    print(f'Written: {args.out}')


def files(place: Path, pattern: str, told: str) -> list[Path]:
    """The weights in a folder, which option `told` names."""
    found = sorted(place.glob(f'[!.]{pattern}'))  # no hidden ones
    if not found:
        raise UserError(f'{place} holds no weights ({pattern}): give their folder with {told}.')
    return found


def scale_of(name: str) -> int:
    """The scale of weights by the name of their file, such as ASID_x4."""
    scale = name.rpartition('_x')[2]
    if not scale.isdigit():
        raise UserError(f'{name}.pt: weights are named after their recipe and scale, such as ASID_x4.pt; rename it.')
    return int(scale)


def network(file: Path) -> list[str]:
    """Options that test weights by the recipe of their name, on clean images."""
    return ['--template', file.stem, '--pre_train', str(file), '--degradation', '']


def degraded(weights: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """Options of what is tested on degraded images: bicubic, weights for clean images, and those for photographs."""
    found: dict[str, list[str]] = {}
    for name in weights:
        if '-photo_x' in name:
            scale, clean = name.rpartition('_x')[2], name.replace('-photo', '')
            found |= {f'Bicubic_x{scale}': ['--model', 'Bicubic', '--scale', scale], clean: weights[clean]}
            found[name] = weights[name]
    return found


def measured(args: Namespace, name: str, options: Sequence[str], sets: Sequence[str] = MEASURED) -> Row:
    """The results.json of a run, which is done if there is none, or one of other weights, options or images."""
    folder = args.save_dir / name.replace(' ', '_')
    kept, noted = folder / 'results.json', folder / 'measured.json'
    of = what_is_measured(args, options, sets)
    if not (kept.is_file() and noted.is_file() and json.loads(noted.read_text()) == of):
        where = ['--dir_data', str(args.dir_data), '--save_dir', str(args.save_dir), '--save', folder.name]
        line = [*options, '--test_only', '--data_test', '+'.join(sets), *where, *(['--cpu'] if args.cpu else [])]
        noted.unlink(missing_ok=True)
        parsed = option.parse(line)
        program.run(parsed, line)
        write_atomic(noted, json.dumps(of).encode())
    return json.loads(kept.read_text())


def what_is_measured(args: Namespace, options: Sequence[str], sets: Sequence[str]) -> Row:
    """The options of a run, with a digest of its weights in place of their path, and how many images each set has."""
    weights = dict(pairwise(options)).get('--pre_train')
    own = [hashlib.sha256(Path(word).read_bytes()).hexdigest() if word == weights else word for word in options]
    counts = {name: len(find_set(name, args.dir_data, ROOT / 'benchmark').hr) for name in sets}
    return {'options': own, 'images': counts}


def page(
    found: dict[str, Row],
    studied: dict[tuple[str, str], Row],
    photos: dict[tuple[str, str], Row],
    authors: dict[str, Row],
) -> str:
    """The whole of RESULTS.md."""
    parts = [NOTE.format(where=machines((*found.values(), *studied.values(), *photos.values())))]
    for scale in sorted({row['scale'] for row in found.values()}):
        ours = {name: row for name, row in found.items() if row['scale'] == scale}
        parts += [f'## x{scale}\n', *measured_table(ours), '', *published_table(scale), '']
    if photos:
        parts += [PHOTOS, *photo_table(photos), '']
    parts += [STUDY, *study_table(studied), '']
    if authors:
        parts += [AUTHORS.format(where=machines(authors.values())), *authors_table(authors), '']
    return '\n'.join(parts)


def machines(rows: Iterable[Row]) -> str:
    """Where and when runs were made."""
    found = (row['machine'] for row in rows)
    return '; '.join(dict.fromkeys(f'{m["device"]}, torch {m["torch"]}, {m["date"]}' for m in found))


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """A table of Markdown."""
    head = list(head)
    return [f'| {" | ".join(cells)} |' for cells in (head, ['---'] * len(head), *rows)]


def measured_table(rows: dict[str, Row]) -> list[str]:
    """The scores of weights and of bicubic by set."""
    sets = next(iter(rows.values()))['sets']
    head = ['Measured', *(title(name, len(result['images'])) for name, result in sets.items())]
    return table(head, ([link(name), *map(scores, row['sets'].values())] for name, row in rows.items()))


def title(name: str, images: int) -> str:
    """The name of a set as a title, and how many of its images there are if not all."""
    return name if images == SIZES[name] else f'{name}, {images} of {SIZES[name]} images'


def link(name: str) -> str:
    """The name of weights as a link to their card; bicubic has none."""
    return 'Bicubic' if name.startswith('Bicubic') else f'[{name}](../models/{name}.md)'


def scores(result: Row) -> str:
    """The scores of a set as papers print them: 37.83 / .9600."""
    return ' / '.join(metric.text(result[metric.name]) for metric in METRICS).replace(' 0.', ' .')


def published_table(scale: int) -> list[str]:
    """PSNR as printed, of the networks here and of those trained on SR291."""
    rows = [
        [name, known[scale].data, *(number((known[scale].psnr or {}).get(data)) for data in SETS)]
        for name, known in PUBLISHED.items()
        if known[scale].psnr
    ]
    rows += [[name, 'SR291', number(psnr[scale]), *['-'] * (len(SETS) - 1)] for name, psnr in SAME_IMAGES.items()]
    return table(['Published PSNR', 'Trained on', *SETS], rows)


def photo_table(rows: dict[tuple[str, str], Row]) -> list[str]:
    """The scores on degraded images by degradation and set."""
    sets = next(iter(rows.values()))['sets']
    head = ('LR', 'Weights', *(title(name, len(result['images'])) for name, result in sets.items()))
    ordered = sorted(rows.items(), key=lambda item: (item[1]['scale'], DEGRADATIONS.index(item[0][1])))
    return table(
        head,
        ([f'{what}, x{row["scale"]}', link(name), *map(scores, row['sets'].values())] for (name, what), row in ordered),
    )


def authors_table(rows: dict[str, Row]) -> list[str]:
    """The scores of the authors' weights by set, each beside the published PSNR."""
    sets = next(iter(rows.values()))['sets']
    head = (title(name, len(result['images'])) for name, result in sets.items())
    cells = []
    for name, row in rows.items():
        published = PUBLISHED[row['model']][row['scale']]
        known = (published.psnr or {}) if TEMPLATES[name]['data_train'] == TRAINED_ON[published.data] else {}
        pairs = ((scores(result), number(known.get(data))) for data, result in row['sets'].items())
        cells.append([name, *(cell for pair in pairs for cell in pair)])
    return table(['Weights', *(cell for data in head for cell in (data, 'published'))], cells)


def number(value: float | None) -> str:
    """A published PSNR with two digits; - if none was found."""
    return '-' if value is None else f'{value:.2f}'


def study_table(studied: dict[tuple[str, str], Row]) -> list[str]:
    """What each way of running weights gains or loses against whole images, and how long it takes an image."""
    rows, first = [], METRICS[0]
    for (name, what), row in studied.items():
        whole, cells = studied[name, 'whole images'], []
        for data, result in row['sets'].items():
            plain = whole['sets'][data]
            change, share = result[first.name] - plain[first.name], result['seconds'] / plain['seconds']
            gain = '' if row is whole or math.isnan(change) else f' ({change:+.3f})'
            there = row['machine']['device'] == whole['machine']['device']
            cells += [
                f'{first.text(result[first.name])}{gain}',
                f'{result["seconds"]:.2f}{f" ({share:.2f}x)" if gain and there else ""}',
            ]
        rows.append([name, what, *cells])
    sets = next(iter(studied.values()))['sets']
    return table(
        [
            'Weights',
            'Run as',
            *(head for data in sets for head in (f'{data}, {first.unit or first.title}', 's an image')),
        ],
        rows,
    )


if __name__ == '__main__':
    run_program(main)
