"""The study of models that are not fine-tuned, on made-up runs; what they measure, on a small model."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import tokenpool
from experiments import artifacts, presets
from experiments.extras import off_the_shelf
from tokenpool import flops
from tokenpool.runs import execute
from tokenpool.runs.measure import measure_agreement
from tokenpool.runs.run import Run, result_path
from tokenpool.runs.study import Study


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return Study(dataclasses.replace(presets.get("pretrained"), budgets=(0.8, 0.65)), tmp_path)


def write(study: Study, run: Run, correct: list[int], divergences: list[float]) -> None:
    metrics = {
        "top1": 100 * float(np.mean(correct)),
        "top1_error": 1.0,
        "divergence": float(np.mean(divergences)),
        "images": len(correct),
        "correct": correct,
        "divergences": divergences,
    }
    cost = {"gmacs": run.budget - 0.001, "backbone_gmacs": 0.5, "clustering_gmacs": 0.01, "parts": {}}
    outcome = {"setting": run.setting, "metrics": metrics, "cost": cost, "seconds": 1.0, "environment": {}}
    result_path(run, study.folder).write_text(json.dumps(outcome))


def test_halves_share_no_setting_twice(study: Study) -> None:
    runs = artifacts.needs(study, "table off_the_shelf")
    assert len({run.name for run in runs}) == len(runs)
    finalists = [candidate for candidate in off_the_shelf.CANDIDATES if candidate.finalist]
    assert len(runs) == 2 * (len(off_the_shelf.CANDIDATES) + len(finalists))
    labels = [candidate.label for candidate in off_the_shelf.CANDIDATES]
    assert len(set(labels)) == len(labels) and off_the_shelf.REFERENCE in labels


def test_differences_are_paired_by_image(study: Study) -> None:
    runs = {run.name: run for run in artifacts.needs(study, "table off_the_shelf")}
    ours, reference = (runs[f"agreement-{name}-0.65gmacs-half2-seed0"] for name in ("key_medoids", "tome"))
    write(study, ours, [1, 1, 1, 0], [0.1, 0.2, 0.3, 0.4])
    write(study, reference, [1, 0, 1, 0], [0.2, 0.2, 0.2, 0.6])
    rows = off_the_shelf.compared(study.points([ours, reference])).set_index("candidate")
    row = rows.loc["KeyMedoids"]
    assert row["top1_difference"] == 25 and row["divergence_difference"] == pytest.approx(-0.05)
    assert row["top1_difference_error"] == pytest.approx(np.std([0, 100, 0, 0], ddof=1) / 2)
    assert row["divergence_difference_error"] == pytest.approx(np.std([-0.1, 0, 0.1, -0.2], ddof=1) / 2)
    assert rows.loc["ToMe's matching", "top1_difference"] == 0
    other_seed = dataclasses.replace(reference, seed=1)
    write(study, other_seed, [1, 0, 1, 0], [0.2, 0.2, 0.2, 0.6])
    with pytest.raises(ValueError, match="differences cannot be made of rows of label tome.* seed is 0 or 1"):
        off_the_shelf.compared(study.points([ours, reference, other_seed]))
    (section,) = artifacts.sections([study], "off_the_shelf")
    assert section.name == "pretrained-half2" and "+25.0 ± 25.0" in section.markdown()


def test_without_the_reference_there_is_no_difference(study: Study) -> None:
    run = artifacts.needs(study, "table off_the_shelf")[0]
    write(study, run, [1, 0], [0.1, 0.3])
    rows = off_the_shelf.compared(study.points([run]))
    assert np.isnan(rows.loc[0, "top1_difference"]) and rows.loc[0, "top1"] == 50
    assert "| - " in artifacts.sections([study], "off_the_shelf")[0].markdown()


def test_a_run_meets_its_budget(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    run = next(run for run in artifacts.needs(study, "table off_the_shelf") if run.label.startswith("tome-step-0.65"))
    model = execute.build_model(dataclasses.replace(run, pretrained=False), study.folder)
    steps = -np.diff([196, *model.blocks.setting.keep])
    assert 0.63 < flops.count(model).gmacs <= 0.65 and steps.max() - steps.min() <= 1


@torch.no_grad()
def test_agreement(small, photos) -> None:
    labels = torch.tensor([0, 1, 2, 3, 4])
    batches = [(photos[:3], labels[:3]), (photos[3:], labels[3:])]
    data = SimpleNamespace(test_dataloader=lambda: batches, classes=list("abcdefg"))
    plain = small(photos).softmax(-1)
    tokenpool.patch(small, "kmedoids", 0.7)
    pooled = small(photos).softmax(-1)
    found = measure_agreement(small, data)
    expected = (plain * (plain / pooled).log()).sum(-1)
    assert np.allclose(found["divergences"], expected, atol=2e-5)
    assert found["divergence"] == pytest.approx(expected.mean().item(), abs=1e-5)
    assert found["correct"] == (pooled.argmax(-1) == labels).int().tolist() and found["images"] == 5
    same = measure_agreement(tokenpool.patch(small, "kmedoids", [36] * 4), data)
    assert same["divergence"] == pytest.approx(0, abs=1e-6)


def test_the_tables_of_the_documentation_are_the_runs() -> None:
    """The finalists' rows, on the half that had no part in the choice."""
    root = Path(__file__).parents[1]
    study = Study(presets.get("pretrained"), root / "results" / "pretrained")
    rows = off_the_shelf.compared(study.points(artifacts.needs(study, "table off_the_shelf")))
    rows = rows[rows["part"] == "2/2"].set_index(["candidate", "gmacs"])
    page = (root / "docs" / "results" / "off-the-shelf.md").read_text()
    for candidate in off_the_shelf.CANDIDATES:
        if candidate.finalist:
            cells = []
            for budget in study.preset.budgets:
                row = rows.loc[candidate.title, budget]
                for name, digits in (("top1", 1), ("divergence", 3)):
                    found, difference, error = (
                        row[f"{name}{each}"] for each in ("", "_difference", "_difference_error")
                    )
                    paired = f" ({difference:+.{digits}f} ± {error:.{digits}f})" if error else ""
                    cells.append(f"{found:.{digits}f}{paired}")
            assert f"\n| {candidate.title} | {' | '.join(cells)} |\n" in page, candidate.title
