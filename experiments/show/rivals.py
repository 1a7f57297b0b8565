"""Table of fine-tuned methods of other papers beside the paper's methods, paired with WK-Medoids."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pandas as pd

from experiments import needed
from experiments.show.tables import cost_accuracy, how_many
from tokenpool.analysis import comparison, plotting
from tokenpool.runs.run import Run
from tokenpool.runs.study import Study
from tokenpool.tools.sections import Section

REFERENCE = "wkmedoids"
At = Literal["schedule", "cost"]
_BOTH: tuple[At, ...] = ("schedule", "cost")
_ENDS = ("difference", "low", "high", "pairs")
_NOTE = (
    "Difference: top-1 minus WK-Medoids', in percentage points, paired by image and seed, with its 95 % interval over "
    "{over}. At the same schedule, both keep the same numbers of tokens. At the same cost, the reference is the curve "
    "of WK-Medoids, interpolated between its schedules; runs outside of its range are left out. GMACs include "
    "clustering and predictors. Sizes are carried (proportional attention) where a method's own paper trains in this "
    "way: {carried}."
)


def sections(study: Study, found: pd.DataFrame) -> list[Section]:
    """Each method over all its schedules, and each method at each schedule; nothing without finished runs.

    Args:
        study: whose runs they are.
        found: the finished ones of `needed.rivals`, from `Study.points`.
    """
    wanted = needed.rivals(study)
    if found.empty or not wanted:
        return []
    schedules, methods = by_schedule(found), by_method(found)
    notes = (how_many(schedules), _explained(found))
    title = f"Methods of other papers, fine-tuned. {study.preset.title}, {study.preset.main.title}"
    name, missing = study.preset.name, _missing(wanted, found)
    return [
        Section(f"{name}-methods", f"{title}: mean over schedules", _shown_methods(methods), methods, notes),
        Section(name, f"{title}: each schedule", _shown_schedules(schedules), schedules, (*notes, *missing)),
    ]


def by_schedule(found: pd.DataFrame) -> pd.DataFrame:
    """One row for each method and schedule or placement.

    Args:
        found: one row a run, from `Study.points`. All runs are fine-tuned.

    Returns:
        The table of `cost_accuracy`, with the columns `schedule_difference`, `schedule_low`, `schedule_high` and
        `schedule_pairs` of the comparison with WK-Medoids at the same schedule, and the same with `cost_` at the same
        cost. They are NaN without a partner, and for WK-Medoids itself.
    """
    rows = cost_accuracy(found)
    return rows.join(
        pd.DataFrame([_compared(found, {"label": row.label}, row.downsampler) for row in rows.itertuples()])
    )


def by_method(found: pd.DataFrame) -> pd.DataFrame:
    """One row for each method but the plain model and WK-Medoids, over all its finished schedules.

    Args:
        found: see `by_schedule`.

    Returns:
        `downsampler`, and the columns of the comparisons as in `by_schedule`.
    """
    names = [name for name in found["downsampler"].drop_duplicates() if name not in ("none", REFERENCE)]
    rows = [{"downsampler": name} | _compared(found, {"downsampler": name}, name) for name in names]
    return pd.DataFrame(rows, columns=["downsampler", *(f"{at}_{end}" for at in _BOTH for end in _ENDS)])


def _compared(found: pd.DataFrame, chosen: Mapping[str, Any], method: str) -> dict[str, float]:
    return {f"{at}_{end}": value for at in _BOTH for end, value in _difference(found, chosen, method, at).items()}


def _difference(found: pd.DataFrame, chosen: Mapping[str, Any], method: str, at: At) -> dict[str, float]:
    """Compare the chosen runs of a method with WK-Medoids; NaN without a pair."""
    reference = {"downsampler": REFERENCE}
    placed = found.loc[found["downsampler"] == method, "level"].isna().all()  # such methods have no schedule to share
    nothing = method in ("none", REFERENCE) or (at == "schedule" and placed)
    if nothing or REFERENCE not in set(found["downsampler"]) or not comparison.pairs(found, chosen, reference, at):
        return dict.fromkeys(_ENDS, float("nan"))
    result = comparison.compare(found, chosen, reference, at=at)
    return {end: getattr(result, end) for end in _ENDS}


def _shown_methods(rows: pd.DataFrame) -> pd.DataFrame:
    text = pd.DataFrame({"method": [_label(name) for name in rows["downsampler"]]})
    for at in _BOTH:
        text[f"difference, same {at}"] = _intervals(rows, at)
        text[f"runs at the same {at}"] = ["-" if pd.isna(n) else str(int(n)) for n in rows[f"{at}_pairs"]]
    return text


def _shown_schedules(rows: pd.DataFrame) -> pd.DataFrame:
    scale, prefix = plotting.unit(rows["gmacs"].max())
    return pd.DataFrame(
        {
            "method": [_label(name) for name in rows["downsampler"]],
            "schedule": [_place(row) for row in rows.itertuples()],
            f"{prefix}MACs": [f"{scale * gmacs:.3f}" for gmacs in rows["gmacs"]],
            "top-1 (%)": [f"{row.top1:.1f} ± {row.top1_error:.1f}" for row in rows.itertuples()],
            "difference, same schedule": _intervals(rows, "schedule"),
            "difference, same cost": _intervals(rows, "cost"),
        }
    )


def _intervals(rows: pd.DataFrame, at: At) -> list[str]:
    ends = zip(*(rows[f"{at}_{end}"] for end in ("difference", "low", "high")), strict=True)
    return ["-" if pd.isna(mean) else f"{mean:+.1f} ({low:+.1f}, {high:+.1f})" for mean, low, high in ends]


def _label(method: str) -> str:
    return plotting.STYLES[method]["label"].removesuffix(" (extension)").replace("Token Pooling, ", "")


def _place(row: Any) -> str:
    if row.level is not None:
        return str(int(row.level))
    at = row.options.get("at") if row.options else None
    return f"after block {', '.join(str(block + 1) for block in at)}" if at else ""


def _explained(found: pd.DataFrame) -> str:
    seeds = sorted(found["seed"].unique())
    over = "images and seeds" if len(seeds) > 1 else f"images only, because there is one seed ({seeds[0]})"
    carried = found.loc[found["carry"].astype(bool), "downsampler"].drop_duplicates()
    return _NOTE.format(over=over, carried=", ".join(map(_label, carried)) or "none of the finished runs")


def _missing(wanted: Sequence[Run], found: pd.DataFrame) -> list[str]:
    """A note that counts the unfinished runs by method; empty if there are none."""
    lacking = pd.Series([run.downsampler for run in wanted if run.name not in set(found["run"])], dtype=object)
    if lacking.empty:
        return []
    of_all = pd.Series([run.downsampler for run in wanted]).value_counts()
    counts = [f"{_label(name)} {n} of {of_all[name]}" for name, n in lacking.value_counts(sort=False).items()]
    return [f"Runs that are missing: {', '.join(counts)}."]
