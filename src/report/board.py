"""The log of a run for TensorBoard, where that is installed."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from metric import METRICS

PLACE = ('epoch', 'step', 'samples')  # what in a record says when it was, and is no curve

log = logging.getLogger('frugalsr')


class Board:
    """Writes event files into `folder` from its first epoch on; older entries of these epochs are void."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writer: Any = None

    def write(self, record: Mapping[str, Any], images: Mapping[str, np.ndarray]) -> None:
        """The numbers of an epoch's record in the trainer's log, and images, (H, W, 3) uint8 by name."""
        try:
            self._write(record['epoch'], record, images)
        except Exception as error:  # of a library that is not needed
            reason = error.strerror if isinstance(error, OSError) else None
            log.warning('The log for TensorBoard could not be written (%s).', reason or error)
            self._writer = None

    def _write(self, epoch: int, record: Mapping[str, Any], images: Mapping[str, np.ndarray]) -> None:
        if self._writer is None or not self.folder.is_dir():  # it may have been deleted
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                return
            self._writer = SummaryWriter(str(self.folder), purge_step=epoch)
        scalars = {f'loss/{term}': value for term, value in record['loss'].items()}
        for name, scores in record['test'].items():
            scalars |= {f'{each.name}/{name}': scores[each.name] for each in METRICS if each.name in scores}
        scalars |= {key: value for key, value in record.items() if isinstance(value, (int, float)) and key not in PLACE}
        for tag, value in scalars.items():
            self._writer.add_scalar(_plain(tag), value, epoch)
        for tag, image in images.items():
            self._writer.add_image(_plain(tag), image, epoch, dataformats='HWC')
        self._writer.flush()


def _plain(tag: str) -> str:
    """A name as UTF-8, which that of a file need not be."""
    return tag.encode(errors='replace').decode()
