"""Figures as pictures of finished runs."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pandas as pd

from tokenpool import plotting


def pareto(table: pd.DataFrame, path: Path) -> list[Path]:
    """Cost against accuracy for every method, from the table of `tables.cost_accuracy`; returns the files written."""
    points = table[table["stage"] == "finetune"]
    ax = plotting.cost_accuracy(points)
    seeds, images = sorted({int(n) for n in points["seeds"]}), int(points["images"].iloc[0])
    counted = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    ax.set_title(f"{images} test images, {counted} seed{'s' if seeds != [1] else ''}; bars: standard error", fontsize=9)
    files = [path.with_suffix(suffix) for suffix in (".png", ".pdf")]
    for file in files:
        # Without the date, the same runs give the same file.
        ax.figure.savefig(file, dpi=200, metadata={"CreationDate": None} if file.suffix == ".pdf" else None)
    plt.close(ax.figure)
    return files
