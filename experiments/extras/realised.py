"""Realised fractions of all backends: the first table and figure of docs/results/speed.md.

`python -m experiments.extras.realised` reads results/throughput/backends, prints the table and draws the figure.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from tokenpool.analysis import plotting
from tokenpool.tools import benchmark

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "results" / "throughput" / "backends"
FIGURE = ROOT / "docs" / "results" / "realised.png"
BACKENDS = ("eager", "compiled", "onnxruntime", "openvino")
METHODS = ("random", "power_bert", "wkmedoids", "key_medoids")


def rows(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """Results of all backends. They have one model, one schedule and one number of threads.

    Args:
        folder: has a folder of results of `throughput` for each backend.

    Raises:
        ValueError: if the results differ in model, schedule or threads.
    """
    found = [row for backend in BACKENDS for row in benchmark.stored(folder / backend)[1]]
    if len({(row["model"], str(row["schedule"]), row["threads"], row["precision"]) for row in found}) != 1:
        raise ValueError(f"results in {folder} differ in model, schedule, threads or precision: time them anew")
    return found


def table(found: Sequence[dict[str, Any]]) -> str:
    """Return realised fractions as Markdown: a row for each backend and batch size, a column for each method."""
    frame = pd.DataFrame(found).astype({"backend": pd.CategoricalDtype(BACKENDS, ordered=True)})
    index = ["backend", "batch_size"]
    pivot = frame.pivot_table(index=index, columns="method", values="realised_fraction", observed=True)
    words = pivot.reindex(columns=METHODS).map(lambda value: "" if pd.isna(value) else f"{value:.2f}")
    words = words.reset_index().rename(columns={"batch_size": "batch"})
    return words.to_markdown(index=False, disable_numparse=True)


def picture(found: Sequence[dict[str, Any]]) -> Figure:
    """Draw realised fractions over the batch size, one panel for each backend."""
    figure, axes = plt.subplots(1, len(BACKENDS), figsize=(10, 3), layout="constrained", sharey=True)
    for ax, backend in zip(axes, BACKENDS, strict=True):
        for method in METHODS:
            chosen = [row for row in found if (row["backend"], row["method"]) == (backend, method)]
            chosen.sort(key=lambda row: row["batch_size"])
            sizes, fractions = ([row[key] for row in chosen] for key in ("batch_size", "realised_fraction"))
            ax.plot(sizes, fractions, **plotting.STYLES[method])
        ax.axhline(1, color="grey", linewidth=1, linestyle="--")
        ax.set(title=backend, xscale="log", xlabel="batch size")
        ax.set_xticks([1, 8, 32], ["1", "8", "32"])
        ax.minorticks_off()
    axes[0].set_ylabel("realised share of the speed-up")
    lines, names = axes[0].get_legend_handles_labels()
    figure.legend(lines, names, loc="outside lower center", ncols=len(METHODS), fontsize="small")
    return figure


if __name__ == "__main__":
    print(table(rows()))
    picture(rows()).savefig(FIGURE, dpi=150)
