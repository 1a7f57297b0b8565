"""Paired comparison of finished runs: the difference in top-1 with an interval that covers images and seeds."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from tokenpool.analysis import bits, results

Choice = str | Mapping[str, Any]
Pair = tuple[int, dict[int, float]]  # row of a run, and the rows and weights of the runs that it is compared with


class Comparison(NamedTuple):
    """Top-1 of one choice of runs minus that of another, on the same images.

    Attributes:
        difference: in percentage points, mean over pairs.
        low: lower end of the confidence interval.
        high: its upper end.
        p: of McNemar's exact test (McNemar 1947), by image: of the images that are right more often with the one choice
            than with the other, whether both kinds are equally many. With one pair it is the usual test.
        pairs: number of pairs of runs.
        seeds: number of different seeds. With one seed the interval covers the choice of images alone.
        images: number of images.
    """

    difference: float
    low: float
    high: float
    p: float
    pairs: int
    seeds: int
    images: int


def compare(
    frame: pd.DataFrame, a: Choice, b: Choice, confidence: float = 0.95, at: Literal["schedule", "cost"] = "schedule"
) -> Comparison:
    """Compare two choices of runs, paired by seed, image, and schedule or cost.

    The variance of the mean difference is the sum of that over seeds and that over images, as if both were drawn anew.
    Each of the two also holds what seed and image have in common, so that the interval is rather too wide than too
    narrow. Its degrees of freedom are Satterthwaite's (1946).

    Args:
        frame: one row a run, from `results.load` or `Study.points`, with the bits `correct`.
        a: values of columns that choose the runs, such as {"downsampler": "wkmedoids", "level": 3}; a text means
            {"downsampler": a, "stage": "finetune"}.
        b: the same for the runs to compare with.
        confidence: of the interval.
        at: what the runs of a pair share. "schedule": the number of the schedule (`level`). "cost": each run of a is
            compared with the curve of b at the same `gmacs`, clustering included. The curve is linear between
            neighbouring runs of b with the same seed, image by image. Runs of a outside of the curve are left out.

    Returns:
        The comparison; positive where a is better.

    Raises:
        ValueError: if no pair is left, if a run has several partners, if runs were tested on different images or store
            no bits, or if one of the choices mixes runs of different settings.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence = {confidence!r} must lie between 0 and 1")
    found = pairs(frame, a, b, at)
    if not found:
        raise ValueError(f"no runs of {a!r} and {b!r} have a seed and {at} in common")
    used = sorted({row for row, partners in found for row in (row, *partners)})
    both = frame.iloc[used]
    missing = both["correct"].isna() if "correct" in both else pd.Series(True, index=both.index)
    if missing.any():
        raise ValueError(f"run {both[missing]['run'].iloc[0]} does not store which images were right: make it anew")
    if "test_images" in both and both["test_images"].isna().any():
        raise ValueError(f"run {both[both['test_images'].isna()]['run'].iloc[0]} does not tell its test images")
    same = ["data", "test_images", "part", "limit", "images"]
    same += ["split"] if _may_be_split(both) else []
    results.check_alike(both, same, "a paired comparison")
    right = {row: _bits(frame.iloc[row]) for row in used}
    rows = [right[row] - sum(weight * right[other] for other, weight in partners.items()) for row, partners in found]
    differences = 100.0 * np.array(rows)  # (pairs, images)
    of_pairs = frame["seed"].to_numpy()[[row for row, _ in found]]
    by_seed = pd.DataFrame(differences).groupby(of_pairs).mean().to_numpy()  # (S, I)
    difference, low, high = map(float, _interval(by_seed, confidence))
    seeds, images = by_seed.shape
    return Comparison(difference, low, high, _mcnemar(differences), len(found), seeds, images)


def _may_be_split(runs: pd.DataFrame) -> bool:
    """Whether `split` may decide which images some of the runs were tested on.

    Image folders, whose runs store how images are preprocessed, are not split. Their test images are a folder.
    """
    stored = runs.get("preprocessing", pd.Series(None, index=runs.index, dtype=object))
    return bool(stored.fillna("{}").eq("{}").any())


def pairs(frame: pd.DataFrame, a: Choice, b: Choice, at: str) -> list[Pair]:
    """Which runs `compare` compares: positions of rows in the frame, see `Pair`; none where nothing fits.

    Raises:
        ValueError: if `at` is unknown, if a choice means no run, or if a run has several partners.
    """
    if at not in ("schedule", "cost"):
        raise ValueError(f'at = {at!r} must be "schedule" or "cost"')
    frame = frame.assign(row=range(len(frame)))
    ours, theirs = (_chosen(frame, choice, unique=at == "schedule") for choice in (a, b))
    return _same_schedule(ours, theirs) if at == "schedule" else _same_cost(ours, theirs)


def _chosen(frame: pd.DataFrame, choice: Choice, unique: bool) -> pd.DataFrame:
    """The runs of a choice by seed and level; with `unique` each seed and level once."""
    values = {"downsampler": choice, "stage": "finetune"} if isinstance(choice, str) else dict(choice)
    unknown = [name for name in values if name not in frame]
    if unknown:
        raise ValueError(f"the frame has no column {unknown[0]!r}")
    chosen = frame
    for name, value in values.items():
        chosen = chosen[[cell == value for cell in chosen[name]]]
    if chosen.empty:
        raise ValueError(f"no run has {', '.join(f'{name} {value!r}' for name, value in values.items())}")
    level = chosen["level"].fillna(-1) if "level" in chosen else -1  # the plain model has none
    chosen = chosen.assign(level=level).set_index(["seed", "level"], drop=False)
    twice = chosen[chosen.index.duplicated(keep=False)]
    if unique and len(twice):
        first, second = twice["run"].iloc[:2]
        raise ValueError(f"{choice!r} means both {first} and {second}: choose by more columns")
    return chosen


def _same_schedule(ours: pd.DataFrame, theirs: pd.DataFrame) -> list[Pair]:
    shared = sorted(set(ours.index) & set(theirs.index), key=str)
    return [(ours.at[key, "row"], {theirs.at[key, "row"]: 1.0}) for key in shared]


def _same_cost(ours: pd.DataFrame, theirs: pd.DataFrame) -> list[Pair]:
    pairs = []
    for seed, curve in theirs.reset_index(drop=True).groupby("seed"):
        curve = curve.sort_values("gmacs")
        if curve["gmacs"].duplicated().any():
            first, second = curve[curve["gmacs"].duplicated(keep=False)]["run"].iloc[:2]
            raise ValueError(
                f"{first} and {second} cost the same, so no curve leads through both: choose by more columns"
            )
        costs, rows = curve["gmacs"].to_numpy(), curve["row"].tolist()
        for run in ours[ours["seed"] == seed].itertuples():
            if costs[0] <= run.gmacs <= costs[-1]:
                pairs.append((run.row, interpolation(run.gmacs, costs, rows)))
    return pairs


def interpolation(cost: float, costs: np.ndarray, rows: list[int]) -> dict[int, float]:
    """Weights of the neighbours of a cost, for linear interpolation between ascending costs: {row: weight}."""
    above = int(np.searchsorted(costs, cost))
    if costs[above] == cost:
        return {rows[above]: 1.0}
    share = float((cost - costs[above - 1]) / (costs[above] - costs[above - 1]))
    return {rows[above - 1]: 1 - share, rows[above]: share}


def _bits(run: pd.Series) -> np.ndarray:
    return bits.decode(run["correct"], int(run["images"])).astype(float)


def _interval(by_seed: np.ndarray, confidence: float) -> tuple[float, float, float]:
    """Mean of differences (S, I) and the ends of its interval."""
    seeds, images = by_seed.shape
    mean = by_seed.mean()
    parts = [(by_seed.mean(axis=0).var(ddof=1) / images, images - 1)] if images > 1 else []
    parts += [(by_seed.mean(axis=1).var(ddof=1) / seeds, seeds - 1)] if seeds > 1 else []
    variance = sum(part for part, _ in parts)
    if variance == 0:
        return mean, mean, mean
    freedom = variance**2 / sum(part**2 / degrees for part, degrees in parts)
    half = stats.t.ppf((1 + confidence) / 2, freedom) * variance**0.5
    return mean, mean - half, mean + half


def _mcnemar(differences: np.ndarray) -> float:
    """Exact two-sided p of as many images better as worse; differences (pairs, I)."""
    total = differences.sum(axis=0).round(6)  # interpolation leaves rounding errors where there is no difference
    better, worse = int((total > 0).sum()), int((total < 0).sum())
    return stats.binomtest(better, better + worse).pvalue if better + worse else 1.0
