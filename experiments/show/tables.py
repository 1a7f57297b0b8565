"""Tables 1 to 5 and the best methods without fine-tuning, from finished runs and from the paper's printed numbers."""

from collections.abc import Callable, Iterable, Sequence

import pandas as pd

from experiments.extras import off_the_shelf
from experiments.show import published
from tokenpool.analysis import pareto, plotting, results
from tokenpool.runs.run import DEFAULTS
from tokenpool.runs.study import Study
from tokenpool.tools.sections import Section

Source = tuple[Study, pd.DataFrame]  # a study, and its finished runs that a table needs
_TABLE_OF = {"deit_small": "3", "deit_e318": "4", "deit_e252": "5"}
_MISPRINTS = {"deit_small": ", but for K-Means at level 0: printed 4.7, counted 4.62"}
_PER_CENT = "top-1 (%)"
_SETTING = tuple(DEFAULTS)
_OF_A_SEED = ("split", "start")  # what runs of one seed share
_OF_A_PAIR = ("label", "seed", "downsampler", "level", "keep", "schedule", "options")  # and what pairs differ in


def each(build: Callable[[Study, pd.DataFrame], list[Section]]) -> Callable[[Sequence[Source]], list[Section]]:
    """How to make a table of each study, as the registry of artifacts takes it.

    Args:
        build: gives the parts of one study, from its finished runs. The paper's part is the same for all studies.
    """

    def sections(sources: Sequence[Source]) -> list[Section]:
        return list({part.name: part for study, found in sources for part in build(study, found)}.values())

    return sections


def cost_accuracy(runs: pd.DataFrame) -> pd.DataFrame:
    """One row for each setting: its cost, and top-1 as the mean over seeds with its standard error.

    With one seed it is the standard error of the finite test set, with several that of the mean over seeds. Rows are
    sorted by downsampler, in the order of first appearance, and by falling cost.

    Args:
        runs: one row a run, from `Study.points` or `tokenpool.results.load`.

    Raises:
        ValueError: if runs of the same stage and label are of different settings, or two of the same seed.
    """
    runs = _with_defaults(runs)
    setting = [name for name in _SETTING if name not in (*_OF_A_SEED, "seed", "schedule")]
    results.check_alike(runs, [*setting, "images"], "a mean over seeds", within=["stage", "label"])
    results.check_alike(runs, ["run"], "a mean over seeds", within=["stage", "label", "seed"])
    for column in ("variant", "level", "keep", "carry"):
        runs[column] = runs[column].astype(object).where(runs[column].notna(), None) if column in runs else None
    groups = runs.groupby(["stage", "label"], sort=False)
    columns = ("stage", "label", "variant", "downsampler", "level", "keep", "options", "carry", "images")
    table = groups.agg(
        **{column: (column, "first") for column in columns},
        gmacs=("gmacs", "mean"),
        clustering_gmacs=("clustering_gmacs", "mean"),
        top1=("top1", "mean"),
        top1_error=("top1", "sem"),
        seeds=("seed", "nunique"),
    )
    single = table["seeds"] == 1
    table.loc[single, "top1_error"] = groups["top1_error"].first()[single]
    order = {name: index for index, name in enumerate(dict.fromkeys(runs["downsampler"]))}
    table["order"] = table["downsampler"].map(order)
    return table.sort_values(["order", "gmacs"], ascending=[True, False]).drop(columns="order").reset_index(drop=True)


def differences(runs: pd.DataFrame, reference: str = "power_bert") -> pd.DataFrame:
    """Top-1 of each method minus that of the reference with the same seed and schedule, averaged over schedules.

    The mean over seeds with its standard error; no rows where fewer than two seeds are there.

    Args:
        runs: one row a run, from `Study.points` or `tokenpool.results.load`.
        reference: name of the method to compare with.

    Raises:
        ValueError: if the runs have different base models, options or recipes, so that pairs are ambiguous.
    """
    runs = _with_defaults(runs[(runs["stage"] == "finetune") & runs["level"].notna()])
    common = [name for name in _SETTING if name not in (*_OF_A_SEED, *_OF_A_PAIR)]
    results.check_alike(runs, [*common, "images"], "differences")
    results.check_alike(runs, ["options"], "differences", within=["downsampler"])
    results.check_alike(runs, ["keep"], "differences", within=["level"])
    results.check_alike(runs, _OF_A_SEED, "differences", within=["seed"])
    results.check_alike(runs, ["run"], "differences", within=["downsampler", "level", "seed"])
    top1 = runs.pivot(index=["seed", "level"], columns="downsampler", values="top1")
    if reference not in top1:
        return pd.DataFrame(columns=["method", "difference", "error", "seeds"])
    by_seed = top1.sub(top1[reference], axis=0).groupby("seed").mean().drop(columns=reference)
    rows = pd.DataFrame({"difference": by_seed.mean(), "error": by_seed.sem(), "seeds": by_seed.count()})
    return rows[rows["seeds"] > 1].rename_axis("method").reset_index()


def _with_defaults(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs, with defaults for the settings that older files lack."""
    present = {
        name: value for name, value in DEFAULTS.items() if name in runs and isinstance(value, str | bool | int | float)
    }
    return runs.astype(dict.fromkeys(present, object)).fillna(present)


def differences_markdown(rows: pd.DataFrame, reference: str = "power_bert") -> str:
    """The table of `differences` for people to read."""
    shown = {f"top-1 minus {reference}'s": [f"{row.difference:+.2f} ± {row.error:.2f}" for row in rows.itertuples()]}
    return pd.DataFrame({"method": rows["method"]} | shown).to_markdown(index=False, disable_numparse=True)


def shown(table: pd.DataFrame) -> pd.DataFrame:
    """The table of `cost_accuracy` as text. Small models are stated in units of 10^6."""
    scale, prefix = plotting.unit(table["gmacs"].max())
    rows = [
        {
            "method": row.downsampler + (", base" if row.stage == "base" else ""),
            "schedule": _schedule(row),
            f"{prefix}MACs": f"{scale * row.gmacs:.2f}",
            "of which clustering": f"{scale * row.clustering_gmacs:.2f}",
            _PER_CENT: f"{row.top1:.1f} ± {row.top1_error:.1f}",
            "seeds": str(row.seeds),
        }
        for row in table.itertuples()
    ]
    return pd.DataFrame(rows)


def markdown(table: pd.DataFrame) -> str:
    """The table of `cost_accuracy` for people to read."""
    return shown(table).to_markdown(index=False, disable_numparse=True)


def best(table: pd.DataFrame, models: Iterable[str]) -> pd.DataFrame:
    """Table 2: for each method the configurations that no cheaper one equals or beats, over all models and schedules.

    Args:
        table: one row a configuration: model, level, downsampler, gmacs, top1.
        models: in the order of their width.

    Returns:
        One row for each configuration that is on the front of any method, by cost: model, level, and for each method
        its gmacs and top1, NaN where it is not on the method's own front.

    Raises:
        ValueError: if a method has two rows of one model and level.
    """
    results.check_alike(table, ("stage", "options", "carry"), "a front", within=["downsampler"])
    results.check_alike(table, ("gmacs", "top1"), "a front", within=["downsampler", "model", "level"])
    fronts = []
    for method, rows in table.groupby("downsampler", sort=False):
        front = pareto.front(rows)[["model", "level", "gmacs", "top1"]]
        fronts.append(front.rename(columns={"gmacs": f"{method}_gmacs", "top1": f"{method}_top1"}))
    wide = fronts[0].astype({"level": object})
    for front in fronts[1:]:
        wide = wide.merge(front.astype({"level": object}), on=["model", "level"], how="outer")
    costs = wide[[column for column in wide if column.endswith("_gmacs")]].min(axis=1)
    order = {model: index for index, model in enumerate(models)}
    return wide.assign(cost=costs, order=wide["model"].map(order)).sort_values(["cost", "order"]).reset_index(drop=True)


def breakdown(study: Study, found: pd.DataFrame) -> list[Section]:
    """Table 1: multiply-adds of the parts of four models, counted and printed. It needs no runs."""
    counted, printed = published.counted_breakdown(), published.breakdown()
    names = {
        "softmax_attention": "softmax-attention",
        "qkv_projections": "QKV projections",
        "o_projection": "O projection",
        "mlp": "Multi-layer perceptron",
        "total": "Total",
    }
    text = pd.DataFrame({"layer": list(names.values())})
    for name, title in published.BREAKDOWN_MODELS.items():
        text[f"{title}, counted"] = [f"{counted.at[part, name]:.2f}" for part in names]
        text[f"{title}, printed"] = [printed.at[part, name] for part in names]
    raw = counted.loc[list(names)].add_suffix("_counted").join(printed.add_suffix("_printed"))
    note = (
        "GFLOPs of one image, 1 multiply-add = 1 FLOP, counted on timm's models. As in the paper, this table (and no "
        "other) also counts softmax, once for each attention weight; the total includes patch embedding and head."
    )
    return [Section("paper", "Where the computation goes (Table 1)", text, raw.reset_index(names="part"), (note,))]


def trade_offs(study: Study, found: pd.DataFrame) -> list[Section]:
    """Table 2: for each method the best configurations over widths and schedules."""
    paper = pd.concat([published.plain_models(), published.accuracies()])
    methods = ("none", "power_bert", "kmedoids", "wkmedoids")
    paper = paper[paper["downsampler"].isin(methods)]
    wide = best(paper.sort_values("downsampler", key=lambda column: column.map(methods.index)), published.MODELS)
    notes = (
        "Selected from the paper's Tables 3 to 5, with GFLOPs as counted by the paper's rule, and its base models. The "
        "printed Table 2 differs in two places: it has PoWER-BERT on DeiT-e318, level 3, at 78.4 (Table 4: 78.3), and "
        "leaves out WK-Medoids on DeiT-e318, level 5 (1.14 GFLOPs, 76.8 %), which is on the front.",
    )
    parts = [Section("paper", f"Best trade-offs (Table 2). {published.SOURCE}", _wide_text(wide, methods), wide, notes)]
    if len(found):
        own = with_models(study, cost_accuracy(found))
        own = own.sort_values("downsampler", key=lambda column: column.map(methods.index))
        wide = best(own, published.MODELS)
        title = f"Best trade-offs (Table 2). {study.preset.title}, stand-ins for the paper's models"
        parts.append(Section(study.preset.name, title, _wide_text(wide, methods), wide, (how_many(own),)))
    return parts


def _wide_text(wide: pd.DataFrame, methods: Iterable[str]) -> pd.DataFrame:
    present = [method for method in methods if f"{method}_gmacs" in wide]
    scale, prefix = plotting.unit(wide[[f"{method}_gmacs" for method in present]].max().max())
    text = pd.DataFrame({"model": wide["model"].map(published.MODELS)})
    text["level"] = ["" if pd.isna(level) else str(int(level)) for level in wide["level"]]
    for method in present:
        label = plotting.STYLES[method]["label"].replace("Token Pooling, ", "")
        text[f"{label}: {prefix}FLOPs"] = [_number(scale * value) for value in wide[f"{method}_gmacs"]]
        text[f"{label}: {_PER_CENT}"] = [_number(value, 1) for value in wide[f"{method}_top1"]]
    return text


def by_method(model: str) -> Callable[[Study, pd.DataFrame], list[Section]]:
    """Tables 3 to 5: methods and schedules on one of the paper's models."""
    name = _TABLE_OF[model]

    def build(study: Study, found: pd.DataFrame) -> list[Section]:
        rows = published.accuracies()
        rows = rows[rows["model"] == model].reset_index(drop=True)
        text = pd.DataFrame(
            {
                "level: K": [
                    f"{row.level}: {_list(row.keep)}" if first else ""
                    for row, first in zip(rows.itertuples(), ~rows["level"].duplicated(), strict=True)
                ],
                "method": rows["downsampler"],
                "top-1 (%), printed": [_number(value, 1) for value in rows["top1"]],
                "GFLOPs, printed": rows["gflops_printed"],
                "GFLOPs, counted": rows["gmacs"].map("{:.2f}".format),
                "of which clustering, printed": rows["clustering_gflops_printed"].fillna("-"),
                "of which clustering, counted": rows["clustering_gmacs"].map("{:.2f}".format),
                "GFLOPs, where clustering runs": rows["honest_gmacs"].map("{:.2f}".format),
            }
        )
        note = (
            "\"Counted\" follows the paper's rule, which counts K-Medoids' distance matrix at all blocks; the last "
            "column counts clustering only where it runs. The totals come out to the printed digit"
            f"{_MISPRINTS.get(model, '')}; the printed shares of clustering are rounded now up, now down."
        )
        title = f"{published.MODELS[model]} (Table {name}). {published.SOURCE}"
        parts = [Section("paper", title, text, rows, (note,))]
        if len(found):
            own = cost_accuracy(found)
            title = f"Stand-in for {published.MODELS[model]} (Table {name}). {study.preset.title}"
            parts.append(Section(study.preset.name, title, shown(own), own, (how_many(own),)))
        return parts

    return build


def without_fine_tuning(study: Study, found: pd.DataFrame) -> list[Section]:
    """Each setting at each budget, beside ToMe's matching: see `experiments.extras.off_the_shelf`."""
    if found.empty:
        return []
    rows = off_the_shelf.compared(found)
    parts = []
    for part, purpose in off_the_shelf.HALVES.items():
        half = rows[rows["part"] == part]
        if half.empty:
            continue
        text = pd.DataFrame({"setting": half["candidate"].drop_duplicates().tolist()})
        for budget, at_budget in half.groupby("gmacs", sort=False):
            by_setting = at_budget.set_index("candidate").reindex(text["setting"])
            text[f"{budget:g} GMACs: {_PER_CENT}"] = [_number(value, 1) for value in by_setting["top1"]]
            text[f"{budget:g}: top-1 minus ToMe's"] = _with_error(by_setting, "top1", 1)
            text[f"{budget:g}: divergence"] = [_number(value, 4) for value in by_setting["divergence"]]
            text[f"{budget:g}: divergence minus ToMe's"] = _with_error(by_setting, "divergence", 4)
        images = int(found[found["part"] == part]["images"].iloc[0])
        title = f"Without fine-tuning, {study.preset.main.title}: the half of the images that the choice is {purpose}"
        parts.append(Section(f"{study.preset.name}-half{part[0]}", title, text, half, (_OFF_THE_SHELF.format(images),)))
    return parts


_OFF_THE_SHELF = (
    "{} images, one seed. All settings cost no more than the budget, clustering included, with schedules that decay "
    "where nothing else is said, and with sizes carried. Divergence: mean Kullback-Leibler divergence of the "
    "predictions from the plain model's, in nats. Differences to ToMe's matching with decaying schedules are paired by "
    "image, with their standard errors. KeyMedoids and ToMe's matching are no methods of the paper."
)


def _with_error(rows: pd.DataFrame, name: str, digits: int) -> list[str]:
    differences = zip(rows[f"{name}_difference"], rows[f"{name}_difference_error"], strict=True)
    return ["-" if pd.isna(value) else f"{value:+.{digits}f} ± {error:.{digits}f}" for value, error in differences]


def with_models(study: Study, table: pd.DataFrame) -> pd.DataFrame:
    """The table of `cost_accuracy` with a column `model` of the paper's names instead of timm's."""
    names = {variant.name: name for name, variant in study.preset.family.items()} | {"": study.preset.stands_for}
    return table.assign(model=table["variant"].map(names))


def how_many(table: pd.DataFrame) -> str:
    """Images and seeds behind the table of `cost_accuracy`, and what its errors are."""
    seeds = sorted({int(n) for n in table["seeds"]})
    counted = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    return f"{int(table['images'].iloc[0])} test images, {counted} seed{'s' if seeds != [1] else ''}; ±: standard error"


def _schedule(row: tuple) -> str:
    if row.keep is not None:
        return f"{int(row.level)}: {_list(row.keep)}"
    if row.options and row.options.get("at"):
        return f"after block {', '.join(str(block + 1) for block in row.options['at'])}"
    return ""


def _list(keep: Iterable[int]) -> str:
    return ", ".join(str(int(limit)) for limit in keep)


def _number(value: float, digits: int = 2) -> str:
    """As text, "-" where there is none."""
    return "-" if pd.isna(value) else f"{value:.{digits}f}"
