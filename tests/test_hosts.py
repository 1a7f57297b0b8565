"""Adapters, held against models of each kind in timm: small ones with random weights."""

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import tokenpool
from tokenpool import flops, hosts
from tokenpool.downsampling import with_schedule

SMALL = {"embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 7}
# One of each kind of head, prefix, normalisation and patch size.
FAMILIES = {
    "vit_tiny_patch16_224": {"img_size": 96},
    "vit_small_patch32_224": {"img_size": 192},
    "deit_tiny_distilled_patch16_224": {"img_size": 96},
    "deit3_small_patch16_224": {"img_size": 96},
    "vit_small_patch14_dinov2": {"img_size": 84},
    "vit_small_patch14_reg4_dinov2": {"img_size": 84},
    "vit_base_patch16_clip_224": {"img_size": 96},
    "vit_base_patch16_siglip_224": {"img_size": 96},
    "vit_base_patch16_siglip_gap_224": {"img_size": 96},
    "vit_medium_patch16_gap_256": {"img_size": 96},
    "vit_little_patch16_reg4_gap_256": {"img_size": 96},
    "beit3_base_patch16_224": {"img_size": 96},
    "vit_base_patch16_224_miil": {"img_size": 96},
    "aimv2_large_patch14_224": {"img_size": 84},
    "eva_large_patch14_196": {"img_size": 84},
    "vit_giant_patch14_reg4_dinov2": {"img_size": 84},
    "vit_so150m_patch16_reg4_map_256": {"img_size": 96},
    "test_vit4": {"img_size": 96},
    "vit_base_patch16_radio_v3": {"img_size": 96},
    "vit_tiny_patch16_224 avgmax": {"img_size": 96, "global_pool": "avgmax"},
    "vit_tiny_patch16_224 qk_norm": {"img_size": 96, "qk_norm": True},
    "vit_tiny_patch16_224 prefix": {"img_size": 96, "global_pool": "avg", "pool_include_prefix": True},
}
PATCHES = 36
HEADS = [  # one model for each kind of head
    "vit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "vit_base_patch16_siglip_224",
    "vit_medium_patch16_gap_256",
    "vit_giant_patch14_reg4_dinov2",
]
ALL_FAMILIES = pytest.mark.parametrize("family", FAMILIES)
METHODS = with_schedule()


def create(family: str) -> VisionTransformer:
    torch.manual_seed(0)
    model = timm.create_model(family.split()[0], **FAMILIES[family] | SMALL)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
        elif "gamma" in name:
            torch.nn.init.constant_(parameter, 0.5)  # LayerScale, which starts at 1e-5
    return model.eval()


def pictures(model: VisionTransformer) -> Tensor:
    return torch.randn(2, 3, *model.patch_embed.img_size, generator=torch.Generator().manual_seed(1))


@ALL_FAMILIES
@torch.no_grad()
def test_keeping_all_changes_nothing_and_patching_again_is_exact(family: str) -> None:
    model = create(family)
    images = pictures(model)
    plain, keys = model(images), list(model.state_dict())
    for method in ("power_bert", "wkmedoids", "key_medoids", "tome"):
        tokenpool.patch(model, method, [PATCHES] * 3)
        assert torch.allclose(model(images), plain, atol=1e-5)
        assert list(model.state_dict()) == keys
    pooled = tokenpool.patch(model, "wkmedoids", [20, 9, 3])(images)
    assert not torch.allclose(pooled, plain, atol=1e-3)
    assert torch.equal(tokenpool.unpatch(model)(images), plain)
    assert torch.equal(tokenpool.patch(model, "wkmedoids", [20, 9, 3])(images), pooled)


@ALL_FAMILIES
@torch.no_grad()
def test_duplicated_tokens_merge_without_a_trace(family: str) -> None:
    """Each patch twice, side by side: merged, with carried sizes, the logits stay as they are. Also in the head."""
    model = create(family)
    if model.pos_embed is not None:
        patches = model.pos_embed[:, -PATCHES:]
        patches.copy_(patches[:, :1].expand_as(patches))
    size = model.patch_embed.patch_size[0]
    rows = torch.randn(2, 3, 6, 3, generator=torch.Generator().manual_seed(2))
    images = rows.repeat_interleave(2, dim=3).repeat_interleave(size, dim=2).repeat_interleave(size, dim=3)
    plain = model(images)
    for method, keep in (("tome", [18, 18, 18]), ("key_medoids", "-1"), ("kmedoids", "-1")):
        tokenpool.patch(model, method, keep)
        assert tokenpool.trace(model, images).blocks[-1].tokens < PATCHES
        assert torch.allclose(model(images), plain, atol=2e-4)
    last = model.blocks[-1]
    if last.frame.unpools:  # without the sizes, the head sees something else
        last.frame = last.frame._replace(unpools=False)
        assert not torch.allclose(model(images), plain, atol=2e-4) or "max" in family


@ALL_FAMILIES
@torch.no_grad()
def test_every_method_follows_every_form_of_schedule(family: str) -> None:
    model = create(family)
    images = pictures(model)
    least = int(hosts.of(model).host().reads_patches)
    forms = ([35, 30, 2], [5, 20, 5], 0.5, "-13", "deit_small:7.0", [1, 1, 1])
    expected = ([35, 30, 2], [5, 5, 5], [18, 9, 4], [23, 10, 1], None, [1, 1, 1])
    for index, method in enumerate(METHODS):
        keep, tokens = forms[index % len(forms)], expected[index % len(forms)]
        if tokenpool.METHODS[method].uses_class_attention and not model.has_class_token:
            with pytest.raises(ValueError, match="needs the attention of a class token"):
                tokenpool.patch(model, method, keep)
            continue
        trace = tokenpool.trace(tokenpool.patch(model, method, keep), images)
        assert trace.logits.isfinite().all() and trace.grid == (6, 6)
        found = [block.tokens for block in trace.blocks]
        assert found == tokens if tokens else found[-1] == least


@ALL_FAMILIES
@torch.no_grad()
def test_adapters_agree_with_a_forward_pass(family: str) -> None:
    model = create(family)
    images, adapter = pictures(model), hosts.of(model)
    seen = []
    handle = model.blocks.register_forward_hook(lambda module, given, out: seen.append(out.shape))
    plain = model(images)
    handle.remove()
    assert seen == [(2, adapter.prefix + PATCHES, adapter.width)]
    assert adapter.grid() == adapter.grid(images.shape[-2:]) == (6, 6)
    assert images.shape[1:] == adapter.image_shape and adapter.depth == 3

    def change_patches(module: nn.Module, given: tuple, out: Tensor) -> Tensor:
        return torch.cat([out[:, : adapter.prefix], out[:, adapter.prefix :].flip(-1) + 1], dim=1)

    model.blocks.register_forward_hook(change_patches)
    assert torch.equal(model(images), plain) != adapter.head_reads_patches


@ALL_FAMILIES
@torch.no_grad()
def test_signals_are_those_of_the_attention(family: str) -> None:
    """The output of the attention follows from the recorded queries, keys and values, class token included."""
    model = create(family)
    attention, signals = model.blocks[1].attn, {}
    hosts.of(model).watch_attention(model.blocks[1], lambda name, value: signals.update({name: value}))
    model(pictures(model))
    q, k = attention.q_norm(signals["queries"]), attention.k_norm(signals["keys"])
    v = signals["values"].unflatten(2, (attention.num_heads, -1)).transpose(1, 2)
    filtered = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    expected = getattr(attention, "norm", nn.Identity())(filtered)
    torch.testing.assert_close(signals["filtered"], expected, rtol=1e-4, atol=1e-4)
    added = model.blocks[1].drop_path1(model.blocks[1].ls1(attention.proj(expected)))
    torch.testing.assert_close(signals["after"] - signals["before"], added, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", HEADS)
@pytest.mark.slow
def test_each_multiply_add_has_a_part(family: str) -> None:
    model = create(family)
    parts = flops.count(model).parts
    assert set(parts) == set(flops.PARTS) and parts["clustering"] == 0
    assert all(parts[part] > 0 for part in flops.PARTS if part != "clustering")
    pooled = flops.count(tokenpool.patch(model, "kmedoids", [20, 9, 3])).parts
    assert pooled["clustering"] == 48 * (36**2 + 20**2 + 9**2) / 1e9
    assert {part: pooled[part] < parts[part] for part in ("mlp", "o_projection")} == {"mlp": True, "o_projection": True}


@pytest.mark.parametrize(
    "name, reason",
    [
        ("swin_tiny_patch4_window7_224", "SwinTransformer cannot be pooled: its attention runs in windows"),
        ("vit_relpos_small_patch16_224", "its relative positions"),
        ("beit_base_patch16_224", "its relative positions"),
        ("samvit_base_patch16", "VisionTransformerSAM cannot be pooled: its relative positions"),
        ("hiera_tiny_224", "Hiera cannot be pooled: it is hierarchical"),
        ("mvitv2_tiny", "it is hierarchical"),
        ("vit_small_patch16_18x2_224", "block 0 is a ParallelThingsBlock, which cannot be pooled: .*in parallel"),
        (
            "vit_base_patch16_rpn_224",
            "block 0 is a ResPostBlock, which cannot be pooled: its blocks normalise the output",
        ),
        (
            "vit_dlittle_patch16_reg1_gap_256",
            "block 0 is a DiffAttention, which cannot be pooled: .*two softmax matrices",
        ),
        ("cait_xxs24_224", "Cait cannot be pooled: no adapter exists"),
        ("resnet18", "ResNet cannot be pooled"),
    ],
)
def test_others_are_refused_with_a_reason(name: str, reason: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(TypeError, match=f"{reason}.*; supported are timm's VisionTransformer models") as refusal:
        tokenpool.patch(model, "kmedoids", 0.9)
    assert "\n" not in str(refusal.value)
    if hosts.find(model) is None:
        assert all(adapter.FAMILY in str(refusal.value) for adapter in hosts.ADAPTERS)


@pytest.mark.parametrize(
    "name, options",
    [
        ("vit_small_resnet26d_224", {"embed_dim": 48, "num_heads": 3}),
        ("vit_base_mci_224", {}),  # its convolutions decide the width
    ],
)
@pytest.mark.slow
@torch.no_grad()
def test_hybrids_with_convolutions_before_the_patches(name: str, options: dict) -> None:
    model = timm.create_model(name, img_size=96, depth=2, num_classes=7, **options).eval()
    images = pictures(model)
    plain = model(images)
    tokenpool.patch(model, "kmedoids", [model.patch_embed.num_patches] * 2)
    assert torch.allclose(model(images), plain, atol=1e-5)
    whole = tokenpool.flops.count(model).gmacs
    assert tokenpool.flops.count(tokenpool.patch(model, "kmedoids", 0.6)).gmacs < whole


@pytest.mark.parametrize("pool", ["avg", "max"])
def test_heads_that_read_patches_keep_one(photos, pool: str) -> None:
    model = timm.create_model("deit_tiny_patch16_224", img_size=96, depth=2, global_pool=pool).eval()
    with pytest.raises(ValueError, match=r"keep\[1\] = 0 must be at least 1: the head of this model"):
        tokenpool.patch(model, "wkmedoids", [5, 0])
    assert tokenpool.patch(model, "wkmedoids", [5, 1])(photos).isfinite().all()


def test_the_adapter_of_a_model(small: VisionTransformer) -> None:
    assert hosts.find(small).model is hosts.of(small).model is small
    assert hosts.of(small).setting is None and hosts.of(small).downsamplers == [None] * 4
    tokenpool.patch(small, "tome", [9, 9, 9, 9], dense=True)
    assert hosts.of(small).setting.dense and [layer.keep for layer in hosts.of(small).downsamplers] == [9] * 4
    other = timm.create_model("resnet18")
    assert hosts.find(other) is None and hosts.inside(other) is None
    wrapped = nn.Sequential(nn.Identity(), nn.ModuleDict({"body": small}))
    assert hosts.wrapped_name(wrapped) == "1.body" and hosts.wrapped_name(small) is None
    with pytest.raises(TypeError, match=r"Sequential only wraps the VisionTransformer to pool.* on its `1\.body`"):
        hosts.of(wrapped)
