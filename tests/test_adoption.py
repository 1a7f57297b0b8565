"""What users put into a model's blocks stays there, or is refused, whatever patch and unpatch do."""

import copy
from collections.abc import Callable

import peft
import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.ao.quantization import quantize_dynamic
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

import tokenpool
from tokenpool import flops

KEEP = [30, 17, 5, 2]
pytestmark = pytest.mark.filterwarnings("ignore:.*(torch.ao.quantization|quantize_per_tensor):")


class LoRA(nn.Module):
    """Written by hand: it has no `weight`."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.down, self.up = nn.Linear(linear.in_features, 2, bias=False), nn.Linear(2, linear.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.up(self.down(x))


def by_hand(model: VisionTransformer) -> VisionTransformer:
    torch.manual_seed(1)
    for block in model.blocks:
        block.attn.qkv, block.attn.proj = LoRA(block.attn.qkv), LoRA(block.attn.proj)
        block.mlp.fc1 = LoRA(block.mlp.fc1)
    return model


def by_peft(model: VisionTransformer) -> VisionTransformer:
    torch.manual_seed(1)
    config = peft.LoraConfig(target_modules=["qkv", "attn.proj", "fc1"], init_lora_weights=False)
    return peft.inject_adapter_in_model(config, model).eval()


def by_torchao(model: VisionTransformer, config: object) -> VisionTransformer:
    quantize_(model, config)
    return model


def by_norms(model: VisionTransformer) -> VisionTransformer:
    torch.manual_seed(1)
    for block in model.blocks:
        nn.utils.parametrizations.weight_norm(block.attn.qkv)
        nn.utils.parametrizations.spectral_norm(block.mlp.fc1)
    return model


CHANGES: dict[str, Callable[[VisionTransformer], VisionTransformer]] = {
    "LoRA by hand": by_hand,
    "LoRA by peft": by_peft,
    "quantize_dynamic": lambda model: quantize_dynamic(model, {nn.Linear}),
    "torchao's int8 weights": lambda model: by_torchao(model, Int8WeightOnlyConfig()),
    "torchao's int8 all": lambda model: by_torchao(model, Int8DynamicActivationInt8WeightConfig()),
    "parametrizations": by_norms,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@torch.no_grad()
def test_what_stands_in_the_blocks_stays(small, photos, change: Callable) -> None:
    patched_before = tokenpool.patch(copy.deepcopy(small), "wkmedoids", KEEP, qk_norm="l2", learn_alpha=True)
    patched_before = change(patched_before)
    model = change(small)
    names, plain = list(model.state_dict()), model(photos)
    pooled = tokenpool.patch(model, "wkmedoids", KEEP, qk_norm="l2", learn_alpha=True)(photos)
    assert torch.equal(patched_before(photos), pooled)
    for one in (model, patched_before):  # changed before patch, and between patch and unpatch
        assert type(tokenpool.unpatch(one).blocks[0]) is timm.models.vision_transformer.Block
        assert torch.equal(one(photos), plain) and list(one.state_dict()) == names
        tokenpool.patch(one, "kmedoids", KEEP)
        again = tokenpool.patch(one, "wkmedoids", KEEP, qk_norm="l2", learn_alpha=True)  # anew
        assert torch.equal(again(photos), pooled)
        assert tokenpool.patch(one, "convolution", at=[1])(photos).isfinite().all()


def test_adapters_train_and_merge(small, photos) -> None:
    """peft's whole way: wrap, patch what is inside, train, unpatch, merge."""
    model = peft.get_peft_model(small, peft.LoraConfig(target_modules=["qkv", "fc1"], init_lora_weights=False))
    for call in (lambda: tokenpool.patch(model, "kmedoids", KEEP), lambda: tokenpool.unpatch(model)):
        tokenpool.patch(small, "wkmedoids", KEEP)
        with pytest.raises(TypeError, match="PeftModel only wraps .* on its `base_model.model`"):
            call()
    model(photos).square().sum().backward()
    graded = {name for name, parameter in small.named_parameters() if parameter.grad is not None}
    assert len(graded) == 4 * 2 * 2 and all("lora" in name for name in graded)
    adapted = tokenpool.unpatch(small).eval()(photos)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(photos), adapted, rtol=0, atol=1e-4)
    assert type(tokenpool.patch(merged, "wkmedoids", KEEP).blocks[0].attn.qkv) is nn.Linear


def test_merged_while_patched(small, photos) -> None:
    model = peft.get_peft_model(small, peft.LoraConfig(target_modules=["qkv", "fc1"], init_lora_weights=False)).eval()
    plain = small(photos)
    tokenpool.patch(small, "wkmedoids", KEEP)
    model.merge_and_unload()
    assert type(tokenpool.unpatch(small).blocks[0].attn.qkv) is nn.Linear
    torch.testing.assert_close(small(photos), plain, rtol=0, atol=1e-4)


def test_modes_and_frozen_parameters_stay(small) -> None:
    small.train()
    small.blocks[1].eval()
    small.blocks[2].mlp.requires_grad_(False)
    modes = {name: module.training for name, module in small.named_modules()}
    frozen = {name: parameter.requires_grad for name, parameter in small.named_parameters()}
    tokenpool.patch(small, "wkmedoids", KEEP)
    assert {name: small.get_submodule(name).training for name in modes} == modes
    assert [block.downsampler.training for block in small.blocks] == [True, False, True, True]
    small.blocks[3].eval()
    tokenpool.unpatch(small)
    expected = {name: False if name.startswith("blocks.3") else mode for name, mode in modes.items()}
    assert {name: module.training for name, module in small.named_modules()} == expected
    assert {name: parameter.requires_grad for name, parameter in small.named_parameters()} == frozen


def test_a_block_that_stands_twice_and_one_that_is_gone(small, photos) -> None:
    small.blocks[2], small.blocks[1].norm2 = small.blocks[1], small.blocks[1].norm1
    plain = small(photos)
    tokenpool.patch(small, "wkmedoids", KEEP)(photos)
    assert torch.equal(tokenpool.unpatch(small)(photos), plain) and small.blocks[2] is small.blocks[1]
    expected = nn.Sequential(*(small.blocks[index] for index in (0, 1, 2)))
    del tokenpool.patch(small, "wkmedoids", KEEP).blocks[3]
    assert list(tokenpool.unpatch(small).blocks) == list(expected)


def test_hooks_inside_stay(small, photos) -> None:
    calls = []
    for path in ("norm1", "attn.qkv", "attn.proj", "mlp", "mlp.fc1", "drop_path2"):
        module = small.blocks[1].get_submodule(path)
        module.register_forward_hook(lambda module, given, out, path=path: calls.append(path))
        module.register_forward_pre_hook(lambda module, given, path=path: calls.append(f"pre {path}"))
    small(photos)
    expected = calls.copy()
    for change in (lambda: tokenpool.patch(small, "wkmedoids", KEEP), lambda: tokenpool.unpatch(small)):
        change()
        calls.clear()
        small(photos)
        assert calls == expected and len(calls) == 12


def _ignore(*given: object) -> None:
    pass


GIVEN = {
    "a forward hook": lambda module: module.register_forward_hook(_ignore),
    "a forward pre-hook": lambda module: module.register_forward_pre_hook(_ignore),
    "a backward hook": lambda module: module.register_full_backward_hook(_ignore),
    "a backward pre-hook": lambda module: module.register_full_backward_pre_hook(_ignore),
    "a state-dict hook": lambda module: module.register_state_dict_post_hook(_ignore),
    "a state-dict pre-hook": lambda module: module.register_state_dict_pre_hook(_ignore),
    "a load-state-dict pre-hook": lambda module: module.register_load_state_dict_pre_hook(_ignore),
    "a load-state-dict post-hook": lambda module: module.register_load_state_dict_post_hook(_ignore),
    "a parameter or buffer 'prompt' of its own": lambda module: setattr(module, "prompt", nn.Parameter(torch.ones(1))),
    "a forward method of its own": lambda module: setattr(module, "forward", module.forward),
}


@pytest.mark.parametrize("kind, give", GIVEN.items(), ids=GIVEN)
@pytest.mark.parametrize(
    "path, name", [("blocks", "model.blocks"), ("blocks.2", r"blocks\[2\]"), ("blocks.2.attn", r"blocks\[2\].attn")]
)
def test_what_would_be_lost_is_refused(small, photos, kind: str, give: Callable, path: str, name: str) -> None:
    patched = tokenpool.patch(copy.deepcopy(small), "wkmedoids", KEEP, qk_norm="l2", learn_alpha=True)
    for model in (small, patched):
        give(model.get_submodule(path))
        before, kept = tokenpool.is_patched(model), model(photos)
        for call in (tokenpool.unpatch,) if before else ():
            with pytest.raises(ValueError, match=f"{name} has {kind}, which would be lost"):
                call(model)
        with pytest.raises(ValueError, match=f"{name} has {kind}, which would be lost"):
            tokenpool.patch(model, "kmedoids", KEEP)
        assert tokenpool.is_patched(model) == before and torch.equal(model(photos), kept)


def test_replaced_modules_are_refused(small) -> None:
    plain = copy.deepcopy(small)
    plain.blocks[1].attn = nn.Sequential(plain.blocks[1].attn)
    with pytest.raises(TypeError, match="block 1 is a Sequential, which cannot be pooled: no adapter exists"):
        tokenpool.patch(plain, "wkmedoids", KEEP)
    tokenpool.patch(small, "wkmedoids", KEEP)
    for module, name in ((small.blocks[1], "attn"), (small.blocks, "2")):
        before = module.get_submodule(name)
        setattr(module, name, nn.Sequential(before))
        with pytest.raises(TypeError, match=r"is a Sequential and would be lost: put the \w+ of patch back"):
            tokenpool.unpatch(small)
        setattr(module, name, before)
    tokenpool.unpatch(small)
    small.blocks = type("Mine", (nn.Sequential,), {})(*small.blocks)
    with pytest.raises(TypeError, match="model.blocks is a Mine"):
        tokenpool.patch(small, "wkmedoids", KEEP)


@pytest.mark.parametrize("wrap, inner", [(torch.compile, "_orig_mod"), (nn.DataParallel, "module")])
def test_wrappers_name_what_is_inside(small, wrap: Callable, inner: str) -> None:
    for call in (lambda model: tokenpool.patch(model, "kmedoids", KEEP), tokenpool.unpatch):
        with pytest.raises(TypeError, match=f"call patch and unpatch on its `{inner}`"):
            call(wrap(tokenpool.patch(small, "wkmedoids", KEEP)))


@pytest.mark.slow
def test_adapters_count_with_their_layers(small) -> None:
    plain = flops.count(tokenpool.patch(small, "wkmedoids", KEEP)).parts
    model = peft.get_peft_model(small, peft.LoraConfig(r=8, target_modules=["qkv"]))
    for counted in (model, small):
        parts = flops.count(counted).parts
        added = 8 * (48 + 144) * (37 + 31 + 18 + 6) / 1e9  # rank 8 at the tokens that enter each block
        assert parts.pop("qkv_projections") == pytest.approx(plain["qkv_projections"] + added)
        assert parts == {name: value for name, value in plain.items() if name != "qkv_projections"}


def test_quantised_models_cannot_be_counted(small) -> None:
    model = quantize_dynamic(small, {nn.Linear})
    with pytest.raises(ValueError, match="cannot count this model.* schedule, before it is quantised"):
        tokenpool.patch(model, "wkmedoids", gmacs=0.01)
