"""`patch`, `unpatch` and `create_model`: weights go in and out unchanged, and mistakes are named."""

import copy
import inspect
import pickle

import numpy as np
import pytest
import timm
import torch

import tokenpool
from tokenpool.downsampling import METHODS, with_schedule

TOKEN_METHODS = [name for name in with_schedule() if name != "dynamicvit"]  # which has parameters of its own
KEEP = [30, 17, 5, 2]


def test_none_equals_timm(small, photos) -> None:
    expected = small(photos)
    assert torch.equal(tokenpool.patch(small, "none")(photos), expected)
    state = small.state_dict()
    options = {"img_size": 96, "embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 7}
    created = tokenpool.create_model("deit_tiny_patch16_224", **options).eval()
    created.load_state_dict(state)
    assert torch.equal(created(photos), expected)


def test_patch_and_create_model_have_the_same_defaults() -> None:
    patch, create = (inspect.signature(function).parameters for function in (tokenpool.patch, tokenpool.create_model))
    shared = set(patch) & set(create) - {"downsampler"}  # which create_model alone can do without
    assert {"keep", "gmacs", "carry", "qk_norm", "alpha", "learn_alpha", "dense"} <= shared
    assert {name: patch[name].default for name in shared} == {name: create[name].default for name in shared}
    size = {"img_size": 96, "embed_dim": 48, "depth": 4, "num_heads": 3}
    assert tokenpool.create_model("deit_tiny_patch16_224", "wkmedoids", KEEP, **size).blocks.setting.carry


@pytest.mark.parametrize("method", TOKEN_METHODS)
def test_checkpoints_go_in_and_out(small, photos, method: str) -> None:
    state = copy.deepcopy(small.state_dict())
    patched = tokenpool.patch(copy.deepcopy(small), method, KEEP)
    expected = patched(photos)
    assert not torch.allclose(expected, small(photos))
    fresh = tokenpool.create_model(
        "deit_tiny_patch16_224",
        method,
        KEEP,
        carry=True,
        img_size=96,
        embed_dim=48,
        depth=4,
        num_heads=3,
        num_classes=7,
    ).eval()
    fresh.load_state_dict(state)
    assert torch.equal(fresh(photos), expected)
    small.load_state_dict(fresh.state_dict())


@pytest.mark.parametrize("method", TOKEN_METHODS)
def test_patch_is_reversible(small, photos, method: str) -> None:
    plain = small(photos)
    first = tokenpool.patch(small, method, KEEP)(photos)
    assert torch.equal(tokenpool.unpatch(small)(photos), plain)
    assert not tokenpool.is_patched(small)
    assert torch.equal(tokenpool.patch(small, method, KEEP)(photos), first)
    assert torch.equal(
        tokenpool.patch(small, "power_bert", KEEP)(photos), tokenpool.patch(small, "power_bert", KEEP)(photos)
    )


def test_unpatch_keeps_training(small, photos) -> None:
    tokenpool.patch(small, "wkmedoids", KEEP).train()
    small(photos).sum().backward()
    with torch.no_grad():
        for parameter in small.parameters():
            parameter -= 0.01 * parameter.grad
    state = copy.deepcopy(small.state_dict())
    tokenpool.unpatch(small)
    assert small.blocks[0].training
    assert all(torch.equal(value, state[key]) for key, value in small.state_dict().items())


def test_copies_are_whole(small, photos) -> None:
    expected = tokenpool.patch(small, "wkmedoids", KEEP)(photos)
    for copied in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        assert torch.equal(copied(photos), expected)
        tokenpool.unpatch(copied)
        assert torch.equal(small(photos), expected)


def test_a_downsampler_of_your_own(small, photos) -> None:
    class First(tokenpool.Downsampler):
        uses_scores = False

        def reduce(self, tokens, scores):
            kept = torch.arange(tokens.shape[1]).expand(len(tokens), -1)
            return tokenpool.Downsampled(tokens[:, : self.keep], kept.where(kept < self.keep, -1))

    tokenpool.patch(small, First, KEEP)
    assert [block.tokens for block in tokenpool.trace(small, photos).blocks] == KEEP


@pytest.mark.parametrize(
    "keep, message",
    [
        (None, "needs a schedule: give gmacs, or keep"),
        ([30, 20, 10], "keep has 3 entries, but the model has 4 blocks"),
        ([30, 20, -1, 3], r"keep\[2\] = -1 must not be negative"),
        ([30, 20.0, 10, 3], r"keep\[1\] = 20\.0 must be a whole number"),
        ([30, True, 10, 3], r"keep\[1\] = True"),
        ("30", "keep has 1 entries, but the model has 4 blocks"),
        (30, "must be a list of 4 whole numbers"),
        ({1, 2, 3, 4}, "must be a list of 4 whole numbers"),
        (np.array(3), "must be a list of 4 whole numbers"),
    ],
)
def test_bad_keep_is_named(small, keep, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tokenpool.patch(small, "wkmedoids", keep)
    assert not tokenpool.is_patched(small)


def test_keep_may_hold_numpy_integers(small) -> None:
    assert tokenpool.patch(small, "wkmedoids", np.array(KEEP)).blocks.setting.keep == tuple(KEEP)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"downsampler": "kmediods"}, "unknown downsampler 'kmediods'; known are none, convolution"),
        ({"downsampler": "none", "keep": KEEP}, "takes no keep"),
        ({"downsampler": "wkmedoids", "keep": KEEP, "start": 3}, "start"),
        ({"downsampler": "wkmedoids", "keep": KEEP, "init": "first"}, "init = 'first'"),
        ({"downsampler": "wkmedoids", "keep": KEEP, "iterations": 0}, "iterations = 0"),
        ({"downsampler": "convolution"}, r"at = \(\)"),
        ({"downsampler": "convolution", "at": 3}, "at = 3 must list"),
        ({"downsampler": "random", "keep": KEEP, "seed": "a"}, "seed = 'a' must be a whole number"),
        ({"downsampler": "none", "qk_norm": "l2", "alpha": "a"}, "alpha = 'a' must be a positive number"),
        ({"downsampler": "convolution", "at": [3, 1]}, "ascending order"),
        ({"downsampler": "convolution", "at": [0, 1, 2]}, "only 1 x 1 tokens are left"),
        ({"downsampler": "none", "qk_norm": "l1"}, "qk_norm = 'l1'"),
        ({"downsampler": "none", "alpha": 2.0}, 'need qk_norm="l2"'),
        ({"downsampler": "none", "qk_norm": "l2", "alpha": -1.0}, "alpha = -1.0 must be a positive number"),
        ({"downsampler": "key_medoids", "keep": KEEP, "by": "values"}, "by = 'values' must be one of 'keys', 'tokens'"),
        ({"downsampler": "key_medoids", "keep": KEEP, "iterations": 0}, "iterations = 0"),
        ({"downsampler": "power_bert", "keep": KEEP, "dense": True}, "'power_bert' does not"),
        ({"downsampler": "convolution", "at": [1], "dense": True}, "'convolution' does not"),
        ({"downsampler": "none", "dense": True}, "'none' does not"),
        ({"downsampler": "kmedoids", "gmacs": 1.0, "bogus": 3}, "downsampler 'kmedoids': .*bogus"),
        ({"downsampler": "kmediods", "gmacs": 1.0}, "unknown downsampler 'kmediods'"),
        ({"downsampler": "kmedoids", "keep": [9, 9, 9, 0], "dense": True}, r"keep\[3\] = 0 must be at least 1"),
    ],
)
def test_bad_settings_are_named(small, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tokenpool.patch(small, **arguments)


def test_bad_models_are_named(small, photos) -> None:
    with pytest.raises(ValueError, match="no model 'deit_smal_patch16_224'; close names: deit_small_patch16_224"):
        tokenpool.create_model("deit_smal_patch16_224")
    with pytest.raises(
        TypeError, match="ResNet cannot be pooled: it is hierarchical.*; supported are timm's VisionTransformer"
    ):
        tokenpool.create_model("resnet18", "wkmedoids", [1])
    with pytest.raises(TypeError, match="block 0 is a ParallelScalingBlock.*in parallel"):
        tokenpool.patch(
            timm.create_model(
                "vit_tiny_patch16_224", depth=1, block_fn=timm.models.vision_transformer.ParallelScalingBlock
            ),
            "wkmedoids",
            [1],
        )
    with pytest.raises(ValueError, match="takes these options.*widht"):
        tokenpool.create_model("deit_tiny_patch16_224", widht=3)
    siglip = timm.create_model("vit_base_patch16_siglip_224", depth=1)
    with pytest.raises(ValueError, match="reads the patch tokens"):
        tokenpool.patch(siglip, "wkmedoids", [0])
    with pytest.raises(ValueError, match="no downsamplers to trace"):
        tokenpool.trace(small, photos)
    tokenpool.patch(small, "wkmedoids", KEEP)
    for call in (
        lambda: small.prune_intermediate_layers(2),
        lambda: small.forward_intermediates(photos),
        lambda: small.get_intermediate_layers(photos),
        lambda: small(photos, attn_mask=torch.ones(37, 37)),
        lambda: small(photos, is_causal=True),
    ):
        with pytest.raises(TypeError, match="need a plain model: call tokenpool.unpatch first"):
            call()
    with pytest.raises(TypeError, match="features_only hands out the whole grid"):
        tokenpool.create_model("vit_tiny_patch16_224", "kmedoids", 0.9, features_only=True)
    with pytest.raises(ValueError, match="name = None must be"):
        tokenpool.create_model(None)


@torch.no_grad()
def test_a_share_follows_the_image_if_the_grid_is_dynamic(tmp_path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=64, dynamic_img_size=True).eval()
    images = torch.randn(2, 3, 96, 80)
    for keep, expected in ((0.5, [15, 8]), ("-4", [26, 22]), ([8, 4], [8, 4])):
        tokenpool.patch(model, "wkmedoids", keep)
        assert [block.tokens for block in tokenpool.trace(model, images).blocks] == expected
        tokenpool.save(model, tmp_path / "model")
        assert torch.equal(tokenpool.load(tmp_path / "model")(images), model(images))
    tokenpool.patch(model, "wkmedoids", 0.5)
    assert [layer.keep for layer in tokenpool.hosts.of(model).downsamplers] == [8, 4]  # at the model's own size


def test_another_keep_shares_all_but_the_number() -> None:
    layer = METHODS["kmedoids"](9)
    layer.register_forward_hook(lambda module, given, out: seen.append(out.tokens.shape[1]))
    seen, tokens, scores = [], torch.randn(2, 20, 4), torch.rand(2, 20)
    other = layer.with_keep(5)
    assert layer.with_keep(9) is layer and layer.keep == 9 and other.keep == 5
    expected = METHODS["kmedoids"](5)(tokens, scores)
    assert torch.equal(other(tokens, scores).tokens, expected.tokens) and seen == [5]


def test_gradient_checkpointing_gives_the_same_gradients(small, photos) -> None:
    tokenpool.patch(small, "wkmedoids", KEEP).train()
    found = []
    for enable in (False, True):
        small.set_grad_checkpointing(enable)
        small.zero_grad()
        small(photos).square().sum().backward()
        found.append([parameter.grad.clone() for parameter in small.parameters()])
    for plain, checkpointed in zip(*found, strict=True):
        torch.testing.assert_close(checkpointed, plain)


def test_intermediate_features_work_again_after_unpatch(small, photos) -> None:
    """With the last block alone, K tokens could be reshaped to a grid without an error."""
    expected = small.forward_intermediates(photos, indices=[3])[1][0]
    tokenpool.patch(small, "wkmedoids", [36, 36, 36, 9])
    with pytest.raises(TypeError, match="forward_intermediates was called; .* call tokenpool.unpatch first"):
        small.forward_intermediates(photos, indices=[3])
    torch.testing.assert_close(tokenpool.unpatch(small).forward_intermediates(photos, indices=[3])[1][0], expected)


def test_a_failed_download_names_the_model_and_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(OSError, match="weights of 'deit_tiny_patch16_224': .*--weights FILE"):
        tokenpool.create_model("deit_tiny_patch16_224", pretrained=True)
