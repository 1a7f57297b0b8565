"""`throughput --backend`: exported models are timed like others, and the plain model runs in the same backend."""

import copy
import json
import sys
from pathlib import Path

import onnxruntime
import pytest
import torch

import tokenpool
from tokenpool.analysis import results
from tokenpool.runs import timing
from tokenpool.tools import backends, benchmark, formats, speed_up
from tokenpool.tools.benchmark import Setting

ROOT = Path(__file__).parents[1]
TINY = {"model": "deit_digits_patch2_16", "method": "power_bert", "keep": (40, 30, 20, 10, 5, 0)}
SMALL = ["throughput", "--model", "deit_digits_patch2_16", "--keep", "40,30,20,10,5,0", "--batch-size", "1"]


@pytest.mark.slow
def test_onnx_runtime_end_to_end(in_process, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two batch sizes share one file of the pooled model and one of the plain model."""
    sessions, written, write = [], [], formats.Onnx.write

    class Session(onnxruntime.InferenceSession):
        def __init__(self, path: Path, options: onnxruntime.SessionOptions, **named: object) -> None:
            super().__init__(path, options, **named)
            self.batches: list[int] = []
            sessions.append((path.name, options.intra_op_num_threads, self.batches))

        def run(self, outputs: list[str], inputs: dict) -> list:
            self.batches.append(len(inputs["images"]))
            return super().run(outputs, inputs)

    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    monkeypatch.setattr(formats.Onnx, "write", lambda *given: written.append(given[3].name) or write(*given))
    chosen = ["--method", "power_bert", "--backend", "onnxruntime", "--threads", "2", "--output", str(tmp_path)]
    done = in_process(*SMALL, "--batch-size", "3", *chosen, "--repeats", "4")
    assert done.returncode == 0, done.stderr
    assert len(written) == 2 and [threads for _, threads, _ in sessions] == [2] * 4
    pooled, plain = written
    batches = [([size] * 6) for size in (1, 1, 3, 3)]  # two passes of warm-up
    assert [(name, taken) for name, _, taken in sessions] == list(zip([pooled, plain] * 2, batches, strict=True))
    first, second = (results.read(path) for path in sorted(tmp_path.glob("*-onnxruntime-cpu.json")))
    assert first["setting"]["backend"] == "onnxruntime" and "compiled" not in first["setting"]
    assert first["environment"]["versions"]["onnxruntime"] == onnxruntime.__version__
    for one in (first, second):
        found, cost = one["metrics"], one["cost"]
        assert found["threads"] == 2 and found["speed_up"] > 0
        assert found["flops_ratio"] == pytest.approx(cost["plain_gmacs"] / cost["gmacs"])
        assert found["realised_fraction"] == pytest.approx(found["speed_up"] / found["flops_ratio"])
        assert not {"peak_mib", "plain_peak_mib", "clustering_share", "realised_against_parts"} & found.keys()
    assert done.stdout.count("| 40,30,20,10,5,0, onnxruntime |") == 2
    with timing.threads(2):
        settings, rows = benchmark.stored(tmp_path)
        assert [one.backend for one in settings] == ["onnxruntime"] * 2
        assert list(benchmark.run(settings, tmp_path, repeats=4)) == rows  # read, not timed
        first["environment"]["versions"]["onnxruntime"] = "1.0"
        results.save(first, tmp_path / f"{settings[0].run_name('cpu')}.json")
        with pytest.raises(ValueError, match="was timed with onnxruntime 1.0, now onnxruntime .*: choose another"):
            list(benchmark.run(settings, tmp_path, repeats=4))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_what_is_timed_is_the_model(backend: str, tmp_path: Path) -> None:
    pytest.importorskip(backend)
    torch.manual_seed(0)
    plain = tokenpool.create_model(TINY["model"]).eval()
    torch.nn.init.normal_(plain.head.weight)  # logits that tell models apart
    model = tokenpool.patch(copy.deepcopy(plain), TINY["method"], list(TINY["keep"]))
    images = torch.randn(5, 1, 16, 16)
    assert (model(images) - plain(images)).abs().max() > 0.1
    run = backends.exported(backend, model, images[:1], tmp_path / "pooled")
    with torch.inference_mode():
        for some in (images[:1], images):
            torch.testing.assert_close(run(some), model(some), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--backend", "tensorrt"], "backend = 'tensorrt' must be one of eager, compiled, onnxruntime, openvino"),
        (["--backend", "onnxruntime", "--train"], "backend onnxruntime does not train: leave out --train, or use"),
        (
            ["--backend", "onnxruntime", "--device", "cuda:1"],
            "backend onnxruntime is timed on the CPU only, not on cuda:1",
        ),
        (["--backend", "onnxruntime", "--precision", "bfloat16"], "backend onnxruntime is timed in float32 only"),
        (["--backend", "openvino"], 'throughput --backend openvino needs openvino: pip install "tokenpool[openvino]"'),
        (["--backend", "eager", "--compile"], "--compile is --backend compiled, not --backend eager: give one of both"),
    ],
)
def test_refused_before_anything_is_timed(
    in_process, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, options: list[str], message: str
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.setattr(benchmark, "compare", None)
    done = in_process(*SMALL, *options, "--output", str(tmp_path))
    assert done.returncode == 1 and done.stderr.startswith(f"error: {message}"), done.stderr
    assert done.stderr.count("\n") == 1 and not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="backend openvino does not train"):
        list(benchmark.run([Setting(**TINY), Setting(**TINY, backend="openvino", train=True)], tmp_path))


def test_results_from_before_the_choice_of_backends() -> None:
    """They say whether the models were compiled, and do not name the backend."""
    for folder, backend in (("eager", "eager"), ("compiled", "compiled")):
        settings, rows = benchmark.stored(ROOT / "results" / "throughput" / "h200" / folder)
        assert {one.backend for one in settings} == {backend} and len(rows) > 1
        assert {row["compiled"] for row in rows} == {backend == "compiled"}
        assert [one.run_name("cuda") for one in settings] == [row["run"] for row in rows]


def test_two_names_of_compiled(in_process, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda network: compiled.append(network) or network)
    for folder, options in (("first", ["--compile"]), ("second", ["--backend", "compiled"])):
        done = in_process(*SMALL, *options, "--repeats", "1", "--output", str(tmp_path / folder))
        assert done.returncode == 0, done.stderr
    first, second = (list((tmp_path / folder).glob("*.json")) for folder in ("first", "second"))
    assert [path.name for path in first] == [path.name for path in second] and "-compiled-cpu" in first[0].name
    assert len(compiled) == 4 and json.loads(first[0].read_text())["setting"]["backend"] == "compiled"


def test_no_picture_of_a_memory_that_was_not_measured() -> None:
    _, rows = benchmark.stored(ROOT / "results" / "throughput" / "growth")
    assert len(speed_up.growth(rows).axes) == 2
    without = [{name: value for name, value in row.items() if "peak_mib" not in name} for row in rows]
    assert [ax.get_ylabel() for ax in speed_up.growth(without).axes] == ["milliseconds an image"]
