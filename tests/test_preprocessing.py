"""What becomes of an image before a model sees it, held against timm's own transform of the model."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from timm.models import save_for_hf
from timm.models.vision_transformer import VisionTransformer

from tokenpool.runs import data_sets, execute
from tokenpool.runs.run import Run, empty_model, preprocessing
from tokenpool.training.data import ImageFolderDataModule

TINY = {"embed_dim": 24, "depth": 1, "num_heads": 2}


def run(name: str, data: str = "imagenet", **changes) -> Run:
    return Run.from_setting({"stage": "evaluate", "label": "x", "data": data, "model": name} | changes)


def transform(run: Run, monkeypatch: pytest.MonkeyPatch, folder: Path) -> object:
    """Of the images that the run evaluates."""
    monkeypatch.setenv(data_sets.DATA, str(folder))
    data = execute.data_module(run)
    data.setup("test")
    return data.test_set.dataset.transform


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images" / "val" / "a").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 255, (200, 300, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "images" / "val" / "a" / "a.png")
    return tmp_path / "images"


@cache
def configured() -> dict[str, str]:
    """One model of each configuration that timm has for models of the modules that `patch` takes."""
    found = {}
    for name in dict.fromkeys([*timm.list_models(), *timm.list_models(pretrained=True)]):
        module = timm.models.model_entrypoint(name).__module__
        if module in ("timm.models.vision_transformer", "timm.models.deit"):
            config = timm.get_pretrained_cfg(name)
            keys = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
            found.setdefault(str([getattr(config, key) for key in keys]), name)
    return found


def test_every_configuration_of_timm(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes, interpolations = set(), set()
    for name in configured().values():
        with torch.device("meta"):
            model = timm.create_model(name, depth=1)
        if not isinstance(model, VisionTransformer):
            continue
        config = resolve_model_data_config(model)
        assert str(transform(run(name), monkeypatch, folder)) == str(create_transform(**config)), name
        assert config["input_size"][1:] == tuple(model.patch_embed.img_size), name
        assert json.loads(json.dumps(found := preprocessing(run(name)))) == found
        modes.add(config["crop_mode"]), interpolations.add(config["interpolation"])
    assert modes == {"center", "squash"} and interpolations == {"bicubic", "bilinear"}


def test_committed_results_were_preprocessed_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those on photographs: bicubic, the centre of 0.9, ImageNet's mean, whatever timm says of the model later."""
    before = create_transform(
        (3, 224, 224), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), interpolation="bicubic", crop_pct=0.9
    )
    for name in ("deit_tiny_patch16_224", "deit_small_patch16_224", "deit_e252_patch16_224"):
        assert str(transform(run(name), monkeypatch, folder)) == str(before)
    assert preprocessing(run("deit_tiny_patch16_224")) == {
        "input_size": [3, 224, 224],
        "interpolation": "bicubic",
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "crop_pct": 0.9,
        "crop_mode": "center",
    }
    data = ImageFolderDataModule(folder)  # by default
    data.setup("test")
    assert str(data.test_set.dataset.transform) == str(before)
    assert preprocessing(run("deit_digits_patch2_16", data="digits")) == {}


def test_what_a_run_says_comes_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "vit_base_patch16_clip_384.openai_ft_in12k_in1k"
    given = run(name, crop_pct=0.8, model_options={"img_size": 96})
    wanted = resolve_model_data_config(timm.create_model(name, **TINY), {"crop_pct": 0.8, "input_size": (3, 96, 96)})
    assert wanted["crop_mode"] == "squash"
    assert str(transform(given, monkeypatch, folder)) == str(create_transform(**wanted))
    oblong = preprocessing(run("deit_tiny_patch16_224", model_options={"img_size": [96, 64]}))
    assert oblong["input_size"] == [3, 96, 64]
    overlay = {"crop_mode": "border", "mean": [0.1, 0.2, 0.3]}
    overlaid = preprocessing(run("deit_tiny_patch16_224", model_options={"pretrained_cfg_overlay": overlay}))
    dynamic = {"model_options": {"pretrained_cfg_overlay": overlay, "dynamic_img_size": True, "img_size": 96}}
    assert preprocessing(run("deit_tiny_patch16_224", **dynamic))["input_size"] == [3, 96, 96]
    assert (overlaid["crop_mode"], overlaid["mean"], overlaid["crop_pct"]) == ("border", [0.1, 0.2, 0.3], 0.9)


def test_a_folder_that_timm_has_saved(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`local-dir:`, whose configuration is known when it is read; `hf-hub:` has the same file."""
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=7, **TINY)
    own = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "crop_pct": 0.7, "crop_mode": "squash"}
    model.pretrained_cfg |= own | {"interpolation": "bilinear", "num_classes": 7}
    save_for_hf(model, tmp_path / "saved", model_args=TINY | {"img_size": 64, "num_classes": 7})
    name = f"local-dir:{tmp_path / 'saved'}"
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    saved["pretrained_cfg"]["input_size"] = [3, 224, 224]  # of the name, as some versions of timm leave it
    (tmp_path / "saved" / "config.json").write_text(json.dumps(saved))
    wanted = create_transform(**resolve_model_data_config(model) | {"input_size": (3, 64, 64)})
    assert str(transform(run(name), monkeypatch, folder)) == str(wanted)
    assert empty_model(run(name)).num_classes == 7
    assert next(empty_model(run(name)).parameters()).is_meta
    data = execute.data_module(run(name))
    data.setup("test")
    assert timm.create_model(name).eval()(data.test_set[0][0][None]).shape == (1, 7)
