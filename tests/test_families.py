"""Every family of plain vision transformers in timm, small and without weights."""

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

import tokenpool
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
SUPPORTED = sorted(FAMILIES)


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


@pytest.mark.parametrize("family", SUPPORTED)
@torch.no_grad()
def test_keeping_all_changes_nothing(family: str) -> None:
    model = create(family)
    images = pictures(model)
    plain, keys = model(images), list(model.state_dict())
    for method in ("power_bert", "wkmedoids", "key_medoids", "tome"):
        tokenpool.patch(model, method, [PATCHES] * 3)
        assert torch.allclose(model(images), plain, atol=1e-5)
        assert list(model.state_dict()) == keys
    assert torch.equal(tokenpool.unpatch(model)(images), plain)


@pytest.mark.parametrize("family", SUPPORTED)
@torch.no_grad()
def test_patching_again_is_exact(family: str) -> None:
    model = create(family)
    images = pictures(model)
    for method in ("wkmedoids", "tome"):
        pooled = tokenpool.patch(model, method, [20, 9, 3])(images)
        tokenpool.unpatch(model)
        assert torch.equal(tokenpool.patch(model, method, [20, 9, 3])(images), pooled)


@pytest.mark.parametrize("family", SUPPORTED)
@pytest.mark.parametrize("method, keep", [("tome", [18, 18, 18]), ("kmedoids", "-1"), ("key_medoids", "-1")])
@torch.no_grad()
def test_duplicated_tokens_merge_without_a_trace(family: str, method: str, keep: list[int] | str) -> None:
    """Each patch twice, side by side: merged, with carried sizes, the logits stay as they are. Also in the head."""
    model = create(family)
    if model.pos_embed is not None:
        patches = model.pos_embed[:, -PATCHES:]
        patches.copy_(patches[:, :1].expand_as(patches))
    size = model.patch_embed.patch_size[0]
    rows = torch.randn(2, 3, 6, 3, generator=torch.Generator().manual_seed(2))
    images = rows.repeat_interleave(2, dim=3).repeat_interleave(size, dim=2).repeat_interleave(size, dim=3)
    plain = model(images)
    tokenpool.patch(model, method, keep)
    assert tokenpool.trace(model, images).blocks[-1].tokens < PATCHES
    assert torch.allclose(model(images), plain, atol=2e-4)
    if model.blocks.unpools:  # without its sizes the head would see something else
        model.blocks.unpools = False
        assert not torch.allclose(model(images), plain, atol=2e-4) or method != "kmedoids" or "max" in family


@pytest.mark.parametrize("method", with_schedule())
@pytest.mark.parametrize("family", SUPPORTED)
@torch.no_grad()
def test_logits_are_finite(family: str, method: str) -> None:
    model = create(family)
    images = pictures(model)
    for keep in ([1, 1, 1], [35, 30, 2], [5, 20, 5], 0.5, "-13", "deit_small:7.0"):
        tokenpool.patch(model, method, keep)
        assert model(images).isfinite().all()
        reads_prefix_only = model.global_pool == "token"
        if keep == "deit_small:7.0":
            assert model.blocks.setting.keep[-1] == (0 if reads_prefix_only else 1)


@pytest.mark.parametrize(
    "name, reason",
    [
        ("eva02_tiny_patch14_224", "Eva cannot be pooled: its rotary positions"),
        ("vit_small_patch16_rope_224", "rotary positions"),
        ("swin_tiny_patch4_window7_224", "SwinTransformer cannot be pooled: its attention runs in windows"),
        ("vit_relpos_small_patch16_224", "its relative positions"),
        ("beit_base_patch16_224", "its relative positions"),
        ("mvitv2_tiny", "it is hierarchical"),
        ("vit_small_patch16_18x2_224", "block 0 is a ParallelThingsBlock, which cannot be pooled: .*side by side"),
        ("vit_base_patch16_rpn_224", "block 0 is a ResPostBlock, which cannot be pooled: its blocks are not timm's"),
        ("vit_dlittle_patch16_reg1_gap_256", "block 0 is a DiffAttention"),
        ("resnet18", "ResNet cannot be pooled"),
    ],
)
def test_others_are_refused_with_a_reason(name: str, reason: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(TypeError, match=f"{reason}.*; supported are timm's VisionTransformer models"):
        tokenpool.patch(model, "kmedoids", 0.9)


@pytest.mark.parametrize(
    "name, options",
    [
        ("vit_small_resnet26d_224", {"embed_dim": 48, "num_heads": 3}),
        ("vit_small_r26_s32_224", {"embed_dim": 48, "num_heads": 3}),
        ("vit_base_mci_224", {}),  # its convolutions decide the width
    ],
)
@torch.no_grad()
def test_hybrids_with_convolutions_before_the_patches(name: str, options: dict) -> None:
    model = timm.create_model(name, img_size=160, depth=3, num_classes=7, **options).eval()
    images = pictures(model)
    plain = model(images)
    tokenpool.patch(model, "kmedoids", [model.patch_embed.num_patches] * 3)
    assert torch.allclose(model(images), plain, atol=1e-5)
    whole = tokenpool.flops.count(model).gmacs
    assert tokenpool.flops.count(tokenpool.patch(model, "kmedoids", 0.6)).gmacs < whole
