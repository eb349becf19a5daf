"""Files that are written from the program are those that it would write now."""

import json

import networks
import tables
from options import table
from template import TEMPLATES


def test_the_table_of_networks_is_up_to_date():
    assert tables.TABLE.read_text() == tables.networks_table(), 'run python src/tables.py'
    assert json.loads(tables.networks_table()) == networks.TABLE


def test_the_table_of_losses_is_up_to_date():
    assert tables.LOSSES.read_text() == tables.losses_table(), 'run python src/tables.py'


def test_the_page_of_options_is_up_to_date():
    assert tables.OPTIONS.read_text() == tables.options_page(), 'run python src/tables.py'


def test_the_page_depends_on_nothing_of_this_machine(monkeypatch):
    page = tables.options_page()
    assert '\n## src/enlarge.py\n' in page
    assert str(table.ROOT) not in page
    monkeypatch.setattr('os.cpu_count', lambda: 1)
    monkeypatch.setenv('COLUMNS', '30')
    assert tables.options_page() == page


def test_settings_are_shown_as_in_the_papers():
    """By the papers' tables: EDSR has 32 blocks of 256 channels, its baseline 16 of 64; see the networks' files."""
    assert networks.defaults('n_heads') == (
        'DLGSANet, DLGSANet-light, DLGSANet-tiny, ATD, HiT-SRF, SwinIR-light 6; ATD-light, CATANet, PFT-light, '
        'OmniSR, ESC, ESC-light 4; ESC-FP 3'
    )
    assert networks.defaults('res_scale') == 'EDSR, NLSN, LCoAN 0.1; EDSR-baseline 1'
    assert networks.defaults('n_clusters') == 'LCoAN 128'
    assert networks.defaults('tlc_size') == 'DLGSANet, DLGSANet-light, DLGSANet-tiny by scale'
    assert networks.defaults('nothing') == ''


def test_every_network_has_a_recipe_at_its_papers_scales():
    trained = [name for name in networks.MODELS if name != 'Bicubic']
    assert {recipe['model'] for recipe in TEMPLATES.values()} == set(trained)
    assert all(recipe['scale'] in networks.TABLE[recipe['model']]['scales'] for recipe in TEMPLATES.values())


def test_every_setting_with_an_option_is_one_of_a_network():
    known = {name for model in networks.MODELS for name in networks.settings_of(model)}
    assert set(table.SETTINGS) <= known
