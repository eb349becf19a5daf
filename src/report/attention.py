"""--show_attention: what a network takes together, as colours over the image.

LCoAN attends within clusters of pixels, CATANet within groups of those that are most similar to the same centre, ATD
within categories: the token of its dictionary that a pixel is most similar to. Colours follow the papers' figures in
that they tell clusters apart and mean nothing else.
"""

import colorsys
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data.image import write_png
from error import UserError
from metric import luma
from model import Model
from model.atd import ATD, DictionaryAttention
from model.catanet import CATANet, IntraGroupAttention
from model.lcoan import KMeans, LCoAN
from report.picture import centre

log = logging.getLogger('frugalsr')

SIDE = 512  # of the part of an LR image that is shown, pixels
GAP = 8  # between pictures side by side, pixels
GOLDEN = 0.618034  # neighbouring indexes get hues this far apart on the circle


@dataclass(frozen=True)
class Source:
    """Where a network decides what its pixels belong to.

    Attributes:
        modules: that decide, by a name for their map.
        read: their inputs and their output to an index a pixel, (N, L) int64.
        multiple: what height and width of the image are padded to.
    """

    modules: Mapping[str, nn.Module]
    read: Callable[[tuple[Any, ...], Any], Tensor]
    multiple: int


def source(model: Model) -> Source:
    """Where a network decides: LCoAN in its first attention, which the others share, the others in three blocks.

    They are the first, the middle one and the last; of ATD's their last layers.

    Raises:
        UserError: the network decides no such thing.
    """
    net = model.net
    if isinstance(net, LCoAN):
        first = next(module for module in net.modules() if isinstance(module, KMeans))
        return Source({'clusters': first}, lambda _, codes: codes[:, 0], 1)
    if isinstance(net, CATANet):
        groups = [module for module in net.modules() if isinstance(module, IntraGroupAttention)]
        return Source(three_of(groups), lambda given, _: given[1], 1)
    if isinstance(net, ATD):
        layers = [[m for m in block.modules() if isinstance(m, DictionaryAttention)] for block in net.layers]
        modules = three_of([of_block[-1] for of_block in layers])
        return Source(modules, lambda _, found: found.category, net.multiple)
    raise UserError(
        f'--show_attention: {model.name} has neither clusters nor categories to show, which LCoAN, ATD, ATD-light '
        'and CATANet have; leave it out.'
    )


def three_of(blocks: Sequence[nn.Module]) -> dict[str, nn.Module]:
    """The first, the middle one and the last by the names of their maps."""
    last = len(blocks) - 1
    return {f'block {i + 1}': blocks[i] for i in sorted({0, last // 2, last})}


@torch.inference_mode()
def maps(model: Model, image: np.ndarray) -> dict[str, np.ndarray]:
    """Cluster or category of each pixel of (H, W, 3) uint8, taken whole and in float32: (H, W) int64 by name.

    Leaves the network in evaluation mode.
    """
    at, found = source(model), {}

    def note(name: str, _module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        found[name] = at.read(inputs, output)[0].cpu().numpy()

    hooks = [module.register_forward_hook(partial(note, name)) for name, module in at.modules.items()]
    try:
        model.net.eval()(model.to_range(torch.from_numpy(image.copy()).permute(2, 0, 1).unsqueeze(0)))
    finally:
        for hook in hooks:
            hook.remove()
    height, width = image.shape[:2]
    padded = width + -width % at.multiple
    return {name: indexes.reshape(-1, padded)[:height, :width] for name, indexes in found.items()}


def palette(count: int) -> np.ndarray:
    """Colours of indexes, (count, 3) uint8: hues that go round by the golden section, in four shades alternately."""
    shades = ((1, 1), (0.5, 1), (1, 0.65), (0.6, 0.65))
    colours = (colorsys.hsv_to_rgb(i * GOLDEN % 1, *shades[i % 4]) for i in range(count))
    return np.array([[round(255 * value) for value in colour] for colour in colours], np.uint8).reshape(-1, 3)


def draw(image: np.ndarray, found: Mapping[str, np.ndarray], scale: int) -> np.ndarray:
    """The image and each map over it in half-transparent colours, side by side and every pixel a square of `scale`.

    image: (H, W, 3) uint8; found: (H, W) indexes by name. Returns uint8 (scale * H, ..., 3).
    """
    grey = luma(image)[..., None]
    colours = palette(1 + max(int(indexes.max()) for indexes in found.values()))
    panels = [image, *(((grey + colours[indexes]) / 2).astype(np.uint8) for indexes in found.values())]
    gap = np.full((scale * len(image), GAP, 3), 255, np.uint8)
    row = [part for panel in panels for part in (gap, panel.repeat(scale, 0).repeat(scale, 1))]
    return np.concatenate(row[1:], 1)


def save(model: Model, image: np.ndarray, path: Path) -> None:
    """Write the picture of an image (H, W, 3) uint8, or of its middle if it is large."""
    part = image[centre(image, SIDE)]
    if part.size < image.size:
        log.info('%s shows the middle of its image, %dx%d pixels of LR.', path.name, part.shape[1], part.shape[0])
    write_png(path, draw(part, maps(model, part), model.scale))
