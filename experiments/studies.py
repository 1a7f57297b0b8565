"""Which runs each table and figure needs: the paper's protocol (section 5, appendices B to F) as lists of runs."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from numbers import Real
from pathlib import Path
from typing import Any

import pandas as pd

from experiments import off_the_shelf, protocol, throughput
from experiments.measurements import MEASURES
from experiments.presets import Preset, Variant
from experiments.run import NAMED, Identities, Run, check_identity, check_same, result_path, weights_path
from experiments.runner import Runner
from experiments.slurm import checks
from tokenpool import schedules
from tokenpool.analysis import results
from tokenpool.downsampling import studied


@dataclass(frozen=True)
class Study:
    """The runs of a preset, and what of them is finished in a folder.

    Attributes:
        preset: what to run.
        folder: of the results.
        full: all of it, not the quick study that `make reproduce` runs.
        named: compare the runs with the images and weights that variables name now. Without it they are shown as they
            are, such as shipped results in a notebook.
    """

    preset: Preset
    folder: Path
    full: bool = True
    named: bool = True

    @property
    def penalties(self) -> tuple[float, ...]:
        """Weights lambda of the searches; one schedule each."""
        return self.preset.full_penalties if self.full else self.preset.penalties

    @property
    def levels(self) -> range:
        """Numbers of the schedules, 0 the mildest."""
        return range(schedules.LEVELS if self.preset.main.schedules else len(self.penalties))

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds of the main runs."""
        return self.preset.full_seeds if self.full else self.preset.seeds

    @property
    def extra_seeds(self) -> tuple[int, ...]:
        """Seeds of the ablations and of the other base models."""
        return self.preset.extra_seeds if self.full else self.preset.seeds

    @property
    def placements(self) -> Sequence[tuple[int, ...]]:
        """Blocks at which convolutions are put, one to three at a time."""
        chosen = self.preset.placements
        return placements(self.preset.depth, self.preset.grid) if chosen is None else chosen

    def base(self, seed: int, variant: Variant | None = None) -> Run:
        """Stage 1: a base model."""
        variant = variant or self.preset.main
        common = self._common(seed, variant) | {"pretrained": self.preset.pretrained}
        return Run("base", variant.name, **common | {"recipe": self.preset.base_recipe})

    def searches(self, variant: Variant) -> list[Run]:
        """Stage 2: soft selection for each penalty, from the first seed's base model. All seeds share the schedules."""
        seed = self.seeds[0]
        common = self._common(seed, variant)
        return [
            Run(
                "search",
                _label(variant, f"lambda{penalty:g}"),
                **common | {"recipe": self.preset.search_recipe(penalty)},
                downsampler="soft_selection",
                level=level,
                schedule=self._schedule_name(variant, level),
                start=self.base(seed, variant).name,
            )
            for level, penalty in enumerate(self.penalties)
        ]

    def finetunes(
        self, methods: Sequence[str], seeds: Sequence[int], variant: Variant | None = None, **options: Any
    ) -> list[Run]:
        """Stage 3: each method with every schedule. `keep` is None where the search is still to be done.

        Models with normalised queries and keys use the main model's schedules.
        """
        variant = variant or self.preset.main
        chosen = "".join(f"-{value}_{name}" for name, value in options.items())
        return [
            Run(
                "finetune",
                _label(variant, f"{method}{chosen}-level{level}"),
                **self._tuned(seed, variant),
                downsampler=method,
                **self._at_level(variant, level),
                options=options,
            )
            for seed in seeds
            for method in methods
            for level in self.levels
        ]

    def plain(self, seeds: Sequence[int], variant: Variant | None = None) -> list[Run]:
        """Stage 4: the base model, fine-tuned as long as the others."""
        variant = variant or self.preset.main
        return [Run("finetune", _label(variant, "none"), **self._tuned(seed, variant)) for seed in seeds]

    def convolutions(self, seeds: Sequence[int], placements: Sequence[tuple[int, ...]]) -> list[Run]:
        """Stage 3 for convolution: at chosen blocks (appendix D)."""
        return [
            Run(
                "finetune",
                f"convolution-at{'-'.join(map(str, at))}",
                **self._tuned(seed, self.preset.main),
                downsampler="convolution",
                options={"at": list(at)},
            )
            for seed in seeds
            for at in placements
        ]

    def evaluations(self, methods: Sequence[str], carry: bool) -> list[Run]:
        """The base model with each method and schedule put in, not fine-tuned (appendix E)."""
        suffix = "-carry" if carry else ""
        runs = []
        for seed in self.extra_seeds:
            common = self.on_base(seed)
            for method in methods:
                common |= {"downsampler": method, "carry": carry}
                if method == "none":
                    runs.append(Run("evaluate", "none", **common))
                elif method == "convolution":
                    runs += [
                        Run("evaluate", f"convolution{suffix}-at{at[0]}", **common, options={"at": list(at)})
                        for at in self.placements
                        if len(at) == 1
                    ]
                else:
                    runs += [
                        Run(
                            "evaluate",
                            f"{method}{suffix}-level{level}",
                            **common,
                            **self._at_level(self.preset.main, level),
                        )
                        for level in self.levels
                    ]
        return runs

    def timings(self, methods: Sequence[str]) -> list[Run]:
        """Throughput of each method with every schedule."""
        main, common = self.preset.main, self.on_base(self.seeds[0])
        runs = []
        for method in methods:
            for level in self.levels if method != "none" else [None]:
                label = method if level is None else f"{method}-level{level}"
                chosen = {} if level is None else self._at_level(main, level)
                carry = not self.preset.trains and method in merging()  # as in the accuracies
                runs.append(Run("throughput", label, **common, **chosen, downsampler=method, carry=carry))
        return runs

    def redundancies(self) -> list[Run]:
        """Redundancy of tokens in the plain base model (section 3.3)."""
        limit = {"limit": self.preset.redundancy_images}
        return [Run("redundancy", "", **self.on_base(seed) | limit) for seed in self.extra_seeds]

    def convergences(self) -> list[Run]:
        """Iterations that K-Medoids needs in the base model, with every schedule (section 4)."""
        limit = {"limit": self.preset.redundancy_images}
        carry = not self.preset.trains  # as in the accuracies
        return [
            Run(
                "convergence",
                f"{method}-level{level}",
                **self.on_base(seed) | limit,
                **self._at_level(self.preset.main, level),
                downsampler=method,
                carry=carry,
            )
            for seed in self.extra_seeds
            for method in ("kmedoids", "wkmedoids")
            for level in self.levels
        ]

    def carried(self) -> list[Run]:
        """Stage 3 for WK-Medoids with sizes that are carried: does that matter with fine-tuning (appendix E)?"""
        return [
            Run(
                "finetune",
                f"wkmedoids-carry-level{level}",
                **self._tuned(seed, self.preset.main),
                **self._at_level(self.preset.main, level),
                downsampler="wkmedoids",
                carry=True,
            )
            for seed in self.extra_seeds
            for level in self.levels
        ]

    def clusters(self) -> list[Run]:
        """Which patches are pooled in some images, by WK-Medoids in the base model (Figure 1c)."""
        chosen = self._at_level(self.preset.main, self.preset.clustered_level)
        return [Run("clusters", "", **self.on_base(self.seeds[0]), **chosen, downsampler="wkmedoids", carry=True)]

    def on_base(self, seed: int) -> dict[str, Any]:
        """Arguments of a run on the base model as it is."""
        return self._common(seed, self.preset.main) | self._start(seed, self.preset.main)

    def schedule(self, variant: Variant, level: int) -> tuple[int, ...] | None:
        """The schedule of that level: the paper's, or as learned; None if its search is not finished."""
        searched = self._searched(variant)
        if searched.schedules:
            return tuple(schedules.paper(searched.schedules, level))
        return self._learned[searched.name][level]

    def _at_level(self, variant: Variant, level: int) -> dict[str, Any]:
        """Arguments of a run with the schedule of that level."""
        return {
            "level": level,
            "keep": self.schedule(variant, level),
            "schedule": self._schedule_name(self._searched(variant), level),
        }

    def _schedule_name(self, variant: Variant, level: int) -> str:
        """What tells the schedule of a level from that of another study."""
        return f"{variant.schedules}:{level}" if variant.schedules else f"lambda{self.penalties[level]:g}"

    def prerequisites(self, runs: Sequence[Run]) -> tuple[list[Run], list[Run]]:
        """Base models and searches that those of the runs which are not finished still need."""
        waiting = [run for run in runs if not self._is_finished(run)]
        variants = {variant.name: variant for variant in self._variants}
        searched = {
            self._searched(variants[run.variant]).name: self._searched(variants[run.variant])
            for run in waiting
            if run.level is not None and run.keep is None
        }
        searches = [run for variant in searched.values() for run in self.searches(variant)]
        searches = [run for run in searches if not self._is_finished(run)]
        needed = dict.fromkeys((run.variant, run.seed) for run in [*waiting, *searches] if run.start is not None)
        bases = [self.base(seed, variants[name]) for name, seed in needed]
        # A result without its weights is no start for others: it is made again.
        return [base for base in bases if not (self._is_finished(base) and self._has_weights(base))], searches

    def missing(self, runs: Sequence[Run]) -> list[Run]:
        """Those runs that are not finished, and what they need in turn, in the order in which they can be done."""
        bases, searches = self.prerequisites(runs)
        first = {run.name for run in bases}
        return [*bases, *searches, *(run for run in runs if not self._is_finished(run) and run.name not in first)]

    def awaited(self, run: Run) -> list[Run]:
        """What a run cannot do without, finished or not: its base model, and the search for its schedule."""
        variant = self._variant_of(run)
        needed = [self.base(run.seed, variant)] if run.start is not None else []
        searched = self._searched(variant)
        if run.level is not None and run.stage != "search" and not searched.schedules:
            needed.append(self.searches(searched)[run.level])
        return needed

    def with_awaited(self, runs: Sequence[Run]) -> list[Run]:
        """The runs, each after those that it cannot do without."""
        found: dict[str, Run] = {}
        for run in runs:
            found |= {other.name: other for other in self.with_awaited(self.awaited(run))} | {run.name: run}
        return list(found.values())

    def prepared(self, run: Run) -> Run | None:
        """The run with its schedule; None if it is finished.

        Raises:
            ValueError: if the file of its result is broken or holds another setting.
            RuntimeError: if a run that it cannot do without is not finished; the message names it.
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
        """Those runs that are finished."""
        names = set(self.points(runs).get("run", ()))
        return [run for run in runs if run.name in names]

    def check_finished(self, run: Run) -> bool:
        """Whether a run is finished. A broken file or another setting is an error: nothing is overwritten."""
        path = result_path(run, self.folder)
        if not path.exists():
            return False
        outcome = results.read(path)
        self._check_same(run, outcome, path)
        self._check_identity(run, outcome, path)
        return True

    def points(self, runs: Sequence[Run]) -> pd.DataFrame:
        """One row for each of the runs that is finished: its setting, metrics and cost, as in `results.load`.

        A broken file, or one that holds another setting, is warned of and counts as missing.

        Raises:
            ValueError: if a run was made from other images or weights than those that are named now, or the runs from
                different ones; or if runs that measure time were made on different machines; the message names both.
        """
        rows, timed = [], {}
        for run in runs:
            path = result_path(run, self.folder)
            if not path.exists():
                continue
            try:
                outcome = results.read(path)
                run = self._check_same(run, outcome, path)
                _check_complete(outcome, path)
            except ValueError as error:
                warnings.warn(str(error), stacklevel=2)
                continue
            self._check_identity(run, outcome, path)
            identity = outcome.get("identity", {})
            rows.append({"run": run.name} | run.setting | outcome["metrics"] | outcome["cost"] | identity)
            if run.stage in TIMED:
                timed[run.name] = throughput.timed_on(outcome)
        _check_one_machine(timed, self.folder)
        return _of_one_origin(pd.DataFrame(rows), self.folder)

    def made_from(self, runs: Sequence[Run]) -> str:
        """What the finished ones of the runs were made from, in words."""
        found = self.points(runs)
        parts = []
        for column, title in ORIGINS.items():
            told = found[column].dropna().unique() if column in found else []
            parts += [f"{title} {', '.join(told)}"] if len(told) else []
        untold = len(found) - (found["test_images"].notna().sum() if "test_images" in found else 0)
        if untold:
            by_preset = f"{self.preset.title}, {self.preset.main.title}, says the preset"
            parts.append(f"{untold} of {len(found)} runs are older than fingerprints and do not tell ({by_preset})")
        return "; ".join(parts)

    def _check_same(self, run: Run, outcome: dict[str, Any], path: Path) -> Run:
        """The run as it was made, with its schedule; an error if the file holds another setting."""
        run = _with_schedule_of(run, outcome)
        check_same(run, outcome["setting"], path)
        return run

    def _check_identity(self, run: Run, outcome: dict[str, Any], path: Path) -> None:
        """An error if the run, or the base model that it started from, was made from other images or weights."""
        check_identity(run, self._identities.of(run), outcome.get("identity"), path)
        if run.start is not None and run.stage != "base" and run.start not in self._checked:
            base = self.base(run.seed, self._variant_of(run))
            path = result_path(base, self.folder)
            if found := results.read_or_none(path):
                check_identity(base, self._identities.of(base), found.get("identity"), path)
            self._checked.add(run.start)

    @cached_property
    def _identities(self) -> Identities:
        return Identities(self.folder, self.named)

    @cached_property
    def _checked(self) -> set[str]:
        """Names of the base models whose identity is checked."""
        return set()

    def seconds(self, runs: Sequence[Run]) -> float:
        """Estimate of what the runs take one process: as finished ones of their kind took, else as the preset says."""
        return sum(self._estimate(run) for run in runs)

    def execute(self, runs: Sequence[Run], jobs: int) -> None:
        """Execute those of the runs that are not finished, and whatever they need, in `jobs` processes.

        Seed by seed, so that a study that is stopped early has all of the first seeds.

        Raises:
            FileNotFoundError, ValueError: before anything is trained, if data or weights are missing or wrong.
            RuntimeError: if a run fails; the message names it.
        """
        bases, searches = self.prerequisites(runs)
        for run in [*bases, *searches]:
            self.check_finished(run)
        rest = [run for run in runs if not self.check_finished(run) and run not in bases]
        order = {"base": 0, "search": 1}
        todo = sorted([*bases, *searches, *rest], key=lambda run: (run.seed, order.get(run.stage, 2)))
        trained = sum(run.stage == "base" for run in todo)
        print(
            f"{self.preset.name} in {self.folder}: {trained} base models, {len(searches)} searches for a schedule and "
            f"{len(todo) - trained - len(searches)} other runs to go, about {duration(self.seconds(todo) / jobs)} in "
            f"{jobs} processes",
            flush=True,
        )
        if not todo:
            return
        checks.check_data(todo)
        checks.check_weights(todo)
        protocol.prepare_data(todo)
        for run in todo:  # fingerprints are taken here, once, and found in the cache by all processes
            self._identities.of(run)

        def prepared(run: Run, unfinished: set[str]) -> Run | None:
            """The run with its schedule; None while another one that it needs is not finished."""
            if any(other.name in unfinished for other in self.awaited(run)):
                return None
            if run.level is None or run.keep is not None or run.stage == "search":
                return run
            return replace(self).with_schedule(run)  # which knows what has been learned meanwhile

        with Runner(self.folder, jobs, self._estimate, self.seconds(todo)) as runner:
            runner.run_all([run for run in todo if run.stage not in TIMED], prepared)
            runner.run_all([run for run in todo if run.stage in TIMED], prepared, alone=True)

    def with_schedule(self, run: Run) -> Run:
        """The run with its schedule, if it had to wait for one."""
        if run.level is None or run.keep is not None:
            return run
        return replace(run, keep=self.schedule(self._variant_of(run), run.level))

    @cached_property
    def _variants(self) -> list[Variant]:
        return [self.preset.main, *self.preset.family.values(), *self.preset.normalised.values()]

    def _variant_of(self, run: Run) -> Variant:
        return next(variant for variant in self._variants if variant.name == run.variant)

    @cached_property
    def _learned(self) -> dict[str, list[tuple[int, ...] | None]]:
        """The schedules that finished searches have learned, by the name of the variant."""
        return {
            variant.name: [
                self._learned_by(search) or self._used_with(variant, search.level) for search in self.searches(variant)
            ]
            for variant in self._variants
        }

    def _learned_by(self, search: Run) -> tuple[int, ...] | None:
        found = self.points([search])
        return None if found.empty else tuple(found.iloc[0]["learned_keep"])

    def _used_with(self, variant: Variant, level: int) -> tuple[int, ...] | None:
        """The schedule of a finished fine-tuning, where the search that it came from is gone."""
        for seed in self.seeds:
            for method in studied():
                label = _label(variant, f"{method}-level{level}")
                path = self.folder / f"finetune-{label}-seed{seed}.json"
                setting = (results.read_or_none(path) or {"setting": {}})["setting"]  # of a broken file others tell
                name = self._schedule_name(variant, level)
                if setting.get("keep") is not None and setting.get("schedule", name) == name:
                    return tuple(setting["keep"])
        return None

    def _searched(self, variant: Variant) -> Variant:
        """The variant whose schedules this one uses."""
        return self.preset.main if variant.qk_norm else variant

    def _is_finished(self, run: Run) -> bool:
        return not self.points([run]).empty

    def _has_weights(self, base: Run) -> bool:
        return weights_path(base.name, self.folder).exists()

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
        frame = frame.reindex(columns=frame.columns.union(numbers + names))  # some of which early results lack
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

    def _estimate(self, run: Run) -> float:
        typical = self._typical.get((run.stage, run.downsampler, run.variant))
        if typical is not None:
            return max(run.recipe.epochs, 1) * typical
        return self._pace * self._expected(run.variant, run.downsampler, run.recipe.epochs)

    def _expected(self, variant: str, downsampler: str, epochs: int) -> float:
        """Seconds that the preset expects of a run."""
        effort = next(each for each in self._variants if each.name == variant).effort
        if downsampler not in ("none", "soft_selection"):
            effort *= self.preset.pooled_effort
        return effort * (epochs * self.preset.epoch_seconds + self.preset.evaluation_seconds)

    @cached_property
    def _pace(self) -> float:
        """How much longer finished runs took than the preset expects: this machine may be another one."""
        taken = self._taken
        taken = taken[taken["variant"].isin([variant.name for variant in self._variants])]
        taken = taken[~taken["stage"].isin(MEASURES)] if len(taken) else taken
        expected = [self._expected(row.variant, row.downsampler, row.epochs) for row in taken.itertuples()]
        return taken["total"].sum() / sum(expected) if sum(expected) else 1.0

    def _common(self, seed: int, variant: Variant) -> dict[str, Any]:
        preset = self.preset
        return {
            "variant": variant.name,
            "data": preset.data,
            "model": variant.model or preset.model,
            "model_options": preset.model_options | variant.model_options,
            "qk_norm": variant.qk_norm,
            "alpha": variant.alpha,
            "learn_alpha": variant.learn_alpha,
            "recipe": preset.recipe,
            "trainer_options": preset.trainer_options,
            "seed": seed,
            "split": seed,
        }

    def _start(self, seed: int, variant: Variant) -> dict[str, Any]:
        return {"start": self.base(seed, variant).name} if self.preset.trains else {"pretrained": True}

    def _tuned(self, seed: int, variant: Variant) -> dict[str, Any]:
        return self._common(seed, variant) | self._start(seed, variant) | {"recipe": self.preset.finetune_recipe}


ORIGINS = {  # columns that tell what a result was made from, and what messages call them
    "test_images": "test images:",
    "pretrained_weights": "pretrained weights:",
}
WITHOUT_RUNS = ("table 1", "figure 2")
TIMED = ("throughput",)  # stages whose runs must not share the machine with others


def dropping() -> tuple[str, ...]:
    """Names of the studied methods that drop tokens, as they are registered now."""
    return studied("selection")


def merging() -> tuple[str, ...]:
    """Names of the studied methods that merge tokens, as they are registered now."""
    return studied("clustering", "matching")


def placements(depth: int, grid: int) -> list[tuple[int, ...]]:
    """All placements of convolutions that appendix D allows: one to three blocks, three of them evenly spaced.

    Args:
        depth: blocks of the model.
        grid: tokens along the shorter side: each convolution halves it, and it must not vanish.
    """
    most = min(3, grid.bit_length() - 1)
    chosen = [at for count in range(1, most + 1) for at in combinations(range(depth), count)]
    return [at for at in chosen if len(at) < 3 or at[1] - at[0] == at[2] - at[1]]


def needs(study: Study, name: str) -> list[Run]:
    """The runs that a table ("table 3") or figure ("figure 3a") draws.

    A preset that has no such runs (one that does not train has no fine-tuned models) needs none.
    """
    needed = _NEEDS[name](study) if name in _NEEDS else []
    return list({run.name: run for run in needed}.values())


def command(study: Study, name: str, *options: str) -> str:
    """The command that makes a table or figure ("figure 3a") of the study."""
    parts = ["python -m experiments", name, f"--preset {study.preset.argument}"]
    if study.folder != Path("results") / study.preset.name:
        parts.append(f"--results {study.folder}")
    if not study.full:
        parts.append("--quick")
    if "--run" in options and study.preset.data in NAMED:
        parts.append("--data FOLDER")
    return " ".join([*parts, *options])


def status(study: Study, name: str) -> tuple[str, str]:
    """Of a table or figure: "done", "partial", "missing" or "none" (this preset has no runs for it), and in words."""
    runs = needs(study, name)
    if not runs:
        return ("done", "done, needs no runs") if name in WITHOUT_RUNS else ("none", "not part of this preset")
    found = len(study.finished(runs))
    state = "done" if found == len(runs) else "partial" if found else "missing"
    return state, f"{state}, {found} of {len(runs)} runs"


def duration(seconds: float) -> str:
    """A time in words: "40 s", "8 minutes", "3.5 hours"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 6000 else f"{seconds / 3600:.1f} hours"


def protocol_runs(study: Study) -> list[Run]:
    """The protocol of section 5 on the main model: base models, and all methods fine-tuned.

    Raises:
        ValueError: for a preset that trains nothing.
    """
    if not study.preset.trains:
        raise ValueError(f"preset {study.preset.name} trains nothing; {command(study, 'figure 9', '--run')}")
    if not study.full:
        return [*_bases(study), *_main(study, study.preset.methods)]
    seeds = study.seeds if study.preset.placements is None else study.extra_seeds
    single = [at for at in study.placements if len(at) == 1]
    return [*_bases(study), *_main(study, studied()), *study.convolutions(seeds, single)]


def everything(study: Study) -> list[Run]:
    """The runs of all tables and figures of the full study, or those of the quick one."""
    if not study.full:
        return protocol_runs(study)
    needed = protocol_runs(study) if study.preset.trains else []
    needed += [run for name in _NEEDS for run in needs(study, name)]
    order = {"base": 0, "finetune": 1}
    unique = {run.name: run for run in needed}.values()
    return sorted(unique, key=lambda run: (order.get(run.stage, 2), run.seed))


_RIGHT = {"top1": Real, "top1_error": Real, "images": Real}
_METRICS = {  # that a result has by its stage, and of which type; stages that are not named here have `_RIGHT`
    "search": _RIGHT | {"learned_keep": list},
    "agreement": _RIGHT | {"divergence": Real, "correct": list, "divergences": list},
    "throughput": dict.fromkeys(("speed_up", "plain_images_per_second", "measured_batch", "threads"), Real),
    "redundancy": {"images": Real, "gaussian_difference": Real}
    | {
        f"{measure}_{signal}": list
        for measure in ("leading_energy", "neighbour_distance", "mean_energy")
        for signal in ("values", "filtered", "before", "after")
    },
    "convergence": {"images": Real, "iterations": list, "within": list},
    "clusters": {"assignments": list, "names": list, "tokens": list},
}


def _check_complete(outcome: dict[str, Any], path: Path) -> None:
    parts = (
        (outcome["metrics"], _METRICS.get(outcome["setting"].get("stage"), _RIGHT)),
        (outcome["cost"], {"gmacs": Real, "clustering_gmacs": Real}),
    )
    missing = [name for part, needed in parts for name, kind in needed.items() if not isinstance(part.get(name), kind)]
    if missing:
        raise ValueError(f"{path} is no whole result of a run: it lacks {', '.join(missing)}, or holds no values there")


def _check_one_machine(timed: dict[str, dict[str, Any]], folder: Path) -> None:
    """Refuse times of different machines: what each run's times depend on, see `experiments.throughput.timed_on`.

    Raises:
        ValueError: the message names two of the runs.
    """
    for (first, here), (second, there) in combinations(timed.items(), 2):
        found, other = throughput.differences(here, there)
        if found:
            raise ValueError(
                f"{folder} mixes times of different machines: {first} with {found}, {second} with {other}. Delete the "
                "files of one of them, or choose another folder (--results), and time all on one machine"
            )


def _of_one_origin(found: pd.DataFrame, folder: Path) -> pd.DataFrame:
    """The rows, all made from the same images and weights; those that do not tell pass.

    Raises:
        ValueError: if two were made from different ones; the message names both.
    """
    for column, title in (*ORIGINS.items(), ("start_weights", "weights to start from:")):
        if column not in found:
            continue
        groups = found.groupby("start", dropna=False) if column == "start_weights" else [("", found)]
        for _, rows in groups:
            told = rows.dropna(subset=[column]).drop_duplicates(column)
            if len(told) > 1:
                first, second = (f"{row['run']} {row[column]}" for _, row in told.iloc[:2].iterrows())
                raise ValueError(
                    f"{folder} mixes runs of different {title} {first}; {second}. Move those that do not belong here "
                    "into another folder"
                )
    return found


def _with_schedule_of(run: Run, outcome: dict[str, Any]) -> Run:
    """A run that waits for its schedule, with the one that its result was made with: the search may be gone."""
    if run.level is None or run.keep is not None or run.stage == "search":
        return run
    keep = outcome["setting"].get("keep")
    return replace(run, keep=None if keep is None else tuple(keep))


def _label(variant: Variant, label: str) -> str:
    return "-".join(filter(None, [variant.name, label]))


def _trained(needed: Callable[[Study], list[Run]]) -> Callable[[Study], list[Run]]:
    return lambda study: needed(study) if study.preset.trains else []


def _bases(study: Study) -> list[Run]:
    return [study.base(seed) for seed in study.seeds]


def _main(study: Study, methods: Sequence[str], seeds: Sequence[int] | None = None) -> list[Run]:
    """Methods on the main model, beside the plain one."""
    seeds = study.seeds if seeds is None else seeds
    return [*study.plain(seeds), *study.finetunes(methods, seeds)]


def _beside_others(study: Study, methods: Sequence[str]) -> list[Run]:
    """The same, compared with runs that exist for the extra seeds only: each point of a figure has the same seeds."""
    return _main(study, methods, study.extra_seeds)


def _family(study: Study, methods: Sequence[str], names: Sequence[str] | None = None) -> list[Run]:
    """Methods on the other models of the family that the paper downsamples, all but the smallest."""
    runs = []
    for name, variant in study.preset.family.items():
        if names is None or name in names:
            runs += study.plain(study.extra_seeds, variant)
            runs += study.finetunes(methods, study.extra_seeds, variant) if name != "deit_tiny" else []
    return runs


def _whole_family(study: Study, methods: Sequence[str]) -> list[Run]:
    return [*_beside_others(study, methods), *_family(study, methods)]


def _convolutions(study: Study) -> list[Run]:
    return study.convolutions(study.extra_seeds, study.placements)


def _twice_trained(study: Study) -> list[Run]:
    variants = [study.preset.main, *study.preset.family.values()]
    return [run for variant in variants for run in _once_and_twice(study, variant)]


def _once_and_twice(study: Study, variant: Variant) -> list[Run]:
    return [*(study.base(seed, variant) for seed in study.extra_seeds), *study.plain(study.extra_seeds, variant)]


def _normalised(study: Study, figure: str) -> list[Run]:
    if figure not in study.preset.normalised:
        return []
    variant = study.preset.normalised[figure]
    tuned = study.finetunes(("power_bert", "wkmedoids"), study.extra_seeds, variant)
    return [*_beside_others(study, ("power_bert", "wkmedoids")), *study.plain(study.extra_seeds, variant), *tuned]


def _timed(study: Study) -> list[Run]:
    """Throughput of what Figure 12 draws, and the accuracies: fine-tuned, or of the pretrained model with carry."""
    clusterings = ("wkmeans", "wkmedoids")
    if not study.preset.trains:
        accurate = [
            *study.evaluations(("none", "power_bert"), carry=False),
            *study.evaluations(clusterings, carry=True),
        ]
    else:
        accurate = _main(study, ("power_bert", *clusterings))
    return [*accurate, *study.timings(("none", "power_bert", *clusterings))]


def _not_fine_tuned(study: Study) -> list[Run]:
    return [
        *study.evaluations(("none", "convolution", *studied()), carry=False),
        *study.evaluations(("convolution", *merging()), carry=True),
    ]


def _claims(study: Study) -> list[Run]:
    """Runs of the claims of the paper: those of its figures, and two kinds that no figure shows."""
    drawn = ("1b", "3a", "5a", "5b", "6", "7", "8", "9", "10a", "10b", "redundancy")
    runs = [run for name in drawn for run in needs(study, f"figure {name}")]
    runs += _bases(study) if study.preset.trains else []
    if study.preset.data not in NAMED:
        return runs  # embedded images are too easy to decide more
    return [*runs, *(study.carried() if study.preset.trains else []), *study.convergences()]


_NEEDS: dict[str, Callable[[Study], list[Run]]] = {
    "table claims": _claims,
    "table 2": _trained(lambda study: _whole_family(study, ("power_bert", "kmedoids", "wkmedoids"))),
    "table 3": _trained(lambda study: _main(study, studied())),
    "table 4": _trained(lambda study: _family(study, ("power_bert", "kmedoids", "wkmedoids"), ["deit_e318"])),
    "table 5": _trained(lambda study: _family(study, ("power_bert", "kmedoids", "wkmedoids"), ["deit_e252"])),
    "table off_the_shelf": off_the_shelf.runs,
    "figure 1b": _trained(lambda study: _whole_family(study, ["wkmedoids"])),
    "figure 1c": lambda study: study.clusters(),
    "figure 3a": _trained(
        lambda study: [
            *_beside_others(study, (*dropping(), "wkmedoids")),
            *_family(study, ()),
            *_convolutions(study),
        ]
    ),
    "figure 3b": _trained(lambda study: _whole_family(study, ("power_bert", "wkmedoids"))),
    "figure 4": _trained(lambda study: _whole_family(study, ["wkmedoids"])),
    "figure 5a": _trained(lambda study: _main(study, (*dropping(), "wkmedoids"))),
    "figure 5b": _trained(lambda study: _main(study, ("power_bert", *merging()))),
    "figure 6": _trained(
        lambda study: [
            *_beside_others(study, ("kmedoids", "wkmedoids")),
            *study.finetunes(("kmedoids", "wkmedoids"), study.extra_seeds, init="random"),
        ]
    ),
    "figure 7": _trained(_twice_trained),
    "figure 8": _trained(lambda study: [*_beside_others(study, ["wkmedoids"]), *_convolutions(study)]),
    "figure 9": _not_fine_tuned,
    "figure 10a": _trained(lambda study: _normalised(study, "10a")),
    "figure 10b": _trained(lambda study: _normalised(study, "10b")),
    "figure 11a": _trained(lambda study: _family(study, ("power_bert", "kmedoids", "wkmedoids"), ["deit_e252"])),
    "figure 11b": _trained(lambda study: _family(study, ("power_bert", "kmedoids", "wkmedoids"), ["deit_e318"])),
    "figure 12": _timed,
    "figure reconstruction": _not_fine_tuned,
    "figure redundancy": lambda study: study.redundancies(),
}
