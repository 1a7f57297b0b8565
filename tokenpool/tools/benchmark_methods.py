"""All methods that need no training, on any model and any labelled images, at the same counted cost.

Each method has two schedules of each budget: the common family "decay", and the form that its own paper uses. The lower
divergence on one half of the images chooses between them. A third schedule can be calibrated on the same half, see
`tokenpool.calibrate`. The other half, which had no part in the choice, measures the chosen and the calibrated schedule
and compares them with a baseline, paired by image.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

import tokenpool
from tokenpool import budget, flops, hosts, schedules
from tokenpool.downsampling import REGISTRY
from tokenpool.runs.preset import Preset, Variant
from tokenpool.runs.run import Run
from tokenpool.runs.schedule_search import STAGE
from tokenpool.runs.study import Study

CHOICE, CONFIRMATION = "1/2", "2/2"  # halves of the images
COMMON = "decay"
SHARES = (0.5, 0.65, 0.8)  # of the plain model's cost
PUBLISHED = "published"  # DiffRate's own counts
CALIBRATED = "calibrated"
_SECONDS = 40.0  # of a run on 500 images on one core, until finished runs tell better


@dataclass(frozen=True)
class Plan:
    """What is run.

    Attributes:
        runs: each method with each of its schedules, on the half of the images that chooses.
        skipped: one line for each method, or schedule of a method, that cannot be run.
    """

    runs: list[Run]
    skipped: list[str]


def candidates() -> list[str]:
    """Names of the registered methods that have a schedule and need no training."""
    return [method.name for method in REGISTRY.values() if method.has_schedule and not method.learned]


def study_of(model: str, options: Mapping[str, Any], given: Sequence[float], shares: bool, folder: Path) -> Study:
    """The study of a pretrained model.

    Args:
        model: name of the timm model.
        options: of the timm model.
        given: budgets, in 10^9 multiply-adds, or shares of the plain model's cost.
        shares: whether they are shares.
        folder: for the results.

    Raises:
        ValueError: for a share that is not between 0 and 1, or a budget above the plain model's cost.
    """
    plain = tokenpool.create_model(model, **options)
    adapter, cost = hosts.of(plain), flops.count(plain).gmacs
    for value in given:
        if not 0 < value < (1 if shares else cost):
            limit = "1" if shares else f"the plain model's {cost:.4g} GMACs"
            raise ValueError(f"{'--share' if shares else '--gmacs'} {value:g} must be above 0 and below {limit}")
    budgets = tuple(float(f"{value * cost:.5g}") if shares else value for value in given)
    preset = Preset(
        name="benchmark_methods",
        title=model,
        data="imagenet",
        model=model,
        pretrained=True,
        depth=adapter.depth,
        grid=min(adapter.grid()),
        budgets=budgets,
        stands_for="",
        main=Variant("", model),
        model_options=dict(options),
        evaluation_seconds=_SECONDS,
    )
    return Study(preset, folder)


def plan(study: Study, methods: Sequence[str], limit: int = 0) -> Plan:
    """The runs on the half of the images that chooses, in the order of the budgets.

    Args:
        study: from `study_of`.
        methods: names.
        limit: number of images; 0 for all.
    """
    model = tokenpool.create_model(study.preset.model, **study.preset.model_options)
    runs, skipped = [], {}
    for gmacs in study.preset.budgets:
        for name in methods:
            try:
                for family, keep, options in _schedules(model, study.preset.model, name, gmacs):
                    runs.append(
                        _run(study, f"{name}-{family}-{gmacs:g}gmacs", limit, name, gmacs, family, keep, options)
                    )
            except ValueError as error:
                skipped[f"{name}: {error}"] = None
    return Plan(runs, list(skipped))


def plain_run(study: Study, limit: int = 0) -> Run:
    """The plain model on the half that confirms."""
    common = study.on_base(study.seeds[0])
    return Run("agreement", f"none-half{CONFIRMATION[0]}", **common, limit=limit, part=CONFIRMATION)


def _run(
    study: Study,
    label: str,
    limit: int,
    method: str,
    gmacs: float,
    family: str,
    keep: Sequence[int],
    options: dict[str, Any],
) -> Run:
    return Run(
        "agreement",
        f"{label}-half{CHOICE[0]}",
        **study.on_base(study.seeds[0]),
        downsampler=method,
        keep=tuple(keep),
        budget=gmacs,
        family=family,
        carry=True,
        limit=limit,
        part=CHOICE,
        options=options,
    )


def _schedules(
    model: nn.Module, name: str, method: str, gmacs: float
) -> Iterator[tuple[str, Sequence[int], dict[str, Any]]]:
    """The schedules of a method at a budget: family, `keep` and options of the method."""
    for family in dict.fromkeys((COMMON, REGISTRY[method].family)):
        yield family, tokenpool.schedule_for(gmacs, model, method, family), {}
    published = f"diffrate_{'_'.join(name.split('_')[:2])}"
    if method == "diffrate" and published in schedules.DIFFRATE:
        adapter = hosts.of(model)
        for learned_at in schedules.DIFFRATE[published]:
            options = {"prune": f"{published}:{learned_at}"}
            keep = schedules.diffrate(published, learned_at, math.prod(adapter.grid()), adapter.depth).merged
            cost = budget.ScheduleCost(model, REGISTRY[method].downsampler, **options)(keep) / 1e9
            if budget.MIN_SHARE * gmacs <= cost <= gmacs:
                yield PUBLISHED, keep, options
                return


def calibrations(runs: Iterable[Run]) -> list[Run]:
    """The searches for a calibrated schedule of each method and budget.

    Args:
        runs: on the half that chooses.
    """
    commons = [run for run in runs if run.family == COMMON]
    return [replace(run, stage=STAGE, label=f"{run.downsampler}-{run.budget:g}gmacs") for run in commons]


def chosen(points: pd.DataFrame) -> pd.DataFrame:
    """For each budget and method the run of lowest divergence on the half that chooses.

    Args:
        points: one row a run, from `Study.points`.
    """
    rows = points[(points["part"] == CHOICE) & (points["downsampler"] != "none")]
    return rows.loc[rows.groupby(["budget", "downsampler"], sort=False)["divergence"].idxmin()]


def confirmations(runs: Iterable[Run], points: pd.DataFrame) -> list[Run]:
    """The runs of the chosen schedules on the half that confirms.

    Args:
        runs: on the half that chooses.
        points: their rows, from `Study.points`.
    """
    names = set(chosen(points)["run"]) if len(points) else set()
    return [
        replace(run, label=f"{run.label[:-1]}{CONFIRMATION[0]}", part=CONFIRMATION) for run in runs if run.name in names
    ]


def calibrated(searches: Iterable[Run], points: pd.DataFrame) -> list[Run]:
    """The runs of the calibrated schedules on the half that confirms.

    Args:
        searches: from `calibrations`.
        points: their rows, from `Study.points`.
    """
    found = {row.run: (row.learned_keep, row.images) for row in points.itertuples()}
    runs = []
    for search in searches:
        keep, images = found[search.name]
        label = f"{search.downsampler}-{CALIBRATED}-{search.budget:g}gmacs-half{CONFIRMATION[0]}"
        source = {"family": CALIBRATED, "schedule": f"calibrated on {images:.0f} images"}
        runs.append(replace(search, stage="agreement", label=label, part=CONFIRMATION, keep=tuple(keep), **source))
    return runs


def timings(confirmed: Iterable[Run]) -> list[Run]:
    """The runs that time the chosen schedules against the plain model, in turns."""
    return [replace(run, stage="throughput", label=run.label.rpartition("-half")[0], part="") for run in confirmed]


def compared(points: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """The chosen schedules on the half that confirms, and their differences to the baseline's, paired by image.

    Args:
        points: one row a run, from `Study.points`, with the runs of `confirmations`, and perhaps of `calibrated` and
            `timings`.
        baseline: name of the method. If it has a calibrated schedule, this is the baseline.

    Returns:
        By budget and divergence, the columns: budget, downsampler, family, keep, gmacs (counted), top1, divergence,
        `top1_difference`, `top1_difference_error`, `divergence_difference`, `divergence_difference_error` (NaN for the
        baseline or without it), error (`relative_error`, summed over blocks), speed_up (NaN if not timed).

    Raises:
        ValueError: if a run costs less than 0.98 of its budget or more than the budget.
    """
    rows = points[(points["part"] == CONFIRMATION) & (points["downsampler"] != "none")]
    check_costs(rows)
    baselines = rows[rows["downsampler"] == baseline]
    is_calibrated = baselines["family"] == CALIBRATED
    references = baselines[is_calibrated | ~baselines["budget"].isin(baselines["budget"][is_calibrated])]
    by_budget = {row.budget: row for row in references.itertuples()}
    timed = points[points["stage"] == "throughput"] if "speed_up" in points else points.iloc[:0]
    speed_ups = {(row.downsampler, row.family, row.budget): row.speed_up for row in timed.itertuples()}
    found = []
    for row in rows.itertuples():
        reference = by_budget.get(row.budget)
        found.append(
            {name: getattr(row, name) for name in ("budget", "downsampler", "family", "keep", "gmacs", "top1")}
            | {"divergence": row.divergence}
            | differences(row, None if reference is None or reference.run == row.run else reference)
            | {"error": sum(np.nan if share is None else share for share in row.relative_error)}
            | {"speed_up": speed_ups.get((row.downsampler, row.family, row.budget), np.nan)}
        )
    return pd.DataFrame(found).sort_values(["budget", "divergence"], ignore_index=True)


def differences(run: Any, reference: Any) -> dict[str, float]:
    """Differences of a run to a reference, paired by image, with their standard errors.

    Args:
        run: a row of `Study.points`, with `correct` and `divergences`, one entry an image.
        reference: a row on the same images; None if there is none.

    Returns:
        `top1_difference` and `top1_difference_error` in percent, `divergence_difference` and
        `divergence_difference_error` in nats; NaN without a reference.
    """
    found = {}
    for name, column, scale in (("top1", "correct", 100.0), ("divergence", "divergences", 1.0)):
        own = scale * np.array(getattr(run, column), dtype=float)
        other = np.nan if reference is None else scale * np.array(getattr(reference, column), dtype=float)
        difference = own - other
        found[f"{name}_difference"] = difference.mean()
        found[f"{name}_difference_error"] = difference.std(ddof=1) / len(own) ** 0.5
    return found


def check_costs(points: pd.DataFrame) -> None:
    """Check that runs use their budgets.

    Raises:
        ValueError: if a run costs less than `budget.MIN_SHARE` of its budget, or more than the budget.
    """
    for row in points.itertuples():
        if not budget.MIN_SHARE * row.budget <= row.gmacs <= row.budget * (1 + 1e-9):
            raise ValueError(
                f"{row.run} costs {row.gmacs:.5g} GMACs, which is not {budget.MIN_SHARE:g} to 1 of its budget "
                f"{row.budget:g}: give another budget with --gmacs"
            )
