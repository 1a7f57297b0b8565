"""The Pareto front of cost and quality."""

import pandas as pd

from tokenpool.analysis import results


def front(frame: pd.DataFrame, cost: str = "gmacs", quality: str = "top1") -> pd.DataFrame:
    """Return the Pareto front: the rows whose quality is higher than the quality of all cheaper rows.

    Of several rows with the same cost, the best row stays; if their quality is also the same, the first one. Rows
    without cost or quality are removed.

    Args:
        frame: one row for each configuration, all on the same data. Average over seeds first, because a front of single
            runs selects lucky seeds.
        cost: column of the cost. Lower is better.
        quality: column of the quality. Higher is better.

    Returns:
        The rows of the front, sorted by cost. The quality is strictly increasing.

    Raises:
        ValueError: if a column is missing, or if rows have different data or seeds.
    """
    for column in (cost, quality):
        if column not in frame:
            raise ValueError(f"the frame has no column {column!r}; it has {', '.join(map(str, frame.columns))}")
    frame = frame.dropna(subset=[cost, quality])
    results.check_alike(frame, results.INCOMPARABLE, "a front")
    ordered = frame.sort_values([cost, quality], ascending=[True, False], kind="stable")
    best_so_far = ordered[quality].astype(float).cummax().shift(fill_value=float("-inf"))
    return ordered[ordered[quality] > best_so_far]
