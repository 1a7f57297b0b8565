"""Finished runs, as one JSON file for each run and as a DataFrame with one row for each run."""

import json
import warnings
from collections.abc import Iterable, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import pandas as pd

from tokenpool import files
from tokenpool.moved import old_names

SECTIONS = ("setting", "metrics", "cost")
OPTIONAL = ("identity", "environment")
INCOMPARABLE = ("data", "part", "images", "seed")  # the points of one curve or front must be equal in these columns

__getattr__ = old_names(__name__)


def save(run: dict[str, Any], path: str | Path) -> None:
    """Write a finished run atomically.

    Args:
        run: JSON values. The keys "setting", "metrics" and "cost" are required and hold dictionaries. Other keys are
            allowed. Numbers must be finite, because JSON has no others.
        path: path of the file. Its folder is created if needed.

    Raises:
        ValueError: if a required key is missing, or a number is not finite.
    """
    _check(run, path)
    with files.atomic_write(path) as temporary:
        temporary.write_text(json.dumps(run, indent=1, allow_nan=False) + "\n")


def read(path: str | Path) -> dict[str, Any]:
    """Read one finished run.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is not the result of a run. The message names the file.
    """
    try:
        run = json.loads(Path(path).read_text())
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not a JSON file of a run ({error}): delete it to repeat the run") from error
    _check(run, path)
    return run


def read_or_none(path: str | Path) -> dict[str, Any] | None:
    """Read one finished run. Return None if the file is missing or broken."""
    try:
        return read(path)
    except (FileNotFoundError, ValueError):
        return None


def load(folder: str | Path, skip_broken: bool = False) -> pd.DataFrame:
    """Read all finished runs of a folder.

    Args:
        folder: folder with one JSON file for each run.
        skip_broken: skip a broken file with a warning, instead of raising.

    Returns:
        One row for each run. The columns are the entries of setting, metrics, cost and identity (fingerprints of images
        and weights; old files do not have them), all other entries that are not lists or dictionaries (such as
        `seconds`), and `run`, the name of the file.

    Raises:
        FileNotFoundError: if the folder does not exist.
        ValueError: if the folder has no run, or a JSON file that is not a run.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder of results at {folder}: give the folder with one JSON file for each run")
    rows = list(_rows(sorted(folder.glob("*.json")), skip_broken))
    if not rows:
        raise ValueError(f"{folder} holds no results: expected one JSON file for each run")
    return pd.DataFrame(rows)


def check_alike(runs: pd.DataFrame, columns: Iterable[str], purpose: str, within: Sequence[str] = ()) -> None:
    """Check that rows can be combined.

    Args:
        runs: one row for each run or configuration.
        columns: columns in which the rows must be equal. Columns that the frame does not have are skipped. An empty
            cell equals "", False and an empty dictionary or list.
        purpose: name of the combination, for the error message, such as "one curve".
        within: names of columns. Only rows that are equal in these columns are compared.

    Raises:
        ValueError: if rows differ. The message names the columns and their values.
    """
    keys = [column for column in within if column in runs]
    present = [column for column in columns if column in runs and column not in keys]
    cells = runs[[*keys, *present]].map(_comparable)
    for key, rows in cells.groupby(keys, sort=False) if keys else [((), cells)]:
        differing = {column: rows[column].drop_duplicates() for column in present}
        differing = {column: values for column, values in differing.items() if len(values) > 1}
        if differing:
            where = ", ".join(f"{name} {value}" for name, value in zip(keys, key, strict=True))
            found = "; ".join(f"{column} is {_shortened(values)}" for column, values in differing.items())
            raise ValueError(
                f"{purpose} cannot be made of rows{f' of {where}' if where else ''} that differ: {found}. Filter or "
                f"average the frame by {', '.join(differing)} first"
            )


def _comparable(value: Any) -> str:
    """Convert a cell to text. Cells that count as empty become ""."""
    if isinstance(value, dict | list | tuple):
        return json.dumps(value, sort_keys=True, default=str) if value else ""
    if value is None or value is pd.NA or value != value or value is False or str(value) == "False":
        return ""
    return f"{value:g}" if isinstance(value, Real) and not isinstance(value, bool) else str(value)


def _shortened(values: Iterable[str], most: int = 4) -> str:
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
        raise ValueError(f"{path} is not the result of a run: it lacks {', '.join(missing)}")
    wrong = [key for key in OPTIONAL if not isinstance(run.get(key, {}), dict)]
    if wrong:
        raise ValueError(f"{path} is not the result of a run: its {', '.join(wrong)} must be JSON objects")
