"""The front of best trade-offs between cost and quality."""

import pandas as pd

from tokenpool.analysis import results


def front(frame: pd.DataFrame, cost: str = "gmacs", quality: str = "top1") -> pd.DataFrame:
    """The rows that no cheaper row equals or beats: lowest cost first, quality rising strictly.

    Of rows equal in cost the best one stays, of rows equal in both the first; rows that lack either value are left out.

    Args:
        frame: one row a configuration, all of the same data. Seeds are to be averaged before: the front of single runs
            is one of the luckiest seeds.
        cost: column of the cost, the lower the better.
        quality: column of the quality, the higher the better.

    Raises:
        ValueError: if a column is missing, or rows are of different data or seeds.
    """
    for column in (cost, quality):
        if column not in frame:
            raise ValueError(f"no column {column!r}; there are {', '.join(map(str, frame.columns))}")
    frame = frame.dropna(subset=[cost, quality])
    results.check_alike(frame, results.INCOMPARABLE, "a front")
    ordered = frame.sort_values([cost, quality], ascending=[True, False], kind="stable")
    best_so_far = ordered[quality].astype(float).cummax().shift(fill_value=float("-inf"))
    return ordered[ordered[quality] > best_so_far]
