"""Plots of results, in one style for print and for colour-blind readers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from tokenpool.analysis import results
from tokenpool.downsampling import Column
from tokenpool.tracing import Trace

# The plot style of each registered method: keywords of Matplotlib's `errorbar` and `plot`, including `label`.
STYLES: Mapping[str, dict[str, Any]] = Column(lambda method: {"label": method.label, **method.style})
COST_LABEL = "FLOPs an image"
TOP1_LABEL = "top-1 accuracy (%)"


@dataclass(frozen=True)
class Series:
    """One curve.

    Attributes:
        rows: one row for each point.
        style: keywords of Matplotlib's `errorbar`, including `label`.
    """

    rows: pd.DataFrame
    style: dict[str, Any]


def unit(largest: float) -> tuple[float, str]:
    """Return factor and prefix for an axis of costs: (1, "G") or (1000, "M").

    Args:
        largest: the largest cost, in units of 10^9.
    """
    return (1e3, "M") if largest < 0.1 else (1.0, "G")


def cost_accuracy(
    frame: pd.DataFrame,
    cost: str = "gmacs",
    quality: str = "top1",
    error: str | None = "top1_error",
    ax: Axes | None = None,
) -> Axes:
    """Plot quality against cost, with one curve for each downsampler.

    Args:
        frame: one row for each point, with the columns `downsampler`, `cost` and `quality`. Average over seeds first.
        cost: column for the x-axis, in units of 10^9 multiply-adds. Small costs are shown in units of 10^6.
        quality: column for the y-axis.
        error: column of the standard error, drawn as error bars. No bars for None or a missing column.
        ax: axes to draw into. Default: axes of a new figure.

    Returns:
        The axes.

    Raises:
        ValueError: if the points of a curve differ in data, seed, stage, base model or `carry`.
    """
    results.check_alike(frame, results.INCOMPARABLE, "one picture")
    results.check_alike(frame, ("stage", "variant", "carry"), "one curve", within=["downsampler"])
    names = dict.fromkeys(frame["downsampler"])
    ordered = [*(name for name in STYLES if name in names), *(name for name in names if name not in STYLES)]
    styles = [STYLES.get(name, {"label": name, "marker": "."}) for name in ordered]
    ax = curves(
        [Series(frame[frame["downsampler"] == name], style) for name, style in zip(ordered, styles, strict=True)],
        cost,
        quality,
        error,
        ax,
    )
    ax.legend(frameon=False, fontsize="small", loc="lower right")
    return ax


def curves(
    series: Sequence[Series],
    cost: str = "gmacs",
    quality: str = "top1",
    error: str | None = "top1_error",
    ax: Axes | None = None,
) -> Axes:
    """Plot quality against cost for any series, without a legend.

    Args:
        series: the curves.
        cost: see `cost_accuracy`.
        quality: see `cost_accuracy`.
        error: see `cost_accuracy`.
        ax: see `cost_accuracy`.

    Returns:
        The axes.
    """
    if ax is None:
        ax = plt.subplots(figsize=(6.4, 4.4), layout="constrained")[1]
    scale, prefix = (1.0, "")
    if cost.endswith("gmacs"):
        scale, prefix = unit(max(each.rows[cost].max() for each in series))
    for each in series:
        points = each.rows.sort_values(cost)
        style: dict[str, Any] = {"linestyle": "-", "markersize": 5.5, "linewidth": 1.4, "capsize": 2.5} | each.style
        bars = points[error] if error and error in points else None
        ax.errorbar(scale * points[cost], points[quality], yerr=bars, **{"zorder": 3} | style)
    ax.set_xlabel(f"{prefix}{COST_LABEL}" if prefix else cost)
    ax.set_ylabel(TOP1_LABEL if quality == "top1" else quality)
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def clusters(image: np.ndarray, trace: Trace, block: int, index: int = 0, ax: Axes | None = None) -> Axes:
    """Plot the groups of patches that are one token after a block (Figure 1c), in the style of `patches`.

    Args:
        image: (H, W, 3), values in 0..1.
        trace: result of `tokenpool.trace`.
        block: index of the block, starting at 0.
        index: index of the image in the traced batch.
        ax: axes to draw into. Default: axes of a new figure.

    Returns:
        The axes.
    """
    found = trace.blocks[block]
    ax = patches(image, found.assignment[index].cpu(), trace.grid, ax)
    dropped = ", rest dropped" if (found.assignment[index] < 0).any() else ""
    ax.set_title(f"block {block + 1}: {found.tokens} token{'s' * (found.tokens != 1)}{dropped}", fontsize=9)
    return ax


def strip(image: np.ndarray, trace: Trace, index: int = 0, columns: int = 7) -> Figure:
    """Plot an image, and the groups of patches that are one token after each block.

    Args:
        image: (H, W, 3), values in 0..1.
        trace: result of `tokenpool.trace`.
        index: index of the image in the traced batch.
        columns: number of pictures in a row.

    Returns:
        A new figure.
    """
    count = 1 + len(trace.blocks)
    rows = -(-count // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(2.1 * columns, 2.3 * rows), layout="constrained", squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    axes.flat[0].imshow(image)
    axes.flat[0].set_title("image", fontsize=9)
    for block, ax in enumerate(axes.flat[1:count]):
        ax.set_axis_on()
        clusters(image, trace, block, index, ax)
    return figure


def patches(image: np.ndarray, assignment: ArrayLike, grid: tuple[int, int], ax: Axes | None = None) -> Axes:
    """Plot the patches of each token in their mean colour, with a white border around each token.

    Dropped patches are black and hatched.

    Args:
        image: (H, W, 3), values in 0..1.
        assignment: the token of each patch, row by row, or -1 for a dropped patch.
        grid: rows and columns of patches.
        ax: axes to draw into. Default: axes of a new figure.

    Returns:
        The axes.

    Raises:
        ValueError: if grid and assignment have different numbers of patches.
    """
    tokens = np.asarray(assignment)
    if tokens.size != grid[0] * grid[1]:
        raise ValueError(f"assignment has {tokens.size} patches, but the grid {grid} has {grid[0] * grid[1]}")
    if ax is None:
        ax = plt.subplots(figsize=(3, 3), layout="constrained")[1]
    height, width = image.shape[:2]
    rows = np.arange(height) * grid[0] // height
    columns = np.arange(width) * grid[1] // width
    labels = tokens.reshape(grid)[rows[:, None], columns[None, :]]  # (H, W)
    painted = np.zeros_like(image)
    for label in np.unique(labels[labels >= 0]):
        painted[labels == label] = image[labels == label].mean(0)
    ax.imshow(painted, interpolation="nearest", extent=(0, grid[1], grid[0], 0), vmin=0, vmax=1)
    ax.add_collection(_borders(tokens.reshape(grid)))
    for row, column in np.argwhere(tokens.reshape(grid) < 0):
        ax.add_patch(plt.Rectangle((column, row), 1, 1, fill=False, hatch="////", edgecolor="#777777", linewidth=0))
    ax.set_xticks([])
    ax.set_yticks([])
    return ax


def faded(style: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Return a style for the second curve of a method: a lighter colour, a dotted line and hollow markers.

    Args:
        style: style of the first curve, with `color`.
        **changes: further changes of the style.
    """
    colour = tuple(0.45 * channel + 0.55 for channel in to_rgb(style["color"]))
    return style | {"color": colour, "linestyle": ":", "markerfacecolor": "white"} | changes


def _borders(labels: np.ndarray) -> LineCollection:
    """Return lines between neighbouring patches of different tokens."""
    down = [[(c, r + 1), (c + 1, r + 1)] for r, c in np.argwhere(labels[1:] != labels[:-1])]
    right = [[(c + 1, r), (c + 1, r + 1)] for r, c in np.argwhere(labels[:, 1:] != labels[:, :-1])]
    return LineCollection(down + right, colors="white", linewidths=1.2)


def save(figure: Figure, path: Path) -> list[Path]:
    """Write a figure as PNG and PDF, the same runs as the same file; returns the files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files = [path.parent / (path.name + suffix) for suffix in (".png", ".pdf")]
    for file in files:
        # Without the date, the same runs give the same file.
        figure.savefig(file, dpi=200, metadata={"CreationDate": None} if file.suffix == ".pdf" else None)
    plt.close(figure)
    return files
