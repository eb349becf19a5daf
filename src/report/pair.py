"""A slider between two images that lie on each other, `.pair`: what report.html and the page of app.py share."""


def slider(label: str, at: float = 50) -> str:
    """The control, over the images.

    Args:
        label: what a screen reader calls it, as HTML.
        at: where it stands, percent of the width; as `--at` it belongs into the style of the `.pair`, too.
    """
    return f'<input type="range" min="0" max="100" step="any" value="{at:g}" autocomplete="off" aria-label="{label}">'


STYLE = """
.pair { --at: 50%; position: relative; width: fit-content; overflow: hidden; }
.pair .left { position: absolute; inset: 0; width: 100%; height: 100%;
  clip-path: inset(0 calc(100% - var(--at)) 0 0); }
.pair::before, .pair::after { content: ''; position: absolute; z-index: 1; left: var(--at); pointer-events: none; }
.pair::before { top: 0; bottom: 0; width: 2px; margin-left: -1px; background: #fff; box-shadow: 0 0 2px #000; }
.pair::after { content: '\\2194'; top: 50%; width: 2rem; line-height: 2rem; margin: -1rem; border-radius: 1rem;
  text-align: center; background: #fff; color: #000; box-shadow: 0 0 3px #000; }
.pair:focus-within { outline: 3px solid #4a90ff; }
.pair input { position: absolute; inset: 0 -1rem; width: calc(100% + 2rem); height: 100%; margin: 0; opacity: 0;
  cursor: ew-resize; touch-action: pan-y; appearance: none; }
.pair input::-webkit-slider-thumb { appearance: none; width: 2rem; height: 2rem; }
.pair input::-moz-range-thumb { width: 2rem; height: 2rem; border: 0; }
"""

SCRIPT = """
addEventListener('input', ({ target }) => {
  if (target.matches('.pair input')) target.parentElement.style.setProperty('--at', target.value + '%');
});
"""
