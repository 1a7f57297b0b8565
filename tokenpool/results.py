"""Finished runs as JSON files, one run one file, and as a DataFrame, one row a run."""

import json
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from tokenpool import files

SECTIONS = ("setting", "metrics", "cost")


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
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
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
