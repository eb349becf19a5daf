"""Files of several images, as Pillow and tifffile write them, and as they read what is written here."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from data.frames import Series, read_frames, read_series
from data.png import encode_apng
from data.tiff import encode_tiff
from error import UserError

RNG = np.random.default_rng(0)
TIMES = [40, 100, 60, 250]


def noise(*shape: int, dtype: type = np.uint8) -> np.ndarray:
    return RNG.integers(0, np.iinfo(dtype).max, shape, endpoint=True).astype(dtype)


def save(path: Path, images: list[Image.Image], **options: object) -> Path:
    images[0].save(path, save_all=True, append_images=images[1:], **options)
    return path


@pytest.mark.parametrize('suffix', ['gif', 'png', 'webp'])
@pytest.mark.parametrize('plays', [0, 1, 3])
def test_frames_with_their_times(tmp_path, suffix, plays):
    pixels = [noise(20, 30, 3) // 64 * 64 for _ in TIMES]  # 64 colours, which a palette holds
    options = {'gif': {'loop': plays and plays - 1} if plays != 1 else {}, 'webp': {'loop': plays, 'lossless': True}}
    path = tmp_path / f'a.{suffix}'
    save(path, [Image.fromarray(each) for each in pixels], duration=TIMES, **options.get(suffix, {'loop': plays}))
    assert read_series(path) == Series(((20, 30),) * 4, plays)
    found = list(read_frames(path))
    assert [duration for _, duration in found] == TIMES
    for (photo, _), expected in zip(found, pixels, strict=True):
        assert np.array_equal(photo.color, expected)
        assert (photo.alpha == 255).all()


def test_a_frame_is_what_is_seen(tmp_path):
    """Drawn on those before it, as the file says."""
    full = Image.new('RGBA', (9, 6), 'red')
    dot = Image.new('RGBA', (9, 6))
    dot.putpixel((4, 3), (0, 0, 255, 255))
    path = save(tmp_path / 'a.png', [full, dot], blend=1, duration=[10, 20])
    first, second = (photo.samples for photo, _ in read_frames(path))
    assert (first == (255, 0, 0, 255)).all()
    assert tuple(second[3, 4]) == (0, 0, 255, 255)
    assert tuple(second[0, 0]) == (255, 0, 0, 255)


def test_the_still_of_a_png_file_is_no_frame(tmp_path):
    still, *frames = (Image.fromarray(noise(5, 6, 3)) for _ in range(3))
    still.save(tmp_path / 'a.png', save_all=True, append_images=frames, default_image=True, duration=50)
    assert len(read_series(tmp_path / 'a.png').sizes) == 2
    found = [photo.color for photo, _ in read_frames(tmp_path / 'a.png')]
    assert [np.array_equal(each, frame) for each, frame in zip(found, frames, strict=True)] == [True, True]
    still.save(tmp_path / 'b.png', save_all=True, append_images=frames[:1], default_image=True, duration=50)
    assert read_series(tmp_path / 'b.png') == Series(((5, 6),))  # one frame does not move
    ((photo, _),) = read_frames(tmp_path / 'b.png')
    assert np.array_equal(photo.color, np.asarray(still))


def test_frames_of_16_bits_are_told(tmp_path, messages):
    """Of which Pillow gives 8."""
    frames = [noise(5, 6, 3, dtype=np.uint16) for _ in range(2)]
    (tmp_path / 'a.png').write_bytes(b''.join(encode_apng(((frame, 50) for frame in frames), 2, 0)))
    assert len(read_series(tmp_path / 'a.png').sizes) == 2
    assert messages == [f'{tmp_path}/a.png: its images are read with 8 bits a channel']
    for (photo, _), frame in zip(read_frames(tmp_path / 'a.png'), frames, strict=True):
        assert np.abs(photo.color - frame / 257).max() < 1


def test_many_pages_are_gone_through_once(tmp_path, monkeypatch):
    """Of a file that Pillow does not read; or its time would grow with the square of their number."""
    with tifffile.TiffWriter(tmp_path / 'a.tif') as writer:
        for _ in range(40):
            writer.write(noise(2, 3, dtype=np.uint16), photometric='minisblack')
    opened = []
    monkeypatch.setattr('data.tiff.TiffFile', lambda file: opened.append(file) or tifffile.TiffFile(file))
    assert len(read_series(tmp_path / 'a.tif').sizes) == 40
    assert len(list(read_frames(tmp_path / 'a.tif'))) == 40
    assert len(opened) == 2


def test_pages_of_all_kinds(tmp_path):
    pages = [noise(9, 8, 3), noise(5, 7), noise(6, 6, 3, dtype=np.uint16)]
    with tifffile.TiffWriter(tmp_path / 'a.tif') as writer:
        for page in pages:
            writer.write(page, photometric='rgb' if page.ndim == 3 else 'minisblack')
        writer.write(noise(4, 4, 3), photometric='rgb', subfiletype=1)  # a smaller version of another
    assert read_series(tmp_path / 'a.tif') == Series(((9, 8), (5, 7), (6, 6)))
    found = [(photo.samples.squeeze(), duration) for photo, duration in read_frames(tmp_path / 'a.tif')]
    assert all(np.array_equal(samples, page) for (samples, _), page in zip(found, pages, strict=True))
    assert [duration for _, duration in found] == [0, 0, 0]


@pytest.mark.parametrize('suffix', ['gif', 'jpg', 'png'])
def test_a_single_image(tmp_path, suffix):
    Image.fromarray(noise(5, 6, 3)).save(tmp_path / f'a.{suffix}')
    assert read_series(tmp_path / f'a.{suffix}') == Series(((5, 6),))
    ((photo, _),) = read_frames(tmp_path / f'a.{suffix}')
    with Image.open(tmp_path / f'a.{suffix}') as image:
        assert np.array_equal(photo.color, np.asarray(image.convert('RGB')))


def test_faults_name_the_file(tmp_path):
    with pytest.raises(UserError, match=r'b\.gif does not exist'):
        next(read_frames(tmp_path / 'b.gif'))
    path = save(tmp_path / 'a.gif', [Image.fromarray(noise(40, 40, 3)).quantize(64) for _ in range(3)])
    path.write_bytes(path.read_bytes()[:-1500])
    with pytest.raises(UserError, match=r'a\.gif cannot be read'):
        list(read_frames(path))


def test_an_animation_without_its_end(tmp_path):
    frames = [noise(9, 12, 3) for _ in range(3)]
    content = b''.join(encode_apng(((frame, 50) for frame in frames), 3, 0))
    path = tmp_path / 'a.png'
    path.write_bytes(content[:-12])  # all but IEND
    found = [photo.color for photo, _ in read_frames(path)]
    assert all(np.array_equal(each, frame) for each, frame in zip(found, frames, strict=True))
    path.write_bytes(content[: content.rindex(b'fcTL') - 4])
    shown = read_frames(path)
    next(shown), next(shown)
    with pytest.raises(UserError, match=r'a\.png cannot be read \(the PNG file ends early\)'):
        next(shown)
    path.write_bytes(content[: content.rindex(b'fcTL') - 4] + content[-12:])
    shown = read_frames(path)
    next(shown), next(shown)
    with pytest.raises(UserError, match=r'a\.png cannot be read \(it has fewer than its 3 images\)'):
        next(shown)
    path.write_bytes(content[:-30])  # in the last image
    with pytest.raises(UserError, match=r'a\.png cannot be read'):
        list(read_frames(path))


def test_a_gif_file_that_ends_between_two_images_is_told(tmp_path, messages):
    """Nothing in it says how many there should be."""
    path = save(tmp_path / 'a.gif', [Image.fromarray(noise(9, 12, 3)).quantize(4) for _ in range(3)], duration=50)
    whole = path.read_bytes()
    assert len(read_series(path).sizes) == 3
    assert messages == []
    path.write_bytes(whole[: whole.rindex(b'\x21\xf9')])  # where the graphic control of the last one begins
    assert len(read_series(path).sizes) == 2
    assert messages == [f'{path}: it ends early: images may be missing']


@pytest.mark.parametrize('channels', [1, 2, 3, 4])
def test_an_animation_that_is_written_is_read_by_pillow(tmp_path, channels):
    times = [40, 1000 / 30, 70_000, 0]
    frames = [noise(90, 70, channels).squeeze() for _ in times]
    (tmp_path / 'a.png').write_bytes(b''.join(encode_apng(zip(frames, times, strict=True), 4, 2)))
    with Image.open(tmp_path / 'a.png') as image:
        assert (image.n_frames, image.info['loop']) == (4, 2)
        for number, frame in enumerate(frames):
            image.seek(number)
            image.load()
            assert image.info['duration'] == pytest.approx(times[number])
            assert np.array_equal(np.asarray(image.convert('RGBA' if channels in (2, 4) else 'RGB')), as_rgb(frame))


def as_rgb(samples: np.ndarray) -> np.ndarray:
    if samples.ndim == 2:
        return samples[..., None].repeat(3, 2)
    return samples[..., [0, 0, 0, 1]] if samples.shape[2] == 2 else samples


def test_pages_that_are_written_are_read_by_others(tmp_path):
    pages = [noise(701, 301, 3, dtype=np.uint16), noise(33, 5), noise(9, 9, 4)]
    exif = Image.Exif()
    exif[271] = 'Maker'
    (tmp_path / 'a.tif').write_bytes(b''.join(encode_tiff([(page, None) for page in pages], 3, exif)))
    with tifffile.TiffFile(tmp_path / 'a.tif') as tif:
        assert all(np.array_equal(page.asarray(), each) for page, each in zip(tif.pages, pages, strict=True))
    with Image.open(tmp_path / 'a.tif') as image:
        assert (image.n_frames, image.getexif()[271]) == (3, 'Maker')
        image.seek(2)
        assert np.array_equal(np.asarray(image), pages[2])


def test_grey_frames_of_16_bits(tmp_path):
    """Not white, as which Pillow shows what is above 255."""
    frames = [np.full((6, 5), value, np.uint16) for value in (30_000, 20_000)]
    (tmp_path / 'a.png').write_bytes(b''.join(encode_apng(((frame, 50.0) for frame in frames), 2, 0)))
    found = [photo.color for photo, _ in read_frames(tmp_path / 'a.png')]
    assert [each.max() for each in found] == [each.min() for each in found] == [117, 78]  # 30000 / 257, 20000 / 257


def test_a_grey_of_16_bits_may_stand_for_transparent(tmp_path):
    frames = [np.where(np.eye(6, 5), value, 0).astype(np.uint16) for value in (30_000, 20_000)]
    content = b''.join(encode_apng(((frame, 50.0) for frame in frames), 2, 0))
    place = content.index(b'fcTL') - 4
    chunk = b'tRNS' + bytes(2)
    chunk = struct.pack('>I', 2) + chunk + struct.pack('>I', zlib.crc32(chunk))
    (tmp_path / 'a.png').write_bytes(content[:place] + chunk + content[place:])
    for (photo, _), value in zip(read_frames(tmp_path / 'a.png'), (117, 78), strict=True):
        assert np.array_equal(photo.alpha, 255 * np.eye(6, 5))
        assert (photo.color[np.eye(6, 5) > 0] == value).all()
