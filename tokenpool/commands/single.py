"""One run, as a command makes it: its schedule, the names of its files, and its outcome in words."""

import os
import sys
from pathlib import Path
from typing import Any

import tokenpool
from tokenpool.analysis import results
from tokenpool.runs import execute, pool
from tokenpool.runs.run import Run, is_finished, result_path


def make(run: Run, folder: Path) -> None:
    """Make a run that is not finished, and print its outcome."""
    path = result_path(run, folder)
    with pool.exclusive(folder):
        if is_finished(run, folder):
            print("finished already:")
            outcome = results.read(path)
        else:
            outcome = execute.execute(run, folder, progress=True)
    metrics, cost = outcome["metrics"], outcome["cost"]
    if "warning" in outcome:
        print(f"warning: {outcome['warning']}", file=sys.stderr)
    images = f"{metrics['images']} images"
    if "among_classes" in outcome:
        images += f", among {len(outcome['among_classes'])} of the model's classes"
    more = f"top-5 {metrics['top5']:.2f} %" if "top5" in metrics else f"divergence {metrics['divergence']:.4f}"
    print(
        f"top-1 {metrics['top1']:.2f} ± {metrics['top1_error']:.2f} %, {more} of "
        f"{images}; {cost['gmacs']:.4g} GMACs, of which clustering {cost['clustering_gmacs']:.4g}"
    )
    print(f"result: {path}")


def plain_name(name: str) -> str:
    """The part of the names of files that the user gives.

    Raises:
        ValueError: if it has a separator of paths.
    """
    if os.sep in name:
        raise ValueError(f"--name {name} must be a name without {os.sep}: --output names the folder")
    return name


def start_path(path: Path | None) -> str | None:
    """A path with a separator, because a start without one is the name of a run."""
    if path is None:
        return None
    return str(path) if os.sep in str(path) else f".{os.sep}{path}"


def schedule(
    keep: str | None, gmacs: float | None, downsampler: str, model: str, options: Any, model_options: Any
) -> tuple[int, ...] | None:
    """The schedule that --keep or --gmacs means for this model."""
    if keep is None and gmacs is None:
        return None
    # A model without weights, for its size. Carried sizes change no schedule.
    built = tokenpool.create_model(model, downsampler, keep, gmacs=gmacs, carry=False, **options, **model_options)
    setting = tokenpool.hosts.of(built).setting
    return None if setting is None else setting.keep


def file_name(keep: str | None, gmacs: float | None) -> str:
    """The part of the names of files that --keep or --gmacs stands for."""
    if gmacs is not None:
        return f"{gmacs:g}gmacs"
    text = (keep or "").replace(":", "-level").replace(",", "_").replace("@", "at")
    return f"step{text[1:]}" if text.startswith("-") else text
