import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageCms
from PIL.ExifTags import IFD, Base
from PIL.IptcImagePlugin import getiptcinfo
from PIL.PngImagePlugin import PngInfo

from data.frames import Series, read_frames, read_series
from data.image import eight_bits, read_photo
from error import UserError
from photo.metadata import Metadata, is_lossy, made_by, read_metadata
from photo.writing import Colours, Format, Piece, check_size, over, photoshop_segment, write_result

RNG = np.random.default_rng(0)
ICC = ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes()
XMP = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6" exif:PixelXDimension="5" '
    b'xmp:Rating="4">'
    b'<exif:PixelYDimension>9</exif:PixelYDimension><xmp:Thumbnails><rdf:Alt>AAAA</rdf:Alt></xmp:Thumbnails>'
    b'</rdf:Description></x:xmpmeta>'
)
TIME = '2020:01:02 03:04:05'


def photograph(path: Path) -> Path:
    """5x9 pixels that are to be turned, with all kinds of metadata, and a thumbnail in its EXIF data."""
    exif = Image.Exif()
    exif[Base.Orientation], exif[Base.Make], exif[Base.DateTime] = 6, 'Maker', TIME
    exif[Base.ImageWidth] = 9
    exif.get_ifd(IFD.Exif).update({Base.DateTimeOriginal: TIME, Base.ExifImageWidth: 9, Base.MakerNote: b'secret' * 9})
    exif.get_ifd(IFD.GPSInfo).update({1: 'N', 2: (1.0, 2.0, 3.5)})
    data = exif.tobytes()[6:]
    end = struct.unpack('>I', data[4:8])[0]
    end += 2 + 12 * struct.unpack('>H', data[end : end + 2])[0]  # where the offset of the thumbnail's directory stands
    thumbnail = struct.pack('>HHHIHHI', 1, Base.Compression, 3, 1, 6, 0, 0) + b'THUMBNAIL'
    data = data[:end] + struct.pack('>I', len(data)) + data[end + 4 :] + thumbnail
    pixels = Image.fromarray(RNG.integers(0, 256, (5, 9, 3)).astype(np.uint8))
    text = PngInfo()
    text.add_itxt('XML:com.adobe.xmp', XMP.decode())
    pixels.save(path, exif=b'Exif\0\0' + data, xmp=XMP, pnginfo=text, icc_profile=ICC)
    return path


def write(path: Path, samples: np.ndarray, source: Path, **options: object) -> None:
    metadata = read_metadata(source).adapted(*samples.shape[:2], 'FrugalSR test')
    name = path.suffix[1:]
    pieces = [Piece(samples, Colours(ICC, {}))]
    write_result(pieces, path, name, [len(samples)], None, metadata, Format(name, **options))


@pytest.mark.parametrize('suffix', ['png', 'jpg', 'webp', 'tif'])
@pytest.mark.parametrize('origin', ['jpg', 'png', 'webp'])
def test_metadata_is_kept_and_fits_the_result(tmp_path, origin, suffix):
    source, path = photograph(tmp_path / f'a.{origin}'), tmp_path / f'b.{suffix}'
    samples = np.full((18, 10, 3), 100, np.uint8)
    write(path, samples, source)
    assert np.abs(read_photo(path).color.astype(int) - samples).max() <= 2  # and is not turned once more
    with Image.open(path) as image:
        exif, xmp = image.getexif(), image.tag_v2[Base.XMLPacket] if suffix == 'tif' else image.info['xmp']
        image.load()
        assert image.info['icc_profile'] == ICC
        assert (exif[Base.Orientation], exif[Base.Make], exif[Base.DateTime]) == (1, 'Maker', TIME)
        own = exif.get_ifd(IFD.Exif)
        assert (own[Base.ExifImageWidth], own[Base.ExifImageHeight]) == (10, 18)
        assert (own[Base.DateTimeOriginal], own[Base.MakerNote]) == (TIME, b'secret' * 9)
        assert exif.get_ifd(IFD.GPSInfo)[2] == (1.0, 2.0, 3.5)
        assert not exif.get_ifd(IFD.IFD1)
        assert exif.get(Base.ImageWidth, 10) == 10
    for part in (b'tiff:Orientation="1"', b'PixelXDimension="10"', b'PixelYDimension>18<', b'xmp:Rating="4"'):
        assert part in xmp
    assert b'AAAA' not in xmp
    assert b'THUMBNAIL' in source.read_bytes()
    assert b'THUMBNAIL' not in path.read_bytes()
    assert made_by(path) == 'FrugalSR test'
    assert made_by(source) == ''


@pytest.mark.parametrize('suffix', ['png', 'tif'])
@pytest.mark.parametrize('channels', [1, 2, 3, 4])
@pytest.mark.parametrize('dtype', [np.uint8, np.uint16])
def test_png_and_tiff_keep_every_bit(tmp_path, messages, suffix, channels, dtype):
    """As other programs read them, and say nothing of losses."""
    samples = RNG.integers(0, np.iinfo(dtype).max, (700, 300, channels), endpoint=True).astype(dtype)
    samples = samples[..., 0] if channels == 1 else samples
    path = tmp_path / f'b.{suffix}'
    write(path, samples, photograph(tmp_path / 'a.jpg'))
    assert not [line for line in messages if 'has 8 bits' in line]
    read = read_photo(path).samples
    assert read.dtype == dtype
    assert np.array_equal(read.squeeze(), samples)
    if suffix == 'tif':
        assert np.array_equal(tifffile.imread(path), samples)
        if dtype == np.uint8:
            with Image.open(path) as image:
                assert np.array_equal(np.asarray(image), samples)


@pytest.mark.parametrize(('suffix', 'mode'), [('jpg', 'RGB'), ('webp', 'RGBA')])
def test_what_a_format_does_not_have(tmp_path, messages, suffix, mode):
    """16 bits are rounded, not cut; alpha lies on the background where there is none."""
    samples = np.zeros((16, 16, 4), np.uint16)
    samples[:, :] = (200 * 257 + 129, 100 * 257, 50 * 257 - 129, 65535)  # rounded to 201, 100, 49
    samples[:, 8:, 3] = 0
    path = tmp_path / f'b.{suffix}'
    write(path, samples, photograph(tmp_path / 'a.jpg'), quality=100, background=(10, 20, 30))
    with Image.open(path) as image:
        assert image.mode == mode
        pixels = np.asarray(image).astype(int)
    assert np.abs(pixels[8, 2, :3] - (201, 100, 49)).max() <= 2
    if suffix == 'jpg':
        assert np.abs(pixels[8, 14] - (10, 20, 30)).max() <= 2
    else:
        assert pixels[8, 14, 3] == 0
    assert any('has 8 bits a channel' in line for line in messages)


def test_over_by_hand():
    pixels = np.array([[[100, 255], [100, 0], [100, 51]]], np.uint8)
    assert over(pixels, (200, 200, 200)).tolist() == [[100, 200, 180]]
    assert over(pixels, (200, 0, 50)).tolist() == [[[100] * 3, [200, 0, 50], [180, 20, 60]]]


@pytest.mark.serial
@pytest.mark.parametrize('change', [lambda deep: over(deep.astype(np.uint8), (9, 8, 7)), eight_bits])
def test_a_large_image_takes_little_memory_between(change):
    deep = RNG.integers(0, 256, (2000, 1000, 4)).astype(np.uint16)
    tracemalloc.start()
    found = change(deep)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * found.nbytes


def test_quality_is_that_of_the_file(tmp_path):
    source, samples = photograph(tmp_path / 'a.jpg'), RNG.integers(0, 256, (64, 64, 3)).astype(np.uint8)
    sizes = []
    for quality in (50, 95):
        write(tmp_path / f'{quality}.jpg', samples, source, quality=quality)
        sizes.append((tmp_path / f'{quality}.jpg').stat().st_size)
    assert sizes[0] < sizes[1] / 2


@pytest.mark.parametrize(
    ('name', 'size', 'able'), [('jpg', (65_501, 9), 'png, tif, gif'), ('webp', (9, 16_384), 'png, tif, jpg, gif')]
)
def test_a_size_that_a_format_has_no_room_for(name, size, able):
    check_size(name, [(9, 9), (min(size[0], 16_383), 9)])
    with pytest.raises(UserError, match=f'do not fit into {name}, .* of {able}'):
        check_size(name, [(9, 9), size])


def test_metadata_too_large_for_jpeg_is_told(tmp_path, messages):
    source = tmp_path / 'a.webp'
    exif = Image.Exif()
    exif.get_ifd(IFD.Exif)[Base.MakerNote] = bytes(70_000)
    Image.new('RGB', (5, 5)).save(source, exif=exif)
    write(tmp_path / 'b.jpg', np.zeros((9, 9, 3), np.uint8), source)
    assert made_by(tmp_path / 'b.jpg') == 'FrugalSR test'
    assert any('no room for' in line and 'EXIF' in line for line in messages)


def test_damaged_metadata_costs_no_photograph(tmp_path, messages):
    source = tmp_path / 'a.jpg'
    Image.new('RGB', (5, 5)).save(source, exif=b'Exif\0\0II*\0\x08\0\0\0\xff\xff' + bytes(range(256)))
    write(tmp_path / 'b.png', np.zeros((9, 9, 3), np.uint8), source)
    assert made_by(tmp_path / 'b.png') == 'FrugalSR test'


def raw_exif(*entries: tuple[int, int, int, bytes]) -> bytes:
    """EXIF data of tags, each with type, count and value; of any types, which Pillow would not write."""
    place, directory, values = 8 + 2 + 12 * len(entries) + 4, b'', b''
    for tag, kind, count, value in sorted(entries):
        there = value.ljust(4, b'\0') if len(value) <= 4 else struct.pack('<I', place + len(values))
        directory += struct.pack('<HHI', tag, kind, count) + there
        values += value if len(value) > 4 else b''
    return b'Exif\0\0II*\0' + struct.pack('<IH', 8, len(entries)) + directory + bytes(4) + values


ASCII, SHORT, RATIONAL, SIGNED_RATIONAL = 2, 3, 5, 10


@pytest.mark.parametrize('suffix', ['png', 'jpg', 'webp', 'tif'])
def test_text_keeps_its_bytes(tmp_path, suffix):
    """Of whatever letters they are; EXIF itself knows those of ASCII alone."""
    source, path = tmp_path / 'a.jpg', tmp_path / f'b.{suffix}'
    said = '\xa9 2024 J\xf6rg M\xfcller'.encode(), 'J\xf6rg'.encode('latin-1')
    entries = [(tag, ASCII, len(text) + 1, text + b'\0') for tag, text in zip((33432, 315), said, strict=True)]
    Image.new('RGB', (5, 5)).save(source, exif=raw_exif(*entries))
    write(path, np.zeros((9, 9, 3), np.uint8), source)
    for text in said:
        assert text + b'\0' in path.read_bytes()


@pytest.mark.parametrize('suffix', ['png', 'jpg', 'webp', 'tif'])
@pytest.mark.parametrize(
    'entry',
    [(282, ASCII, 3, b'72\0'), (296, ASCII, 2, b'2\0'), (296, RATIONAL, 1, struct.pack('<II', 2, 1))],
    ids=['text for a resolution', 'text for its unit', 'fraction for its unit'],
)
def test_a_tag_of_a_wrong_kind_is_told_and_costs_no_other(tmp_path, messages, entry, suffix):
    source, path = tmp_path / 'a.jpg', tmp_path / f'b.{suffix}'
    Image.new('RGB', (5, 5)).save(source, exif=raw_exif((271, ASCII, 6, b'Maker\0'), entry))
    write(path, np.zeros((9, 9, 3), np.uint8), source)
    assert read_metadata(path).exif[Base.Make] == 'Maker'
    assert made_by(path) == 'FrugalSR test'
    assert any(f'tags {entry[0]} have values of a wrong kind' in line for line in messages)


def test_a_place_of_a_wrong_kind_costs_no_other_tag(tmp_path, messages):
    source = tmp_path / 'a.jpg'
    gps = (2, SIGNED_RATIONAL, 3, struct.pack('<iiiiii', -1, 1, 2, 1, 3, 1)), (1, ASCII, 2, b'N\0')
    inner = raw_exif(*gps)[6 + 8 :]  # whose offsets hold in a file of its own
    place = 8 + 2 + 2 * 12 + 4
    entries = struct.pack('<HHII', 271, ASCII, 4, int.from_bytes(b'abc\0', 'little'))
    entries += struct.pack('<HHII', 34853, 4, 1, place)
    moved = bytearray(inner)
    moved[2 + 12 + 8 : 2 + 12 + 12] = struct.pack('<I', place + len(inner) - 24)  # where its three numbers stand
    Image.new('RGB', (5, 5)).save(
        source, exif=b'Exif\0\0II*\0' + struct.pack('<IH', 8, 2) + entries + bytes(4) + bytes(moved)
    )
    write(tmp_path / 'c.png', np.zeros((9, 9, 3), np.uint8), source)
    found = read_metadata(tmp_path / 'c.png').exif
    assert (found[Base.Make], found.get_ifd(IFD.GPSInfo)) == ('abc', {1: 'N'})
    assert any('tags 2 have values of a wrong kind' in line for line in messages)


def test_layers_and_places_of_pixels_stay_behind(tmp_path):
    """They are of the smaller image."""
    source, tags = tmp_path / 'a.tif', [(37724, 7, 9, bytes(9), True), (33550, 12, 3, (1.0, 1.0, 0.0), True)]
    tifffile.imwrite(source, np.zeros((5, 6, 3), np.uint8), photometric='rgb', extratags=tags)
    assert {37724, 33550} <= {*read_tags(source)}
    write(tmp_path / 'b.tif', np.zeros((10, 12, 3), np.uint8), source)
    assert not {37724, 33550} & {*read_tags(tmp_path / 'b.tif')}


def read_tags(path: Path) -> list[int]:
    with tifffile.TiffFile(path) as tif:
        return [tag.code for tag in tif.pages.first.tags]


def test_a_result_of_any_size_is_known(tmp_path):
    """Also one of more pixels than are read."""
    path = tmp_path / 'a.png'
    write(path, np.zeros((9, 9, 3), np.uint8), photograph(tmp_path / 'a.jpg'))
    content = path.read_bytes()
    begin = content.index(b'IHDR')
    head = b'IHDR' + struct.pack('>II', 60_000, 40_000) + content[begin + 12 : begin + 17]
    path.write_bytes(content[:begin] + head + struct.pack('>I', zlib.crc32(head)) + content[begin + 21 :])
    assert made_by(path) == 'FrugalSR test'


def test_the_shape_that_tifffile_notes_is_not_taken_along(tmp_path):
    source = tmp_path / 'a.tif'
    tifffile.imwrite(source, np.zeros((5, 6, 3), np.uint16), photometric='rgb')
    write(tmp_path / 'b.tif', np.zeros((10, 12, 3), np.uint16), source)
    with tifffile.TiffFile(tmp_path / 'b.tif') as tif:
        assert tif.pages.first.description == ''
        assert tif.series[0].shape == (10, 12, 3)


def test_which_files_are_lossy(tmp_path):
    image = Image.fromarray(RNG.integers(0, 256, (20, 20, 3)).astype(np.uint8))
    frames = {'save_all': True, 'append_images': [image.rotate(90)]}
    files = {'a.jpg': {}, 'b.webp': {'exif': Image.Exif()}, 'c.webp': frames, 'd.webp': {'lossless': True}, 'e.png': {}}
    for name, options in files.items():
        image.save(tmp_path / name, **options)
    assert [name for name in files if is_lossy(tmp_path / name)] == ['a.jpg', 'b.webp', 'c.webp']


def moving(path: Path, frames: list[np.ndarray], plays: int, times: list[float]) -> None:
    exif = Image.Exif()
    metadata = Metadata(exif).adapted(*frames[0].shape[:2], 'FrugalSR test')
    name = path.suffix[1:]
    shown = [(rows, time) for frame, time in zip(frames, times, strict=True) for rows in (frame[:7], frame[7:])]
    pieces = [Piece(rows, Colours(None, {}), time) for rows, time in shown]
    write_result(pieces, path, name, [len(frame) for frame in frames], plays, metadata, Format(name, quality=100))


@pytest.mark.parametrize(('suffix', 'most'), [('png', 70_000), ('webp', 65_535), ('gif', 65_536)])
def test_what_is_shown_more_often_than_a_format_can_say(tmp_path, suffix, most):
    path, frames = tmp_path / f'a.{suffix}', [np.full((12, 10, 3), grey, np.uint8) for grey in (0, 255)]
    moving(path, frames, 70_000, [40.0, 40.0])
    assert read_series(path).plays == most


@pytest.mark.parametrize('suffix', ['png', 'webp', 'gif'])
@pytest.mark.parametrize('plays', [0, 1, 4])
def test_animations_keep_times_and_repetition(tmp_path, suffix, plays):
    """What is transparent shows nothing of the frame before."""
    blocks = np.kron(RNG.integers(0, 4, (4, 3, 3)), np.ones((10, 10, 1), int)) * 80
    frames = [np.dstack((blocks, np.full((40, 30), 255))).astype(np.uint8)]
    frames += [np.roll(frames[0], 11, 0), frames[0][::-1].copy()]
    frames[1][10:20, 5:9, 3] = 0
    path, times = tmp_path / f'a.{suffix}', [40.0, 100.0, 250.0]
    moving(path, frames, plays, times)
    assert made_by(path) == 'FrugalSR test'
    assert read_series(path) == Series(((40, 30),) * 3, plays)
    read = list(read_frames(path))
    assert [time for _, time in read] == times
    for (photo, _), frame in zip(read, frames, strict=True):
        assert np.array_equal(photo.alpha, frame[..., 3])
        seen = frame[..., 3] == 255
        error = np.abs(photo.color[seen].astype(int) - frame[..., :3][seen])
        assert error.mean() <= (20 if suffix == 'webp' else 0)  # compressed with loss


@pytest.mark.parametrize(
    ('duration', 'shown'), [(1000 / 30, 1000), (1000 / 24, 1250), (67, 2010), (10, 300), (1000 / 60, 600)]
)
def test_times_that_gif_cannot_say(tmp_path, messages, duration, shown):
    """They add up to what they should, but where an image would be shown for 0.01 s, which browsers take for 0.1 s."""
    path = tmp_path / 'a.gif'
    moving(path, [np.full((12, 10, 3), 8 * i, np.uint8) for i in range(30)], 0, [duration] * 30)
    times = [time for _, time in read_frames(path)]
    assert sum(times) == shown
    assert max(times) - min(times) <= 10
    slow = f'{path}: gif shows an image for 0.01 s, or 0.02 to 655 s: its images take 0.60 s, not 0.50.'
    assert (slow in messages) == (shown == 600)


@pytest.mark.parametrize(('suffix', 'exact'), [('webp', 1), ('png', 0.1)])
def test_times_of_parts_of_milliseconds(tmp_path, suffix, exact):
    path = tmp_path / f'a.{suffix}'
    moving(path, [np.full((12, 10, 3), 8 * i, np.uint8) for i in range(30)], 0, [1000 / 60] * 30)
    assert sum(time for _, time in read_frames(path)) == pytest.approx(500, abs=exact)


def test_pages_keep_their_own_profiles(tmp_path):
    other = bytes(16) + b'RGB ' + bytes(108)
    metadata = Metadata(Image.Exif()).adapted(9, 8, 'FrugalSR test')
    pages = [Piece(np.full((9, 8, 3), 50, np.uint8), Colours(icc, {})) for icc in (ICC, other, None)]
    write_result(pages, tmp_path / 'a.tif', 'tif', [9] * 3, None, metadata, Format('tif'))
    with tifffile.TiffFile(tmp_path / 'a.tif') as tif:
        tags = (page.tags.get('InterColorProfile') for page in tif.pages)
        assert [tag and bytes(tag.value) for tag in tags] == [ICC, other, None]
    assert [photo.icc for photo, _ in read_frames(tmp_path / 'a.tif')] == [ICC, other, None]


def test_gif_has_few_colours(tmp_path, messages):
    """A gradient of 1,600 colours: dithered, so that on average they are right."""
    ramp = np.add.outer(np.arange(40) * 3, np.arange(40) * 2)
    samples = np.dstack((ramp, ramp[::-1], np.full((40, 40), 90))).astype(np.uint8)
    write(tmp_path / 'a.gif', samples, photograph(tmp_path / 'a.jpg'))
    with Image.open(tmp_path / 'a.gif') as image:
        assert len(image.getcolors()) <= 256
        found = np.asarray(image.convert('RGB')).astype(int)
    assert np.abs(found - samples).mean() < 6
    assert np.abs((found - samples).mean((0, 1))).max() < 2
    assert any('gif has 256 colours' in line for line in messages)
    assert made_by(tmp_path / 'a.gif') == 'FrugalSR test'


IPTC = b'\x1c\x02\x78\x00\x05Titel'  # IIM 4.2, dataset 2:120, a caption


@pytest.mark.parametrize('origin', ['jpg', 'tif'])
@pytest.mark.parametrize('suffix', ['jpg', 'tif'])
def test_iptc_data_is_kept(tmp_path, origin, suffix):
    source, samples = tmp_path / f'a.{origin}', np.zeros((9, 9, 3), np.uint8)
    if origin == 'jpg':
        Image.fromarray(samples).save(source, extra=photoshop_segment(IPTC))
    else:
        tifffile.imwrite(source, samples, photometric='rgb', extratags=[(33723, 7, len(IPTC), IPTC, True)])
    with Image.open(source) as image:
        assert getiptcinfo(image) == {(2, 120): b'Titel'}
    write(tmp_path / f'b.{suffix}', samples, source)
    with Image.open(tmp_path / f'b.{suffix}') as image:
        assert getiptcinfo(image) == {(2, 120): b'Titel'}


@pytest.mark.parametrize(
    ('name', 'grey', 'icc', 'chunks', 'lost'),
    [
        ('jpg', False, ICC, {}, False),
        ('gif', False, ICC, {}, True),
        ('webp', False, ICC, {}, False),
        ('webp', True, bytes(16) + b'GRAY', {}, True),
        ('jpg', False, None, {b'gAMA': b''}, True),
        ('jpg', False, None, {b'gAMA': b'', b'sRGB': b''}, False),
        ('jpg', False, ICC, {b'gAMA': b''}, False),
        ('tif', False, ICC, {b'cICP': b''}, True),
        ('png', False, None, {b'cICP': b''}, False),
    ],
)
def test_what_a_format_cannot_say_of_colours(name, grey, icc, chunks, lost):
    assert Colours(icc, chunks).lost_in(name, grey) == lost
