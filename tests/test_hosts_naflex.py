"""The adapter of timm's NaFlexVit: padding, masks, shares of each image's own patches."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.data.naflex_dataset import NaFlexCollator
from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg, batch_patchify, create_attention_mask
from timm.models.vision_transformer import ParallelScalingBlock
from torch import Tensor

import tokenpool
from tokenpool import flops, hosts, micro_batch, schedules
from tokenpool.budget import ScheduleCost
from tokenpool.downsampling import METHODS, with_schedule
from tokenpool.hosts.masks import valid_tokens

GAP, MAP = "naflexvit_base_patch16_gap", "naflexvit_base_patch16_map"
# One of each kind of head, mask, prefix, block, position embedding and rotary embedding.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "gap": (GAP, {}),
    "gap aspect": ("naflexvit_base_patch16_par_gap", {}),
    "gap factorized": ("naflexvit_base_patch16_parfac_gap", {"use_key_only_attn_mask": True}),
    "gap prefix": (GAP, {"pool_include_prefix": True}),
    "avgmax": (GAP, {"global_pool": "avgmax"}),
    "max": (GAP, {"global_pool": "max", "use_key_only_attn_mask": True, "pool_include_prefix": True}),
    "map": (MAP, {"use_key_only_attn_mask": True}),
    "map prefix": (MAP, {"pool_include_prefix": True}),
    "siglip": ("naflexvit_base_patch16_siglip", {}),
    "radio": ("naflexvit_base_patch16_radio_v3", {}),
    "eva": (MAP, {"attn_type": "eva", "swiglu_mlp": True}),
    "grouped": (MAP, {"attn_type": "rope", "num_kv_heads": 1, "qkv_fused": False, "use_key_only_attn_mask": True}),
    "axial": (GAP, {"rope_type": "axial", "pos_embed": "none"}),
    "mixed": (GAP, {"rope_type": "mixed", "use_key_only_attn_mask": True}),
    "dinov3": (MAP, {"rope_type": "dinov3", "rope_rotate_half": True, "attn_gated": True}),
    "mrope": ("naflexvit_base_patch16_radio_v3", {"rope_type": "mrope", "rope_mrope_section": (2, 3, 3)}),
    "classic": ("vit_tiny_patch16_224", {"use_naflex": True, "img_size": 96}),
    "classic eva": ("eva02_tiny_patch14_224", {"use_naflex": True, "img_size": 96, "patch_size": 16}),
}
ALL_KINDS = pytest.mark.parametrize("kind", KINDS)
FEW_KINDS = pytest.mark.parametrize("kind", ["gap", "map prefix", "radio", "mixed", "classic eva"])
SIZES = [(6, 6), (3, 5), (2, 2), (5, 3), (8, 8), (1, 4)]  # rows and columns of patches; two have 15 patches


def create(kind: str, **options: Any) -> NaFlexVit:
    torch.manual_seed(0)
    name, own = KINDS[kind]
    small = {"embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 7}
    model = timm.create_model(name, **small | own | options, pretrained_cfg_overlay={"input_size": (3, 96, 96)})
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
        elif "gamma" in name:
            torch.nn.init.constant_(parameter, 0.5)  # LayerScale, which starts at 1e-5
    return model.eval()


def pictures(sizes: list[tuple[int, int]]) -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randn(3, 16 * rows, 16 * columns, generator=draw) for rows, columns in sizes]


def collated(images: list[Tensor], patches: int) -> dict[str, Any]:
    """The batch of timm's collator: patches, coordinates, and which of them are not padding."""
    samples = []
    for image in images:
        (found,), (rows, columns) = batch_patchify(image[None], (16, 16))
        places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
        valid = torch.ones(rows * columns, dtype=torch.bool)
        samples.append(({"patches": found, "patch_coord": places, "patch_valid": valid}, 0))
    return NaFlexCollator(patches)(samples)[0]


@torch.no_grad()
def one_by_one(model: NaFlexVit, images: list[Tensor]) -> Tensor:
    return torch.cat([model(image[None]) for image in images])


@ALL_KINDS
@torch.no_grad()
def test_keeping_all_changes_nothing_and_patching_again_is_exact(kind: str) -> None:
    model = create(kind)
    images = pictures(SIZES)
    batch, square = collated(images, 70), torch.stack(pictures([(6, 6)] * 2))
    plain, keys = model(batch), list(model.state_dict())
    plain_square = model(square)
    for method in ("kmedoids", "tome", "key_medoids"):
        tokenpool.patch(model, method, [64] * 3)
        torch.testing.assert_close(model(batch), plain, rtol=0, atol=1e-5)
        torch.testing.assert_close(model(square), plain_square, rtol=0, atol=1e-5)
        assert list(model.state_dict()) == keys
    pooled = tokenpool.patch(model, "wkmedoids", 0.7)(batch)
    assert not torch.allclose(pooled, plain, atol=1e-3)
    assert torch.equal(tokenpool.unpatch(model)(batch), plain)
    assert torch.equal(tokenpool.patch(model, "wkmedoids", 0.7)(batch), pooled)


@ALL_KINDS
@torch.no_grad()
def test_an_image_in_a_padded_batch_equals_the_image_alone(kind: str) -> None:
    model, images = create(kind), pictures(SIZES)
    for method, positions in (("wkmedoids", "mean"), ("tome", "medoid")):
        rotary = {"positions": positions} if hosts.of(model).is_rotary else {}
        tokenpool.patch(model, method, 0.7, **rotary)
        torch.testing.assert_close(model(collated(images, 70)), one_by_one(model, images), rtol=0, atol=1e-5)
        for image, (rows, columns) in zip(images, SIZES, strict=True):
            kept = [block.tokens for block in tokenpool.trace(model, image[None]).blocks]
            assert kept == schedules.by_rate(0.7, rows * columns, 3)
    tokenpool.patch(model, "kmedoids", [20, 9, 3])  # a list is the same for all images
    kept = [block.tokens for block in tokenpool.trace(model, images[1][None]).blocks]
    assert kept == [15, 9, 3]
    torch.testing.assert_close(model(collated(images, 64)), one_by_one(model, images), rtol=0, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 7), st.integers(1, 7)), min_size=1, max_size=5),
    padding=st.integers(0, 9),
    keep=st.sampled_from([0.5, 0.9, "-4", "0.6@1", [12, 8, 2], "deit_small:6"]),
    kind=st.sampled_from(["gap", "siglip", "mixed", "mrope"]),
)
def test_no_result_depends_on_the_batch(sizes: list, padding: int, keep: Any, kind: str) -> None:
    model, images = create(kind), pictures(sizes)
    tokenpool.patch(model, "key_medoids", keep)
    batch = collated(images, max(rows * columns for rows, columns in sizes) + padding)
    with torch.no_grad():
        torch.testing.assert_close(model(batch), one_by_one(model, images), rtol=0, atol=1e-5)


@ALL_KINDS
@torch.no_grad()
def test_duplicated_tokens_merge_without_a_trace(kind: str) -> None:
    """Each patch twice, at the same place: merged, with carried sizes, the logits stay as they are."""
    model = create(kind)
    for name in ("pos_embed", "pos_embed_x"):
        values = getattr(model.embeds, name)
        if values is not None:
            values.copy_(values[..., :1, :].expand_as(values))
    if model.rope is not None:
        own = model.rope.get_embed

        def doubled(*given: Any, **named: Any) -> Tensor:
            table = own(*given, **named)
            return table[..., ::2, :].repeat_interleave(2, dim=-2)

        model.rope.get_embed = doubled
    columns = torch.randn(2, 3, 6, 3, generator=torch.Generator().manual_seed(2))
    images = columns.repeat_interleave(2, dim=3).repeat_interleave(16, dim=2).repeat_interleave(16, dim=3)
    plain = model(images)
    batch = collated([*images, images[0, :, :48]], 50)
    padded = model(batch) if model.rope is None else None
    for method, keep in (("tome", [18, 18, 18]), ("tome", "0.5@1"), ("kmedoids", "-1")):
        if method == "kmedoids" and model.rope is not None:
            continue  # clusters without members have no position, and their tokens differ from their duplicates
        tokenpool.patch(model, method, keep)
        assert tokenpool.trace(model, images).blocks[-1].tokens < 36
        torch.testing.assert_close(model(images), plain, rtol=0, atol=2e-4)
        if padded is not None:
            torch.testing.assert_close(model(batch), padded, rtol=0, atol=2e-4)


@FEW_KINDS
@torch.no_grad()
def test_every_method_follows_every_form_of_schedule(kind: str) -> None:
    model = create(kind)
    images = pictures(SIZES)
    least = int(hosts.of(model).host().reads_patches)
    for index, method in enumerate(with_schedule()):
        if METHODS[method].uses_class_attention and not model.has_class_token:
            continue
        keep = (0.5, "-13", "0.6@0,2", "deit_small:7.0", [30, 2, 1])[index % 5]
        tokenpool.patch(model, method, keep)
        for image, (rows, columns) in zip(images, SIZES, strict=True):
            trace = tokenpool.trace(model, image[None])
            expected = schedules.tokens_kept(schedules.resolve(keep, rows * columns, 3, least), rows * columns)
            assert [block.tokens for block in trace.blocks] == expected
            assert trace.logits.isfinite().all() and trace.grid == (rows, columns)
        if METHODS[method].merges or not hosts.of(model).head_reads_patches:
            torch.testing.assert_close(model(collated(images, 70)), one_by_one(model, images), rtol=0, atol=1e-5)


@pytest.mark.parametrize("patches", [70, 36])  # with padding, and without
@pytest.mark.parametrize("method", ["wkmedoids", "power_bert"])
@torch.no_grad()
def test_features_fit_the_mask_of_patches(method: str, patches: int) -> None:
    """A head that reads the class token only: with `patch_valid`, each patch has its token or zero."""
    model, images = create("radio"), pictures([(6, 6), (6, 6) if patches == 36 else (3, 5)])
    tokenpool.patch(model, method, 0.7)
    batch = collated(images, patches)
    found = model.forward_features(batch["patches"], batch["patch_coord"], batch["patch_valid"])
    assert found["patches"].shape == (2, 8 + patches, 48) and found["patch_valid"] is batch["patch_valid"]
    for image, features in zip(images, found["patches"], strict=True):
        tokens = model.forward_features(image[None])
        assignment = tokenpool.trace(model, image[None]).blocks[-1].assignment
        torch.testing.assert_close(features[:8], tokens[0, :8], rtol=0, atol=1e-5)
        expected = tokenpool.unpool(tokens[:, 8:], assignment)[0]
        torch.testing.assert_close(features[8 : 8 + len(expected)], expected, rtol=0, atol=1e-5)
        assert (features[8 + len(expected) :] == 0).all()


def test_dropped_patches_do_not_fit_a_head_that_reads_them() -> None:
    model, images = create("siglip"), pictures([(6, 6), (6, 6)])
    tokenpool.patch(model, "power_bert", 0.7)
    assert model(torch.stack(images)).isfinite().all()
    with pytest.raises(ValueError, match="this method drops patches.*key_medoids, or give images"):
        model(collated(images, 36))


@pytest.mark.parametrize("prefix", [0, 2])
@torch.no_grad()
def test_padding_between_patches(prefix: int) -> None:
    """Patch dropout in training leaves patches and padding in any order. Each image keeps the order of its patches."""
    model = tokenpool.patch(create("map" if prefix == 0 else "mixed"), "wkmedoids", 0.7)
    block, frame = model.blocks, model.blocks[0].frame._replace(prefix=prefix)
    for each in block:
        each.frame = frame
    draw = torch.Generator().manual_seed(4)
    valid = torch.rand(4, 30, generator=draw) < torch.tensor([[0.5], [0.3], [0.9], [1.0]])
    tokens = torch.randn(4, prefix + 30, 48, generator=draw)
    table = torch.randn(4, 3, 30, 32, generator=draw) if prefix else None

    def run(tokens: Tensor, table: Tensor | None, mask: Tensor | None) -> Tensor:
        for each in block:
            rotary = {} if table is None else {"rope": table}
            tokens = each(tokens, attn_mask=mask, **rotary)
        return tokens

    found = run(tokens, table, create_attention_mask(valid, prefix))
    assert found.shape == tokens.shape and (found[:, prefix:][~valid] == 0).all()
    for image in range(4):
        own = valid[image]
        kept = torch.cat([tokens[image, :prefix], tokens[image, prefix:][own]])[None]
        rows = None if table is None else table[image, :, own][None]
        alone = run(kept, rows, None)[0]
        torch.testing.assert_close(found[image, :prefix], alone[:prefix], rtol=0, atol=1e-5)
        torch.testing.assert_close(found[image, prefix:][own], alone[prefix:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.bool])
def test_masks_of_padding_are_read(prefix: int, symmetric: bool, dtype: torch.dtype) -> None:
    valid = torch.tensor([[True] * 3 + [False] * 2, [True] * 5, [True, False, True, False, False]])
    numbers = torch.float32 if dtype == torch.bool else dtype
    mask = create_attention_mask(valid, prefix, symmetric, None if symmetric else 1, numbers)
    for same in (mask, mask.expand(-1, 3, -1, -1), mask[:1, 0] if symmetric else mask[:1]):
        found = valid_tokens(same == 0 if dtype == torch.bool else same)
        assert found[:, :prefix].all() and torch.equal(found[:, prefix:], valid[: len(found)])


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(9, 9).tril().bool(),  # causal
        torch.linspace(-1, 0, 81).view(9, 9),  # weights
        torch.zeros(2, 3, 9, 9).index_fill_(1, torch.tensor(1), -torch.inf),  # one head sees nothing
        torch.eye(9).bool().expand(2, 1, 9, 9),
        torch.tensor([0.0] * 8 + [-3.0]).view(1, 1, 1, 9),
        torch.full((1, 1, 1, 9), torch.nan),
    ],
)
def test_other_masks_are_refused(mask: Tensor) -> None:
    model = create("siglip")
    batch = collated(pictures([(3, 3), (3, 3)]), 9)
    tokenpool.patch(model, "kmedoids", 0.5)
    with pytest.raises(ValueError, match="attention masks of padding only.*call tokenpool.unpatch first"):
        model(batch | {"attn_mask": mask})
    with pytest.raises(ValueError, match="image 1 of the batch has no patch"):
        model(batch | {"patch_valid": batch["patch_valid"] & torch.tensor([[True], [False]])})


@pytest.mark.parametrize(
    "kind, method",
    [
        ("gap", "wkmedoids"),
        ("map prefix", "key_medoids"),
        ("radio", "tome"),
        ("mixed", "kmeans"),
        ("classic eva", "power_bert"),
    ],
)
def test_the_formula_of_the_cost_equals_the_count(kind: str, method: str) -> None:
    model = create(kind)
    cost = ScheduleCost(model, METHODS[method])
    plain = flops.count(model)
    assert plain.parts["patch_embedding"] > 0 and plain.parts["head"] > 0
    tokenpool.patch(model, method, 0.7)
    setting = hosts.of(model).setting
    assert setting.form == 0.7 and list(setting.keep) == schedules.by_rate(0.7, 36, 3)
    assert round(flops.count(model).gmacs * 1e9) == cost(setting.keep)
    larger = flops.count(model, (128, 128)).gmacs
    assert larger == flops.count(tokenpool.patch(model, method, schedules.by_rate(0.7, 64, 3)), (128, 128)).gmacs
    tokenpool.patch(model, method, gmacs=0.7 * plain.gmacs)
    assert hosts.of(model).setting.form is None and 0.68 < flops.count(model).gmacs / plain.gmacs <= 0.7


@pytest.mark.parametrize("kind", ["radio", "mixed"])
@pytest.mark.slow
@torch.no_grad()
def test_exported_and_compiled(kind: str) -> None:
    model = tokenpool.patch(create(kind), "tome", 0.7)
    images = torch.stack(pictures([(8, 5)] * 3))  # not the size that the model is built for
    batch = {"x": {0: torch.export.Dim("batch")}}
    exported = torch.export.export(model, (images[:2],), dynamic_shapes=batch).module()
    torch.testing.assert_close(exported(images), model(images), rtol=0, atol=1e-4)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images), model(images), rtol=0, atol=1e-4)
    with pytest.raises(Exception, match="a batch with padding cannot be compiled or exported"):
        torch.compile(model, backend="eager")(collated(list(images), 50))


@pytest.mark.parametrize("kind", ["gap factorized", "siglip", "radio", "classic"])
@torch.no_grad()
def test_saved_and_loaded(kind: str, tmp_path: Path) -> None:
    name, options = KINDS[kind]
    small = {"embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 7} | options
    model = tokenpool.create_model(name, "wkmedoids", 0.7, **small).eval()
    tokenpool.save(model, tmp_path / "model.safetensors")
    found = tokenpool.load(tmp_path / "model.safetensors")
    assert hosts.of(found).setting == hosts.of(model).setting and hosts.of(found).setting.form == 0.7
    for images in (torch.stack(pictures([(7, 3)])), collated(pictures(SIZES), 64)):
        assert torch.equal(found(images), model(images))


def test_another_rotary_table_is_not_saved(tmp_path: Path) -> None:
    """`load` would build the table of the default temperature, with other logits."""
    name, options = KINDS["axial"]
    model = timm.create_model(name, rope_temperature=50.0, embed_dim=48, depth=2, num_heads=3, **options)
    with pytest.raises(ValueError, match="timm builds a different model"):
        tokenpool.save(model, tmp_path / "model.safetensors")


@torch.no_grad()
def test_weights_of_a_vit_give_the_logits_of_the_vit(tmp_path: Path) -> None:
    options = {"embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 7, "img_size": 96}
    vit = timm.create_model("vit_tiny_patch16_224", **options).eval()
    safetensors.torch.save_file(vit.state_dict(), tmp_path / "vit.safetensors")
    model = create("classic")
    with pytest.warns(UserWarning, match="converted the names as timm does"):
        tokenpool.load_weights(model, tmp_path / "vit.safetensors")
    images = pictures([(6, 6)] * 2)
    for method, keep in (("wkmedoids", 0.7), ("power_bert", "deit_small:5"), ("tome", [20, 9, 0])):
        expected = tokenpool.patch(vit, method, keep)(torch.stack(images))
        tokenpool.patch(model, method, keep)
        torch.testing.assert_close(model(torch.stack(images)), expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(model(collated(images, 41)), expected, rtol=0, atol=1e-5)


@FEW_KINDS
def test_every_parameter_gets_a_gradient(kind: str) -> None:
    for options in ({}, {"patch_drop_rate": 0.3}):
        model = tokenpool.patch(create(kind, **options), "wkmedoids", 0.7).train()
        for images in (collated(pictures(SIZES), 70), torch.stack(pictures([(6, 6)] * 2))):
            model.zero_grad()
            model(images).square().sum().backward()
            for name, parameter in model.named_parameters():
                assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


@torch.no_grad()
def test_a_full_mask_and_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    images = pictures([(6, 6)] * 5)
    for kind in ("mixed", "radio"):
        model = tokenpool.patch(create(kind), "wkmedoids", 0.7)
        expected, batch = model(torch.stack(images)), collated(images, 36)
        with monkeypatch.context() as patched:
            patched.setattr(micro_batch, "BLOCK_FLOATS", 2 * 48 * 50)
            torch.testing.assert_close(model(batch), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["gap", "classic eva", "mixed"])
@torch.no_grad()
def test_signals_are_those_of_the_attention(kind: str) -> None:
    model, signals = create(kind), {}
    block = model.blocks[1]
    hosts.of(model).watch_attention(block, lambda name, value: signals.update({name: value}))
    model(torch.stack(pictures([(5, 4)] * 2)))
    v = signals["values"].unflatten(2, (3, -1)).transpose(1, 2)
    attend = partial(torch.nn.functional.scaled_dot_product_attention, signals["queries"], signals["keys"])
    torch.testing.assert_close(signals["filtered"], attend(v).transpose(1, 2).flatten(2), rtol=1e-4, atol=1e-4)


def test_refusals_name_the_way_out() -> None:
    model = create("gap")
    with pytest.raises(ValueError, match="Convolution needs a fixed grid"):
        tokenpool.patch(model, "convolution", at=[1])
    tokenpool.patch(model, "tome", 0.5)
    with pytest.raises(ValueError, match="trace needs images"):
        tokenpool.trace(model, collated(pictures(SIZES), 64))
    tokenpool.patch(model, "kmedoids", 0.5)
    assert hosts.TimmNaFlex(NaFlexVit(NaFlexVitCfg(embed_dim=48, num_heads=3, depth=1))).image_shape == (3, 256, 256)
    parallel = NaFlexVit(NaFlexVitCfg(embed_dim=48, num_heads=3, depth=2, block_fn=ParallelScalingBlock))
    with pytest.raises(TypeError, match="block 0 is a ParallelScalingBlock.*in parallel"):
        tokenpool.patch(parallel, "kmedoids", 0.5)
