"""The image sets of a program: found by name, and prepared alike."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data.degradation import Degradation
from data.imresize import Border
from data.sets import Range, find_set
from data.srdata import SRData
from error import UserError
from system import parallel


@dataclass(frozen=True)
class Library:
    """Where image sets are, and how they are read.

    Attributes:
        folder: of the sets.
        benchmarks: another one, whose sets are looked up too.
        scale: factor between HR and LR.
        lr_border: of the bicubic that makes missing LR, 'mirror' or 'clamp'.
        shave: pixels left out of the scores at each border; None: as is usual for a set.
        workers: threads that prepare a set.
        renew: make decoded copies anew.
        degradation: what is done to the LR images of test sets.
    """

    folder: Path
    benchmarks: Path
    scale: int
    lr_border: Border = 'mirror'
    shave: int | None = None
    workers: int = 0
    renew: bool = False
    degradation: Degradation | None = None

    def open(
        self,
        name: str,
        span: Range | None = None,
        prepare: bool = True,
        cached: bool = False,
        skip_bad: bool = False,
        degradation: Degradation | None = None,
    ) -> SRData:
        """Find one set and make what it lacks, in one process for all.

        Args:
            name: of the set, or path of a folder of HR images.
            span: of the images of DIV2K.
            prepare: without it only the HR images are to be read.
            cached: keep decoded copies.
            skip_bad: images that cannot be used are no error.
            degradation: what is done to LR whenever it is read.

        Raises:
            UserError: no such set, or an image that cannot be used.
        """
        images = find_set(name, self.folder, self.benchmarks, span)
        data = SRData(images, self.scale, self.lr_border, cached, self.shave, skip_bad, degradation)
        if prepare:
            with parallel.main_process_first():  # it makes what is missing
                data.prepare(self.workers, renew_cache=self.renew and parallel.rank() == 0)
        return data

    def open_tests(self, names: Sequence[str], span: Range | None = None, prepare: bool = True) -> list[SRData]:
        """The test sets of these names; Demo is not one, it has no HR.

        Raises:
            UserError: as `open`, or two sets of one name.
        """
        sets = [self.open(name, span, prepare, degradation=self.degradation) for name in names if name != 'Demo']
        twice = {images.name for images in sets if [other.name for other in sets].count(images.name) > 1}
        if twice:
            raise UserError(
                f'--data_test names {twice.pop()} twice: give each set once, or folders of different names.'
            )
        return sets
