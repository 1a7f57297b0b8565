"""Adapters of transformers' vision models, held against transformers itself: small models with random weights."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor, nn

import tokenpool
from tokenpool import flops, hosts
from tokenpool.downsampling import with_schedule
from tokenpool.hosts.huggingface_layers import sdpa_form
from tokenpool.hosts.masks import valid_patches

transformers = pytest.importorskip("transformers", minversion="5.24", reason="needs transformers 5.24 or newer")
from transformers.masking_utils import create_bidirectional_mask  # noqa: E402

BODY = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3}
MLP = BODY | {"intermediate_size": 96}
IMAGE = {"image_size": 96, "patch_size": 16}
DINO = BODY | IMAGE | {"mlp_ratio": 2, "num_labels": 7}
TEXT = MLP | {"vocab_size": 99, "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 2}
PAIR = {"vision_config": MLP | IMAGE, "text_config": TEXT}
PATCHED = {"vision_config": MLP | {"patch_size": 16, "num_patches": 36}, "text_config": TEXT}
# One of each kind of head, prefix and position: the class, its configuration, and arguments of the configuration.
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "vit": ("ViTForImageClassification", "ViTConfig", MLP | IMAGE | {"num_labels": 7}),
    "vit alone": ("ViTModel", "ViTConfig", MLP | IMAGE),
    "vit masked": ("ViTForMaskedImageModeling", "ViTConfig", MLP | IMAGE),
    "deit": ("DeiTForImageClassification", "DeiTConfig", MLP | IMAGE | {"num_labels": 7}),
    "deit distilled": ("DeiTForImageClassificationWithTeacher", "DeiTConfig", MLP | IMAGE | {"num_labels": 7}),
    "dinov2": ("Dinov2ForImageClassification", "Dinov2Config", DINO | {"use_swiglu_ffn": True}),
    "dinov2 alone": ("Dinov2Model", "Dinov2Config", DINO),
    "dinov2 registers": ("Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig", DINO),
    "dinov3": ("DINOv3ViTModel", "DINOv3ViTConfig", MLP | IMAGE | {"num_register_tokens": 4}),
    "clip": ("CLIPModel", "CLIPConfig", PAIR | {"projection_dim": 32}),
    "clip alone": ("CLIPVisionModel", "CLIPVisionConfig", MLP | IMAGE),
    "clip projection": ("CLIPVisionModelWithProjection", "CLIPVisionConfig", MLP | IMAGE | {"projection_dim": 32}),
    "clip classes": ("CLIPForImageClassification", "CLIPConfig", PAIR | {"num_labels": 7}),
    "siglip": ("SiglipModel", "SiglipConfig", PAIR),
    "siglip classes": ("SiglipForImageClassification", "SiglipConfig", PAIR | {"num_labels": 7}),
    "siglip2": ("Siglip2Model", "Siglip2Config", PATCHED),
    "siglip2 classes": ("Siglip2ForImageClassification", "Siglip2Config", PATCHED | {"num_labels": 7}),
}
ALL_FAMILIES = pytest.mark.parametrize("family", FAMILIES)
ATTENTIONS = pytest.mark.parametrize("attention", ["eager", "sdpa"])


def create(family: str, attention: str = "sdpa") -> Any:
    model_class, config_class, arguments = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**arguments)
    model = getattr(transformers, model_class)._from_config(config, attn_implementation=attention)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.15)
        elif "lambda" in name:
            nn.init.constant_(parameter, 0.5)
    return model.eval()


def pictures(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 96, 96, generator=torch.Generator().manual_seed(1))


@ALL_FAMILIES
@ATTENTIONS
@torch.no_grad()
def test_keeping_all_changes_nothing_and_patching_again_is_exact(family: str, attention: str) -> None:
    model, images = create(family, attention), pictures()
    run = hosts.of(model).run
    plain, keys = run(images), list(model.state_dict())
    for method in ("wkmedoids", "key_medoids", "tome"):
        tokenpool.patch(model, method, [36] * 3)
        torch.testing.assert_close(run(images), plain, atol=1e-5, rtol=1e-5)
        assert list(model.state_dict()) == keys and tokenpool.is_patched(model)
    pooled = run_with(model, [20, 9, 3], images)
    assert not torch.allclose(pooled, plain, atol=1e-3)
    assert torch.equal(hosts.of(tokenpool.unpatch(model)).run(images), plain) and not tokenpool.is_patched(model)
    assert torch.equal(run_with(model, [20, 9, 3], images), pooled)


def run_with(model: Any, keep: Any, images: Tensor, method: str = "wkmedoids") -> Tensor:
    return hosts.of(tokenpool.patch(model, method, keep)).run(images)


@ALL_FAMILIES
@torch.no_grad()
def test_duplicated_tokens_merge_without_a_trace(family: str) -> None:
    """Each patch twice, at one position: merged, with sizes, the outputs stay. Also in heads that read patches."""
    model = create(family)
    adapter = hosts.of(model)
    for name, table in model.named_parameters():  # all patches get one position
        if "text_model" not in name and "position_embedding" in name:
            table.flatten(end_dim=-2)[-36:] = table.flatten(end_dim=-2)[-1].clone()
    if adapter.is_rotary:
        model.rope_embeddings.inv_freq.zero_()
    halves = torch.randn(2, 3, 6, 3, generator=torch.Generator().manual_seed(2))
    images = halves.repeat_interleave(2, dim=3).repeat_interleave(16, dim=2).repeat_interleave(16, dim=3)
    plain = adapter.run(images)
    runs = [("tome", [18, 18, 18]), ("key_medoids", "-1"), ("kmedoids", "-1")]
    # A cluster of K-Medoids without members has no rotary position. Its token then differs from its duplicate.
    for method, keep in runs[:2] if adapter.is_rotary else runs:
        tokenpool.patch(model, method, keep)
        assert tokenpool.trace(model, images).blocks[-1].tokens < 36
        torch.testing.assert_close(adapter.run(images), plain, atol=3e-4, rtol=1e-3)


@ALL_FAMILIES
@torch.no_grad()
def test_every_method_follows_every_form_of_schedule(family: str) -> None:
    model, images = create(family), pictures()
    forms = ([35, 30, 2], [5, 20, 5], 0.5, "-13", [1, 1, 1])
    expected = ([35, 30, 2], [5, 5, 5], [18, 9, 4], [23, 10, 1], [1, 1, 1])
    for index, method in enumerate(with_schedule()):
        kind = tokenpool.METHODS[method]
        needs_class = kind.uses_class_attention and "siglip" in family
        if needs_class or (("siglip2" in family or "masked" in family) and not kind.merges):
            reason = "has no class token" if needs_class else "drops patches, but .* needs all patches: use a method"
            with pytest.raises(ValueError, match=reason):
                tokenpool.patch(model, method, forms[index % 5])
            continue
        tokenpool.patch(model, method, forms[index % 5])
        trace = tokenpool.trace(model, images)
        assert trace.logits.isfinite().all() and trace.grid == (6, 6)
        assert [block.tokens for block in trace.blocks] == expected[index % 5]


@ALL_FAMILIES
@torch.no_grad()
def test_an_image_does_not_depend_on_its_batch(family: str) -> None:
    model, images = create(family), pictures(3)
    for method in ("key_medoids", "kmeans"):
        together = run_with(model, [20, 9, 3], images, method)
        for index in range(3):
            alone = hosts.of(model).run(images[index : index + 1])
            torch.testing.assert_close(alone, together[index : index + 1], atol=1e-5, rtol=1e-4)


@ALL_FAMILIES
@torch.no_grad()
def test_adapters_agree_with_a_forward_pass(family: str) -> None:
    model, images = create(family), pictures()
    adapter = hosts.of(model)
    seen = []
    handle = adapter.blocks[-1].register_forward_hook(lambda module, given, out: seen.append(out.shape))
    plain = adapter.run(images)
    handle.remove()
    assert seen == [(2, adapter.prefix + 36, adapter.width)]
    assert adapter.grid() == adapter.grid((96, 96)) == (6, 6)
    assert images.shape[1:] == adapter.image_shape and adapter.depth == 3

    def change_patches(module: nn.Module, given: tuple, out: Tensor) -> Tensor:
        return torch.cat([out[:, : adapter.prefix], out[:, adapter.prefix :].flip(-1) + 1], dim=1)

    adapter.blocks[-1].register_forward_hook(change_patches)
    assert torch.equal(adapter.run(images), plain) != adapter.head_reads_patches


@ALL_FAMILIES
@torch.no_grad()
def test_signals_are_those_of_the_attention(family: str) -> None:
    model = create(family)
    adapter, signals = hosts.of(model), {}
    adapter.watch_attention(adapter.blocks[1], lambda name, value: signals.update({name: value}))
    adapter.run(pictures())
    v = signals["values"].unflatten(2, (3, -1)).transpose(1, 2)
    filtered = nn.functional.scaled_dot_product_attention(signals["queries"], signals["keys"], v)
    torch.testing.assert_close(signals["filtered"], filtered.transpose(1, 2).flatten(2), rtol=1e-4, atol=1e-4)
    assert signals["after"].shape == signals["before"].shape == (2, 36 + adapter.prefix, 48)


@torch.no_grad()
def test_kept_patches_have_their_own_rotary_positions() -> None:
    """DINOv3's own layers, on the patches that remain, with the rows of the table of these patches."""
    model, images = create("dinov3"), pictures(1)
    layers, kept = list(model.model.layer), torch.arange(36)
    cosine, sine = model.rope_embeddings(images)
    tokens = layers[0](model.embeddings(images), position_embeddings=(cosine, sine))
    trace = tokenpool.trace(tokenpool.patch(model, "power_bert", [20, 9, 9]), images)
    for layer, state in zip(layers[1:], trace.blocks, strict=False):
        patches = [int((state.assignment[0] == token).nonzero()) for token in range(state.tokens)]
        rows = torch.tensor([int((kept == patch).nonzero()) for patch in patches])
        kept = torch.tensor(patches)
        tokens = torch.cat([tokens[:, :5], tokens[:, 5:][:, rows]], dim=1)
        tokens = layer(tokens, position_embeddings=(cosine[kept], sine[kept]))
    torch.testing.assert_close(trace.logits, model.norm(tokens)[:, 0], atol=1e-5, rtol=1e-5)


def padded(counts: list[tuple[int, int]], patches: int = 36) -> dict[str, Tensor]:
    """Images of different grids, as `Siglip2ImageProcessor` gives them."""
    numbers = torch.tensor([rows * columns for rows, columns in counts])
    mask = (torch.arange(patches) < numbers[:, None]).int()
    pixels = torch.randn(len(counts), patches, 768, generator=torch.Generator().manual_seed(4)) * mask[:, :, None]
    return {"pixel_values": pixels, "pixel_attention_mask": mask, "spatial_shapes": torch.tensor(counts)}


@ATTENTIONS
@torch.no_grad()
def test_padding_of_siglip2(attention: str) -> None:
    model = create("siglip2 classes", attention)
    tower, inputs = model.vision_model, padded([(6, 6), (3, 5), (4, 6), (5, 3)])
    valid = inputs["pixel_attention_mask"].bool()
    logits, plain = model(**inputs).logits, tower(**inputs)
    tokenpool.patch(model, "key_medoids", [36] * 3)
    torch.testing.assert_close(model(**inputs).logits, logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(tower(**inputs).last_hidden_state[valid], plain.last_hidden_state[valid])
    torch.testing.assert_close(tower(**inputs).pooler_output, plain.pooler_output, atol=1e-5, rtol=1e-5)

    tokenpool.patch(model, "key_medoids", [12, 7, 3])
    together, features = model(**inputs).logits, tower(**inputs)
    outputs = tower.encoder(tower.embeddings(inputs["pixel_values"], inputs["spatial_shapes"]), valid)
    assert (outputs.last_hidden_state[~valid] == 0).all()
    for index, (rows, columns) in enumerate(inputs["spatial_shapes"].tolist()):
        n = rows * columns
        alone = {name: value[index : index + 1] for name, value in inputs.items()}
        alone |= {name: alone[name][:, :n] for name in ("pixel_values", "pixel_attention_mask")}
        torch.testing.assert_close(model(**alone).logits[0], together[index], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(tower(**alone).pooler_output[0], features.pooler_output[index], atol=1e-5, rtol=1e-5)
        assert len(features.last_hidden_state[index, :n].unique(dim=0)) == 3


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flash_attention_2"])
def test_masks_of_padding_in_each_form(attention: str) -> None:
    config = transformers.ViTConfig()
    config._attn_implementation_internal = attention  # without the check that the package is installed
    expected = torch.arange(5) < torch.tensor([[5], [3]])
    tokens = torch.zeros(2, 6, 4)
    given = torch.cat([torch.ones(2, 1), expected], dim=1).long()
    mask = create_bidirectional_mask(config=config, inputs_embeds=tokens, attention_mask=given)
    assert mask.dim() == (2 if "flash" in attention else 4)
    assert torch.equal(valid_patches(sdpa_form(mask), tokens, 1), expected)


CAUSAL = torch.ones(5, 5).tril().bool()[None, None]


@pytest.mark.parametrize(
    "mask, fault",
    [
        (CAUSAL, "differs from query to query"),
        (torch.full((1, 1, 5, 5), -1.0), "weighs tokens"),
        (torch.tensor([[0, 1, 1, 1, 1]]), "hides a class or register token"),
        (torch.ones(2, 7), "has the wrong form for 5 tokens"),
        ("block mask", "has the wrong form"),
    ],
)
def test_other_masks_are_refused(mask: Any, fault: str) -> None:
    with pytest.raises(ValueError, match=f"takes attention masks of padding only, but the mask {fault}"):
        valid_patches(sdpa_form(mask), torch.zeros(1, 5, 4), 1)


@torch.no_grad()
def test_arguments_of_layers() -> None:
    model, images = create("vit"), pictures()
    tokenpool.patch(model, "kmedoids", [9, 9, 9])
    plain = model(images).logits
    assert torch.equal(model(images, num_items_in_batch=3, output_attentions=False).logits, plain)
    with pytest.raises(TypeError, match="a pooled layer cannot use the argument 'is_causal'"):
        model(images, is_causal=True)
    causal = torch.ones(37, 37).tril().bool().expand(2, 1, 37, 37)
    with pytest.raises(ValueError, match="differs from query to query"):
        model(images, attention_mask=causal)
    mask = (torch.arange(37) < torch.tensor([[37], [21]])).long()
    together = model(images, attention_mask=mask).logits
    torch.testing.assert_close(together[0], plain[0], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(together[1], plain[1], atol=1e-3)
    tokenpool.patch(model, "kmedoids", [36] * 3)
    masked = model(images, attention_mask=mask).logits
    torch.testing.assert_close(masked, tokenpool.unpatch(model)(images, attention_mask=mask).logits)


@pytest.mark.parametrize("family", ["vit", "dinov2", "dinov3", "clip projection", "siglip classes"])
@torch.no_grad()
def test_hidden_states_and_attentions_are_refused(family: str) -> None:
    """transformers collects them by hooks on layers, which it installs with the first call that asks for them."""
    model, images = create(family, "eager"), pictures()
    if family == "vit":  # a model with hooks from before
        model(images, output_hidden_states=True)
    tokenpool.patch(model, "kmedoids", [20, 9, 3])
    for name in ("output_hidden_states", "output_attentions"):
        with pytest.raises(TypeError, match=f"{name} needs a plain model.*call tokenpool.unpatch first"):
            model(images, **{name: True})
        config = hosts.of(model).tower.config
        setattr(config, name, True)
        with pytest.raises(TypeError, match=f"{name} needs a plain model"):
            model(images)
        setattr(config, name, False)
    assert model(images)[0].isfinite().all()
    plain = tokenpool.unpatch(model)
    for _ in range(2):
        found = plain(images, output_hidden_states=True, output_attentions=True)
        assert len(found.hidden_states) == 4 and len(found.attentions) == 3
    tokenpool.patch(model, "kmedoids", [20, 9, 3])


@pytest.mark.parametrize("family", ["vit", "clip", "dinov3"])
def test_gradient_checkpointing_is_refused(family: str) -> None:
    model = create(family)
    tokenpool.patch(model, "kmedoids", [20, 9, 3])
    with pytest.raises(ValueError, match="a pooled layer has no gradient checkpointing"):
        model.gradient_checkpointing_enable()
    tokenpool.unpatch(model).gradient_checkpointing_enable()
    with pytest.raises(ValueError, match=r"call model.gradient_checkpointing_disable\(\) before tokenpool.patch"):
        tokenpool.patch(model, "kmedoids", [20, 9, 3])
    model.gradient_checkpointing_disable()
    tokenpool.patch(model, "kmedoids", [20, 9, 3])


def test_others_are_refused_with_a_reason() -> None:
    for name in ("Dinov2", "Dinov2WithRegisters", "DINOv3ViT"):
        arguments = MLP if name == "DINOv3ViT" else BODY
        backbone = getattr(transformers, f"{name}Backbone")(getattr(transformers, f"{name}Config")(**arguments))
        with pytest.raises(TypeError, match="cannot be pooled: it is a backbone, which returns the whole grid"):
            tokenpool.patch(backbone, "kmedoids", 0.9)
    with pytest.raises(TypeError, match="cannot be pooled: it reads texts"):
        tokenpool.patch(create("clip").text_model, "kmedoids", 0.9)
    with pytest.raises(TypeError, match="only wraps the ViTModel to pool: call patch and unpatch on its `0`"):
        tokenpool.patch(nn.Sequential(create("vit alone")), "kmedoids", 0.9)
    model = create("vit")
    model.vit.layers[1].register_forward_hook(lambda module, inputs, output: None)
    with pytest.raises(ValueError, match=r"vit.layers\[1\] has a forward hook, which would be lost"):
        tokenpool.patch(model, "kmedoids", 0.9)
    with pytest.raises(ValueError, match="needs a fixed grid, but the model takes images of any size"):
        tokenpool.patch(create("dinov2"), "convolution", at=[1])


def vision_macs(width: int, depth: int, mlp: int, tokens: int, patch_pixels: int) -> int:
    """Multiply-adds of a plain vision transformer with a class token, in closed form."""
    layer = tokens * (4 * width**2 + 2 * width * mlp) + 2 * tokens**2 * width
    return (tokens - 1) * patch_pixels * width + depth * layer


def test_flops_of_clip_in_closed_form() -> None:
    """ViT-B/32, the default of `CLIPVisionConfig`; CLIPModel counts its vision tower and the projection of images."""
    config = transformers.CLIPVisionConfig()
    tokens = (config.image_size // config.patch_size) ** 2 + 1
    expected = vision_macs(768, 12, 3072, 50, 3 * 32 * 32)
    assert (config.hidden_size, config.num_hidden_layers, config.intermediate_size, tokens) == (768, 12, 3072, 50)
    model = transformers.CLIPVisionModel(config)
    assert round(flops.count(model).gmacs * 1e9) == expected
    keep = [40, 30] + [20] * 10
    kept = [50, *(k + 1 for k in keep)]
    pooled = 49 * 3 * 32 * 32 * 768
    for n, left in itertools.pairwise(kept):
        pooled += n * 4 * 768**2 + 2 * n**2 * 768 + left * 2 * 768 * 3072
    assert round(flops.count(tokenpool.patch(model, "power_bert", keep)).gmacs * 1e9) == pooled
    small = create("clip")
    assert round(flops.count(small).gmacs * 1e9) == vision_macs(48, 3, 96, 37, 3 * 16 * 16) + 48 * 32


@pytest.mark.parametrize("family", ["vit", "dinov2 registers", "dinov3", "clip", "siglip", "siglip2 classes"])
@pytest.mark.slow
def test_budgets_and_parts(family: str) -> None:
    model = create(family)
    parts = flops.count(model).parts
    assert parts["mlp"] > 0 and parts["patch_embedding"] > 0 and parts.get("other", 0) == 0
    budget = sum(parts.values()) * 0.8
    for method in ("key_medoids", "tome"):
        keep = tokenpool.schedule_for(budget, model, method)
        cost = tokenpool.budget.ScheduleCost(model, tokenpool.METHODS[method])(keep)
        assert cost == round(flops.count(tokenpool.patch(model, method, keep)).gmacs * 1e9)
        assert 0.98 * budget <= flops.count(model).gmacs <= budget


@pytest.mark.parametrize("family", ["vit", "dinov3", "clip", "siglip2 classes"])
@torch.no_grad()
def test_saving_and_loading(family: str, tmp_path: Path) -> None:
    model, images = create(family), pictures()
    model.save_pretrained(tmp_path / "plain")
    names = set(safetensors.torch.load_file(tmp_path / "plain" / "model.safetensors"))
    pooled = run_with(model, "-9", images, "key_medoids")
    model.save_pretrained(tmp_path / "pooled")
    assert set(safetensors.torch.load_file(tmp_path / "pooled" / "model.safetensors")) == names

    loaded = type(model).from_pretrained(tmp_path / "pooled", attn_implementation="sdpa").eval()
    assert not tokenpool.is_patched(loaded)  # from_pretrained gives the plain model
    tokenpool.patch_from_config(loaded)
    assert torch.equal(hosts.of(loaded).run(images), pooled)
    assert hosts.of(loaded).setting == hosts.of(model).setting
    again = type(model).from_pretrained(tmp_path / "pooled")
    for unpatched in (tokenpool.unpatch(loaded), tokenpool.unpatch(again)):
        assert "tokenpool" not in unpatched.config.to_dict()
        with pytest.raises(ValueError, match="the configuration of the model has no setting of tokenpool"):
            tokenpool.patch_from_config(unpatched)


class Halved(tokenpool.Downsampler):
    uses_scores = False

    def reduce(self, tokens: Tensor, scores: Tensor | None) -> tokenpool.Downsampled:
        order = torch.arange(tokens.shape[1]).expand(tokens.shape[:2])
        return tokenpool.Downsampled(tokens[:, : self.keep], order.where(order < self.keep, -1))


@pytest.mark.parametrize(
    "patch",
    [
        lambda model: tokenpool.patch(model, "random", 0.8, generator=torch.Generator()),
        lambda model: tokenpool.patch(model, "convolution", at=[1]),
        lambda model: tokenpool.patch(model, "kmeans", 0.8, qk_norm="l2", learn_alpha=True),
        lambda model: tokenpool.patch(model, Halved, 0.8),
    ],
)
def test_settings_that_a_configuration_cannot_hold_are_not_stored(patch: Callable[[Any], Any], tmp_path: Path) -> None:
    model = tokenpool.patch(create("vit"), "kmedoids", 0.9)
    assert model.config.tokenpool["downsampler"] == "kmedoids"
    patch(model).save_pretrained(tmp_path)
    assert "tokenpool" not in model.config.to_dict()
    with pytest.raises(ValueError, match="or its patch had parameters, a method or options"):
        tokenpool.patch_from_config(type(model).from_pretrained(tmp_path))


def test_a_damaged_setting_is_refused() -> None:
    model = create("vit")
    for setting in ("kmedoids", {"keep": [1]}, {"downsampler": "kmedoids", "other": 1}):
        model.config.tokenpool = setting
        with pytest.raises(ValueError, match="is not a setting of tokenpool"):
            tokenpool.patch_from_config(model)
    model.config.tokenpool = {"downsampler": "kmedoids", "keep": [5]}
    with pytest.raises(ValueError, match="keep has 1 entries"):
        tokenpool.patch_from_config(model)


def test_files_of_tokenpool_are_for_timm(tmp_path: Path) -> None:
    model = create("vit")
    with pytest.raises(
        ValueError, match="a ViTForImageClassification is not saved by tokenpool.save: call its save_pre"
    ):
        tokenpool.save(model, tmp_path / "model.safetensors")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="load the weights of a ViTForImageClassification by its from_pretrained"):
        tokenpool.load_weights(model, tmp_path / "model.safetensors")


@pytest.mark.parametrize("family", ["vit alone", "dinov3", "clip alone", "siglip", "vit masked"])
@torch.no_grad()
def test_dense_features(family: str) -> None:
    model, images = create(family), pictures()
    tokenpool.patch(model, "kmedoids", [20, 9, 3], dense=True)
    adapter = hosts.of(model)
    trace, features = tokenpool.trace(model, images), adapter.tower(images).last_hidden_state[:, adapter.prefix :]
    assert features.shape == (2, 36, 48)
    for image, assignment in zip(features, trace.blocks[-1].assignment, strict=True):
        for token in range(3):
            assert len(image[assignment == token].unique(dim=0)) == 1


@torch.no_grad()
def test_images_of_another_size() -> None:
    images = torch.randn(2, 3, 128, 96)
    for family, options in (("vit", {"interpolate_pos_encoding": True}), ("dinov2", {}), ("dinov3", {})):
        model = create(family)
        plain = model(images, **options)[0][:, :1]
        tokenpool.patch(model, "key_medoids", [48] * 3)
        torch.testing.assert_close(model(images, **options)[0][:, :1], plain, atol=1e-5, rtol=1e-5)
    assert tokenpool.trace(model, images).grid == (8, 6)


@pytest.mark.parametrize("family", ["vit", "dinov3", "siglip2 classes"])
@pytest.mark.slow
@torch.no_grad()
def test_export(family: str) -> None:
    model, images = create(family), pictures()
    pooled = run_with(model, [20, 9, 3], images, "key_medoids")
    inputs = padded([(6, 6), (6, 6)]) if "siglip2" in family else {"pixel_values": images}
    exported = torch.export.export(model, (), inputs, strict=False).module()
    expected = model(**inputs).to_tuple()
    for found, value in zip(exported(**inputs).to_tuple(), expected, strict=True):
        torch.testing.assert_close(found, value, atol=1e-5, rtol=1e-5)
    assert "siglip2" in family or torch.equal(hosts.of(model).run(images), pooled)
    if "siglip2" in family:
        with pytest.raises(RuntimeError, match="a batch with padding cannot be compiled or exported"):
            exported(**padded([(6, 6), (3, 5)]))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small model with its image processor, as a user has it after a download."""
    create("vit").save_pretrained(tmp_path)
    transformers.ViTImageProcessor(size={"height": 96, "width": 96}).save_pretrained(tmp_path)
    return tmp_path


def test_pipeline_and_auto_classes(folder: Path) -> None:
    """Lines of transformers' documentation, then `patch`, then the same lines."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (120, 80, 3), dtype=np.uint8))
    classifier = transformers.pipeline("image-classification", model=str(folder), device="cpu")
    plain = classifier(image, top_k=7)
    tokenpool.patch(classifier.model, "key_medoids", [36] * 3)
    assert [each["label"] for each in classifier(image, top_k=7)] == [each["label"] for each in plain]
    tokenpool.patch(classifier.model, "key_medoids", gmacs=0.9 * flops.count(classifier.model).gmacs)
    pooled = classifier(image, top_k=7)
    assert pooled != plain and sum(each["score"] for each in pooled) == pytest.approx(1)

    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    model = transformers.AutoModelForImageClassification.from_pretrained(folder)
    tokenpool.patch(model, "key_medoids", hosts.of(classifier.model).setting.keep)
    inputs = processor(image, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits
    assert model.config.id2label[logits.argmax(-1).item()] == pooled[0]["label"]


@torch.no_grad()
def test_zero_shot_classification_with_clip() -> None:
    model, images = create("clip"), pictures()
    texts = torch.tensor([[1, 5, 7, 2], [1, 9, 30, 2], [1, 8, 4, 2]])
    plain = model(input_ids=texts, pixel_values=images)
    tokenpool.patch(model, "key_medoids", [36] * 3)
    kept = model(input_ids=texts, pixel_values=images)
    torch.testing.assert_close(kept.logits_per_image, plain.logits_per_image, atol=1e-4, rtol=1e-5)
    tokenpool.patch(model, "key_medoids", [20, 9, 3])
    pooled = model(input_ids=texts, pixel_values=images)
    assert torch.equal(pooled.text_embeds, plain.text_embeds)
    features = nn.functional.normalize(hosts.of(model).run(images), dim=-1)
    torch.testing.assert_close(pooled.image_embeds, features)
    assert not torch.allclose(pooled.logits_per_image, plain.logits_per_image, atol=1e-3)


@pytest.mark.slow
def test_trainer(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
    model = tokenpool.patch(create("dinov2"), "wkmedoids", [20, 9, 3])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    data = [{"pixel_values": image, "labels": index % 7} for index, image in enumerate(pictures(8))]
    arguments = {"max_steps": 3, "per_device_train_batch_size": 4, "report_to": "none", "use_cpu": True}
    arguments |= {"learning_rate": 1e-3, "save_strategy": "no", "disable_tqdm": True}
    options = transformers.TrainingArguments(str(tmp_path), **arguments)
    trainer = transformers.Trainer(model, options, train_dataset=data, eval_dataset=data)
    assert trainer.train().metrics["train_loss"] > 0
    assert trainer.evaluate()["eval_loss"] > 0
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert {name for name in before if "encoder.layer" in name and "k_proj.bias" not in name} <= changed
    trainer.save_model(tmp_path / "trained")
    loaded = type(model).from_pretrained(tmp_path / "trained", attn_implementation="sdpa").eval()
    with torch.no_grad():
        pooled = model.eval()(pictures()).logits
        assert torch.equal(tokenpool.patch_from_config(loaded)(pictures()).logits, pooled)

    refused = transformers.TrainingArguments(str(tmp_path), gradient_checkpointing=True, **arguments)
    with pytest.raises(ValueError, match="a pooled layer has no gradient checkpointing"):
        transformers.Trainer(model, refused, train_dataset=data).train()


def test_gradients_equal_those_of_the_plain_model() -> None:
    grads = []
    for pooled in (False, True):
        model = create("siglip classes")
        if pooled:
            tokenpool.patch(model, "wkmedoids", [36] * 3)
        model(pictures(), labels=torch.tensor([1, 2])).loss.backward()
        grads.append({name: value.grad for name, value in model.named_parameters() if value.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, atol=1e-5, rtol=1e-4)
