"""A hyper-parameter is one field of Recipe: an option, a part of each stored setting, and checked in one place."""

import json
import re
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import typer

from experiments import presets
from experiments.artifacts import everything
from experiments.commands import COMMANDS
from tokenpool.analysis import results
from tokenpool.commands.shell import load
from tokenpool.runs import data_sets
from tokenpool.runs.run import DEFAULTS, Run, check_same, plain
from tokenpool.runs.study import Study
from tokenpool.training.recipe import Recipe

ROOT = Path(__file__).parents[1]
OTHER = {  # another value than the default for each field
    **{"epochs": 1, "batch_size": 500, "learning_rate": 2e-3, "warmup_epochs": 0.5, "weight_decay": 0.2},
    **{"label_smoothing": 0.2, "final_learning_rate": 1e-4, "mixup": 0.4, "cutmix": 0.3, "repeats": 2},
    **{"ema_decay": 0.5, "crop_pct": 0.7, "augmentation": "light", "train_per_class": 3, "test_per_class": 4},
    **{"retention_penalty": 0.1, "retention_learning_rate": 0.3, "ratio_penalty": 1.0, "distillation": 0.0},
}
FIELDS = {each.name: each for each in fields(Recipe)}


def options() -> dict[str, typer.core.TyperOption]:
    """The options of `train`, by their name in Python."""
    return {option.name: option for option in load("train", COMMANDS["train"]).params}


@pytest.mark.parametrize("name", FIELDS)
def test_each_field_is_an_option_with_its_help_and_a_part_of_the_setting(name: str) -> None:
    option = options()[name]
    assert option.opts == [f"--{name.replace('_', '-')}"] and option.help == FIELDS[name].metadata["help"]
    assert Run("", "", "", "", recipe=Recipe(**{name: OTHER[name]})).setting == DEFAULTS | {name: OTHER[name]}
    assert OTHER[name] != DEFAULTS[name]


def test_what_is_given_to_train_reaches_the_run_and_the_rest_is_the_presets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_process
) -> None:
    seen = []

    def execute(run: Run, *given: object, **options: object) -> dict:
        seen.append(run)
        raise ValueError("enough")

    monkeypatch.setattr("tokenpool.runs.execute.execute", execute)
    given = {name: value for name, value in OTHER.items() if name != "learning_rate"}
    in_process(
        "train", *(f"--{name.replace('_', '-')}={value}" for name, value in given.items()), f"--output={tmp_path}"
    )
    in_process("train", f"--output={tmp_path}")
    digits = presets.get("digits")
    assert seen[0].recipe == Recipe(**given, learning_rate=digits.recipe.learning_rate)
    assert seen[1].recipe == replace(digits.recipe, epochs=digits.base_epochs)


@pytest.mark.parametrize("folder, runs", [("cifar10_128", 260), ("digits", 421), ("pretrained", 208)])
def test_every_stored_setting_makes_a_run_that_gives_it_back(folder: str, runs: int) -> None:
    paths = sorted((ROOT / "results" / folder).glob("*.json"))
    assert len(paths) == runs
    for path in paths:
        stored = json.loads(path.read_text())["setting"]
        run = Run.from_setting(stored)
        found = plain(run.setting)
        assert {name: found[name] for name in stored} == stored, path
        assert all(found[name] == plain(DEFAULTS[name]) for name in found.keys() - stored.keys()), path
        assert run.name == path.stem
    if folder == "cifar10_128":  # DynamicViT's keys are newer; files of the other folders are older than more keys
        assert [name for name in found if name not in ("ratio_penalty", "distillation")] == list(stored)


@pytest.mark.parametrize(
    "name, full, found, runs",
    [
        ("digits", True, 398, 398),
        ("cifar10_128", True, 255, 271),
        ("pretrained", True, 208, 208),
    ],
)
def test_studies_find_their_stored_runs(name: str, full: bool, found: int, runs: int) -> None:
    study = Study(presets.get(name), ROOT / "results" / name, full, named=False)
    wanted = everything(study)
    assert len(wanted) == runs
    points = study.points(wanted)
    assert len(points) == found and set(FIELDS) <= set(points.columns)


@pytest.mark.parametrize(
    "changes, complaint",
    [
        ({"learning_rate": -1.0, "final_learning_rate": -2.0}, "learning_rate = -1.0 must not be negative; final_"),
        ({"final_learning_rate": 1e-3}, "final_learning_rate = 0.001 is above learning_rate = 0.0005"),
        ({"batch_size": 0}, "batch_size = 0 must be a whole number, at least 1"),
        ({"repeats": 1.5}, "repeats = 1.5 must be a whole number, at least 1"),
        ({"ema_decay": 1.0}, r"ema_decay = 1.0 must lie in \[0, 1\)"),
        ({"crop_pct": 1.1}, r"crop_pct = 1.1 must lie in \[0, 1\]"),
        ({"weight_decay": float("nan")}, "weight_decay = nan must not be negative"),
        ({"augmentation": "dark"}, "augmentation = 'dark' must be deit or light"),
    ],
)
def test_a_value_out_of_range_is_refused(changes: dict, complaint: str) -> None:
    with pytest.raises(ValueError, match=f"^{complaint}"):
        Recipe(**changes)


def test_every_augmentation_has_a_data_module() -> None:
    assert tuple(data_sets.AUGMENTATIONS) == FIELDS["augmentation"].metadata["choices"]
    assert not FIELDS.keys() & {each.name for each in fields(Run)}


def test_the_recipe_of_a_checkpoint_is_compared(tmp_path: Path) -> None:
    run = Run("train", "x", "digits", "", recipe=Recipe(**OTHER))
    results.save({"setting": run.setting, "metrics": {}, "cost": {}}, tmp_path / "x.json")
    stored = results.read(tmp_path / "x.json")["setting"]
    check_same(run, stored, tmp_path)
    for name, value in asdict(Recipe()).items():
        changed = Run.from_setting(stored | {name: value})
        with pytest.raises(ValueError, match=re.escape(f"({name} was {OTHER[name]!r}, now {value!r})")):
            check_same(changed, stored, tmp_path)
