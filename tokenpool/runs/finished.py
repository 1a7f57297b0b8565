"""Whether stored results are complete, and whether several of them may stand in one table."""

from itertools import combinations
from numbers import Real
from pathlib import Path
from typing import Any

import pandas as pd

from tokenpool.runs import timing

ORIGINS = {  # columns of the images and weights that a result was made from, and their names in messages
    "test_images": "test images:",
    "pretrained_weights": "pretrained weights:",
}
_RIGHT = {"top1": Real, "top1_error": Real, "images": Real}
_METRICS = {  # names and types of the metrics of each stage; other stages have `_RIGHT`
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
    "calibration": {"learned_keep": list, "images": Real},
    "clusters": {"assignments": list, "names": list, "tokens": list},
}


def check_complete(outcome: dict[str, Any], path: Path) -> None:
    """Check that a stored result has all metrics and costs of its stage.

    Raises:
        ValueError: if it lacks some; the message names the file and what is missing.
    """
    parts = (
        (outcome["metrics"], _METRICS.get(outcome["setting"].get("stage"), _RIGHT)),
        (outcome["cost"], {"gmacs": Real, "clustering_gmacs": Real}),
    )
    missing = [name for part, needed in parts for name, kind in needed.items() if not isinstance(part.get(name), kind)]
    if missing:
        raise ValueError(f"{path} is no whole result of a run: it lacks {', '.join(missing)}, or holds no values there")


def check_one_machine(timed: dict[str, dict[str, Any]], folder: Path) -> None:
    """Refuse times of different machines.

    Args:
        timed: what the times of each run depend on, see `tokenpool.runs.timing.timed_on`.
        folder: of the results.

    Raises:
        ValueError: the message names two of the runs.
    """
    for (first, here), (second, there) in combinations(timed.items(), 2):
        found, other = timing.differences(here, there)
        if found:
            raise ValueError(
                f"{folder} mixes times of different machines: {first} with {found}, {second} with {other}. Delete the "
                "files of one of them, or choose another folder (--results), and time all on one machine"
            )


def check_one_origin(found: pd.DataFrame, folder: Path) -> None:
    """Check that all rows were made from the same images and weights. Older results, which do not tell, pass.

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
