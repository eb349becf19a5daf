"""What the page shows of images and of the work, as HTML."""

import base64
from collections.abc import Iterable, Sequence
from html import escape
from io import BytesIO
from pathlib import Path
from urllib.parse import quote

from PIL import Image

from data.frames import read_frames
from data.image import eight_bits, read_size
from error import UserError
from report import pair
from web.comparing import Pair
from web.enlarging import Result
from web.work import State, sentence

SIDE = 160  # of a preview, pixels


def previews(images: Sequence[Path], most: int) -> str:
    """Images as they were dropped, small, with name and size; a sentence for one that cannot be used.

    Args:
        images: the files.
        most: pixels of an image that is opened for this, millions.
    """
    return f'<ul class="previews">{"".join(f"<li>{preview(image, most)}</li>" for image in images)}</ul>'


def preview(image: Path, most: int) -> str:
    """One of them; in the page itself, so that there is no file to keep from others."""
    name = escape(image.name)
    try:
        height, width = read_size(image)
        if height * width > most * 1e6:
            return f'<b>{name}</b>, {width}x{height} pixels'
        photo, _ = next(read_frames(image))
        small = Image.fromarray(eight_bits(photo.color))
    except UserError as error:
        return f'<span class="failure">{escape(sentence(error, image))}</span>'
    small.thumbnail((SIDE, SIDE))
    content = BytesIO()
    small.save(content, 'JPEG', quality=85)
    source = f'data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}'
    size = f'{width}x{height} pixels'
    return f'<img src="{source}" alt="Preview of {name}"><b>{name}</b>{size}'


def status(state: State) -> str:
    """What is read aloud as it changes: which image, in quarters of the work, and how it ended."""
    if state.ended:
        return summary(state)
    name = escape(state.names[state.number])
    which = f'{name} ({state.number + 1} of {len(state.names)})' if len(state.names) > 1 else name
    if state.ahead:
        others = '1 image of others goes' if state.ahead == 1 else f'{state.ahead} images of others go'
        return f'<p>{which} waits: {others} first.</p>'
    return f'<p>{which}: {int(4 * state.share) * 25} percent.</p>'


def summary(state: State) -> str:
    """How the work ended."""
    done, wanted = len(state.results), len(state.names)
    said = ['Stopped.'] if state.stopped else []
    if wanted > 1:
        said.append(f'{done} of {wanted} images {"is" if done == 1 else "are"} done.')
    elif done:
        said.append('Done.')
    failures = ''.join(refusal(failure) for failure in state.failures)
    return f'<p>{" ".join(said)}</p>{failures}' if said else failures


def refusal(sentence: str) -> str:
    """What is told instead of working."""
    return f'<p class="failure">{escape(sentence)}</p>'


def bar(state: State) -> str:
    """How far it is, for the eye: the bar, tiles, time left; nothing after the end."""
    if state.ended:
        return ''
    done, total = state.tiles
    parts = [f'{done} of {total} {"tile" if total == 1 else "tiles"}'] if total else ['starting']
    if (left := state.left) is not None:
        parts.append(f'about {duration(left)} left')
    meter = f'<progress max="1" value="{state.share:.3f}" aria-label="Progress"></progress>'
    return f'<div>{meter}{", ".join(parts)}</div>'


def duration(seconds: float) -> str:
    """A time as one says it."""
    if seconds < 60:
        return f'{max(1, round(seconds))} s'
    return f'{round(seconds / 60)} min' if seconds < 5400 else f'{seconds / 3600:.1f} h'


def comparisons(results: Iterable[tuple[str, Result]]) -> str:
    """Every result beside its original."""
    said = '<p>Left of the line: bicubic interpolation. Right of it: the result.</p>'
    return said + ''.join(comparison(escape(name), result) for name, result in results)


def comparison(name: str, result: Result) -> str:
    """A result beside its original: the part with most detail, and the whole image where that is more."""
    shown = result.shown
    caption = f'<figcaption><b>{name}</b>: {escape(result.about)}'
    if shown.detail is None:
        return f'<figure>{figure(name, shown.whole, "whole")}{caption}</figcaption></figure>'
    choice = '<label><input type="checkbox"> Whole image</label>'
    both = figure(f'{name}, detail', shown.detail, 'detail') + figure(name, shown.whole, 'whole')
    return f'<figure class="two">{both}{caption}{choice}</figcaption></figure>'


def figure(name: str, shown: Pair, kind: str) -> str:
    """Two images that lie on each other, with the slider between them."""
    width, height = shown.size
    at = 100 * shown.at
    before, after = (f'gradio_api/file={quote(str(file))}' for file in (shown.before, shown.after))
    return (
        f'<div class="pair {kind}" style="--at:{at:.1f}%">'
        f'<img src="{after}" alt="{name}, after" width="{width}" height="{height}">'
        f'<img class="left" src="{before}" alt="{name}, before: bicubic">'
        f'{pair.slider(f"{name}: before on the left, after on the right", round(at, 1))}</div>'
    )
