"""Which method, schedule and settings are best for a model that is not fine-tuned: an extension of the paper.

All settings cost the same, clustering included. They are compared on one half of the images. The other half, which had
no part in the choice, confirms it.
"""

from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from tokenpool.analysis import results
from tokenpool.runs.run import Run
from tokenpool.runs.study import Study
from tokenpool.tools.benchmark_methods import differences

REFERENCE = "tome"  # all others are compared with it
HALVES = {"1/2": "made on", "2/2": "confirmed on"}


@dataclass(frozen=True)
class Candidate:
    """One setting.

    Attributes:
        label: part of the names of its runs.
        title: in the table.
        downsampler: name of the method.
        options: of the method.
        family: of the schedules, see `tokenpool.schedule_for`.
        carry: see `tokenpool.patch`.
        finalist: whether it is run on the second half, too.
    """

    label: str
    title: str
    downsampler: str
    options: dict[str, Any] = field(default_factory=dict)
    family: str = "decay"
    carry: bool = True
    finalist: bool = False


CANDIDATES = (
    Candidate("key_medoids", "KeyMedoids", "key_medoids", finalist=True),
    Candidate("key_medoids-sizes", "KeyMedoids, weights: sizes", "key_medoids", {"weights": "sizes"}),
    Candidate("key_medoids-both", "KeyMedoids, weights: sizes x scores", "key_medoids", {"weights": "both"}),
    Candidate("key_medoids-tokens", "KeyMedoids, distances between unit tokens", "key_medoids", {"by": "tokens"}),
    Candidate("key_medoids-init", "KeyMedoids, initial centres by score", "key_medoids", {"init": "scores"}),
    Candidate("key_medoids-once", "KeyMedoids, one iteration", "key_medoids", {"iterations": 1}),
    Candidate("key_medoids-light", "KeyMedoids, sizes not carried", "key_medoids", carry=False),
    Candidate("tome", "ToMe's matching", "tome", finalist=True),
    Candidate("wkmedoids", "WK-Medoids", "wkmedoids", finalist=True),
    Candidate("kmedoids", "K-Medoids", "kmedoids", finalist=True),
    Candidate("wkmeans", "WK-Means", "wkmeans"),
    Candidate("kmeans", "K-Means", "kmeans"),
    Candidate("power_bert", "PoWER-BERT", "power_bert", finalist=True),
    Candidate("key_medoids-step", "KeyMedoids, constant steps", "key_medoids", family="step", finalist=True),
    Candidate("tome-step", "ToMe's matching, constant steps", "tome", family="step", finalist=True),
    Candidate("wkmedoids-step", "WK-Medoids, constant steps", "wkmedoids", family="step", finalist=True),
    Candidate("kmedoids-step", "K-Medoids, constant steps", "kmedoids", family="step", finalist=True),
)


def runs(study: Study) -> list[Run]:
    """Every candidate at every budget on the first half, the finalists on the second, too."""
    return [
        Run(
            "agreement",
            f"{candidate.label}-{gmacs:g}gmacs-half{part[0]}",
            **study.on_base(study.seeds[0]),
            downsampler=candidate.downsampler,
            options=candidate.options,
            budget=gmacs,
            family=candidate.family,
            carry=candidate.carry,
            part=part,
        )
        for part in HALVES
        for gmacs in study.preset.budgets
        for candidate in CANDIDATES
        if candidate.finalist or part == "1/2"
    ]


def compared(points: pd.DataFrame) -> pd.DataFrame:
    """Each setting beside the reference at the same budget and on the same half, paired by image.

    Args:
        points: one row a run, from `Study.points`.

    Returns:
        Columns: part, gmacs (the budget), candidate, counted (GMACs), top1, top1_difference, top1_difference_error (in
        percent), divergence, divergence_difference, divergence_difference_error (mean Kullback-Leibler divergence of
        the pooled model's predictions from the plain model's, in nats). Differences are to the reference with decaying
        schedules; NaN where that run is missing.

    Raises:
        ValueError: if two runs of the same label, budget and half are there, as of two seeds.
    """
    results.check_alike(points, ["seed", "split", "run"], "differences", within=["label", "budget", "part"])
    labels = {candidate.label: candidate for candidate in CANDIDATES}
    rows = []
    for row in points.itertuples():
        label = row.label.split(f"-{row.budget:g}gmacs")[0]
        reference = points[(points["part"] == row.part) & (points["budget"] == row.budget)]
        reference = reference[reference["label"].str.startswith(f"{REFERENCE}-{row.budget:g}gmacs")]
        found = {
            "part": row.part,
            "gmacs": row.budget,
            "candidate": labels[label].title,
            "counted": row.gmacs,
            "top1": row.top1,
            "divergence": row.divergence,
        }
        rows.append(found | differences(row, reference.iloc[0] if len(reference) else None))
    return pd.DataFrame(rows)
