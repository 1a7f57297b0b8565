import json
from pathlib import Path

import pytest
import torch

import tokenpool
from experiments import speed, throughput
from experiments.speed import Setting
from tokenpool import results

TINY = {"model": "deit_digits_patch2_16", "method": "wkmedoids", "keep": (40, 30, 20, 10, 5, 0), "batch_size": 2}


def test_what_is_reported_fits_together(tmp_path: Path) -> None:
    (one,) = speed.run([Setting(**TINY)], tmp_path, repeats=2)
    assert one["keep"] == [40, 30, 20, 10, 5, 0] and one["measured_batch"] == 2
    assert one["flops_ratio"] == pytest.approx(one["plain_gmacs"] / one["gmacs"]) and one["flops_ratio"] > 1
    assert one["realised_fraction"] == pytest.approx(one["speed_up"] / one["flops_ratio"])
    assert one["latency_ms"] == pytest.approx(2000 / one["images_per_second"])
    assert min(one["clustering_share"], one["peak_mib"], one["plain_peak_mib"]) > 0
    model = tokenpool.create_model("deit_digits_patch2_16", "wkmedoids", list(TINY["keep"]))
    assert one["gmacs"] == pytest.approx(tokenpool.flops.count(model).gmacs)
    assert "| deit_digits_patch2_16 | wkmedoids" in speed.table([one])
    assert speed.picture([one]).axes[0].get_ylabel() == "measured speed-up"
    assert list(results.load(tmp_path)["realised_fraction"]) == [one["realised_fraction"]]


def test_what_has_been_timed_is_not_timed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (first,) = speed.run([Setting(**TINY)], tmp_path, repeats=1)
    monkeypatch.setattr(speed, "compare", None)
    assert list(speed.run([Setting(**TINY)], tmp_path, repeats=1)) == [first]
    path = tmp_path / f"{first['run']}.json"
    changed = json.loads(path.read_text())
    changed["setting"]["batch_size"] = 3
    path.write_text(json.dumps(changed))
    with pytest.raises(ValueError, match="holds another setting"):
        list(speed.run([Setting(**TINY)], tmp_path, repeats=1))


def test_training_steps_and_low_precision(tmp_path: Path) -> None:
    settings = [Setting(**TINY, train=True), Setting(**TINY, precision="bfloat16")]
    train, low = speed.run(settings, tmp_path, repeats=1)
    assert train["speed_up"] > 0 and "clustering_share" not in train and train["peak_mib"] > low["peak_mib"]
    with pytest.raises(ValueError, match="precision = 'int8' must be one of float32, bfloat16, float16"):
        speed.compare(Setting(**TINY, precision="int8"))


def test_peak_memory_is_what_a_call_holds_at_once() -> None:
    def call() -> None:
        first = torch.ones(1000, 1000)  # 4 MB
        second = first + 1
        del first, second
        torch.ones(500, 1000)

    assert throughput.peak_memory(call, torch.device("cpu")) == pytest.approx(8e6, rel=0.01)


def test_calls_take_turns() -> None:
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    times = throughput.seconds(calls, torch.device("cpu"), repeats=2, warm_up=1)
    assert order == list("ababab") and all(len(taken) == 2 for taken in times.values())
