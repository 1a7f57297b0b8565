"""The adapter of open_clip, held against open_clip's own towers: small ones with random weights."""

import pytest
import torch
from torch import Tensor, nn

import tokenpool
from tokenpool import flops, hosts
from tokenpool.budget import ScheduleCost
from tokenpool.downsampling import METHODS, with_schedule

open_clip = pytest.importorskip("open_clip", reason="open_clip_torch is not installed")

TOWERS = {
    "class token": {},
    "attention pooling": {"attentional_pool": True, "attn_pooler_queries": 4, "attn_pooler_heads": 4},
    "mean": {"pool_type": "avg", "final_ln_after_pool": True},
    "layer scale": {"ls_init_value": 0.5, "no_ln_pre": True},
    "tokens": {"output_tokens": True},
}
ALL_TOWERS = pytest.mark.parametrize("tower", TOWERS)
PATCHES = 36
TEXT = {"context_length": 8, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}


def create(tower: str) -> nn.Module:
    torch.manual_seed(0)
    model = open_clip.transformer.VisionTransformer(96, 16, 64, 3, 4, 4.0, output_dim=32, **TOWERS[tower])
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.15)
    return model.eval()


def embed(model: nn.Module, images: Tensor) -> Tensor:
    found = model(images)
    return found[0] if isinstance(found, tuple) else found


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3, 3, 96, 96, generator=torch.Generator().manual_seed(1))


@ALL_TOWERS
@torch.no_grad()
def test_keeping_all_changes_nothing_and_patching_again_is_exact(images, tower: str) -> None:
    model = create(tower)
    plain, keys = embed(model, images), list(model.state_dict())
    for method in ("power_bert", "wkmedoids", "key_medoids", "tome"):
        tokenpool.patch(model, method, [PATCHES] * 3)
        torch.testing.assert_close(embed(model, images), plain, rtol=0, atol=1e-5)
        assert list(model.state_dict()) == keys
    pooled = embed(tokenpool.patch(model, "wkmedoids", [20, 9, 3]), images)
    assert not torch.allclose(pooled, plain, atol=1e-3)
    torch.testing.assert_close(embed(model, images[:1]), pooled[:1], rtol=0, atol=1e-5)
    assert torch.equal(embed(tokenpool.unpatch(model), images), plain)
    assert torch.equal(embed(tokenpool.patch(model, "wkmedoids", [20, 9, 3]), images), pooled)


@ALL_TOWERS
@torch.no_grad()
def test_duplicated_tokens_merge_without_a_trace(tower: str) -> None:
    model = create(tower)
    model.positional_embedding[1:] = model.positional_embedding[1:2].clone()
    rows = torch.randn(2, 3, 6, 3, generator=torch.Generator().manual_seed(2))
    images = rows.repeat_interleave(2, dim=3).repeat_interleave(16, dim=2).repeat_interleave(16, dim=3)
    plain = embed(model, images)
    for method, keep in (("tome", [18, 18, 18]), ("key_medoids", [18, 18, 18])):
        torch.testing.assert_close(embed(tokenpool.patch(model, method, keep), images), plain, rtol=0, atol=2e-4)
        if tower in ("mean", "class token"):  # without the sizes, the embedding changes
            changed = embed(tokenpool.patch(model, method, [18, 9, 9], carry=False), images)
            assert not torch.allclose(changed, plain, atol=2e-4)


@pytest.mark.parametrize("method", with_schedule())
@torch.no_grad()
def test_every_method_is_finite_and_counted(images, method: str) -> None:
    model = create("attention pooling")
    tokenpool.patch(model, method, [20, 9, 3])
    trace = tokenpool.trace(model, images)
    assert trace.logits.isfinite().all() and [block.tokens for block in trace.blocks] == [20, 9, 3]
    cost = ScheduleCost(model, METHODS[method])([20, 9, 3])
    assert round(flops.count(model).gmacs * 1e9) == cost
    assert flops.count(tokenpool.patch(model, method, gmacs=0.007)).gmacs <= 0.007


def test_the_cost_of_vit_b_32_in_closed_form() -> None:
    """ViT-B/32: 49 patches and a class token, width 768, 12 blocks, an embedding of 512 numbers."""
    model = open_clip.transformer.VisionTransformer(224, 32, 768, 12, 12, 4.0, output_dim=512)
    n, d = 50, 768
    parts = flops.count(model).parts
    expected = {
        "qkv_projections": 12 * n * 3 * d * d,
        "softmax_attention": 12 * 2 * n * n * d,
        "o_projection": 12 * n * d * d,
        "mlp": 12 * n * 8 * d * d,
        "patch_embedding": 49 * 3 * 32 * 32 * d,
        "head": d * 512,
        "clustering": 0,
    }
    assert {part: round(gmacs * 1e9) for part, gmacs in parts.items()} == expected


@torch.no_grad()
def test_signals_are_those_of_the_attention(images) -> None:
    model = create("class token")
    attention = model.transformer.resblocks[1].attn
    outputs: list[Tensor] = []
    attention.register_forward_hook(lambda module, given, output: outputs.append(output[0]))
    found = tokenpool.redundancy.signals(model, images)[1]
    torch.testing.assert_close(attention.out_proj(found.filtered), outputs[0][:, 1:], rtol=0, atol=1e-5)
    torch.testing.assert_close(found.after - found.before, outputs[0][:, 1:], rtol=0, atol=1e-5)


def test_training_and_gradient_checkpointing(images) -> None:
    model = tokenpool.patch(create("mean"), "wkmedoids", [20, 9, 3]).train()
    embed(model, images).square().sum().backward()
    first = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    assert all(grad.isfinite().all() and grad.any() for grad in first.values())
    model.zero_grad()
    model.set_grad_checkpointing()
    embed(model, images).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, first[name], rtol=1e-4, atol=1e-6)


def test_the_whole_model_names_its_tower(images) -> None:
    vision = {"image_size": 96, "patch_size": 16, "width": 64, "layers": 3, "head_width": 16}
    clip = open_clip.CLIP(32, open_clip.CLIPVisionCfg(**vision), open_clip.CLIPTextCfg(**TEXT)).eval()
    with pytest.raises(TypeError, match="CLIP only wraps the VisionTransformer to pool: call patch .* its `visual`"):
        tokenpool.patch(clip, "tome", 0.8)
    tokens = torch.randint(0, 49408, (2, 8))
    with torch.no_grad():
        plain = clip(images[:2], tokens)[0]
        tokenpool.patch(clip.visual, "key_medoids", [PATCHES] * 3)
        torch.testing.assert_close(clip(images[:2], tokens)[0], plain, rtol=0, atol=1e-5)
        assert clip.encode_image(images).shape == (3, 32)
    timm_vision = {"image_size": 96, "timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear"}
    clip = open_clip.CustomTextCLIP(32, open_clip.CLIPVisionCfg(**timm_vision), open_clip.CLIPTextCfg(**TEXT)).eval()
    with pytest.raises(TypeError, match=r"its `visual\.trunk`"):
        tokenpool.patch(clip, "tome", 0.8)
    tokenpool.patch(clip.visual.trunk, "key_medoids", 0.8)
    assert tokenpool.is_patched(clip.visual.trunk)


def test_what_cannot_be_kept_is_refused(images, tmp_path) -> None:
    model = create("class token")
    custom = open_clip.transformer.VisionTransformer(96, 16, 64, 3, 4, 4.0, qk_norm=True)
    with pytest.raises(TypeError, match="block 0 is a CustomResidualAttentionBlock, which cannot be pooled"):
        tokenpool.patch(custom, "tome", 0.8)
    tokenpool.patch(model, "tome", 0.8)
    with pytest.raises(TypeError, match="forward_intermediates .* need a plain model"):
        model.forward_intermediates(images)
    with pytest.raises(TypeError, match="attention masks"):
        model.transformer(torch.randn(1, 37, 64), attn_mask=torch.zeros(37, 37))
    with pytest.raises(ValueError, match="cannot be saved"):
        tokenpool.save(model, tmp_path / "model.safetensors")
    assert hosts.of(model).grid((64, 96)) == (4, 6)
