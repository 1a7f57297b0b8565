import json
from functools import partial
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import tokenpool
from experiments import presets
from experiments.artifacts import needs
from experiments.commands import COMMANDS
from experiments.extras import realised
from tokenpool import clustering
from tokenpool.analysis import results
from tokenpool.attention import ScoredAttention
from tokenpool.commands.shell import application
from tokenpool.runs import measure, timing
from tokenpool.runs.run import result_path
from tokenpool.runs.study import Study
from tokenpool.tools import benchmark, speed_up
from tokenpool.tools.benchmark import Setting

app = application(COMMANDS, "")

ROOT = Path(__file__).parents[1]
TINY = {"model": "deit_digits_patch2_16", "method": "wkmedoids", "keep": (40, 30, 20, 10, 5, 0), "batch_size": 2}


def test_what_is_reported_fits_together(tmp_path: Path) -> None:
    (one,) = benchmark.run([Setting(**TINY)], tmp_path, repeats=2)
    assert one["keep"] == [40, 30, 20, 10, 5, 0] and one["measured_batch"] == 2
    assert one["flops_ratio"] == pytest.approx(one["plain_gmacs"] / one["gmacs"]) and one["flops_ratio"] > 1
    assert one["realised_fraction"] == pytest.approx(one["speed_up"] / one["flops_ratio"])
    assert one["latency_ms"] == pytest.approx(2000 / one["images_per_second"])
    assert min(one["clustering_share"], one["peak_mib"], one["plain_peak_mib"], one["realised_against_parts"]) > 0
    model = tokenpool.create_model("deit_digits_patch2_16", "wkmedoids", list(TINY["keep"]), carry=False)
    assert one["gmacs"] == pytest.approx(tokenpool.flops.count(model).gmacs)
    assert "| deit_digits_patch2_16 | wkmedoids" in speed_up.table([one])
    assert speed_up.picture([one]).axes[0].get_ylabel() == "measured speed-up"
    assert list(results.load(tmp_path)["realised_fraction"]) == [one["realised_fraction"]]


def test_what_has_been_timed_is_not_timed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (first,) = benchmark.run([Setting(**TINY)], tmp_path, repeats=1)
    monkeypatch.setattr(benchmark, "compare", None)
    assert list(benchmark.run([Setting(**TINY)], tmp_path, repeats=1)) == [first]
    path = tmp_path / f"{first['run']}.json"
    changed = json.loads(path.read_text())
    changed["setting"]["batch_size"] = 3
    path.write_text(json.dumps(changed))
    with pytest.raises(ValueError, match="holds another setting"):
        list(benchmark.run([Setting(**TINY)], tmp_path, repeats=1))


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("machine", "cpu", "Z80"),
        ("machine", "cores", 1000),
        ("versions", "torch", "1.0"),
        ("metrics", "threads", 99),
        ("metrics", "device", "NVIDIA Z80"),
        ("metrics", "repeats", 8),
    ],
)
def test_times_of_another_machine_are_not_passed_off_as_this_ones(
    tmp_path: Path, part: str, name: str, value: object
) -> None:
    (first,) = benchmark.run([Setting(**TINY)], tmp_path, repeats=1)
    path = tmp_path / f"{first['run']}.json"
    outcome = results.read(path)
    (outcome if part == "metrics" else outcome["environment"])[part][name] = value
    results.save(outcome, path)
    with pytest.raises(ValueError, match=f"{path} was timed with {name} {value}, now {name} .*--output.* or delete"):
        list(benchmark.run([Setting(**TINY)], tmp_path, repeats=1))


def test_figure_12_does_not_mix_machines(tmp_path: Path) -> None:
    study = Study(presets.get("digits"), ROOT / "results" / "digits")
    runs = [run for run in needs(study, "figure 12") if run.stage == "throughput"]
    assert len(study.points(runs)) == len(runs)
    mixed = Study(study.preset, tmp_path)
    for run in runs[:3]:
        outcome = results.read(result_path(run, study.folder))
        outcome["environment"]["machine"]["cores"] += run is runs[2]
        results.save(outcome, result_path(run, tmp_path))
    with pytest.raises(
        ValueError, match=f"mixes times of .*: {runs[0].name} with cores 2, {runs[2].name} with cores 3"
    ):
        mixed.points(runs)
    assert len(mixed.points(runs[:2])) == 2


def test_the_number_of_threads_is_put_back(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    with timing.threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
    CliRunner().invoke(
        app,
        ["throughput", "--threads", str(before + 1), "--method", "none", "--output", str(tmp_path)],
    )
    assert torch.get_num_threads() == before
    with pytest.raises(AttributeError):
        measure.measure_redundancy(None, None)
    assert torch.get_num_threads() == before


def test_training_steps_and_low_precision(tmp_path: Path) -> None:
    settings = [Setting(**TINY, train=True), Setting(**TINY, precision="bfloat16")]
    train, low = benchmark.run(settings, tmp_path, repeats=1)
    assert train["speed_up"] > 0 and train["peak_mib"] > low["peak_mib"]
    assert not {"clustering_share", "realised_against_parts"} & train.keys()
    with pytest.raises(ValueError, match="precision = 'int8' must be one of float32, bfloat16, float16"):
        benchmark.compare(Setting(**TINY, precision="int8"))


def test_any_number_of_settings_is_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where many models share their code, PyTorch would at some point go on without compiling, and time that."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager", fullgraph=True))
    settings = [
        Setting(**TINY | {"method": name}, backend="compiled") for name in ("wkmedoids", "kmeans", "power_bert")
    ]
    with torch._dynamo.config.patch(recompile_limit=2):
        found = list(benchmark.run(settings, tmp_path, repeats=1))
    assert all(one["speed_up"] > 0 and "clustering_share" not in one for one in found)
    assert speed_up.table(found).count("[40, 30, 20, 10, 5, 0], compiled") == 3


def test_the_stricter_baseline_is_the_plain_model(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = tokenpool.create_model(TINY["model"]).eval()
    images = torch.randn(7, 1, 16, 16)
    monkeypatch.setattr(tokenpool.micro_batch, "BLOCK_FLOATS", 3 * 65 * plain.embed_dim)
    batches = []
    in_parts = benchmark.plain_in_parts(plain)
    attend = ScoredAttention.forward
    monkeypatch.setattr(ScoredAttention, "forward", lambda *given: batches.append(len(given[1])) or attend(*given))
    with torch.inference_mode():
        torch.testing.assert_close(in_parts(images), plain(images))
    assert batches == [3, 3, 1] * len(plain.blocks) and not tokenpool.is_patched(plain)


def test_peak_memory_is_what_a_call_holds_at_once() -> None:
    def call() -> None:
        first = torch.ones(1000, 1000)  # 4 MB
        second = first + 1
        del first, second
        torch.ones(500, 1000)

    assert timing.peak_memory(call, torch.device("cpu")) == pytest.approx(8e6, rel=0.01)


def test_calls_take_turns() -> None:
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    times = timing.seconds(calls, torch.device("cpu"), repeats=2, warm_up=1)
    assert order == list("ababab") and all(len(taken) == 2 for taken in times.values())


@pytest.mark.parametrize("method", ["wkmedoids", "key_medoids", "tome", "power_bert"])
def test_shares_of_every_kind_of_method(method: str) -> None:
    model = tokenpool.create_model("deit_digits_patch2_16", method, [40, 30, 20, 10, 5, 1], carry=True).eval()
    found = benchmark.shares(model, torch.randn(2, 1, 16, 16), repeats=9)
    assert 0 < found["clustering_share"] < 1
    assert (found["scoring_share"] == 0) == (method == "tome")
    assert all("forward" not in vars(part) for part in model.modules())


def test_what_has_fallen_is_named(tmp_path: Path) -> None:
    setting = Setting(**TINY, options={"iterations": 2})
    (one,) = benchmark.run([setting], tmp_path, repeats=1)
    settings, rows = benchmark.stored(tmp_path)
    assert settings[0].name == setting.name and rows == [one]
    assert list(benchmark.run(settings, tmp_path, repeats=1)) == [one]  # the same setting: read, not timed
    assert benchmark.fallen([one], rows, 0.1) == []
    slower = one | {"realised_fraction": 0.8 * one["realised_fraction"]}
    assert benchmark.fallen([slower], rows, 0.25) == []
    (line,) = benchmark.fallen([slower], rows, 0.15)
    assert line.startswith(f"{one['run']}: realised ")
    with pytest.raises(ValueError, match="holds no results of throughput"):
        benchmark.stored(tmp_path / "nothing")
    path = tmp_path / f"{one['run']}.json"
    outcome = results.read(path)
    for part, name in (("setting", "schedule"), ("metrics", "threads")):
        results.save(outcome | {part: {key: value for key, value in outcome[part].items() if key != name}}, path)
        with pytest.raises(ValueError, match=f"{path} is no result of throughput: it lacks {name}"):
            benchmark.stored(tmp_path)


def test_the_command_fails_where_less_is_realised(tmp_path: Path) -> None:
    runner, folder, arguments = CliRunner(), tmp_path / "before", ["throughput", "--repeats", "1"]
    small = ["--model", "deit_digits_patch2_16", "--keep", "40,30,20,10,5,0", "--batch-size", "2"]
    assert runner.invoke(app, [*arguments, *small, "--output", str(folder)]).exit_code == 0
    again = [*arguments, "--against", str(folder), "--output", str(tmp_path / "after"), "--tolerance", "1"]
    assert runner.invoke(app, again).exit_code == 0
    (path,) = (tmp_path / "after").glob("*.json")
    result = json.loads(path.read_text())
    result["metrics"]["realised_fraction"] = 0.0
    path.write_text(json.dumps(result))
    fallen = runner.invoke(app, [*again[:-1], "0.15"])
    assert fallen.exit_code == 1 and "Slower than before" in fallen.stdout
    same = runner.invoke(app, [*arguments, "--against", str(folder), "--output", str(folder)])
    assert same.exit_code != 0


def test_growth_is_drawn_over_tokens(tmp_path: Path) -> None:
    settings = [Setting("deit_tiny_patch16_224", "wkmedoids", 0.5, 1, size) for size in (32, 64)]
    found = list(benchmark.run(settings, tmp_path, repeats=1))
    assert [one["tokens"] for one in found] == [4, 16]
    left, right = speed_up.growth(found).axes
    assert list(left.lines[0].get_xdata()) == [4, 16] and right.get_ylabel() == "peak MiB an image"


def test_the_loop_that_it_is_compared_with_does_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens, weights = torch.randn(2, 40, 5, generator=generator), torch.rand(2, 40, generator=generator)
    centers = clustering.kmedoids(tokens, 9, weights).centers
    for early in (False, True):
        found = benchmark.looped_kmedoids(tokens, 9, weights, ends_early=early)
        torch.testing.assert_close(found, centers, rtol=0, atol=1e-5)
    taken = benchmark.clustering_speed(1, 8, 2, 3, repeats=1)
    assert sorted(taken) == ["kmedoids", "looped", "looped_ending_early"] and min(taken.values()) > 0
    result = CliRunner().invoke(app, ["clustering-speed", "--tokens", "8", "--clusters", "2", "--repeats", "1"])
    assert result.exit_code == 0 and "ending early" in result.stdout


H200 = [f"h200/{part}" for part in ("eager", "plain", "compiled", "growth")]


@pytest.mark.parametrize("folder", [".", "others", "growth", *H200])
def test_the_documented_tables_are_the_stored_results(folder: str) -> None:
    page = "speed-gpu.md" if folder in H200 else "speed.md"
    text = (ROOT / "docs" / "results" / page).read_text()
    _, rows = benchmark.stored(ROOT / "results" / "throughput" / folder)
    assert speed_up.table(rows) in text


def test_the_first_table_of_the_page_is_of_all_backends() -> None:
    text = (ROOT / "docs" / "results" / "speed.md").read_text()
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    files = sorted((ROOT / "results" / "throughput" / "backends").glob("*/*.json"))
    assert {path.parent.name for path in files} == set(realised.BACKENDS)
    for path in files:
        one = json.loads(path.read_text())
        setting, metrics, cost = one["setting"], one["metrics"], one["cost"]
        (row,) = (line for line in lines if line[:2] == [setting["backend"], str(setting["batch_size"])])
        shown = float(row[2 + realised.METHODS.index(setting["method"])])
        speed_up = metrics["plain_latency_ms"] / metrics["latency_ms"]  # of medians; the table has the median of ratios
        assert shown == pytest.approx(speed_up * cost["gmacs"] / cost["plain_gmacs"], abs=0.1)
    assert realised.table(realised.rows()) in text
