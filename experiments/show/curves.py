"""Figures of cost and accuracy, from finished runs and from the paper's printed numbers.

`of` makes one function that draws a figure out of the panels of a study and the panels of the paper.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.show import published
from experiments.show.tables import cost_accuracy, how_many, with_models
from tokenpool.analysis import pareto, plotting
from tokenpool.analysis.plotting import STYLES, Series, faded
from tokenpool.runs.stages import dropping, merging
from tokenpool.runs.study import Study

_TWICE = STYLES["none"] | {"label": "DeiT, trained twice", "linestyle": "-"}
_ONCE = {"label": "DeiT, trained once", "color": "#999999", "linestyle": "--"}
_TUNED = _TWICE | {"label": "DeiT, fine-tuned as long as the others"}
_FAMILY_STYLES = {
    "deit_e252": {"color": "#E69F00", "marker": "^"},
    "deit_e318": {"color": "#009E73", "marker": "s"},
    "deit_small": {"color": "#0072B2", "marker": "o"},
}
_OTHERS = {
    "DynamicViT": {"color": "#E69F00", "marker": "^"},
    "HVT": {"color": "#009E73", "marker": "v"},
    "EViT": {"color": "#CC79A7", "marker": "D"},
    "ToMe": {"color": "#56B4E9", "marker": "X", "markersize": 8},
    "ConViT": {"color": "#666666", "marker": "P", "markersize": 8},
}
OWN_OTHERS = {"dynamicvit": "DynamicViT", "hvt": "HVT"}  # the ones of them that Figure 3b has from own runs, too


@dataclass(frozen=True)
class Panel:
    """One set of axes: its series on some data."""

    title: str
    series: list[Series]
    cost: str = "gmacs"
    annotate_saving: bool = False


def of(
    own: Callable[[Study, pd.DataFrame], list[Panel]], printed: Callable[[], list[Panel]] | None = None
) -> Callable[[Study, pd.DataFrame, bool], Figure | None]:
    """How to draw a figure of cost and accuracy, as the registry of artifacts takes it.

    Args:
        own: gives the panels of a study, from the table of `cost_accuracy`.
        printed: gives the panels of the paper's printed numbers; None where the paper prints none.

    Returns:
        A function of the study, its finished runs, and whether panels are stacked. It returns None where there is
        nothing to draw.
    """

    def draw(study: Study, found: pd.DataFrame, stacked: bool = False) -> Figure | None:
        panels = printed() if printed else []
        if len(found):
            panels += own(study, cost_accuracy(found))
        return _figure(panels, stacked)

    return draw


def _figure(panels: Sequence[Panel], stacked: bool) -> Figure | None:
    """The panels that have points, in one figure; None where none has."""
    panels = [replace(panel, series=[series for series in panel.series if len(series.rows)]) for panel in panels]
    panels = [panel for panel in panels if panel.series]
    return _compose(panels, stacked) if panels else None


def pareto_picture(table: pd.DataFrame, path: Path) -> list[Path]:
    """Cost against accuracy for every method of the protocol, from `tables.cost_accuracy`; returns the files."""
    points = table[table["stage"] == "finetune"]
    ax = plotting.cost_accuracy(points)
    ax.set_title(_counted(points), fontsize=9)
    return plotting.save(ax.figure, path)


def _compose(panels: Sequence[Panel], stacked: bool) -> Figure:
    rows, columns = (len(panels), 1) if stacked else (1, len(panels))
    size = (5.6 if columns == 1 else 4.8 * columns, 4.2 * rows + 0.7)
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    labels: dict[str, object] = {}
    for panel, ax in zip(panels, axes.flat, strict=True):
        plotting.curves(panel.series, cost=panel.cost, ax=ax)
        ax.set_title(panel.title, fontsize=9)
        if panel.cost == "images_per_second":
            ax.set_xlabel("images a second (the plain model's median x speed-up)")
        if panel.annotate_saving:
            _annotate_saving(panel, ax)
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            labels.setdefault(label, handle)
    place = {"loc": "outside lower center", "ncols": 2 if columns == 1 else 3}
    figure.legend(labels.values(), labels.keys(), frameon=False, fontsize=8, **place)
    return figure


def _annotate_saving(panel: Panel, ax: Axes) -> None:
    """An arrow from the cheapest plain model, the first series, to the cheapest pooled one that is as good."""
    if len(panel.series) < 2:
        return
    plain, pooled = (series.rows.sort_values("gmacs") for series in panel.series[:2])
    cheapest = plain.iloc[0]
    as_good = pooled[pooled["top1"] >= cheapest["top1"]]
    if as_good.empty or as_good.iloc[0]["gmacs"] >= cheapest["gmacs"]:
        return
    target = as_good.iloc[0]
    scale, _ = plotting.unit(max(series.rows["gmacs"].max() for series in panel.series))
    end, start = scale * target["gmacs"], scale * cheapest["gmacs"]
    arrow = {"arrowstyle": "->", "color": "#D55E00", "shrinkA": 4, "shrinkB": 4}
    ax.annotate("", (end, cheapest["top1"]), (start, cheapest["top1"]), arrowprops=arrow)
    text = f"{100 * (target['gmacs'] / cheapest['gmacs'] - 1):.0f} %".replace("-", "\N{MINUS SIGN}")
    ax.annotate(text, (start, cheapest["top1"]), (6, -12), textcoords="offset points", color="#D55E00", fontsize=9)


# The study's own series, from the table of `cost_accuracy`.


def _method(table: pd.DataFrame, method: str, variant: str = "", **style: object) -> Series:
    rows = table[(table["downsampler"] == method) & (table["variant"] == variant) & (table["stage"] == "finetune")]
    return Series(rows[rows["options"].map(len) == 0], STYLES[method] | style)


def _methods(table: pd.DataFrame, methods: Iterable[str], variant: str = "") -> list[Series]:
    return [_method(table, method, variant) for method in methods]


def _family(study: Study, table: pd.DataFrame, stage: str = "finetune", **style: object) -> Series:
    rows = with_models(study, table)
    rows = rows[(rows["downsampler"] == "none") & (rows["stage"] == stage) & rows["model"].notna()]
    return Series(rows, _TUNED | style)


def _front(rows: pd.DataFrame, style: dict) -> Series:
    return Series(pareto.front(rows), style)


def _family_front(table: pd.DataFrame, method: str) -> Series:
    rows = table[(table["downsampler"] == method) & (table["stage"] == "finetune")]
    return _front(rows, STYLES[method])


def _convolutions(table: pd.DataFrame) -> Series:
    return _front(table[table["downsampler"] == "convolution"], STYLES["convolution"])


def _panel(study: Study, table: pd.DataFrame, series: list[Series], saving: bool = False, data: str = "") -> Panel:
    return Panel(f"{study.preset.title}{data}\n{_counted(table)}", series, "gmacs", saving)


def _counted(table: pd.DataFrame) -> str:
    """Images and seeds behind the points, and what their bars are."""
    return how_many(table).replace("±", "bars")


def own_1b(study: Study, table: pd.DataFrame) -> list[Panel]:
    """The family of plain models, and the best of WK-Medoids over it."""
    return [_panel(study, table, [_family(study, table), _family_front(table, "wkmedoids")], saving=True)]


def own_3a(study: Study, table: pd.DataFrame) -> list[Panel]:
    """The family of plain models, convolution, and methods on the main model."""
    methods = _methods(table, (*dropping(), "wkmedoids"))
    return [_panel(study, table, [_family(study, table), _convolutions(table), *methods])]


def own_3b(study: Study, table: pd.DataFrame) -> list[Panel]:
    """The family of plain models, the best of two methods over it, and other papers' methods if the study has them."""
    fronts = [_family_front(table, method) for method in ("power_bert", "wkmedoids")]
    others = [
        Series(table[table["downsampler"] == method], {"label": name} | _OTHERS[name])
        for method, name in OWN_OTHERS.items()
    ]
    return [_panel(study, table, [_family(study, table), *fronts, *others])]


def own_4(study: Study, table: pd.DataFrame) -> list[Panel]:
    """The family of plain models, and WK-Medoids on each of its larger members."""
    series = [_family(study, table)]
    names = {study.preset.stands_for: study.preset.main} | study.preset.family
    for model, style in _FAMILY_STYLES.items():
        if model in names:
            label = {"label": f"WK-Medoids, {names[model].title}"}
            series.append(_method(table, "wkmedoids", names[model].name, **style | label))
    return [_panel(study, table, series)]


def own_5a(study: Study, table: pd.DataFrame) -> list[Panel]:
    """Methods that select by score, and WK-Medoids."""
    return [_panel(study, table, _methods(table, ("none", *dropping(), "wkmedoids")))]


def own_5b(study: Study, table: pd.DataFrame) -> list[Panel]:
    """PoWER-BERT, and methods that merge tokens."""
    return [_panel(study, table, _methods(table, ("none", "power_bert", *merging())))]


def own_6(study: Study, table: pd.DataFrame) -> list[Panel]:
    """K-Medoids with initial centres by score and at random."""
    series = _methods(table, ("none", "kmedoids", "wkmedoids"))
    for method in ("kmedoids", "wkmedoids"):
        rows = table[(table["downsampler"] == method) & table["options"].map(lambda options: "init" in options)]
        style = faded(STYLES[method], label=f"{STYLES[method]['label']}, random centres", linestyle="-.")
        series.append(Series(rows, style))
    return [_panel(study, table, series)]


def own_7(study: Study, table: pd.DataFrame) -> list[Panel]:
    """The family of plain models, trained once and twice."""
    once = _family(study, table, "base", **_ONCE | {"label": "DeiT, base model"})
    return [_panel(study, table, [once, _family(study, table)])]


def own_8(study: Study, table: pd.DataFrame) -> list[Panel]:
    """Convolution at all placements, and WK-Medoids."""
    everywhere = table[table["downsampler"] == "convolution"]
    marks = {"linestyle": "none", "color": "#999999", "capsize": 0, "elinewidth": 0.6, "zorder": 2}
    series = [
        Series(
            everywhere[everywhere["options"].map(lambda options, n=count: len(options["at"]) == n)],
            marks | {"label": f"{count} convolution{'s' if count > 1 else ''}", "marker": marker, "markersize": 4.5},
        )
        for count, marker in ((1, "P"), (2, "x"), (3, "+"))
    ]
    front = _front(everywhere, {"label": "Convolution, best placements", "color": "#000000", "marker": "none"})
    return [_panel(study, table, [*_methods(table, ("none", "wkmedoids")), front, *series])]


def own_9(study: Study, table: pd.DataFrame) -> list[Panel]:
    """All methods without fine-tuning: with sizes not carried, and carried."""

    def series(method: str, carry: bool) -> Series:
        rows = table[(table["downsampler"] == method) & (table["carry"].astype(bool) == carry)]
        return Series(rows, STYLES[method] | ({"linestyle": "-"} if method == "convolution" else {}))

    plain, dropped = series("none", False), [series(method, False) for method in dropping()]
    merged = ("convolution", *merging())
    data = f"{study.preset.title}\n{_counted(table)}"
    return [
        Panel(f"sizes not carried; {data}", [plain, *dropped, *(series(method, False) for method in merged)]),
        Panel(f"sizes carried; {data}", [plain, *dropped, *(series(method, True) for method in merged)]),
    ]


def own_10(figure: str) -> Callable[[Study, pd.DataFrame], list[Panel]]:
    """Methods with queries and keys that are normalised as in that figure, and not normalised."""

    def own(study: Study, table: pd.DataFrame) -> list[Panel]:
        methods, variant = ("none", "power_bert", "wkmedoids"), study.preset.normalised[figure].name
        labels = {method: STYLES[method]["label"] for method in methods}
        normalised = [_method(table, method, variant, label=f"{labels[method]}, normalised") for method in methods]
        standard = [
            Series(_method(table, method).rows, faded(STYLES[method], label=f"{labels[method]}, not normalised"))
            for method in methods
        ]
        return [_panel(study, table, [*normalised, *standard])]

    return own


def own_11(model: str) -> Callable[[Study, pd.DataFrame], list[Panel]]:
    """Methods on another model of the family, by the paper's name of it."""

    def own(study: Study, table: pd.DataFrame) -> list[Panel]:
        methods = ("none", "power_bert", "kmedoids", "wkmedoids")
        variant = study.preset.family[model]
        return [_panel(study, table, _methods(table, methods, variant.name), data=f", {variant.title}")]

    return own


def throughput(study: Study, found: pd.DataFrame, stacked: bool = False) -> Figure | None:
    """Figure 12: accuracy over images a second; None where the study has no accuracies or no times."""
    if found.empty:
        return None
    times, accurate = (found[(found["stage"] == "throughput") == is_time] for is_time in (True, False))
    if times.empty or accurate.empty:
        return None
    accurate = cost_accuracy(accurate).query("stage != 'base'")
    merged = accurate.assign(level=accurate["level"].fillna(-1).astype(int)).merge(
        times.assign(level=times["level"].fillna(-1).astype(int))[["downsampler", "level", "speed_up"]],
        on=["downsampler", "level"],
    )
    # Each ratio was measured in turns with the plain model, so it does not depend on the machine's load.
    merged["images_per_second"] = merged["speed_up"] * times["plain_images_per_second"].median()
    series = [
        Series(merged[merged["downsampler"] == method], STYLES[method])
        for method in ("none", "power_bert", "wkmeans", "wkmedoids")
    ]
    first = times.iloc[0]
    threads, batch = int(first["threads"]), int(first["measured_batch"])
    on = f", {threads} thread{'s' if threads > 1 else ''}" if first["device"] == "CPU" else ""
    machine = f"batches of {batch}, {first['device']}{on}"
    return _figure([Panel(f"{study.preset.title}\n{machine}", series, "images_per_second")], stacked)


# The paper's series, as printed in its tables; costs as counted by its rule.


def _printed(method: str, model: str = "deit_small", **style: object) -> Series:
    rows = published.accuracies()
    return Series(rows[(rows["downsampler"] == method) & (rows["model"] == model)], STYLES[method] | style)


def _printed_plain(model: str | None = None, **style: object) -> Series:
    rows = published.plain_models()
    return Series(rows if model is None else rows[rows["model"] == model], _TWICE | style)


def _printed_front(method: str) -> Series:
    rows = published.accuracies()
    return _front(rows[rows["downsampler"] == method], STYLES[method])


def _printed_panel(series: list[Series], saving: bool = False) -> list[Panel]:
    return [Panel(published.SOURCE, series, "gmacs", saving)]


def _by_others(prefix: str, **style: object) -> Series:
    rows = published.by_others()
    return Series(rows[rows["model"].str.startswith(prefix)], {"label": prefix} | style)


def printed_1b() -> list[Panel]:
    """DeiT-Ti, e252, e318 and S, and the best of WK-Medoids over them."""
    return _printed_panel([_printed_plain(), _printed_front("wkmedoids")], saving=True)


def printed_3a() -> list[Panel]:
    """DeiTs of all widths, and two methods on DeiT-S."""
    return _printed_panel([_printed_plain(), _printed("power_bert"), _printed("wkmedoids")])


def printed_methods(*methods: str, model: str = "deit_small") -> Callable[[], list[Panel]]:
    """Methods on one of the paper's models."""
    return lambda: _printed_panel(
        [_printed_plain(model, label="DeiT"), *(_printed(method, model) for method in methods)]
    )


def printed_5b() -> list[Panel]:
    """PoWER-BERT, and methods that merge tokens."""
    return printed_methods("power_bert", *merging())()


def printed_3b() -> list[Panel]:
    """The best of two methods over all widths, and what others have published."""
    fronts = [_printed_front(method) for method in ("power_bert", "wkmedoids")]
    return _printed_panel([_printed_plain(), *fronts, *(_by_others(name, **style) for name, style in _OTHERS.items())])


def printed_4() -> list[Panel]:
    """WK-Medoids on each of the paper's larger models."""
    pooled = [
        _printed("wkmedoids", model, **style | {"label": f"WK-Medoids on {published.MODELS[model]}"})
        for model, style in _FAMILY_STYLES.items()
    ]
    return _printed_panel([_printed_plain(), *pooled])


def printed_7() -> list[Panel]:
    """DeiTs trained once, twice and by distillation."""
    rows = published.by_others()
    once = Series(rows[rows["model"].isin(["DeiT-Ti", "DeiT-S"])], STYLES["none"] | _ONCE)
    distilled = {"label": "DeiT, distilled", "color": "#0072B2", "marker": "D"}
    cited = Series(rows[rows["model"].str.endswith("-distilled")], distilled)
    return [Panel(f"{published.SOURCE}\nonce, distilled: Touvron et al. 2021", [once, _printed_plain(), cited])]
