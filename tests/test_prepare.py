"""The program that gets the image sets, on small archives from a server on this machine; its check of LR files."""

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import prepare
from data.download import archive
from data.image import read_rgb, write_png
from data.imresize import shrink
from tests.conftest import ROOT, picture
from tests.data.download.test_archive import pack, tree
from tests.data.download.test_fetch import Server, server  # noqa: F401  a fixture

SIDE = 24


def png(folder: Path, image: np.ndarray) -> bytes:
    write_png(folder / 'image.png', image)
    return (folder / 'image.png').read_bytes()


@pytest.fixture
def mirror(server: Server, tmp_path, monkeypatch) -> Server:  # noqa: F811
    """Every official archive with one or two small images, and their checksums as the published ones."""
    hr = png(tmp_path / 'made', picture(1, SIDE, SIDE))
    own = png(tmp_path / 'made', np.full((SIDE // 2, SIDE // 2, 3), 7, np.uint8))  # to tell it from LR made here
    x4 = png(tmp_path / 'made', np.full((SIDE // 4, SIDE // 4, 3), 7, np.uint8))
    contents = {
        'Flickr2K.tar': {'Flickr2K/Flickr2K_LR_bicubic/X2/000001x2.png': own, 'Flickr2K/Flickr2K_HR/000001.png': hr},
        'benchmark.tar': {
            f'benchmark/{name}/{path}': image
            for name in ('Set5', 'Set14', 'B100', 'Urban100')
            for path, image in (('HR/a.png', hr), ('LR_bicubic/X2/ax2.png', own))
        },
    }
    for part, number in (('DIV2K_train', '0001'), ('DIV2K_valid', '0801')):
        contents[f'{part}_HR.zip'] = {f'{part}_HR/{number}.png': hr}
        contents[f'{part}_LR_bicubic_X2.zip'] = {f'{part}_LR_bicubic/X2/{number}x2.png': own}
        contents[f'{part}_LR_bicubic_X4.zip'] = {f'{part}_LR_bicubic/X4/{number}x4.png': x4}
    for name, files in contents.items():
        server.files[name] = pack(tmp_path / 'made' / name, files).read_bytes()
    published = {name: (f'md5:{hashlib.md5(file).hexdigest()}', len(file)) for name, file in server.files.items()}
    monkeypatch.setattr(archive, 'PUBLISHED', published)
    server.own, server.hr = own, hr
    return server


def run(*options: str, code: int = 0) -> None:
    assert prepare.main(list(options)) == code


def error(capsys, *options: str) -> str:
    run(*options, code=2)
    text = capsys.readouterr().err
    assert text.startswith('Error: ')
    assert text.count('\n') == 1
    return text


def images(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in tree(folder).items() if name.endswith('.png')}


def test_div2k(mirror, tmp_path):
    data = tmp_path / 'data'
    command = ('DIV2K', '--dir_data', str(data), '--scale', '2+3', '--mirror', f'{mirror.url}/')
    run(*command)
    found = images(data / 'DIV2K')
    for part, number in (('train', '0001'), ('valid', '0801')):
        assert found.pop(f'DIV2K_{part}_HR/{number}.png') == mirror.hr
        assert found.pop(f'DIV2K_{part}_LR_bicubic/X2/{number}x2.png') == mirror.own
        made = data / 'DIV2K' / f'DIV2K_{part}_LR_bicubic' / 'X3' / f'{number}x3.png'  # of which there is no archive
        np.testing.assert_array_equal(read_rgb(made), shrink(picture(1, SIDE, SIDE), 3))
        del found[f'DIV2K_{part}_LR_bicubic/X3/{number}x3.png']
    assert not found
    assert [path.name for path in data.iterdir()] == ['DIV2K']
    assert [name for name, _ in mirror.asked] == [
        f'DIV2K_{part}_{kind}.zip' for part in ('train', 'valid') for kind in ('HR', 'LR_bicubic_X2')
    ]
    run(*command)
    assert len(mirror.asked) == 4
    run(*command[:3], '--scale', '4', '--mirror', mirror.url)  # only what is not there yet
    assert [name for name, _ in mirror.asked[4:]] == [f'DIV2K_{part}_LR_bicubic_X4.zip' for part in ('train', 'valid')]


def test_flickr2k(mirror, tmp_path):
    mirror.breaks = [3000]
    data = tmp_path / 'data'
    run('Flickr2K', '--dir_data', str(data), '--scale', '2+4', '--mirror', mirror.url)
    assert set(images(data)) == {
        'Flickr2K/Flickr2K_HR/000001.png',
        'Flickr2K/Flickr2K_LR_bicubic/X2/000001x2.png',
        'Flickr2K/Flickr2K_LR_bicubic/X4/000001x4.png',
    }
    assert [wanted for _, wanted in mirror.asked] == [None, 'bytes=3000-']


def test_benchmark(mirror, tmp_path):
    data = tmp_path / 'data'
    write_png(data / 'benchmark' / 'Set5' / 'HR' / 'a.png', picture(2, SIDE, SIDE))
    write_png(data / 'benchmark' / 'Manga109' / 'HR' / 'manga.png', picture(2, SIDE, SIDE))
    shutil.copytree(data / 'benchmark' / 'Set5', data / 'benchmark' / 'Set5_copy')
    run('benchmark', '--dir_data', str(data), '--scale', '2', '--mirror', mirror.url)
    sets = {name: ['a'] for name in ('B100', 'Urban100', 'Set14', 'Set5', 'Set5_copy')} | {'Manga109': ['manga']}
    expected = {f'{name}/{path}' for name, stems in sets.items() for stem in stems
                for path in (f'HR/{stem}.png', f'LR_bicubic/X2/{stem}x2.png')}  # fmt: skip
    assert set(images(data / 'benchmark')) == expected
    for name, lr in {'Set5': mirror.own, 'Set5_copy': None}.items():
        folder = data / 'benchmark' / name
        np.testing.assert_array_equal(read_rgb(folder / 'HR' / 'a.png'), picture(2, SIDE, SIDE))
        assert ((folder / 'LR_bicubic' / 'X2' / 'ax2.png').read_bytes() == lr) == (lr is not None)


def test_lr_of_an_archive_that_fits_no_image(mirror, tmp_path, capsys):
    data = tmp_path / 'data'
    write_png(data / 'benchmark' / 'Set5' / 'HR' / 'mine.png', picture(2, SIDE, SIDE))
    text = error(capsys, 'benchmark', '--dir_data', str(data), '--scale', '2', '--mirror', mirror.url)
    for part in ('Set5/LR_bicubic/X2/ax2.png', 'No HR image goes by the name of', 'Set5/LR_bicubic/X2/minex2.png'):
        assert part in text


def test_an_archive_that_is_there_is_used_and_kept(mirror, tmp_path, capsys):
    data = tmp_path / 'data'
    data.mkdir()
    shutil.copy(tmp_path / 'made' / 'Flickr2K.tar', data)
    run('Flickr2K', '--dir_data', str(data), '--scale', '2')
    assert not mirror.asked
    assert (data / 'Flickr2K.tar').is_file()
    assert len(images(data)) == 2


def test_an_archive_that_was_fetched_is_removed_after_an_interruption_too(mirror, tmp_path, monkeypatch):
    data = ['Flickr2K', '--dir_data', str(tmp_path / 'data'), '--scale', '2', '--mirror', mirror.url]
    with monkeypatch.context() as patch:
        patch.setattr(archive, 'unpack', lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        run(*data, code=130)
    assert (tmp_path / 'data' / 'Flickr2K.tar').is_file()
    run(*data)
    assert len(mirror.asked) == 1
    assert sorted(path.name for path in (tmp_path / 'data').iterdir()) == ['Flickr2K']


def test_an_archive_put_in_place_of_one_that_was_fetched_is_kept(mirror, tmp_path, monkeypatch):
    data = ['Flickr2K', '--dir_data', str(tmp_path / 'data'), '--scale', '2', '--mirror', mirror.url]
    with monkeypatch.context() as patch:
        patch.setattr(archive, 'unpack', lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        run(*data, code=130)
    (tmp_path / 'data' / 'Flickr2K.tar').unlink()
    shutil.copy(tmp_path / 'made' / 'Flickr2K.tar', tmp_path / 'data')
    run(*data)
    assert sorted(path.name for path in (tmp_path / 'data').iterdir()) == ['Flickr2K', 'Flickr2K.tar']


def test_without_locks_an_archive_is_got_all_the_same(mirror, tmp_path, monkeypatch, capsys):
    """As some file systems of clusters are."""
    monkeypatch.setattr(prepare, 'lock_file', lambda _: (_ for _ in ()).throw(OSError(37, 'No locks available')))
    run('Flickr2K', '--dir_data', str(tmp_path / 'data'), '--scale', '2', '--mirror', mirror.url)
    assert 'cannot be locked (No locks available)' in capsys.readouterr().out


def test_one_process_at_a_time_gets_an_archive(mirror, tmp_path, capsys):
    """Another one would take away what the first has unpacked."""
    (tmp_path / 'data').mkdir()
    program = f"""
import sys
from system.files import lock_file
file = open({str(tmp_path / 'data' / '.Flickr2K.tar.lock')!r}, 'a')
lock_file(file)
print('locked', flush=True)
sys.stdin.read()
"""
    pipes = {'stdin': subprocess.PIPE, 'stdout': subprocess.PIPE}
    with subprocess.Popen([sys.executable, '-c', program], cwd=ROOT / 'src', **pipes) as other:
        other.stdout.readline()
        options = ['Flickr2K', '--dir_data', str(tmp_path / 'data'), '--mirror', mirror.url]
        assert 'Another process gets Flickr2K.tar' in error(capsys, *options)
        other.stdin.close()
    assert not mirror.asked
    run(*options)


@pytest.mark.parametrize('there', ['file in it', 'link', 'file'])
def test_what_stands_where_images_are_to_be_is_named_at_once(mirror, tmp_path, capsys, there):
    place = tmp_path / 'data' / 'Flickr2K' / 'Flickr2K_HR'
    says = {
        'file in it': 'holds no images, but Thumbs.db',
        'link': 'is a link',
        'file': 'is a file, where images are to go',
    }
    if there == 'file':
        place = place.parent
        place.parent.mkdir()
        place.touch()
    elif there == 'file in it':
        place.mkdir(parents=True)
        (place / 'Thumbs.db').touch()
    else:
        (tmp_path / 'empty').mkdir()
        place.parent.mkdir(parents=True)
        place.symlink_to(tmp_path / 'empty')
    text = error(capsys, 'Flickr2K', '--dir_data', str(tmp_path / 'data'), '--mirror', mirror.url)
    assert f'{place} {says[there]}' in text
    assert not mirror.asked


def test_an_archive_that_is_there_but_another(mirror, tmp_path, capsys):
    other = pack(tmp_path / 'Flickr2K.tar', {'Flickr2K/Flickr2K_HR/000001.png': mirror.own}).read_bytes()
    text = error(capsys, 'Flickr2K', '--dir_data', str(tmp_path))
    assert str(tmp_path / 'Flickr2K.tar') in text
    assert 'published is' in text
    assert (tmp_path / 'Flickr2K.tar').read_bytes() == other
    assert not (tmp_path / 'Flickr2K').exists()


def test_an_archive_of_another_set(mirror, tmp_path, capsys, monkeypatch):
    mirror.files['Flickr2K.tar'] = content = mirror.files['benchmark.tar']
    monkeypatch.setitem(archive.PUBLISHED, 'Flickr2K.tar', (f'md5:{hashlib.md5(content).hexdigest()}', None))
    text = error(capsys, 'Flickr2K', '--dir_data', str(tmp_path / 'data'), '--mirror', mirror.url)
    assert str(tmp_path / 'data' / 'Flickr2K' / 'Flickr2K_HR') in text


def test_a_set_that_is_there_in_part(mirror, tmp_path, capsys):
    data = tmp_path / 'data'
    for name in ('DIV2K_train_HR', 'DIV2K_valid_HR'):
        write_png(data / 'DIV2K' / name / f'{name}.png', picture(3, SIDE, SIDE))
    run('DIV2K', '--dir_data', str(data), '--scale', '3')
    assert not mirror.asked
    text = capsys.readouterr().out
    assert '1 of 800 images' in text
    assert '1 of 100 images' in text
    assert len(images(data)) == 4


def test_lr_that_cannot_be_kept(mirror, tmp_path, capsys):
    write_png(tmp_path / 'Flickr2K' / 'Flickr2K_HR' / 'a.png', picture(3, SIDE, SIDE))
    (tmp_path / 'Flickr2K' / 'Flickr2K_LR_bicubic').write_text('a file')
    text = error(capsys, 'Flickr2K', '--dir_data', str(tmp_path))
    assert str(tmp_path / 'Flickr2K' / 'Flickr2K_LR_bicubic' / 'X2' / 'ax2.png') in text


@pytest.mark.parametrize(
    ('options', 'words'),
    [
        (['DIV8K'], "'DIV8K'"),
        ([], 'set'),
        (['DIV2K', '--mirror', 'example.org'], 'https://'),
        (['DIV2K', '--scale', '2+x'], "'2+x'"),
        (['DIV2K', '--scale', '0'], "'0'"),
        (['DIV2K', '--n_threads', '0'], "'0'"),
        (['DIV2K', '--chek'], '--chek'),
    ],
)
def test_mistyped(capsys, options, words):
    assert words in error(capsys, *options)


def test_no_such_archive(mirror, tmp_path, capsys):
    mirror.files.clear()
    text = error(capsys, 'benchmark', '--dir_data', str(tmp_path / 'data'), '--mirror', mirror.url)
    assert f'{mirror.url}/benchmark.tar' in text
    assert '404' in text


def test_ctrl_c(mirror, tmp_path, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare, 'get', interrupt)
    run('benchmark', '--dir_data', str(tmp_path), code=130)
    assert 'goes on' in capsys.readouterr().err


@pytest.fixture
def flat(tmp_path) -> Path:
    """Flickr2K with four images of one colour each; theirs is that of the exact bicubic too, whatever the border."""
    for number, colour in enumerate((0, 100, 200, 255), 1):
        image = np.full((13, 17, 3), colour, np.uint8)
        write_png(tmp_path / 'Flickr2K' / 'Flickr2K_HR' / f'{number}.png', image)
        write_png(tmp_path / 'Flickr2K' / 'Flickr2K_LR_bicubic' / 'X2' / f'{number}x2.png', image[:6, :8])
    return tmp_path


def alter(folder: Path, number: int, *pixels: tuple[int, int, int, int]) -> None:
    """Set (row, column, channel) to a value."""
    path = folder / 'Flickr2K' / 'Flickr2K_LR_bicubic' / 'X2' / f'{number}x2.png'
    image = read_rgb(path)
    for row, column, channel, value in pixels:
        image[row, column, channel] = value
    write_png(path, image)


def test_check_of_equal_files(flat, capsys):
    before = tree(flat)
    run('Flickr2K', '--dir_data', str(flat), '--check')
    text = capsys.readouterr().out
    assert 'Flickr2K x2: 4 of 4 LR files there, all equal' in text
    assert 'Flickr2K x3: 0 of 4 LR files there\n' in text
    assert tree(flat) == before


def test_check_counts_pixels(flat, capsys):
    alter(flat, 2, (0, 0, 0, 101))
    alter(flat, 3, (5, 7, 0, 190), (5, 7, 2, 230), (0, 0, 1, 201))  # two of the three in one pixel
    run('Flickr2K', '--dir_data', str(flat), '--scale', '2', '--check', code=1)
    text = capsys.readouterr().out
    assert f'2 differ from the exact bicubic (border mirror) in 3 of {4 * 6 * 8} pixels (1.6 %)' in text
    assert text.endswith('worst: 3x2.png (2 pixels, by up to 30), 2x2.png (1 pixels, by up to 1)\n')


def test_check_names_the_worst_three(flat, capsys):
    for number in (1, 2, 3, 4):
        alter(flat, number, *[(row, 0, 0, 50) for row in range(number)])
    run('Flickr2K', '--dir_data', str(flat), '--scale', '2', '--check', code=1)
    text = capsys.readouterr().out
    assert [text.find(f'{number}x2.png') > 0 for number in (1, 2, 3, 4)] == [False, True, True, True]
    assert text.find('4x2.png') < text.find('3x2.png') < text.find('2x2.png')


def test_check_of_a_file_of_another_size(flat, capsys):
    write_png(flat / 'Flickr2K' / 'Flickr2K_LR_bicubic' / 'X2' / '2x2.png', np.full((7, 8, 3), 100, np.uint8))
    run('Flickr2K', '--dir_data', str(flat), '--check', code=1)
    assert '2x2.png (48 pixels, by up to 255)' in capsys.readouterr().out


@pytest.mark.parametrize('border', ['mirror', 'clamp'])
@pytest.mark.parametrize('altered', [False, True])
def test_check_finds_the_border(tmp_path, capsys, border, altered):
    root = tmp_path / 'Flickr2K'
    image = np.random.default_rng(0).integers(0, 256, (40, 48, 3)).astype(np.uint8)
    write_png(root / 'Flickr2K_HR' / 'a.png', image)
    lr = shrink(image, 4, border)
    lr[5, 5] ^= altered
    write_png(root / 'Flickr2K_LR_bicubic' / 'X4' / 'ax4.png', lr)
    run('Flickr2K', '--dir_data', str(tmp_path), '--check', code=int(altered))
    text = capsys.readouterr().out
    assert f'(border {border})' in text
    assert (' in 1 of 120 pixels' in text) == altered


def test_check_of_the_official_set5(shared, capsys):
    """And of every other set there, whose given LR files are EDSR's."""
    run('benchmark', '--dir_data', str(shared), '--scale', '4', '--check')
    text = capsys.readouterr().out
    assert 'Set5 x4: 5 of 5 LR files there, all equal to the exact bicubic (border mirror)' in text


def test_check_of_nothing(flat, tmp_path, capsys):
    assert 'x3' not in error(capsys, 'Flickr2K', '--dir_data', str(flat), '--scale', '3', '--check')
    assert 'No set in' in error(capsys, 'benchmark', '--dir_data', str(tmp_path), '--check')
    assert "No set 'DIV2K'" in error(capsys, 'DIV2K', '--dir_data', str(tmp_path), '--check')


def test_check_of_a_damaged_file(flat, capsys):
    path = flat / 'Flickr2K' / 'Flickr2K_LR_bicubic' / 'X2' / '3x2.png'
    path.write_bytes(path.read_bytes()[:40])
    assert str(path) in error(capsys, 'Flickr2K', '--dir_data', str(flat), '--check')


def test_check_of_an_image_that_is_too_small(tmp_path, capsys):
    write_png(tmp_path / 'Flickr2K' / 'Flickr2K_HR' / 'a.png', np.zeros((2, 9, 3), np.uint8))
    write_png(tmp_path / 'Flickr2K' / 'Flickr2K_LR_bicubic' / 'X3' / 'ax3.png', np.zeros((1, 3, 3), np.uint8))
    assert 'a.png' in error(capsys, 'Flickr2K', '--dir_data', str(tmp_path), '--check')
