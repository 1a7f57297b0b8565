"""`benchmark-precisions` measures what it says, goes on where it was interrupted, and its table is its results."""

import json
import re
from pathlib import Path
from statistics import median

import numpy as np
import onnxruntime
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from scipy import stats
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn

import tokenpool
from tokenpool.analysis import bits, results
from tokenpool.tools import benchmark_precisions as benchmark
from tokenpool.tools import int8, precision_table

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / "results" / "int8"
KEEP = "0.7@1,3"
PRECISIONS = ("float32", "int8-dynamic", "int8")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    for name in "abcd":
        folder = tmp_path / "data" / "val" / name
        folder.mkdir(parents=True)
        for index in range(4):
            coarse = generator.integers(0, 256, (5, 5, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((200, 180)).save(folder / f"{index}.png")
    return tmp_path / "data"


@pytest.fixture
def plain() -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=4).eval()
    nn.init.normal_(model.head.weight)
    return model


def pixels(model: nn.Module, data: Path) -> Tensor:
    """All images, without the code under test."""
    transform = create_transform(**resolve_model_data_config(model))
    return torch.stack([transform(Image.open(path).convert("RGB")) for path in sorted(data.rglob("*.png"))])


@pytest.mark.slow
def test_end_to_end(in_process, monkeypatch: pytest.MonkeyPatch, data: Path, plain: nn.Module, tmp_path: Path) -> None:
    calibrated, quantise = [], int8.quantise_static
    monkeypatch.setattr(
        int8,
        "quantise_static",
        lambda source, path, batches: quantise(source, path, calibrated.append(list(batches)) or calibrated[-1]),
    )
    safetensors.torch.save_file(plain.state_dict(), tmp_path / "weights.safetensors")
    chosen = ["--model", "test_vit", "--model-option", "num_classes=4", "--method", "power_bert", "--keep", KEEP]
    chosen += ["--weights", str(tmp_path / "weights.safetensors"), "--data", str(data), "--threads", "1"]
    chosen += ["--calibration", "6", "--batch-size", "3", "--output", str(tmp_path / "out")]
    done = in_process("benchmark-precisions", *chosen, "--repeats", "2")
    assert done.returncode == 0, done.stderr
    names = [f"{model}{precision}" for model in ("none-", "power_bert-keep_0.7_1_3-") for precision in PRECISIONS]
    paths = [tmp_path / "out" / f"{name}.json" for name in names]
    assert sorted((tmp_path / "out").glob("*.json")) == sorted(paths)

    images = pixels(plain, data)
    labels = np.repeat(range(4), 4)[1::2]
    pooled = timm.create_model("test_vit", num_classes=4).eval()
    pooled.load_state_dict(plain.state_dict())
    tokenpool.patch(pooled, "power_bert", KEEP, carry=True)
    outcomes = [results.read(path) for path in paths]
    with torch.inference_mode():
        for outcome, model in ((outcomes[0], plain), (outcomes[3], pooled)):
            predicted = model(images[1::2]).argmax(1).numpy()
            assert outcome["metrics"]["predicted"] == predicted.tolist()
            assert (bits.decode(outcome["metrics"]["correct"], 8) == (predicted == labels)).all()
            assert outcome["metrics"]["top1"] == pytest.approx(100 * (predicted == labels).mean())
    for batches in calibrated:  # of the plain and of the pooled model
        taken = torch.cat(batches)
        assert len(taken) == 6 and all(any(torch.equal(one, other) for other in images[::2]) for one in taken)
    assert len(calibrated) == 2
    for outcome in outcomes:
        assert [len(outcome["metrics"]["seconds"][name]) for name in ("model", "plain", "plain_float32")] == [2] * 3
        assert outcome["environment"]["versions"]["onnxruntime"] == onnxruntime.__version__
        assert str(tmp_path) not in json.dumps(outcome)
    sizes = [outcome["metrics"]["bytes"] for outcome in outcomes]
    assert max(sizes[1:3]) < 0.6 * sizes[0] and max(sizes[4:]) < 0.8 * sizes[3]
    assert done.stdout.count("\n| power_bert ") == 3 and (tmp_path / "out" / "precisions.png").exists()

    paths[4].unlink()
    stamps = [path.stat().st_mtime_ns for path in paths if path.exists()]
    assert in_process("benchmark-precisions", *chosen, "--repeats", "2").returncode == 0
    assert [path.stat().st_mtime_ns for path in paths if path != paths[4]] == stamps and paths[4].exists()
    assert len(calibrated) == 2
    done = in_process("benchmark-precisions", *chosen, "--repeats", "3")
    assert done.returncode == 1 and "none-float32.json has another repeats: choose another folder" in done.stderr


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "benchmark-precisions needs --weights FILE or --pretrained"),
        (["--pretrained", "--share", "1.2"], "--share 1.2 must be above 0 and below 1"),
        (["--pretrained", "--method", "nothing"], "'nothing'"),
    ],
)
def test_refused(in_process, data: Path, tmp_path: Path, options: list[str], message: str) -> None:
    done = in_process(
        "benchmark-precisions", "--model", "test_vit", "--data", str(data), "--output", str(tmp_path), *options
    )
    assert done.returncode == 1 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_settings() -> None:
    chosen = benchmark.settings(benchmark.Source("deit_tiny_patch16_224", ""), ["power_bert"], [0.65], ["deit_small:3"])
    assert [one.precision for one in chosen] == list(PRECISIONS) * 3
    assert (
        len({one.name for one in chosen}) == 9 and [one.method for one in chosen[::3]] == ["none"] + ["power_bert"] * 2
    )
    model = tokenpool.create_model("deit_tiny_patch16_224")
    cost = tokenpool.flops.count(model).gmacs
    assert (
        0.637 * cost <= tokenpool.flops.count(tokenpool.patch(model, "power_bert", chosen[3].keep)).gmacs <= 0.65 * cost
    )


def test_the_table_is_the_stored_measurements() -> None:
    """Every number is computed again from the JSON files, the interval by SciPy's paired t-test."""
    stored = {path.stem: json.loads(path.read_text()) for path in SHIPPED.glob("*.json")}
    measured = {name: outcome["metrics"] for name, outcome in stored.items()}
    table = precision_table.rows(results.load(SHIPPED))
    assert len(table) == len(stored) == 21
    for row in table.itertuples():
        (name,) = [
            name
            for name, outcome in stored.items()
            if [outcome["setting"][key] for key in ("method", "schedule", "precision")] == list(row[1:4])
        ]
        own, base = measured[name], name.removesuffix(row.precision)
        rounds = list(zip(*(own["seconds"][key] for key in ("model", "plain", "plain_float32")), strict=True))
        assert row.top1 == pytest.approx(100 * bits.decode(own["correct"], own["images"]).mean())
        reference = np.array(measured["none-float32"]["predicted"])
        assert row.same_class == pytest.approx(100 * (np.array(own["predicted"]) == reference).mean())
        milliseconds = [1000 * median(each[index] for each in rounds) / 32 for index in (0, 2)]
        assert [row.ms, row.plain_ms] == pytest.approx(milliseconds) and row.bytes == own["bytes"]
        assert row.total == pytest.approx(median(each[2] / each[0] for each in rounds))
        if row.precision != "float32":
            pair = [bits.decode(measured[one]["correct"], own["images"]) for one in (name, f"{base}float32")]
            tested = stats.ttest_rel(*(100.0 * one for one in pair))
            interval = tested.confidence_interval(0.95)
            if pair[0].tolist() != pair[1].tolist():
                assert [row.low, row.high] == pytest.approx([interval.low, interval.high])
            assert row.difference == pytest.approx(own["top1"] - measured[f"{base}float32"]["top1"])
        if row.method != "none":
            cost = stored[name]["cost"]
            speed_up = median(each[1] / each[0] for each in rounds)
            assert row.speed_up == pytest.approx(speed_up)
            assert row.realised == pytest.approx(speed_up / (cost["plain_gmacs"] / cost["gmacs"]))
            if row.precision != "float32":
                single = [measured[one]["seconds"] for one in (f"{base}float32", f"none-{row.precision}")]
                pairs = [zip(one["plain_float32"], one["model"], strict=True) for one in single]
                product = np.prod([median(plain / own for plain, own in each) for each in pairs])
                assert row.product == pytest.approx(product)


def test_the_table_of_the_documentation_is_the_runs() -> None:
    page = (ROOT / "docs" / "results" / "int8.md").read_text()
    section = precision_table.section(results.load(SHIPPED))
    assert section.shown.to_markdown(index=False, disable_numparse=True) in page
    text = " ".join(page.split())
    assert " ".join(section.notes[0].split()) in text
    raw = section.raw
    shares = raw["total"] / raw["product"]
    assert f"the total is {shares.min():.0%} to {shares.max():.0%} of the product".replace("%", " %") in text
    timed = {path.stem: json.loads(path.read_text())["metrics"]["seconds"] for path in SHIPPED.glob("*.json")}
    totals = {name: median(each["plain_float32"]) / median(each["model"]) for name, each in timed.items()}
    shares = [
        total / (totals[f"{model}-float32"] * totals[f"none-{precision}"])
        for name, total in totals.items()
        for model, precision in [re.fullmatch("(.+?)-(float32|int8-dynamic|int8)", name).groups()]
        if model != "none" and precision != "float32"
    ]
    assert f"totals of {min(shares):.0%} to {max(shares):.0%} of the product".replace("%", " %") in text
    assert f"by {raw['difference'].min():+.1f} to {raw['difference'].max():+.1f} points" in text
    assert (raw["low"].dropna() < 0).all() and (raw["high"].dropna() > 0).all()  # every interval includes zero
    pooled = raw[(raw["method"] != "none") & raw["difference"].notna()]
    assert f"from {-pooled['low'].max():.1f} to {-pooled['low'].min():.1f} points below zero" in text
    for group, precision in ((raw["precision"] == "float32", "float32"), (raw["precision"] != "float32", "int8")):
        assert f"{raw['realised'][group].min():.2f}-{raw['realised'][group].max():.2f} in {precision}" in text


def test_the_results_are_of_one_study() -> None:
    outcomes = [json.loads(path.read_text()) for path in SHIPPED.glob("*.json")]
    for key in ("identity", "environment"):
        assert all(outcome[key] == outcomes[0][key] for outcome in outcomes)
    assert "dirty" not in outcomes[0]["environment"]["commit"]
