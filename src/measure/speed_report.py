"""What --profile measured, as tables, and compared with an older measurement; speed.py says what a report holds."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from error import UserError
from measure.costs import HEIGHT, WIDTH, Row, aligned, number
from measure.published import PUBLISHED, Published
from measure.speed import BATCH, KINDS, MEMORY, SIDES, SMALL, TIMES

LAST = 3  # points that an exponent is fitted to
BUSY = 1.2  # ceilings further apart are pointed out
STEEP = 1.1  # an exponent above this is marked: that of linear growth is 1
NOTE = f'% of the ceiling of arithmetic reached for an output of {WIDTH}x{HEIGHT}, divided as the time is'


def exponent(points: Sequence[tuple[float, float]]) -> float | None:
    """Power of the number of pixels that the last of the points (side, value) grow with; None of a single one."""
    if len(points) < 2:
        return None
    side, value = np.log(points[-LAST:]).T
    return float(np.polyfit(2 * side, value, 1)[0])


def power(points: Sequence[tuple[float, float]]) -> str:
    """The exponent of points as text."""
    found = exponent(points)
    return '-' if found is None else f'{found:.2f}'


def growths(report: Row) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Points (side, value) of each network by quantity, its exponent in its name."""
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {'seconds': {}, 'MB': {}}
    for row in report['networks']:
        if row['growth']:
            panels['seconds'][f'{label(row)}, pixels^{power(seconds(row))}{mark(row)}'] = seconds(row)
        if memory(row):
            panels['MB'][f'{label(row)}, pixels^{power(memory(row))}'] = memory(row)
    return panels


def mark(row: Row) -> str:
    """Of a network whose time grows faster than the image."""
    return ' *' if (exponent(seconds(row)) or 0) > STEEP else ''


def seconds(row: Row) -> list[tuple[float, float]]:
    """Points (side, seconds) of a network."""
    return [(at['side'], at['seconds']['median']) for at in row['growth']]


def memory(row: Row) -> list[tuple[float, float]]:
    """Points (side, MB) of a network."""
    return [(at['side'], at['memory'] / 1e6) for at in row['growth'] if at['memory']]


def parts(report: Row) -> dict[str, dict[str, float]]:
    """The share of the ceiling that each network reaches, divided as its time is between kinds of operations."""
    rows = [row for row in report['networks'] if row['share'] and row['kinds']]
    return {label(row): {name: row['share'] * share for name, share in row['kinds'].items()} for row in rows}


def label(row: Row) -> str:
    """Network and scale."""
    return f'{row["model"]} x{row["scale"]}'


def shown(value: Row | None, unit: float, digits: int) -> str:
    """Median and quartiles of a spread, in multiples of `unit`."""
    if value is None:
        return '-'
    median, low, high = (number(x, unit, digits) for x in (value['median'], *value['quartiles']))
    return f'{median} ({low}-{high})'


def about(report: Row) -> str:
    """Where, when and how a report was measured, and the ceilings."""
    rates = [f'{name} {shown(rate, 1e9, 1)}' for name, rate in report['ceiling'].items()]
    where = f'{report["device"]}, {report["threads"]} threads, torch {report["torch"]}, {report["date"]}'
    return f'{where}; {report["form"]}; ceilings in GFLOP/s, and GB/s: {", ".join(rates)}'


def table(report: Row) -> list[str]:
    """The report as lines of text."""
    lines = [
        ['', '', 'mult-adds', 'latency', 'GFLOP/s', 'of the', 'memory', 'small', 'LR', 'step', 'memory'],
        ['', '', 'G', 'ms', '', 'ceiling', 'MB', 'images/s', 'patch', 's', 'MB'],
    ]
    kinds = [['', '', *KINDS]]
    for row in report['networks']:
        batch = row['batch']
        lines.append([
            *label(row).split(), number(row['multiply_adds'], 1e9, 1), shown(row['latency'], 1e-3, 1),
            number(row['rate'], 1e9, 1), percent(row['share']), number(row['memory'], 1e6, 0),
            number(batch and SMALL[0] / batch['median'], 1, 2), number(row['patch'], 1, 0), shown(row['step'], 1, 2),
            number(row['step_memory'], 1e6, 0),
        ])  # fmt: skip
        kinds.append([*label(row).split(), *(percent((row['kinds'] or {}).get(name)) for name in KINDS)])
    return [
        about(report),
        f'Output of {WIDTH}x{HEIGHT}; median (quartiles). Small images: {SMALL[0]} of {SMALL[2]}x{SMALL[3]} a call. '
        f'Step: forward, L1, backward and Adam on {report.get("batch", BATCH)} LR patches.',
        *aligned(lines),
        'Time by kind of operation:',
        *aligned(kinds),
        *growth_table(report),
        *forms_tables(report),
        *engines_table(report),
        *failures(report),
    ]


def forms_tables(report: Row) -> list[str]:
    """What was measured by form of running, as lines of text; none if there is one form only."""
    rows = [row for row in report['networks'] if row.get('forms')]
    if not rows:
        return []
    batch = report['batch']

    def rate(form: Row) -> str:
        return shown(form.get('step') and per_second(form['step'], batch), 1, 1)

    tables: dict[str, list[list[str]]] = {
        'Latency in ms; published (ESC, table 2: a GPU that is not named, float32), and the first form by that:': [
            ['', '', *rows[0]['forms'], 'published', 'ratio'],
            *([*cells(row, lambda form: shown(form.get('latency'), 1e-3, 2)), *beside_published(row)] for row in rows),
        ],
        'Share of the ceiling of the type:': [
            ['', '', *rows[0]['forms']],
            *(cells(row, lambda form: percent(form.get('share'))) for row in rows),
        ],
        'Memory in MB; published:': [
            ['', '', *rows[0]['forms'], 'published'],
            *(
                [*cells(row, lambda form: number(form.get('memory'), 1e6, 0)), number(published(row).memory, 1e6, 0)]
                for row in rows
            ),
        ],
        'Greatest difference from float32 without TF32, as a share of the greatest value; of a graph, from the same '
        'without one:': [
            ['', '', *rows[0]['forms']],
            *(cells(row, differences) for row in rows),
        ],
    }
    trained = [row for row in rows if any(form.get('step') for form in row['forms'].values())]
    tables |= {
        f'Training step, images a second; batches of {batch} LR patches:': [
            ['', '', *rows[0]['forms'], 'patch'],
            *([*cells(row, rate), number(row['patch'], 1, 0)] for row in trained),
        ],
        'Training step, memory in MB:': [
            ['', '', *rows[0]['forms']],
            *(cells(row, lambda form: number(form.get('step_memory'), 1e6, 0)) for row in trained),
        ],
    }
    lines = [line for title, lines in tables.items() if len(lines) > 1 for line in (title, *aligned(lines))]
    return [*lines, *longest(rows)]


def engines_table(report: Row) -> list[str]:
    """Networks beside their files in other engines, as lines of text; none if they were not measured."""
    lines = []
    for row in report['networks']:
        for size, found in row.get('against', {}).items():
            mine, *others = found.values()
            fastest = min((other for other in others if other), key=lambda other: other['median'], default=None)
            times = [shown(spread, 1e-3, 1) for spread in found.values()]
            lines.append(
                [*label(row).split(), size, *times, shown(ratio(fastest, mine) if fastest and mine else None, 1, 2)]
            )
            engines = [*found]
    if not lines:
        return []
    title = 'Exported files in other engines, by turns: ms an LR image by its size, and the least of theirs / ours:'
    return [title, *aligned([['', '', '', *engines, 'ratio'], *lines])]


def cells(row: Row, text: Callable[[Row], str]) -> list[str]:
    """A line of a table by form."""
    return [*label(row).split(), *map(text, row['forms'].values())]


def per_second(seconds: Row, amount: float) -> Row:
    """The spread of an amount by the seconds that it takes."""
    low, high = seconds['quartiles']
    return {'median': amount / seconds['median'], 'quartiles': [amount / high, amount / low]}


def published(row: Row) -> Published:
    """Published figures of a network."""
    return PUBLISHED.get(row['model'], {}).get(row['scale'], Published())


def beside_published(row: Row) -> list[str]:
    """The published latency in ms, and the ratio of the measured one to it."""
    latency = published(row).latency
    known = latency and row['latency']
    return [number(latency, 1e-3, 1), number(row['latency']['median'] / latency if known else None, 1, 2)]


def differences(form: Row) -> str:
    """How far a form is from float32, and a graph from what it was recorded of."""
    found = [form.get('difference'), form.get('graph_difference')]
    return ', '.join(f'{value:.1e}' for value in found if value is not None) or '-'


def longest(rows: Sequence[Row]) -> list[str]:
    """What takes longest, where the profiler looked."""
    lines = []
    for row in rows:
        for name, form in row['forms'].items():
            for what, key in {'': '', ', training step': 'step_'}.items():
                if not form.get(f'{key}operations'):
                    continue
                idle = form[f'{key}idle']
                head = f'{label(row)}, {name}{what}' + ('' if idle is None else f', GPU idle {idle:.0%}')
                for kind in ('operations', 'kernels'):
                    parts = [f'{part[:60]} {seconds * 1e3:.2f}' for part, seconds in form[key + kind]]
                    lines += [f'  {head}, {kind}: {", ".join(parts)}'] if parts else []
    return ['Longest operations and kernels, in ms of one call:', *lines] if lines else []


def growth_table(report: Row) -> list[str]:
    """Seconds and MB by side of the LR square, as lines of text; none if they were not measured."""
    lines = [['', '', *map(str, SIDES), 'exponent', 'of memory']]
    for row in report['networks']:
        cells = [f'{at["seconds"]["median"]:.2f} s, {number(at["memory"], 1e6, 0)} MB' for at in row['growth']]
        dashes = ['-'] * (len(SIDES) - len(cells))
        lines.append([*label(row).split(), *cells, *dashes, power(seconds(row)) + mark(row), power(memory(row))])
    title = f'LR squares by side; exponents of their number of pixels in time (* above {STEEP}) and memory:'
    return [title, *aligned(lines)] if any(row['growth'] for row in report['networks']) else []


def percent(share: float | None) -> str:
    """A share as text; None: not known."""
    return '-' if share is None else f'{share:.0%}'


def failures(report: Row) -> list[str]:
    """A sentence for each thing that could not be measured."""
    rows = report['networks']
    return [f'{label(row)}, {what}: {why}.' for row in rows for what, why in row['failed'].items()]


def scaled(spread: Row, rate: Row) -> Row:
    """The operations that a machine of some rate could have done in a time."""
    pairs = zip(spread['quartiles'], rate['quartiles'], strict=True)
    return {'median': spread['median'] * rate['median'], 'quartiles': [time * speed for time, speed in pairs]}


def ratio(new: Row, old: Row) -> Row:
    """The ratio of two spreads; 1 lies between its quartiles exactly where those of the two overlap."""
    low, high = new['quartiles'][0] / old['quartiles'][1], new['quartiles'][1] / old['quartiles'][0]
    return {'median': new['median'] / old['median'], 'quartiles': [low, high]}


def judged(found: Row) -> str:
    """A ratio as text."""
    low, high = found['quartiles']
    return f'{shown(found, 1, 2)} =' if low <= 1 <= high else shown(found, 1, 2)


def change(key: str, new: Row, old: Row, rates: Sequence[Row]) -> str:
    """The ratio of one quantity of a network as text."""
    if not new[key] or not old[key]:
        return '-'
    if key in MEMORY:
        return f'{new[key] / old[key]:.2f}'
    return judged(ratio(scaled(new[key], rates[0]), scaled(old[key], rates[1])))


def compare(new: Row, old: Row) -> list[str]:
    """Ratios of what two reports have in common, as lines of text."""
    before = {label(row): row for row in old['networks']}
    after = {label(row): row for row in new['networks']}
    rates = [report['ceiling']['float32'] for report in (new, old)]
    batches = {report.get('batch', BATCH) for report in (new, old)}
    lines, other = [['', '', *TIMES.values(), *MEMORY.values()]], []
    for name in after:
        if name in before:
            rows = after[name], before[name]
            if rows[0]['step'] and rows[1]['step'] and (len(batches) > 1 or rows[0]['patch'] != rows[1]['patch']):
                rows = tuple(row | {'step': None, 'step_memory': None} for row in rows)
                other.append(name)
            lines.append([*name.split(), *(change(key, *rows, rates) for key in (*TIMES, *MEMORY))])
    single = ', '.join(sorted(set(before) ^ set(after)))
    apart = max(rates[0]['median'] / rates[1]['median'], rates[1]['median'] / rates[0]['median'])
    busy = (
        f'The ceilings differ by a factor of {apart:.1f}: if both runs are of one machine, it was busy in one of them, '
    )
    return [
        'New / old, median (quartiles); = no change, since the quartiles overlap. Times are multiplied by the float32 '
        'ceiling measured in their own run; memory is as it is.',
        f'New: {about(new)}',
        f'Old: {about(old)}',
        *aligned(lines),
        *([f'{busy}and the ratios mean little.'] if apart > BUSY else []),
        *([f'Trained on other batches or patches: {", ".join(other)}.'] if other else []),
        *([f'In one of them alone: {single}.'] if single else []),
        *(f'Old: {line}' for line in failures(old)),
    ]


def read_report(path: Path) -> Row:
    """What --profile wrote.

    Raises:
        UserError: no such file, or another one.
    """
    try:
        report = json.loads(path.read_text())
        compare(report, report)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError) as error:
        raise UserError(
            f'{path} is missing, or no profile.json of this program: measure one with --profile.'
        ) from error
    return report
