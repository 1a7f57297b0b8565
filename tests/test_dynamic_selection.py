"""DynamicViT: its predictor against a loop, its masks against dropping, and its losses."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import timm
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

import tokenpool
from tokenpool import flops
from tokenpool.attention import Asked, ScoredAttention
from tokenpool.downsampling import DynamicSelection, Masked
from tokenpool.training import dynamic_selection
from tokenpool.training.data import DigitsDataModule
from tokenpool.training.module import ClassificationModule
from tokenpool.training.recipe import Recipe

KEEP = [36, 20, 20, 9]


def gelu(x: np.ndarray) -> np.ndarray:
    return np.vectorize(lambda value: value * (1 + math.erf(value / math.sqrt(2))) / 2)(x)


def linear(layer: nn.Linear, x: np.ndarray) -> np.ndarray:
    return x @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()


def kept_by_hand(layer: DynamicSelection, tokens: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """One image: log-probabilities (N, 2) of keeping and dropping, from section 3.2 of the paper."""
    norm, first, _ = layer.embed
    mean, variance = tokens.mean(1, keepdims=True), tokens.var(1, keepdims=True)
    normed = (tokens - mean) / np.sqrt(variance + norm.eps) * norm.weight.detach().numpy() + norm.bias.detach().numpy()
    z = gelu(linear(first, normed))
    half = (tokens.shape[1] + 1) // 2
    shared = sum(w * row[half:] for w, row in zip(weights, z, strict=True)) / weights.sum()
    z = np.stack([np.concatenate([row[:half], shared]) for row in z])
    logits = linear(layer.decide[4], gelu(linear(layer.decide[2], gelu(linear(layer.decide[0], z)))))
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


@pytest.mark.parametrize("width", [8, 7])
@torch.no_grad()
def test_the_predictor_equals_a_loop(width: int) -> None:
    torch.manual_seed(0)
    layer = DynamicSelection(5, width).double().eval()
    for parameter in layer.parameters():
        parameter.normal_()
    tokens = torch.randn(3, 12, width, dtype=torch.float64)
    found = layer(tokens)
    assert [tuple(part.weight.shape) for part in layer.decide[::2]] == [
        (width // 2, width),
        (width // 4, width // 2),
        (2, width // 4),
    ]
    for image in range(3):
        expected = kept_by_hand(layer, tokens[image].numpy(), np.ones(12))
        best = sorted(sorted(range(12), key=lambda i: -expected[i, 0])[:5])
        assert torch.equal(found.tokens[image], tokens[image, best])
        assert np.flatnonzero(found.assignment[image].numpy() >= 0).tolist() == best
    layer.train()
    sizes = torch.rand(3, 12, dtype=torch.float64) + 0.1
    keeps = torch.stack([layer(tokens, sizes=sizes).mask > 0.5 for _ in range(2000)]).double().mean(0)
    for image in range(3):  # a draw keeps a token with the probability that the predictor gives
        expected = np.exp(kept_by_hand(layer, tokens[image].numpy(), sizes[image].numpy())[:, 0])
        np.testing.assert_allclose(keeps[image].numpy(), expected, atol=0.05)


@torch.no_grad()
def decided(model: nn.Module, images: Tensor) -> nn.Module:
    """Let each predictor keep half of the tokens, and make it so sure that its draws are not random."""
    for layer in dynamic_selection.layers(model.train()):
        seen: list[Tensor] = []
        handle = layer.decide.register_forward_hook(lambda _, __, found, seen=seen: seen.append(found))
        model(images)
        handle.remove()
        last = layer.decide[4]
        last.bias[0] -= (seen[0][:, :, 0] - seen[0][:, :, 1]).median() + 1e-5
        last.weight *= 1e6
        last.bias *= 1e6
    return model


@torch.no_grad()
@pytest.mark.parametrize("carry", [False, True])
def test_masks_in_training_have_the_effect_of_dropping(small, photos, carry: bool) -> None:
    torch.manual_seed(1)
    for image in photos.split(1):
        model = decided(tokenpool.patch(small, "dynamicvit", [36, 18, 9, 9], carry=carry), image)
        with dynamic_selection.recorded(model) as decisions:
            logits = model(image)
        first, second = (int((kept > 0.5).sum()) for kept, _ in decisions)
        assert 36 > first > second > 0 and logits.shape == (1, 7)
        dropped = tokenpool.patch(copy.deepcopy(model), "dynamicvit", [36, first, second, second]).eval()
        for layer, source in zip(*map(dynamic_selection.layers, (dropped, model)), strict=True):
            layer.load_state_dict(source.state_dict())
        torch.testing.assert_close(logits, dropped(image), rtol=0, atol=1e-4)


@torch.no_grad()
def test_masks_change_what_later_blocks_see(small, photos) -> None:
    plain = small(photos)
    model = decided(tokenpool.patch(small, "dynamicvit", [36, 18, 9, 9]), photos)
    assert not torch.allclose(model(photos), plain, atol=1e-3)


def test_gradients_of_masks_equal_those_of_masked_attention() -> None:
    """Against the masked softmax of the paper: exp(a_ij) G_j / sum_k exp(a_ik) G_k."""
    torch.manual_seed(0)
    host = timm.create_model("deit_tiny_patch16_224", depth=1).blocks[0].attn.double()
    attention, x = ScoredAttention(host), torch.randn(2, 6, 192, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1e-6, 1, 1e-6, 1], [1e-6, 1, 1, 1, 1, 1e-6]], dtype=torch.float64)

    def masked(weights: Tensor) -> Tensor:
        q, k, v = attention.project(x)
        weighted = (q @ k.mT * attention.scale).exp() * weights[:, None, None, :]
        return attention.proj(((weighted / weighted.sum(-1, keepdim=True)) @ v).transpose(1, 2).flatten(2))

    ours, theirs = mask.clone().requires_grad_(), mask.clone().requires_grad_()
    direction = torch.randn(2, 6, 192, dtype=torch.float64)
    (attention(x, Asked(ours)).output * direction).sum().backward()
    (masked(theirs) * direction).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    assert ours.grad.isfinite().all() and (ours.grad != 0).all()


def test_predictors_are_only_where_tokens_go(small) -> None:
    model = tokenpool.patch(small, "dynamicvit", KEEP, carry=False)
    assert [block.downsampler is not None for block in model.blocks] == [False, True, False, True]
    assert model.blocks.setting.carry  # the masks of training are sizes
    names = [name for name in model.state_dict() if "downsampler" in name]
    assert len(names) == 2 * 10 and all(name.startswith(("blocks.1.", "blocks.3.")) for name in names)


def test_budgets_leave_random_numbers_alone_and_are_met(small) -> None:
    plain, state = flops.count(small).gmacs, torch.get_rng_state()
    keep = tokenpool.schedule_for(0.8 * plain, small, "dynamicvit")
    assert torch.equal(torch.get_rng_state(), state)
    model = tokenpool.patch(small, "dynamicvit", keep)
    assert 0.78 * plain <= flops.count(model).gmacs <= 0.8 * plain


def test_predictors_are_saved(small, photos, tmp_path) -> None:
    model = tokenpool.patch(small, "dynamicvit", KEEP).eval()
    tokenpool.save(model, tmp_path / "model.safetensors")
    torch.testing.assert_close(tokenpool.load(tmp_path / "model.safetensors").eval()(photos), model(photos))


# The losses.


def test_losses_by_hand(small, photos) -> None:
    torch.manual_seed(0)
    model = tokenpool.patch(small, "dynamicvit", KEEP)
    teacher = dynamic_selection.teacher_of(model)
    model.train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    torch.manual_seed(2)
    with dynamic_selection.recorded(model) as decisions:
        features = model.forward_features(photos)
    logits, target = model.forward_head(features), teacher.forward_features(photos)
    ratio = np.mean(
        [
            (kept[i].mean().item() - k / 36) ** 2
            for (kept, _), k in zip(decisions, (20, 9), strict=True)
            for i in range(5)
        ]
    )
    chosen = [(i, j) for i in range(5) for j in range(36) if decisions[-1].kept[i, j] > 0.5]
    tokens = np.mean([float((features[i, 1 + j] - target[i, 1 + j]).square().mean()) for i, j in chosen])
    p, q = teacher.forward_head(target).softmax(-1), logits.softmax(-1)
    kl = float((p * (p / q).log()).sum() / 5)
    assert 0 < len(chosen) < 5 * 36 and min(ratio, tokens, kl) > 0
    for weights, expected in (((2.0, 0.5), 2 * ratio + 0.5 * (tokens + kl)), ((1.0, 0.0), ratio)):
        torch.manual_seed(2)
        found, loss = dynamic_selection.losses(model, teacher, photos, *weights)
        torch.testing.assert_close(found, logits)
        assert float(loss) == pytest.approx(expected, rel=1e-4)
    torch.manual_seed(2)
    assert float(dynamic_selection.losses(model, None, photos, 2.0, 0.5)[1]) == pytest.approx(2 * ratio, rel=1e-4)


def test_every_parameter_learns_and_the_teacher_does_not(small, photos) -> None:
    model = tokenpool.patch(small, "dynamicvit", KEEP).train()
    teacher = dynamic_selection.teacher_of(model)
    assert not tokenpool.is_patched(teacher) and list(teacher.state_dict()) == [
        name for name in model.state_dict() if "downsampler" not in name
    ]
    logits, loss = dynamic_selection.losses(model, teacher, photos, 2.0, 0.5)
    (loss + logits.square().sum()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_many_blocks_drop_a_token_once() -> None:
    """Its size stays the least weight, and gradients stay finite, where the product of ten masks would be zero."""
    torch.manual_seed(0)
    model = timm.create_model("deit_tiny_patch16_224", img_size=64, embed_dim=24, depth=11, num_heads=2, num_classes=5)
    model = tokenpool.patch(model, "dynamicvit", [15, 14, 13, 12, 10, 8, 6, 4, 3, 2, 1]).train()
    images, drawn = torch.randn(8, 3, 64, 64), []
    draw = torch.nn.functional.gumbel_softmax
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.nn.functional.gumbel_softmax", lambda *a, **k: drawn.append(draw(*a, **k)) or drawn[-1])
        with dynamic_selection.recorded(model) as decisions:
            logits = model(images)
    assert len(decisions) == len(drawn) == 11
    expected = torch.ones(8, 16)
    for (kept, _), choice in zip(decisions, drawn, strict=True):
        expected = expected * choice[:, :, 0]  # section 3.2: a token once dropped stays dropped
        torch.testing.assert_close(kept, expected.clamp(min=1e-6), rtol=1e-4, atol=0)
    (logits.square().mean() + dynamic_selection.ratio_loss(decisions)).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_the_ratio_loss_teaches_the_schedule(small, photos) -> None:
    model = tokenpool.patch(small, "dynamicvit", [36, 30, 9, 9]).train()
    parameters = [each for layer in dynamic_selection.layers(model) for each in layer.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=3e-3)
    torch.manual_seed(0)
    shares = []
    for _ in range(60):
        with dynamic_selection.recorded(model) as decisions:
            model(photos)
        loss = dynamic_selection.ratio_loss(decisions)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        shares.append([float(kept.mean()) for kept, _ in decisions])
    start, end = np.mean(shares[:5], axis=0), np.mean(shares[-10:], axis=0)
    np.testing.assert_allclose(end, (30 / 36, 9 / 36), atol=0.07)
    assert abs(start[0] - 30 / 36) > 0.15


TINY: dict[str, Any] = {"embed_dim": 16, "depth": 3, "num_heads": 2, "patch_size": 4, "weight_init": "jax"}


@pytest.mark.parametrize("distillation", [0.0, 0.5])
def test_training_uses_the_losses(tmp_path, monkeypatch: pytest.MonkeyPatch, distillation: float) -> None:
    torch.manual_seed(0)
    model = tokenpool.create_model("deit_digits_patch2_16", "dynamicvit", [16, 8, 8], **TINY)
    start = copy.deepcopy(model.state_dict())
    recipe = Recipe(batch_size=64, ratio_penalty=3.0, distillation=distillation)
    module = ClassificationModule(model, 10, recipe)
    calls = []
    losses = dynamic_selection.losses

    def spied(*given: Any) -> tuple[Tensor, Tensor]:
        calls.append(given)
        return losses(*given)

    monkeypatch.setattr(dynamic_selection, "losses", spied)
    silent = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    trainer = Trainer(default_root_dir=tmp_path, enable_checkpointing=False, max_steps=2, **silent)
    trainer.fit(module, datamodule=DigitsDataModule(recipe))
    assert [call[3:] for call in calls] == [(3.0, distillation)] * 2
    assert (module.teacher is None) == (distillation == 0)
    after = module.model.state_dict()
    assert not torch.equal(after["blocks.1.downsampler.decide.4.weight"], start["blocks.1.downsampler.decide.4.weight"])
    for name, value in module.teacher.state_dict().items() if module.teacher is not None else ():
        assert torch.equal(value, start[name]), name
    assert not ClassificationModule(tokenpool.patch(model, "power_bert", [16, 8, 8]), 10, recipe).predicts


def test_a_masked_output_is_only_for_training() -> None:
    layer, tokens = DynamicSelection(3, 4), torch.randn(2, 6, 4)
    assert isinstance(layer.train()(tokens, sizes=torch.ones(2, 6)), Masked)
    assert layer.eval()(tokens).tokens.shape == (2, 3, 4)
    assert layer.train()(tokens[:, :3]).tokens.shape == (2, 3, 4)
