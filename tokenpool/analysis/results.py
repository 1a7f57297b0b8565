"""Finished runs as JSON files, one run one file, and as a DataFrame, one row a run."""

import json
import warnings
from collections.abc import Iterable, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import pandas as pd

from tokenpool import files

SECTIONS = ("setting", "metrics", "cost")
OPTIONAL = ("identity", "environment")
INCOMPARABLE = ("data", "part", "images", "seed")  # columns in which the points of one curve or front may not differ


def save(run: dict[str, Any], path: str | Path) -> None:
    """Write a finished run, atomically: the file is there whole or not at all.

    Args:
        run: JSON values, with the keys "setting", "metrics" and "cost" (dictionaries) and any others. Numbers that are
            not finite are refused: JSON has none.
        path: of the file to write; its folder is made if need be.
    """
    _check(run, path)
    with files.whole(path) as temporary:
        temporary.write_text(json.dumps(run, indent=1, allow_nan=False) + "\n")


def read(path: str | Path) -> dict[str, Any]:
    """One finished run.

    Raises:
        ValueError: if the file is no result of a run; the message names it.
    """
    try:
        run = json.loads(Path(path).read_text())
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON file of a run ({error}); delete it to have the run made again") from error
    _check(run, path)
    return run


def read_if_whole(path: str | Path) -> dict[str, Any] | None:
    """One finished run; None if the file is missing or broken."""
    try:
        return read(path)
    except (FileNotFoundError, ValueError):
        return None


def load(folder: str | Path, skip_broken: bool = False) -> pd.DataFrame:
    """All finished runs of a folder, one row a run.

    The columns are the entries of the run's setting, metrics, cost and identity (fingerprints of its images and
    weights, which early files lack), all other entries that are plain values (such as `seconds`), and `run`, the name
    of its file.

    Args:
        folder: with one JSON file a run.
        skip_broken: warn of a broken file, and go on with the others, instead of raising.

    Raises:
        FileNotFoundError: if the folder does not exist.
        ValueError: if it holds no run, or a file that is none.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder of results at {folder}")
    rows = list(_rows(sorted(folder.glob("*.json")), skip_broken))
    if not rows:
        raise ValueError(f"{folder} holds no results: expected one JSON file a run")
    return pd.DataFrame(rows)


def check_alike(runs: pd.DataFrame, columns: Iterable[str], purpose: str, within: Sequence[str] = ()) -> None:
    """Whether rows that are put together are of one kind.

    Args:
        runs: one row a run or a configuration.
        columns: in which the rows may not differ; those that the frame lacks are passed over. An empty cell equals
            "", False and an empty dictionary or list.
        purpose: what is made of the rows, as the error says it.
        within: columns; only rows that are equal in them are compared.

    Raises:
        ValueError: if rows differ; the message names the columns and their values.
    """
    keys = [column for column in within if column in runs]
    present = [column for column in columns if column in runs and column not in keys]
    cells = runs[[*keys, *present]].map(_comparable)
    for key, rows in cells.groupby(keys, sort=False) if keys else [((), cells)]:
        differing = {column: rows[column].drop_duplicates() for column in present}
        differing = {column: values for column, values in differing.items() if len(values) > 1}
        if differing:
            where = ", ".join(f"{name} {value}" for name, value in zip(keys, key, strict=True))
            found = "; ".join(f"{column} is {_some(values)}" for column, values in differing.items())
            raise ValueError(
                f"{purpose} cannot be made of rows{f' of {where}' if where else ''} that differ: {found}. Filter or "
                f"average the frame first, by {', '.join(differing)}"
            )


def _comparable(value: Any) -> str:
    """A cell as text; empty where it says nothing."""
    if isinstance(value, dict | list | tuple):
        return json.dumps(value, sort_keys=True, default=str) if value else ""
    if value is None or value is pd.NA or value != value or value is False or str(value) == "False":
        return ""
    return f"{value:g}" if isinstance(value, Real) and not isinstance(value, bool) else str(value)


def _some(values: Iterable[str], most: int = 4) -> str:
    shown = [value or "empty" for value in values]
    return " or ".join([*shown[:most], *(["..."] if len(shown) > most else [])])


def _rows(paths: Iterable[Path], skip_broken: bool) -> Iterable[dict[str, Any]]:
    for path in paths:
        try:
            run = read(path)
        except ValueError as error:
            if not skip_broken:
                raise
            warnings.warn(str(error), stacklevel=3)
            continue
        plain = {key: value for key, value in run.items() if not isinstance(value, dict | list)}
        yield {"run": path.stem} | run["setting"] | run["metrics"] | run["cost"] | run.get("identity", {}) | plain


def _check(run: Any, path: str | Path) -> None:
    missing = [key for key in SECTIONS if not isinstance(run, dict) or not isinstance(run.get(key), dict)]
    if missing:
        raise ValueError(f"{path} is no result of a run: it lacks {', '.join(missing)}")
    wrong = [key for key in OPTIONAL if not isinstance(run.get(key, {}), dict)]
    if wrong:
        raise ValueError(f"{path} is no result of a run: its {', '.join(wrong)} must be JSON objects")
