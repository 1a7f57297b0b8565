"""Table `claims`: each claim of the paper that data can decide, with the paper's number, ours, and a verdict.

`experiments.show.estimates` has the rule. To add a claim, add one `Claim` to `claims`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd

from experiments.show import estimates, published
from experiments.show.estimates import (
    ABOVE,
    AS_GOOD,
    BELOW,
    CONTRADICTED,
    EQUAL,
    NO_DATA,
    OPEN,
    REPRODUCED,
    Estimate,
    Target,
    overall,
)
from experiments.show.tables import Source
from tokenpool.runs.study import Study
from tokenpool.tools.sections import Section

RULE = (
    "A number reproduces the claim (yes) if its whole 95 % interval lies in the target, and contradicts it (no) if the "
    "interval lies outside. Otherwise the claim is open, as is a difference between trained models that rests on one "
    "seed. Differences are in top-1, paired by image, seed, and schedule or cost (clustering included); mean over "
    "schedules. Digits: by seed, and intervals over seeds. High and low cost: above and below half of the plain "
    "model's. Paper: ImageNet, DeiT-S, mean over its schedules, one seed, no intervals. Of so many intervals one or "
    "two miss the true number by chance."
)
MARKS = {REPRODUCED: "yes", CONTRADICTED: "no", OPEN: "open"}


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


def sections(sources: Sequence[Source]) -> list[Section]:
    """The table of the claims, from several studies at once; empty where none of them has runs."""
    rows = table(sources)
    found = rows[rows["verdict"] != NO_DATA]["data"].unique() if len(rows) else []
    if not len(found):
        return []
    titles = {study.preset.name: study.preset.title for study, _ in sources if study.preset.name in found}
    rows = rows[rows["data"].isin(found)].reset_index(drop=True)
    name = found[0] if len(found) == 1 else "all"
    return [Section(name, "The paper's claims", shown(rows, titles), rows, (RULE,))]


def table(sources: Sequence[Source]) -> pd.DataFrame:
    """One row a claim and study: the number, its interval, and the verdict of that study alone."""
    rows = []
    for study, runs in sources:
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


def claims() -> list[Claim]:
    """All claims, in the order of the paper."""
    return [
        Claim(
            "Fully-connected layers take over 80 % of the multiply-adds",
            "3.2, Table 1",
            "%",
            Target(80, 100),
            estimates.fully_connected,
            _printed_shares(),
        ),
        Claim(
            "Attention smooths: blocks whose output is smoother than the values",
            "3.3",
            "%",
            Target(50, math.inf),
            estimates.smoothing,
        ),
        Claim(
            "WK-Medoids converges in under 5 iterations", "4", "iterations", Target(0, 5), estimates.iterations, "< 5"
        ),
        Claim(
            "Importance selection beats random selection",
            "5.1, Figure 5a",
            "points",
            ABOVE,
            estimates.better("importance", "random"),
        ),
        Claim(
            "PoWER-BERT beats importance selection",
            "5.1, Figure 5a",
            "points",
            ABOVE,
            estimates.better("power_bert", "importance"),
        ),
        Claim(
            "WK-Medoids beats PoWER-BERT with the same schedule",
            "5.1, Table 3",
            "points",
            ABOVE,
            estimates.better("wkmedoids", "power_bert"),
            _printed("wkmedoids", "power_bert"),
        ),
        *(
            Claim(
                f"{title} beats PoWER-BERT at equal cost",
                "5.2, Table 3",
                "points",
                ABOVE,
                estimates.better(method, "power_bert", "cost"),
                _printed(method, "power_bert", "cost"),
            )
            for method, title in _TITLES.items()
        ),
        Claim(
            "Random selection is as good as lowering the width",
            "5.1, Figure 3a",
            "points",
            EQUAL,
            estimates.against_widths("random"),
        ),
        Claim(
            "Convolution beats lowering the width at low cost",
            "5.1, Figure 3a",
            "points",
            ABOVE,
            estimates.cheap_convolutions_against_widths,
        ),
        Claim(
            "Convolution fails at high cost: WK-Medoids minus convolution",
            "5.1, Figures 3a and 8",
            "points",
            ABOVE,
            partial(estimates.above_convolution, cheapest=0.5),
        ),
        Claim(
            "WK-Medoids beats convolution at equal cost", "5.1, Figure 3a", "points", ABOVE, estimates.above_convolution
        ),
        Claim(
            "Weights help K-Medoids",
            "5.2, Table 3",
            "points",
            ABOVE,
            estimates.better("wkmedoids", "kmedoids"),
            _printed("wkmedoids", "kmedoids"),
        ),
        Claim(
            "Weights help K-Means",
            "5.2, Table 3",
            "points",
            ABOVE,
            estimates.better("wkmeans", "kmeans"),
            _printed("wkmeans", "kmeans"),
        ),
        Claim(
            "WK-Medoids is as accurate as WK-Means, or better",
            "5.2, Table 3",
            "points",
            Target(-AS_GOOD, math.inf),
            estimates.better("wkmedoids", "wkmeans"),
            _printed("wkmedoids", "wkmeans"),
        ),
        Claim(
            "Clustering by K-Medoids is cheaper than by K-Means: share of the cost",
            "4, 5.2, Table 3",
            "%",
            Target(0, 100),
            estimates.clustering_cost,
            _printed_clustering(),
        ),
        Claim(
            "WK-Medoids with the best width saves multiply-adds at DeiT-Ti's accuracy",
            "5.1, Figure 1b",
            "%",
            ABOVE,
            estimates.saving,
            "42",
        ),
        Claim(
            "WK-Medoids is robust to initial centres",
            "B, Figure 6",
            "points",
            EQUAL,
            estimates.scored_centres("wkmedoids"),
        ),
        Claim(
            "K-Medoids is robust to initial centres",
            "B, Figure 6",
            "points",
            EQUAL,
            estimates.scored_centres("kmedoids"),
        ),
        Claim(
            "Training twice helps the plain model",
            "C, Figure 7",
            "points",
            ABOVE,
            estimates.training_twice,
        ),
        Claim(
            "Without fine-tuning, carried sizes help WK-Medoids",
            "E, Figure 9",
            "points",
            ABOVE,
            estimates.carried_without_tuning,
        ),
        Claim(
            "Without fine-tuning, WK-Medoids with carried sizes beats PoWER-BERT",
            "E, Figure 9",
            "points",
            ABOVE,
            estimates.untuned_against_selection,
        ),
        Claim(
            "With fine-tuning, carried sizes do not matter",
            "E",
            "points",
            EQUAL,
            estimates.carried,
        ),
        Claim(
            "Normalised queries and keys cost accuracy with alpha = 1",
            "F, Figure 10a",
            "points",
            BELOW,
            estimates.normalised("10a", "wkmedoids"),
        ),
        Claim(
            "Normalised queries and keys are as good with learned alpha",
            "F, Figure 10b",
            "points",
            EQUAL,
            estimates.normalised("10b", "wkmedoids"),
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
    found = estimates.top1_differences(*estimates.paired(rows[rows["downsampler"] == method], theirs, at))
    return f"{np.mean(found):+.1f}, from {min(found):+.1f} to {max(found):+.1f}"


def _printed_shares() -> str:
    parts = published.breakdown().astype(float)
    share = 100 * parts.loc[["qkv_projections", "o_projection", "mlp"]].sum() / parts.loc["total"]
    return f"{share.min():.0f} to {share.max():.0f}"


def _printed_clustering() -> str:
    rows = published.accuracies()
    cost = rows[rows["model"] == "deit_small"].groupby("downsampler")["clustering_gmacs"].sum()
    return f"{100 * cost['wkmedoids'] / cost['wkmeans']:.0f}"
