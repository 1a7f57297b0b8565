"""The adapter of timm's Eva models, held against timm: small models of each kind of block and table."""

import copy
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import timm
import torch
from timm.models.eva import Eva, EvaBlock
from torch import Tensor

import tokenpool
from tokenpool import flops, hosts
from tokenpool.analysis import redundancy
from tokenpool.budget import ScheduleCost
from tokenpool.downsampling import METHODS, REGISTRY, with_schedule

SMALL = {"embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 7}
MROPE = {"rope_type": "mrope", "rope_grid_indexing": "ij", "rope_mrope_section": (2, 3, 3)}
# Each kind of attention, projection, MLP, normalisation, prefix, pooling and rotary table.
FAMILIES = {
    "eva02_tiny_patch14_224": {"img_size": 84},  # fused projections with biases outside, GluMlp
    "eva02_base_patch14_224": {"img_size": 84},  # three projections, SwiGLU with a norm
    "eva_giant_patch14_224": {"img_size": 84},  # no rotary positions
    "eva02_base_patch16_clip_224": {"img_size": 96},  # a norm inside the attention
    "eva02_enormous_patch14_clip_224": {"img_size": 84},  # norms after attention and MLP, no rotary positions
    "eva02_enormous_patch14_clip_224 rope": {"img_size": 84, "use_rot_pos_emb": True, "swiglu_mlp": True},
    "vit_small_patch16_dinov3": {"img_size": 96},
    "vit_small_patch16_dinov3_qkvb token": {"img_size": 96, "global_pool": "token"},
    "vit_small_plus_patch16_dinov3": {"img_size": 96},  # SwiGLU, aligned
    "vit_small_patch16_rope_224": {"img_size": 96},
    "vit_small_patch16_rope_mixed_ape_224": {"img_size": 96},
    "vit_small_patch16_rope_mixed_224 token": {"img_size": 96, "global_pool": "token", "class_token": True},
    "vit_medium_patch16_rope_reg1_gap_256": {"img_size": 96},  # a register, no class token
    "vit_small_patch16_rope_224 mrope": {"img_size": 96, "qk_norm": True, **MROPE},
    "vit_pe_core_tiny_patch16_384": {"img_size": 96},  # attention pooling
    "vit_pe_lang_large_patch14_448": {"img_size": 84},
    "vit_pe_spatial_tiny_patch16_512": {"img_size": 96},
    "vit_base_patch16_sapiens2": {
        "img_size": 96,
        "num_heads": 4,
        "num_kv_heads": (4, 2, 1),
    },  # grouped queries, one gamma
    "vit_small_patch16_lingbot": {"img_size": 96},
    "vit_small_patch16_dinov3 gated": {"img_size": 96},
    "eva02_tiny_patch14_224 separate": {"img_size": 84},  # biases added after the projection
}
PATCHES = 36
ALL_FAMILIES = pytest.mark.parametrize("family", FAMILIES)
TABLES = [  # one of each kind of table: cat, dinov3, mixed, mrope
    "eva02_tiny_patch14_224",
    "vit_small_patch16_dinov3",
    "vit_small_patch16_rope_mixed_ape_224",
    "vit_small_patch16_rope_224 mrope",
]
SCHEDULED = with_schedule()
KEEP = [20, 9, 3]


def slow_but(families: Iterable[str], *fast: str) -> list:
    return [pytest.param(name, marks=() if name in fast else pytest.mark.slow) for name in families]


def create(family: str, **options) -> Eva:
    torch.manual_seed(0)
    name, *tag = family.split()
    model = timm.create_model(name, **SMALL | FAMILIES[family] | options)
    if tag == ["gated"]:
        for index in range(3):
            model.blocks[index] = EvaBlock(
                48, 3, init_values=0.5, gated_attn=True, num_prefix_tokens=5, qkv_fused=False
            )
    for block in model.blocks:
        block.attn.qkv_bias_separate = tag == ["separate"]
    for parameter_name, parameter in model.named_parameters():
        if parameter.dim() > 1 and "freqs" not in parameter_name:
            torch.nn.init.normal_(parameter, std=0.15)
        elif "gamma" in parameter_name:
            torch.nn.init.constant_(parameter, 0.5)  # starts at 1e-5
        elif parameter_name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)  # starts at zero
    return model.eval()


def pictures(model: Eva, count: int = 2) -> Tensor:
    return torch.randn(count, 3, *model.patch_embed.img_size, generator=torch.Generator().manual_seed(1))


def usable_methods(model: Eva) -> list[str]:
    """All methods with a schedule, without the ones that need a class token if the model has none."""
    return [name for name in SCHEDULED if model.cls_token is not None or not METHODS[name].uses_class_attention]


def tables(model: Eva, images: Tensor) -> list[Tensor]:
    """The rotary table of each block of a patched model, in one forward pass."""
    found: list[Tensor] = []
    handles = [
        block.attn.register_forward_pre_hook(lambda module, inputs: found.append(inputs[1].table))
        for block in model.blocks
    ]
    model(images)
    for handle in handles:
        handle.remove()
    return found


def change_table(model: Eva, change: Callable[[Tensor], Tensor]) -> None:
    """Let the model use another rotary table."""
    get_embed = model.rope.get_embed
    model.rope.get_embed = lambda *given, **named: change(get_embed(*given, **named))


def mean_rows(table: Tensor, assignment: Tensor, k: int) -> Tensor:
    """The rotary table of k tokens, by a loop. The row of a token without patches is zero."""
    batch = len(assignment)
    table = table.expand(batch, -1, -1, -1)
    found = table.new_zeros(batch, table.shape[1], k, table.shape[3])
    for image in range(batch):
        for token in assignment[image].unique().tolist():
            if token >= 0:
                found[image, :, token] = table[image][:, assignment[image] == token].mean(dim=1)
    return found


# Logits


@ALL_FAMILIES
@torch.no_grad()
def test_keeping_all_changes_nothing_and_patching_again_is_exact(family: str) -> None:
    model = create(family)
    images = pictures(model)
    plain, keys = model(images), list(model.state_dict())
    positions = ["mean", "medoid"] if hosts.of(model).is_rotary else ["mean"]
    for method in ("power_bert", "wkmedoids", "key_medoids", "tome"):
        for position in positions:
            tokenpool.patch(model, method, [PATCHES] * 3, positions=position)
            assert torch.allclose(model(images), plain, atol=1e-5)
            assert list(model.state_dict()) == keys
    tokenpool.patch(model, "power_bert", [PATCHES - 1] * 3)  # with scores: another implementation of attention
    nearly = model(images)
    for block in model.blocks:
        block.downsampler.keep, block.downsampler.acts_on = PATCHES, lambda n: True
        block.downsampler.reduce = lambda tokens, scores: (tokens, torch.arange(PATCHES).expand(len(tokens), -1))
    assert torch.allclose(model(images), plain, atol=1e-4) and not torch.allclose(nearly, plain, atol=1e-4)

    pooled = tokenpool.patch(model, "wkmedoids", KEEP)(images)
    assert pooled.shape != plain.shape or not torch.allclose(pooled, plain, atol=1e-3)
    assert torch.equal(tokenpool.unpatch(model)(images), plain)
    assert torch.equal(tokenpool.patch(model, "wkmedoids", KEEP)(images), pooled)


@ALL_FAMILIES
@torch.no_grad()
def test_duplicated_tokens_merge_without_a_trace(family: str) -> None:
    """Each patch twice, side by side and in the same place: merged, with carried sizes, the logits stay."""
    model = create(family)
    if model.pos_embed is not None:
        patches = model.pos_embed[:, -PATCHES:]
        patches.copy_(patches[:, :1].expand_as(patches))
    if model.rope is not None:
        change_table(model, lambda table: table.index_select(-2, torch.arange(PATCHES) // 2 * 2))
    size = model.patch_embed.patch_size[0]
    rows = torch.randn(2, 3, 6, 3, generator=torch.Generator().manual_seed(2))
    images = rows.repeat_interleave(2, dim=3).repeat_interleave(size, dim=2).repeat_interleave(size, dim=3)
    plain = model(images)
    dense = model.global_pool == ""  # then the logits are those of each patch
    for positions in ("mean", "medoid") if model.rope is not None else ("mean",):
        for method, keep in (("tome", [18, 18, 18]), ("key_medoids", "-1"), ("kmedoids", [35, 35, 35])):
            tokenpool.patch(model, method, keep, dense=dense, positions=positions)
            assert tokenpool.trace(model, images).blocks[-1].tokens < PATCHES
            assert torch.allclose(model(images), plain, atol=2e-4)
    tokenpool.patch(model, "tome", [18, 18, 18], dense=dense, carry=False)
    assert not torch.allclose(model(images), plain, atol=2e-4)


@ALL_FAMILIES
@torch.no_grad()
def test_every_method_follows_its_schedule_and_images_do_not_meet(family: str) -> None:
    model = create(family)
    images = pictures(model, 3)
    forms = ([35, 30, 2], [5, 20, 5], 0.5, "-13", [1, 1, 1])
    expected = ([35, 30, 2], [5, 5, 5], [18, 9, 4], [23, 10, 1], [1, 1, 1])
    for index, method in enumerate(usable_methods(model)):
        keep, tokens = forms[index % len(forms)], expected[index % len(forms)]
        positions = ("mean", "medoid")[index % 2] if model.rope is not None else "mean"
        trace = tokenpool.trace(tokenpool.patch(model, method, keep, positions=positions), images)
        assert trace.logits.isfinite().all() and trace.grid == (6, 6)
        assert [block.tokens for block in trace.blocks] == tokens
        assert torch.allclose(model(images[1:2])[0], trace.logits[1], atol=1e-5)


@pytest.mark.parametrize("family", TABLES)
@torch.no_grad()
def test_no_patch_may_remain_if_the_class_token_is_read(family: str) -> None:
    model = create(family, global_pool="token", class_token=True)
    for method in ("wkmedoids", "power_bert"):
        for positions in ("mean", "medoid"):
            assert tokenpool.patch(model, method, [9, 0, 0], positions=positions)(pictures(model)).isfinite().all()


@pytest.mark.parametrize("family", ["vit_small_patch16_dinov3", "vit_small_patch16_rope_mixed_ape_224", *TABLES[::3]])
@torch.no_grad()
def test_images_of_another_size_and_shape(family: str) -> None:
    """The logits of a model that is built for the size."""
    model = create(family, dynamic_img_size=True)
    images = torch.randn(2, 3, *(model.patch_embed.patch_size[0] * n for n in (4, 7)))
    plain = model(images)
    tokenpool.patch(model, "wkmedoids", [28, 28, 28])
    assert torch.allclose(model(images), plain, atol=1e-5)
    pooled = tokenpool.patch(model, "wkmedoids", KEEP)(images)
    if model.pos_embed is None:
        built = create(family, img_size=images.shape[-2:])
        built.load_state_dict(model.state_dict())
        assert torch.allclose(tokenpool.patch(built, "wkmedoids", KEEP)(images), pooled, atol=1e-5)
    assert tokenpool.trace(model, images).grid == (4, 7)


# The rotary table


@pytest.mark.parametrize("family", [*TABLES, "vit_medium_patch16_rope_reg1_gap_256"])
@torch.no_grad()
def test_a_token_has_the_mean_row_of_its_patches(family: str) -> None:
    """In each block, for each method. A token that stands for one patch has exactly the row of the patch."""
    model = create(family)
    images = pictures(model)
    full = tables(tokenpool.patch(model, "none", qk_norm="l2"), images)
    for method in usable_methods(model):
        tokenpool.patch(model, method, KEEP)
        found, trace = tables(model, images), tokenpool.trace(model, images)
        assert torch.equal(found[0], full[0])
        for index in (1, 2):
            before = trace.blocks[index - 1]
            expected = mean_rows(full[index], before.assignment, before.tokens)
            assert torch.allclose(found[index], expected, atol=1e-6)
            if REGISTRY[method].kind == "selection":
                assert torch.equal(found[index], expected)


@pytest.mark.parametrize("family", TABLES)
@torch.no_grad()
def test_a_token_has_the_row_of_its_medoid(family: str) -> None:
    """By a loop over blocks, images and tokens, from the tokens that the downsamplers get and return."""
    model = create(family)
    images = pictures(model)
    full = tables(tokenpool.patch(model, "none", qk_norm="l2"), images)
    for method in ("kmeans", "tome", "key_medoids", "importance"):
        tokenpool.patch(model, method, KEEP, positions="medoid")
        found, seen = tables(model, images), []
        handles = tokenpool.tracing.watch(model, lambda *given, seen=seen: seen.append(given))
        model(images)
        for handle in handles:
            handle.remove()
        for image in range(2):
            places = list(range(PATCHES))
            for index, before, after in seen[:2]:
                tokens, kept, assignment = before[image], after.tokens[image], after.assignment[image]
                chosen = []
                for token in range(len(kept)):
                    members = (assignment == token).nonzero().flatten().tolist()
                    distance = [float((tokens[member] - kept[token]).square().sum()) for member in members]
                    steps = [round(1000 * each / max(*distance, 1e-30)) for each in distance]  # see `representatives`
                    chosen.append(places[members[steps.index(min(steps))]] if members else places[0])
                places = chosen
                table = full[index + 1]
                assert torch.equal(found[index + 1][image], table[0][:, places])


@torch.no_grad()
def test_tables_of_each_image_in_micro_batches(monkeypatch) -> None:
    for family in TABLES:
        model = create(family)
        images = pictures(model, 5)
        for differs in (False, True):
            if differs:  # each image has its own table: that of the grid, rolled by some patches
                axis = 1 if model.rope_mixed else 0
                heads = (lambda table: table) if model.rope_mixed else (lambda table: table[None])
                change_table(
                    model,
                    lambda table, axis=axis, heads=heads: torch.stack(
                        [heads(table).roll(image, dims=-2) for image in range(5)], axis
                    ),
                )
            plain = model(images)
            for positions in ("mean", "medoid"):
                monkeypatch.undo()
                tokenpool.patch(model, "wkmedoids", KEEP, positions=positions)
                expected = model(images)
                for at_once in (1, 48 * 41, 2 * 48 * 41):
                    monkeypatch.setattr(tokenpool.micro_batch, "BLOCK_FLOATS", at_once)
                    assert torch.allclose(model(images), expected, atol=1e-5)
                    tokenpool.patch(model, "wkmedoids", [PATCHES] * 3, positions=positions)
                    assert torch.allclose(model(images), plain, atol=1e-5)
                    tokenpool.patch(model, "wkmedoids", KEEP, positions=positions)
            tokenpool.unpatch(model)


# Training


@pytest.mark.parametrize(
    "family, positions", [*((family, "mean") for family in FAMILIES), *((family, "medoid") for family in TABLES)]
)
def test_every_parameter_gets_a_gradient(family: str, positions: str) -> None:
    model = create(family).train()
    model(pictures(model)).square().sum().backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    model.zero_grad()
    tokenpool.patch(model, "wkmedoids", KEEP, positions=positions)
    model(pictures(model)).square().sum().backward()
    for name, parameter in model.named_parameters():
        if name not in without:
            assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name
    assert len(without) <= ("map" in model.global_pool)


@pytest.mark.parametrize("family", TABLES)
def test_patch_dropout(family: str) -> None:
    """Then each image has its own table."""
    model = create(family, patch_drop_rate=0.5).train()
    images = pictures(model, 3)
    torch.manual_seed(0)
    plain = model(images)
    tokenpool.patch(model, "wkmedoids", [18, 18, 18])
    torch.manual_seed(0)
    assert torch.allclose(model(images), plain, atol=1e-5)
    for positions in ("mean", "medoid"):
        tokenpool.patch(model, "wkmedoids", [9, 5, 2], positions=positions)
        torch.manual_seed(0)
        found = tables(model, images)
        assert [table.shape[2] for table in found] == [18, 9, 5] and {len(table) for table in found} == {3}
        assert not torch.equal(found[0][0], found[0][1])
        torch.manual_seed(0)
        trace = tokenpool.trace(model, images)
        if positions == "mean" and not model.rope_mixed:
            assert torch.allclose(found[2], mean_rows(found[0], trace.blocks[1].assignment, 5), atol=1e-6)
        model.zero_grad()
        model(images).sum().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("family", TABLES)
def test_gradient_checkpointing(family: str) -> None:
    model = create(family, proj_drop_rate=0.1, drop_path_rate=0.2).train()
    images = pictures(model)
    tokenpool.patch(model, "wkmedoids", KEEP)
    found = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(5)
        model(images).square().sum().backward()
        found.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, gradient in found[0].items():
        assert torch.allclose(found[1][name], gradient, atol=1e-5), name


# Refusals


@pytest.mark.parametrize("family", ["vit_small_patch16_dinov3", "vit_small_patch16_rope_mixed_ape_224"])
@torch.no_grad()
def test_intermediate_features_and_masks_are_refused(family: str) -> None:
    prefix = {} if "dinov3" in family else {"class_token": False, "global_pool": "avg"}
    model = tokenpool.patch(create(family, **prefix), "wkmedoids", KEEP)
    images = pictures(model)
    plain = "need a plain model: call tokenpool.unpatch first$"
    for call in (
        lambda: model.forward_intermediates(images),
        lambda: torch.mean(model.blocks[1](model.blocks[0](torch.zeros(1, 41, 48)))),
        lambda: model.prune_intermediate_layers(1),
        lambda: model(images, attn_mask=torch.ones(41, 41)),
        lambda: model(images, is_causal=True),
        lambda: model.blocks[1](torch.zeros(1, 41, 48)),
        lambda: model.blocks[:2],
    ):
        with pytest.raises((TypeError, AttributeError), match=plain) as refusal:
            call()
        assert "\n" not in str(refusal.value)
    getter = timm.create_model(family.split()[0], features_only=True, **SMALL | {"img_size": 96, "num_classes": 0})
    with pytest.raises(TypeError, match="features_only hands out the whole grid"):
        tokenpool.patch(getter, "wkmedoids", KEEP)


def test_positions_of_other_models_are_refused(small) -> None:
    with pytest.raises(ValueError, match="positions = 'medoid' must be 'mean': the model has no rotary positions"):
        tokenpool.patch(small, "kmedoids", 0.9, positions="medoid")
    with pytest.raises(ValueError, match="positions = 'middle' must be 'mean' or 'medoid'"):
        tokenpool.patch(create("vit_small_patch16_dinov3"), "kmedoids", 0.9, positions="middle")


def test_another_attention_is_refused() -> None:
    class Attention(timm.layers.AttentionRope):
        pass

    model = create("vit_small_patch16_dinov3")
    model.blocks[2].attn = Attention(48, 3)
    with pytest.raises(
        TypeError, match="block 2 is a Attention, which cannot be pooled: .*timm's Eva models"
    ) as refusal:
        tokenpool.patch(model, "kmedoids", 0.9)
    assert "\n" not in str(refusal.value)


# Traces, signals, files, graphs


@ALL_FAMILIES
@torch.no_grad()
def test_adapters_agree_with_a_forward_pass(family: str) -> None:
    model = create(family)
    images, adapter = pictures(model), hosts.of(model)
    seen = []
    handle = model.blocks[-1].register_forward_hook(lambda module, given, out: seen.append(out.shape))
    plain = model(images)
    handle.remove()
    assert seen == [(2, adapter.prefix + PATCHES, adapter.width)]
    assert adapter.grid() == adapter.grid(images.shape[-2:]) == (6, 6)
    assert images.shape[1:] == adapter.image_shape and adapter.depth == 3

    def change_patches(module: torch.nn.Module, given: tuple, out: Tensor) -> Tensor:
        return torch.cat([out[:, : adapter.prefix], out[:, adapter.prefix :].flip(-1) + 1], dim=1)

    model.blocks[-1].register_forward_hook(change_patches)
    if model.global_pool:
        assert torch.equal(model(images), plain) != adapter.head_reads_patches


@ALL_FAMILIES
@torch.no_grad()
def test_dense_features_are_the_tokens_put_back(family: str) -> None:
    model = create(family)
    images, prefix = pictures(model), hosts.of(model).prefix
    found = []
    tokenpool.patch(model, "wkmedoids", KEEP)
    model.blocks[2].register_forward_hook(lambda module, given, out: None)
    feed_forward = model.blocks[2].feed_forward
    model.blocks[2].feed_forward = lambda tokens: found.append(tokens + feed_forward(tokens)) or feed_forward(tokens)
    assignment = tokenpool.trace(model, images).blocks[-1].assignment
    model.blocks[2]._forward_hooks.clear()
    dense = tokenpool.patch(model, "wkmedoids", KEEP, dense=True).forward_features(images)
    (tokens,) = found
    assert dense.shape == (2, prefix + PATCHES, 48)
    expected = torch.cat([tokens[:, :prefix], tokenpool.unpool(tokens[:, prefix:], assignment)], dim=1)
    assert torch.allclose(dense, model.norm(expected), atol=1e-5)


@ALL_FAMILIES
@torch.no_grad()
def test_signals_are_those_of_the_attention(family: str) -> None:
    """The output of the attention follows from the recorded queries, keys and values, prefix included."""
    model = create(family)
    images, block, signals = pictures(model), model.blocks[1], {}
    plain = model(images)
    handles = hosts.of(model).watch_attention(block, lambda name, value: signals.update({name: value}))
    handles.append(block.attn.register_forward_hook(lambda module, given, out: signals.update({"given": given[0]})))
    assert torch.equal(model(images), plain)
    for handle in handles:
        handle.remove()
    q, k = signals["queries"], signals["keys"]
    v = signals["values"].unflatten(2, (block.attn.num_heads, -1)).transpose(1, 2)
    filtered = ((q @ k.mT * block.attn.head_dim**-0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
    filtered = block.attn.norm(filtered)
    if block.attn.gate is not None:
        filtered = filtered * block.attn.gate(signals["given"]).sigmoid()
    torch.testing.assert_close(signals["filtered"], filtered, rtol=1e-4, atol=1e-4)
    added = block.attn.proj(filtered)
    added = block.norm1(added) if "enormous" in family else added
    added = added if getattr(block, "gamma_1", None) is None else block.gamma_1 * added
    torch.testing.assert_close(signals["after"] - signals["before"], added, rtol=1e-4, atol=1e-4)
    found = redundancy.signals(model, images)[1]
    assert torch.equal(found.keys, k[:, :, -PATCHES:]) and torch.equal(found.before, signals["before"][:, -PATCHES:])


SAVED = [name for name in FAMILIES if len(name.split()) == 1]  # others are not what timm builds by their name


@pytest.mark.parametrize("family", SAVED)
@torch.no_grad()
def test_saved_models_come_back(family: str, tmp_path: Path) -> None:
    model = create(family)
    images = pictures(model)
    positions = "medoid" if hosts.of(model).is_rotary else "mean"
    expected = tokenpool.patch(model, "wkmedoids", KEEP, positions=positions)(images)
    tokenpool.save(model, tmp_path / "model.safetensors")
    loaded = tokenpool.load(tmp_path / "model.safetensors")
    assert hosts.of(loaded).setting == hosts.of(model).setting
    assert torch.equal(loaded(images), expected)
    state = tokenpool.unpatch(model).state_dict()
    torch.save(state, tmp_path / "weights.pth")
    fresh = tokenpool.patch(create(family), "wkmedoids", KEEP, positions=positions)
    for parameter in fresh.parameters():
        parameter.zero_()
    tokenpool.load_weights(fresh, tmp_path / "weights.pth")
    assert torch.equal(fresh(images), expected)


@pytest.mark.parametrize(
    "family, options",
    [
        ("vit_small_patch16_dinov3", {"rope_temperature": 50.0}),
        ("vit_small_patch16_dinov3", {"rope_rotate_half": False}),
        ("vit_small_patch16_dinov3", {"rope_type": "cat"}),
        ("eva02_tiny_patch14_224", {"ref_feat_shape": (3, 3)}),
        ("eva02_tiny_patch14_224", {"rope_grid_offset": 1.0}),
        ("vit_pe_core_tiny_patch16_384", {"rope_grid_indexing": "ij"}),
        ("vit_small_patch16_rope_224", {"qk_norm": True}),
    ],
)
@torch.no_grad()
def test_models_with_other_positions_than_the_names_are_not_saved(family: str, options: dict, tmp_path: Path) -> None:
    model = create(family, **options)
    with pytest.raises(ValueError, match="timm builds a different model"):
        tokenpool.save(tokenpool.patch(model, "wkmedoids", KEEP), tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


@torch.no_grad()
def test_weights_of_another_size_are_resampled(tmp_path: Path) -> None:
    larger, model = create("eva02_tiny_patch14_224", img_size=112), create("eva02_tiny_patch14_224")
    torch.save(larger.state_dict(), tmp_path / "weights.pth")
    with pytest.warns(UserWarning, match=r"resampled pos_embed from \(1, 65, 48\) to \(1, 37, 48\)"):
        tokenpool.load_weights(tokenpool.patch(model, "wkmedoids", KEEP), tmp_path / "weights.pth")
    assert torch.equal(model.blocks[1].attn.q_bias, larger.blocks[1].attn.q_bias)


GRAPHS = pytest.mark.parametrize(
    "family, positions", [*((family, "mean") for family in TABLES), *((family, "medoid") for family in TABLES[1:3])]
)


@pytest.mark.slow
@GRAPHS
@torch.no_grad()
def test_compiled_model_equals_eager(family: str, positions: str) -> None:
    model = tokenpool.patch(create(family), "wkmedoids", KEEP, positions=positions)
    images = pictures(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images), model(images), rtol=0, atol=1e-4)


@pytest.mark.slow
@GRAPHS
@torch.no_grad()
def test_exported_with_any_batch(family: str, positions: str) -> None:
    model = tokenpool.patch(create(family), "wkmedoids", KEEP, positions=positions)
    images = pictures(model, 4)
    exported = torch.export.export(model, (images[:2],), dynamic_shapes={"x": {0: torch.export.Dim("batch")}}).module()
    for some in (images, images[:1]):
        torch.testing.assert_close(exported(some), model(some), rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family, positions", [("vit_small_patch16_rope_mixed_ape_224", "medoid")])
@torch.no_grad()
def test_onnx(family: str, positions: str, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    model = tokenpool.patch(create(family), "kmedoids", KEEP, positions=positions)
    images = pictures(model, 3)
    batch = {"x": {0: torch.export.Dim("batch")}}
    torch.onnx.export(model, (images[:2],), tmp_path / "m.onnx", dynamo=True, dynamic_shapes=batch, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: images.numpy()})[0])
    torch.testing.assert_close(found, model(images), rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("family", TABLES)
@torch.no_grad()
def test_half_and_double_models_and_autocast(family: str, dtype: torch.dtype) -> None:
    model = create(family)
    images = pictures(model)
    for positions in ("mean", "medoid"):
        tokenpool.patch(model, "wkmedoids", KEEP, positions=positions)
        expected = model(images)
        if dtype == torch.bfloat16:
            with torch.autocast("cpu", dtype=dtype):
                assert model(images).isfinite().all()
        found = copy.deepcopy(model).to(dtype)(images.to(dtype))
        assert found.dtype == dtype and found.isfinite().all()
        if dtype == torch.float64:
            assert torch.allclose(found.float(), expected, atol=1e-4)


# Costs


def closed_form(kept: list[int], clusters: bool, merges_rows: bool = True, n: int = 196) -> float:
    """GMACs of DINOv3 ViT-S/16 by hand: 12 blocks, width 384, six heads, a class token and four registers, no head.

    The rows of the rotary table have 2 * 64 floats. They are merged in each block with fewer tokens than patches.
    """
    macs, patches = n * 768 * 384, n
    for limit in kept:
        macs += patches * 2 * 64 if merges_rows and n < patches else 0
        macs += (n + 5) * 4 * 384**2 + 2 * (n + 5) ** 2 * 384
        macs += n * n * 384 if clusters and limit < n else 0
        n = min(n, limit)
        macs += (n + 5) * 8 * 384**2
    return macs / 1e9


@pytest.mark.parametrize(
    "method, positions",
    [
        ("none", "mean"),
        pytest.param("kmedoids", "mean", marks=pytest.mark.slow),
        pytest.param("power_bert", "mean", marks=pytest.mark.slow),
        pytest.param("power_bert", "medoid", marks=pytest.mark.slow),
        pytest.param("kmedoids", "medoid", marks=pytest.mark.slow),
    ],
)
def test_costs_of_dinov3(method: str, positions: str) -> None:
    model = timm.create_model("vit_small_patch16_dinov3", img_size=224)
    if method == "none":
        assert flops.count(model).gmacs == pytest.approx(closed_form([196] * 12, clusters=False), rel=1e-12)
        return
    keep = [196, 180, 150, 150, 100, 77, 77, 50, 20, 9, 4, 2]
    expected = closed_form(keep, method == "kmedoids", positions == "mean")
    assert ScheduleCost(model, METHODS[method], positions=positions)(keep) / 1e9 == pytest.approx(expected, rel=1e-12)
    count = flops.count(tokenpool.patch(model, method, keep, positions=positions))
    assert count.gmacs == pytest.approx(expected, rel=1e-12)
    assert count.backbone_gmacs == pytest.approx(closed_form(keep, False, False), rel=1e-12)


@pytest.mark.parametrize("family", slow_but(FAMILIES, *TABLES[1:3]))
def test_costs_of_schedules_are_those_of_the_model(family: str) -> None:
    model = create(family)
    plain = flops.count(model)
    assert set(plain.parts) == set(flops.PARTS) and plain.parts["clustering"] == 0
    assert all(plain.parts[part] > 0 for part in flops.PARTS if part != "clustering")
    method = ("kmedoids", "tome", "wkmeans", "importance")[list(FAMILIES).index(family) % 4]
    positions = ("mean", "medoid")[list(FAMILIES).index(family) % 2] if model.rope is not None else "mean"
    cost = ScheduleCost(model, METHODS[method], positions=positions)
    tokenpool.patch(model, method, KEEP, positions=positions)
    assert cost(KEEP) / 1e9 == pytest.approx(flops.count(model).gmacs, rel=1e-12)


@pytest.mark.parametrize("family", slow_but(TABLES, TABLES[2]))
def test_budgets_are_met(family: str) -> None:
    model = create(family)
    budget = 0.75 * flops.count(model).gmacs
    for positions in ("mean", "medoid"):
        keep = tokenpool.schedule_for(budget, model, "kmedoids", positions=positions)
        tokenpool.patch(model, "kmedoids", gmacs=budget, positions=positions)
        assert list(hosts.of(model).setting.keep) == keep
        assert 0.98 * budget <= flops.count(model).gmacs <= budget
