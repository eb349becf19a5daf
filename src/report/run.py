"""What a run says of itself: the first lines of its log, results.json, report.html."""

import logging
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from typing import Any

from checkpoint import RunFolder
from error import UserError, noting, raise_noted
from model import Model, n_parameters, type_name
from model.loading.weights import Origin
from report import attention
from report.page import Saved, page, read_curves
from system import parallel
from system.machine import machine

log = logging.getLogger('frugalsr')


def facts(model: Model, weights: str) -> dict[str, str]:
    """What runs where: the network, what its `weights` are, the device."""
    where = f'{model.device}, {parallel.world_size()} processes' if parallel.world_size() > 1 else str(model.device)
    network = f'{model.name} x{model.scale}, {n_parameters(model):,} parameters'
    return {'Network': network, 'Weights': weights, 'Device': where}


def describe(model: Model, folder: RunFolder, origin: Origin) -> None:
    """Log what runs where."""
    network, _, where = facts(model, origin.source).values()
    log.info('%s, on %s, %s; run folder %s', network, where, origin, folder.folder)
    if model.wants_half:
        log.info('Half precision: computed in %s.', type_name(model.dtype))
    if model.tiler and not model.network.tiling_exact:
        log.info('Tiles change the result of %s: its attention sees one tile at a time.', model.name)


def write_results(
    folder: RunFolder, model: Model, weights: str, protocol: Mapping[str, Any], results: Mapping[str, Any]
) -> None:
    """Write results.json: the scores of a network, and everything that has a say in them.

    Args:
        folder: of the run.
        model: what was tested.
        weights: what its weights are.
        protocol: how it was tested.
        results: scores by set.
    """
    about = {'model': model.name, 'scale': model.scale, 'settings': model.settings, 'weights': weights}
    about |= {'machine': machine(model.device.type)}
    folder.write_results({**about, 'protocol': dict(protocol), 'sets': dict(results)})


def write_report(
    folder: RunFolder,
    title: str,
    about: Mapping[str, object],
    results: Mapping[str, Mapping[str, Any]],
    saved: Mapping[str, Sequence[Saved]],
    config: str,
    changed: Collection[str],
) -> None:
    """Write report.html: `about` the run, and what is in its folder; the other arguments are those of `page`."""
    if not folder.writes:
        return
    now = datetime.now().astimezone()
    about = {**about, 'Run folder': folder.folder, 'Date': f'{now:%Y-%m-%d %H:%M %Z}'}
    content = page(title, about, results, read_curves(folder.folder), saved, config, changed)
    folder.write_bytes('report.html', content)


def show_attention(model: Model, saved: Mapping[str, Sequence[Saved]], most: int) -> None:
    """Save what the network takes together in the first `most` images of each set, beside them.

    Raises:
        UserError: of some images that could not be done.
    """
    failures: list[UserError] = []
    for images in saved.values():
        for image in images[:most]:
            with noting(failures):
                name = f'{image.name}_x{image.scale}_attention.png'
                attention.save(model, image.lr(), image.file.with_name(name))
    raise_noted(failures)
