"""Paired comparison of finished runs: the difference in top-1 with an interval that covers images and seeds."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from tokenpool.analysis import bits, results

Choice = str | Mapping[str, Any]


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


def compare(frame: pd.DataFrame, a: Choice, b: Choice, confidence: float = 0.95) -> Comparison:
    """Compare two choices of runs, paired by seed, schedule and image.

    The variance of the mean difference is the sum of that over seeds and that over images, as if both were drawn anew.
    Each of the two also holds what seed and image have in common, so that the interval is rather too wide than too
    narrow. Its degrees of freedom are Satterthwaite's (1946).

    Args:
        frame: one row a run, from `results.load` or `Study.points`, with the bits `correct`.
        a: values of columns that choose the runs, such as {"downsampler": "wkmedoids", "level": 3}; a text means
            {"downsampler": a, "stage": "finetune"}.
        b: the same for the runs to compare with.
        confidence: of the interval.

    Returns:
        The comparison; positive where a is better.

    Raises:
        ValueError: if no pair is left, if a run has several partners, if runs were tested on different images or store
            no bits, or if one of the choices mixes runs of different settings.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence = {confidence!r} must lie between 0 and 1")
    ours, theirs = (_chosen(frame, choice) for choice in (a, b))
    shared = sorted(set(ours.index) & set(theirs.index), key=str)
    if not shared:
        raise ValueError(f"no runs of {a!r} and {b!r} have a seed and schedule in common")
    both = pd.concat([ours.loc[shared], theirs.loc[shared]])
    if "test_images" in both and both["test_images"].isna().any():
        raise ValueError(f"run {both[both['test_images'].isna()]['run'].iloc[0]} does not tell its test images")
    same = ["data", "test_images", "part", "limit", "images"]
    same += ["split"] if "data" in both and (both["data"] == "digits").any() else []  # only the digits are split
    results.check_alike(both, same, "a paired comparison")
    rows = [100.0 * (_bits(ours.loc[key]).astype(float) - _bits(theirs.loc[key])) for key in shared]
    differences = np.array(rows)  # (pairs, images)
    by_seed = pd.DataFrame(differences).groupby(np.array([seed for seed, _ in shared])).mean().to_numpy()  # (S, I)
    difference, low, high = map(float, _interval(by_seed, confidence))
    seeds, images = by_seed.shape
    return Comparison(difference, low, high, _mcnemar(differences), len(shared), seeds, images)


def _chosen(frame: pd.DataFrame, choice: Choice) -> pd.DataFrame:
    """The runs of a choice by seed and level, each once."""
    values = {"downsampler": choice, "stage": "finetune"} if isinstance(choice, str) else dict(choice)
    unknown = [name for name in values if name not in frame]
    if unknown:
        raise ValueError(f"the frame has no column {unknown[0]!r}")
    chosen = frame
    for name, value in values.items():
        chosen = chosen[[cell == value for cell in chosen[name]]]
    if chosen.empty:
        raise ValueError(f"no run has {', '.join(f'{name} {value!r}' for name, value in values.items())}")
    missing = chosen["correct"].isna() if "correct" in chosen else pd.Series(True, index=chosen.index)
    if missing.any():
        raise ValueError(f"run {chosen[missing]['run'].iloc[0]} does not store which images were right: make it anew")
    level = chosen["level"].fillna(-1) if "level" in chosen else -1  # the plain model has none
    chosen = chosen.assign(level=level).set_index(["seed", "level"], drop=False)
    twice = chosen[chosen.index.duplicated(keep=False)]
    if len(twice):
        first, second = twice["run"].iloc[:2]
        raise ValueError(f"{choice!r} means both {first} and {second}: choose by more columns")
    return chosen


def _bits(run: pd.Series) -> np.ndarray:
    return bits.decode(run["correct"], int(run["images"]))


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
    total = differences.sum(axis=0)
    better, worse = int((total > 0).sum()), int((total < 0).sum())
    return stats.binomtest(better, better + worse).pvalue if better + worse else 1.0
