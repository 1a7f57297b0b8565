"""Table `claims`: each claim of the paper that data can decide, with the paper's number, ours, and a verdict.

The rule. Each claim names a target, in the paper's words: a range in which its number must lie, such as "above 0
points". A data set reproduces the claim if the whole 95 % interval lies in the target, and contradicts it if no part of
the interval does. Otherwise the claim is open. It is also open where a difference between trained models rests on one
seed, because that interval does not cover training. "As good as" means within half a point: with the same schedule,
K-Means and K-Medoids differ by up to 0.4 points in the paper's Table 3. Over all data sets, a claim is reproduced if
one data set reproduces it and none contradicts it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

import tokenpool
from experiments import published
from experiments.studies import Study, needs
from tokenpool.analysis import bits, comparison, pareto

AS_GOOD = 0.5  # points
RULE = (
    "A number reproduces the claim (yes) if its whole 95 % interval lies in the target, and contradicts it (no) if the "
    "interval lies outside. Otherwise the claim is open, as is a difference between trained models that rests on one "
    "seed. Differences are in top-1, paired by image, seed, and schedule or cost (clustering included); mean over "
    "schedules. Digits: by seed, and intervals over seeds. High and low cost: above and below half of the plain "
    "model's. Paper: ImageNet, DeiT-S, mean over its schedules, one seed, no intervals. Of so many intervals one or "
    "two miss the true number by chance."
)
REPRODUCED, CONTRADICTED, OPEN, MIXED, NO_DATA = "reproduced", "contradicted", "open", "mixed", "no data"
MARKS = {REPRODUCED: "yes", CONTRADICTED: "no", OPEN: "open"}
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
        """See the rule at the top of this file."""
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


@dataclass(frozen=True)
class Claim:
    """One claim of the paper.

    Attributes:
        text: the claim, and what its number is.
        section: of the paper, or its figure or table.
        unit: of the number.
        target: in which the number must lie.
        estimate: the number of a study from its finished runs; None where the study has no runs for it.
        paper: the paper's number in words; empty where it prints none.
    """

    text: str
    section: str
    unit: str
    target: Target
    estimate: Callable[[Study, pd.DataFrame], Estimate | None]
    paper: str = ""


def table(studies: Sequence[Study]) -> pd.DataFrame:
    """One row a claim and study: the number, its interval, and the verdict of that study alone."""
    rows = []
    for study in studies:
        runs = study.points(needs(study, "table claims"))
        for claim in claims():
            found = claim.estimate(study, runs) if len(runs) else None
            verdict = NO_DATA if found is None else claim.target.verdict(found)
            value = found or Estimate(math.nan, math.nan, math.nan)
            rows.append(
                {
                    "claim": claim.text,
                    "section": claim.section,
                    "unit": claim.unit,
                    "target": str(claim.target),
                    "paper": claim.paper,
                    "data": study.preset.name,
                    **value._asdict(),
                    "verdict": verdict,
                }
            )
    return pd.DataFrame(rows)


def overall(verdicts: Sequence[str]) -> str:
    """The verdict over all data sets."""
    found = {verdict for verdict in verdicts if verdict in (REPRODUCED, CONTRADICTED)}
    if len(found) == 2:
        return MIXED
    return next(iter(found), OPEN if OPEN in verdicts else NO_DATA)


def shown(rows: pd.DataFrame, titles: dict[str, str]) -> pd.DataFrame:
    """The rows of `table` as text, one a claim.

    Args:
        rows: from `table`.
        titles: of the data sets, by name of the preset.
    """
    text = []
    for claim, found in rows.groupby("claim", sort=False):
        first = found.iloc[0]
        cells = {titles[row.data]: _cell(row) for row in found.itertuples()}
        about = {"claim": claim, "paper": f"{first['section']}: {first['paper'] or 'no number'}"}
        target = {"target": f"{first['target']} {first['unit']}"}
        text.append(about | target | cells | {"verdict": overall(found["verdict"].tolist())})
    return pd.DataFrame(text)


def _cell(row: tuple) -> str:
    if row.verdict == NO_DATA:
        return "-"
    sign = "+" if row.unit == "points" else ""
    number = f"{row.value:{sign}.1f}"
    interval = "" if row.low == row.high else f" ({row.low:{sign}.1f}, {row.high:{sign}.1f})"
    return f"{number}{interval} {MARKS[row.verdict]}{', one seed' if row.seeds == 1 else ''}"


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
    both = pd.concat([ours.assign(side="ours"), theirs.assign(side="theirs")], ignore_index=True)
    pairs = comparison.pairs(both, {"side": "ours"}, {"side": "theirs"}, at)
    if not pairs:
        return None
    used = both.iloc[sorted({row for row, partners in pairs for row in (row, *partners)})]
    trained = bool((used["stage"] != "evaluate").any())
    if "correct" in used and used["correct"].notna().all():
        found = tokenpool.compare(both, {"side": "ours"}, {"side": "theirs"}, at=at)
        return Estimate(found.difference, found.low, found.high, found.seeds if trained else None)
    top1, error = both["top1"].to_numpy(float), both["top1_error"].to_numpy(float)
    found = pd.DataFrame(
        {
            "seed": both["seed"].to_numpy()[row],
            "difference": top1[row] - sum(weight * top1[other] for other, weight in partners.items()),
            "error": math.hypot(error[row], sum(weight * error[other] for other, weight in partners.items())),
        }
        for row, partners in pairs
    )
    by_seed = found.groupby("seed").mean()
    mean, seeds = float(by_seed["difference"].mean()), len(by_seed)
    if seeds > 1:
        half = float(stats.t.ppf(0.975, seeds - 1) * by_seed["difference"].sem())
    else:
        half = float(stats.norm.ppf(0.975) * by_seed["error"].iloc[0])
    return Estimate(mean, mean - half, mean + half, seeds if trained else None)


def _tuned(runs: pd.DataFrame, method: str, variant: str = "", carry: bool = False, **options: object) -> pd.DataFrame:
    """The fine-tuned runs of a method."""
    rows = _of(runs, "finetune", method, carry)
    return rows[(rows["variant"] == variant) & (rows["options"].map(lambda found: found == options))]


def _of(runs: pd.DataFrame, stage: str, method: str, carry: bool = False) -> pd.DataFrame:
    chosen = (runs["stage"] == stage) & (runs["downsampler"] == method) & (runs["carry"].astype(bool) == carry)
    return runs[chosen]


def _better(method: str, other: str, at: str = "schedule") -> Callable[[Study, pd.DataFrame], Estimate | None]:
    """Top-1 of a method minus that of another, fine-tuned. At equal cost the plain model ends the other's curve."""

    def estimate(study: Study, runs: pd.DataFrame) -> Estimate | None:
        theirs = _tuned(runs, other)
        if at == "cost" and len(theirs):
            theirs = pd.concat([theirs, _tuned(runs, "none")])
        return difference(_tuned(runs, method), theirs, at)

    return estimate


def _against_widths(methods: str) -> Callable[[Study, pd.DataFrame], Estimate | None]:
    """Top-1 of a method minus that of plain models of other widths, at equal cost."""

    def estimate(study: Study, runs: pd.DataFrame) -> Estimate | None:
        widths = _widths(study, runs)
        if widths["variant"].nunique() < 2:
            return None
        if methods != "convolution":
            return difference(_tuned(runs, methods), widths, "cost")
        cheap = _best_convolutions(runs)
        return difference(cheap[cheap["gmacs"] < 0.5 * _tuned(runs, "none")["gmacs"].max()], widths, "cost")

    return estimate


def _widths(study: Study, runs: pd.DataFrame) -> pd.DataFrame:
    """The fine-tuned plain models of the family."""
    names = {"", *(variant.name for variant in study.preset.family.values())}
    rows = _of(runs, "finetune", "none")
    return rows[rows["variant"].isin(names)]


def _best_convolutions(runs: pd.DataFrame) -> pd.DataFrame:
    """Those placements that no cheaper one equals or beats, by seed."""
    rows = _of(runs, "finetune", "convolution")
    fronts = [pareto.front(of_seed) for _, of_seed in rows.groupby("seed")]
    return pd.concat(fronts) if fronts else rows


def _above_convolution(study: Study, runs: pd.DataFrame, cheapest: float = 0.0) -> Estimate | None:
    """WK-Medoids minus the best convolutions, at equal cost, of more than a share of the plain model's.

    The best placements are chosen by every other test image, and compared by the rest.
    """
    ours, convolutions, plain = _tuned(runs, "wkmedoids"), _of(runs, "finetune", "convolution"), _tuned(runs, "none")
    if convolutions.empty or ours.empty:
        return None
    if "correct" in runs:
        chosen = _best_convolutions(_on_half(convolutions, 0))["run"]
        ours, convolutions, plain = (_on_half(rows, 1) for rows in (ours, convolutions, plain))
        convolutions = convolutions[convolutions["run"].isin(chosen)]
    else:
        convolutions = _best_convolutions(convolutions)
    curve = pd.concat([convolutions, plain[plain["seed"].isin(convolutions["seed"])]])
    dear = ours["gmacs"] > cheapest * _tuned(runs, "none")["gmacs"].max()
    return difference(ours[dear], curve, "cost")


def _on_half(rows: pd.DataFrame, first: int) -> pd.DataFrame:
    """The rows as if every other test image had been left out."""
    right = [bits.decode(row.correct, int(row.images))[first::2] for row in rows.itertuples()]
    half = {"correct": [bits.encode(each) for each in right], "top1": [100 * each.mean() for each in right]}
    return rows.assign(**half, images=[len(each) for each in right])


def _normalised(figure: str, method: str) -> Callable[[Study, pd.DataFrame], Estimate | None]:
    def estimate(study: Study, runs: pd.DataFrame) -> Estimate | None:
        if figure not in study.preset.normalised:
            return None
        return difference(_tuned(runs, method, study.preset.normalised[figure].name), _tuned(runs, method))

    return estimate


def _carry_without_tuning(study: Study, runs: pd.DataFrame) -> Estimate | None:
    return difference(_of(runs, "evaluate", "wkmedoids", True), _of(runs, "evaluate", "wkmedoids", False))


def _untuned_against_selection(study: Study, runs: pd.DataFrame) -> Estimate | None:
    return difference(_of(runs, "evaluate", "wkmedoids", True), _of(runs, "evaluate", "power_bert"))


def _saving(study: Study, runs: pd.DataFrame) -> Estimate | None:
    """By how much WK-Medoids with the best width is cheaper than the cheapest plain model, at its accuracy (%).

    The interval holds the savings at the ends of the 95 % interval of the accuracies' difference.
    """
    widths = _widths(study, runs)
    if widths["variant"].nunique() < 2:
        return None
    pooled = pareto.front(_of(runs, "finetune", "wkmedoids").query("seed in @study.extra_seeds"))
    plain = widths.sort_values("gmacs").iloc[0]
    spread = stats.norm.ppf(0.975) * math.hypot(plain["top1_error"], pooled["top1_error"].max())
    costs, top1 = pooled["gmacs"].to_numpy(), pooled["top1"].to_numpy()

    def saved(accuracy: float) -> float:
        if accuracy > top1[-1]:
            return -math.inf  # no pooled model is as good
        return 100 * (1 - float(np.interp(accuracy, top1, costs)) / plain["gmacs"])

    return Estimate(saved(plain["top1"]), saved(plain["top1"] + spread), saved(plain["top1"] - spread))


# Other numbers.


def _fully_connected(study: Study, runs: pd.DataFrame) -> Estimate:
    """Share of the plain model's multiply-adds that its fully-connected layers take (%); counted, so exact."""
    options = study.preset.model_options
    parts = tokenpool.flops.count(tokenpool.create_model(study.preset.model, **options)).parts
    share = 100 * sum(parts[part] for part in ("qkv_projections", "o_projection", "mlp")) / sum(parts.values())
    return Estimate(share, share, share)


def _smoothing(study: Study, runs: pd.DataFrame) -> Estimate | None:
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


def _iterations(study: Study, runs: pd.DataFrame) -> Estimate | None:
    """Iterations until K-Medoids converges, mean over schedules and blocks; the interval is over images."""
    rows = runs[(runs["stage"] == "convergence") & (runs["downsampler"] == "wkmedoids")]
    if rows.empty:
        return None
    by_image = np.mean(rows["iterations"].tolist(), axis=0)
    half = stats.t.ppf(0.975, len(by_image) - 1) * by_image.std(ddof=1) / len(by_image) ** 0.5
    return Estimate(*(float(by_image.mean() + sign * half) for sign in (0, -1, 1)))


def _clustering_cost(study: Study, runs: pd.DataFrame) -> Estimate | None:
    """Multiply-adds of K-Medoids' clustering as a share of K-Means', with the same schedules (%); counted, so exact."""
    rows = [_tuned(runs, method).groupby("level")["clustering_gmacs"].mean() for method in ("wkmedoids", "wkmeans")]
    shared = rows[0].index.intersection(rows[1].index)
    if shared.empty:
        return None
    share = 100 * float((rows[0][shared].sum()) / rows[1][shared].sum())
    return Estimate(share, share, share)


def claims() -> list[Claim]:
    """All claims, in the order of the paper."""
    return [
        Claim(
            "Fully-connected layers take over 80 % of the multiply-adds",
            "3.2, Table 1",
            "%",
            Target(80, 100),
            _fully_connected,
            _printed_shares(),
        ),
        Claim(
            "Attention smooths: blocks whose output is smoother than the values",
            "3.3",
            "%",
            Target(50, math.inf),
            _smoothing,
        ),
        Claim("WK-Medoids converges in under 5 iterations", "4", "iterations", Target(0, 5), _iterations, "< 5"),
        Claim(
            "Importance selection beats random selection",
            "5.1, Figure 5a",
            "points",
            ABOVE,
            _better("importance", "random"),
        ),
        Claim(
            "PoWER-BERT beats importance selection",
            "5.1, Figure 5a",
            "points",
            ABOVE,
            _better("power_bert", "importance"),
        ),
        Claim(
            "WK-Medoids beats PoWER-BERT with the same schedule",
            "5.1, Table 3",
            "points",
            ABOVE,
            _better("wkmedoids", "power_bert"),
            _printed("wkmedoids", "power_bert"),
        ),
        *(
            Claim(
                f"{title} beats PoWER-BERT at equal cost",
                "5.2, Table 3",
                "points",
                ABOVE,
                _better(method, "power_bert", "cost"),
                _printed(method, "power_bert", "cost"),
            )
            for method, title in _TITLES.items()
        ),
        Claim(
            "Random selection is as good as lowering the width",
            "5.1, Figure 3a",
            "points",
            EQUAL,
            _against_widths("random"),
        ),
        Claim(
            "Convolution beats lowering the width at low cost",
            "5.1, Figure 3a",
            "points",
            ABOVE,
            _against_widths("convolution"),
        ),
        Claim(
            "Convolution fails at high cost: WK-Medoids minus convolution",
            "5.1, Figures 3a and 8",
            "points",
            ABOVE,
            partial(_above_convolution, cheapest=0.5),
        ),
        Claim("WK-Medoids beats convolution at equal cost", "5.1, Figure 3a", "points", ABOVE, _above_convolution),
        Claim(
            "Weights help K-Medoids",
            "5.2, Table 3",
            "points",
            ABOVE,
            _better("wkmedoids", "kmedoids"),
            _printed("wkmedoids", "kmedoids"),
        ),
        Claim(
            "Weights help K-Means",
            "5.2, Table 3",
            "points",
            ABOVE,
            _better("wkmeans", "kmeans"),
            _printed("wkmeans", "kmeans"),
        ),
        Claim(
            "WK-Medoids is as accurate as WK-Means, or better",
            "5.2, Table 3",
            "points",
            Target(-AS_GOOD, math.inf),
            _better("wkmedoids", "wkmeans"),
            _printed("wkmedoids", "wkmeans"),
        ),
        Claim(
            "Clustering by K-Medoids is cheaper than by K-Means: share of the cost",
            "4, 5.2, Table 3",
            "%",
            Target(0, 100),
            _clustering_cost,
            _printed_clustering(),
        ),
        Claim(
            "WK-Medoids with the best width saves multiply-adds at DeiT-Ti's accuracy",
            "5.1, Figure 1b",
            "%",
            ABOVE,
            _saving,
            "42",
        ),
        Claim(
            "WK-Medoids is robust to initial centres",
            "B, Figure 6",
            "points",
            EQUAL,
            lambda study, runs: difference(_tuned(runs, "wkmedoids"), _tuned(runs, "wkmedoids", init="random")),
        ),
        Claim(
            "K-Medoids is robust to initial centres",
            "B, Figure 6",
            "points",
            EQUAL,
            lambda study, runs: difference(_tuned(runs, "kmedoids"), _tuned(runs, "kmedoids", init="random")),
        ),
        Claim(
            "Training twice helps the plain model",
            "C, Figure 7",
            "points",
            ABOVE,
            lambda study, runs: difference(
                _tuned(runs, "none"), runs[(runs["stage"] == "base") & (runs["variant"] == "")]
            ),
        ),
        Claim(
            "Without fine-tuning, carried sizes help WK-Medoids",
            "E, Figure 9",
            "points",
            ABOVE,
            _carry_without_tuning,
        ),
        Claim(
            "Without fine-tuning, WK-Medoids with carried sizes beats PoWER-BERT",
            "E, Figure 9",
            "points",
            ABOVE,
            _untuned_against_selection,
        ),
        Claim(
            "With fine-tuning, carried sizes do not matter",
            "E",
            "points",
            EQUAL,
            lambda study, runs: difference(_tuned(runs, "wkmedoids", carry=True), _tuned(runs, "wkmedoids")),
        ),
        Claim(
            "Normalised queries and keys cost accuracy with alpha = 1",
            "F, Figure 10a",
            "points",
            BELOW,
            _normalised("10a", "wkmedoids"),
        ),
        Claim(
            "Normalised queries and keys are as good with learned alpha",
            "F, Figure 10b",
            "points",
            EQUAL,
            _normalised("10b", "wkmedoids"),
        ),
    ]


_TITLES = {"kmeans": "K-Means", "kmedoids": "K-Medoids", "wkmeans": "WK-Means", "wkmedoids": "WK-Medoids"}


def _printed(method: str, other: str, at: str = "schedule") -> str:
    """The paper's difference on DeiT-S: mean over its eight schedules, and range. ImageNet, one seed, no interval."""
    rows = published.accuracies()
    rows = rows[rows["model"] == "deit_small"].assign(seed=0, run=lambda rows: rows["downsampler"])
    theirs = rows[rows["downsampler"] == other]
    if at == "cost":
        plain = published.plain_models()
        theirs = pd.concat([theirs, plain[plain["model"] == "deit_small"].assign(seed=0, run="none")])
    both = pd.concat([rows[rows["downsampler"] == method].assign(side="ours"), theirs.assign(side="theirs")])
    both = both.reset_index(drop=True)
    top1 = both["top1"].to_numpy()
    found = [
        top1[row] - sum(weight * top1[other] for other, weight in partners.items())
        for row, partners in comparison.pairs(both, {"side": "ours"}, {"side": "theirs"}, at)
    ]
    return f"{np.mean(found):+.1f}, from {min(found):+.1f} to {max(found):+.1f}"


def _printed_shares() -> str:
    parts = published.breakdown().astype(float)
    share = 100 * parts.loc[["qkv_projections", "o_projection", "mlp"]].sum() / parts.loc["total"]
    return f"{share.min():.0f} to {share.max():.0f}"


def _printed_clustering() -> str:
    rows = published.accuracies()
    cost = rows[rows["model"] == "deit_small"].groupby("downsampler")["clustering_gmacs"].sum()
    return f"{100 * cost['wkmedoids'] / cost['wkmeans']:.0f}"
