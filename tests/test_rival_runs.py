"""Methods of other papers in a study: their runs, their table, and their curves in Figure 3b."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from scipy import stats

import tokenpool
from experiments import artifacts, needed, presets
from experiments.show import curves, rivals
from experiments.show.tables import cost_accuracy
from tokenpool import flops
from tokenpool.analysis import bits
from tokenpool.runs.run import Run
from tokenpool.runs.study import Study

RESULTS = Path(__file__).parents[1] / "results"
IMAGES = 400
CARRY = dict.fromkeys(("atc", "tome", "mctf"), True) | dict.fromkeys(
    ("evit", "dynamicvit", "key_medoids", "ward"), False
)
COSTS = {"wkmedoids": (0.27, 0.23, 0.19, 0.13, 0.07), "evit": (0.26, 0.22, 0.18, 0.12, 0.06)}
HVT = {"hvt-at5": 0.25, "hvt-at2-5": 0.17, "hvt-at0-2-4": 0.05}


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return Study(presets.get("cifar10_128"), tmp_path)


def correct(run: Run) -> np.ndarray:
    """Which images a made-up run classifies correctly: fewer, the higher its level."""
    random = np.random.default_rng([run.seed, *run.name.encode()])
    return random.random(IMAGES) < 0.85 - 0.08 * (run.level or 0)


def finished(runs: Sequence[Run]) -> pd.DataFrame:
    """Made-up results, as `Study.points` gives them."""
    rows = []
    for run in runs:
        right = correct(run)
        cost = HVT[run.label] if run.level is None else COSTS[run.downsampler][run.level]
        metrics = {"top1": 100 * right.mean(), "top1_error": 2.0, "images": IMAGES, "correct": bits.encode(right)}
        same = {"test_images": "photographs", "preprocessing": '{"crop_pct": 1.0}'}
        rows.append({"run": run.name} | run.setting | metrics | {"gmacs": cost, "clustering_gmacs": 0.0} | same)
    return pd.DataFrame(rows)


def of(runs: Sequence[Run], *labels: str) -> list[Run]:
    return [run for run in runs if run.label in labels or run.downsampler in labels]


def test_rivals_differ_from_the_papers_methods_in_nothing_but_the_method_and_its_sizes() -> None:
    study = Study(presets.get("cifar10_128"), RESULTS / "cifar10_128", named=False)
    reference = {run.level: run.setting for run in study.finetunes(["wkmedoids"], [2])}
    found = study.rivals()
    assert len(found) == 7 * 5 + 3 and {run.name for run in found} <= {run.name for run in artifacts.everything(study)}
    for run in found:
        common = {name: value for name, value in run.setting.items() if name not in ("label", "downsampler")}
        if run.downsampler == "hvt":
            expected = reference[0] | {"keep": None, "level": None, "schedule": "", "options": run.options}
        else:
            expected = reference[run.level] | {"carry": CARRY[run.downsampler]}
            assert run.name == f"finetune-{run.downsampler}-level{run.level}-seed2" and run.keep is not None
        assert common == {name: expected[name] for name in common}
        assert (run.recipe.ratio_penalty, run.recipe.distillation) == (2, 0.5)  # as published for DynamicViT
    # The table at the end of `reproduce` compares methods whose settings are equal.
    assert not {run.name for run in found} & {run.name for run in needed.protocol_runs(study)}
    assert not Study(study.preset, study.folder, full=False).rivals()
    assert not Study(presets.get("digits"), RESULTS / "digits").rivals()


def test_the_placements_of_hvt_cost_what_the_schedules_cost(study: Study) -> None:
    costs = []
    for run in of(study.rivals(), "hvt"):
        model = tokenpool.create_model(run.model, run.downsampler, **run.options, **run.model_options)
        costs.append(flops.count(model).gmacs)
    assert costs == pytest.approx([0.27, 0.17, 0.09], abs=0.005)


def test_differences_are_paired_by_image(study: Study) -> None:
    """Against SciPy's paired t-test, at the same schedule and at the same cost."""
    runs = needed.rivals(study)
    runs = of(runs, "evit", "wkmedoids", "hvt-at2-5", "hvt-at0-2-4")
    rows = rivals.by_schedule(finished(runs)).set_index("label")
    reference = {run.level: 100.0 * correct(run) for run in of(runs, "wkmedoids")}
    for run in of(runs, "evit", "hvt"):
        row, costs = rows.loc[run.label], np.array(COSTS["wkmedoids"])
        partners = {"schedule": reference.get(run.level), "cost": None}
        if costs[-1] <= row.gmacs <= costs[0]:
            partners["cost"] = np.array(
                [np.interp(row.gmacs, costs[::-1], image) for image in np.stack([*reference.values()][::-1], axis=1)]
            )
        for at, partner in partners.items():
            ends = row[[f"{at}_{end}" for end in ("difference", "low", "high")]].to_numpy(dtype=float)
            if partner is None:
                assert np.isnan(ends).all()
                continue
            difference = 100.0 * correct(run) - partner
            interval = stats.ttest_1samp(difference, 0).confidence_interval(0.95)
            np.testing.assert_allclose(ends, (difference.mean(), *interval), rtol=1e-6)
    assert rows.filter(like="_low").loc["wkmedoids-level0"].isna().all()

    means = rivals.by_method(finished(runs)).set_index("downsampler")
    over_levels = rows[rows["downsampler"] == "evit"]["schedule_difference"]
    assert means.at["evit", "schedule_difference"] == pytest.approx(over_levels.mean())
    assert means.at["evit", "schedule_pairs"] == 5 and means.at["evit", "cost_pairs"] == 4  # the last is too cheap
    assert np.isnan(means.at["hvt", "schedule_difference"]) and means.at["hvt", "cost_pairs"] == 1


def test_the_table_tells_what_is_missing(study: Study) -> None:
    assert artifacts.sections([study], "rivals") == []
    runs = of(needed.rivals(study), "evit", "hvt")
    methods, schedules = rivals.sections(study, finished(runs))
    assert methods.shown["difference, same schedule"].tolist() == ["-", "-"]  # without WK-Medoids
    assert "there is one seed (2)" in schedules.notes[1] and "WK-Medoids 5 of 5" in schedules.notes[2]
    assert "EViT" not in schedules.notes[2] and "MCTF 5 of 5" in schedules.notes[2]
    assert schedules.shown["schedule"].tolist()[5:] == ["after block 6", "after block 3, 6", "after block 1, 3, 5"]

    both = dataclasses.replace(study.preset, added_seeds=(0, 2))
    study = Study(both, study.folder)
    found = finished(of(needed.rivals(study), "evit", "hvt", "wkmedoids"))
    methods, schedules = rivals.sections(study, found)
    assert "over images and seeds" in schedules.notes[1] and methods.raw["schedule_pairs"].iloc[0] == 10
    assert "-" not in methods.shown["difference, same schedule"].tolist()[:1]
    assert set(schedules.raw["seeds"]) == {2}


def test_figure_3b_has_dynamicvit_and_hvt_from_own_runs(study: Study) -> None:
    runs = artifacts.needs(study, "figure 3b")
    assert {run.seed for run in runs} == {2} and {run.downsampler for run in runs} >= {"dynamicvit", "hvt"}
    found = finished(of(runs, "hvt"))
    (panel,) = curves.own_3b(study, cost_accuracy(found))
    drawn = {series.style["label"]: series.rows for series in panel.series}
    assert sorted(drawn["HVT"]["gmacs"]) == sorted(HVT.values()) and drawn["DynamicViT"].empty
    figure = curves.of(curves.own_3b, curves.printed_3b)(study, found)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    plt.close(figure)
    assert labels.count("HVT") == labels.count("DynamicViT") == 1  # one colour for own runs and printed numbers
    digits = Study(presets.get("digits"), RESULTS / "digits")
    assert {run.downsampler for run in artifacts.needs(digits, "figure 3b")} == {"none", "power_bert", "wkmedoids"}
