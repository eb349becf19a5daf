"""Weights of authors from a server on this machine, by prepare.py and by --pre_train download."""

import hashlib
import re
import socket
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import main
import prepare
from data.download import fetch as download
from data.download import weights
from data.download.weights import TABLE, Official, fetch_official, find_official
from error import UserError, WriteError
from model import build
from model.loading.weights import read_weights
from system.files import safetensors
from tests.data.download.test_fetch import Server, full_disk, server  # noqa: F401  a fixture

SECRET = 'of the small one'


def content(seed: int = 0) -> bytes:
    """A file of weights of some 100 kB."""
    torch.manual_seed(seed)
    return safetensors({'body.weight': torch.rand(25_000), 'tail.weight': torch.rand(3)}, {})


@pytest.fixture
def official(server: Server, monkeypatch: pytest.MonkeyPatch) -> Official:  # noqa: F811
    """The authors' weights of IMDN x2, which the server has."""
    server.files['small.safetensors'] = content()
    made = Official(
        'IMDN', 2, f'{server.url}/small.safetensors', SECRET, 'IMDN_x2.safetensors',
        hashlib.sha256(content()).hexdigest(), len(content()), '',
    )  # fmt: skip
    monkeypatch.setitem(TABLE, 'IMDN_x2', made)
    return made


def refused(official: Official, folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        fetch_official(official, folder, read_weights)
    assert '\n' not in str(caught.value)
    return str(caught.value)


def run(capsys: pytest.CaptureFixture[str], *options: object, status: int = 0) -> str:
    assert prepare.main(['weights', *map(str, options)]) == status
    out, err = capsys.readouterr()
    return err if status else out


# The table.


def test_every_entry_can_be_understood() -> None:
    assert len({official.file for official in TABLE.values()}) == len(TABLE)
    for name, official in TABLE.items():
        assert re.fullmatch(r'[\w-]+_x[2348]', name)
        assert re.fullmatch(r'https://[\w./-]+', official.address)
        assert official.licence
        assert official.sha256 is None or re.fullmatch(r'[0-9a-f]{64}', official.sha256)
        assert official.file.startswith(name)
        if not official.by_hand:
            assert Path(official.file).suffix == Path(official.address).suffix in ('.pt', '.pth', '.safetensors')
    assert not Counter(o.sha256 for o in TABLE.values() if o.sha256).most_common(1)[0][1] > 1


def test_no_file_has_the_name_of_weights_of_our_own() -> None:
    own = {path.stem for path in (Path(weights.__file__).parents[3] / 'models').glob('*.md')}
    assert not own & {Path(official.file).stem for official in TABLE.values()}


@pytest.mark.parametrize('name', ['IMDN_x2', 'IMDN_x4', 'PAN_x3', 'BSRN_x2', 'BSRN_x4'])
def test_published_checksums_are_those_of_the_files(shared: Path, name: str) -> None:
    path = shared / 'reference' / 'official' / TABLE[name].address.rpartition('/')[2]
    assert path.stat().st_size == TABLE[name].size
    assert hashlib.sha256(path.read_bytes()).hexdigest() == TABLE[name].sha256


def test_names() -> None:
    assert [official.name for official in find_official(['PAN', 'IMDN_x3', 'PAN_x2'])] == [
        'PAN_x2', 'PAN_x3', 'PAN_x4', 'IMDN_x3',
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"No weights 'IMND_x2' are known; similar are IMDN_x2.*weights list names all"):
        find_official(['PAN', 'IMND_x2'])


# By name, with prepare.py.


def test_a_file_is_fetched_with_its_card(official, server, tmp_path, capsys):  # noqa: F811
    said = run(capsys, 'IMDN_x2', '--extend', tmp_path / 'new')
    assert official.address in said
    assert SECRET in said
    path = tmp_path / 'new' / 'IMDN_x2.safetensors'
    assert path.read_bytes() == content()
    card = path.with_name('IMDN_x2.safetensors.txt').read_text()
    for part in ('IMDN x2', official.address, SECRET, official.sha256, f'{len(content())} bytes', 'as published'):
        assert part in card
    assert sorted(path.parent.iterdir()) == [path, path.with_name('IMDN_x2.safetensors.txt')]
    assert 'is there already' in run(capsys, 'IMDN_x2', '--extend', tmp_path / 'new')
    assert len(server.asked) == 1


def test_a_broken_download_goes_on(official, server, tmp_path, capsys):  # noqa: F811
    server.breaks = [40_000, *[0] * 9]
    said = run(capsys, 'IMDN_x2', '--extend', tmp_path, status=2)
    assert '40,000 bytes are kept in' in said
    server.breaks.clear()
    run(capsys, 'IMDN_x2', '--extend', tmp_path)
    assert (tmp_path / 'IMDN_x2.safetensors').read_bytes() == content()
    assert server.asked[-1] == ('small.safetensors', 'bytes=40000-')


def test_a_server_that_falls_silent(official, server, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(download, 'TIMEOUT', 0.1)
    monkeypatch.setattr(server, 'finish_request', lambda request, address: server.silent.append(request))
    server.silent = []  # it takes connections and says nothing
    monkeypatch.setattr(server, 'shutdown_request', lambda request: None)
    assert 'check the connection and run this again' in refused(official, tmp_path)
    for request in server.silent:
        request.close()
    assert not list(tmp_path.iterdir())


def test_nobody_there(official, tmp_path):
    with socket.socket() as unused:
        unused.bind(('127.0.0.1', 0))
        address = f'http://127.0.0.1:{unused.getsockname()[1]}/x.pth'
        assert 'Connection refused' in refused(replace(official, address=address), tmp_path)


def test_no_such_file_there(official, server, tmp_path):  # noqa: F811
    server.files.clear()
    said = refused(official, tmp_path)
    assert '404 Not Found' in said
    assert f'fetch it with a browser and put it into {tmp_path} as IMDN_x2.safetensors' in said
    assert not list(tmp_path.iterdir())


def test_another_file_there(official, server, tmp_path):  # noqa: F811
    server.files['small.safetensors'] = content(1)
    said = refused(official, tmp_path)
    assert official.sha256 in said
    assert [path.name for path in tmp_path.iterdir()] == ['IMDN_x2.safetensors.part']
    server.files['small.safetensors'] = content()[:-1]
    (tmp_path / 'IMDN_x2.safetensors.part').unlink()
    said = refused(official, tmp_path)
    assert f'{len(content()) - 1:,} bytes, published are {len(content()):,}' in said
    assert '--mirror' not in said
    assert not list(tmp_path.iterdir())


def test_a_file_of_which_nothing_is_known_is_looked_into(official, server, tmp_path):  # noqa: F811
    unknown = replace(official, sha256=None, size=None)
    for wrong in (b'<html>Please sign in</html>', b'version https://git-lfs.github.com/spec/v1\n', content()[:-1]):
        server.files['small.safetensors'] = wrong
        assert 'gave another file than it should' in refused(unknown, tmp_path)
        assert not list(tmp_path.iterdir())
    server.files['small.safetensors'] = content()
    path = fetch_official(unknown, tmp_path, read_weights)
    assert path.read_bytes() == content()
    assert f'SHA-256: {official.sha256} (computed here: what it should be is not known)' in (
        path.with_name(f'{path.name}.txt').read_text()
    )


def test_a_file_that_is_there_but_another(official, tmp_path):
    (tmp_path / official.file).write_bytes(content(1))
    assert official.sha256 in refused(official, tmp_path)
    assert (tmp_path / official.file).read_bytes() == content(1)


def test_no_room_and_no_folder(official, tmp_path):
    with full_disk(65536):
        assert '--extend' in refused(official, tmp_path)
    (tmp_path / 'file').write_text('text')
    with pytest.raises(WriteError, match='name another folder with --extend'):
        fetch_official(official, tmp_path / 'file', read_weights)
    assert (tmp_path / 'file').read_text() == 'text'


def test_what_no_program_can_fetch(official, tmp_path, capsys):
    said = run(capsys, 'LCoAN_x2', 'IMDN_x2', '--extend', tmp_path, status=2)
    assert said.startswith(
        'Error: LCoAN_x2 lies where no program can fetch it: open https://github.com/YigangZhao/LCoAN'
    )
    assert f'put it into {tmp_path} as LCoAN_x2.pth' in said
    assert (tmp_path / official.file).is_file()  # the others are there all the same
    (tmp_path / 'LCoAN_x2.pth').write_bytes(content())
    assert 'is there already' in run(capsys, 'LCoAN_x2', '--extend', tmp_path)


def test_list(tmp_path, capsys):
    (tmp_path / 'PAN_x4.pth').touch()
    said = run(capsys, 'list', '--extend', tmp_path)
    lines = dict(zip(said.splitlines()[::2], said.splitlines()[1::2], strict=True))
    assert [line.split()[0] for line in lines] == list(TABLE)
    assert [line.split()[0] for line in lines if ' there ' in line] == ['PAN_x4']
    for (line, rest), official in zip(lines.items(), TABLE.values(), strict=True):
        assert official.address in line
        assert ('by hand' in line) == bool(official.by_hand)
        assert f'licence: {official.licence}' in rest
        assert ('SHA-256 not known' in rest) == (official.sha256 is None)


# By the network at hand, with --pre_train download.


@pytest.fixture
def edsr(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:  # noqa: F811
    """Weights of EDSR-baseline x2 on the server, as the table names them."""
    torch.manual_seed(0)
    torch.save(build('EDSR-baseline', 2).state_dict(), tmp_path / 'edsr.pt')
    server.files['edsr.pt'] = (tmp_path / 'edsr.pt').read_bytes()
    official = replace(TABLE['EDSR-baseline_x2'], address=f'{server.url}/edsr.pt')
    monkeypatch.setitem(TABLE, 'EDSR-baseline_x2', official)
    return server.files['edsr.pt']


def export(tmp_path: Path, network: str) -> int:
    options = f'--export safetensors --pre_train download --extend {tmp_path}/models --save_dir {tmp_path} --save run'
    return main.main([*options.split(), *network.split()])


@pytest.mark.parametrize(
    'network', ['--model EDSR-baseline --scale 2', '--model EDSR --scale 2 --n_resblocks 16 --n_feats 64 --res_scale 1']
)
def test_the_network_at_hand_is_fetched(edsr, server, tmp_path, network, capsys):  # noqa: F811
    assert export(tmp_path, network) == 0
    assert (tmp_path / 'models' / 'EDSR-baseline_x2.pt').read_bytes() == edsr
    assert 'licence: MIT' in capsys.readouterr().out
    (found,) = (tmp_path / 'run').glob('*.safetensors')
    expected = read_weights(tmp_path / 'edsr.pt').state
    assert all(torch.equal(value, expected[key]) for key, value in read_weights(found).state.items())
    assert export(tmp_path, network) == 0
    assert len(server.asked) == 1


def test_who_looks_for_them_by_name_is_told(tmp_path, capsys):
    for name, told in (('EDSR_x2.pt', True), ('IMDN_x3.pth', True), ('IMDN_x3.pt', False), ('ATD_x2.pth', False)):
        options = f'--export safetensors --model EDSR --scale 2 --n_resblocks 1 --pre_train {name} --extend {tmp_path}'
        assert main.main(options.split()) == 2
        stem = name.partition('.')[0]
        assert (f"get the authors' with python src/prepare.py weights {stem}" in capsys.readouterr().err) == told


@pytest.mark.parametrize(
    ('network', 'said'),
    [
        ('--model auto', '--pre_train download: name the network with --model'),
        ('--model EDSR-baseline --scale 8', 'no weights of EDSR-baseline_x8 by its authors are known here'),
        ('--model LCoAN --scale 2', 'LCoAN_x2 lies where no program can fetch it: open https://github.com/YigangZhao'),
        ('--model EDSR-baseline --scale 2 --n_feats 8', 'does not fit this network'),
    ],
)
def test_what_is_not_to_be_had_ends_in_a_sentence(edsr, tmp_path, network, said, capsys):
    assert export(tmp_path, network) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count('\n') == 1
