"""`python -m experiments export`: the file, its description, and the check against eager mode."""

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn

import tokenpool
from tokenpool.tools import formats
from tokenpool.tools.export import Export, export, path_of, report_of

MODEL = "test_vit"  # timm's smallest
KEEP = "0.7@1,3"


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = timm.create_model(MODEL)
    nn.init.normal_(model.head.weight)  # logits that differ from image to image
    safetensors.torch.save_file(model.state_dict(), tmp_path / "test_vit.safetensors")
    return tmp_path / "test_vit.safetensors"


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    for index in range(7):
        folder = tmp_path / "images" / f"class{index % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        coarse = generator.integers(0, 256, (5, 5, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((200, 180)).save(folder / f"{index}.png")
    (tmp_path / "images" / "notes.txt").write_text("no image")
    return tmp_path / "images"


def eager(weights: Path, photographs: Path) -> tuple[Tensor, Tensor]:
    """Images, and their logits by the patched model, without the code under test."""
    model = timm.create_model(MODEL).eval()
    model.load_state_dict(safetensors.torch.load_file(weights))
    transform = create_transform(**resolve_model_data_config(model))
    pixels = torch.stack([transform(Image.open(path).convert("RGB")) for path in sorted(photographs.rglob("*.png"))])
    with torch.no_grad():
        return pixels, tokenpool.patch(model, "wkmedoids", KEEP, carry=True)(pixels)


def arguments(weights: Path, photographs: Path, output: Path) -> list[str]:
    chosen = [MODEL, "--method", "wkmedoids", "--keep", KEEP, "--weights", str(weights)]
    return ["export", *chosen, "--images", str(photographs), "--output", str(output)]


def test_a_program(in_process, weights: Path, photographs: Path, tmp_path: Path) -> None:
    done = in_process(*arguments(weights, photographs, tmp_path / "out"), "--to", "pt2")
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "out").glob("*.pt2")
    pixels, logits = eager(weights, photographs)
    stored = {"setting.json": ""}
    program = torch.export.load(path, extra_files=stored).module()
    for images in (pixels, pixels[:1]):
        torch.testing.assert_close(program(images), logits[: len(images)], rtol=0, atol=1e-3)
    about = json.loads(stored["setting.json"])
    assert about["method"] == "wkmedoids" and about["setting"]["carry"] is True
    assert len(about["keep"]) == 6 and about["keep"][5] < about["keep"][1] < about["keep"][0]
    assert about["preprocessing"]["input_size"] == [3, 160, 160] and len(about["preprocessing"]["mean"]) == 3
    report = json.loads(report_of(path).read_text())
    assert report["images"] == 7 and report["differing_top1"] == 0 and report["largest_difference"] < 1e-3
    assert report["bytes"] == path.stat().st_size and "7 photographs" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("precision, dtype, tolerance", [("float32", np.float32, 1e-3), ("float16", np.float16, 0.5)])
def test_onnx(in_process, weights, photographs, tmp_path: Path, precision: str, dtype: type, tolerance: float) -> None:
    done = in_process(*arguments(weights, photographs, tmp_path / "out"), "--precision", precision, "--opset", "19")
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "out").glob("*.onnx")
    pixels, logits = eager(weights, photographs)
    session = onnxruntime.InferenceSession(path)
    for images in (pixels, pixels[:1]):
        (found,) = session.run(["logits"], {"images": images.numpy().astype(dtype)})
        assert found.dtype == dtype
        np.testing.assert_allclose(found, logits[: len(images)], rtol=0, atol=tolerance)
    stored = onnx.load(path)
    about = json.loads({entry.key: entry.value for entry in stored.metadata_props}["tokenpool"])
    assert about["opset"] == 19 == stored.opset_import[0].version
    report = json.loads(report_of(path).read_text())
    assert sum(report["operators"].values()) > len(stored.graph.node)  # and operators of the two loops
    assert report["operators"]["Loop"] == 2 and not stored.functions
    assert not {"NonZero", "If", "ScatterElements-add", "ScatterND-add"} & report["operators"].keys()


@pytest.mark.slow
def test_openvino(in_process, weights: Path, photographs: Path, tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    done = in_process(*arguments(weights, photographs, tmp_path / "out"), "--to", "openvino")
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "out").glob("*.xml")
    pixels, logits = eager(weights, photographs)
    found = openvino.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(pixels.numpy())[0]
    equal = np.abs(found - logits.numpy()).max(axis=1) < 1e-3
    assert equal.sum() >= 6  # other products round otherwise, which decides an assignment of one of the seven images
    np.testing.assert_allclose(found, logits, rtol=0, atol=0.5)


def test_a_wrong_file_is_reported(weights: Path, photographs: Path, tmp_path: Path, monkeypatch) -> None:
    class Wrong(formats.Program):
        def write(self, model: nn.Module, images: Tensor, path: Path, about: Mapping[str, Any], opset: int) -> None:
            super().write(nn.Sequential(model, nn.Softmin(dim=1)), images, path, about, opset)

    monkeypatch.setitem(formats.FORMATS, "pt2", Wrong())
    chosen = Export(MODEL, "pt2", weights=weights)
    *_, compared, _ = export(chosen, tmp_path / "wrong.pt2", photographs)
    report = json.loads((tmp_path / "wrong.pt2.json").read_text())
    assert report["largest_difference"] > 1 and report["differing_top1"] == 7 and "class for 7" in compared


def test_each_format_has_its_own_report(tmp_path: Path) -> None:
    paths = [path_of(Export(MODEL, to), tmp_path) for to in formats.FORMATS]
    assert len({path.with_suffix("") for path in paths}) == 1
    assert len({report_of(path) for path in paths} - set(paths)) == len(paths) == 3


def test_other_settings_have_other_files(tmp_path: Path) -> None:
    settings = [{}, {"carry": False}, {"options": {"iterations": 2}}, {"model_options": {"img_size": 96}}]
    paths = [path_of(Export("hf-hub:timm/" + MODEL, "onnx", "wkmedoids", **each), tmp_path) for each in settings]
    assert len(set(paths)) == 4 and all(path.parent == tmp_path for path in paths)
    assert all(re.fullmatch("[0-9A-Za-z._-]+", path.name) for path in paths)


def test_an_interrupted_export_leaves_no_file(weights: Path, tmp_path: Path, monkeypatch) -> None:
    chosen, path = Export(MODEL, "pt2", weights=weights), tmp_path / "out" / "model.pt2"
    with monkeypatch.context() as interrupted:

        def read(self: formats.Program, path: Path, threads: int = 0) -> None:
            assert path.exists()
            raise KeyboardInterrupt

        interrupted.setattr(formats.Program, "read", read)
        with pytest.raises(KeyboardInterrupt):
            list(export(chosen, path, limit=2))
    assert list((tmp_path / "out").iterdir()) == []
    list(export(chosen, path, limit=2))
    assert sorted(each.name for each in (tmp_path / "out").iterdir()) == ["model.pt2", "model.pt2.json"]


def test_an_export_of_another_setting_is_not_replaced(weights: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    list(export(Export(MODEL, "pt2", weights=weights), path, limit=1))
    before = path.stat().st_mtime_ns
    list(export(Export(MODEL, "pt2", weights=weights), path, limit=1))
    assert path.stat().st_mtime_ns > before
    kept = path.read_bytes()
    with pytest.raises(ValueError, match="model.pt2 is an export of another setting, .*--output") as refused:
        list(export(Export(MODEL, "pt2"), path, limit=1))  # random weights
    report_of(path).unlink()
    with pytest.raises(ValueError, match="or has no report"):
        list(export(Export(MODEL, "pt2", weights=weights), path, limit=1))
    assert path.read_bytes() == kept and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--to", "openvino"], 'error: export --to openvino needs openvino: pip install "tokenpool[openvino]"'),
        (["--to", "tflite"], "error: to = 'tflite' must be one of onnx, pt2, openvino"),
        (["--precision", "int4"], "error: precision = 'int4' must be one of float32, float16"),
        (["--keep", "0.5", "--gmacs", "1"], "error: --keep and --gmacs are two ways"),
        (["--images", "tests"], "error: --images tests has no image"),
    ],
)
def test_refused(in_process, monkeypatch: pytest.MonkeyPatch, options: list[str], message: str) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    done = in_process("export", MODEL, "--method", "none", *options)
    assert done.returncode == 1 and done.stderr.startswith(message) and done.stderr.count("\n") == 1, done.stderr
