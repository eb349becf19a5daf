"""The page of app.py, made with Gradio: what a visitor sees, and what happens on a click."""

import secrets
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import gradio as gr
from fastapi import FastAPI

from data.image import SUFFIXES
from data.outputs import output_names
from error import UserError, WriteError
from model.tiles.tiling import Report
from photo.choice import Weights, at_scale, best
from photo.metadata import is_lossy
from report import pair
from web import markup
from web.enlarging import FORMATS, Result
from web.keeping import keep, sweeping
from web.visitors import COOKIE, Visitors
from web.work import Line, State, work

TITLE = 'FrugalSR'
ABOUT = (
    'Drop images, choose a network, and have them enlarged. They stay on the machine that runs this page, no other '
    'visitor is given them, and they are deleted after an hour.'
)
KINDS = (
    'Photo, ticked: from a camera or the web, with noise, blur or traces of JPEG, which are taken away. Clean, not '
    'ticked: a sharp original without flaws, whose every detail is kept. JPEG and lossy WebP are ticked automatically.'
)
ORDER = 'By PSNR on the benchmark Set5, the best first.'
BEST = ''  # in place of the name of weights
KEPT = 3600  # seconds
WAITING = 20  # visitors in line, at most
MOST = 20  # images at once
PREVIEWED = 50  # million pixels of an image that a preview is made of, at most
MB = 2**20

Enlarge = Callable[[Path, Weights, int, Path, str, Report, Callable[[], bool]], Result]


@dataclass
class Visit:
    """A page that is open.

    Attributes:
        stop: ends its work.
        asked: the images of which the visitor was asked whether they are photographs.
    """

    stop: Event | None = None
    asked: tuple[str, ...] = ()

    def photos(self, images: Sequence[str], ticked: Sequence[str]) -> list[str]:
        """Those images that are enlarged as photographs: as the visitor says; if nobody asked yet, by their files."""
        return [image for image in images if (image in ticked if image in self.asked else seems_photo(image))]


def site(choices: Sequence[Weights], enlarge: Enlarge, folder: Path, max_upload: int) -> Visitors:
    """The whole site.

    Args:
        choices: what enlarges, in the order of `photo.choice.list_weights`.
        enlarge: an image file with one of them by a factor, into a folder, in a format; see `web.enlarging`.
        folder: where the files of visitors go, the GRADIO_TEMP_DIR of the environment.
        max_upload: size of an image file, MB.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=sweeping(folder, KEPT))
    visitors = Visitors(app, (MOST * max_upload + 1) * MB)
    gr.mount_gradio_app(
        app, page(choices, enlarge, visitors, folder), '/', show_error=False, ssr_mode=False, enable_monitoring=False,
        max_file_size=max_upload * MB, footer_links=[], run_history=False, mcp_server=False,
        theme=theme(),
        css=STYLE + pair.STYLE, head=f'<script>{pair.SCRIPT}{SCRIPT}</script>',
    )  # fmt: skip
    return visitors


def theme() -> gr.themes.Base:
    """Gradio's with fonts of the visitor's machine, and the contrast of WCAG 2.2: 4.5 to 1, of boxes to tick 3 to 1."""
    return gr.themes.Default(font=['system-ui', 'sans-serif'], font_mono=['monospace']).set(
        button_primary_background_fill='*primary_700',
        button_primary_background_fill_dark='*primary_700',
        button_primary_background_fill_hover='*primary_800',
        button_primary_background_fill_hover_dark='*primary_800',
        block_info_text_color='*neutral_600',
        checkbox_border_color='*neutral_500',
        checkbox_border_color_dark='*neutral_400',
        link_text_color_dark='*secondary_300',
    )


def page(choices: Sequence[Weights], enlarge: Enlarge, visitors: Visitors, folder: Path) -> gr.Blocks:
    """The page."""
    line = Line(WAITING)

    def networks(scale: int) -> gr.Radio:
        names = [(str(weights), weights.name) for weights in at_scale(choices, scale)]
        names = [(best_of(choices, scale), BEST), *names]
        return gr.Radio(names, value=BEST, label='Network', info=ORDER, elem_id='network')

    def kinds(visit: Visit, ticked: Sequence[str], scale: int, weights: str) -> gr.CheckboxGroup:
        """To be asked where it matters: not without images, for weights that are named, or weights of one kind."""
        matters = bool(visit.asked) and weights == BEST and has_both(choices, scale)
        names = output_names([Path(image) for image in visit.asked])
        return gr.CheckboxGroup(list(zip(names, visit.asked, strict=True)), value=list(ticked), visible=matters)

    def rescale(visit: Visit, ticked: list[str], scale: int) -> tuple[gr.Radio, gr.CheckboxGroup]:
        return networks(scale), kinds(visit, ticked, scale, BEST)

    def look(
        images: list[str] | None, visit: Visit, ticked: list[str], scale: int, weights: str
    ) -> tuple[str, gr.CheckboxGroup]:
        given = list(dict.fromkeys(images or []))
        if len(given) > MOST:  # which are not opened
            return markup.refusal(reason_against(given, True)), kinds(visit, ticked, scale, weights)
        photos, visit.asked = visit.photos(given, ticked), tuple(given)
        return markup.previews([Path(image) for image in given], PREVIEWED), kinds(visit, photos, scale, weights)

    def click(
        images: list[str] | None,
        visit: Visit,
        ticked: list[str],
        scale: int,
        weights: str,
        format: str,
        request: gr.Request,
    ) -> Iterator[dict]:
        named = [each for each in at_scale(choices, scale) if each.name == weights]
        if problem := reason_against(images or [], bool(named) or weights == BEST):
            yield {told: markup.refusal(problem)}
            return
        own, visit.stop, files = folder / secrets.token_hex(16), Event(), [Path(image) for image in images or []]
        said, known, photos, kept = '', 0, visit.photos(images or [], ticked), 0.0

        def one(image: Path, folder: Path, progress: Report, stop: Callable[[], bool]) -> Result:
            chosen = named[0] if named else best(choices, scale, str(image) in photos)
            return enlarge(image, chosen, scale, folder, format, progress, stop)

        yield {shown: '', download: gr.DownloadButton('Download', interactive=False), stop: gr.Button(interactive=True)}
        for state in work(files, one, own, line, visit.stop):
            if time.monotonic() - kept > KEPT / 6:  # however long it takes
                keep([own, *files])
                kept = time.monotonic()
            update: dict = {progress: markup.bar(state)}
            if (text := markup.status(state)) != said:
                said = update[told] = text  # only what is new, since it is read aloud
            if len(state.results) > known:
                known = len(state.results)
                visitors.grant(request.cookies[COOKIE], shown_files(state))
                update[shown] = markup.comparisons(state.results.items())
            if state.ended:
                update[stop] = gr.Button(interactive=False)
                if state.results:
                    try:
                        file = pack(state, own)
                    except WriteError as error:
                        update[told] = said + markup.refusal(str(error))
                    else:
                        visitors.grant(request.cookies[COOKIE], [file])
                        update[download] = gr.DownloadButton(f'Download {file.name}', str(file), interactive=True)
            yield update

    def end(visit: Visit) -> gr.Button:
        if visit.stop:
            visit.stop.set()
        return gr.Button(interactive=False)

    scales = sorted({choice.scale for choice in choices})
    first = 4 if 4 in scales else scales[-1]
    with gr.Blocks(title=TITLE, analytics_enabled=False) as blocks:
        gr.Markdown(f'# {TITLE}\n{ABOUT}')
        visit = gr.State(Visit())
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                images = gr.File(label='Images', file_count='multiple', file_types=list(SUFFIXES), type='filepath')
                seen = html('seen')
                scale = gr.Radio([(f'x{scale}', scale) for scale in scales], value=first, label='Scale')
                kind = gr.CheckboxGroup([], label='Photographs', info=KINDS, visible=False, elem_id='kind')
                network = networks(first)
                format = gr.Radio(list(FORMATS), value='PNG', label='Format')
                with gr.Row():
                    button = gr.Button('Enlarge', variant='primary', min_width=120)
                    stop = gr.Button('Stop', interactive=False, min_width=120)
            with gr.Column(scale=2, min_width=280):
                told = html('told')
                progress = html('progress')
                shown = html('shown')
                download = gr.DownloadButton('Download', interactive=False)
        quick: Any = {'concurrency_limit': None, 'show_progress': 'hidden'}
        asked = [visit, kind, scale, network]
        images.change(look, [images, *asked], [seen, kind], show_progress='hidden')
        scale.input(rescale, [visit, kind, scale], [network, kind], **quick)
        network.input(kinds, asked, kind, **quick)
        button.click(click, [images, *asked, format], [told, progress, shown, download, stop], **quick)
        stop.click(end, visit, stop, **quick)
    return blocks.queue(max_size=WAITING)


def html(name: str) -> gr.Markdown:
    """A place for HTML; `gr.HTML` would run code made from strings, which the headers of the page forbid."""
    return gr.Markdown(elem_id=name, sanitize_html=False, latex_delimiters=[])


def seems_photo(image: str) -> bool:
    """Whether a file was compressed with loss; what cannot be read gets a sentence elsewhere."""
    with suppress(UserError):
        return is_lossy(Path(image))
    return False


def has_both(choices: Sequence[Weights], scale: int) -> bool:
    """Whether photographs are enlarged with other weights than other images."""
    return best(choices, scale, True) != best(choices, scale, False)


def best_of(choices: Sequence[Weights], scale: int) -> str:
    """What a visitor sees of the best choice for each kind of image."""
    clean, photo = (best(choices, scale, lossy) for lossy in (False, True))
    return f'The best: {clean.stem}' + (f', for photographs {photo.stem}' if has_both(choices, scale) else '')


def reason_against(images: Sequence[str], is_there: bool) -> str:
    """Why this is not enlarged, with weights that are there or not; nothing if it is."""
    if not images:
        return 'No image: drop one first.'
    if len(images) > MOST:
        return f'{len(images)} images; at most {MOST} are enlarged at once: leave some out.'
    return '' if is_there else 'This network is not of that scale: choose again.'


def shown_files(state: State) -> list[Path]:
    """What the page shows of the results."""
    return [file for result in state.results.values() for file in result.shown.files]


def pack(state: State, folder: Path) -> Path:
    """The file that a visitor takes along: the enlarged image, or several of them in a ZIP file.

    Raises:
        WriteError: the ZIP file cannot be written.
    """
    files = {name: result.image for name, result in state.results.items()}
    if len(files) == 1:
        return next(iter(files.values()))
    path = folder / f'{len(files)}_images.zip'
    try:
        with zipfile.ZipFile(path, 'w') as archive:  # without compression, since images have their own
            for name, file in files.items():
                archive.write(file, f'{name}_{file.name.rpartition("_")[2]}')
    except OSError as error:
        path.unlink(missing_ok=True)
        raise WriteError(f'The ZIP file could not be written ({error.strerror or error}): try fewer images.') from error
    for file in files.values():
        file.unlink()
    return path


STYLE = """
#live { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
#told p { margin: 0 0 .4rem; }
.failure { color: #b91c1c; }
.dark .failure { color: #fca5a5; }
.or { color: inherit; }
#network label, #kind label { width: 100%; overflow-wrap: anywhere; }
#progress progress { display: block; width: 100%; height: .75rem; margin-bottom: .3rem; appearance: none; border: 0;
  border-radius: .4rem; overflow: hidden; background: var(--neutral-300); }
.dark #progress progress { background: var(--neutral-700); }
#progress ::-webkit-progress-bar { background: none; }
#progress ::-webkit-progress-value { background: var(--color-accent); }
#progress ::-moz-progress-bar { background: var(--color-accent); }
.previews { display: flex; flex-wrap: wrap; gap: .75rem; list-style: none; margin: 0; padding: 0; }
.previews li { display: grid; align-content: start; gap: .1rem; max-width: 160px; font-size: .85rem;
  overflow-wrap: anywhere; }
.previews li:has(.failure) { max-width: none; }
.previews img { max-width: 100%; border-radius: .4rem; }
#shown figure { margin: 0 0 1.5rem; }
#shown .pair { max-width: 100%; border-radius: .4rem; }
#shown img { display: block; max-width: 100%; height: auto; }
#shown figcaption { margin-top: .4rem; overflow-wrap: anywhere; }
#shown label { display: block; width: fit-content; margin-top: .2rem; }
#shown .two:has(:checked) .detail, #shown .two:not(:has(:checked)) .whole { display: none; }
"""
# What `told` says is read aloud from an element that stays; Gradio makes its own anew, which is not noticed.
SCRIPT = """
{
  const live = Object.assign(document.createElement('div'), { id: 'live', role: 'status' });
  document.body.append(live);
  new MutationObserver(() => {
    const said = document.getElementById('told')?.innerText.trim() ?? '';
    if (live.textContent !== said) live.textContent = said;
    for (const button of document.querySelectorAll('[aria-label="common.upload"]')) {
      button.ariaLabel = button.title = 'Add images';  // Gradio 6.31 has no words for it
    }
    for (const group of document.querySelectorAll('fieldset')) {  // nor for these
      group.ariaLabel = group.querySelector('[data-testid="block-info"]').innerText;
    }
    for (const file of document.querySelectorAll('tr.file')) {
      const name = file.querySelector('.filename').ariaLabel;
      file.querySelector('a')?.setAttribute('aria-label', `Download ${name}`);
      file.querySelector('button')?.setAttribute('aria-label', `Remove ${name}`);
    }
  }).observe(document.body, { childList: true, subtree: true, characterData: true });
}
"""
