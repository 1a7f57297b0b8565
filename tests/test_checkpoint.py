import argparse
import collections
import datetime
import json
import pickle
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import peft
import pytest
import safetensors.torch
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import tokenpool
from tokenpool.downsampling import PowerBert
from tokenpool.runs.execute import build_model, training_module
from tokenpool.runs.run import Run
from tokenpool.training.recipe import Recipe

SETTINGS = [
    {"downsampler": "wkmedoids", "keep": [20, 9, 4, 1], "carry": True},
    {"downsampler": "kmeans", "keep": "-5", "init": "random", "iterations": 2, "seed": 3},
    {"downsampler": "convolution", "at": [0, 2]},
    {"downsampler": "power_bert", "keep": [9, 9, 9, 0], "qk_norm": "l2", "alpha": 3.0, "learn_alpha": True},
    {"downsampler": "tome", "keep": 0.8},
    {"downsampler": "none"},
]


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting["downsampler"])
@torch.no_grad()
def test_there_and_back(setting: dict, small: VisionTransformer, photos: Tensor, tmp_path: Path) -> None:
    tokenpool.patch(small, **setting)
    for name, parameter in small.named_parameters():
        if "alpha" in name or "convolution" in name:
            parameter.mul_(1.5)  # has been trained
    expected = small(photos)
    tokenpool.save(small, tmp_path / "model.safetensors")
    loaded = tokenpool.load(tmp_path / "model.safetensors")
    assert torch.equal(loaded(photos), expected) and not loaded.training
    assert tokenpool.is_patched(loaded) == tokenpool.is_patched(small)
    if tokenpool.is_patched(small):
        assert loaded.blocks.setting == small.blocks.setting
    assert list(tmp_path.iterdir()) == [tmp_path / "model.safetensors"]


@torch.no_grad()
def test_a_model_with_attention_pooling(tmp_path: Path) -> None:
    model = tokenpool.create_model(
        "vit_base_patch16_siglip_224", "kmedoids", 0.5, embed_dim=48, depth=2, num_heads=3, img_size=64, num_classes=5
    ).eval()
    images = torch.randn(2, 3, 64, 64)
    tokenpool.save(model, tmp_path / "m.safetensors")
    assert torch.equal(tokenpool.load(tmp_path / "m.safetensors")(images), model(images))


@pytest.mark.parametrize(
    "name, options",
    [
        ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}),
        ("vit_tiny_patch16_224", {"reg_tokens": 3, "drop_path_rate": 0.2, "drop_rate": 0.1}),
        ("vit_tiny_patch16_224", {"global_pool": "avg", "pool_include_prefix": True, "patch_size": 8, "in_chans": 1}),
        ("deit_tiny_distilled_patch16_224", {}),
        ("vit_small_patch14_reg4_dinov2", {"img_size": 56}),
        ("vit_base_patch32_clip_224", {}),
    ],
)
@torch.no_grad()
def test_families_there_and_back(name: str, options: dict, tmp_path: Path) -> None:
    size = {"embed_dim": 48, "depth": 2, "num_heads": 3, "img_size": 64, "num_classes": 5}
    model = timm.create_model(name, **size | options).eval()
    tokenpool.patch(model, "kmedoids", [3, 1])
    images = torch.randn(2, model.in_chans, *model.patch_embed.img_size)
    tokenpool.save(model, tmp_path / "m.safetensors")
    assert torch.equal(tokenpool.load(tmp_path / "m.safetensors")(images), model(images))


@pytest.mark.parametrize("options", [{"act_layer": "relu"}, {"norm_layer": "rmsnorm"}, {"qk_norm": True}])
def test_what_timm_would_build_otherwise_is_refused(options: dict, tmp_path: Path) -> None:
    """The same names and shapes of weights are not enough."""
    model = timm.create_model("vit_tiny_patch16_224", embed_dim=48, depth=2, num_heads=3, **options)
    with pytest.raises(ValueError, match="cannot be saved: timm builds a different model for its name and size"):
        tokenpool.save(model, tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_failed_save_leaves_the_old_file(
    small: VisionTransformer, photos: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.safetensors"
    tokenpool.save(small, path)
    before = path.read_bytes()

    def fail(state: dict, file: Path, metadata: dict) -> None:
        file.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(OSError, match="no space left"):
        tokenpool.save(small, path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_the_weights_are_timms_own(small: VisionTransformer, tmp_path: Path) -> None:
    keys = set(small.state_dict())
    tokenpool.save(tokenpool.patch(small, "wkmeans", 0.9), tmp_path / "m.safetensors")
    assert set(safetensors.torch.load_file(tmp_path / "m.safetensors")) == keys


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@torch.no_grad()
def test_timms_checkpoints_go_in(suffix: str, small: VisionTransformer, photos: Tensor, tmp_path: Path) -> None:
    path = tmp_path / f"timm{suffix}"
    if suffix == ".pth":
        torch.save({"state_dict": small.state_dict(), "epoch": 3}, path)
    else:
        safetensors.torch.save_file(small.state_dict(), path)
    expected = small(photos)
    other = timm.create_model(
        "deit_tiny_patch16_224", img_size=96, embed_dim=48, depth=4, num_heads=3, num_classes=7
    ).eval()
    tokenpool.patch(other, "kmedoids", [36] * 4)
    tokenpool.load_weights(other, path)
    assert torch.allclose(other(photos), expected, atol=1e-5)


class Trap:
    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("pickle-was-executed"),))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_no_pickle_is_executed(
    suffix: str, small: VisionTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / f"trap{suffix}"
    path.write_bytes(pickle.dumps(Trap()))
    torch.save({"state_dict": Trap()}, tmp_path / "zip.pth")
    for each in (path, tmp_path / "zip.pth"):
        with pytest.raises(ValueError, match=f"cannot read weights .*{each.name}"):
            tokenpool.load_weights(small, each)
    with pytest.raises(ValueError, match="cannot read model"):
        tokenpool.load(path)
    assert not (tmp_path / "pickle-was-executed").exists()


def test_what_cannot_be_built_again_is_refused(small: VisionTransformer, tmp_path: Path) -> None:
    class Mine(PowerBert):
        pass

    path = tmp_path / "m.safetensors"
    with pytest.raises(ValueError, match="downsampler Mine is not one of none, convolution"):
        tokenpool.save(tokenpool.patch(small, Mine, 0.9), path)
    with pytest.raises(ValueError, match="setting cannot be saved"):
        tokenpool.save(tokenpool.patch(small, "random", 0.9, generator=torch.Generator()), path)
    tokenpool.unpatch(small).head = torch.nn.Linear(48, 7, bias=False)
    with pytest.raises(ValueError, match=r"timm builds a different model .*: 1 missing, .*'head.bias'"):
        tokenpool.save(small, path)
    small.head = torch.nn.Linear(48, 7).half()
    with pytest.raises(ValueError, match="weights are of torch.float16 and torch.float32"):
        tokenpool.save(small, path)
    with pytest.raises(ValueError, match="a DataParallel wraps the model: save its `module`"):
        tokenpool.save(torch.nn.DataParallel(small), path)
    del small.pretrained_cfg
    with pytest.raises(ValueError, match="cannot be saved: create the model by timm.create_model"):
        tokenpool.save(small, path)
    assert not list(tmp_path.iterdir())


def test_files_of_others_are_named(small: VisionTransformer, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no model at .*absent"):
        tokenpool.load(tmp_path / "absent")
    plain = tmp_path / "plain.safetensors"
    safetensors.torch.save_file(small.state_dict(), plain)
    with pytest.raises(ValueError, match=r"plain.safetensors was not written by tokenpool.save"):
        tokenpool.load(plain)
    tokenpool.save(small, plain)
    plain.write_bytes(plain.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cannot read model .*plain.safetensors"):
        tokenpool.load(plain)


@torch.no_grad()
def test_tag_and_precision_are_kept(tmp_path: Path) -> None:
    size = {"embed_dim": 48, "depth": 2, "num_heads": 3, "img_size": 64, "num_classes": 5}
    model = timm.create_model("vit_base_patch16_224.dino", dynamic_img_size=True, dynamic_img_pad=True, **size)
    tokenpool.patch(model.eval().bfloat16(), "tome", 0.8)
    tokenpool.save(model, tmp_path / "m.safetensors")
    loaded = tokenpool.load(tmp_path / "m.safetensors")
    images = torch.randn(2, 3, 70, 90).bfloat16()  # padded to whole patches
    assert torch.equal(loaded(images), model(images)) and loaded(images).dtype == torch.bfloat16
    expected = timm.data.resolve_model_data_config(model)
    assert timm.data.resolve_model_data_config(loaded) == expected and expected["mean"] == (0.485, 0.456, 0.406)


@pytest.mark.parametrize(
    "change",
    [
        {"model_options": {"checkpoint_path": "evil.pth"}},
        {"model_options": {"pretrained_cfg_overlay": {"file": "evil.pth"}}},
        {"setting": {"pretrained": True}},
        {"setting": {"downsampler": "kmedoids", "keep": [9] * 4, "options": {"checkpoint_path": "evil.pth"}}},
        {"setting": {"downsampler": "kmedoids", "keep": [9] * 4, "options": {"pretrained": True}}},
        {"model": "hf-hub:someone/something"},
        {"model": "no_such_model"},
        {"model": 3},
        {"dtype": "load"},
        {"setting": {"downsampler": "kmedoids", "keep": [1], "carry": True}},
        {"extra": 1},
    ],
    ids=str,
)
def test_a_forged_description_opens_nothing(
    change: dict, small: VisionTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.safetensors"
    tokenpool.save(small, path)
    with safetensors.safe_open(path, "pt") as file:
        description = json.loads(file.metadata()["tokenpool"]) | change
    safetensors.torch.save_file(small.state_dict(), path, metadata={"tokenpool": json.dumps(description)})
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("a file was opened"))
    build = timm.create_model

    def watched(name: str, pretrained: bool = False, **options: object) -> VisionTransformer:
        if pretrained or {"checkpoint_path", "pretrained_cfg_overlay"} & options.keys():
            pytest.fail("timm was asked to open a file")
        return build(name, **options)

    monkeypatch.setattr(timm, "create_model", watched)
    with pytest.raises(ValueError, match=r"cannot build the model that .*m.safetensors describes"):
        tokenpool.load(path)


def test_checkpoints_of_timms_training_script_go_in(small: VisionTransformer, tmp_path: Path) -> None:
    torch.save({"state_dict": small.state_dict(), "args": argparse.Namespace(lr=1e-3)}, tmp_path / "last.pth.tar")
    tokenpool.load_weights(small, tmp_path / "last.pth.tar")
    safetensors.torch.save_file(small.state_dict(), tmp_path / "weights.bin")
    tokenpool.load_weights(small, tmp_path / "weights.bin")


SIZE = {"embed_dim": 48, "depth": 2, "num_heads": 3, "img_size": 64, "num_classes": 5}


def tiny(name: str = "deit_tiny_patch16_224", **options: object) -> VisionTransformer:
    """Of 16 patches and with weights that tell one parameter from the next."""
    model = timm.create_model(name, **SIZE | options).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def load_and_say(model: VisionTransformer, path: Path, **options: object) -> str:
    """What `load_weights` warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tokenpool.load_weights(model, path, **options)
    return " ".join(str(warning.message) for warning in caught)


def same(model: VisionTransformer, state: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{key}": value for key, value in state.items()}


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize(
    "prefix",
    ["module.", "_orig_mod.", "model.", "backbone.", "module._orig_mod.", "net.encoder.", "base_model.model.", "vit."],
)
def test_prefixes_are_taken_off_and_said(prefix: str, suffix: str, tmp_path: Path) -> None:
    state, path = tiny().state_dict(), tmp_path / f"wrapped.{suffix}"
    held = prefixed(state, prefix) | {"n_averaged": torch.tensor(3), "criterion.weight": torch.ones(2)}
    torch.save({"state_dict": held}, path) if suffix == "pth" else safetensors.torch.save_file(held, path)
    for model in (tiny(), tokenpool.patch(tiny(), "convolution", at=[0], qk_norm="l2", learn_alpha=True)):
        said = load_and_say(model, path)
        assert same(tokenpool.unpatch(model), state) and f"removed the prefix {prefix!r}" in said and str(path) in said


@pytest.mark.parametrize(
    "raw, averaged",
    [
        ("state_dict.", "state_dict_ema."),
        ("model.", "model_ema."),
        ("model.", "ema.module."),
        ("student.backbone.", "teacher.backbone."),
        ("", "ema.shadow."),
    ],
)
@pytest.mark.parametrize("flat", [True, False])
def test_the_moving_average_or_the_raw_weights(raw: str, averaged: str, flat: bool, tmp_path: Path) -> None:
    """Two sets of weights in one dictionary, told apart by prefixes, or in two."""
    one, other, path = tiny().state_dict(), tiny().state_dict(), tmp_path / "both.pth"
    both = prefixed(one, raw) | prefixed(other, averaged)
    if not flat and raw:
        both = {raw.rstrip("."): one, averaged.rstrip("."): other, "epoch": 3, "optimizer": {"state": {0: {"m": one}}}}
    torch.save(both, path)
    for ema, expected in ((None, other), (True, other), (False, one)):
        model = tiny()
        said = load_and_say(model, path, ema=ema)
        assert same(model, expected), ema
        kind, place = ("raw weights", raw) if ema is False else ("moving average", averaged)
        assert (
            f"loaded the {kind} '{place.rstrip('.')}', not " in said and f"ema={ema is False} loads the other" in said
        )


def test_one_of_the_two_alone(tmp_path: Path) -> None:
    state, path = tiny().state_dict(), tmp_path / "one.pth"
    torch.save({"state_dict_ema": state}, path)
    model = tiny()
    assert "loaded the moving average 'state_dict_ema'" in load_and_say(model, path) and same(model, state)
    with pytest.raises(ValueError, match=r"one.pth holds no raw weights .*only a moving average \('state_dict_ema'\)"):
        tokenpool.load_weights(model, path, ema=False)
    torch.save({"model": state}, path)
    assert load_and_say(model, path) == ""
    with pytest.raises(ValueError, match=r"one.pth holds no moving average of the weights, only raw weights"):
        tokenpool.load_weights(model, path, ema=True)
    torch.save({"generator": state, "critic": tiny().state_dict()}, path)
    with pytest.raises(ValueError, match=r"one.pth holds several sets of weights \('generator', 'critic'\)"):
        tokenpool.load_weights(model, path)


def test_runs_say_which_of_the_two(tmp_path: Path) -> None:
    raw, averaged = (timm.create_model("deit_digits_patch2_16").state_dict() for _ in range(2))
    torch.save({"state_dict": raw, "state_dict_ema": averaged}, tmp_path / "both.pth")
    run = Run("evaluate", "", "digits", "deit_digits_patch2_16", start=str(tmp_path / "both.pth"))
    for ema, expected in ((None, averaged), (True, averaged), (False, raw)):
        with pytest.warns(UserWarning, match="both.pth: loaded"):
            assert same(build_model(replace(run, ema=ema), tmp_path), expected)


def test_our_own_checkpoints_of_training_go_in(tmp_path: Path) -> None:
    model, path = tokenpool.patch(tiny(), "wkmedoids", 0.7), tmp_path / "run.ckpt"
    module = training_module(Run("train", "", "digits", "", recipe=Recipe(epochs=1, ema_decay=0.9)), model)
    for parameter in module.ema.parameters():
        torch.nn.init.normal_(parameter)
    torch.save({"state_dict": module.state_dict(), "epoch": 1, "run": {"keep": [1]}}, path)
    for ema, expected in ((False, model), (None, module.ema.module)):
        other = tokenpool.patch(tiny(), "wkmedoids", 0.7)
        load_and_say(other, path, ema=ema)
        assert same(other, expected.state_dict())


@pytest.mark.parametrize(
    "before, after, said",
    [
        ({}, {"img_size": 96}, "resampled pos_embed from (1, 17, 48) to (1, 37, 48)"),
        ({}, {"img_size": (32, 96)}, "resampled pos_embed from (1, 17, 48) to (1, 13, 48)"),
        (
            {"img_size": (32, 128)},
            {"img_size": (32, 128)},
            "assumed that pos_embed has 2 x 8",
        ),  # timm would take its 16 patches for 4 x 4
        ({"img_size": 128, "patch_size": 32}, {}, "resampled patch_embed.proj.weight from (48, 3, 32, 32)"),
    ],
)
def test_embeddings_of_another_size_are_resampled_as_timm_does(
    before: dict, after: dict, said: str, tmp_path: Path
) -> None:
    weights, path = tiny(**before), tmp_path / "other.pth"
    torch.save({"module": prefixed(weights.state_dict(), "module.")}, path)
    torch.save(weights.state_dict(), tmp_path / "plain.pth")
    model = tiny(**after)
    assert said in load_and_say(model, path)
    if before != after:
        overlay = {"file": str(tmp_path / "plain.pth"), "num_classes": 5}
        weights = timm.create_model("deit_tiny_patch16_224", True, pretrained_cfg_overlay=overlay, **SIZE | after)
    assert same(model, weights.state_dict())


def test_names_are_converted_as_timm_does(tmp_path: Path) -> None:
    path = tmp_path / "dinov2.pth"
    model = tiny("vit_small_patch14_reg4_dinov2", img_size=56, num_classes=0)
    state = model.state_dict()
    theirs = {key: value for key, value in state.items() if key != "reg_token"}
    theirs |= {"register_tokens": state["reg_token"], "mask_token": torch.zeros(1, 48)}
    theirs["pos_embed"] = torch.cat([torch.zeros(1, 1, 48), state["pos_embed"]], 1)
    torch.save({"teacher": prefixed(theirs, "backbone.")}, path)
    other = tiny("vit_small_patch14_reg4_dinov2", img_size=56, num_classes=0)
    assert "converted the names as timm does" in load_and_say(other, path) and same(other, state)


def test_classifiers_for_other_classes_and_for_none(tmp_path: Path) -> None:
    weights, path = tiny(), tmp_path / "five.pth"
    torch.save(weights.state_dict(), path)
    for classes in (0, 3):
        model = tiny(num_classes=classes)
        with pytest.raises(ValueError, match=r"five.pth .*'head.weight'.*other_classes=True ignores the classifier"):
            tokenpool.load_weights(model, path)
        head = {key: value.clone() for key, value in model.head.state_dict().items()}
        tokenpool.load_weights(model, path, other_classes=True)
        assert same(model, weights.state_dict() | {f"head.{key}": value for key, value in head.items()})
    torch.save(tiny(num_classes=0).state_dict(), path)
    with pytest.raises(ValueError, match="'head.weight'.*other_classes=True"):
        tokenpool.load_weights(weights, path)
    tokenpool.load_weights(weights, path, other_classes=True)


DISTILLED = "deit_tiny_distilled_patch16_224"
REFUSED: dict[str, tuple[Callable[[], dict], Callable[[], VisionTransformer], str]] = {
    "distilled into plain": (
        lambda: tiny(DISTILLED).state_dict(),
        tiny,
        "'dist_token': the weights are of a distilled model",
    ),
    "plain into distilled": (lambda: tiny().state_dict(), lambda: tiny(DISTILLED), "'dist_token': the model is dist"),
    "another depth": (lambda: tiny(depth=1).state_dict(), tiny, "12 missing.*'blocks.1.norm1.weight'"),
    "another width": (
        lambda: tiny(embed_dim=24).state_dict(),
        tiny,
        r"'cls_token', \(1, 1, 24\) instead of \(1, 1, 48",
    ),
    "transformers": (
        lambda: {f"vit.encoder.layer.{index}.attention.attention.query.weight": torch.ones(2) for index in range(3)},
        tiny,
        r"'vit.encoder.layer.0.attention.attention.query.weight': the names are of Hugging Face's transformers",
    ),
    "an adapter alone": (
        lambda: {"base_model.model.blocks.0.attn.qkv.lora_A.weight": torch.ones(2)},
        tiny,
        "lora_A.weight': the file has adapters: merge",
    ),
    "into LoRA": (
        lambda: tiny().state_dict(),
        lambda: peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["qkv"]), tiny()),
        "'blocks.0.attn.qkv.base_layer.weight': load weights before you add",
    ),
    "into a wrapper": (lambda: tiny().state_dict(), lambda: torch.nn.DataParallel(tiny()), "load .* into its `module`"),
    "no tensors": (lambda: {"a": 3}, tiny, "other.pth: it holds no named tensors"),
    "a list": (lambda: [torch.ones(2)], tiny, "other.pth: it holds no named tensors"),
}


@pytest.mark.parametrize("held, model, message", REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("other_classes", [False, True])
def test_weights_of_other_models_are_named(held, model, message: str, other_classes: bool, tmp_path: Path) -> None:
    torch.save(held(), tmp_path / "other.pth")
    with pytest.raises(ValueError, match=message):
        tokenpool.load_weights(model(), tmp_path / "other.pth", other_classes=other_classes)


@pytest.mark.parametrize("zipped", [True, False])
def test_what_stands_beside_tensors_does_no_harm(zipped: bool, tmp_path: Path) -> None:
    state, path = tiny().state_dict(), tmp_path / "last.pth"
    beside = [np.float64(3.5), np.bool_(True), np.arange(3), np.dtype("f4"), Path("a/b"), argparse.Namespace(lr=1)]
    beside += [datetime.datetime.now(), torch.__version__, collections.defaultdict(list, a=[1]), frozenset([1])]
    held = {"model": collections.OrderedDict(state), "beside": beside, "optimizer": {"state": {0: {"m": state}}}}
    torch.save(held, path, _use_new_zipfile_serialization=zipped)
    model = tiny()
    assert load_and_say(model, path) == "" and same(model, state)


@pytest.mark.parametrize("zipped", [True, False])
def test_refused_classes_are_named(zipped: bool, tmp_path: Path) -> None:
    torch.save({"model": tiny().state_dict(), "x": Trap()}, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"a.pth: besides tensors it holds a \S*(touch|getattr)\b") as refused:
        tokenpool.load_weights(tiny(), tmp_path / "a.pth")
    assert "damaged" not in str(refused.value)
    torch.save(tiny(), tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"a.pth: besides tensors it holds a timm\.\S*VisionTransformer,"):
        tokenpool.load_weights(tiny(), tmp_path / "a.pth")


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "it is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a pointer of Git LFS.*git lfs pull"),
        (b"\n<!DOCTYPE html><html><body>404</body></html>", "a page of HTML"),
        ('{"weight_map": "é"}'.encode(), 'a text file that begins with .{"weight_map"'),
        (b"\x1f\x8b\x08\x00\x00", "compressed by gzip"),
        (b"PK\x03\x04\x00\x00\x01\x02" * 20, "damaged"),
    ],
)
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_other_files_are_named(content: bytes, message: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"weights.{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"cannot read weights {path}: .*{message}") as refused:
        tokenpool.load_weights(tiny(), path)
    assert "\n" not in str(refused.value)


def test_more_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.save(tiny().state_dict(), path)
    with pytest.raises(ValueError, match="is a folder, not a file of weights; give a file in it, such as model.pth"):
        tokenpool.load_weights(tiny(), tmp_path)
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(ValueError, match="model.pth: damaged"):
        tokenpool.load_weights(tiny(), path)
    np.savez(tmp_path / "jax.npz", a=np.ones(2))
    with pytest.raises(ValueError, match="jax.npz: it is an archive of NumPy"):
        tokenpool.load_weights(tiny(), tmp_path / "jax.npz")
    torch.jit.trace(torch.nn.Linear(1, 1), torch.ones(1)).save(path)
    with pytest.raises(ValueError, match="model.pth: it is a TorchScript archive"):
        tokenpool.load_weights(tiny(), path)
    with pytest.raises(FileNotFoundError, match="no weights at .*absent"):
        tokenpool.load_weights(tiny(), tmp_path / "absent")


CHANGED = {
    "LoRA": lambda model: peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["qkv"]), model),
    "dynamic": lambda model: torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}),
    "weight norm": lambda model: torch.nn.utils.parametrizations.weight_norm(model.blocks[0].mlp.fc1) and model,
    "torchao": lambda model: quantize_(model, Int8WeightOnlyConfig()) or model,
}


@pytest.mark.parametrize("change", CHANGED)
@pytest.mark.parametrize("method", ["none", "wkmedoids"])
@pytest.mark.filterwarnings("ignore:.*(torch.ao.quantization|quantize_per_tensor):")
def test_adapters_and_quantised_modules_cannot_be_saved(change: str, method: str, tmp_path: Path) -> None:
    model = tokenpool.patch(tiny(), method, None if method == "none" else 0.7)
    reason = (
        r"blocks\S* is a Int8Tensor. Save" if change == "torchao" else r"blocks\S* is \S*, not Linear. Merge adapters"
    )
    with pytest.raises(ValueError, match=f"timm builds a different model for its name and size: {reason}"):
        tokenpool.save(CHANGED[change](model), tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())
