"""Calibrate the schedule of a run: see `tokenpool.calibrate`."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import Dataset

from tokenpool.runs import execute, pool
from tokenpool.runs.data_sets import data_set
from tokenpool.runs.run import Run
from tokenpool.runs.schedule_search import find_schedule, spaced
from tokenpool.training.images import open_images
from tokenpool.training.sampling import length


@dataclass(frozen=True)
class CalibrationImages:
    """The images of a calibration. Their labels are not used.

    Attributes:
        data: name of a data set, or a folder in ImageNet's layout.
        part: "1/2" for the first of two interleaved halves of the images in val. Empty for the images in train.
        count: number of images, evenly spaced over these images.
    """

    data: str
    part: str
    count: int

    def load(self, run: Run) -> Tensor:
        """Read the images, as the model of a run expects them: (B, C, H, W).

        Raises:
            ValueError: if the run is tested on some of the images.
        """
        chosen, images = self._chosen(run)
        return spaced(images, chosen, self.count)

    def _chosen(self, run: Run) -> tuple[Sequence[int], Dataset]:
        """Return the indices of the images to choose from, and the images."""
        module = execute.data_module(replace(run, data=self.data, limit=0, part=self.part))
        if data_set(self.data).embedded:
            module.setup("test")
            return range(length(module.train_set)), module.train_set
        if not self.part:
            transform = create_transform(**module.transforms, **module.cropping)
            images = open_images(module.root, "train", transform, **module.allowed)
            return range(len(images)), images
        module.setup("test")
        self._check_apart(run, module.root, module.test_set.indices)
        return module.test_set.indices, module.test_set.dataset

    def _check_apart(self, run: Run, root: str | Path, chosen: Sequence[int]) -> None:
        if data_set(run.data).embedded:
            return
        tested = execute.data_module(run)
        if Path(root).resolve() != Path(tested.root).resolve():  # a source may have several names
            return
        tested.setup("test")
        if set(chosen) & set(tested.test_set.indices):
            raise ValueError(
                f"--calibrate {self.data} with --calibrate-part {self.part} has images of the test: give another part "
                "(--part 2/2 --calibrate-part 1/2), or no part for the images in train"
            )


def calibrated(run: Run, gmacs: float, chosen: CalibrationImages, folder: Path) -> Run:
    """Return the run with a calibrated schedule. Goes on where an interrupted calibration stopped.

    Args:
        run: the run, with the weights that it starts from.
        gmacs: budget of one image.
        chosen: the images.
        folder: for the state of the calibration, in its sub-folder `calibration`.

    Raises:
        ValueError: as of `tokenpool.calibrate`.
    """
    with pool.exclusive(folder):
        images = chosen.load(run)
        plain = replace(run, downsampler="none", keep=None, carry=False, options={})
        print(f"calibrating on {len(images)} images of {chosen.data}", flush=True)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = execute.build_model(plain, folder).to(device)
        keep = find_schedule(run, model, images, gmacs, folder, report=lambda line: print(line, flush=True))
    print(f"--keep {','.join(map(str, keep))}")
    return replace(run, keep=tuple(keep), schedule=f"calibrated on {len(images)} images")
