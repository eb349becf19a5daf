import sys

import pytest
import torch

from system import memory
from system.allocator import trim_heap

pytestmark = [
    pytest.mark.skipif(sys.platform != 'linux', reason='figures that Linux keeps'),
    pytest.mark.serial,
]


def test_what_is_taken_and_given_back_is_seen():
    trim_heap()
    before = memory.start_peak('cpu')
    tensor = torch.ones(2**24)  # 64 MiB
    assert abs(memory.in_use('cpu') - before - 2**26) < 2**23  # the system may take other pages back meanwhile
    del tensor
    trim_heap()
    assert abs(memory.peak('cpu') - before - 2**26) < 2**23
    assert memory.start_peak('cpu') <= memory.peak('cpu') < before + 2**25


def test_a_container_has_less(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, 'GROUP', tmp_path)
    monkeypatch.setattr(memory, 'OWN_GROUPS', tmp_path / 'own')
    (tmp_path / 'own').write_text('0::/\n')
    whole = memory.free('cpu')
    assert whole > 2**20
    (tmp_path / 'memory.current').write_text('1000\n')
    (tmp_path / 'memory.max').write_text('5000\n')
    assert memory.free('cpu') == 4000
    (tmp_path / 'memory.stat').write_text('anon 300\ninactive_file 600\n')  # which is given back as it is needed
    assert memory.free('cpu') == 4600
    (tmp_path / 'memory.max').write_text('max\n')
    assert memory.free('cpu') > 2**20


@pytest.mark.parametrize(
    ('line', 'folder', 'names'),
    [
        ('0::/jobs/7/step', '', memory.VERSION_2),
        ('9:cpu,memory:/jobs/7/step', 'memory', memory.VERSION_1),
        ('9:memory:/elsewhere', 'memory', memory.VERSION_1),
    ],
)
def test_a_job_has_less(monkeypatch, tmp_path, line, folder, names):
    """By its own group or one above; of a group whose folder is not there, as in a container, by the topmost one."""
    monkeypatch.setattr(memory, 'GROUP', tmp_path)
    monkeypatch.setattr(memory, 'OWN_GROUPS', tmp_path / 'own')
    (tmp_path / 'own').write_text(f'3:freezer:/\n{line}\n')
    root, (limit, used, files) = tmp_path / folder, names
    step = root / 'jobs' / '7' / 'step'
    step.mkdir(parents=True)

    def group(place, most):
        (place / limit).write_text(f'{most}\n')
        (place / used).write_text('1000\n')
        (place / 'memory.stat').write_text(f'anon 300\n{files} 600\n')

    group(root, 9000)
    assert memory.free('cpu') == 8600
    group(step.parent, 5000)
    group(step, 2**62)
    assert memory.free('cpu') == (8600 if 'elsewhere' in line else 4600)


def test_elsewhere_nothing_is_known(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, '_linux', lambda file, key: None)
    monkeypatch.setattr(memory, 'GROUP', tmp_path)
    assert memory.in_use('cpu') is memory.free('cpu') is memory.peak('cpu') is None
