"""The paper's published numbers, and the counted costs of its models.

python -m experiments.show.published    # counts anew: some minutes
"""

from functools import cache
from pathlib import Path

import pandas as pd
from tqdm import tqdm

import tokenpool
from tokenpool import flops, schedules

FOLDER = Path(__file__).parents[1] / "paper"
MODELS = {"deit_tiny": "DeiT-Ti", "deit_e252": "DeiT-e252", "deit_e318": "DeiT-e318", "deit_small": "DeiT-S"}
SOURCE = "Marin et al. 2021, ImageNet"
BREAKDOWN_MODELS = {
    "vit_base_patch16_384": "ViT-B/384",
    "vit_base_patch16_224": "ViT-B",
    "deit_small_patch16_224": "DeiT-S",
    "deit_tiny_patch16_224": "DeiT-Ti",
}


@cache
def accuracies() -> pd.DataFrame:
    """Tables 3 to 5 as printed, one row a method and schedule, with the costs that were counted on the real models.

    The columns `gmacs` and `clustering_gmacs` follow the paper's rule (`idle_clustering`), `honest_gmacs` and
    `honest_clustering_gmacs` count clustering only where it runs.
    """
    as_printed = {"gflops_printed": str, "clustering_gflops_printed": str}  # with their trailing zeros
    printed = pd.read_csv(FOLDER / "accuracy_tables.csv", dtype=as_printed)
    printed = printed[printed["table"] > 2].rename(columns={"sparsity_level": "level", "method": "downsampler"})
    printed = printed.rename(columns={"top1_percent": "top1"}).astype({"level": int})
    printed["keep"] = [schedules.paper(row.model, row.level) for row in printed.itertuples()]
    return printed.merge(_counted(), on=["model", "level", "downsampler"], how="left", validate="one_to_one")


@cache
def best_trade_offs() -> pd.DataFrame:
    """Table 2 as printed: one row a method and cost."""
    printed = pd.read_csv(FOLDER / "accuracy_tables.csv")
    printed = printed[printed["table"] == 2].rename(columns={"method": "downsampler", "top1_percent": "top1"})
    return printed.rename(columns={"gflops_printed": "gmacs"})


@cache
def plain_models() -> pd.DataFrame:
    """DeiT-Ti, e252, e318 and S, trained twice as long (Table 2), with their counted costs."""
    printed = best_trade_offs()
    printed = printed[printed["downsampler"] == "none"][["model", "top1"]]
    return printed.merge(_counted()[lambda counted: counted["downsampler"] == "none"], on="model").drop(columns="level")


@cache
def by_others() -> pd.DataFrame:
    """Points that others have published, with their source: model, keep_rate, gmacs, top1, source."""
    frame = pd.read_csv(FOLDER / "published_by_others.csv")
    return frame.rename(columns={"gflops": "gmacs", "top1_percent": "top1"})


@cache
def breakdown() -> pd.DataFrame:
    """Table 1 as printed, as text: parts by models, in GFLOPs."""
    return pd.read_csv(FOLDER / "compute_breakdown.csv", index_col="part", dtype=str)


@cache
def counted_breakdown() -> pd.DataFrame:
    """Table 1, counted now on timm's models. This table alone also counts softmax, once for each attention weight."""
    columns = {}
    for name in BREAKDOWN_MODELS:
        model = tokenpool.create_model(name)
        count = flops.count(model)
        block = model.blocks[0].attn
        tokens = model.patch_embed.num_patches + model.num_prefix_tokens
        softmax = len(model.blocks) * block.num_heads * tokens**2 / 1e9
        parts = {part: count.parts[part] for part in ("softmax_attention", "qkv_projections", "o_projection", "mlp")}
        parts["softmax_attention"] += softmax
        columns[name] = parts | {"total": count.gmacs + softmax}
    return pd.DataFrame(columns)


def count_paper() -> pd.DataFrame:
    """Count the plain models (level -1) and those of Tables 3 to 5: one row a model, schedule and method.

    Weights change no cost, and PoWER-BERT costs what the others cost without their clustering.
    """
    rows = []
    for model in MODELS:
        plain = round(flops.count(tokenpool.create_model(f"{model}_patch16_224")).gmacs, 6)
        rows.append((model, -1, "none", plain, 0.0, plain, 0.0))
    for model, level in tqdm([(model, level) for model in _WIDTHS for level in range(schedules.LEVELS)]):
        keep = schedules.paper(model, level)
        for method in ("kmedoids", "kmeans") if model == "deit_small" else ("kmedoids",):
            count = flops.count(tokenpool.create_model(f"{model}_patch16_224", method, keep, carry=False))
            printed = flops.paper_clustering_macs(method, keep, 196, _WIDTHS[model]) / 1e9
            costs = count.backbone_gmacs + printed, printed, count.gmacs, count.clustering_gmacs
            rows += [(model, level, name, *(round(cost, 6) for cost in costs)) for name in (method, f"w{method}")]
            if method == "kmedoids":
                backbone = round(count.backbone_gmacs, 6)
                rows.append((model, level, "power_bert", backbone, 0.0, backbone, 0.0))
    columns = ["model", "level", "downsampler", "gmacs", "clustering_gmacs", "honest_gmacs", "honest_clustering_gmacs"]
    return pd.DataFrame(rows, columns=columns)


_WIDTHS = {"deit_small": 384, "deit_e318": 318, "deit_e252": 252}  # that the paper downsamples


@cache
def _counted() -> pd.DataFrame:
    return pd.read_csv(FOLDER / "counted.csv")


if __name__ == "__main__":
    count_paper().to_csv(FOLDER / "counted.csv", index=False)
