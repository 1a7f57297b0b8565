"""The pooled blocks: what a patched model computes, held against timm's own model and against invariants."""

import pytest
import torch

import tokenpool
from tokenpool import gpu
from tokenpool.downsampling import METHODS, with_schedule

TOKEN_METHODS = with_schedule()
KEEP = [30, 17, 5, 2]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("method", TOKEN_METHODS)
@pytest.mark.parametrize("carry", [False, True])
def test_keeping_all_equals_timm(small, photos, method: str, carry: bool) -> None:
    expected, keys = small(photos), list(small.state_dict())
    tokenpool.patch(small, method, [36, 36, 99, 36], carry=carry)
    torch.testing.assert_close(small(photos), expected, rtol=0, atol=1e-5)
    assert list(small.state_dict()) == keys


def test_an_empty_batch_passes(small, photos) -> None:
    assert tokenpool.patch(small, "power_bert", KEEP)(photos[:0]).shape == (0, 7)


@pytest.mark.parametrize("method", TOKEN_METHODS)
def test_tokens_kept_follow_the_schedule(small, photos, method: str) -> None:
    tokenpool.patch(small, method, [30, 40, 5, 0], carry=False)
    blocks = tokenpool.trace(small, photos).blocks
    assert [block.tokens for block in blocks] == [30, 30, 5, 0]
    assert (blocks[-1].assignment == -1).all()


@pytest.mark.parametrize("method", TOKEN_METHODS)
@pytest.mark.parametrize("carry", [False, True])
def test_an_image_does_not_depend_on_its_batch(small, photos, method: str, carry: bool) -> None:
    tokenpool.patch(small, method, KEEP, carry=carry)
    together = small(photos)
    assert torch.equal(small(photos), together)
    for image in range(len(photos)):
        torch.testing.assert_close(small(photos[image : image + 1])[0], together[image], rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", TOKEN_METHODS)
def test_every_parameter_gets_a_gradient(small, photos, method: str) -> None:
    # A predictor in the last block would learn nothing from the logits: no attention follows its decisions.
    tokenpool.patch(small, method, [30, 17, 5, 5] if method == "dynamicvit" else KEEP, carry=False).train()
    small(photos).square().sum().backward()
    for name, parameter in small.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


def test_carry_makes_merging_equal_tokens_exact(small) -> None:
    """Images of equal patches, no position embedding: merging loses nothing when sizes are carried."""
    torch.nn.init.zeros_(small.pos_embed)
    tiles = torch.randn(2, 3, 16, 16)
    image = torch.cat([tiles[0].repeat(1, 6, 2), tiles[1].repeat(1, 6, 4)], -1)[None]  # 12 patches and 24 patches
    plain = small(image)
    tokenpool.patch(small, "kmedoids", [2, 2, 2, 2], carry=True, init="random", seed=3)
    assert len(tokenpool.trace(small, image).blocks[0].assignment.unique()) == 2
    torch.testing.assert_close(small(image), plain, rtol=1e-4, atol=1e-4)
    tokenpool.patch(small, "kmedoids", [2, 2, 2, 2], carry=False, init="random", seed=3)
    assert not torch.allclose(small(image), plain, atol=1e-2)


def test_an_empty_cluster_attracts_nothing(small, photos) -> None:
    torch.nn.init.zeros_(small.pos_embed)
    image = photos[:1, :, :16, :16].repeat(1, 1, 6, 6)  # 36 equal patches: all clusters but one stay empty
    plain = small(image)
    logits = tokenpool.patch(small, "wkmedoids", [9, 7, 3, 2], carry=True)(image)
    torch.testing.assert_close(logits, plain, rtol=1e-4, atol=1e-4)
    assert tokenpool.patch(small, "wkmeans", [9, 7, 3, 2], carry=False)(image).isfinite().all()


@pytest.mark.parametrize(
    "method, backend",
    [("tome", "eager")]
    + [pytest.param(method, "eager", marks=pytest.mark.slow) for method in ("power_bert", "random", "kmeans")]
    + [pytest.param("wkmedoids", "inductor", marks=pytest.mark.slow)],
)
def test_compiled_model_equals_eager(small, photos, method: str, backend: str) -> None:
    """As one graph; Inductor's code generation takes most of the time and is the same for all methods."""
    tokenpool.patch(small, method, KEEP)
    with torch.no_grad():
        compiled = torch.compile(small, fullgraph=True, backend=backend)
        torch.testing.assert_close(compiled(photos), small(photos), rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", ["wkmedoids", "key_medoids", "tome"])
def test_autocast(small, photos, method: str) -> None:
    tokenpool.patch(small, method, KEEP)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.allclose(small(photos).float(), small(photos).float())
        assert small(photos).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "method",
    ["wkmedoids", "kmeans", "importance", "key_medoids", "tome", "convolution", tokenpool.soft_selection.SoftSelection],
)
def test_half_and_double_models(small, photos, method, dtype: torch.dtype) -> None:
    options = {"at": [1]} if method == "convolution" else {"keep": KEEP} if isinstance(method, str) else {}
    trace = tokenpool.trace(tokenpool.patch(small.to(dtype), method, **options), photos.to(dtype))
    assert trace.logits.dtype == dtype and trace.logits.isfinite().all()


def test_tokens_that_are_not_finite_are_named(small, photos) -> None:
    photos[3] = torch.nan
    with pytest.raises(ValueError, match="image 3 of the batch"):
        tokenpool.patch(small, "wkmedoids", KEEP)(photos)


@pytest.mark.parametrize("method", ["wkmeans", "kmedoids", "key_medoids", "tome"])
@torch.no_grad()
def test_dense_features_are_the_tokens_put_back(small, photos, method: str) -> None:
    sparse = tokenpool.patch(small, method, KEEP).forward_features(photos)  # (B, 1 + K, D)
    assignment = tokenpool.trace(small, photos).blocks[-1].assignment
    logits = small(photos)
    dense = tokenpool.patch(small, method, KEEP, dense=True).forward_features(photos)  # (B, 1 + N, D)
    assert dense.shape == (5, 37, 48)
    torch.testing.assert_close(dense[:, 1:], tokenpool.unpool(sparse[:, 1:], assignment))
    torch.testing.assert_close(dense[:, 0], sparse[:, 0])
    torch.testing.assert_close(small(photos), logits)


def test_unpool_by_hand() -> None:
    tokens = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    back = tokenpool.unpool(tokens, torch.tensor([[1, 0, -1, 1]]))
    assert back.tolist() == [[[3.0, 4.0], [1.0, 2.0], [0.0, 0.0], [3.0, 4.0]]]
    assert tokenpool.unpool(tokens[:, :0], torch.full((1, 3), -1)).tolist() == [[[0.0, 0.0]] * 3]


@pytest.mark.parametrize("method", TOKEN_METHODS)
@pytest.mark.parametrize("carry", [False, True])
@pytest.mark.parametrize("at_once", [1, 48 * 37, 2 * 48 * 37])
def test_a_few_images_at_a_time_give_the_same(small, photos, monkeypatch, method: str, carry: bool, at_once) -> None:
    tokenpool.patch(small, method, KEEP, carry=carry, dense=METHODS[method].merges)
    with torch.no_grad():
        expected = small(photos)
        monkeypatch.setattr(tokenpool.micro_batch, "BLOCK_FLOATS", at_once)
        torch.testing.assert_close(small(photos), expected, rtol=0, atol=1e-5)
        assert small(photos[:0]).shape == (0, 7)


def test_a_few_images_at_a_time_travel_together_when_they_are_few_tokens(small, photos, monkeypatch) -> None:
    calls = []
    tokenpool.patch(small, "power_bert", KEEP)
    for block in small.blocks:
        block.feed_forward = lambda tokens, block=block: (
            calls.append(len(tokens)) or type(block).feed_forward(block, tokens)
        )
    monkeypatch.setattr(tokenpool.micro_batch, "BLOCK_FLOATS", 2 * 48 * 37)
    images = torch.cat([photos, photos])[:5]
    with torch.no_grad():
        small(images)
    assert calls == [2, 2, 1, 2, 2, 1, 4, 1, 5]  # 36 + 1 tokens, 30 + 1, 17 + 1, 5 + 1
    calls.clear()
    small(images)
    assert calls == [5, 5, 5, 5]  # with gradients, all at once


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_model_traced_with_one_image_takes_more(small, photos) -> None:
    tokenpool.patch(small, "wkmedoids", KEEP)
    with torch.no_grad():
        traced = torch.jit.trace(small, photos[:1], check_trace=False)
        torch.testing.assert_close(traced(photos), small(photos), rtol=0, atol=1e-4)


def test_hooks_see_whole_batches(small, photos, monkeypatch) -> None:
    monkeypatch.setattr(tokenpool.micro_batch, "BLOCK_FLOATS", 1)
    tokenpool.patch(small, "wkmedoids", KEEP)
    seen = []
    handle = small.blocks[2].attn.register_forward_hook(lambda module, given, out: seen.append(len(out.output)))
    with torch.no_grad():
        small(photos)
        assert seen == [len(photos)]
        assert len(tokenpool.trace(small, photos).blocks[1].assignment) == len(photos)
    handle.remove()


@pytest.mark.slow
@pytest.mark.parametrize("carry, qk_norm", [(False, None), (True, "l2")])
@pytest.mark.usefixtures("triton_runs")
def test_kernels_give_the_same(small, photos, carry: bool, qk_norm: str | None) -> None:
    small, photos = small.to(DEVICE), photos.to(DEVICE)
    photos = photos[:2]
    tokenpool.patch(small, "wkmedoids", [30, 17, 5, 2], carry=carry, qk_norm=qk_norm)
    with torch.no_grad():
        expected = small(photos)
        with gpu.using("triton"):
            torch.testing.assert_close(small(photos), expected, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("triton_runs")
def test_kernels_give_the_same_gradients(small, photos) -> None:
    small, photos = small.to(DEVICE), photos.to(DEVICE)
    tokenpool.patch(small, "wkmedoids", [30, 17, 5, 2])
    found = []
    for choice in ("plain", "triton"):
        small.zero_grad()
        with gpu.using(choice):
            small(photos[:2]).square().sum().backward()
        found.append({name: parameter.grad.clone() for name, parameter in small.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-3, atol=1e-4, msg=name)
