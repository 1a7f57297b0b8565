"""Table and figure of int8 beside float32, from the results of `tokenpool.tools.benchmark_precisions`."""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from tokenpool.analysis import plotting
from tokenpool.analysis.comparison import compare
from tokenpool.tools.benchmark_precisions import FLOAT32, PRECISIONS
from tokenpool.tools.sections import Section

_PLAIN = {"color": "black", "marker": "s", "label": "plain"}
_MARKERS = {FLOAT32: "o", "int8-dynamic": "^", "int8": "s"}
_TIMED = {"ms": "model", "plain_ms": "plain_float32"}
_NOTE = (
    "{images} images, none of which calibrated int8. Difference: of top-1 to the same model in float32, in points, "
    "with its 95 % interval, paired by image. Same class: share of images with the top-1 class of the plain model in "
    "float32. Times: batches of {batch} images, {threads} thread{s}, ONNX Runtime; {repeats} rounds, models in turns. "
    "ms: an image, and in the same rounds an image of the plain model in float32; medians. Speed-up: over the plain "
    "model of the same precision, median of the rounds. Realised: speed-up / ratio of the multiply-adds. Total: "
    "speed-up over the plain model in float32 ± half the interquartile range of the rounds. Product: total of this "
    "pooling in float32 x total of the plain model in this precision."
)


def rows(points: pd.DataFrame) -> pd.DataFrame:
    """The numbers of the table, from the measurements of each result.

    Args:
        points: one row a result, from `tokenpool.results.load`. It has the plain model and float32.

    Returns:
        The plain model first, then by method, schedule and precision, the columns: method, schedule, precision, gmacs,
        top1 (%), `difference`, `low` and `high` (points; NaN in float32), `ms` and `plain_ms` (an image; plain in
        float32), `same_class` (%), bytes, `speed_up` (over the plain model of the same precision), `realised`, `total`
        (over the plain model in float32) with its `spread`, and `product` (of both single totals). NaN where a column
        has no meaning or repeats another one. Speed-ups are medians of the ratios of each round, because models of one
        round meet the same load of the machine.
    """
    points = points.assign(seed=0)
    of = {(row.method, row.schedule, row.precision): row for row in points.itertuples()}
    totals = {key: np.median(_ratios(row, "plain_float32")) for key, row in of.items()}
    reference = np.array(of["none", "", FLOAT32].predicted)
    found = []
    for key in sorted(of, key=lambda key: (key[0] != "none", *key[:2], PRECISIONS.index(key[2]))):
        row, (method, schedule, precision) = of[key], key
        is_plain, is_float32 = method == "none", precision == FLOAT32
        speed_up = np.nan if is_plain else np.median(_ratios(row, "plain"))
        single = np.nan if is_plain or is_float32 else totals[method, schedule, FLOAT32] * totals["none", "", precision]
        found.append(
            {"method": method, "schedule": schedule, "precision": precision, "gmacs": row.gmacs, "top1": row.top1}
            | _difference(points, key)
            | {name: 1000 * np.median(row.seconds[one]) / row.measured_batch for name, one in _TIMED.items()}
            | {"same_class": 100 * np.mean(np.array(row.predicted) == reference), "bytes": row.bytes}
            | {"speed_up": speed_up, "realised": speed_up * row.gmacs / row.plain_gmacs, "total": totals[key]}
            | {"spread": np.subtract(*np.percentile(_ratios(row, "plain_float32"), (75, 25))) / 2, "product": single}
        )
    return pd.DataFrame(found)


def _ratios(row: Any, plain: str) -> np.ndarray:
    """Speed-up in each round."""
    return np.array(row.seconds[plain]) / np.array(row.seconds["model"])


def _difference(points: pd.DataFrame, key: tuple[str, str, str]) -> dict[str, float]:
    method, schedule, precision = key
    if precision == FLOAT32:
        return dict.fromkeys(("difference", "low", "high"), np.nan)
    same = {"method": method, "schedule": schedule}
    compared = compare(points, same | {"precision": precision}, same | {"precision": FLOAT32})
    return {"difference": compared.difference, "low": compared.low, "high": compared.high}


def section(points: pd.DataFrame) -> Section:
    """The table. See `rows` for the argument."""
    raw, first = rows(points), points.iloc[0]
    shown = pd.DataFrame(
        {
            "method": raw["method"].replace("none", "plain"),
            "schedule": raw["schedule"],
            "precision": raw["precision"],
            "GMACs": raw["gmacs"].map("{:.3f}".format),
            "top-1 (%)": raw["top1"].map("{:.1f}".format),
            "difference": [
                "" if pd.isna(row.difference) else f"{row.difference:+.1f} ({row.low:+.1f}, {row.high:+.1f})"
                for row in raw.itertuples()
            ],
            "same class (%)": raw["same_class"].map("{:.1f}".format),
            "MB": (raw["bytes"] / 1e6).map("{:.1f}".format),
            "ms": [f"{row.ms:.1f} / {row.plain_ms:.1f}" for row in raw.itertuples()],
            "speed-up": _filled(raw["speed_up"]),
            "realised": _filled(raw["realised"]),
            "total": [f"{row.total:.2f} ± {row.spread:.2f}" for row in raw.itertuples()],
            "product": _filled(raw["product"]),
        }
    )
    threads = int(first["threads"])
    note = _NOTE.format(
        images=int(first["images"]),
        batch=int(first["measured_batch"]),
        threads=threads,
        s="" if threads == 1 else "s",
        repeats=int(first["repeats"]),
    )
    return Section("int8", f"{first['model']} in float32 and in int8", shown, raw, (note,))


def _filled(values: pd.Series) -> list[str]:
    return ["" if pd.isna(value) else f"{value:.2f}" for value in values]


def figure(points: pd.DataFrame) -> Figure:
    """Top-1 against speed-up over the plain model in float32; a line connects the precisions of a model.

    Args:
        points: see `rows`.
    """
    table = rows(points)
    drawn, ax = plt.subplots(figsize=(6.4, 4.8), layout="constrained")
    for (method, schedule), curve in table.groupby(["method", "schedule"], sort=False):
        style = _PLAIN if method == "none" else plotting.STYLES[method]
        label = ", ".join(filter(None, (style["label"], schedule)))
        is_first = schedule == table[table["method"] == method]["schedule"].iloc[0]
        ax.plot(curve["total"], curve["top1"], color=style["color"], linestyle="-" if is_first else "--", label=label)
        for point in curve.itertuples():
            ax.plot(point.total, point.top1, color=style["color"], marker=_MARKERS[point.precision], linestyle="")
    for precision, marker in _MARKERS.items():
        ax.plot([], [], color="grey", marker=marker, linestyle="", label=precision)
    ax.set(xlabel="speed-up over the plain model in float32", ylabel=plotting.TOP1_LABEL)
    ax.legend(frameon=False, fontsize=8)
    first = points.iloc[0]
    ax.set_title(f"{first['model']}, {int(first['images'])} images", fontsize=10)
    return drawn
