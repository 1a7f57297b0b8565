"""Quantised files: which operators are quantised, how far weights and logits are from float32, and what is refused."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import safetensors.torch
import timm
import torch
from onnx import numpy_helper
from PIL import Image
from torch import Tensor, nn

import tokenpool
from tokenpool.tools import int8
from tokenpool.tools.formats import FORMATS, OPSET

MODEL = "test_vit"  # timm's smallest
ABOUT = {"model": MODEL, "text": "ä"}


@pytest.fixture(scope="module")
def plain() -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(MODEL).eval().requires_grad_(False)
    nn.init.normal_(model.head.weight)  # logits that differ from image to image
    return model


@pytest.fixture(scope="module")
def images() -> Tensor:
    coarse = torch.randn(16, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    return nn.functional.interpolate(coarse, 160, mode="bicubic")


@pytest.fixture(scope="module")
def float32(plain: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("float32") / "model.onnx"
    model = timm.create_model(MODEL).eval().requires_grad_(False)
    model.load_state_dict(plain.state_dict())
    tokenpool.patch(model, "wkmedoids", "0.7@1,3", carry=True)
    FORMATS["onnx"].write(model, torch.zeros(2, 3, 160, 160), path, ABOUT, OPSET)
    return path


@pytest.fixture(scope="module", params=int8.PRECISIONS)
def quantised(request, float32: Path, images: Tensor) -> Path:
    path = float32.with_name(f"{request.param}.onnx")
    int8.quantise(request.param, float32, path, images[:12].split(5))
    return path


def logits(path: Path, images: Tensor) -> np.ndarray:
    return onnxruntime.InferenceSession(path).run(None, {"images": images.numpy()})[0]


def products(graph: onnx.GraphProto) -> Iterator[tuple[str, bool]]:
    """The matrix products of a graph: operator, and whether both factors are integers, or were a moment before."""
    producer = {name: node.op_type for node in graph.node for name in node.output}
    for node in graph.node:
        if node.op_type in ("MatMul", "Gemm", "MatMulInteger"):
            factors = [producer.get(name) for name in node.input[:2]]
            yield node.op_type, node.op_type == "MatMulInteger" or factors == ["DequantizeLinear"] * 2


def test_only_linear_layers_are_quantised(plain: nn.Module, float32: Path, quantised: Path) -> None:
    before, after = onnx.load(float32).graph, onnx.load(quantised).graph
    layers = sum(isinstance(each, nn.Linear) for each in plain.modules())
    integer = [is_integer for _, is_integer in products(after)]
    assert sum(integer) == layers == 4 * 6 + 1
    assert len(integer) == len(list(products(before))) >= layers + 2 * 6 + 2  # attention twice a block, and clustering
    kinds = [{node.op_type for node in graph.node} for graph in (before, after)]
    added = {"MatMulInteger", "DynamicQuantizeLinear"} if "dynamic" in quantised.name else {"QuantizeLinear"}
    assert "Conv" in kinds[1] and added <= kinds[1] - kinds[0]
    loops = [
        [
            [(each.op_type, *each.input, *each.output) for each in node.attribute[0].g.node]
            for node in graph.node
            if node.op_type == "Loop"
        ]
        for graph in (before, after)
    ]
    assert loops[0] == loops[1] and len(loops[0]) == 2


def test_weights_have_seven_bits_and_a_scale_for_each_output(plain: nn.Module, quantised: Path) -> None:
    stored = {each.name: numpy_helper.to_array(each) for each in onnx.load(quantised).graph.initializer}
    weights = {name.removesuffix("_quantized"): value for name, value in stored.items() if name.endswith("_quantized")}
    weights = {name: value for name, value in weights.items() if value.dtype == np.int8}
    expected = [each.weight.numpy() for each in plain.modules() if isinstance(each, nn.Linear)]
    assert len(weights) == len(expected)
    for name, value in weights.items():
        scale = stored[f"{name}_scale"]
        assert np.abs(value).max() <= 64 and not stored[f"{name}_zero_point"].any()
        if value.shape[0] == len(scale) and value.shape[1] != len(scale):
            value = value.T  # Gemm has its weights transposed
        matches = [
            weight
            for weight in expected
            if weight.T.shape == value.shape and (np.abs(weight.T - value * scale) <= 0.51 * scale).all()
        ]
        assert len(matches) == 1, name
        np.testing.assert_allclose(scale, np.abs(matches[0]).max(axis=1) / 64, rtol=1e-5)


def test_logits_are_close(float32: Path, quantised: Path, images: Tensor) -> None:
    expected, found = logits(float32, images), logits(quantised, images)
    error = np.abs(found - expected).mean() / expected.std()
    assert 1e-3 < error < 0.1
    if quantised.name == "int8.onnx":  # the ranges of int8-dynamic are those of the batch
        alone = np.concatenate([logits(quantised, image[None]) for image in images[:3]])
        np.testing.assert_allclose(alone, found[:3], rtol=0, atol=1e-4)


def test_the_description_is_kept(quantised: Path) -> None:
    _, about, operators = FORMATS["onnx"].read(quantised)
    assert about == ABOUT and operators["Loop"] == 2


def test_a_failure_leaves_no_file(float32: Path, images: Tensor, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs calibration images: give at least one batch, or use int8-dynamic"):
        int8.quantise_static(float32, tmp_path / "a.onnx", [])
    with pytest.raises(Exception, match="160"):
        int8.quantise_static(float32, tmp_path / "b.onnx", [images[:1, :, :80]])
    with pytest.raises(ValueError, match="precision = 'int4' must be one of int8, int8-dynamic"):
        int8.quantise("int4", float32, tmp_path / "c.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_export_command(in_process, plain: nn.Module, tmp_path: Path) -> None:
    safetensors.torch.save_file(plain.state_dict(), tmp_path / "weights.safetensors")
    generator = np.random.default_rng(0)
    for index in range(6):
        (tmp_path / "images").mkdir(exist_ok=True)
        coarse = generator.integers(0, 256, (5, 5, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((200, 180)).save(tmp_path / "images" / f"{index}.png")
    chosen = ["export", MODEL, "--weights", str(tmp_path / "weights.safetensors"), "--method", "none"]
    folder = ["--calibration", str(tmp_path / "images"), "--calibration-limit", "3", "--output", str(tmp_path)]
    done = in_process(*chosen, "--precision", "int8", "--images", str(tmp_path / "images"), *folder)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*-int8.onnx")
    report = json.loads(path.with_name(f"{path.name}.json").read_text())
    assert report["precision"] == "int8" and report["calibration_images"] == 3 and report["images"] == 6
    assert report["operators"]["QuantizeLinear"] == 25 and report["bytes"] == path.stat().st_size
    assert 0 < report["largest_difference"] < 0.3 * report["largest_logit"] and report["differing_top1"] <= 1
    session = onnxruntime.InferenceSession(path)
    assert [each.type for each in (*session.get_inputs(), *session.get_outputs())] == ["tensor(float)"] * 2


@pytest.mark.parametrize(
    "options, message",
    [
        (["--precision", "int8"], "error: --precision int8 needs --calibration FOLDER, or take --precision int8-d"),
        (["--precision", "int8-dynamic", "--to", "pt2"], "error: --precision int8-dynamic is for --to onnx only"),
        (["--calibration", "tests"], "error: --calibration is for --precision int8 only, not for float32: leave it"),
        (["--precision", "int8", "--calibration", "tests"], "error: --calibration tests has no image: give a folder"),
    ],
)
def test_refused(in_process, options: list[str], message: str) -> None:
    done = in_process("export", MODEL, "--method", "none", *options)
    assert done.returncode == 1 and done.stderr.startswith(message) and done.stderr.count("\n") == 1, done.stderr
