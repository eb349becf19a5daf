"""GIF files, read by Pillow."""

import io

import numpy as np
import pytest
from PIL import Image

from data.gif import TRANSPARENT, encode_gif

RNG = np.random.default_rng(0)


def written(numbers: list[np.ndarray], plays: int | None, times: list[int], comment: bytes = b'who') -> bytes:
    """A file of images by the numbers of their colours, each with colours of its own."""
    images = []
    for each in numbers:
        image = Image.fromarray(each).convert('P')
        palette = RNG.integers(1, 256, (256, 3)).astype(np.uint8)
        palette[0] = 0  # black, as nothing is where Pillow compares images
        image.putpalette(palette.tobytes())
        images.append(image)
    return b''.join(encode_gif(zip(images, times, strict=True), plays, comment))


def seen(content: bytes) -> tuple[list[np.ndarray], list[float]]:
    """Its frames, (H, W, 4), and their milliseconds."""
    with Image.open(io.BytesIO(content)) as image:
        frames, times = [], []
        for number in range(image.n_frames):
            image.seek(number)
            frames.append(np.asarray(image.convert('RGBA')))
            times.append(image.info.get('duration', 0))
        return frames, times


def test_what_is_transparent_is_so_in_each_image():
    """Where all is, and beside black as well, also along the edges; an image may be the one before it again."""
    images = [np.zeros((20, 24), np.uint8) for _ in range(5)]
    images[0][5:15, 5:15] = 7
    images[1][:] = TRANSPARENT
    images[2][:, 3:] = TRANSPARENT
    images[3][2:-2, 2:-2] = TRANSPARENT
    images[4][:] = images[3]
    content = written(images, 0, [40, 50, 60, 70, 80])
    frames, times = seen(content)
    assert times == [40, 50, 60, 70, 80]
    for frame, image in zip(frames, images, strict=True):
        assert np.array_equal(frame[..., 3] == 0, image == TRANSPARENT)
        assert (frame[image == 0] == (0, 0, 0, 255)).all()
    assert content.count(b'GIF89a') == 1


@pytest.mark.parametrize(('plays', 'said'), [(0, 0), (1, None), (4, 3), (2**20, 2**16 - 1)])
def test_how_often_it_is_shown_and_what_is_said(plays, said):
    comment = bytes(range(1, 256)) * 3
    content = written([np.full((3, 5), i, np.uint8) for i in range(2)], plays, [10, 20], comment)
    with Image.open(io.BytesIO(content)) as image:
        assert image.info.get('loop') == said
        assert image.info['comment'] == comment
        assert image.size == (5, 3)


def test_a_single_image():
    numbers = RNG.integers(0, 255, (30, 40)).astype(np.uint8)
    content = written([numbers], None, [0])
    with Image.open(io.BytesIO(content)) as image:
        assert image.n_frames == 1 and not image.has_transparency_data
        palette = np.reshape(image.getpalette(), (256, 3))
        assert np.array_equal(np.asarray(image.convert('RGB')), palette[numbers])
    numbers[3, 4] = TRANSPARENT
    (frame,), _ = seen(written([numbers], None, [0]))
    assert np.array_equal(frame[..., 3] == 0, numbers == TRANSPARENT)
