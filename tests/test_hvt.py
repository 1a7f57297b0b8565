"""HVT's max pooling, held against PyTorch's own pooling and a loop over windows."""

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import tokenpool
from tokenpool import flops
from tokenpool.downsampling import HierarchicalPooling, Host


@settings(max_examples=30, deadline=None, derandomize=True)
@given(n=st.integers(3, 40), seed=st.integers(0, 1000))
def test_pooling_equals_pytorch_s_and_tokens_go_to_the_nearest_centre(n: int, seed: int) -> None:
    torch.manual_seed(seed)
    layer, tokens = HierarchicalPooling(5, (1, n)), torch.randn(2, n, 5)
    with torch.no_grad():
        layer.position.normal_()
    found = layer(tokens)
    expected = F.max_pool1d(tokens.mT, kernel_size=3, stride=2).mT
    assert found.tokens.shape[1] == layer.keep
    torch.testing.assert_close(found.tokens, expected + layer.position)
    windows = [range(2 * k, 2 * k + 3) for k in range(layer.keep)]
    for token in range(n):
        if any(token in window for window in windows):
            index = min(range(layer.keep), key=lambda k, token=token: (abs(windows[k][1] - token), -k))
            assert token in windows[index]
        else:
            index = -1
        assert found.assignment[:, token].tolist() == [index, index]


def test_a_model_with_pooling_starts_without_position_and_costs_what_its_tokens_cost(photos) -> None:
    size = {"img_size": 96, "embed_dim": 48, "depth": 4, "num_heads": 3}
    model = tokenpool.create_model("deit_tiny_patch16_224", "hvt", at=[0, 2], **size).eval()
    trace = tokenpool.trace(model, photos)
    assert [block.tokens for block in trace.blocks] == [17, 17, 8, 8]
    assert not any(model.blocks[block].downsampler.position.any() for block in (0, 2))
    plain = timm.create_model("deit_tiny_patch16_224", **size)
    same_tokens = flops.count(tokenpool.patch(plain, "power_bert", [17, 17, 8, 8])).gmacs
    assert flops.count(model).gmacs == same_tokens
    model.train()(photos).sum().backward()
    assert all(parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize(
    "at, gflops", [([0], 2.40), ([0, 6], 1.94), ([0, 4, 8], 1.62), ([0, 3, 6, 9], 1.39)], ids=lambda value: str(value)
)
def test_token_counts_are_those_of_the_published_models(at: list[int], gflops: float) -> None:
    """HVT-S-1 to HVT-S-4 pool after the first block of each of 1 to 4 stages; costs from the authors' README."""
    host = Host(depth=12, width=384, grid=(14, 14), reads_patches=True)
    macs, n = 196 * 768 * 384 + 384 * 1000, 196
    for layer in HierarchicalPooling.for_blocks(host, None, at=at):
        macs += 12 * n * 384**2 + 2 * n * n * 384
        n = n if layer is None else layer.keep
    assert macs / 1e9 == pytest.approx(gflops, abs=0.0051)


@pytest.mark.parametrize("name", ["hvt", "convolution"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keep": [1, 1], "at": [0]}, "takes no keep"),
        ({}, r"at = \(\) must list different blocks"),
        ({"at": [1, 0]}, "ascending order, in 0..1"),
        ({"at": [2]}, "ascending order, in 0..1"),
    ],
)
def test_misuse_of_layers_at_blocks_is_named(name: str, arguments: dict, message: str) -> None:
    model = timm.create_model("deit_tiny_patch16_224", depth=2)
    with pytest.raises(ValueError, match=message):
        tokenpool.patch(model, name, **arguments)
    with pytest.raises(ValueError, match=f"{name!r} has no schedule that could meet a budget"):
        tokenpool.patch(model, name, gmacs=0.1, at=[0])


def test_too_few_tokens_are_named() -> None:
    model = timm.create_model("deit_tiny_patch16_224", img_size=32, depth=2)
    with pytest.raises(ValueError, match=r"at = \[0, 1\]: only 1 tokens are left at block 1, expected at least 3"):
        tokenpool.patch(model, "hvt", at=[0, 1])
    with pytest.raises(ValueError, match="expects 4 tokens, got 5"):
        HierarchicalPooling(2, (2, 2))(torch.zeros(1, 5, 2))
