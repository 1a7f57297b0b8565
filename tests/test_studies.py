import dataclasses
import itertools
import json
import shutil
import warnings
from pathlib import Path

import pytest

from experiments import artifacts, presets
from experiments.artifacts import everything, needs, status
from experiments.presets import Preset
from experiments.show import report
from tokenpool.analysis import results
from tokenpool.runs import data_sets, durations, execute, pool
from tokenpool.runs.run import WEIGHTS, Run, result_path
from tokenpool.runs.stages import placements
from tokenpool.runs.study import Study
from tokenpool.training.recipe import Recipe

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
COMMITTED = ("digits", "pretrained")  # presets whose results are part of the repository
NAMES = list(artifacts.ARTIFACTS)


@pytest.fixture
def one_study(tmp_path: Path) -> Study:
    """A folder that holds nothing but the fine-tuned runs of PoWER-BERT."""
    folder = tmp_path / "digits"
    folder.mkdir()
    for path in (RESULTS / "digits").glob("finetune-power_bert-level*.json"):
        shutil.copy(path, folder)
    return Study(presets.get("digits"), folder)


@pytest.mark.parametrize("depth, grid, count", [(12, 14, 12 + 66 + 30), (6, 8, 6 + 15 + 6), (3, 4, 3 + 3)])
def test_placements_of_appendix_d(depth: int, grid: int, count: int) -> None:
    found = placements(depth, grid)
    assert len(found) == len(set(found)) == count
    expected = [
        at
        for number in (1, 2, 3)
        for at in itertools.product(range(depth), repeat=number)
        if list(at) == sorted(set(at)) and grid // 2**number > 0 and (number < 3 or at[0] + at[2] == 2 * at[1])
    ]
    assert set(found) == set(expected)


@pytest.mark.parametrize("preset", presets.NAMES)
def test_runs_are_shared(preset: str) -> None:
    """One setting is trained once: runs of the same name are the same, and so is everything's union."""
    study = Study(presets.get(preset), RESULTS / preset)
    by_name: dict[str, Run] = {}
    for name in NAMES:
        for run in needs(study, name):
            assert by_name.setdefault(run.name, run) == run
    assert {run.name for run in everything(study)} >= by_name.keys()
    assert len({json.dumps(run.setting | {"label": ""}, sort_keys=True) for run in by_name.values()}) == len(by_name)


@pytest.mark.parametrize("preset", COMMITTED)
def test_committed_results_are_whole(preset: str) -> None:
    study = Study(presets.get(preset), RESULTS / preset)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert study.missing(everything(study)) == []
    for path in (RESULTS / preset).glob("*.json"):
        text = path.read_text()
        assert "/home" not in text and "/work" not in text and "/tmp" not in text
        assert "dirty" not in str(results.read(path)["environment"]["commit"])


def test_committed_results_of_cifar10_are_of_one_study() -> None:
    """Not all of it is there; all that is there belongs to it, and tells the same images."""
    study = Study(presets.get("cifar10_128"), RESULTS / "cifar10_128")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = study.points(study.with_awaited(everything(study)))
    assert set(found["run"]) == {path.stem for path in study.folder.glob("*.json")} and len(found) == 260
    assert found["test_images"].nunique() == 1 and found["pretrained_weights"].nunique() == 1
    for path in study.folder.glob("*.json"):
        outcome = results.read(path)
        assert "dirty" not in str(outcome["environment"]["commit"])
        outcome["metrics"].pop("correct", None)  # whose letters may look like anything
        assert not any(place in json.dumps(outcome) for place in ("/home", "/work", "/tmp", "/root"))


def test_status_of_one_study(one_study: Study) -> None:
    assert status(one_study, "figure 5a") == ("partial", "partial, 21 of 87 runs")
    assert status(one_study, "figure 9")[0] == "missing"
    assert status(one_study, "figure 2")[0] == status(one_study, "table 1")[0] == "done"
    assert status(Study(presets.get("pretrained"), one_study.folder), "figure 3a")[0] == "none"
    assert artifacts.draw(one_study, "5a") is not None and artifacts.draw(one_study, "9") is None


def test_missing_counts_what_runs_need_in_turn(one_study: Study) -> None:
    missing = one_study.missing(needs(one_study, "figure 11a"))
    stages = [run.stage for run in missing]
    seeds = len(one_study.extra_seeds)
    assert stages.count("base") == seeds and stages.count("search") == 7 and stages.count("finetune") == 22 * seeds
    assert stages == sorted(stages, key=["base", "search", "finetune"].index)
    assert all(run.variant == "e252" for run in missing)
    finished = one_study.missing(needs(one_study, "table 3"))
    assert not any(run.downsampler == "power_bert" for run in finished)


def test_schedules_come_from_finished_runs_where_the_search_is_gone(one_study: Study) -> None:
    for run in one_study.finetunes(["wkmedoids"], [0]):
        other = result_path(one_study.finetunes(["power_bert"], [0])[run.level], one_study.folder)
        assert list(run.keep) == results.read(other)["setting"]["keep"]
    assert not any(run.stage == "search" for run in one_study.missing(needs(one_study, "figure 5a")))


@pytest.mark.parametrize("stage", ["base", "search", "finetune"])
@pytest.mark.slow
def test_missing_goes_on_after_a_broken_file(stage: str, tmp_path: Path) -> None:
    for path in (RESULTS / "digits").glob("*.json"):
        shutil.copy(path, tmp_path)
    study = Study(presets.get("digits"), tmp_path)
    broken = {"base": study.base(0), "search": study.searches(study.preset.main)[2]}
    broken = broken.get(stage) or study.finetunes(["random"], [1])[3]
    result_path(broken, tmp_path).write_text("{")
    study = Study(presets.get("digits"), tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        missing = study.missing(everything(study))
    assert any(f"{broken.name}.json is not a JSON file" in str(warning.message) for warning in caught)
    assert (broken.name in {run.name for run in missing}) == (stage != "search")  # finished runs hold its schedule


def test_a_search_of_another_setting_teaches_nothing(tmp_path: Path) -> None:
    study = Study(presets.get("digits"), tmp_path)
    search = study.searches(study.preset.main)[1]
    found = results.read(RESULTS / "digits" / f"{search.name}.json")
    results.save(found, result_path(search, tmp_path))
    assert Study(study.preset, tmp_path).finetunes(["random"], [0])[1].keep == tuple(found["metrics"]["learned_keep"])
    found["setting"]["epochs"] = 1
    results.save(found, result_path(search, tmp_path))
    with pytest.warns(UserWarning, match="epochs was 1, now 12"):
        assert Study(study.preset, tmp_path).finetunes(["random"], [0])[1].keep is None


def test_a_preset_without_training_is_not_reproduced(tmp_path: Path, in_process) -> None:
    refused = in_process("reproduce", "--preset", "pretrained", "--output", str(tmp_path / "x"))
    assert "preset pretrained trains nothing" in refused.stderr and "figure 9" in refused.stderr
    other = in_process("figure", "3a", "--preset", "pretrained", "--missing")
    assert other.returncode == 1 and "figure 3a is not part of preset pretrained" in other.stderr


def test_estimates_follow_finished_runs(one_study: Study) -> None:
    run = Run.from_setting(one_study.finetunes(["power_bert"], [0])[0].setting | {"epochs": 24})
    taken = results.load(one_study.folder)
    assert one_study.seconds([run]) == pytest.approx(24 * (taken["seconds"] / taken["epochs"]).median())
    fresh = Study(one_study.preset, one_study.folder / "none")
    assert fresh.seconds([run]) == 24 * one_study.preset.epoch_seconds + one_study.preset.evaluation_seconds
    pooled = dataclasses.replace(fresh, preset=dataclasses.replace(fresh.preset, pooled_effort=0.5))
    assert pooled.seconds([run]) == fresh.seconds([run]) / 2
    assert pooled.seconds([pooled.base(0)]) == fresh.seconds([fresh.base(0)])  # of as many tokens as before
    assert [durations.duration(seconds) for seconds in (99, 600, 36_000)] == ["99 s", "10 minutes", "10.0 hours"]


def test_other_kinds_of_runs_are_expected_to_go_as_fast_as_finished_ones(one_study: Study) -> None:
    """A machine that is ten times as slow as the preset's."""
    for path in one_study.folder.glob("*.json"):
        run = results.read(path)
        run["seconds"] = 10 * (12 * one_study.preset.epoch_seconds + one_study.preset.evaluation_seconds)
        results.save(run, path)
    other = one_study.finetunes(["wkmedoids"], [0])[0]
    fresh = Study(one_study.preset, one_study.folder / "none")
    assert one_study.seconds([other]) == pytest.approx(10 * fresh.seconds([other]))


def test_a_broken_file_is_named_and_the_others_are_drawn(one_study: Study) -> None:
    broken = one_study.folder / "finetune-power_bert-level2-seed0.json"
    broken.write_text('{"setting": ')
    other = one_study.folder / "finetune-power_bert-level3-seed0.json"
    run = results.read(other)
    run["setting"]["epochs"] = 3
    results.save(run, other)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = one_study.points(needs(one_study, "figure 5a"))
    assert len(found) == 19
    messages = " ".join(str(warning.message) for warning in caught)
    assert f"{broken} is not a JSON file of a run" in messages and "epochs was 3, now 12" in messages
    with pytest.warns(UserWarning, match="is not a JSON file of a run"):
        assert artifacts.draw(one_study, "5a") is not None


def test_the_command_line_draws_lists_and_refuses(one_study: Study, tmp_path: Path, in_process) -> None:
    place = ["--results", str(one_study.folder), "--output", str(tmp_path / "out")]
    partial = in_process("figure", "5a", *place)
    assert partial.returncode == 0 and "partial, 21 of 87 runs" in partial.stdout and "--missing" in partial.stdout
    assert (tmp_path / "out" / "digits" / "figure-5a.png").exists()
    listed = in_process("figure", "5a", *place, "--missing")
    assert "finetune-wkmedoids-level0-seed0: about " in listed.stdout
    assert "runs are missing, about " in listed.stdout.splitlines()[-1]
    nothing = in_process("figure", "9", *place)
    assert nothing.returncode == 1 and "none of the runs of figure 9" in nothing.stderr and "--run" in nothing.stderr
    table = in_process("table", "3", *place)
    assert table.returncode == 0 and (tmp_path / "out" / "digits" / "table-3-digits.tex").exists()
    assert "unknown figure '13'; known are 1b, 1c" in in_process("figure", "13").stderr
    assert "unknown table 'x'; known are claims, 1, 2" in in_process("table", "x").stderr
    assert (
        "no file or folder nowhere" in in_process("figure", "9", "--preset", "pretrained", "--data", "nowhere").stderr
    )
    assert "it takes no --data" in in_process("figure", "9", "--data", "nowhere").stderr
    assert "it takes no --weights" in in_process("figure", "9", "--weights", "nowhere").stderr


def test_pretrained_without_images_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(data_sets.DATA, raising=False)
    study = Study(presets.get("pretrained"), tmp_path)
    with pytest.raises(ValueError, match="no images: --data or the variable TOKENPOOL_DATA must name ImageNet"):
        execute.execute(everything(study)[0], tmp_path)


def test_pretrained_on_photographs(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The preset's own path, data and weights by variable, on ten photographs; and nothing of the path is recorded."""
    monkeypatch.setenv(data_sets.DATA, str(shared / "data" / "imagenet_sample"))
    monkeypatch.setenv(WEIGHTS, str(shared / "data" / "deit_tiny_patch16_224.safetensors"))
    preset = dataclasses.replace(presets.get("pretrained"), recipe=Recipe(batch_size=10), redundancy_images=10)
    study = Study(preset, tmp_path)
    merged = dataclasses.replace(study.evaluations(["kmedoids"], carry=True)[3], limit=10)
    outcome = execute.execute(merged, tmp_path)
    errors = outcome["metrics"]["relative_error"]
    assert len(errors) == 12 and errors[0] == 0 and errors[-1] is None and 0 < errors[6] < 1
    assert outcome["metrics"]["images"] == 10 and outcome["metrics"]["top1"] >= 50
    found = execute.execute(study.redundancies()[0], tmp_path)["metrics"]
    assert len(found["leading_energy_before"]) == 12 and found["gaussian_difference"] < 1e-12
    assert found["images"] == 10 and len(execute.execute(study.clusters()[0], tmp_path)["metrics"]["assignments"]) == 2
    assert not any(str(shared) in path.read_text() for path in tmp_path.glob("*.json"))


@pytest.fixture
def tiny() -> Preset:
    """Every kind of run of the digits' full study, as small as it gets."""
    preset = presets.get("digits")
    return dataclasses.replace(
        preset,
        base_epochs=1,
        search_epochs=1,
        finetune_epochs=1,
        recipe=dataclasses.replace(preset.recipe, batch_size=256, warmup_epochs=0),
        full_penalties=(1e-2,),
        full_seeds=(0,),
        extra_seeds=(0,),
        clustered_level=0,
        depth=2,
        grid=4,
        family={"deit_e252": dataclasses.replace(preset.family["deit_e252"], model_options={"embed_dim": 4})},
        model_options={"embed_dim": 8, "depth": 2, "num_heads": 2, "patch_size": 4},
    )


@pytest.mark.slow
def test_every_run_of_every_figure(tiny: Preset, tmp_path: Path) -> None:
    """From nothing to the page: all runs are made, every figure is done, and a lost result is made again, the same."""
    study = Study(tiny, tmp_path)
    pool.make(study, everything(study), jobs=2)
    study = Study(tiny, tmp_path)
    assert study.missing(everything(study)) == []
    for name in NAMES:
        expected = "none" if name in ("table 4", "figure 11b", "table off_the_shelf", "table rivals") else "done"
        assert status(study, name)[0] == expected, name
    page = report.write([study], tmp_path / "page.html").read_text()
    assert page.count("<figure>") == len(artifacts.names("figure"))
    for name in NAMES:
        anchor = name.replace(" ", "-")
        assert page.count(f'id="{anchor}"') == 1 and f'href="#{anchor}"' in page

    lost = result_path(study.finetunes(["kmedoids"], [0], init="random")[0], tmp_path)
    before = results.read(lost)["metrics"]
    lost.unlink()
    assert status(study, "figure 6")[0] == "partial"
    pool.make(study, needs(study, "figure 6"), jobs=1)
    assert results.read(lost)["metrics"] == before


def test_a_study_goes_seed_by_seed_and_leaves_no_process_idle(
    tiny: Preset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs start in the order of their seeds; one that waits for others lets the next one go before it."""
    started = []

    class Pool:
        """Takes its time over every run, and ends them in the order in which they came."""

        def __init__(self, folder: Path, jobs: int, seconds: object, total: float) -> None:
            self.jobs, self.seconds, self.total = jobs, seconds, total

        def __enter__(self) -> "Pool":
            return self

        def __exit__(self, *error: object) -> None:
            assert sum(map(self.seconds, started)) == pytest.approx(self.total)

        def run_all(self, runs: list, prepared: object, alone: bool = False) -> None:
            waiting, running = list(runs), []
            while waiting or running:
                while len(running) < (1 if alone else self.jobs):
                    unfinished = {run.name for run in [*waiting, *running]}
                    ready = [(run, found) for run in waiting if (found := prepared(run, unfinished)) is not None]
                    if not ready:
                        break
                    waiting.remove(ready[0][0])
                    running.append(ready[0][1])
                    started.append(ready[0][1])
                finished = running.pop(0)
                outcome = results.read(RESULTS / "digits" / "base-seed0.json") | {"setting": finished.setting}
                outcome["metrics"] = outcome["metrics"] | {"learned_keep": [8, 4]}
                results.save(outcome, result_path(finished, tmp_path))

    monkeypatch.setattr(pool, "Runner", Pool)
    study = Study(dataclasses.replace(tiny, full_seeds=(0, 1)), tmp_path)
    pool.make(study, everything(study), jobs=2)
    names = [run.name for run in started]
    # While the first base model is made, the second one is; nothing else can start.
    assert names[:2] == ["base-seed0", "base-e252-seed0"]
    assert [run.seed for run in started[2:]] == sorted(run.seed for run in started[2:] if run.stage != "throughput") + [
        run.seed for run in started if run.stage == "throughput"
    ]
    assert all(run.keep == (8, 4) for run in started if run.stage == "finetune" and run.level is not None)
    for run in started:
        assert all(names.index(other.name) < names.index(run.name) for other in study.awaited(run))
    assert len(set(names)) == len(names) == len({run.name for run in study.with_awaited(everything(study))})


def test_carried_sizes_change_nothing_where_tokens_are_dropped(tmp_path: Path) -> None:
    """Why Figure 9 shows selections once only."""
    base = Study(presets.get("digits"), tmp_path)
    common = dataclasses.replace(
        base.base(0), stage="evaluate", recipe=Recipe(), downsampler="power_bert", keep=(9, 4, 1)
    )
    options = {"embed_dim": 8, "depth": 3, "num_heads": 2, "patch_size": 4}
    runs = [
        dataclasses.replace(common, label=str(carry), carry=carry, model_options=options) for carry in (False, True)
    ]
    plain, carried = (execute.execute(run, tmp_path)["metrics"] for run in runs)
    assert plain == carried


def test_unknown_presets_are_named() -> None:
    with pytest.raises(ValueError, match="unknown preset 'imagenette'; known are digits, pretrained"):
        presets.get("imagenette")
    assert [key for key, one in artifacts.ARTIFACTS.items() if one.needs is None] == ["table 1", "figure 2"]
