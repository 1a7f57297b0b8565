"""Estimates of the time that runs take, from finished runs of their kind or from the preset."""

import warnings
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import pandas as pd

from tokenpool.analysis import results
from tokenpool.runs.measure import MEASURES
from tokenpool.runs.preset import Preset, Variant
from tokenpool.runs.run import Run
from tokenpool.runs.schedule_search import STAGE as CALIBRATION

_PASSES = {CALIBRATION: 25.0}  # of all images through the model in a run, where there are several


class Durations:
    """Estimates of the seconds that the runs of a study take one process.

    Args:
        preset: has estimates for the machine in its docstring.
        variants: all base models of the study.
        folder: of the results. Finished runs show how fast this machine is.
    """

    def __init__(self, preset: Preset, variants: Sequence[Variant], folder: Path) -> None:
        self.preset = preset
        self.variants = variants
        self.folder = folder

    @cached_property
    def _taken(self) -> pd.DataFrame:
        """Of finished runs: stage, downsampler, variant, epochs, and the seconds that they took one process."""
        columns = ["stage", "downsampler", "variant", "epochs", "total"]
        if not self.folder.is_dir() or not any(self.folder.glob("*.json")):
            return pd.DataFrame(columns=columns)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                frame = results.load(self.folder, skip_broken=True)
        except ValueError:  # all of them are broken
            return pd.DataFrame(columns=columns)
        numbers, names = ["seconds", "processes", "epochs"], ["stage", "downsampler", "variant"]
        frame = frame.reindex(columns=frame.columns.union(numbers + names))  # early results lack some of them
        frame[numbers] = frame[numbers].apply(pd.to_numeric, errors="coerce")
        frame["variant"] = frame["variant"].where(frame["variant"].notna(), "")
        frame["total"] = frame["seconds"] * frame["processes"].fillna(1)
        return frame[columns]

    @cached_property
    def _typical(self) -> pd.Series:
        """Median seconds of one process that finished runs took for an epoch, by stage, method and model."""
        taken = self._taken
        each = (taken["total"] / taken["epochs"].clip(lower=1)).astype(float)
        return each.groupby([taken["stage"], taken["downsampler"], taken["variant"]]).median()

    def of(self, run: Run) -> float:
        """Estimate for one run."""
        typical = self._typical.get((run.stage, run.downsampler, run.variant))
        if typical is not None:
            return max(run.recipe.epochs, 1) * typical
        passes = _PASSES.get(run.stage, 1.0)
        return self._pace * passes * self._expected(run.variant, run.downsampler, run.recipe.epochs)

    def _expected(self, variant: str, downsampler: str, epochs: int) -> float:
        """Seconds that the preset expects of a run."""
        effort = next(each for each in self.variants if each.name == variant).effort
        if downsampler not in ("none", "soft_selection"):
            effort *= self.preset.pooled_effort
        return effort * (epochs * self.preset.epoch_seconds + self.preset.evaluation_seconds)

    @cached_property
    def _pace(self) -> float:
        """Seconds that finished runs took on this machine for each second that the preset expects."""
        taken = self._taken
        taken = taken[taken["variant"].isin([variant.name for variant in self.variants])]
        taken = taken[~taken["stage"].isin([*MEASURES, *_PASSES])] if len(taken) else taken
        expected = [self._expected(row.variant, row.downsampler, row.epochs) for row in taken.itertuples()]
        return taken["total"].sum() / sum(expected) if sum(expected) else 1.0


def duration(seconds: float) -> str:
    """A time in words: "40 s", "8 minutes", "3.5 hours"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 6000 else f"{seconds / 3600:.1f} hours"
