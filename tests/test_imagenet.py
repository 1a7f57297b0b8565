"""The ImageNet presets: DeiT's recipe as documented, and the whole protocol in small."""

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from timm.scheduler import CosineLRScheduler

from experiments import presets
from experiments.artifacts import needs
from tokenpool import schedules
from tokenpool.runs import data_sets, execute
from tokenpool.runs.study import Study
from tokenpool.training.module import ClassificationModule

ROOT = Path(__file__).parents[1]
PRESET = presets.get("imagenet")


def documented() -> dict[str, str]:
    """What the table of docs/how-to/imagenet.md says that we do."""
    rows = re.findall(
        r"^\| ([^|]+) \| ([^|]+) \| [^|]+ \|$", (ROOT / "docs" / "how-to" / "imagenet.md").read_text(), re.MULTILINE
    )
    return dict(rows)


@pytest.mark.parametrize(
    "name, value",
    [
        ("epochs of the base model", PRESET.base_epochs),
        ("epochs of fine-tuning", PRESET.finetune_epochs),
        ("epochs of each search", PRESET.search_epochs),
        ("images a step", PRESET.recipe.batch_size),
        ("learning rate", PRESET.recipe.learning_rate),
        ("warm-up epochs", PRESET.recipe.warmup_epochs),
        ("final learning rate", PRESET.recipe.final_learning_rate),
        ("weight decay", PRESET.recipe.weight_decay),
        ("label smoothing", PRESET.recipe.label_smoothing),
        ("mixup", PRESET.recipe.mixup),
        ("CutMix", PRESET.recipe.cutmix),
        ("repeated augmentation", PRESET.recipe.repeats),
        ("stochastic depth", PRESET.model_options["drop_path_rate"]),
        ("moving average of the weights", PRESET.recipe.ema_decay),
        ("precision", PRESET.trainer_options["precision"]),
        ("share of the image that evaluation crops", PRESET.recipe.crop_pct),
    ],
)
def test_the_documented_recipe_is_the_preset(name: str, value: object) -> None:
    assert documented()[name] == str(value)


def test_the_recipe_reaches_data_module_and_optimiser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(data_sets.DATA, str(tmp_path))
    run = Study(PRESET, tmp_path).base(0)
    data = execute.data_module(run)
    assert data.recipe == run.recipe and data.cropping["crop_pct"] == 0.875
    module = execute.training_module(run, execute.build_model(run, tmp_path))
    assert module.ema.decay == 0.99996 and module.recipe == run.recipe
    assert [round(block.drop_path1.drop_prob, 3) for block in module.model.blocks[1:]] == [
        round(0.1 * index / 11, 3) for index in range(1, 12)
    ]
    assert module.model.embed_dim == 384


def test_learning_rates_rise_and_fall_as_deits() -> None:
    module = ClassificationModule(torch.nn.Linear(2, 2), 2, PRESET.recipe)
    # 300 epochs of 10 steps
    module.trainer = SimpleNamespace(max_epochs=300, max_steps=-1, datamodule=None, estimated_stepping_batches=3000)
    made = module.configure_optimizers()
    rates = []
    for _ in range(3000):
        rates.append(made["optimizer"].param_groups[0]["lr"])
        made["optimizer"].step()
        made["lr_scheduler"]["scheduler"].step()
    assert np.all(np.diff(rates[:51]) > 0) and rates[50] == max(rates) == pytest.approx(1e-3)
    assert np.all(np.diff(rates[50:]) < 0) and rates[-1] == pytest.approx(1e-5, rel=1e-3)
    reference = CosineLRScheduler(
        torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], 1e-3), t_initial=295, lr_min=1e-5
    )
    found = [rates[50 + 10 * epoch] for epoch in range(295)]
    assert found == pytest.approx([reference._get_lr(epoch)[0] for epoch in range(295)], rel=1e-6)


def test_printed_schedules_need_no_search(tmp_path: Path) -> None:
    study = Study(presets.get("imagenet_printed"), tmp_path)
    runs = [run for run in needs(study, "table 2") if run.level is not None]
    assert len(runs) == 3 * 3 * schedules.LEVELS and all(run.keep is not None for run in runs)
    for run in runs:
        name = {"": "deit_small"}.get(run.variant, f"deit_{run.variant}")
        assert run.keep == tuple(schedules.paper(name, run.level)) and name.split("_")[1] in run.model
    assert study.prerequisites(runs)[1] == []
    assert {run.stage for run in study.missing(runs)} == {"base", "finetune"}
    searched = Study(presets.get("imagenet"), tmp_path)
    assert {run.stage for run in searched.missing(needs(searched, "table 2"))} == {"base", "search", "finetune"}
