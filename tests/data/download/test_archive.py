"""Archives: what is unpacked and where to, what is refused, and what is left when it goes wrong."""

import io
import multiprocessing
import os
import signal
import stat
import sys
import tarfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from data.download.archive import archives, unpack
from error import UserError
from tests.data.download.test_fetch import full_disk

KINDS = pytest.mark.parametrize('kind', ['zip', 'tar'])
SET5 = {f'benchmark/Set5/{name}': name.encode() for name in ('LR_bicubic/X2/ax2.png', 'HR/a.png', 'HR/b.png')}


def pack(path: Path, files: Mapping[str, bytes], links: Sequence[str] = (), mode: int = stat.S_IFLNK) -> Path:
    """A zip or tar archive of files, folders (names ending in '/') and links to /etc."""
    if path.suffix == '.zip':
        with zipfile.ZipFile(path, 'w') as packed:
            for name, content in files.items():
                packed.writestr(name, content)
            for name in links:
                info = zipfile.ZipInfo(name)
                info.create_system, info.external_attr = 3, (mode | 0o777) << 16
                packed.writestr(info, '/etc')
        return path
    with tarfile.open(path, 'w') as packed:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            info.type = tarfile.DIRTYPE if name.endswith('/') else tarfile.REGTYPE
            packed.addfile(info, io.BytesIO(content))
        for name in links:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, '/etc'
            packed.addfile(info)
    return path


def tree(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob('*') if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def message(path: Path, into: Path) -> str:
    """What is said; nothing is left behind."""
    before = tree(into.parent)
    with pytest.raises(UserError) as caught:
        unpack(path, into)
    assert '\n' not in str(caught.value)
    assert str(path) in str(caught.value)
    assert tree(into.parent) == before
    assert not [child for child in into.rglob('*') if child.is_dir()]
    return str(caught.value)


@KINDS
def test_images_go_into_the_folders_of_edsr(tmp_path, kind):
    wanted = {
        'DIV2K_train_HR/0001.png': b'1',
        'DIV2K_train_LR_bicubic/X2/0001x2.png': b'2',
        './Flickr2K/Flickr2K_HR/000001.PNG': b'3',
        'benchmark/Set5/LR_bicubic/X4/babyx4.png': b'4',
    }
    others = {
        'Flickr2K/Flickr2K_LR_unknown/X2/000001x2.png': b'5',
        'benchmark/Set5/bin/HR.pt': b'6',
        'benchmark/Set5/HR/bin/baby.pt': b'7',
        'benchmark/Set5/HR/._baby.png': b'8',
        'benchmark/Set5/HR/': b'',
        'baby.png': b'9',
        'README': b'10',
    }
    new = unpack(pack(tmp_path / f'x.{kind}', wanted | others), tmp_path / 'data')
    assert tree(tmp_path / 'data') == {name.removeprefix('./'): content for name, content in wanted.items()}
    assert set(new) == {(tmp_path / 'data' / name).parent for name in wanted}
    assert not list((tmp_path / 'data').glob('.*'))


@KINDS
def test_what_is_there_stays(tmp_path, kind):
    (tmp_path / 'benchmark' / 'Set5' / 'HR').mkdir(parents=True)
    (tmp_path / 'benchmark' / 'Set5' / 'HR' / 'mine.png').write_bytes(b'mine')
    (tmp_path / 'benchmark' / 'Set5' / 'LR_bicubic' / 'X2').mkdir(parents=True)
    new = unpack(pack(tmp_path / f'x.{kind}', SET5), tmp_path)
    assert new == [tmp_path / 'benchmark' / 'Set5' / 'LR_bicubic' / 'X2']
    assert tree(tmp_path / 'benchmark') == {
        'Set5/HR/mine.png': b'mine',
        'Set5/LR_bicubic/X2/ax2.png': b'LR_bicubic/X2/ax2.png',
    }


def test_hr_appears_last(tmp_path):
    """Whether a set is there is seen by its HR."""
    files = {f'{name}/{folder}/a.png': b'' for name in ('B', 'A') for folder in ('HR', 'LR_bicubic/X2')}
    new = unpack(pack(tmp_path / 'x.zip', files), tmp_path / 'data')
    assert [folder.name for folder in new] == ['X2', 'X2', 'HR', 'HR']


@KINDS
@pytest.mark.parametrize(
    'name',
    ['../HR/a.png', 'HR/../../a.png', '..', '/HR/a.png', 'C:/HR/a.png', 'C:a.png', '\\HR\\a.png', 'HR\\..\\a.png',
     'HR/a\\b.png', 'HR/a\n.png'],
)  # fmt: skip
def test_names_that_lead_elsewhere(tmp_path, kind, name):
    path = pack(tmp_path / f'x.{kind}', {**SET5, name: b'bad'})
    assert repr(name) in message(path, tmp_path / 'data')


@KINDS
@pytest.mark.parametrize('name', ['benchmark/Set5/HR', 'HR/a.png', 'notes'])
def test_links(tmp_path, kind, name):
    path = pack(tmp_path / f'x.{kind}', {'other/HR/a.png': b''}, [name])
    text = message(path, tmp_path / 'data')
    assert repr(name) in text
    assert 'link' in text


def test_a_file_behind_a_link(tmp_path):
    """A link to a folder, then a file in it, which would land outside."""
    outside = tmp_path / 'outside'
    outside.mkdir()
    with tarfile.open(tmp_path / 'x.tar', 'w') as packed:
        info = tarfile.TarInfo('HR')
        info.type, info.linkname = tarfile.SYMTYPE, str(outside)
        packed.addfile(info)
        packed.addfile(tarfile.TarInfo('HR/a.png'))
    message(tmp_path / 'x.tar', tmp_path / 'data')
    assert not list(outside.iterdir())


@pytest.mark.parametrize('kind', [tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_hard_links_and_devices_in_a_tar(tmp_path, kind):
    with tarfile.open(tmp_path / 'x.tar', 'w') as packed:
        info = tarfile.TarInfo('HR/a.png')
        info.type, info.linkname = kind, 'HR/b.png'
        packed.addfile(info)
    assert "'HR/a.png'" in message(tmp_path / 'x.tar', tmp_path / 'data')


def test_a_device_in_a_zip(tmp_path):
    path = pack(tmp_path / 'x.zip', {}, ['HR/a.png'], stat.S_IFCHR)
    assert "'HR/a.png'" in message(path, tmp_path / 'data')


@KINDS
@pytest.mark.parametrize('keep', [0, 100, -30_000])
def test_a_truncated_archive(tmp_path, kind, keep):
    path = pack(tmp_path / f'x.{kind}', {**SET5, 'HR/large.png': bytes(20_000), 'HR/last.png': bytes(30_000)})
    path.write_bytes(path.read_bytes()[:keep])
    assert 'remove it' in message(path, tmp_path / 'data')


def test_a_damaged_zip(tmp_path):
    path = pack(tmp_path / 'x.zip', {'HR/a.png': b'the content'})
    path.write_bytes(path.read_bytes().replace(b'the content', b'tha content'))
    assert 'remove it' in message(path, tmp_path / 'data')


def test_a_page_instead_of_an_archive(tmp_path):
    (tmp_path / 'x.zip').write_text('<html>Please log in</html>' * 100)
    assert 'no whole zip or tar archive' in message(tmp_path / 'x.zip', tmp_path / 'data')


@pytest.mark.skipif(sys.platform == 'win32', reason='Windows has no limit on the size of files')
@KINDS
def test_a_full_disk(tmp_path, kind):
    path = pack(tmp_path / f'x.{kind}', {**SET5, 'benchmark/Set5/HR/c.png': bytes(100_000)})
    with full_disk(4096):
        text = message(path, tmp_path / 'data')
    assert 'could not be unpacked' in text
    assert 'File too large' in text
    assert len(unpack(path, tmp_path / 'data')) == 2


@pytest.mark.skipif(sys.platform == 'win32', reason='Windows cannot fork')
@pytest.mark.parametrize('folders', [0, 1])
def test_a_killed_run(tmp_path, folders):
    """Killed when so many folders have their final names."""
    path, data = pack(tmp_path / 'x.tar', SET5), tmp_path / 'data'
    child = multiprocessing.get_context('fork').Process(target=unpack_and_die, args=(path, data, folders))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert len(tree(data)) == 3
    assert len(list(data.glob('benchmark/Set5/LR_bicubic/X2'))) == folders
    assert not (data / 'benchmark' / 'Set5' / 'HR').exists()
    unpack(path, data)
    assert tree(data) == SET5
    assert [child.name for child in data.iterdir()] == ['benchmark']


def unpack_and_die(path: Path, into: Path, folders: int) -> None:
    rename = Path.replace
    renamed: list[Path] = []

    def killed(self: Path, target: Path) -> Path:
        if len(renamed) == folders:
            os.kill(os.getpid(), signal.SIGKILL)
        renamed.append(target)
        return rename(self, target)

    Path.replace = killed  # type: ignore[method-assign,assignment]
    unpack(path, into)


def test_a_file_where_a_folder_should_be(tmp_path):
    path = pack(tmp_path / 'x.zip', SET5)
    (tmp_path / 'benchmark').write_text('text')
    with pytest.raises(UserError, match='benchmark is a file, where images are to go'):
        unpack(path, tmp_path)
    assert {child.name for child in tmp_path.iterdir()} == {'x.zip', 'benchmark'}
    assert (tmp_path / 'benchmark').read_text() == 'text'


def test_the_official_addresses():
    found = {
        name: [f'{a.site}/{a.name}' for a in archives(name, [2, 8])] for name in ('DIV2K', 'Flickr2K', 'benchmark')
    }
    site = 'https://data.vision.ee.ethz.ch/cvl/DIV2K'
    kinds = ('HR', 'LR_bicubic_X2')  # of x8 there is no archive of this kind
    assert found['DIV2K'] == [f'{site}/DIV2K_{part}_{kind}.zip' for part in ('train', 'valid') for kind in kinds]
    assert found['Flickr2K'] == ['https://cv.snu.ac.kr/research/EDSR/Flickr2K.tar']
    assert found['benchmark'] == ['https://cv.snu.ac.kr/research/EDSR/benchmark.tar']


def test_checksums_are_of_their_kind():
    official = [found for name in ('DIV2K', 'Flickr2K', 'benchmark') for found in archives(name, [2, 3, 4])]
    assert len(official) == 10
    assert len({found.checksum for found in official}) == 10
    for found in official:
        algorithm, digest = found.checksum.split(':')
        assert len(bytes.fromhex(digest)) == {'md5': 16, 'sha256': 32}[algorithm]
