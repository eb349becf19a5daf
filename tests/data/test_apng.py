"""Animated PNG files made chunk by chunk, against frames drawn one over the other pixel by pixel in floats."""

import io
import struct
import zlib
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from data.apng import read_apng

RNG = np.random.default_rng(0)
HEIGHT, WIDTH = 7, 9
KEPT, CLEARED, RESTORED = range(3)
REPLACING, OVER = range(2)


class Drawn(NamedTuple):
    """A frame: its pixels (H, W, 4), its place, what becomes of it and how it is drawn."""

    pixels: np.ndarray
    top: int = 0
    left: int = 0
    after: int = KEPT
    how: int = OVER


def soft(height: int, width: int) -> np.ndarray:
    """Random colours, of all degrees of transparency."""
    return RNG.integers(0, 256, (height, width, 4)).astype(np.uint8)


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack('>I', len(body)) + name + body + struct.pack('>I', zlib.crc32(name + body))


def parts_of(image: Image.Image) -> dict[bytes, bytes]:
    """Bodies of the chunks of an image that Pillow wrote as PNG, those of one name joined."""
    stream = io.BytesIO()
    image.save(stream, 'PNG')
    data, found, place = stream.getvalue(), {}, 8
    while place < len(data):
        length, name = struct.unpack_from('>I4s', data, place)
        found[name] = found.get(name, b'') + data[place + 8 : place + 8 + length]
        place += 12 + length
    return found


def animated(images: list[Image.Image], frames: list[Drawn], still: bool = False) -> bytes:
    """A file of images at the places of frames, after a still image if it has one that is no frame."""
    first = parts_of(images[0])
    found = [b'\x89PNG\r\n\x1a\n', chunk(b'IHDR', struct.pack('>II', WIDTH, HEIGHT) + first[b'IHDR'][8:])]
    found += [chunk(b'acTL', struct.pack('>II', len(frames), 0))]
    found += [chunk(name, first[name]) for name in (b'PLTE', b'tRNS') if name in first]
    if still:
        found.append(chunk(b'IDAT', parts_of(Image.new(images[0].mode, (WIDTH, HEIGHT)))[b'IDAT']))
    for number, (image, frame) in enumerate(zip(images, frames, strict=True)):
        place = number, image.width, image.height, frame.left, frame.top, 1, 30, frame.after, frame.how
        found.append(chunk(b'fcTL', struct.pack('>IIIIIHHBB', *place)))
        pixels = parts_of(image)[b'IDAT']
        found.append(chunk(b'fdAT', bytes(4) + pixels) if number or still else chunk(b'IDAT', pixels))
    return b''.join([*found, chunk(b'IEND', b'')])


def plainly(frames: list[Drawn]) -> list[np.ndarray]:
    """What is seen, (H, W, 4) in [0, 1]: the formula of alpha compositing (PNG, section 13.16), pixel by pixel."""
    canvas, seen = np.zeros((HEIGHT, WIDTH, 4)), []
    for frame in frames:
        before = canvas.copy()
        for i, j in np.ndindex(frame.pixels.shape[:2]):
            own, behind = frame.pixels[i, j] / 255, canvas[frame.top + i, frame.left + j]
            alpha = own[3] + behind[3] * (1 - own[3])
            colour = own[:3] * own[3] + behind[:3] * behind[3] * (1 - own[3])
            over = np.array([*(colour / alpha if alpha else [0, 0, 0]), alpha])
            canvas[frame.top + i, frame.left + j] = own if frame.how == REPLACING else over
        seen.append(canvas.copy())
        if frame.after == RESTORED:
            canvas = before
        elif frame.after == CLEARED:
            height, width = frame.pixels.shape[:2]
            canvas[frame.top : frame.top + height, frame.left : frame.left + width] = 0
    return seen


def check(found: list[np.ndarray], expected: list[np.ndarray]) -> None:
    assert len(found) == len(expected)
    for frame, truth in zip(found, expected, strict=True):
        assert np.abs(frame[..., 3] / 255 - truth[..., 3]).max() < 1.01 / 255
        visible = frame[..., :3] / 255 * frame[..., 3:] / 255
        assert np.abs(visible - truth[..., :3] * truth[..., 3:]).max() < 2 / 255


@pytest.mark.parametrize('still', [False, True])
@pytest.mark.parametrize('how', [REPLACING, OVER])
@pytest.mark.parametrize('after', [KEPT, CLEARED, RESTORED])
def test_frames_are_drawn_over_others(after, how, still):
    frames = [
        Drawn(soft(HEIGHT, WIDTH), after=after, how=how),
        Drawn(soft(3, 4), 2, 5, after, how),
        Drawn(soft(6, 2), 1, 0, after, 1 - how),
        Drawn(soft(1, 9), 6, 0, KEPT, how),
    ]
    data = animated([Image.fromarray(frame.pixels) for frame in frames], frames, still)
    found = list(read_apng(io.BytesIO(data)))
    check([frame for frame, _ in found], plainly(frames))
    assert [duration for _, duration in found] == [pytest.approx(1000 / 30)] * 4


def test_palettes_are_looked_up_before_frames_are_drawn():
    """Of colours that are partly transparent."""
    palette = RNG.integers(0, 256, (256, 4)).astype(np.uint8)
    images, frames = [], []
    for size in ((HEIGHT, WIDTH), (4, 5)):
        image = Image.fromarray(RNG.integers(0, 256, size).astype(np.uint8)).convert('P')
        numbers = np.asarray(image)
        image.putpalette(palette[:, :3].tobytes())
        image.info['transparency'] = palette[:, 3].tobytes()
        images.append(image)
        frames.append(Drawn(palette[numbers], 1 if len(frames) else 0, 2 if len(frames) else 0))
    check([frame for frame, _ in read_apng(io.BytesIO(animated(images, frames)))], plainly(frames))


def test_a_delay_out_of_nothing_is_out_of_a_hundred():
    """As section 11.3.6.2 says of a denominator of 0."""
    frames = [Drawn(soft(HEIGHT, WIDTH))]
    data = animated([Image.fromarray(frames[0].pixels)], frames)
    place = data.index(b'fcTL')
    body = data[place + 4 : place + 24] + struct.pack('>HH', 7, 0) + data[place + 28 : place + 30]
    data = data[: place - 4] + chunk(b'fcTL', body) + data[place + 34 :]
    assert [duration for _, duration in read_apng(io.BytesIO(data))] == [70]


@pytest.mark.parametrize('frame', [Drawn(soft(3, 4), 5, 0), Drawn(soft(3, 4), 0, 6), Drawn(soft(3, 4), after=3)])
def test_a_frame_that_cannot_be_drawn(frame):
    frames = [Drawn(soft(HEIGHT, WIDTH)), frame]
    shown = read_apng(io.BytesIO(animated([Image.fromarray(each.pixels) for each in frames], frames)))
    next(shown)
    with pytest.raises(ValueError, match='outside its image, or in no way that there is'):
        next(shown)
