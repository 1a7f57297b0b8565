"""`benchmark-methods`: the same cost for all methods; one half of the images chooses, the other half measures."""

import csv
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import tokenpool
from tokenpool import flops
from tokenpool.analysis import results
from tokenpool.downsampling import REGISTRY
from tokenpool.runs import execute, pool
from tokenpool.runs.run import Run, result_path
from tokenpool.runs.study import Study
from tokenpool.tools import benchmark_methods as benchmark
from tokenpool.tools import benchmarked

MODEL = "deit_tiny_patch16_224"
OPTIONS = {"img_size": 96, "embed_dim": 48, "depth": 4, "num_heads": 3}
SHARES = ("--share", "0.6", "--share", "0.8")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder of twelve images of two classes, and weights with random numbers that give attention a shape."""
    root, values = tmp_path_factory.mktemp("sources"), np.random.default_rng(0)
    for name in "ab":
        (root / "images" / "val" / name).mkdir(parents=True)
        for index in range(6):
            image = Image.fromarray(values.integers(0, 256, (12, 12, 3), dtype=np.uint8))
            image.resize((96, 96)).save(root / "images" / "val" / name / f"{index}.png")
    torch.manual_seed(0)
    state = timm.create_model(MODEL, num_classes=2, **OPTIONS).state_dict()
    state = {key: 0.15 * torch.randn_like(value) if value.dim() > 1 else value for key, value in state.items()}
    save_file(state, root / "weights.safetensors")
    return root / "images", root / "weights.safetensors"


def command(sources: tuple[Path, Path], output: Path, *more: str) -> list[str]:
    options = [f"--model-option={key}={value}" for key, value in (OPTIONS | {"num_classes": 2}).items()]
    images, weights = map(str, sources)
    given = ["--model", MODEL, "--data", images, "--weights", weights, "--output", str(output), "--jobs", "1"]
    return ["benchmark-methods", *given, *options, *more]


def study(folder: Path, shares: tuple[float, ...] = (0.6,), **options: object) -> Study:
    return benchmark.study_of(MODEL, OPTIONS | options, shares, True, folder)


def test_all_methods_cost_the_same(tmp_path: Path) -> None:
    made = study(tmp_path, (0.6, 0.8))
    planned = benchmark.plan(made, benchmark.candidates())
    assert not planned.skipped
    plain = timm.create_model(MODEL, **OPTIONS)
    cost = flops.count(plain).gmacs
    families: dict[str, set[str]] = {}
    for run in planned.runs:
        patched = tokenpool.patch(plain, run.downsampler, list(run.keep), carry=True, **run.options)
        assert 0.98 * run.budget <= flops.count(patched).gmacs <= run.budget, run.name
        assert run.part == "1/2" and run.budget == pytest.approx((0.6, 0.8)[run.budget > 0.7 * cost] * cost, rel=1e-4)
        families.setdefault(run.downsampler, set()).add(run.family)
    expected = {name for name in tokenpool.downsampling.with_schedule() if name != "dynamicvit"}
    assert families.keys() == expected
    assert all(families[name] == {"decay", "step"} for name in ("tome", "pitome", "tofu", "mctf"))
    assert all(families[name] == {"decay", "stages"} for name in ("evit", "atc", "dpc_knn"))
    assert sum(len(found) for found in families.values()) == len(expected) + 7


def test_published_counts_are_used_where_they_meet_the_budget(tmp_path: Path) -> None:
    """DiffRate's counts for "0.8" cost 0.811 GMACs, as counted here. No published counts cost 0.98 to 1.0 of 0.75."""
    made = benchmark.study_of(MODEL, {}, (0.815, 0.75), False, tmp_path)
    runs = benchmark.plan(made, ["diffrate"]).runs
    assert [(run.budget, run.family) for run in runs] == [(0.815, "decay"), (0.815, "published"), (0.75, "decay")]
    model = tokenpool.create_model(MODEL, "diffrate", list(runs[1].keep), **runs[1].options)
    assert runs[1].options == {"prune": "diffrate_deit_tiny:0.8"}
    assert 0.98 * 0.815 <= flops.count(model).gmacs <= 0.815


def write(study: Study, run: Run, correct: list[int], divergences: list[float], gmacs: float | None = None) -> None:
    metrics = {
        "top1": 100 * float(np.mean(correct)),
        "top1_error": 1.0,
        "divergence": float(np.mean(divergences)),
        "relative_error": [0.0, 0.25, 0.5, 0.0],
        "images": len(correct),
        "correct": correct,
        "divergences": divergences,
    }
    cost = {"gmacs": gmacs or 0.99 * (run.budget or 1), "backbone_gmacs": 0.5, "clustering_gmacs": 0.0, "parts": {}}
    outcome = {"setting": run.setting, "metrics": metrics, "cost": cost, "seconds": 1.0, "environment": {}}
    result_path(run, study.folder).write_text(json.dumps(outcome))


def test_one_half_chooses_and_the_other_measures(tmp_path: Path) -> None:
    """The schedule that is better on the first half is the worse one on the second, and is measured all the same."""
    made = study(tmp_path)
    decay, step, medoids = benchmark.plan(made, ["tome", "key_medoids"]).runs
    assert (decay.family, step.family, medoids.downsampler) == ("decay", "step", "key_medoids")
    write(made, decay, [1, 1, 1, 1], [0.3, 0.3, 0.3, 0.3])
    write(made, step, [0, 0, 0, 0], [0.2, 0.2, 0.2, 0.2])
    write(made, medoids, [1, 1, 1, 1], [0.1, 0.1, 0.1, 0.1])
    runs = [decay, step, medoids]
    confirming = benchmark.confirmations(runs, made.points(runs))
    assert [(run.downsampler, run.family, run.part) for run in confirming] == [
        ("tome", "step", "2/2"),
        ("key_medoids", "decay", "2/2"),
    ]
    assert not {run.name for run in confirming} & {run.name for run in runs}
    unused = dataclasses.replace(decay, label=f"{decay.label[:-1]}2", part="2/2")
    write(made, unused, [1, 1, 1, 1], [0.0, 0.0, 0.0, 0.0])
    write(made, confirming[0], [1, 1, 0, 0], [0.9, 0.6, 0.3, 0.2])
    write(made, confirming[1], [1, 0, 0, 0], [0.1, 0.2, 0.1, 0.4])
    rows = benchmark.compared(made.points([*runs, *confirming]), "key_medoids").set_index("downsampler")
    tome = rows.loc["tome"]
    assert tome["family"] == "step" and tome["divergence"] == pytest.approx(0.5) and tome["top1"] == 50
    assert tome["divergence_difference"] == pytest.approx(0.3)
    assert tome["divergence_difference_error"] == pytest.approx(np.std([0.8, 0.4, 0.2, -0.2], ddof=1) / 2)
    assert tome["top1_difference"] == 25 and tome["top1_difference_error"] == pytest.approx(25)
    assert np.isnan(rows.loc["key_medoids", "top1_difference"]) and tome["error"] == 0.75
    write(made, confirming[0], [1, 1, 0, 0], [0.9, 0.6, 0.3, 0.2], gmacs=0.97 * step.budget)
    with pytest.raises(ValueError, match="agreement-tome-step-.*-half2-seed0 costs .* not 0.98 to 1 of its budget"):
        benchmark.compared(made.points(confirming), "key_medoids")


def test_a_method_that_the_model_cannot_have_is_named(tmp_path: Path) -> None:
    planned = benchmark.plan(study(tmp_path, class_token=False, global_pool="avg"), ["key_medoids", "evit"])
    assert {run.downsampler for run in planned.runs} == {"key_medoids"}
    (line,) = planned.skipped
    assert line.startswith("evit: EViT needs the attention of a class token")


@pytest.mark.slow
def test_from_images_to_the_table(in_process, sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    methods = ("--method", "tome")
    done = in_process(*command(sources, tmp_path, *SHARES, *methods, "--time", "--calibrate", "all"))
    assert done.returncode == 0, done.stderr
    found = {path.stem: results.read(path) for path in sorted(tmp_path.glob("agreement-*.json"))}
    calibrated = {name: found.pop(name) for name in list(found) if "calibrated" in name}
    searches = [results.read(path) for path in tmp_path.glob("calibration-*.json")]
    # The half that chooses: two schedules of tome, one of key_medoids. The other half: one each, and the plain model.
    assert len(found) == 2 * (3 + 2) + 1 and len(list(tmp_path.glob("throughput-*.json"))) == 2 * 4
    assert len(calibrated) == len(searches) == 2 * 2
    assert_calibrated(calibrated, searches, found, tmp_path, monkeypatch, sources)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")}

    chosen = {}  # by hand from the JSON files
    for outcome in found.values():
        setting, divergence = outcome["setting"], outcome["metrics"]["divergence"]
        if setting["part"] == "1/2":
            each = chosen.setdefault((setting["budget"], setting["downsampler"]), {})
            each[setting["family"]] = divergence
    confirmed = {
        (one["setting"]["budget"], one["setting"]["downsampler"]): one
        for one in found.values()
        if one["setting"]["part"] == "2/2" and one["setting"]["budget"]
    }
    all_rows = [row for path in sorted(tmp_path.glob("table-*.csv")) for row in csv.DictReader(path.open())]
    rows = [row for row in all_rows if row["family"] != "calibrated"]
    references = {one["setting"]["budget"]: one for name, one in calibrated.items() if "-key_medoids-" in name}
    assert len(all_rows) == 2 * len(rows)
    assert {(float(row["budget"]), row["downsampler"]) for row in rows} == chosen.keys() == confirmed.keys()
    for row in rows:
        gmacs, method = float(row["budget"]), row["downsampler"]
        assert row["family"] == min(chosen[gmacs, method], key=chosen[gmacs, method].get)
        own, other = (one["metrics"] for one in (confirmed[gmacs, method], references[gmacs]))
        assert confirmed[gmacs, method]["setting"]["family"] == row["family"] and own["images"] == 6
        assert float(row["divergence"]) == own["divergence"] and float(row["speed_up"]) > 0
        assert float(row["error"]) == pytest.approx(sum(own["relative_error"])) and own["relative_error"][3] > 0
        difference = np.array(own["divergences"]) - np.array(other["divergences"])
        assert float(row["divergence_difference"]) == pytest.approx(difference.mean())
        assert float(row["divergence_difference_error"]) == pytest.approx(difference.std(ddof=1) / 6**0.5)
        assert f"{difference.mean():+.4f} ± {difference.std(ddof=1) / 6**0.5:.4f}" in done.stdout
    assert (tmp_path / "methods.png").stat().st_size > 10_000
    plain = found["agreement-none-half2-seed0"]["metrics"]
    assert plain["divergence"] == pytest.approx(0, abs=1e-6) and plain["relative_error"] == []

    for path in [*tmp_path.glob("table-*"), *tmp_path.glob("methods.*")]:
        path.unlink()

    def refuse(*given: object) -> None:
        raise AssertionError("a finished run is made again")

    monkeypatch.setattr(pool, "Runner", refuse)
    again = in_process(*command(sources, tmp_path, *SHARES, *methods, "--time", "--calibrate", "all"))
    assert again.returncode == 0, again.stderr
    assert again.stdout[again.stdout.index("**") :] == done.stdout[done.stdout.index("**") :]
    assert times == {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")}


def assert_calibrated(
    calibrated: dict[str, dict],
    searches: list[dict],
    found: dict[str, dict],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    sources: tuple[Path, Path],
) -> None:
    """A calibrated schedule is on the half that calibrates no worse than the decaying one, measured on the other."""
    learned = {(one["setting"]["downsampler"], one["setting"]["budget"]): one["metrics"] for one in searches}
    for name, one in calibrated.items():
        setting, metrics = one["setting"], learned[one["setting"]["downsampler"], one["setting"]["budget"]]
        assert setting["keep"] == metrics["learned_keep"] and setting["part"] == "2/2" and metrics["images"] == 6
        assert setting["schedule"] == "calibrated on 6 images"
        decaying = found[name.replace("calibrated", "decay").replace("half2", "half1")]
        run = dataclasses.replace(Run.from_setting(setting), label="again", part="1/2")
        monkeypatch.setenv("TOKENPOOL_DATA", str(sources[0]))
        monkeypatch.setenv("TOKENPOOL_WEIGHTS", str(sources[1]))
        on_first_half = execute.execute(run, folder / "again")["metrics"]["divergence"]
        assert on_first_half <= decaying["metrics"]["divergence"] * (1 + 1e-5) + 1e-7


@pytest.mark.parametrize(
    "more, message",
    [
        (["--method", "dynamicvit"], "method 'dynamicvit' needs training or has no schedule; choose from random, "),
        (["--method", "tomee"], "method 'tomee' is unknown; choose from random"),
        (["--baseline", "none"], "method 'none' needs training or has no schedule"),
        (["--calibrate", "tomee"], "method 'tomee' is unknown; choose from random"),
        (["--method", "tome", "--calibrate", "mctf"], "--calibrate mctf is not among the methods that are compared"),
        (["--share", "1.2"], "--share 1.2 must be above 0 and below 1"),
        (["--gmacs", "7"], "--gmacs 7 must be above 0 and below the plain model's 0.0"),
        (["--gmacs", "7", "--share", "0.5"], "--share and --gmacs are two ways"),
        (["--method", "tome", "--share", "0.01"], "--baseline key_medoids cannot be run at any of the budgets"),
    ],
)
def test_mistakes_are_named(in_process, sources, tmp_path: Path, more: list[str], message: str) -> None:
    done = in_process(*command(sources, tmp_path, *more))
    assert done.returncode == 1 and f"error: {message}" in done.stderr
    assert not list(tmp_path.glob("*.json"))


def test_weights_must_be_named(in_process, sources, tmp_path: Path) -> None:
    done = in_process("benchmark-methods", "--model", MODEL, "--data", str(sources[0]), "--output", str(tmp_path))
    assert done.returncode == 1 and "benchmark-methods needs --weights FILE or --pretrained" in done.stderr


def test_every_family_of_the_registry_has_a_title(tmp_path: Path) -> None:
    assert {method.family for method in REGISTRY.values()} <= benchmarked.FORMS.keys()


def test_the_table_of_the_documentation_is_the_runs() -> None:
    root = Path(__file__).parents[1]
    page = (root / "docs" / "results" / "off-the-shelf.md").read_text()
    sections = benchmarked.sections(results.load(root / "results" / "benchmark_methods"), "ward")
    assert len(sections) == 3
    for section in sections:
        for cells in section.shown.itertuples(index=False):
            assert f"\n| {' | '.join(cells)} |\n" in page, (section.name, cells)
