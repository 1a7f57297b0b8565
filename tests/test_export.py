"""Patched models give the same logits after torch.export and in ONNX Runtime. (For torch.compile see test_blocks.)"""

import warnings
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

import tokenpool
from tokenpool.downsampling import Noise, with_schedule

KEEP = [20, 4]
SETTINGS = [{"downsampler": name, "keep": KEEP} for name in with_schedule()]
SETTINGS += [{"downsampler": "convolution", "at": [0, 1]}, {"downsampler": "kmeans", "keep": KEEP, "init": "random"}]
QUICK = ("wkmedoids",)  # exported also by `make test-fast`
# Other methods stand for these, to save time: an export takes up to half a minute.
NOT_IN_ONNX = (
    "importance",
    "kmeans-random",
    "kmedoids",
    "atc",
    "ward",  # a graph contains each merge
    "pitome",
    "mpm",
    "hvt",
    "dynamicvit",
)
BATCH = {"x": {0: torch.export.Dim("batch")}}


@pytest.fixture
def tiny(small: VisionTransformer) -> VisionTransformer:
    """Two of the four blocks of `small`: exporting takes time for each."""
    small.blocks = small.blocks[:2]
    return small


def name_of(setting: dict[str, Any]) -> str:
    return "-".join([setting["downsampler"], *(["random"] if "init" in setting else [])])


@pytest.mark.parametrize(
    "setting",
    [pytest.param(each, marks=() if name_of(each) in QUICK else pytest.mark.slow) for each in SETTINGS],
    ids=name_of,
)
@torch.no_grad()
def test_exported_with_any_batch(setting: dict[str, Any], tiny: VisionTransformer, photos: Tensor) -> None:
    tokenpool.patch(tiny, **setting)
    exported = torch.export.export(tiny, (photos[:2],), dynamic_shapes=BATCH).module()
    for images in (photos, photos[:1], photos[:3]):
        torch.testing.assert_close(exported(images), tiny(images), rtol=0, atol=1e-4)


def forbidden(graph: onnx.GraphProto) -> list[str]:
    """The nodes whose shapes depend on values, that branch, or that scatter with a reduction.

    TensorRT refuses some of the last, and computes others wrongly.
    """
    found = []
    for node in graph.node:
        reduces = any(each.name == "reduction" and each.s != b"none" for each in node.attribute)
        if reduces or node.op_type in ("NonZero", "Loop", "If", "Scan", "Compress", "Unique"):
            found.append(f"{node.op_type} {node.name}")
    return found


def test_forbidden_nodes_are_found() -> None:
    names = ["data", "indices", "updates"]
    nodes = [onnx.helper.make_node("ScatterElements", names, ["a"], axis=1)]
    nodes += [onnx.helper.make_node("ScatterElements", names, ["b"], name="bad", axis=1, reduction="add")]
    nodes += [onnx.helper.make_node("ScatterND", names, ["c"], name="bad", reduction="min")]
    nodes += [onnx.helper.make_node("NonZero", ["data"], ["d"], name="bad")]
    found = forbidden(onnx.helper.make_graph(nodes, "graph", [], []))
    assert found == ["ScatterElements bad", "ScatterND bad", "NonZero bad"]


def onnx_logits(model: VisionTransformer, images: Tensor, path: Path) -> Tensor:
    """Logits of an ONNX file in onnxruntime; it is made from other images, and fewer."""
    example = torch.zeros_like(images[:2])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (example,), path, dynamo=True, dynamic_shapes=BATCH, verbose=False)
    assert not forbidden(onnx.load(path).graph)
    session = onnxruntime.InferenceSession(path)
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: images.numpy()})[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    "setting", [setting for setting in SETTINGS if name_of(setting) not in NOT_IN_ONNX], ids=name_of
)
@torch.no_grad()
def test_onnx(setting: dict[str, Any], tiny: VisionTransformer, photos: Tensor, tmp_path: Path) -> None:
    if setting["downsampler"] == "tome" and torch.__version__ < "2.9":
        pytest.skip("PyTorch 2.8 exports fused attention with a mask to ONNX for batches of two and more only")
    tokenpool.patch(tiny, **setting)
    found = onnx_logits(tiny, photos, tmp_path / "model.onnx")
    torch.testing.assert_close(found, tiny(photos), rtol=0, atol=1e-3)


@pytest.mark.slow
@torch.no_grad()
def test_onnx_of_a_head_that_reads_patches(tmp_path: Path) -> None:
    torch.manual_seed(0)
    size = {"embed_dim": 48, "depth": 2, "num_heads": 3, "img_size": 64, "num_classes": 5}
    model = tokenpool.create_model("vit_base_patch16_siglip_224", "wkmedoids", 0.6, carry=True, **size).eval()
    images = torch.randn(3, 3, 64, 64)
    torch.testing.assert_close(onnx_logits(model, images, tmp_path / "m.onnx"), model(images), rtol=0, atol=1e-3)


def test_a_generator_cannot_be_exported(tiny: VisionTransformer, photos: Tensor) -> None:
    tokenpool.patch(tiny, "random", KEEP, generator=torch.Generator())
    with pytest.raises(Exception, match="a generator cannot be compiled or exported"):
        torch.export.export(tiny, (photos,))


@pytest.mark.parametrize("n, seed", [(1, 0), (16, 1), (36, 0), (196, 5000), (577, 2**40)])
def test_the_fixed_draw_is_pytorchs(n: int, seed: int) -> None:
    expected = torch.rand(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + n))
    drawn = Noise(seed, None).draw(torch.zeros(2, n, 1), training=False)
    assert torch.equal(drawn, expected.expand(2, n))
