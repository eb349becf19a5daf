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
    whole = memory.free('cpu')
    assert whole > 2**20
    (tmp_path / 'memory.current').write_text('1000\n')
    (tmp_path / 'memory.max').write_text('5000\n')
    assert memory.free('cpu') == 4000
    (tmp_path / 'memory.stat').write_text('anon 300\ninactive_file 600\n')  # which is given back as it is needed
    assert memory.free('cpu') == 4600
    (tmp_path / 'memory.max').write_text('max\n')
    assert memory.free('cpu') > 2**20


def test_elsewhere_nothing_is_known(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, '_linux', lambda file, key: None)
    monkeypatch.setattr(memory, 'GROUP', tmp_path)
    assert memory.in_use('cpu') is memory.free('cpu') is memory.peak('cpu') is None
