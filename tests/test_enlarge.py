import errno
import os
import re
import shutil
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock

import numpy as np
import pytest
import tifffile
from PIL import Image

import enlarge
from data.frames import Series, read_frames, read_series
from data.image import read_photo, write_png
from data.imresize import resize, upscale_bicubic
from error import UserError, WriteError
from photo.metadata import made_by
from photo.targets import check_name, find_sources
from tests.conftest import ROOT, picture

PLAIN = ['--cpu', '--model', 'Bicubic']


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Photographs in a folder and in one in it, in several formats."""
    folder = tmp_path / 'photos'
    write_png(folder / 'a.png', picture(0, 9, 12))
    Image.fromarray(picture(1, 10, 8)).save(folder / 'b.jpg')
    (folder / 'deeper').mkdir()
    Image.fromarray(picture(2, 8, 8)).save(folder / 'deeper' / 'a.tif')
    return folder


def run(*options: object) -> int:
    return enlarge.main([*map(str, options), *PLAIN])


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob('*') if path.is_file())


def error_of(capsys: pytest.CaptureFixture[str], *options: object) -> str:
    """What a run that fails says: a line, and a list below it if it names several photographs."""
    assert run(*options) == 2
    said = capsys.readouterr().err
    assert said.startswith('Error: ')
    assert all(line.startswith('  ') for line in said.splitlines()[1:])
    return said


def test_a_file_beside_its_source(photos):
    assert run(photos / 'a.png') == 0
    sr = read_photo(photos / 'a_x4.png').color
    expected = upscale_bicubic(picture(0, 9, 12), 4)  # which rounds and cuts between its passes
    assert np.abs(sr.astype(int) - expected).max() <= 6


def test_a_tree_of_folders(photos, tmp_path):
    assert run(photos, '-r', '-o', tmp_path / 'big', '--scale', 2, '--format', 'jpg') == 0
    assert names(tmp_path / 'big') == ['a_x2.jpg', 'b_x2.jpg', 'deeper/a_x2.jpg']
    assert (
        run(photos, '-o', tmp_path / 'flat', '--scale', 3, '--format', 'same', '--name', '{scale}-{width}-{stem}') == 0
    )
    assert names(tmp_path / 'flat') == ['3-24-b.jpg', '3-36-a.png']


def test_patterns_and_a_file_that_is_named(photos, tmp_path):
    assert run(f'{photos}/*.jpg', photos / 'deeper', '-o', tmp_path / 'big') == 0
    assert names(tmp_path / 'big') == ['a_x4.png', 'b_x4.png']
    assert run(photos / 'a.png', '-o', tmp_path / 'mine.webp') == 0
    with Image.open(tmp_path / 'mine.webp') as image:
        assert (image.format, image.size) == ('WEBP', (48, 36))


@pytest.mark.parametrize(
    ('options', 'name', 'steps', 'size'),
    [
        ('--scale 1.5', 'a_x1.5', [2], (14, 18)),  # 13.5 is rounded up
        ('--width 30', 'a_30x23', [3], (23, 30)),
        ('--fit 60x45', 'a_60x45', [3, 2], (45, 60)),
        ('--scale 8', 'a_x8', [4, 2], (72, 96)),
        ('--fit 8x8', 'a_8x6', [], (6, 8)),
    ],
)
def test_any_size(photos, capsys, options, name, steps, size):
    assert run(photos / 'a.png', *options.split()) == 0
    expected = picture(0, 9, 12)
    for scale in steps:
        expected = upscale_bicubic(expected, scale)
    found = read_photo(photos / f'{name}.png').color
    assert found.shape[:2] == size
    assert np.abs(found.astype(int) - resize(expected, *size)).max() <= 6  # several times so
    assert ('made smaller' in capsys.readouterr().out) == (not steps)


def test_what_is_done_is_not_done_again(photos, tmp_path, capsys):
    command = (photos, '-r', '-o', tmp_path / 'big', '--format', 'jpg')
    run(*command)
    first = {path: path.stat().st_mtime_ns for path in (tmp_path / 'big').rglob('*.jpg')}
    assert len(first) == 3
    assert run(*command) == 0
    assert '3 were done before' in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in first} == first

    def changed() -> set[str]:
        return {path.name for path, before in first.items() if path.stat().st_mtime_ns != before}

    os.utime(photos / 'b.jpg', ns=(1, 2**62))  # the photograph is newer now
    assert run(*command) == 0
    assert changed() == {'b_x4.jpg'}
    first = {path: path.stat().st_mtime_ns for path in first}
    os.utime(photos / 'b.jpg', ns=(1, 1))
    assert run(*command, '--quality', 50) == 0  # other settings
    assert changed() == {'a_x4.jpg', 'b_x4.jpg'}
    first = {path: path.stat().st_mtime_ns for path in first}
    assert run(*command, '--quality', 50, '--again') == 0
    assert len([path for path, before in first.items() if path.stat().st_mtime_ns != before]) == 3


def test_results_are_not_enlarged_in_their_turn(photos, tmp_path):
    for _ in range(2):
        assert run(photos, '-r', '--scale', 2) == 0
        assert run(photos, '-r', '-o', photos / 'big', '--scale', 3) == 0
        assert run(f'{photos}/*.png', '--scale', 2) == 0
    assert names(photos) == [
        'a.png', 'a_x2.png', 'b.jpg', 'b_x2.png', 'big/a_x3.png', 'big/b_x3.png', 'big/deeper/a_x3.png', 'deeper/a.tif',
        'deeper/a_x2.png',
    ]  # fmt: skip


def test_the_folder_of_results_is_left_out_whatever_is_in_it(photos):
    write_png(photos / 'big' / 'foreign.png', picture(3, 8, 8))
    assert run(photos, '-r', '-o', photos / 'big', '--scale', 2) == 0
    assert 'big/big/foreign_x2.png' not in names(photos)


def test_files_of_other_kinds_are_counted_and_folders_without_images_named(photos, capsys):
    for name in ('IMG_1.HEIC', 'IMG_2.heic', 'notes', '.hidden.mov'):
        (photos / name).write_text('')
    (photos / 'empty').mkdir()
    assert run(photos, photos / 'empty', '-o', photos / 'big') == 0
    said = capsys.readouterr().out
    assert 'Left out, of kinds that are not read: 2 .heic, 1 without suffix\n' in said
    assert f'Without images: {photos}/empty\n' in said
    assert len(names(photos / 'big')) == 2


AS_NOBODY = """
import os, sys
sys.path.insert(0, sys.argv[1])
import enlarge, photo.engine, photo.plan, model.bicubic, data.tiff, PIL.JpegImagePlugin
if os.geteuid() == 0:  # whom nothing is forbidden
    os.setgid(65534)
    os.setuid(65534)
sys.exit(enlarge.main(sys.argv[2:]))
"""


@pytest.mark.skipif(sys.platform == 'win32', reason='by the permissions of Unix')
def test_what_may_not_be_read_or_written_is_named(photos):
    """It keeps no other photograph from being enlarged."""

    def run(output: Path) -> str:
        options = [folder, '-r', '-o', output, *PLAIN]
        command = [sys.executable, '-c', AS_NOBODY, ROOT / 'src', *options]
        done = subprocess.run([*map(str, command)], capture_output=True, text=True)
        assert done.returncode == 2, done.stderr
        return done.stderr

    with TemporaryDirectory() as top:  # that of pytest is closed to others
        folder, output = Path(top, 'photos'), Path(top, 'output')
        photos.rename(folder)
        output.mkdir()
        modes = {top: 0o755, output: 0o777, folder: 0o555, folder / 'deeper': 0, folder / 'b.jpg': 0}
        for path, mode in modes.items():
            os.chmod(path, mode)  # noqa: PTH101
        said = run(output)
        assert '2 of 3 images could not be enlarged' in said
        for name in ('deeper', 'b.jpg'):
            assert f'{folder / name} cannot be read (Permission denied): check its permissions.' in said
        assert names(output) == ['a_x4.png']
        assert f'a.png: {folder} is no folder that can be written to' in run(folder)
        for path in (folder, folder / 'deeper'):
            path.chmod(0o755)


def test_a_name_too_long_for_a_result_keeps_no_other(photos, tmp_path, capsys):
    name = 'n' * 251
    write_png(photos / f'{name}.png', picture(0, 9, 12))
    assert 'File name too long' in error_of(capsys, photos, '-o', tmp_path / 'big')
    assert names(tmp_path / 'big') == ['a_x4.png', 'b_x4.png']


def test_options_may_stand_between_photographs(photos, tmp_path):
    assert run(photos / 'a.png', '-o', tmp_path / 'big', photos / 'b.jpg') == 0
    assert names(tmp_path / 'big') == ['a_x4.png', 'b_x4.png']


def empty_bmp() -> bytes:
    return b'BM' + struct.pack('<IHHI IiiHHIIiiII', 54, 0, 0, 54, 40, 0, 5, 1, 24, *[0] * 6)


def cut_gif(path: Path) -> None:
    """An animation whose last frame is not whole."""
    path.write_bytes(animation(path).read_bytes()[:-10])


@pytest.mark.parametrize(
    ('name', 'content', 'words'),
    [
        ('text.jpg', b'no image', 'text.jpg (8 bytes) is not an image'),
        ('empty.png', b'', 'empty.png (0 bytes) is not an image'),
        ('size0.bmp', empty_bmp(), 'size0.bmp (54 bytes) is not an image'),
        ('size0.gif', b'GIF89a' + bytes(7) + b';', 'size0.gif (14 bytes) is not an image'),
        ('cut.png', None, 'cut.png cannot be read'),
        ('cut.gif', cut_gif, 'cut.gif cannot be read'),
        ('circle.png', 'circle.png', 'circle.png'),
        ('nowhere.png', 'missing.png', 'nowhere.png does not exist'),
        ('pipe.png', os.mkfifo, 'pipe.png is not a file'),
    ],
)
def test_a_file_that_cannot_be_read(tmp_path, capsys, name, content, words):
    """Alone and beside another one, which is enlarged."""
    write_png(tmp_path / 'good.png', picture(0, 9, 12))
    path = tmp_path / name
    if content is None:
        path.write_bytes((tmp_path / 'good.png').read_bytes()[:-60])
    elif callable(content):
        content(path)
    elif isinstance(content, str):
        path.symlink_to(content)
    else:
        path.write_bytes(content)
    said = error_of(capsys, path, '-o', tmp_path / 'big')
    assert '1 of 1 images could not be enlarged' in said
    assert words in said
    assert names(tmp_path / 'big') == [] or not (tmp_path / 'big').exists()
    assert words in error_of(capsys, tmp_path / 'good.png', path, '-o', tmp_path / 'big')
    assert names(tmp_path / 'big') == ['good_x4.png']


def test_a_bad_file_is_named_at_the_end(photos, tmp_path, capsys):
    (photos / '0.jpg').write_text('no image')
    (photos / 'z.png').write_bytes(b'')
    said = error_of(capsys, photos, '-o', tmp_path / 'big')
    first, *others = said.splitlines()
    assert '2 of 4 images could not be enlarged' in first
    assert ['0.jpg (8 bytes)' in others[0], 'z.png (0 bytes)' in others[1], len(others)] == [True, True, 2]
    assert names(tmp_path / 'big') == ['a_x4.png', 'b_x4.png']


def test_a_full_disk_leaves_what_was_done_whole(photos, tmp_path, capsys, monkeypatch):
    for i in range(6):
        write_png(photos / f'c{i}.png', picture(i, 8, 8))
    plain, written, lock = os.fsync, [], Lock()

    def fsync(descriptor: int) -> None:
        with lock:
            if written and Path(f'/proc/self/fd/{descriptor}').readlink().suffix == '.tmp':
                raise OSError(errno.ENOSPC, 'No space left on device')
            written.append(descriptor)
        plain(descriptor)

    monkeypatch.setattr(os, 'fsync', fsync)
    said = error_of(capsys, photos, '-o', tmp_path / 'big')
    assert 'of 8 images could not be enlarged' in said
    assert 'The disk is full' in said
    monkeypatch.undo()
    assert len(names(tmp_path / 'big')) == 1
    assert run(photos, '-o', tmp_path / 'big') == 0
    assert len(names(tmp_path / 'big')) == 8


@pytest.mark.parametrize(
    ('options', 'words'),
    [
        ('none.jpg', ['none.jpg', 'does not exist']),
        ('{photos}/*.gif', ['*.gif', 'does not exist']),
        ('{photos} -o {photos}/x.png', ['x.png', '2 photographs', 'folder']),
        ('{photos}/a.png -o x.bmp', ['x.bmp', 'bmp is not written']),
        ('{photos}/a.png -o x.png --format jpg', ['x.png', '--format']),
        ('{photos}/a.png --name a --format same', ['would replace']),
        ('{photos}/a.png --name b --format jpg', ['b.jpg', 'not made by this program']),
        ('{photos} --name x', ['a.png', 'b.jpg', 'would both become', '--name']),
        ('{photos} {photos}/deeper -o {photos}/big', ['would both become']),
        ('{photos}/a.png --name {{size}}', ['{size}', '{stem}']),
        ('{photos}/a.png --name ../x', ['../x', 'without folders']),
        ('{photos}/a.png --name {{stem.x}}', ['{stem.x}', '{width}']),
        ('{photos}/a.png --scale 0', ['--scale', "'0'", 'above 0']),
        ('{photos}/a.png --scale 9', ['--scale', "'9'", 'at most 8']),
        ('{photos}/a.png --width 0', ['--width', "'0'"]),
        ('{photos}/a.png --fit 100', ['--fit', "'100'", '3840x2160']),
        ('{photos}/a.png --fit 9x9 --scale 2', ['--scale', '--fit', 'one of them']),
        ('{photos}/a.png --quality 101', ['--quality', "'101'", 'at most 100']),
        ('{photos}/a.png -o {photos}/b.jpg/x', ['a.png', 'b.jpg/x', 'no folder that can be written to']),
        ('{photos}/a.png --max_memory 9M', ['--max_memory']),
        ('{photos}/a.png --fit 999x999', ['a.png', '83.25 times', '8 times']),
        ('{photos}/a.png --background pinkish', ['--background', 'pinkish']),
        ('{photos}/a.png --weights x.pt', ['--model and --weights']),
        ('{photos}/a.png --scaal 2', ['unknown option --scaal', '--scale']),
        ('', ['PHOTO']),
    ],
)
def test_mistakes_are_one_sentence_and_nothing_is_written(photos, capsys, options, words):
    before = names(photos)
    said = error_of(capsys, *options.format(photos=photos).split())
    assert [word for word in words if word.lower() not in said.lower()] == []
    assert names(photos) == before


def test_a_file_of_another_program_is_not_replaced(photos, capsys):
    write_png(photos / 'a_x4.png', picture(5, 6, 6))
    before = (photos / 'a_x4.png').read_bytes()
    assert 'was not made by this program' in error_of(capsys, photos / 'a.png')
    assert (photos / 'a_x4.png').read_bytes() == before
    assert run(photos / 'a.png', '--again') == 0
    assert made_by(photos / 'a_x4.png').startswith('FrugalSR Bicubic_x4 ')


def test_a_photograph_that_is_refused_is_not_replaced(tmp_path, capsys):
    write_png(tmp_path / 'a.png', picture(0, 5, 5))  # too small
    for name in 'ab':
        Image.fromarray(picture(1, 60, 60)).save(tmp_path / f'{name}.jpg')
    before = (tmp_path / 'a.png').read_bytes()
    said = error_of(capsys, tmp_path, '--name', '{stem}', '--width', 90, '--again')
    assert f'{tmp_path}/a.png, which was given too and cannot be enlarged' in said
    assert (tmp_path / 'a.png').read_bytes() == before
    assert read_photo(tmp_path / 'b.png').color.shape == (90, 90, 3)


def test_a_photograph_is_not_replaced_by_its_own_result_under_another_name(photos, capsys):
    """Where a file system takes IMG.PNG and img.png for one; here a second name leads to the same file."""
    (photos / 'other.png').hardlink_to(photos / 'a.png')
    before = (photos / 'a.png').read_bytes()
    for more in ([], ['--again']):
        assert 'would replace the photograph' in error_of(capsys, photos / 'a.png', '--name', 'other', *more)
    assert (photos / 'other.png').read_bytes() == before


def test_what_windows_alone_refuses_or_has(monkeypatch, tmp_path):
    (tmp_path / 'junction').mkdir()
    write_png(tmp_path / 'junction' / 'a.png', picture(0, 9, 9))
    write_png(tmp_path / 'b.png', picture(0, 9, 9))
    monkeypatch.setattr(sys, 'platform', 'win32')
    with pytest.raises(UserError, match=r'no name can have : \? in it'):
        check_name('{stem}:{scale}?')
    monkeypatch.undo()
    assert check_name('{stem}:{scale}?')
    monkeypatch.setattr(Path, 'is_junction', lambda path: path.name == 'junction', raising=False)
    sources, _ = find_sources([str(tmp_path)], True, None)
    assert [source.path.name for source in sources] == ['b.png']


def test_a_side_beyond_jpeg_is_told(tmp_path, capsys):
    write_png(tmp_path / 'long.png', np.zeros((1, 9000, 3), np.uint8))
    said = error_of(capsys, tmp_path / 'long.png', '--scale', 8, '--format', 'jpg')
    assert '72000x8 pixels do not fit into jpg' in said
    assert 'png, tif' in said


def test_weights_that_do_not_reach_are_told(photos, capsys):
    assert enlarge.main([str(photos / 'a.png'), '--cpu', '--model', 'ATD-light', '--scale', '5']) == 2
    assert 'no two of the weights' in capsys.readouterr().err


def test_any_file_of_weights(photos):
    """The same network by its name in models/ and by its file gives the same pixels."""
    for options in ('--weights ASID_x2.pt --name file', '--model ASID --name name'):
        assert enlarge.main([str(photos / 'a.png'), '--cpu', '--scale', '2', *options.split()]) == 0
    assert np.array_equal(read_photo(photos / 'file.png').color, read_photo(photos / 'name.png').color)


def test_interrupted_and_continued(photos, tmp_path, capsys, monkeypatch):
    import photo.engine

    plain = photo.engine.read_frames

    def read(path: Path):
        if path.name == 'b.jpg':
            raise KeyboardInterrupt
        return plain(path)

    monkeypatch.setattr(photo.engine, 'read_frames', read)
    assert run(photos, '-r', '-o', tmp_path / 'big') == 130
    assert 'Interrupted: the same command goes on' in capsys.readouterr().err
    assert names(tmp_path / 'big') == ['a_x4.png']
    monkeypatch.undo()
    assert run(photos, '-r', '-o', tmp_path / 'big') == 0
    assert names(tmp_path / 'big') == ['a_x4.png', 'b_x4.png', 'deeper/a_x4.png']


def test_an_error_of_writing_has_its_cause(tmp_path):
    """By which a full disk is told from other faults."""
    from system.files import write_atomic

    (tmp_path / 'file').write_text('')
    with pytest.raises(WriteError) as caught:
        write_atomic(tmp_path / 'file' / 'x', b'')
    assert isinstance(caught.value.__cause__, OSError)


def animation(path: Path, count: int = 3) -> Path:
    frames = [Image.fromarray(picture(i, 9, 12)) for i in range(count)]
    frames = [frame.quantize(16) for frame in frames] if path.suffix == '.gif' else frames
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=[50, 70, 90][:count], loop=0)
    return path


@pytest.mark.parametrize('suffix', ['gif', 'webp', 'png'])
@pytest.mark.parametrize('format', ['png', 'webp', 'gif'])
def test_animations_go_on_moving(tmp_path, suffix, format):
    """Every frame as if it were alone."""
    path = animation(tmp_path / f'a.{suffix}')
    assert run(path, '--scale', 2, '--format', format, '--name', 'big') == 0
    assert read_series(tmp_path / f'big.{format}') == Series(((18, 24),) * 3, 0)
    pairs = zip(read_frames(path), read_frames(tmp_path / f'big.{format}'), strict=True)
    for (photo, duration), (big, shown) in pairs:
        assert shown == duration
        expected = upscale_bicubic(photo.color, 2).astype(int)
        assert np.abs(big.color - expected).mean() < (2 if format == 'png' else 16)


@pytest.mark.parametrize(
    ('options', 'name', 'pages', 'said'),
    [
        ('', 'a_x2.tif', 2, ''),
        ('--format same', 'a_x2.tif', 2, ''),
        ('--format jpg', 'a_x2.jpg', 1, 'jpg has one image, the first of its 2; tif keeps all'),
        ('--format png', 'a_x2.png', 1, 'png has one image, the first of its 2; tif keeps all'),
    ],
)
def test_pages_of_a_tiff(tmp_path, capsys, options, name, pages, said):
    """Each by its own size."""
    first, second = Image.fromarray(picture(0, 9, 12)), Image.fromarray(picture(1, 7, 5))
    first.save(tmp_path / 'a.tif', save_all=True, append_images=[second])
    assert run(tmp_path / 'a.tif', '--scale', 2, *options.split()) == 0
    assert said in capsys.readouterr().out
    assert read_series(tmp_path / name).sizes == ((18, 24), (14, 10))[:pages]


def test_frames_as_pages_and_a_first_frame_alone(tmp_path, capsys):
    path = animation(tmp_path / 'a.gif')
    assert run(path, '--format', 'tif') == 0
    assert read_series(tmp_path / 'a_x4.tif') == Series(((36, 48),) * 3)
    assert 'tif keeps its 3 images, but not how long each is shown' in capsys.readouterr().out
    assert run(path, '--format', 'jpg') == 0
    assert 'jpg has one image, the first of its 3; png, webp and gif keep the animation' in capsys.readouterr().out


def test_an_animation_that_is_done_is_not_done_again(tmp_path, capsys):
    path = animation(tmp_path / 'a.gif')
    for again in range(2):
        assert run(path, '--format', 'same') == 0
        assert ('1 were done before' in capsys.readouterr().out) == bool(again)
    assert names(tmp_path) == ['a.gif', 'a_x4.gif']


def test_a_seamless_texture_is_another_result(photos):
    assert run(photos / 'a.png', '--scale', 2) == 0
    plain = read_photo(photos / 'a_x2.png').color.astype(int)
    assert run(photos / 'a.png', '--scale', 2, '--seamless') == 0  # other settings: made anew
    seamless = read_photo(photos / 'a_x2.png').color.astype(int)
    tiled = np.tile(picture(0, 9, 12), (3, 3, 1))
    expected = upscale_bicubic(tiled, 2)[18:36, 24:48].astype(int)
    assert np.abs(seamless - expected).max() <= 6
    assert np.abs(plain - seamless).max() > 6


def test_photographs_with_loss_get_the_weights_made_for_them(photos, tmp_path, capsys, monkeypatch):
    models = tmp_path / 'models'
    models.mkdir()
    for name in ('ASID_x2', 'ASID-photo_x2'):
        shutil.copy(ROOT / 'models' / 'ASID_x2.pt', models / f'{name}.pt')
    monkeypatch.setattr(enlarge, 'ROOT', tmp_path)
    assert enlarge.main([str(photos), '-o', str(tmp_path / 'big'), '--scale', '2', '--cpu']) == 0
    said = capsys.readouterr().out
    assert 'x2, JPEG and lossy WebP: ASID-photo_x2.pt, made for such photographs' in said
    assert 'x2, clean images: ASID_x2.pt' in said
    assert made_by(tmp_path / 'big' / 'b_x2.png').startswith('FrugalSR ASID-photo_x2 ')
    assert made_by(tmp_path / 'big' / 'a_x2.png').startswith('FrugalSR ASID_x2 ')


def test_a_file_of_weights_is_loaded_once(photos, monkeypatch):
    import model.loading.weights as loading

    plain, read = loading.read_weights, []

    def read_weights(path: Path, *arguments):
        read.append(path)
        return plain(path, *arguments)

    monkeypatch.setattr(loading, 'read_weights', read_weights)
    assert enlarge.main([str(photos), '--cpu', '--scale', '2', '--weights', 'ASID_x2.pt']) == 0
    assert len(read) == 1


def test_missing_packages_are_one_sentence(photos):
    command = [sys.executable, '-S', str(ROOT / 'src' / 'enlarge.py'), str(photos / 'a.png')]  # -S: only Python's own
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert re.fullmatch(r'Error: \w+ is missing in .*: use \.venv/bin/python, or pip install .*\n', done.stderr)


def test_another_photograph_of_the_same_name_is_neither_left_out_nor_replaced(tmp_path, capsys):
    """As of a camera that begins again at 1: the result of the other one is there."""
    for number, folder in enumerate('ab'):
        write_png(tmp_path / folder / 'x.png', picture(number, 9, 12))
    command = ('-o', tmp_path / 'big', '--scale', 2)
    assert run(tmp_path / 'a/x.png', *command) == 0
    before = (tmp_path / 'big/x_x2.png').read_bytes()
    for more in ((), ('--seamless',)):
        assert 'was made from another photograph' in error_of(capsys, tmp_path / 'b/x.png', *command, *more)
        assert (tmp_path / 'big/x_x2.png').read_bytes() == before
    assert run(tmp_path / 'b/x.png', *command, '--again') == 0
    found = read_photo(tmp_path / 'big/x_x2.png').color.astype(int)
    assert np.abs(found - upscale_bicubic(picture(1, 9, 12), 2)).max() <= 6


@pytest.mark.skipif(sys.platform == 'win32', reason='names are text there')
def test_a_name_that_is_no_text(tmp_path):
    write_png(tmp_path / 'a.png', picture(0, 9, 12))
    (tmp_path / 'a.png').rename(tmp_path / os.fsdecode(b'\xff.png'))
    assert run(tmp_path, '-o', tmp_path / 'big') == 0
    assert names(tmp_path / 'big') == [os.fsdecode(b'\xff_x4.png')]


def test_photographs_that_differ_in_the_middle_alone(tmp_path, capsys):
    """As scanned pages with white borders do, in files that are not packed."""
    for number, folder in enumerate('ab'):
        page = np.full((400, 300, 3), 255, np.uint8)
        page[200] = number
        (tmp_path / folder).mkdir()
        Image.fromarray(page).save(tmp_path / folder / 'x.bmp')
    assert run(tmp_path / 'a/x.bmp', '-o', tmp_path / 'big', '--scale', 1) == 0
    assert 'was made from another' in error_of(capsys, tmp_path / 'b/x.bmp', '-o', tmp_path / 'big', '--scale', 1)


def test_a_photograph_that_was_moved_or_changed_is_the_same(tmp_path, capsys):
    write_png(tmp_path / 'a/x.png', picture(0, 9, 12))
    command = ('-o', tmp_path / 'big', '--scale', 2)
    assert run(tmp_path / 'a/x.png', *command) == 0
    (tmp_path / 'a').rename(tmp_path / 'b')
    assert run(tmp_path / 'b/x.png', *command) == 0
    assert '1 were done before' in capsys.readouterr().out
    assert run(tmp_path / 'b/x.png', *command, '--seamless') == 0  # the same one at another place
    write_png(tmp_path / 'b/x.png', picture(1, 9, 12))
    assert run(tmp_path / 'b/x.png', *command) == 0  # another one at the same place
    found = read_photo(tmp_path / 'big/x_x2.png').color.astype(int)
    assert np.abs(found - upscale_bicubic(picture(1, 9, 12), 2)).max() <= 6


def test_a_name_may_begin_with_a_tilde(tmp_path, capsys, monkeypatch):
    write_png(tmp_path / '~a.png', picture(0, 9, 12))
    monkeypatch.chdir(tmp_path)
    assert run('~a.png', '--scale', 2) == 0
    assert names(tmp_path) == ['~a.png', '~a_x2.png']
    assert 'no such home folder is known' in error_of(capsys, '~nobody-of-this-name/a.png')


def test_what_cannot_be_written_keeps_no_other(photos, tmp_path, capsys, monkeypatch):
    """Whatever it is that goes wrong there."""
    import photo.engine

    plain = photo.engine.write_result

    def write(results, path: Path, *about: object) -> None:
        if path.stem == 'a_x4':
            raise TypeError('odd')
        plain(results, path, *about)

    monkeypatch.setattr(photo.engine, 'write_result', write)
    said = error_of(capsys, photos, '-o', tmp_path / 'big')
    assert '1 of 2' in said
    assert re.search(r'a_x4.png cannot be written \(TypeError: odd, in test_enlarge.py, line \d+\)', said)
    assert names(tmp_path / 'big') == ['b_x4.png']


def test_a_photograph_that_goes_meanwhile_keeps_no_other(photos, tmp_path, capsys, monkeypatch):
    import photo.engine

    plain = photo.engine.read_metadata

    def read(path: Path):
        if path.name == 'a.png':
            path.unlink()
        return plain(path)

    monkeypatch.setattr(photo.engine, 'read_metadata', read)
    said = error_of(capsys, photos, '-o', tmp_path / 'big')
    assert '1 of 2' in said
    assert 'a.png does not exist' in said
    assert names(tmp_path / 'big') == ['b_x4.png']


def test_a_tiff_file_that_one_library_alone_reads(tmp_path, capsys):
    """Grey with alpha of 16 bits, which Pillow does not know."""
    samples = np.dstack([picture(0, 9, 12)[..., :1], np.full((9, 12), 255, np.uint8)]).astype(np.uint16) * 257
    tifffile.imwrite(tmp_path / 'a.tif', samples, photometric='minisblack', extrasamples=['unassalpha'])
    for again in range(2):
        assert run(tmp_path / 'a.tif', '--scale', 2, '--format', 'tif') == 0
        assert ('1 were done before' in capsys.readouterr().out) == bool(again)
    assert tifffile.imread(tmp_path / 'a_x2.tif').shape == (18, 24, 2)


def test_weights_may_have_any_name(tmp_path, capsys):
    shutil.copy(ROOT / 'models/ASID_x2.pt', tmp_path / 'Gr\xf6\xdfe_x2.pt')
    write_png(tmp_path / 'a.png', picture(0, 9, 12))
    command = [str(tmp_path / 'a.png'), '--cpu', '--scale', '2', '--weights', str(tmp_path / 'Gr\xf6\xdfe_x2.pt')]
    for again in range(2):
        assert enlarge.main(command) == 0
        assert ('1 were done before' in capsys.readouterr().out) == bool(again)


def test_the_weights_of_all_pages_are_noted(tmp_path):
    """Not of the first one alone, which is large enough."""
    first, second = Image.fromarray(picture(0, 9, 40)), Image.fromarray(picture(1, 7, 5))
    first.save(tmp_path / 'a.tif', save_all=True, append_images=[second])
    assert run(tmp_path / 'a.tif', '--width', 10) == 0
    assert made_by(tmp_path / 'a_10x2.tif').startswith('FrugalSR Bicubic_x2 ')


@pytest.mark.serial
@pytest.mark.parametrize(
    ('channels', 'dtype', 'options'),
    [
        (4, np.uint8, '--scale 4 --format jpg'),
        (4, np.uint16, '--scale 4 --format webp'),
        (3, np.uint16, '--scale 4 --format tif'),
        (3, np.uint8, '--scale 3.1'),
        (4, np.uint16, '--scale 2.1'),
        (3, np.uint8, '--scale 8'),
    ],
)
def test_what_results_take_is_foreseen(tmp_path, monkeypatch, channels, dtype, options):
    """By --max_memory, of arrays; what networks take is measured."""
    import photo.engine

    held: list[int] = []
    monkeypatch.setattr(photo.engine, 'check_fits', lambda path, limit, of_result: held.append(of_result))
    samples = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (400, 500, channels)).astype(dtype)
    write_png(tmp_path / 'a.png', samples)
    run(tmp_path / 'a.png', '--name', 'first', *options.split())  # what is made once is there now
    tracemalloc.start()
    assert run(tmp_path / 'a.png', '--max_memory', '20G', *options.split()) == 0
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    read = 6 * samples.nbytes  # the photograph itself, its colours apart, and what is filled or is next
    assert peak < held[0] + read + 2**21
