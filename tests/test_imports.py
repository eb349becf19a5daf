"""Which module may import which: all imports in src/, also those within functions, keep an order without a circle."""

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.conftest import ROOT

# From above to below, modules and packages of src/: each imports what stands in its own line or below it.
ORDER = (
    ('app', 'enlarge', 'league', 'prepare', 'results', 'tables'),
    ('web',),
    ('main',),
    ('api',),
    ('trainer', 'photo', 'wiring'),
    ('evaluation', 'step'),
    ('checkpoint', 'report', 'measure', 'export'),
    ('data', 'model', 'loss'),
    ('option', 'options', 'networks', 'system'),
    ('error', 'template', 'metric', 'optimizer', 'muon', 'loss_language'),
)
APART = ('data', 'model', 'loss')  # none of them imports another
# What the parts of a network are made of: these and network files import nothing else of the project.
PARTS = ('model.common', 'model.blocks', 'model.ops')
BESIDE_PARTS = ('error',)


def find_modules(folder: Path) -> dict[str, Path]:
    """File of each module below `folder`, by its full name; a package has the name of its folder."""
    names = {path: path.relative_to(folder).with_suffix('').parts for path in sorted(folder.rglob('*.py'))}
    return {'.'.join(parts[:-1] if parts[-1] == '__init__' else parts): path for path, parts in names.items()}


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ('TYPE_CHECKING', 'typing.TYPE_CHECKING')


def find_imports(node: ast.AST, package: str, run: bool = True) -> Iterator[tuple[str, bool]]:
    """Each name imported below `node`, which stands in `package`, with whether it is imported when the program runs.

    `from a import b` gives a.b, whether or not b is a module.
    """
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((alias.name, run) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            above = package.split('.')[: len(package.split('.')) + 1 - child.level] if child.level else []
            origin = '.'.join([*above, *([child.module] if child.module else [])])
            yield from ((f'{origin}.{alias.name}', run) for alias in child.names)
        elif is_type_checking(child):
            yield from find_imports(ast.Module(child.body, []), package, False)
            yield from find_imports(ast.Module(child.orelse, []), package, run)
        else:
            yield from find_imports(child, package, run)


def is_within(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f'{package}.') for package in packages)


def is_network(name: str) -> bool:
    """A file that stands in model/ itself, which is there for networks."""
    return name.startswith('model.') and name.count('.') == 1 and not is_within(name, PARTS)


def find_faults(folder: Path) -> list[str]:
    """What the imports of all modules below `folder` do wrong, each in a sentence.

    That a module needs the packages that it stands in makes no circle.
    """
    modules = find_modules(folder)
    packages = {name for name, path in modules.items() if path.name == '__init__.py'}
    rank = {name: i for i, names in enumerate(ORDER) for name in names}
    faults = [f'{name} has no place in the order' for name in modules if name.split('.')[0] not in rank]
    graph: dict[str, set[str]] = {}
    for name, path in modules.items():
        above, top = name if name in packages else name.rpartition('.')[0], name.split('.')[0]
        network = is_network(name) and name not in packages
        graph[name] = set()
        for found, run in find_imports(ast.parse(path.read_text()), above):
            target = found if found in modules else found.rpartition('.')[0]
            origin = found.split('.')[0]
            if target not in modules:
                if network and origin != 'torch' and origin not in sys.stdlib_module_names:
                    faults.append(f'{name} imports {origin}, which no network needs')
                continue
            if run:
                graph[name].add(target)
            if rank.get(origin, len(ORDER)) < rank.get(top, -1):
                faults.append(f'{name} imports {target}, which stands above it')
            if top in APART and origin in APART and top != origin:
                faults.append(f'{name} imports {target}, which it has nothing to do with')
            if (network or is_within(name, PARTS)) and not is_within(target, PARTS + BESIDE_PARTS):
                faults.append(f'{name} imports {target}, which is no part of a network')
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        faults.append(f'{" is imported by ".join(error.args[1])}: a circle')
    return faults


def test_modules_import_only_what_stands_below_them() -> None:
    assert find_faults(ROOT / 'src') == []


def test_all_places_in_the_order_are_taken() -> None:
    found = {name.split('.')[0] for name in find_modules(ROOT / 'src')}
    assert found == {name for names in ORDER for name in names}
    assert {'model.asid', 'model.swinir'} <= {name for name in find_modules(ROOT / 'src') if is_network(name)}


def test_no_folder_is_without_its_init() -> None:
    """Without it a folder is a package in part, which the tools see or do not see."""
    folders = {path.parent for path in (ROOT / 'src').rglob('*.py')} - {ROOT / 'src'}
    assert all((folder / '__init__.py').is_file() for folder in folders)


GOOD = {
    'main.py': 'import option\nimport json\ndef run():\n    from trainer import train\n    from model.asid import ASID',
    'trainer.py': 'from model import build\nfrom system import files\nimport numpy',
    'option.py': 'from error import UserError\nfrom template import TEMPLATES',
    'error.py': '',
    'template.py': '',
    'system/__init__.py': '',
    'system/files.py': 'from error import UserError',
    'model/__init__.py': 'from model import asid\nimport numpy',
    'model/asid.py': 'import math\nimport torch.nn.functional as F\nfrom model.common import conv',
    'model/common.py': 'from error import UserError',
    'model/blocks/__init__.py': '',
    'model/blocks/pixels.py': 'from model.common import conv',
    'data/__init__.py': '',
    'data/image.py': 'from system.files import write_atomic',
}
TYPES = 'from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    '


def faults_of(folder: Path, changed: dict[str, str]) -> list[str]:
    """Faults of `GOOD` after files of it have changed."""
    for name, text in {**GOOD, **changed}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return find_faults(folder)


def test_a_tree_without_a_fault(tmp_path: Path) -> None:
    assert faults_of(tmp_path, {}) == []


@pytest.mark.parametrize(
    'text',
    [
        'import trainer',
        'from trainer import train',
        'import json, trainer as program',
        'def late():\n    from trainer import train',
        'class A:\n    def late(self):\n        if self:\n            import trainer',
        'try:\n    import trainer\nexcept ImportError:\n    pass',
        TYPES + 'from trainer import Trainer',
    ],
)
def test_an_import_from_above_is_found(tmp_path: Path, text: str) -> None:
    assert faults_of(tmp_path, {'data/image.py': text}) == ['data.image imports trainer, which stands above it']


@pytest.mark.parametrize('text', ['from data import image', 'import data.image', 'from data.image import read_rgb'])
def test_a_submodule_is_found_by_each_form(tmp_path: Path, text: str) -> None:
    found = faults_of(tmp_path, {'data/image.py': '', 'system/files.py': text})
    assert found == ['system.files imports data.image, which stands above it']


def test_an_import_by_dots_is_found(tmp_path: Path) -> None:
    files = {'system/files.py': 'from . import memory', 'system/memory.py': 'from .files import write_atomic'}
    (fault,) = faults_of(tmp_path, files)
    assert fault.endswith(': a circle')
    files = {'system/files.py': 'from ..data.image import x', 'system/memory.py': '', 'data/image.py': ''}
    assert faults_of(tmp_path, files) == ['system.files imports data.image, which stands above it']


def test_a_circle_is_found(tmp_path: Path) -> None:
    late = 'def late():\n    from {} import f'
    files = {'trainer.py': late.format('wiring'), 'wiring.py': late.format('photo'), 'photo.py': 'import trainer'}
    (fault,) = faults_of(tmp_path, files)
    assert fault.endswith(': a circle')
    assert all(name in fault for name in ('trainer', 'wiring', 'photo'))


def test_types_alone_make_no_circle(tmp_path: Path) -> None:
    files = {'trainer.py': 'import wiring', 'wiring.py': TYPES + 'from trainer import Trainer'}
    assert faults_of(tmp_path, files) == []
    files['wiring.py'] = TYPES + 'pass\nelse:\n    from trainer import Trainer'
    (fault,) = faults_of(tmp_path, files)
    assert fault.endswith(': a circle')


def test_data_and_networks_do_not_meet(tmp_path: Path) -> None:
    found = faults_of(tmp_path, {'data/image.py': 'from model import build'})
    assert found == ['data.image imports model, which it has nothing to do with']


@pytest.mark.parametrize(
    ('text', 'fault'),
    [
        ('from model.bicubic import Bicubic', 'imports model.bicubic, which is no part of a network'),
        ('from model import build', 'imports model, which is no part of a network'),
        ('from system import files', 'imports system.files, which is no part of a network'),
        ('import numpy as np', 'imports numpy, which no network needs'),
        ('import torchvision', 'imports torchvision, which no network needs'),
    ],
)
def test_what_a_network_may_not_import(tmp_path: Path, text: str, fault: str) -> None:
    found = faults_of(tmp_path, {'model/__init__.py': '', 'model/bicubic.py': 'import torch', 'model/asid.py': text})
    assert found == [f'model.asid {fault}']


def test_blocks_know_no_network(tmp_path: Path) -> None:
    found = faults_of(tmp_path, {'model/blocks/pixels.py': 'from model.asid import ASID'})
    assert found == ['model.blocks.pixels imports model.asid, which is no part of a network']


def test_a_new_module_needs_a_place(tmp_path: Path) -> None:
    assert faults_of(tmp_path, {'helpers.py': ''}) == ['helpers has no place in the order']
