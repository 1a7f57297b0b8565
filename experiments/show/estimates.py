"""The rule by which data decide a claim of the paper, and the numbers that it is applied to.

The rule. Each claim names a target, in the paper's words: a range in which its number must lie, such as "above 0
points". A data set reproduces the claim if the whole 95 % interval lies in the target, and contradicts it if no part of
the interval does. Otherwise the claim is open. It is also open where a difference between trained models rests on one
seed, because that interval does not cover training. "As good as" means within half a point: with the same schedule,
K-Means and K-Medoids differ by up to 0.4 points in the paper's Table 3. Over all data sets, a claim is reproduced if
one data set reproduces it and none contradicts it.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

import tokenpool
from experiments.show import tables
from tokenpool.analysis import bits, comparison, pareto
from tokenpool.runs.study import Study

AS_GOOD = 0.5  # points
REPRODUCED, CONTRADICTED, OPEN, MIXED, NO_DATA = "reproduced", "contradicted", "open", "mixed", "no data"
SMOOTHNESS = {"leading_energy": 1, "neighbour_distance": -1, "mean_energy": 1}  # measures, and their sign if smoother


class Estimate(NamedTuple):
    """A number with the ends of its 95 % interval, which coincide where the number is exact.

    Attributes:
        value: the number.
        low: lower end.
        high: upper end.
        seeds: of the trained models that are compared; None for other numbers.
    """

    value: float
    low: float
    high: float
    seeds: int | None = None


class Target(NamedTuple):
    """Where the number of a claim must lie, ends excluded."""

    low: float
    high: float

    def verdict(self, found: Estimate) -> str:
        """Whether the estimate reproduces or contradicts the claim, by the rule at the top of this file."""
        if found.seeds == 1:
            return OPEN
        if self.low < found.low and found.high < self.high:
            return REPRODUCED
        return CONTRADICTED if found.high <= self.low or found.low >= self.high else OPEN

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"> {self.low:g}"
        return f"< {self.high:g}" if self.low == -math.inf else f"{self.low:g} to {self.high:g}"


ABOVE, BELOW, EQUAL = Target(0, math.inf), Target(-math.inf, 0), Target(-AS_GOOD, AS_GOOD)


def overall(verdicts: Sequence[str]) -> str:
    """The verdict over all data sets."""
    found = {verdict for verdict in verdicts if verdict in (REPRODUCED, CONTRADICTED)}
    if len(found) == 2:
        return MIXED
    return next(iter(found), OPEN if OPEN in verdicts else NO_DATA)


# Differences in top-1.


def difference(ours: pd.DataFrame, theirs: pd.DataFrame, at: str = "schedule") -> Estimate | None:
    """Top-1 of some runs minus that of others, in points, paired as in `tokenpool.compare`.

    Where runs store which images were right, the interval is that of `tokenpool.compare`. Older files do not: with
    several seeds the interval covers seeds (Student's t), and with one seed it covers the images as if both runs had
    been tested on different ones, and all pairs on the same, which is wider than it need be.

    Returns:
        The difference; None if no pair is there.
    """
    if ours.empty or theirs.empty:
        return None
    both, pairs = paired(ours, theirs, at)
    if not pairs:
        return None
    used = both.iloc[sorted({row for row, partners in pairs for row in (row, *partners)})]
    trained = bool((used["stage"] != "evaluate").any())
    if _store_bits(used):
        found = tokenpool.compare(both, *_SIDES, at=at)
        return Estimate(found.difference, found.low, found.high, found.seeds if trained else None)
    error = both["top1_error"].to_numpy(float)
    found = pd.DataFrame(
        {
            "seed": both["seed"].to_numpy()[[row for row, _ in pairs]],
            "difference": top1_differences(both, pairs),
            "error": [math.hypot(error[row], _interpolated(error, partners)) for row, partners in pairs],
        }
    )
    by_seed = found.groupby("seed").mean()
    mean, seeds = float(by_seed["difference"].mean()), len(by_seed)
    if seeds > 1:
        half = float(stats.t.ppf(0.975, seeds - 1) * by_seed["difference"].sem())
    else:
        half = float(stats.norm.ppf(0.975) * by_seed["error"].iloc[0])
    return Estimate(mean, mean - half, mean + half, seeds if trained else None)


_SIDES = {"side": "ours"}, {"side": "theirs"}


def paired(ours: pd.DataFrame, theirs: pd.DataFrame, at: str) -> tuple[pd.DataFrame, list[comparison.Pair]]:
    """One frame of both sides, and its pairs as `tokenpool.compare` forms them."""
    both = pd.concat([ours.assign(side="ours"), theirs.assign(side="theirs")], ignore_index=True)
    return both, comparison.pairs(both, *_SIDES, at)


def top1_differences(both: pd.DataFrame, pairs: Sequence[comparison.Pair]) -> list[float]:
    """Top-1 of each pair's run minus that of its partners, from `paired`."""
    top1 = both["top1"].to_numpy(float)
    return [top1[row] - _interpolated(top1, partners) for row, partners in pairs]


def _interpolated(values: np.ndarray, partners: dict[int, float]) -> float:
    return sum(weight * values[other] for other, weight in partners.items())


def _store_bits(runs: pd.DataFrame) -> bool:
    """Whether all of the runs store which images were right."""
    return "correct" in runs and bool(runs["correct"].notna().all())


def _tuned(runs: pd.DataFrame, method: str, variant: str = "", carry: bool = False, **options: object) -> pd.DataFrame:
    """The fine-tuned runs of a method."""
    rows = _of(runs, "finetune", method, carry)
    return rows[(rows["variant"] == variant) & (rows["options"].map(lambda found: found == options))]


def _of(runs: pd.DataFrame, stage: str, method: str, carry: bool = False) -> pd.DataFrame:
    chosen = (runs["stage"] == stage) & (runs["downsampler"] == method) & (runs["carry"].astype(bool) == carry)
    return runs[chosen]


def better(method: str, other: str, at: str = "schedule") -> Callable[[Study, pd.DataFrame], Estimate | None]:
    """Top-1 of a method minus that of another, fine-tuned. At equal cost the plain model ends the other's curve."""

    def estimate(study: Study, runs: pd.DataFrame) -> Estimate | None:
        theirs = _tuned(runs, other)
        if at == "cost" and len(theirs):
            theirs = pd.concat([theirs, _tuned(runs, "none")])
        return difference(_tuned(runs, method), theirs, at)

    return estimate


def against_widths(method: str) -> Callable[[Study, pd.DataFrame], Estimate | None]:
    """Top-1 of a method minus that of plain models of other widths, at equal cost."""

    def estimate(study: Study, runs: pd.DataFrame) -> Estimate | None:
        widths = _widths(study, runs)
        return difference(_tuned(runs, method), widths, "cost") if widths["variant"].nunique() > 1 else None

    return estimate


def cheap_convolutions_against_widths(study: Study, runs: pd.DataFrame) -> Estimate | None:
    """Top-1 of the best convolutions minus that of plain models of other widths, at equal cost.

    Convolutions that cost less than half of the plain model count. For their choice see `_best_convolutions`.
    """
    runs, best = _best_convolutions(runs)
    widths = _widths(study, runs)
    if widths["variant"].nunique() < 2:
        return None
    return difference(best[best["gmacs"] < 0.5 * _tuned(runs, "none")["gmacs"].max()], widths, "cost")


def _widths(study: Study, runs: pd.DataFrame, method: str = "none") -> pd.DataFrame:
    """The fine-tuned runs of a method on all models of the family, with default options."""
    names = {"", *(variant.name for variant in study.preset.family.values())}
    rows = _of(runs, "finetune", method)
    return rows[rows["variant"].isin(names) & (rows["options"].map(len) == 0)]


def _best_convolutions(runs: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The fine-tuned runs to compare, and those convolutions among them that no cheaper one equals or beats, by seed.

    The convolutions are chosen by every other test image, and the runs that are returned have the other half. Runs that
    do not store which images were right are chosen and compared by all images, in favour of convolution.
    """
    runs = runs[runs["stage"] == "finetune"]
    halves = (_on_half(runs, 0), _on_half(runs, 1)) if _store_bits(runs) else (runs, runs)
    chosen, compared = (_of(half, "finetune", "convolution") for half in halves)
    names = [name for _, of_seed in chosen.groupby("seed") for name in pareto.front(of_seed)["run"]]
    return halves[1], compared[compared["run"].isin(names)]


def above_convolution(study: Study, runs: pd.DataFrame, cheapest: float = 0.0) -> Estimate | None:
    """WK-Medoids minus the best convolutions, at equal cost, of more than a share of the plain model's."""
    runs, best = _best_convolutions(runs)
    plain = _tuned(runs, "none")
    ours = _tuned(runs, "wkmedoids")
    if best.empty:
        return None
    curve = pd.concat([best, plain[plain["seed"].isin(best["seed"])]])
    return difference(ours[ours["gmacs"] > cheapest * plain["gmacs"].max()], curve, "cost")


def _on_half(rows: pd.DataFrame, first: int) -> pd.DataFrame:
    """The rows as if every other test image had been left out."""
    right = [bits.decode(row.correct, int(row.images))[first::2] for row in rows.itertuples()]
    half = {"correct": [bits.encode(each) for each in right], "top1": [100 * each.mean() for each in right]}
    return rows.assign(**half, images=[len(each) for each in right])


def normalised(figure: str, method: str) -> Callable[[Study, pd.DataFrame], Estimate | None]:
    """Top-1 of a method with queries and keys that are normalised as in that figure, minus top-1 without."""

    def estimate(study: Study, runs: pd.DataFrame) -> Estimate | None:
        if figure not in study.preset.normalised:
            return None
        return difference(_tuned(runs, method, study.preset.normalised[figure].name), _tuned(runs, method))

    return estimate


def scored_centres(method: str) -> Callable[[Study, pd.DataFrame], Estimate | None]:
    """Top-1 of a method with initial centres by score, minus top-1 with random ones."""
    return lambda study, runs: difference(_tuned(runs, method), _tuned(runs, method, init="random"))


def training_twice(study: Study, runs: pd.DataFrame) -> Estimate | None:
    """Top-1 of the plain model after fine-tuning minus top-1 of the base model."""
    return difference(_tuned(runs, "none"), runs[(runs["stage"] == "base") & (runs["variant"] == "")])


def carried(study: Study, runs: pd.DataFrame) -> Estimate | None:
    """Top-1 of WK-Medoids with carried sizes minus top-1 without, fine-tuned."""
    return difference(_tuned(runs, "wkmedoids", carry=True), _tuned(runs, "wkmedoids"))


def carried_without_tuning(study: Study, runs: pd.DataFrame) -> Estimate | None:
    """Top-1 of WK-Medoids with carried sizes minus top-1 without, not fine-tuned."""
    return difference(_of(runs, "evaluate", "wkmedoids", True), _of(runs, "evaluate", "wkmedoids", False))


def untuned_against_selection(study: Study, runs: pd.DataFrame) -> Estimate | None:
    """Top-1 of WK-Medoids with carried sizes minus top-1 of PoWER-BERT, not fine-tuned."""
    return difference(_of(runs, "evaluate", "wkmedoids", True), _of(runs, "evaluate", "power_bert"))


def saving(study: Study, runs: pd.DataFrame) -> Estimate | None:
    """By how much WK-Medoids with the best width is cheaper than the cheapest plain model, at its accuracy (%).

    The interval holds the savings at the ends of the 95 % interval of the accuracies' difference.
    """
    runs = runs[runs["seed"].isin(study.extra_seeds)]  # which all widths have
    plain, pooled = (_widths(study, runs, method) for method in ("none", "wkmedoids"))
    if plain["variant"].nunique() < 2 or pooled.empty:
        return None
    cheapest = tables.cost_accuracy(plain).sort_values("gmacs").iloc[0]
    front = pareto.front(tables.cost_accuracy(pooled))
    spread = stats.norm.ppf(0.975) * math.hypot(cheapest["top1_error"], front["top1_error"].max())
    costs, top1 = front["gmacs"].to_numpy(), front["top1"].to_numpy()

    def saved(accuracy: float) -> float:
        if accuracy > top1[-1]:
            return -math.inf  # no pooled model is as good
        return 100 * (1 - float(np.interp(accuracy, top1, costs)) / cheapest["gmacs"])

    ends = (cheapest["top1"] + shift for shift in (0, spread, -spread))
    return Estimate(*map(saved, ends), int(pooled["seed"].nunique()))


# Other numbers.


def fully_connected(study: Study, runs: pd.DataFrame) -> Estimate:
    """Share of the plain model's multiply-adds that its fully-connected layers take (%); counted, so exact."""
    options = study.preset.model_options
    parts = tokenpool.flops.count(tokenpool.create_model(study.preset.model, **options)).parts
    share = 100 * sum(parts[part] for part in ("qkv_projections", "o_projection", "mlp")) / sum(parts.values())
    return Estimate(share, share, share)


def smoothing(study: Study, runs: pd.DataFrame) -> Estimate | None:
    """Share of the blocks whose attention's output is smoother than its values by all measures (%).

    The interval is Clopper and Pearson's (1934), over blocks.
    """
    rows = runs[runs["stage"] == "redundancy"]
    if rows.empty:
        return None
    smoother = np.all(
        [
            sign * (np.array(row[f"{name}_filtered"]) - np.array(row[f"{name}_values"])) > 0
            for _, row in rows.iterrows()
            for name, sign in SMOOTHNESS.items()
        ],
        axis=0,
    )
    found = stats.binomtest(int(smoother.sum()), len(smoother))
    interval = found.proportion_ci(0.95)
    return Estimate(100 * found.statistic, 100 * interval.low, 100 * interval.high)


def iterations(study: Study, runs: pd.DataFrame) -> Estimate | None:
    """Iterations until K-Medoids converges, mean over schedules and blocks; the interval is over images."""
    rows = runs[(runs["stage"] == "convergence") & (runs["downsampler"] == "wkmedoids")]
    if rows.empty:
        return None
    by_image = np.mean(rows["iterations"].tolist(), axis=0)
    half = stats.t.ppf(0.975, len(by_image) - 1) * by_image.std(ddof=1) / len(by_image) ** 0.5
    return Estimate(*(float(by_image.mean() + sign * half) for sign in (0, -1, 1)))


def clustering_cost(study: Study, runs: pd.DataFrame) -> Estimate | None:
    """Multiply-adds of K-Medoids' clustering as a share of K-Means', with the same schedules (%); counted, so exact."""
    rows = [_tuned(runs, method).groupby("level")["clustering_gmacs"].mean() for method in ("wkmedoids", "wkmeans")]
    shared = rows[0].index.intersection(rows[1].index)
    if shared.empty:
        return None
    share = 100 * float((rows[0][shared].sum()) / rows[1][shared].sum())
    return Estimate(share, share, share)
