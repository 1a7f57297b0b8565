"""Paired comparison of finished runs: the difference in top-1, with a confidence interval over images and seeds."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from tokenpool.analysis import bits, results

Choice = str | Mapping[str, Any]
Pair = tuple[int, dict[int, float]]  # row of a run; rows and weights of the runs to compare it with


class Comparison(NamedTuple):
    """Difference in top-1 between two selections of runs, a minus b, on the same images.

    Attributes:
        difference: difference in percentage points, mean over pairs.
        low: lower end of the confidence interval.
        high: upper end of the confidence interval.
        p: p-value of McNemar's exact test (McNemar 1947). It compares the number of images that a classifies correctly
            more often than b with the number of images that b classifies correctly more often than a. With one pair of
            runs, it is the usual test.
        pairs: number of pairs of runs.
        seeds: number of different seeds. With one seed, the interval covers only the choice of images.
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
    """Compare two selections of runs, paired by seed, image, and schedule or cost.

    The variance of the mean difference is the sum of the variance over seeds and the variance over images, as if both
    were sampled again. The interaction of seed and image is in both variances, so the interval is conservative. The
    degrees of freedom are by Satterthwaite (1946).

    Args:
        frame: one row for each run, from `results.load` or `Study.points`, with the column `correct`.
        a: values of columns that select runs, such as {"downsampler": "wkmedoids", "level": 3}. A text selects
            {"downsampler": a, "stage": "finetune"}.
        b: the same for the runs to compare with.
        confidence: level of the interval, in 0..1.
        at: "schedule" compares runs with the same schedule (`level`). "cost" compares each run of a with the curve of b
            at the same `gmacs`, clustering included. The curve interpolates linearly between neighbouring runs of b
            with the same seed, for each image. Runs of a outside the curve are ignored.

    Returns:
        The comparison. The difference is positive if a is better.

    Raises:
        ValueError: if there is no pair, if a run matches several runs, if the runs were tested on different images or
            store no bits, or if a selection contains runs of different settings.
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
        raise ValueError(f"run {both[missing]['run'].iloc[0]} does not store which images were correct: repeat the run")
    if "test_images" in both and both["test_images"].isna().any():
        raise ValueError(
            f"run {both[both['test_images'].isna()]['run'].iloc[0]} does not store its test images: repeat the run"
        )
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
    """Find the pairs of runs that `compare` compares.

    Args:
        frame: see `compare`.
        a: see `compare`.
        b: see `compare`.
        at: see `compare`.

    Returns:
        Positions of rows in the frame, see `Pair`. The list is empty if no runs match.

    Raises:
        ValueError: if `at` is unknown, if a selection has no run, or if a run matches several runs.
    """
    if at not in ("schedule", "cost"):
        raise ValueError(f'at = {at!r} must be "schedule" or "cost"')
    frame = frame.assign(row=range(len(frame)))
    ours, theirs = (_chosen(frame, choice, unique=at == "schedule") for choice in (a, b))
    return _same_schedule(ours, theirs) if at == "schedule" else _same_cost(ours, theirs)


def _chosen(frame: pd.DataFrame, choice: Choice, unique: bool) -> pd.DataFrame:
    """Select runs, indexed by seed and level. Two runs with the same seed and level are an error.

    Without `unique`, runs without a level may share a seed: they are points of one curve, such as convolutions.
    """
    values = {"downsampler": choice, "stage": "finetune"} if isinstance(choice, str) else dict(choice)
    unknown = [name for name in values if name not in frame]
    if unknown:
        raise ValueError(f"the frame has no column {unknown[0]!r}")
    chosen = frame
    for name, value in values.items():
        chosen = chosen[[cell == value for cell in chosen[name]]]
    if chosen.empty:
        hint = "; select runs that are not fine-tuned by values of columns, in a dictionary" * isinstance(choice, str)
        raise ValueError(f"no run has {', '.join(f'{name} {value!r}' for name, value in values.items())}{hint}")
    level = chosen["level"].fillna(-1) if "level" in chosen else -1  # the plain model has none
    chosen = chosen.assign(level=level).set_index(["seed", "level"], drop=False)
    twice = chosen[chosen.index.duplicated(keep=False) & (unique | (chosen["level"] >= 0))]
    if len(twice):
        first, second = twice["run"][twice.index == twice.index[0]].iloc[:2]
        raise ValueError(f"{choice!r} selects both {first} and {second}: select by more columns")
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
                f"{first} and {second} cost the same, so they cannot be on one curve: select by more columns"
            )
        costs, rows = curve["gmacs"].to_numpy(), curve["row"].tolist()
        for run in ours[ours["seed"] == seed].itertuples():
            if costs[0] <= run.gmacs <= costs[-1]:
                pairs.append((run.row, _interpolation(run.gmacs, costs, rows)))
    return pairs


def _interpolation(cost: float, costs: np.ndarray, rows: list[int]) -> dict[int, float]:
    """Return the weights of the neighbours of a cost for linear interpolation.

    Args:
        cost: a cost within the range of `costs`.
        costs: (N,), ascending.
        rows: the row of each cost.

    Returns:
        Rows and weights of one or two neighbours.
    """
    above = int(np.searchsorted(costs, cost))
    if costs[above] == cost:
        return {rows[above]: 1.0}
    share = float((cost - costs[above - 1]) / (costs[above] - costs[above - 1]))
    return {rows[above - 1]: 1 - share, rows[above]: share}


def _bits(run: pd.Series) -> np.ndarray:
    return bits.decode(run["correct"], int(run["images"])).astype(float)


def _interval(by_seed: np.ndarray, confidence: float) -> tuple[float, float, float]:
    """Return the mean of differences (seeds, images), and the ends of its confidence interval."""
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
    """Return the exact two-sided p-value for differences (pairs, images)."""
    total = differences.sum(axis=0).round(6)  # interpolation causes rounding errors in differences that are zero
    better, worse = int((total > 0).sum()), int((total < 0).sum())
    return stats.binomtest(better, better + worse).pvalue if better + worse else 1.0
