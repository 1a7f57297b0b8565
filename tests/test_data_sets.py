"""A data set is one entry of the registry: its runs, identities, checks and messages follow from the entry."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from experiments import presets
from experiments.artifacts import everything
from tokenpool.runs import checks, data_sets
from tokenpool.runs.data_sets import DATA, DATA_SETS, DataSet, data_set
from tokenpool.runs.execute import data_module
from tokenpool.runs.run import Identities, Run, image_source
from tokenpool.runs.study import Study
from tokenpool.training.data import DigitsDataModule


@pytest.fixture
def mine(monkeypatch: pytest.MonkeyPatch) -> DataSet:
    """A registered data set that a package contains, with the same split for all seeds."""
    entry = DataSet("mine", "my digits", DigitsDataModule, lambda split: f"split {split}", split_by_seed=False)
    monkeypatch.setitem(DATA_SETS, "mine", entry)
    return entry


def test_an_embedded_data_set_is_one_entry(mine: DataSet, tmp_path: Path) -> None:
    assert data_sets.embedded() == ("digits", "mine")
    run = Run("train", "x", "mine", "deit_digits_patch2_16", seed=3, split=2)
    assert Identities(tmp_path).of(run) == {"test_images": "split 2", "preprocessing": "{}"}
    assert Identities(tmp_path, named=False).of(replace(run, split=1))["test_images"] == "split 1"
    assert isinstance(data_module(run), DigitsDataModule)
    with pytest.raises(ValueError, match="my digits are few; only image folders can be limited"):
        data_module(replace(run, limit=5))
    checks.check_data([run])  # needs no folder
    digits = presets.get("digits")
    with pytest.raises(ValueError, match="redundancy_images = 5 must be 0 for my digits"):
        replace(digits, name="own", data="mine", redundancy_images=5)
    runs = everything(Study(replace(digits, name="own", data="mine"), tmp_path))
    assert {run.split for run in runs} == {0} and {run.seed for run in runs} == {0, 1, 2}
    assert all(run.split == run.seed for run in everything(Study(digits, tmp_path)))


def test_images_that_must_be_named_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(DATA, raising=False)
    for name in ("imagenet", "cifar10"):
        assert data_set(name).must_be_named and not data_set(name).is_known and not data_set(name).embedded
        asked = f"no images: --data or the variable {DATA} must name {data_set(name).title}"
        with pytest.raises(ValueError, match=re.escape(asked)):
            image_source(Run("train", "x", name, "deit_tiny_patch16_224"))
    monkeypatch.setenv(DATA, "/images")
    assert data_set("cifar10").is_known and image_source(Run("train", "x", "cifar10", "")) == "/images"
    folder = data_set("/my/folder")
    assert folder.is_known and not folder.must_be_named and not folder.embedded
