"""Table and pictures of measured speed-ups, from the rows of `tokenpool.tools.benchmark`."""

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure


def table(found: Sequence[dict[str, Any]]) -> str:
    """The results of `compare` as Markdown."""
    rows = [
        {
            "model": one["model"] + (f" at {one['image_size']}" if one["image_size"] else ""),
            "method": one["method"],
            "setting": _in_words(one),
            "batch": one["batch_size"],
            "GMACs": f"{one['gmacs']:.2f} of {one['plain_gmacs']:.2f}",
            "images/s": f"{one['images_per_second']:.1f} / {one['plain_images_per_second']:.1f}",
            "latency (ms)": f"{one['latency_ms']:.1f} / {one['plain_latency_ms']:.1f}",
            "peak (MiB)": f"{one['peak_mib']:.0f} / {one['plain_peak_mib']:.0f}" if "peak_mib" in one else "",
            "FLOPs ratio": f"{one['flops_ratio']:.2f}",
            "speed-up": f"{one['speed_up']:.2f} ± {one['speed_up'] * one['spread'] / 2:.2f}",
            "realised": f"{one['realised_fraction']:.2f}",
            "against parts": f"{one['realised_against_parts']:.2f}" if "realised_against_parts" in one else "",
            "clustering": f"{100 * one['clustering_share']:.1f} %" if "clustering_share" in one else "",
            "scoring": f"{100 * one['scoring_share']:.1f} %" if "scoring_share" in one else "",
        }
        for one in found
    ]
    return pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True)


def _in_words(row: dict[str, Any]) -> str:
    """Schedule and mode of a row; float32, eager forward passes go without saying."""
    precision = "" if row["precision"] == "float32" else row["precision"]
    backend = "" if row["backend"] == "eager" else row["backend"]
    flags = [word for flag, word in (("train", "training"), ("carry", "carry")) if row[flag]]
    options = [f"{name} = {value}" for name, value in row["options"].items()]
    schedule = "" if row["schedule"] is None else str(row["schedule"])
    return ", ".join(filter(None, [schedule, precision, backend, *flags, *options]))


def picture(found: Sequence[dict[str, Any]]) -> Figure:
    """Measured speed-up over the ratio of FLOPs; on the diagonal the tokens saved are seconds saved."""
    figure, ax = plt.subplots(figsize=(5, 4.2), layout="constrained")
    names = sorted({(one["model"], one["method"]) for one in found})
    for model, method in names:
        chosen = [one for one in found if (one["model"], one["method"]) == (model, method)]
        chosen.sort(key=lambda one: one["flops_ratio"])
        ratios, speeds = ([one[key] for one in chosen] for key in ("flops_ratio", "speed_up"))
        ax.plot(ratios, speeds, "o-", label=f"{model}, {method}")
    low, high = min(ax.get_xlim()[0], ax.get_ylim()[0]), max(ax.get_xlim()[1], ax.get_ylim()[1])
    ax.plot([low, high], [low, high], color="grey", linewidth=1, linestyle="--", label="as counted")
    ax.set(xlim=(low, high), ylim=(low, high), xlabel="ratio of FLOPs, plain to pooled", ylabel="measured speed-up")
    ax.legend(fontsize="small")
    return figure


def growth(found: Sequence[dict[str, Any]]) -> Figure:
    """Time and memory of an image over the number of its tokens, pooled and plain, both axes logarithmic.

    There is no panel of the memory if it was not measured for all models.
    """
    panels = {"latency_ms": "milliseconds an image", "peak_mib": "peak MiB an image"}
    if not all("peak_mib" in one for one in found):
        del panels["peak_mib"]
    figure, grid = plt.subplots(1, len(panels), figsize=(4.5 * len(panels), 3.8), layout="constrained", squeeze=False)
    axes = grid[0]
    names = sorted({(one["model"], one["method"], one["batch_size"]) for one in found})
    for model, method, batch in names:
        chosen = [one for one in found if (one["model"], one["method"], one["batch_size"]) == (model, method, batch)]
        chosen.sort(key=lambda one: one["tokens"])
        tokens = [one["tokens"] for one in chosen]
        for prefix, label, style in (("", method, "o-"), ("plain_", "plain", "s--")):
            label = f"{model}, {label}, batch {batch}"
            for ax, key in zip(axes, panels, strict=True):
                ax.plot(tokens, [one[prefix + key] / batch for one in chosen], style, label=label)
        ends = tokens[0], tokens[-1]
        for ax, key in zip(axes, panels, strict=True):
            first = chosen[0][key] / batch
            for power, style in ((1, ":"), (2, "-.")):
                guide = [first, first * (ends[1] / ends[0]) ** power]
                label = {1: "as N", 2: "as N²"}[power] if (model, method, batch) == names[0] else None
                ax.plot(ends, guide, style, color="grey", linewidth=1, label=label)
    for ax, label in zip(axes, panels.values(), strict=True):
        ax.set(xscale="log", yscale="log", xlabel="tokens N", ylabel=label)
        ax.set_xticks(sorted({one["tokens"] for one in found}), minor=False)
        ax.get_xaxis().set_major_formatter("{x:.0f}")
        ax.minorticks_off()
    axes[0].legend(fontsize="small")
    return figure
