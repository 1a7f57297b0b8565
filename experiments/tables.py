"""Tables as queries over finished runs."""

import pandas as pd

from tokenpool import plotting


def cost_accuracy(frame: pd.DataFrame) -> pd.DataFrame:
    """Every method and schedule of the protocol: cost, and top-1 as the mean over seeds with its standard error.

    With one seed the error is that of the finite test set, with several it is that of the mean over seeds. The plain
    model appears twice: as trained ("none, base") and fine-tuned as long as the others ("none").

    Args:
        frame: one row a run, from `tokenpool.results.load`.
    """
    runs = frame[frame["stage"].isin(["base", "finetune"])].copy()
    runs["variant"] = runs["label"].where(runs["stage"] == "finetune", "base")
    for column in ("level", "keep"):
        runs[column] = runs[column].astype(object).where(runs[column].notna(), None) if column in runs else None
    groups = runs.groupby("variant", sort=False)
    table = groups.agg(
        downsampler=("downsampler", "first"),
        stage=("stage", "first"),
        level=("level", "first"),
        keep=("keep", "first"),
        options=("options", "first"),
        gmacs=("gmacs", "mean"),
        clustering_gmacs=("clustering_gmacs", "mean"),
        top1=("top1", "mean"),
        top1_error=("top1", "sem"),
        seeds=("seed", "nunique"),
        images=("images", "first"),
    )
    single = table["seeds"] == 1
    table.loc[single, "top1_error"] = groups["top1_error"].first()[single]
    order = {name: index for index, name in enumerate(dict.fromkeys(runs["downsampler"]))}
    table["order"] = table["downsampler"].map(order)
    return table.sort_values(["order", "gmacs"], ascending=[True, False]).drop(columns="order").reset_index(drop=True)


def differences(frame: pd.DataFrame, reference: str = "power_bert") -> pd.DataFrame:
    """Top-1 of each method minus that of the reference with the same seed and schedule, averaged over schedules.

    The mean over seeds with its standard error; no rows where fewer than two seeds are there.

    Args:
        frame: one row a run, from `tokenpool.results.load`.
        reference: name of the method to compare with.
    """
    runs = frame[(frame["stage"] == "finetune") & frame["level"].notna()]
    top1 = runs.pivot_table(index=["seed", "level"], columns="downsampler", values="top1")
    if reference not in top1:
        return pd.DataFrame(columns=["method", "difference", "error", "seeds"])
    by_seed = top1.sub(top1[reference], axis=0).groupby("seed").mean().drop(columns=reference)
    rows = pd.DataFrame({"difference": by_seed.mean(), "error": by_seed.sem(), "seeds": by_seed.count()})
    return rows[rows["seeds"] > 1].rename_axis("method").reset_index()


def differences_markdown(rows: pd.DataFrame, reference: str = "power_bert") -> str:
    """The table of `differences` for people to read."""
    shown = {f"top-1 minus {reference}'s": [f"{row.difference:+.2f} ± {row.error:.2f}" for row in rows.itertuples()]}
    return pd.DataFrame({"method": rows["method"]} | shown).to_markdown(index=False, disable_numparse=True)


def markdown(table: pd.DataFrame) -> str:
    """The table of `cost_accuracy` for people to read. Small models are stated in units of 10^6."""
    scale, prefix = plotting.unit(table["gmacs"].max())
    rows = [
        {
            "method": row.downsampler + (", base" if row.stage == "base" else ""),
            "schedule": _schedule(row),
            f"{prefix}MACs": f"{scale * row.gmacs:.2f}",
            "of which clustering": f"{scale * row.clustering_gmacs:.2f}",
            "top-1 (%)": f"{row.top1:.1f} ± {row.top1_error:.1f}",
            "seeds": row.seeds,
        }
        for row in table.itertuples()
    ]
    return pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True)


def _schedule(row: tuple) -> str:
    if row.keep is not None:
        return f"{int(row.level)}: {', '.join(str(int(limit)) for limit in row.keep)}"
    if row.options and row.options.get("at"):
        return f"after block {', '.join(str(block + 1) for block in row.options['at'])}"
    return ""
