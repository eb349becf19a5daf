"""The documents do not rot: their commands are run or read by the program, their links and paths lead somewhere."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import app
import enlarge
import main
import networks
import option
import prepare
import results
from data.image import write_png
from report import picture as pictures
from tests.conftest import ROOT, picture

DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix() for folder in ('.', '*') for path in ROOT.glob(f'{folder}/*.md') if path.is_file()
)
COMMAND = re.compile(r'(\w+=\S+ )?(python|bash|torchrun|tensorboard|pip|source|git) ')

TINY = '--cpu --n_threads 0 --epochs 1 --test_every 2 --batch_size 2 --patch_size 48'
LCOAN = f'{TINY} --n_resgroups 2 --n_resblocks 1 --n_feats 8 --n_clusters 4 --window_size 16 --data_range 1-4/5-6'

# Run, in this order, on tiny images in a folder that stands for DATA, FOLDER and FILE: what is added to them.
RUN = {
    'python src/main.py --template ASID_x4 --pre_train ASID_x4.pt --test_only --data_test Demo --dir_demo FOLDER': (
        '--cpu'
    ),
    'python src/main.py --test_only --model Bicubic --scale 4 --data_test Set5+Set14 --dir_data DATA': '--cpu',
    'python src/main.py --test_only --template ASID_x4 --pre_train ASID_x4.pt --data_test Set5+Set14 --save_results '
    '--dir_data DATA': '--cpu',
    'python src/main.py --score FOLDER --scale 4 --data_test Set5 --dir_data DATA': '',
    'python src/main.py --model auto --pre_train FILE --test_only --data_test Set5': '--cpu --dir_data DATA',
    'python src/main.py --template LCoAN-small_x2 --dir_data DATA': f'{LCOAN} --save LCoAN-small_x2',
    'python src/main.py --template LCoAN_x2 --dir_data DATA --save LCoAN_x2': LCOAN,
    'python src/main.py --load LCoAN_x2': '',
    'python src/main.py --load LCoAN_x2 --test_only': '',
    'python src/main.py --export safetensors --load NAME': '',
}
# Only read by the parser of their program.
READ = {
    'python src/enlarge.py photo.jpg': 'tests/test_enlarge.py has it',
    'python src/enlarge.py HOLIDAY -o BIG --scale 2 --format jpg': 'tests/test_enlarge.py has it',
    'python src/enlarge.py HOLIDAY -r -o BIG --fit 3840x2160': 'tests/test_enlarge.py has it',
    'python src/main.py --template ATD_x2 --n_GPUs 4 --amp bf16 --dir_data DATA': 'wants four GPUs',
    'python src/main.py --template ASID_x4 --pre_train ASID_x4.pt --dir_data DATA --data_train SR291': 'trains long',
    'python src/main.py --costs --model all --scale 2+3+4': 'measures for half an hour',
    'python src/main.py --profile --model ASID --scale 4': 'measures for a minute',
    'python src/main.py --profile --model ASID --scale 4 --growth': 'measures for minutes',
    'python src/main.py --profile --model ASID --scale 4 --compare old.json': 'measures for a minute',
    'python src/main.py --profile --model ASID --scale 4 --forms float32+bf16+graph': 'measures for a minute',
    'python src/main.py --profile --cpu --model ASID --scale 4 --against onnxruntime+openvino': 'measures for a minute',
    'python src/main.py --profile --model ASID+EDSR-baseline --scale 4': 'measures for minutes',
    'python src/main.py --profile --model all --scale 2+4 --forms float32+tf32+bf16+graph+bf16-graph': 'wants a GPU',
    'python src/main.py --export onnx --template LCoAN-small_x4 --pre_train LCoAN-small_x4.pt': 'wants onnx',
    'python src/main.py --export torchscript --model auto --pre_train FILE': 'tests/test_export.py has it',
    'python src/prepare.py DIV2K --dir_data DATA --scale 2': 'downloads',
    'python src/prepare.py DIV2K --dir_data DATA --scale 2+3+4': 'downloads',
    'python src/main.py --template LCoAN-small_x2 --data_train DIV2K --dir_data DATA': 'wants DIV2K',
    'python src/main.py --test_only --template BSRN_x4 --pre_train download --data_test Set5 --dir_data DATA': (
        'downloads'
    ),
    'python src/prepare.py DIV2K --dir_data DATA --check': 'wants DIV2K',
    'python src/prepare.py benchmark --dir_data DATA': 'downloads',
    'python src/prepare.py weights list': 'tests/data/download has it',
    'python src/prepare.py weights IMDN_x2 PAN': 'downloads',
    'python src/main.py --model EDSR --scale 4 --pre_train download --test_only --data_test Set5': 'downloads',
    'python src/main.py --export safetensors --model auto --pre_train FILE --res_scale 1': 'wants such a FILE',
    'python src/results.py --dir_data DATA': 'measures for an hour',
    'python src/app.py': 'serves until it is ended; tests/web has it',
    'python src/app.py --host 0.0.0.0': 'serves until it is ended',
}
# `bash demo.sh NAME ...`: NAME is one that demo.sh has, and its options are read.
DEMO = {
    'bash demo.sh': 'takes minutes; the calls in it are read',
    'bash demo.sh list': 'tests/test_demo.py has it',
    'bash demo.sh ASID_x4_test --dir_data DATA': 'wants all benchmarks',
}
NOT_CHECKED = {
    'source .venv/bin/activate': 'of the shell',
    'pip install -r requirements.txt': 'installs',
    'pip install -c constraints.txt -r requirements.txt': 'installs',
    'pip install "gradio>=6.31"': 'installs',
    'pip install llvmlite': 'installs',
    'pip install onnx onnxruntime': 'installs',
    'pip install tensorboard': 'installs',
    'tensorboard --logdir experiment': 'another program, which serves until it is ended',
    'torchrun --nnodes 2 --nproc_per_node 8 src/main.py --template ATD_x2 ...': 'wants two hosts',
    'bash test.sh': 'runs this test',
    'bash test.sh full': 'runs this test',
    'bash tests/gpu/run.sh OUT': 'wants a GPU; tests/test_gpu_rehearsal.py rehearses it',
    'bash tests/gpu/pack.sh': 'wants the reference data',
    'bash demo.sh league --dir_data DATA': 'trains for a day; tests/test_league.py has it',
    'bash tests/speedrun.sh DATA': 'trains for minutes; tests/test_speedrun.py has it',
    'PYTHONPATH=src python tests/gpu/measure_latency.py OUT.json': 'wants a GPU; the rehearsal of run.sh has it',
    'PYTHONPATH=src python tests/gpu/measure_step.py OUT.json': 'wants a GPU; the rehearsal of run.sh has it',
    'python tests/gpu/measure_attention.py OUT.json': 'wants a GPU; the rehearsal of run.sh has it',
}


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """Language and text of the code blocks of a document; 'text' if it names no language."""
    fenced = re.compile(r'^```(\w*)\n(.*?)^```$', re.M | re.S)
    for match in fenced.finditer(text):
        yield match[1] or 'text', match[2]
    for match in re.finditer(r'(?:^ {4}.*\n|^\n)+', fenced.sub('', text), re.M):
        yield 'text', re.sub('^ {4}', '', match[0], flags=re.M)


def commands() -> list[str]:
    """The command lines in the code blocks of all documents, without their comments."""
    lines = (
        line for name in DOCUMENTS for _, block in blocks((ROOT / name).read_text()) for line in block.splitlines()
    )
    return [re.sub(r'\s+#.*', '', line).strip() for line in lines if COMMAND.match(line)]


def test_blocks_are_found():
    text = 'a\n\n    bash b\n    out\n\n    python c\n\nd\n\n```python\ne\n```\n'
    assert [(kind, block.strip()) for kind, block in blocks(text) if block.strip()] == [
        ('python', 'e'),
        ('text', 'bash b\nout\n\npython c'),
    ]


def test_every_command_is_listed_here_and_the_other_way_round():
    listed = {**RUN, **READ, **DEMO, **NOT_CHECKED}
    found = set(commands())
    assert sorted(found - set(listed)) == [], 'run it, have it read, or say why not'
    assert sorted(set(listed) - found) == [], 'no document has it any more'


@pytest.fixture(scope='module')
def places(tmp_path_factory) -> dict[str, str]:
    """Tiny images in DATA and FOLDER; the place of the runs."""
    folder = tmp_path_factory.mktemp('documents')
    sizes = {'DIV2K/DIV2K_train_HR': 6, 'SR291/HR': 3, 'benchmark/Set5/HR': 2, 'benchmark/Set14/HR': 1}
    for name, number in sizes.items():
        for i in range(number):
            write_png(folder / 'data' / name / f'{i + 1:04d}.png', picture(i, 72, 64))
    for i in range(2):
        write_png(folder / 'images' / f'{i + 1:04d}.png', picture(i, 72, 64))
    return {'DATA': f'{folder}/data', 'FOLDER': f'{folder}/images', 'FILE': 'ASID_x4.pt', 'runs': f'{folder}/runs'}


def words(command: str, places: dict[str, str]) -> list[str]:
    """The arguments of a command in which places stand for their names."""
    return [places.get(word, word) for word in shlex.split(command)]


def test_commands_that_run(places, monkeypatch, capsys):
    monkeypatch.setattr(pictures, 'curves', lambda records: {})
    monkeypatch.setitem(places, 'NAME', 'LCoAN_x2')
    for command, more in RUN.items():
        _, _, *arguments = words(command, places)
        status = main.main([*arguments, *words(more, places), '--save_dir', places['runs']])
        assert status == 0, f'{command}: {capsys.readouterr().err}'
    folder = Path(places['runs']) / 'ASID_x4_images_demo' / 'results-Demo'
    assert sorted(path.name for path in folder.glob('*.png')) == ['0001_x4_SR.png', '0002_x4_SR.png']
    with Image.open(folder / '0001_x4_SR.png') as image:
        assert image.size == (4 * 64, 4 * 72)


@pytest.mark.parametrize('command', READ)
def test_commands_that_are_read(command, places):
    _, program, *arguments = words(command, places)
    parsers = {'enlarge.py': enlarge, 'prepare.py': prepare, 'results.py': results, 'app.py': app}
    if Path(program).name == 'main.py':
        option.parse(arguments)
    elif arguments[:1] == ['weights']:
        prepare.build_weights_parser().parse_args(arguments[1:])
    else:
        parsers[Path(program).name].build_parser().parse_args(arguments)


def test_commands_of_demo():
    script = (ROOT / 'demo.sh').read_text()
    calls = re.findall(r'^    program (--(?:.*\\\n)*.*)', script, re.M)
    assert len(calls) == 2
    for call in calls:
        option.parse(shlex.split(call.replace('\\\n', ' ').replace('$root', str(ROOT))))
    for command in DEMO:
        _, _, *arguments = command.split()
        name, *more = [*arguments, '']
        assert name in ('', 'list') or re.search(rf'^(add|recipe|tests) .*\b{name.split("_x")[0]}\b', script, re.M)
        option.parse(['--test_only', *filter(None, more)])


@pytest.mark.parametrize('name', DOCUMENTS)
def test_examples_in_python(name, tmp_path, monkeypatch):
    examples = [block for kind, block in blocks((ROOT / name).read_text()) if kind == 'python']
    if not examples:
        return
    (tmp_path / 'models').symlink_to(ROOT / 'models')
    Image.fromarray(picture(1, 20, 24)).save(tmp_path / 'photo.jpg')
    monkeypatch.chdir(tmp_path)
    for example in examples:
        exec(compile(example, name, 'exec'), {})
    with Image.open(tmp_path / 'photo_x4.png') as image:
        assert image.size == (96, 80)
        assert np.asarray(image).std() > 1


@pytest.mark.parametrize('name', DOCUMENTS)
def test_links_and_paths_lead_somewhere(name):
    text = (ROOT / name).read_text()
    links = [link for link in re.findall(r'\]\(([^)\s]+)\)', text) if not re.match(r'https?:|#', link)]
    assert [link for link in links if not (ROOT / name).parent.joinpath(link.split('#')[0]).exists()] == []
    paths = re.findall(r'(?<![\w./-])((?:src|tests|docs|models)/[\w./-]*\w\.(?:py|md|sh|json|png))\b', text)
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_every_module_is_on_the_map():
    text = (ROOT / 'CONTRIBUTING.md').read_text()
    places = (
        '',
        'data/',
        'measure/',
        'report/',
        'system/',
        'web/',
        'model/ops/',
        'model/ops/llvm/',
        'model/ops/triton/',
        'model/tiles/',
        'model/loading/',
    )
    modules = [path.stem for place in places for path in (ROOT / 'src' / place).glob('[!_]*.py')]
    assert len(modules) > 40
    assert [name for name in modules if not re.search(rf'(?<![a-z_]){name}(?![a-z_])', text)] == []


def test_every_network_has_its_rows():
    text = (ROOT / 'docs' / 'NETWORKS.md').read_text()
    where, what = (part.split('\n\n')[0] for part in text.split('| `--model` |')[1:])
    for name in networks.MODELS:
        assert f'`{name}`' in where, name
        assert f'\n| `{name}` |' in what, name


def test_scores_in_the_readme_are_those_of_the_cards():
    rows = re.findall(r'^\| \[([\w-]+)\]\(models/.*?\|.*$', (ROOT / 'README.md').read_text(), re.M)
    assert len(rows) > 3
    for name in rows:
        row = re.search(rf'^\| \[{name}\].*$', (ROOT / 'README.md').read_text(), re.M)[0]
        shown = dict(re.findall(r'x(\d) (\d\d\.\d\d)', row))
        cards = {path.stem.split('_x')[1]: path.read_text() for path in (ROOT / 'models').glob(f'{name}_x*.md')}
        assert shown == {scale: re.search(r'^\| Set5 \| ([\d.]+) \|', card, re.M)[1] for scale, card in cards.items()}


def test_licence_and_citation():
    assert (ROOT / 'LICENSE').read_text().startswith('MIT License\n')
    lines = (ROOT / 'CITATION.cff').read_text().splitlines()
    assert {'cff-version: 1.2.0', 'license: MIT', 'type: software'} <= set(lines)
    version = re.search(r'^version = "(.*)"', (ROOT / 'pyproject.toml').read_text(), re.M)[1]
    assert f'version: {version}' in lines
