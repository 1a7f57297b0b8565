"""Table and figure of the comparison of methods without training, from `tokenpool.tools.benchmark_methods`."""

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from tokenpool.analysis import plotting
from tokenpool.tools import benchmark_methods as benchmark
from tokenpool.tools.sections import Section

FORMS = {
    "decay": "decay",
    "step": "constant step",
    "stages": "three stages",
    "published": "published counts",
    "calibrated": "calibrated",
}
_NOTE = (
    "{images} images, which had no part in the choice of the schedule; the other half chose or calibrated it. Every "
    "method costs 0.98 to 1.0 of the budget, clustering included, and sizes are carried. Differences to {baseline} are "
    "paired by image, with their standard errors. Divergence: mean Kullback-Leibler divergence of the predictions from "
    "the plain model's, in nats. Error: reconstruction error (8) over the variance of the tokens, summed over blocks. "
    "The plain model has {top1:.1f} %."
)


def sections(points: pd.DataFrame, baseline: str) -> list[Section]:
    """One table for each budget, the lowest divergence first.

    Args:
        points: one row a run, from `Study.points`.
        baseline: name of the method that the others are compared with.
    """
    plain = points[points["downsampler"] == "none"].iloc[0]
    note = _NOTE.format(images=int(plain["images"]), baseline=baseline, top1=plain["top1"])
    return [
        Section(f"{gmacs:g}", f"{plain['model']} at {gmacs:.4g} GMACs", _shown(rows), rows, (note,))
        for gmacs, rows in benchmark.compared(points, baseline).groupby("budget", sort=True)
    ]


def _shown(rows: pd.DataFrame) -> pd.DataFrame:
    shown = pd.DataFrame(
        {
            "method": rows["downsampler"],
            "schedule": rows["family"].map(FORMS),
            "GMACs": [f"{gmacs:.3f}" for gmacs in rows["gmacs"]],
            "top-1 (%)": [f"{top1:.1f}" for top1 in rows["top1"]],
            "difference": _with_errors(rows, "top1", 1),
            "divergence": [f"{divergence:.4f}" for divergence in rows["divergence"]],
            "its difference": _with_errors(rows, "divergence", 4),
            "error": [f"{error:.2f}" for error in rows["error"]],
        }
    )
    if rows["speed_up"].notna().any():
        shown["speed-up"] = ["-" if pd.isna(value) else f"{value:.2f}" for value in rows["speed_up"]]
    return shown


def _with_errors(rows: pd.DataFrame, name: str, digits: int) -> list[str]:
    pairs = zip(rows[f"{name}_difference"], rows[f"{name}_difference_error"], strict=True)
    return ["-" if pd.isna(value) else f"{value:+.{digits}f} ± {error:.{digits}f}" for value, error in pairs]


def figure(points: pd.DataFrame, baseline: str) -> Figure:
    """Divergence and top-1 against counted cost, on the half of the images that confirms.

    Args:
        points: one row a run, from `Study.points`.
        baseline: name of the method that the others are compared with.
    """
    rows = benchmark.compared(points, baseline)
    plain = points[points["downsampler"] == "none"].iloc[0]
    scale, prefix = plotting.unit(plain["gmacs"])
    drawn, axes = plt.subplots(1, 2, figsize=(10, 5.4), layout="constrained")
    for ax, quality in zip(axes, ("divergence", "top1"), strict=True):
        for (method, is_calibrated), curve in rows.groupby(["downsampler", rows["family"] == "calibrated"], sort=False):
            style = {"linewidth": 1} | plotting.STYLES[method]
            if is_calibrated:
                style |= {"linestyle": ":", "markerfacecolor": "none", "label": f"{style['label']}, calibrated"}
            ax.plot(scale * curve["gmacs"], curve[quality], **style)
        ax.set(xlim=(0, scale * plain["gmacs"]), xlabel=f"{prefix}MACs an image, clustering included")
    axes[0].set(yscale="log", ylabel="divergence from the plain model (nats)")
    axes[1].axhline(plain["top1"], color="black", linewidth=1, linestyle=":", label="plain model")
    axes[1].set_ylabel(plotting.TOP1_LABEL)
    handles, labels = axes[1].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    drawn.suptitle(f"{plain['model']} without training, {int(plain['images'])} images", fontsize=10)
    return drawn
