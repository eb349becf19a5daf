"""--data_test Demo: a folder of photographs enlarged into the folder of a run."""

import logging
import time
from functools import partial
from pathlib import Path

from data.image import find_images, read_rgb
from data.outputs import output_names
from error import UserError
from model import Model
from photo.choice import OneNetwork
from photo.engine import enlarge_photos, raise_failures
from photo.plan import make_plan
from photo.size import Size
from photo.targets import Place, Source
from photo.writing import Format
from report.page import Saved
from system import parallel
from system.files import some

log = logging.getLogger('frugalsr')


def enlarge_folder(model: Model, source: Path, target: Path, limit: int | None = None) -> None:
    """Enlarge every image of a folder; what fails is named at the end, after the others are done.

    `limit` is as of `enlarge_photos`.

    Raises:
        UserError: no folder, no images in it, or some that could not be read, enlarged or written.
    """
    files, start = find_photos(source), time.perf_counter()
    names = dict(zip(files, output_names(files), strict=True))

    class Named(Place):
        """Names of which none is taken twice."""

        def of(self, source: Source, *_: object) -> Path:
            return target / f'{names[source.path]}_x{model.scale}_SR.png'

    networks, format = OneNetwork(model), Format('png')
    plan = make_plan(
        [Source(file) for file in files], Size(model.scale), Named(), format, networks, settings='', again=True
    )
    outcome = enlarge_photos(plan.jobs, networks, format, limit)
    seconds = (time.perf_counter() - start) / len(files)
    log.info('Enlarged by %d, %.2f s an image: %d in %s', model.scale, seconds, outcome.done, target)
    if others := sorted(path.name for path in {*source.iterdir()} - {*files} if not path.name.startswith('.')):
        log.info('Left out, no image files of a known kind: %s', some(others))
    raise_failures(plan.failures * (parallel.rank() == 0) + outcome.failures, outcome.left, len(files))


def find_photos(source: Path) -> list[Path]:
    """The images of a folder.

    Raises:
        UserError: no folder, or no images in it.
    """
    if not source.is_dir():
        raise UserError(f'--dir_demo {source} is not a folder: give a folder of images.')
    files = find_images(source)
    if not files:
        raise UserError(f'--dir_demo {source} holds no images: expected png, jpg, bmp, tif, webp or gif files.')
    return files


def saved_photos(source: Path, target: Path, scale: int) -> list[Saved]:
    """Those of the images of a folder whose enlargement is in `target`."""
    files = find_images(source) if source.is_dir() else []
    images = [
        Saved(name, target / f'{name}_x{scale}_SR.png', scale, partial(read_rgb, file))
        for name, file in zip(output_names(files), files, strict=True)
    ]
    there = set(target.iterdir()) if target.is_dir() else set()
    return [image for image in images if image.file in there]
