"""Which runs a study has, which of them are finished in its folder, and what they need of each other."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from tokenpool import schedules
from tokenpool.analysis import results
from tokenpool.downsampling import studied
from tokenpool.runs import finished, timing
from tokenpool.runs.data_sets import data_set
from tokenpool.runs.durations import Durations
from tokenpool.runs.preset import Preset, Variant
from tokenpool.runs.run import Identities, Run, check_identity, check_same, check_stored, result_path, weights_path
from tokenpool.runs.stages import Stages, run_label

TIMED = ("throughput",)  # stages whose runs measure time, and are made one at a time


@dataclass(frozen=True)
class Study(Stages):
    """The runs of a preset, and the results of the finished ones in a folder.

    Attributes:
        preset: what is run.
        folder: of the results.
        full: whether it is the full study, not the quick one of `make reproduce`.
        named: whether results are compared with the images and weights that variables name now. Without it any results
            are shown, such as shipped results in a notebook.
    """

    preset: Preset
    folder: Path
    full: bool = True
    named: bool = True

    def schedule(self, variant: Variant, level: int) -> tuple[int, ...] | None:
        """The schedule of that level: the paper's, or as learned; None if its search is not finished."""
        searched = self.searched_variant(variant)
        if searched.schedules:
            return tuple(schedules.paper(searched.schedules, level))
        return self._learned[searched.name][level]

    def prerequisites(self, runs: Sequence[Run]) -> tuple[list[Run], list[Run]]:
        """Base models and searches that are not finished, and that unfinished ones of the runs need."""
        waiting = [run for run in runs if not self._is_finished(run)]
        variants = {variant.name: variant for variant in self.variants}
        searched = {
            self.searched_variant(variants[run.variant]).name: self.searched_variant(variants[run.variant])
            for run in waiting
            if run.level is not None and run.keep is None
        }
        searches = [run for variant in searched.values() for run in self.searches(variant)]
        searches = [run for run in searches if not self._is_finished(run)]
        needed = dict.fromkeys((run.variant, run.seed) for run in [*waiting, *searches] if run.start is not None)
        bases = [self.base(seed, variants[name]) for name, seed in needed]
        # Other runs start from the weights of a base model. Without them it is made again.
        return [base for base in bases if not (self._is_finished(base) and self._has_weights(base))], searches

    def missing(self, runs: Sequence[Run]) -> list[Run]:
        """The unfinished ones of the runs, and the runs that they need, in an order in which they can be made."""
        bases, searches = self.prerequisites(runs)
        first = {run.name for run in bases}
        return [*bases, *searches, *(run for run in runs if not self._is_finished(run) and run.name not in first)]

    def awaited(self, run: Run) -> list[Run]:
        """The runs that a run needs, finished or not: its base model, and the search for its schedule."""
        variant = self.variant_of(run)
        needed = [self.base(run.seed, variant)] if run.start is not None else []
        searched = self.searched_variant(variant)
        if run.level is not None and run.stage != "search" and not searched.schedules:
            needed.append(self.searches(searched)[run.level])
        return needed

    def with_awaited(self, runs: Sequence[Run]) -> list[Run]:
        """The runs, and the runs that they need, each after the runs that it needs."""
        found: dict[str, Run] = {}
        for run in runs:
            found |= {other.name: other for other in self.with_awaited(self.awaited(run))} | {run.name: run}
        return list(found.values())

    def prepared(self, run: Run) -> Run | None:
        """The run with its schedule; None if it is finished.

        Raises:
            ValueError: if the file of its result is broken or holds another setting.
            RuntimeError: if a run that it needs is not finished; the message names it.
        """
        if self.check_finished(run) and (run.stage != "base" or self._has_weights(run)):
            return None
        for other in self.awaited(run):
            if other.stage == "search" and self.with_schedule(run).keep is None:
                raise RuntimeError(f"{run.name} needs the schedule that {other.name} learns, which is not finished")
            if other.stage == "base" and not (self._is_finished(other) and self._has_weights(other)):
                raise RuntimeError(f"{run.name} starts from {other.name}, which is not finished")
        return run if run.stage == "search" else self.with_schedule(run)

    def finished(self, runs: Sequence[Run]) -> list[Run]:
        """The finished ones of the runs."""
        names = set(self.points(runs).get("run", ()))
        return [run for run in runs if run.name in names]

    def check_finished(self, run: Run) -> bool:
        """Whether a run is finished.

        Raises:
            ValueError: if its file is broken, or holds another setting, other images or other weights. Such a file is
                never overwritten.
        """
        path = result_path(run, self.folder)
        if not path.exists():
            return False
        outcome = results.read(path)
        check_stored(_with_schedule_of(run, outcome), outcome, self.identities.of(run), path)
        self._check_base(run)
        return True

    def points(self, runs: Sequence[Run]) -> pd.DataFrame:
        """One row for each finished run: its setting, metrics and cost, as in `results.load`.

        A file that is broken or holds another setting gives a warning, and its run counts as missing.

        Raises:
            ValueError: if a run was made from other images or weights than variables name now; if the runs were made
                from different images or weights; or if runs that measure time were made on different machines. The
                message names both.
        """
        rows, timed = [], {}
        for run in runs:
            path = result_path(run, self.folder)
            if not path.exists():
                continue
            try:
                outcome = results.read(path)
                run = _with_schedule_of(run, outcome)
                check_same(run, outcome["setting"], path)
                finished.check_complete(outcome, path)
            except ValueError as error:
                warnings.warn(str(error), stacklevel=2)
                continue
            check_identity(run, self.identities.of(run), outcome.get("identity"), path)
            self._check_base(run)
            identity = outcome.get("identity", {})
            rows.append({"run": run.name} | run.setting | outcome["metrics"] | outcome["cost"] | identity)
            if run.stage in TIMED:
                timed[run.name] = timing.timed_on(outcome)
        found = pd.DataFrame(rows)
        finished.check_one_machine(timed, self.folder)
        finished.check_one_origin(found, self.folder)
        return found

    def made_from(self, runs: Sequence[Run]) -> str:
        """Images and weights that the finished ones of the runs were made from, in words."""
        found = self.points(runs)
        parts = []
        for column, title in finished.ORIGINS.items():
            told = found[column].dropna().unique() if column in found else []
            parts += [f"{title} {', '.join(told)}"] if len(told) else []
        untold = len(found) - (found["test_images"].notna().sum() if "test_images" in found else 0)
        if untold:
            by_preset = f"{self.preset.title}, {self.preset.main.title}, says the preset"
            parts.append(f"{untold} of {len(found)} runs are older than fingerprints and do not tell ({by_preset})")
        return "; ".join(parts)

    def _check_base(self, run: Run) -> None:
        """Refuse a base model that was made from other images or weights than variables name now."""
        if run.start is None or run.stage == "base" or run.start in self._checked:
            return
        base = self.base(run.seed, self.variant_of(run))
        path = result_path(base, self.folder)
        if outcome := results.read_or_none(path):
            check_identity(base, self.identities.of(base), outcome.get("identity"), path)
        self._checked.add(run.start)

    @cached_property
    def identities(self) -> Identities:
        """Fingerprints of the images and weights that the runs are made from."""
        return Identities(self.folder, self.named)

    @cached_property
    def _checked(self) -> set[str]:
        """Names of the base models whose identity is checked."""
        return set()

    def with_schedule(self, run: Run) -> Run:
        """The run with its schedule, if it had to wait for one."""
        if run.level is None or run.keep is not None:
            return run
        return replace(run, keep=self.schedule(self.variant_of(run), run.level))

    @cached_property
    def _learned(self) -> dict[str, list[tuple[int, ...] | None]]:
        """The schedules that finished searches have learned, by the name of the variant."""
        return {
            variant.name: [
                self._learned_by(search) or self._used_with(variant, search.level) for search in self.searches(variant)
            ]
            for variant in self.variants
        }

    def _learned_by(self, search: Run) -> tuple[int, ...] | None:
        found = self.points([search])
        return None if found.empty else tuple(found.iloc[0]["learned_keep"])

    def _used_with(self, variant: Variant, level: int) -> tuple[int, ...] | None:
        """The schedule of a finished fine-tuning, for folders without the search that learned it."""
        for seed in self.seeds:
            for method in studied():
                label = run_label(variant, f"{method}-level{level}")
                path = self.folder / f"finetune-{label}-seed{seed}.json"
                setting = (results.read_or_none(path) or {"setting": {}})["setting"]  # `points` warns of broken files
                name = self.schedule_name(variant, level)
                if setting.get("keep") is not None and setting.get("schedule", name) == name:
                    return tuple(setting["keep"])
        return None

    def _is_finished(self, run: Run) -> bool:
        return not self.points([run]).empty

    def _has_weights(self, base: Run) -> bool:
        return weights_path(base.name, self.folder).exists()

    @cached_property
    def durations(self) -> Durations:
        """Estimates of what runs take."""
        return Durations(self.preset, self.variants, self.folder)

    def seconds(self, runs: Sequence[Run]) -> float:
        """Estimate of the seconds that the runs take one process."""
        return sum(self.durations.of(run) for run in runs)

    def command(self, artifact: str, *options: str) -> str:
        """The command that makes a table or figure of the study.

        Args:
            artifact: such as "figure 3a".
            options: are appended.
        """
        parts = ["python -m experiments", artifact, f"--preset {self.preset.argument}"]
        if self.folder != Path("results") / self.preset.name:
            parts.append(f"--results {self.folder}")
        if not self.full:
            parts.append("--quick")
        if "--run" in options and data_set(self.preset.data).must_be_named:
            parts.append("--data FOLDER")
        return " ".join([*parts, *options])


def _with_schedule_of(run: Run, outcome: dict[str, Any]) -> Run:
    """The run with the schedule of its result, if it waits for one. The folder may lack the search."""
    if run.level is None or run.keep is not None or run.stage == "search":
        return run
    keep = outcome["setting"].get("keep")
    return replace(run, keep=None if keep is None else tuple(keep))
