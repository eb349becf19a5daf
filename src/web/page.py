"""The page of app.py, made with Gradio: what a visitor sees, and what happens on a click."""

import html
import re
import secrets
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import gradio as gr
from fastapi import FastAPI

from data.image import SUFFIXES
from error import UserError
from model.tiles.tiling import out_of_memory
from web.enlarging import Choice, Result
from web.visitors import COOKIE, Visitors

TITLE = 'FrugalSR'
ABOUT = (
    'Drop an image, choose a network, and have it enlarged. It stays on the machine that runs this page, no other '
    'visitor is given it, and it is deleted after an hour.'
)
KEPT = 3600  # seconds
WAITING = 20  # visitors at most
MB = 2**20

Enlarge = Callable[[Path, Choice, Path], Result]


def site(choices: Sequence[Choice], enlarge: Enlarge, folder: Path, max_upload: int) -> Visitors:
    """The whole site.

    Args:
        choices: what enlarges, the first one chosen at first.
        enlarge: an image file with a choice, into a folder.
        folder: where the files of visitors go, the GRADIO_TEMP_DIR of the environment.
        max_upload: size of an image file, MB.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    visitors = Visitors(app, (max_upload + 1) * MB)
    gr.mount_gradio_app(
        app, page(choices, enlarge, visitors, folder), '/', show_error=False, ssr_mode=False, enable_monitoring=False,
        max_file_size=max_upload * MB, footer_links=[], run_history=False, mcp_server=False,
        theme=gr.themes.Default(font=['system-ui', 'sans-serif'], font_mono=['monospace']),
    )  # fmt: skip
    return visitors


def page(choices: Sequence[Choice], enlarge: Enlarge, visitors: Visitors, folder: Path) -> gr.Blocks:
    """The page."""

    def options(network: str, scale: int) -> tuple[list[int], int, list[str]]:
        """The scales of a network, the chosen one or else the largest, and the weights for it."""
        scales = unique(choice.scale for choice in choices if choice.network == network)
        scale = scale if scale in scales else scales[-1]
        return scales, scale, [c.weights for c in choices if (c.network, c.scale) == (network, scale)]

    def narrow_scales(network: str, scale: int) -> gr.Radio:
        scales, known, _ = options(network, scale)
        if known == scale:
            return gr.Radio(scales)  # and no value, which could undo a later choice
        return gr.Radio(scales, value=known)

    def narrow_weights(network: str, scale: int) -> gr.Dropdown:
        files = options(network, scale)[2]
        return gr.Dropdown(files, value=files[0])

    def click(
        image: str | None, network: str, scale: int, weights: str, request: gr.Request
    ) -> tuple[tuple[str, str], str, gr.DownloadButton]:
        own = folder / secrets.token_hex(16)
        try:
            if image is None:
                raise UserError('No image: drop one first.')
            chosen = [c for c in choices if (c.network, c.scale, c.weights) == (network, scale, weights)]
            if not chosen:
                raise UserError('These weights are not of that network and scale: choose again.')
            result = enlarge(Path(image), chosen[0], own)
        except (UserError, MemoryError, RuntimeError) as error:
            if not isinstance(error, UserError) and not out_of_memory(error):
                raise
            text = str(error) if isinstance(error, UserError) else 'Memory ran out: give a smaller image.'
            raise gr.Error(html.escape(without_folders(text)), duration=None, print_exception=False) from error
        visitors.grant(request.cookies[COOKIE], (result.before, result.after, result.image))
        download = gr.DownloadButton(value=str(result.image), interactive=True)
        return (str(result.before), str(result.after)), result.about, download

    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(KEPT // 6, KEPT)) as blocks:
        gr.Markdown(f'# {TITLE}\n{ABOUT}')
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                image = gr.File(label='Image', file_types=list(SUFFIXES), type='filepath')
                first = choices[0].network
                scales, x4, files = options(first, 4)
                networks = unique(choice.network for choice in choices)
                network = gr.Dropdown(networks, value=first, label='Network', filterable=False)
                scale = gr.Radio(scales, value=x4, label='Scale')
                weights = gr.Dropdown(files, value=files[0], label='Weights', filterable=False)
                button = gr.Button('Enlarge', variant='primary')
            with gr.Column(scale=2, min_width=300):
                slider = gr.ImageSlider(
                    label='Bicubic | network', interactive=False, max_height=700, buttons=['fullscreen']
                )
                about = gr.Markdown()
                download = gr.DownloadButton('Download PNG', interactive=False)
        chosen = [network, scale, weights]
        narrowed = network.input(narrow_scales, chosen[:2], scale, concurrency_limit=None, show_progress='hidden')
        for event in (narrowed.then, scale.input):
            event(narrow_weights, chosen[:2], weights, concurrency_limit=None, show_progress='hidden')
        button.click(click, [image, *chosen], [slider, about, download])
    return blocks.queue(max_size=WAITING, default_concurrency_limit=1)


def unique(items: Iterable) -> list:
    """Without repetitions, in order."""
    return list(dict.fromkeys(items))


def without_folders(text: str) -> str:
    """A message whose files are named without where they are."""
    return re.sub(r'/\S+/', '', text)
