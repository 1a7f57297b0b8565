import argparse
import json
import pickle
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

import tokenpool
from tokenpool.downsampling import PowerBert

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
    with pytest.raises(ValueError, match="cannot be saved: timm builds another one by its name and size"):
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
    with pytest.raises(ValueError, match="downsampler Mine is none of none, convolution"):
        tokenpool.save(tokenpool.patch(small, Mine, 0.9), path)
    with pytest.raises(ValueError, match="setting cannot be saved"):
        tokenpool.save(tokenpool.patch(small, "random", 0.9, generator=torch.Generator()), path)
    tokenpool.unpatch(small).head = torch.nn.Linear(48, 7, bias=False)
    with pytest.raises(ValueError, match=r"timm builds another one by its name and size: 1 missing, .*'head.bias'"):
        tokenpool.save(small, path)
    del small.pretrained_cfg
    with pytest.raises(ValueError, match="that timm.create_model has not made"):
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


def test_weights_for_images_of_another_size_are_interpolated_as_timm_does(small, tmp_path) -> None:
    from safetensors.torch import save_file

    options = {"embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 7, "img_size": 128}
    save_file(small.state_dict(), tmp_path / "small.safetensors")
    model = tokenpool.create_model("deit_tiny_patch16_224", "wkmedoids", [40, 30, 20, 10], **options)
    tokenpool.load_weights(model, tmp_path / "small.safetensors")
    file = {"file": str(tmp_path / "small.safetensors")}
    reference = timm.create_model("deit_tiny_patch16_224", pretrained=True, pretrained_cfg_overlay=file, **options)
    assert model.pos_embed.shape[1] == 65 and torch.equal(model.pos_embed, reference.pos_embed)
    assert torch.equal(model.head.weight, small.head.weight)
