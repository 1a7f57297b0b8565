"""Pictures of results."""

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes

# Okabe and Ito's palette, which colour-blind readers can tell apart; markers differ too, for print.
STYLES: dict[str, dict] = {
    "none": {"label": "DeiT", "color": "#000000", "marker": "*", "markersize": 11},
    "convolution": {"label": "Convolution", "color": "#999999", "marker": "P"},
    "random": {"label": "Random selection", "color": "#E69F00", "marker": "v"},
    "importance": {"label": "Importance selection", "color": "#56B4E9", "marker": "^"},
    "power_bert": {"label": "PoWER-BERT", "color": "#D55E00", "marker": "s"},
    "kmeans": {"label": "Token Pooling, K-Means", "color": "#CC79A7", "marker": "d", "linestyle": "--"},
    "kmedoids": {"label": "Token Pooling, K-Medoids", "color": "#009E73", "marker": "D", "linestyle": "--"},
    "wkmeans": {"label": "Token Pooling, WK-Means", "color": "#CC79A7", "marker": "h"},
    "wkmedoids": {"label": "Token Pooling, WK-Medoids", "color": "#0072B2", "marker": "o"},
}


def unit(largest: float) -> tuple[float, str]:
    """Factor and prefix that costs of up to `largest` x 10^9 are best shown with: (1, "G") or (1000, "M")."""
    return (1e3, "M") if largest < 0.1 else (1.0, "G")


def cost_accuracy(
    frame: pd.DataFrame, cost: str = "gmacs", quality: str = "top1", error: str | None = "top1_error", ax: Axes = None
) -> Axes:
    """Draw quality against cost, one curve a downsampler, in the order of cost.

    Args:
        frame: one row a point, with the columns `downsampler`, `cost` and `quality`.
        cost: column for the x-axis.
        quality: column for the y-axis.
        error: column of the standard error, drawn as bars; None, or a column that is missing, for no bars.
        ax: axes to draw into; by default a new figure's.

    Costs are taken to be in units of 10^9 multiply-adds; those of small models are shown in units of 10^6.

    Returns:
        The axes.
    """
    if ax is None:
        ax = plt.subplots(figsize=(6.4, 4.4), layout="constrained")[1]
    scale, prefix = unit(frame[cost].max())
    names = dict.fromkeys(frame["downsampler"])
    for name in [*(name for name in STYLES if name in names), *(name for name in names if name not in STYLES)]:
        points = frame[frame["downsampler"] == name].sort_values(cost)
        style = {"linestyle": "-", "markersize": 5.5, "linewidth": 1.4, "capsize": 2.5}
        style |= STYLES.get(name, {"label": name, "marker": "."})
        bars = points[error] if error and error in points else None
        ax.errorbar(scale * points[cost], points[quality], yerr=bars, zorder=4 if name == "none" else 3, **style)
    ax.set_xlabel(f"{prefix}FLOPs an image (1 multiply-add = 1 FLOP), clustering included")
    ax.set_ylabel("top-1 accuracy (%)")
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize="small", loc="lower right")
    return ax
