"""Programs that run in processes of their own, while this one is at other checks. Each has a folder for itself."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from data.image import write_png
from tests.conftest import picture
from tests.gpu.parts import CUDA, REHEARSE, ROOT, reference

MAIN = str(ROOT / 'src' / 'main.py')
SCRIPTS = Path(__file__).resolve().parent / 'scripts'
LIMIT = 130 if CUDA else 600  # seconds of a program
RUNNING: set[subprocess.Popen] = set()

TORCHRUN = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=1']
TORCHRUN += ['--local_addr=127.0.0.1']  # the name of the host need not lead anywhere
WHERE = [] if CUDA else ['--cpu']
DATA = '--n_threads 0 --data_train SR291 --data_test Set5 --scale 2 --patch_size 48 --batch_size 4 --print_every 1'
STEPS = '--test_every 4 --epochs 3'
# The settings of the papers on a GPU, and what they train with that a recorded step has to follow.
SMALL = {
    'ASID': '--n_resgroups 1 --n_feats 16',
    'ATD-light': '--n_resgroups 1 --n_resblocks 2 --n_feats 8 --n_heads 2 --window_size 4 --category_size 16',
    'DLGSANet-tiny': '--n_resgroups 1 --n_resblocks 1 --n_feats 12 --n_heads 2 --kernel_size 5 --mlp_ratio 1',
    'OmniSR': '--n_resgroups 1 --n_feats 16 --n_heads 2',
    'EDSR-baseline': '--n_resblocks 2 --n_feats 8',
    'SwinIR-light': '--n_resgroups 1 --n_resblocks 2 --n_feats 12 --n_heads 2 --drop_path 0',
}
LCOAN = '--model LCoAN --n_resgroups 2 --n_resblocks 1 --n_feats 16 --n_clusters 8 --window_size 48'


def network(name: str) -> str:
    """Its options."""
    if name == 'LCoAN':
        return LCOAN
    return f'--model {name}' + (f' {SMALL[name]}' if REHEARSE and name in SMALL else '')


def end_all() -> None:
    """End the programs that are still running."""
    for process in list(RUNNING):
        process.terminate()


def environment(**more: str) -> dict[str, str]:
    threads = {'OMP_NUM_THREADS': '1', 'PYTHONUNBUFFERED': '1', 'MPLCONFIGDIR': os.environ.get('MPLCONFIGDIR', '/tmp')}
    return {**os.environ, **threads, **more}


def run(command: list[str], stop_at: str = '', **more: str) -> str:
    """What a program prints; it has to end with status 0. At the line with `stop_at` it is sent SIGTERM."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment(**more), cwd=ROOT
    )
    RUNNING.add(process)
    start, lines, found = time.monotonic(), [], not stop_at
    try:
        if stop_at:
            for line in process.stdout:
                lines.append(line)
                if stop_at in line:
                    process.send_signal(signal.SIGTERM)
                    found = True
                    break
        rest, _ = process.communicate(timeout=max(LIMIT - (time.monotonic() - start), 1))
    except subprocess.TimeoutExpired:
        process.terminate()
        rest, _ = process.communicate()
        raise AssertionError(f'{" ".join(command)} took more than {LIMIT} s:\n{"".join(lines)}{rest}'[-4000:]) from None
    finally:
        RUNNING.discard(process)
    text = ''.join(lines) + rest
    assert process.returncode == 0, f'{" ".join(command)}: status {process.returncode}\n{text[-4000:]}'
    assert found, f'{" ".join(command)} never printed {stop_at!r}\n{text[-4000:]}'
    return text


def python(script: str, *arguments: str, **more: str) -> Any:
    """What one of the scripts here found."""
    path = str(ROOT / 'src')
    text = run([sys.executable, str(SCRIPTS / script), *arguments], PYTHONPATH=path, **more)
    return last_object(text)


def last_object(text: str) -> dict[str, Any]:
    """The last line that is a JSON object; warnings may follow it."""
    return json.loads([line for line in text.splitlines() if line.startswith('{')][-1])


def has(option: str) -> bool:
    """Whether main.py has an option."""
    from options.table import build_parser

    return any(option in action.option_strings for action in build_parser()._actions)


def either(option: str) -> list[str]:
    """An option that a GPU needs; on a CPU, where it changes nothing, left out if main.py does not take it there."""
    return [option] if CUDA or (option == '--deterministic' and has(option)) else []


def data(folder: Path) -> Path:
    """A small --dir_data: SR291 (3 images) and Set5 (2)."""
    for name, number in {'SR291/HR': 3, 'benchmark/Set5/HR': 2}.items():
        for i in range(number):
            write_png(folder / 'data' / name / f'{i + 1:04d}.png', picture(i, 72 + 6 * i, 64 + 4 * i))
    return folder / 'data'


def arguments(folder: Path, *options: str) -> list[str]:
    """A command line of main.py on these data."""
    folders = ['--dir_data', str(data(folder)), '--save_dir', str(folder / 'runs')]
    return [*folders, *WHERE, *' '.join(options).split()]


class Run:
    """A run of main.py that has ended well: what it printed, logged and learned."""

    def __init__(self, folder: Path, name: str, text: str) -> None:
        self.folder, self.text = folder / 'runs' / name, text
        self.records = [json.loads(line) for line in (self.folder / 'metrics.jsonl').read_text().splitlines()]
        self.state = torch.load(self.folder / 'state.pt', weights_only=True, map_location='cpu')
        self.losses = [record['loss']['total'] for record in self.records]
        # Means of the epoch so far, after each step.
        self.progress = [float(value) for value in re.findall(r'batch \d+/\d+: \S+ ([\d.e+-]+)', text)]
        self.psnr = [record['test']['Set5']['psnr'] for record in self.records]

    def weights(self) -> dict[str, torch.Tensor]:
        return {key: value for key, value in self.state['model'].items() if value.is_floating_point()}


def train(folder: Path, name: str, *options: str, stop_at: str = '', load: bool = False) -> str:
    """Train by the command line; returns what it printed."""
    save = f'--load {name}' if load else f'--save {name}'
    return run([sys.executable, MAIN, *arguments(folder, *options, save)], stop_at)


def graph_and_not(folder: Path, name: str, more: str) -> tuple[Run, Run]:
    """The same run, with its steps as one CUDA graph and without."""
    # Else cuDNN chooses other kernels in each run, and in bfloat16 a dozen steps make that visible.
    common = [network(name), DATA, STEPS, more, *either('--deterministic')]
    runs = []
    for form in ('graph', 'no_graph'):
        text = train(folder, form, *common, *([f'--{form}'] if CUDA else []))
        runs.append(Run(folder, form, text))
    return runs[0], runs[1]


def broken_and_not(folder: Path, name: str) -> tuple[Run, Run]:
    """An unbroken run, and one that was stopped by SIGTERM within an epoch and continued."""
    more = '--test_every 20 --epochs 2 --optimizer ADAMW --weight_ema 0.9 --decay 1'
    common = [network(name), DATA, more, *either('--deterministic')]
    whole = Run(folder, 'whole', train(folder, 'whole', *common))
    stopped = train(folder, 'parts', *common, stop_at='batch 3/20')
    assert '--load parts continues' in stopped, stopped[-2000:]
    return whole, Run(folder, 'parts', stopped + train(folder, 'parts', *either('--deterministic'), load=True))


def loaded_in_processes(folder: Path) -> tuple[Run, Run]:
    """A run whose batches come from four processes by pinned memory, and one that loads them itself."""
    common = [network('EDSR-baseline'), DATA, STEPS, *either('--deterministic')]
    runs = [Run(folder, f'n{n}', train(folder, f'n{n}', *common, f'--n_threads {n}')) for n in (4, 0)]
    return runs[0], runs[1]


def ended_by_the_clock(folder: Path) -> tuple[Run, float]:
    """A run of far too many epochs with --max_time, and the seconds it took in all."""
    start = time.monotonic()
    text = train(folder, 'short', network('EDSR-baseline'), DATA, '--test_every 5 --epochs 100000 --max_time 10')
    return Run(folder, 'short', text), time.monotonic() - start


def group_of_one(folder: Path) -> dict[str, Any]:
    """What the parts for several processes do in a group of one, by NCCL on a GPU."""
    path = str(ROOT / 'src')
    text = run([*TORCHRUN, str(SCRIPTS / 'group.py')], PYTHONPATH=path)
    return last_object(text)


def run_in_a_group_of_one(folder: Path, name: str) -> tuple[Run, Run]:
    """A run of main.py in a process group, and the same without one."""
    common = [network(name), DATA, STEPS, '--optimizer SGD --lr 1e-4']
    path = str(ROOT / 'src')
    script = [str(SCRIPTS / 'grouped_main.py'), *arguments(folder, *common, '--save grouped')]
    grouped = Run(folder, 'grouped', run([*TORCHRUN, *script], PYTHONPATH=path))
    return grouped, Run(folder, 'alone', train(folder, 'alone', *common))


def compiled(folder: Path, name: str) -> dict[str, Any]:
    """How far torch.compile changes outputs and gradients."""
    small = network(name).split()[2:] if REHEARSE else ['--n_resgroups', '1']
    caches = {'TORCHINDUCTOR_CACHE_DIR': str(folder / 'inductor'), 'TORCHINDUCTOR_COMPILE_THREADS': '4'}
    return python('compiled.py', name, *small, **caches)


def limited(folder: Path, limit: str) -> dict[str, Any]:
    """Peaks of memory while an image is enlarged with --max_memory, or where `limit` is empty without."""
    height, width = (240, 300) if REHEARSE else (900, 1300)
    write_png(folder / 'photos' / 'large.png', picture(3, height, width))
    options = f'--model ASID --scale 4 --pre_train ASID_x4.pt --test_only --data_test Demo --dir_demo {folder}/photos'
    options += f' --chop auto --save run --save_dir {folder}' + (f' --max_memory {limit}' if limit else '')
    found = python('peaks.py', *options.split(), *WHERE)
    return found | {'image': str(folder / 'run' / 'results-Demo' / 'large_x4_SR.png')}


def on_the_card(folder: Path, card: str) -> dict[str, Any]:
    """Set5 with trained weights, by the recipe's protocol."""
    (folder / 'Set5').symlink_to(reference('benchmark', 'Set5').resolve())
    options = f'--template {card} --pre_train {card}.pt --data_test Set5 --test_only --dir_data {folder}'
    run([sys.executable, MAIN, *options.split(), *WHERE, '--save_dir', str(folder), '--save', 'run'])
    return json.loads((folder / 'run' / 'results.json').read_text())
