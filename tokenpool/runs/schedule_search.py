"""The schedule of a run, found by `tokenpool.calibrate` and stored as the result of the run."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn
from torch.utils.data import Dataset

import tokenpool
from tokenpool.runs.run import Run
from tokenpool.training.sampling import length

STAGE = "calibration"
MOST_IMAGES = 300  # of a calibration


def measure_calibration(model: nn.Module, data: LightningDataModule, run: Run, folder: Path) -> dict[str, Any]:
    """Calibrate the schedule of a run on the images of its test set, at most `MOST_IMAGES`, and patch its model.

    Args:
        model: of the run. Its schedule is replaced by the calibrated one.
        data: set up for the test.
        run: has the budget.
        folder: for the state of the calibration.

    Returns:
        `learned_keep`, the schedule; and `images`, the number of images.

    Raises:
        ValueError: as of `tokenpool.calibrate`.
    """
    images = spaced(data.test_set, range(length(data.test_set)), MOST_IMAGES)
    keep = find_schedule(run, model, images, run.budget, folder)
    tokenpool.patch(model, run.downsampler, keep, carry=run.carry, **run.options)
    return {"learned_keep": keep, "images": len(images)}


def find_schedule(
    run: Run,
    model: nn.Module,
    images: Tensor,
    gmacs: float | None,
    folder: Path,
    report: Callable[[str], None] | None = None,
) -> list[int]:
    """Calibrate the schedule of a run. Go on where an interrupted calibration stopped.

    Args:
        run: has the method, its options and `carry`.
        model: plain or patched. It is not changed.
        images: (B, C, H, W).
        gmacs: budget of one image.
        folder: for the state of the calibration, in its sub-folder `calibration`.
        report: see `tokenpool.calibrate`.

    Returns:
        The schedule `keep`.

    Raises:
        ValueError: as of `tokenpool.calibrate`, or without a budget.
    """
    if gmacs is None:
        raise ValueError(f"{run.name} has no budget, which a calibration must meet")
    return tokenpool.calibrate(
        model,
        images,
        run.downsampler,
        gmacs,
        carry=run.carry,
        state=folder / "calibration" / f"{run.label}.json",
        report=report,
        **run.options,
    )


def spaced(images: Dataset, chosen: Sequence[int], count: int) -> Tensor:
    """Stack `count` images, evenly spaced over the chosen indices, or all of them: (B, C, H, W)."""
    positions = torch.linspace(0, len(chosen) - 1, min(count, len(chosen))).long().tolist()
    return torch.stack([images[chosen[position]][0] for position in positions])
