"""Figures other than curves of cost and accuracy: Figures 1c and 2, and two that go beyond the paper.

Each function takes the study, its finished runs, and whether panels are stacked. It returns None if runs are missing.
"""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from tokenpool import tracing
from tokenpool.analysis import plotting, results
from tokenpool.analysis.plotting import STYLES
from tokenpool.downsampling import Downsampled, KMeans, PowerBert, studied
from tokenpool.runs import measure
from tokenpool.runs.data_sets import data_set
from tokenpool.runs.execute import data_module
from tokenpool.runs.stages import dropping
from tokenpool.runs.study import Study

_SIGNALS = {
    "values": {"label": "values, before filtering", "color": "#E69F00", "marker": "^", "linestyle": "--"},
    "filtered": {"label": "attention's output", "color": "#D55E00", "marker": "v"},
    "before": {"label": "tokens before attention", "color": "#56B4E9", "marker": "s", "linestyle": "--"},
    "after": {"label": "tokens after attention", "color": "#0072B2", "marker": "o"},
}
_MEASURES = {
    "leading_energy": "share of variance in the leading tenth\nof the singular vectors",
    "neighbour_distance": "distance to the nearest token\n/ distance to any token",
    "mean_energy": "share of energy in the mean token\n(the lowest frequency)",
}


def two_lobes(tokens: int = 60) -> tuple[Tensor, Tensor]:
    """The setting of Figure 2: token values in one dimension, (1, N, 1), and a smooth score of two lobes, (1, N).

    The tokens lie at even quantiles of a mixture of two normal distributions, the right one a little less frequent.
    """
    positions = torch.linspace(0, 1, 2001)

    def lobe(centre: float, width: float) -> Tensor:
        return (-((positions - centre) ** 2) / (2 * width**2)).exp()

    density = lobe(0.3, 0.08) + 0.8 * lobe(0.72, 0.1)
    cumulated = density.cumsum(0) / density.sum()
    quantiles = (torch.arange(tokens) + 0.5) / tokens
    index = torch.searchsorted(cumulated, quantiles)
    scores = lobe(0.3, 0.11) + 0.55 * lobe(0.72, 0.12)
    return positions[index][None, :, None], scores[index][None]


def lobes(study: Study, found: pd.DataFrame, stacked: bool = False) -> Figure:
    """Figure 2: score-based selection against Token Pooling, K = 4, with the reconstruction error of both."""
    tokens, scores = two_lobes()
    figure, axes = _axes(2, stacked, (4.5, 3.6), sharey=True)
    for ax, method, title in (
        (axes[0], PowerBert(4), "(a) the four tokens of highest score"),
        (axes[1], KMeans(4, iterations=50), "(b) four clusters"),
    ):
        reduced = method(tokens, scores)
        _draw_lobes(ax, tokens, scores, reduced)
        error = tracing.reconstruction_error(tokens, reduced).item()
        ax.set_title(f"{title}\nreconstruction error (9): {error:.3f}", fontsize=10)
        ax.set_xlabel("token value (one dimension)")
    for ax in axes:
        ax.set_ylabel("score")
    handles, labels = axes[1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=1 if stacked else 2, frameon=False, fontsize=8)
    return figure


def _draw_lobes(ax: Axes, tokens: Tensor, scores: Tensor, found: Downsampled) -> None:
    values, heights = tokens[0, :, 0].numpy(), scores[0].numpy()
    kept = found.tokens[0, :, 0].numpy()
    nearest = np.abs(values[:, None] - kept[None]).argmin(1)  # what reconstructs each token, equation (9)
    order = np.argsort(np.argsort(kept))
    colours = np.array(["#E69F00", "#009E73", "#0072B2", "#CC79A7"])
    ax.plot(values, heights, color="#999999", linewidth=1, zorder=1)
    ax.scatter(values, heights, s=22, c=colours[order[nearest]], zorder=2, label="tokens, by the one they go to")
    ax.scatter(
        kept,
        np.interp(kept, values, heights),
        s=130,
        marker="o",
        facecolors="none",
        edgecolors="#000000",
        linewidths=1.5,
        zorder=3,
        label="what goes on",
    )
    for value in kept:
        ax.axvline(value, ymax=0.04, color="#000000")
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_ylim(0, 1.12)


def clusters(study: Study, found: pd.DataFrame, stacked: bool = False) -> Figure | None:
    """Figure 1c: images, and their clusters at half of the depth, which is the 6th of 12 blocks."""
    if found.empty:
        return None
    row, depth = found.iloc[0], study.preset.depth
    block = depth // 2 - 1
    pictures = clustered_pictures(study)
    columns = min(len(pictures), 4 if stacked else 8)
    inches = 1.6 if len(pictures) > 4 else 3.1
    size = (inches * columns + 0.1, 2 * inches + 0.6)
    figure, axes = plt.subplots(2, columns, figsize=size, layout="constrained", squeeze=False)
    side = int(len(row["assignments"][0][block]) ** 0.5)
    for index, picture in enumerate(pictures[:columns]):
        axes[0, index].imshow(picture, interpolation="nearest", vmin=0, vmax=1)
        axes[0, index].set_xticks([])
        axes[0, index].set_yticks([])
        plotting.patches(picture, row["assignments"][index][block], (side, side), axes[1, index])
    left = min(row["tokens"][block], side * side)
    figure.suptitle(
        f"{study.preset.model}, WK-Medoids, not fine-tuned:\n{side * side} patches in {left} tokens after block "
        f"{block + 1} of {depth}",
        fontsize=9,
    )
    return figure


def clustered_pictures(study: Study) -> list[np.ndarray]:
    """The images of Figure 1c to look at, (H, W, 3) with values in 0..1."""
    if not data_set(study.preset.data).embedded:
        return [picture.permute(1, 2, 0).clamp(0, 1).numpy() for picture in measure.photographs(224)]
    data = data_module(study.clusters()[0])
    data.setup("test")
    images = data.test_set[: measure.CLUSTERED_DIGITS][0]  # (B, 1, H, W)
    images = (images - images.amin()) / (images.amax() - images.amin())
    return [image.expand(3, -1, -1).permute(1, 2, 0).numpy() for image in images]


def reconstruction(study: Study, found: pd.DataFrame, stacked: bool = False) -> Figure | None:
    """Reconstruction error against accuracy, of models that are not fine-tuned."""
    if "relative_error" not in found:
        return None
    runs = found[found["level"].notna() & found["relative_error"].map(lambda value: isinstance(value, list))]
    if runs.empty:
        return None
    runs = runs.assign(error=[_mean_error(errors) for errors in runs["relative_error"]])
    drops, carried = runs["downsampler"].isin(dropping()), runs["carry"].astype(bool)
    levels = sorted(runs["level"].unique())
    level = int(levels[(len(levels) - 1) // 2])

    figure, (blocks, *scatters) = _axes(3, stacked, (4.6, 4.4))
    _draw_errors(blocks, runs[~carried & (runs["level"] == level)])
    blocks.set_title(f"block by block, schedule {level},\nsizes not carried", fontsize=9)
    for ax, rows, title in (
        (scatters[0], runs[~carried], "sizes not carried"),
        (scatters[1], runs[carried | drops], "sizes carried (what is dropped has none)"),
    ):
        for method in studied():
            means = rows[rows["downsampler"] == method].groupby("level")[["error", "top1"]].mean()
            ax.plot(means["error"], means["top1"], **_style(method) | {"linestyle": ":", "linewidth": 0.8})
        ax.set_title(f"{title}\n{rank_correlation_text(rows)}", fontsize=9)
        ax.set_xlabel("error / variance, mean over blocks")
        ax.set_ylabel(plotting.TOP1_LABEL)
        _plain_axes(ax)
    handles, labels = scatters[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=1 if stacked else 4, frameon=False, fontsize=8)
    figure.suptitle(
        f"{study.preset.title}, {int(runs['images'].iloc[0])} images,\nmodel not fine-tuned, one point a schedule",
        fontsize=9,
    )
    return figure


def _draw_errors(ax: Axes, runs: pd.DataFrame) -> None:
    for method in studied():
        errors = runs.loc[runs["downsampler"] == method, "relative_error"]
        by_block = np.array([[np.nan if value in (None, 0) else value for value in each] for each in errors], float)
        if len(by_block):
            ax.plot(np.arange(1, by_block.shape[1] + 1), by_block.mean(0), **_style(method))
    ax.set_xlabel("block")
    ax.set_ylabel("reconstruction error (8) / variance of the tokens")
    _plain_axes(ax)


def _style(method: str) -> dict:
    return {"markersize": 5, "linewidth": 1.3} | STYLES[method]


def _plain_axes(ax: Axes) -> None:
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)


def rank_correlation_text(runs: pd.DataFrame) -> str:
    """Spearman's rank correlation of error and accuracy over methods, at each schedule."""
    correlations = rank_correlations(runs)
    low, high = (f"{value:+.2f}".replace("-", "\N{MINUS SIGN}") for value in (correlations.min(), correlations.max()))
    return f"rank correlation over methods: {low} to {high}"


def rank_correlations(runs: pd.DataFrame, least: float = 10.0) -> pd.Series:
    """Spearman's rank correlation of the columns `error` and `top1` over methods, for each `level`.

    Levels at which no method reaches `least` percent are left out: there is no accuracy left to compare.

    Raises:
        ValueError: if runs of a method are of different data or base models, or with and without carried sizes.
    """
    columns = ("data", "part", "images", "model", "variant", "carry", "options")
    results.check_alike(runs, columns, "a rank correlation", within=["downsampler"])
    means = runs.groupby(["level", "downsampler"])[["error", "top1"]].mean()
    means = means[means.groupby(level=0)["top1"].transform("max") >= least]
    return pd.Series({level: rows["error"].rank().corr(rows["top1"].rank()) for level, rows in means.groupby(level=0)})


def _mean_error(errors: list[float | None]) -> float:
    acting = [error for error in errors if error]
    return float(np.mean(acting)) if acting else float("nan")


def redundancy(study: Study, runs: pd.DataFrame, stacked: bool = False) -> Figure | None:
    """Redundancy of the tokens of a trained plain model before and after attention, block by block."""
    if runs.empty:
        return None
    figure, axes = _axes(len(_MEASURES), stacked, (4, 4.1))
    for ax, (name, label) in zip(axes, _MEASURES.items(), strict=True):
        for signal, style in _SIGNALS.items():
            by_block = np.array(runs[f"{name}_{signal}"].tolist())  # (seeds, blocks)
            ax.plot(np.arange(1, by_block.shape[1] + 1), by_block.mean(0), **{"markersize": 5} | style)
        ax.set_xlabel("block")
        ax.set_ylabel(label)
        _plain_axes(ax)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2 if stacked else 4, frameon=False, fontsize=8)
    seeds = f"{len(runs)} seed{'s' if len(runs) > 1 else ''}"
    figure.suptitle(
        f"{study.preset.model}, {int(runs['images'].iloc[0])} images, {seeds}\nequation (7) holds to "
        f"{runs['gaussian_difference'].max():.0e} on its\nqueries and keys, normalised",
        fontsize=9,
    )
    return figure


def _axes(count: int, stacked: bool, size: tuple[float, float], **options: bool) -> tuple[Figure, np.ndarray]:
    """A figure with axes of that size in inches, side by side or one below the other."""
    rows, columns = (count, 1) if stacked else (1, count)
    return plt.subplots(rows, columns, figsize=(columns * size[0], rows * size[1]), layout="constrained", **options)
