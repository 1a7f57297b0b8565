import copy
import inspect
import pickle

import numpy as np
import pytest
import timm
import torch

import tokenpool
from experiments.throughput import peak_memory
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


def test_none_equals_timm(small, photos) -> None:
    expected = small(photos)
    assert torch.equal(tokenpool.patch(small, "none")(photos), expected)
    state = small.state_dict()
    options = {"img_size": 96, "embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 7}
    created = tokenpool.create_model("deit_tiny_patch16_224", **options).eval()
    created.load_state_dict(state)
    assert torch.equal(created(photos), expected)


def test_patch_and_create_model_have_the_same_defaults() -> None:
    patch, create = (inspect.signature(function).parameters for function in (tokenpool.patch, tokenpool.create_model))
    shared = set(patch) & set(create) - {"downsampler"}  # which create_model alone can do without
    assert {"keep", "gmacs", "carry", "qk_norm", "alpha", "learn_alpha", "dense"} <= shared
    assert {name: patch[name].default for name in shared} == {name: create[name].default for name in shared}
    size = {"img_size": 96, "embed_dim": 48, "depth": 4, "num_heads": 3}
    assert tokenpool.create_model("deit_tiny_patch16_224", "wkmedoids", KEEP, **size).blocks.setting.carry


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
def test_checkpoints_go_in_and_out(small, photos, method: str) -> None:
    state = copy.deepcopy(small.state_dict())
    patched = tokenpool.patch(copy.deepcopy(small), method, KEEP)
    expected = patched(photos)
    assert not torch.allclose(expected, small(photos))
    fresh = tokenpool.create_model(
        "deit_tiny_patch16_224",
        method,
        KEEP,
        carry=True,
        img_size=96,
        embed_dim=48,
        depth=4,
        num_heads=3,
        num_classes=7,
    ).eval()
    fresh.load_state_dict(state)
    assert torch.equal(fresh(photos), expected)
    small.load_state_dict(fresh.state_dict())


@pytest.mark.parametrize("method", TOKEN_METHODS)
def test_patch_is_reversible(small, photos, method: str) -> None:
    plain = small(photos)
    first = tokenpool.patch(small, method, KEEP)(photos)
    assert torch.equal(tokenpool.unpatch(small)(photos), plain)
    assert not tokenpool.is_patched(small)
    assert torch.equal(tokenpool.patch(small, method, KEEP)(photos), first)
    assert torch.equal(
        tokenpool.patch(small, "power_bert", KEEP)(photos), tokenpool.patch(small, "power_bert", KEEP)(photos)
    )


def test_unpatch_keeps_training(small, photos) -> None:
    tokenpool.patch(small, "wkmedoids", KEEP).train()
    small(photos).sum().backward()
    with torch.no_grad():
        for parameter in small.parameters():
            parameter -= 0.01 * parameter.grad
    state = copy.deepcopy(small.state_dict())
    tokenpool.unpatch(small)
    assert small.blocks[0].training
    assert all(torch.equal(value, state[key]) for key, value in small.state_dict().items())


@pytest.mark.parametrize("method", TOKEN_METHODS)
def test_every_parameter_gets_a_gradient(small, photos, method: str) -> None:
    tokenpool.patch(small, method, KEEP, carry=False).train()
    small(photos).square().sum().backward()
    for name, parameter in small.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


def test_scores_are_the_attention_received(small, photos) -> None:
    tokens = small._pos_embed(small.patch_embed(photos))
    block = small.blocks[0]
    x = block.norm1(tokens)
    q, k, _ = block.attn.qkv(x).reshape(5, 37, 3, 3, 16).permute(2, 0, 3, 1, 4)
    expected = (q @ k.mT / 4).softmax(-1).sum((1, 2))
    tokenpool.patch(small, "power_bert", KEEP)
    output, scores, keys = small.blocks[0].attn(x, with_scores=True, with_keys=True)
    torch.testing.assert_close(scores, expected)
    torch.testing.assert_close(keys, k.mean(1))
    torch.testing.assert_close(scores.sum(-1), torch.full((5,), 3 * 37.0))
    torch.testing.assert_close(output, block.attn(x))
    kept = scores[:, 1:].topk(30).indices.sort(-1).values
    assignment = tokenpool.trace(small, photos).blocks[0].assignment
    assert torch.equal((assignment >= 0).nonzero()[:, 1].view(5, 30), kept)


@pytest.mark.parametrize("with_scores", [False, True])
def test_size_s_attracts_what_s_equal_tokens_do(small, with_scores: bool) -> None:
    tokenpool.patch(small, "wkmedoids", KEEP, carry=True)
    attention = small.blocks[0].attn
    tokens = torch.randn(2, 6, 48)
    repeats = torch.tensor([1, 3, 1, 2, 1, 5])
    merged, scores, _ = attention(tokens, repeats.expand(2, -1).float(), with_scores)
    apart, apart_scores, _ = attention(tokens.repeat_interleave(repeats, 1), None, with_scores)
    first = repeats.cumsum(0) - repeats
    torch.testing.assert_close(merged, apart[:, first])
    if with_scores:  # queries count too: those of merged tokens stand for one each
        assert scores.shape == (2, 6) and apart_scores.shape == (2, 13)


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


@pytest.mark.parametrize("method", ["random", "importance"])
def test_random_selection(small, photos, method: str) -> None:
    tokenpool.patch(small, method, KEEP)
    small.train()
    torch.manual_seed(1)
    first = small(photos)
    assert not torch.equal(small(photos), first)
    torch.manual_seed(1)
    assert torch.equal(small(photos), first)
    small.eval()
    fixed = small(photos)
    assert torch.equal(small(photos), fixed)
    assert not torch.equal(tokenpool.patch(small, method, KEEP, seed=1)(photos), fixed)
    drawn = [
        tokenpool.patch(small, method, KEEP, generator=torch.Generator().manual_seed(seed))(photos)
        for seed in (1, 1, 2)
    ]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_importance_draws_in_proportion_to_the_scores() -> None:
    scores = torch.tensor([1.0, 2.0, 3.0, 4.0]).expand(20_000, -1)
    layer = METHODS["importance"](1, generator=torch.Generator().manual_seed(0))
    assignment = layer(torch.randn(20_000, 4, 1), scores).assignment
    torch.testing.assert_close((assignment == 0).float().mean(0), scores[0] / 10, rtol=0, atol=0.015)
    without_replacement = METHODS["random"](3)(torch.randn(7, 4, 1)).assignment
    assert ((without_replacement >= 0).sum(1) == 3).all()


def test_convolution(photos) -> None:
    torch.manual_seed(0)
    model = tokenpool.create_model("deit_tiny_patch16_224", "convolution", at=[1, 4], img_size=96).eval()
    blocks = tokenpool.trace(model, photos).blocks
    assert [block.tokens for block in blocks] == [36, 9, 9, 9] + [1] * 8
    grid = blocks[1].assignment[0].view(6, 6)
    assert grid[0].tolist() == [0, 0, 1, 1, 2, 2] and grid[5].tolist() == [6, 6, 7, 7, 8, 8]
    assert (blocks[4].assignment[0].view(6, 6)[4:] == -1).all()  # the odd row of 3 x 3 is dropped
    tokens = torch.randn(2, 36, 192)
    mean = tokens.view(2, 3, 2, 3, 2, 192).mean((2, 4)).view(2, 9, 192)
    torch.testing.assert_close(model.blocks[1].downsampler(tokens).tokens, mean)


@pytest.mark.parametrize("learn_alpha", [False, True])
@pytest.mark.parametrize("method", ["none", "power_bert", "wkmedoids"])
def test_normalised_queries_and_keys(small, photos, method: str, learn_alpha: bool) -> None:
    keys = set(small.state_dict())
    keep = None if method == "none" else KEEP
    tokenpool.patch(small, method, keep, qk_norm="l2", alpha=3.0, learn_alpha=learn_alpha).train()
    extra = set(small.state_dict()) - keys
    assert extra == ({f"blocks.{block}.attn.alpha" for block in range(4)} if learn_alpha else set())
    small(photos).square().sum().backward()
    if learn_alpha:
        assert all(block.attn.alpha.grad.abs() > 0 for block in small.blocks)


def test_normalised_attention_is_gaussian_filtering(small) -> None:
    """Equation (7): with unit queries and keys, softmax attention is a Gaussian filter over the keys."""
    tokenpool.patch(small, "none", qk_norm="l2", alpha=5.0)
    attention, x = small.blocks[0].attn, torch.randn(2, 11, 48)
    q, k, v = attention.qkv(x).reshape(2, 11, 3, 3, 16).permute(2, 0, 3, 1, 4)
    q, k = torch.nn.functional.normalize(q, dim=-1), torch.nn.functional.normalize(k, dim=-1)
    gauss = torch.exp(-2.5 * torch.cdist(q, k).square())
    filtered = (gauss @ v / gauss.sum(-1, keepdim=True)).transpose(1, 2).reshape(2, 11, 48)
    torch.testing.assert_close(attention(x)[0], attention.proj(filtered))


def test_new_deits_are_registered() -> None:
    for name, width in (("deit_e252_patch16_224", 252), ("deit_e318_patch16_224", 318)):
        model = timm.create_model(name)
        assert model.embed_dim == width and len(model.blocks) == 12 and model.blocks[0].attn.num_heads == 6
        blocks = 12 * (12 * width**2 + 13 * width)
        around = (768 + 1) * width + (1 + 197) * width + 2 * width + 1000 * (width + 1)
        assert sum(parameter.numel() for parameter in model.parameters()) == blocks + around


@pytest.mark.parametrize(
    "name",
    [
        "deit_tiny_distilled_patch16_224",
        "vit_small_patch14_reg4_dinov2",
        "deit3_small_patch16_224",
        "vit_base_patch16_siglip_224",
    ],
)
def test_prefix_tokens_of_other_families_pass(name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, depth=3, img_size=112, num_classes=5).eval()
    images = torch.randn(2, 3, 112, 112)
    plain = model(images)
    n = model.patch_embed.num_patches
    torch.testing.assert_close(tokenpool.patch(model, "wkmedoids", [n] * 3)(images), plain, rtol=0, atol=1e-5)
    trace = tokenpool.trace(tokenpool.patch(model, "wkmedoids", [20, 9, 1]), images)
    assert trace.logits.isfinite().all() and [block.tokens for block in trace.blocks] == [20, 9, 1]


@pytest.mark.parametrize("method", ["power_bert", "random", "wkmedoids", "kmeans", "tome"])
def test_compiled_model_equals_eager(small, photos, method: str) -> None:
    tokenpool.patch(small, method, KEEP)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(small, fullgraph=True)(photos), small(photos), rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", ["wkmedoids", "key_medoids", "tome"])
def test_autocast(small, photos, method: str) -> None:
    tokenpool.patch(small, method, KEEP)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.allclose(small(photos).float(), small(photos).float())
        assert small(photos).isfinite().all()


def test_a_downsampler_of_your_own(small, photos) -> None:
    class First(tokenpool.Downsampler):
        uses_scores = False

        def reduce(self, tokens, scores):
            kept = torch.arange(tokens.shape[1]).expand(len(tokens), -1)
            return tokenpool.Downsampled(tokens[:, : self.keep], kept.where(kept < self.keep, -1))

    tokenpool.patch(small, First, KEEP)
    assert [block.tokens for block in tokenpool.trace(small, photos).blocks] == KEEP


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "method",
    ["wkmedoids", "kmeans", "importance", "key_medoids", "tome", "convolution", tokenpool.soft_selection.SoftSelection],
)
def test_half_and_double_models(small, photos, method, dtype: torch.dtype) -> None:
    options = {"at": [1]} if method == "convolution" else {"keep": KEEP} if isinstance(method, str) else {}
    trace = tokenpool.trace(tokenpool.patch(small.to(dtype), method, **options), photos.to(dtype))
    assert trace.logits.dtype == dtype and trace.logits.isfinite().all()


def test_copies_are_whole(small, photos) -> None:
    expected = tokenpool.patch(small, "wkmedoids", KEEP)(photos)
    for copied in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        assert torch.equal(copied(photos), expected)
        tokenpool.unpatch(copied)
        assert torch.equal(small(photos), expected)


@pytest.mark.parametrize("pool", ["avg", "max"])
def test_heads_that_read_patches_keep_one(photos, pool: str) -> None:
    model = timm.create_model("deit_tiny_patch16_224", img_size=96, depth=2, global_pool=pool).eval()
    with pytest.raises(ValueError, match=r"keep\[1\] = 0 would leave nothing to this model's head"):
        tokenpool.patch(model, "wkmedoids", [5, 0])
    assert tokenpool.patch(model, "wkmedoids", [5, 1])(photos).isfinite().all()


@pytest.mark.parametrize(
    "keep, message",
    [
        (None, "needs keep"),
        ([30, 20, 10], "keep has 3 entries, but the model has 4 blocks"),
        ([30, 20, -1, 3], r"keep\[2\] = -1 must not be negative"),
        ([30, 20.0, 10, 3], r"keep\[1\] = 20\.0 must be a whole number"),
        ([30, True, 10, 3], r"keep\[1\] = True"),
        ("30", "keep has 1 entries, but the model has 4 blocks"),
        (30, "must be a list of 4 whole numbers"),
        ({1, 2, 3, 4}, "must be a list of 4 whole numbers"),
        (np.array(3), "must be a list of 4 whole numbers"),
    ],
)
def test_bad_keep_is_named(small, keep, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tokenpool.patch(small, "wkmedoids", keep)
    assert not tokenpool.is_patched(small)


def test_keep_may_hold_numpy_integers(small) -> None:
    assert tokenpool.patch(small, "wkmedoids", np.array(KEEP)).blocks.setting.keep == tuple(KEEP)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"downsampler": "kmediods"}, "unknown downsampler 'kmediods'; known are none, convolution, random"),
        ({"downsampler": "none", "keep": KEEP}, "takes no keep"),
        ({"downsampler": "wkmedoids", "keep": KEEP, "start": 3}, "start"),
        ({"downsampler": "wkmedoids", "keep": KEEP, "init": "first"}, "init = 'first'"),
        ({"downsampler": "wkmedoids", "keep": KEEP, "iterations": 0}, "iterations = 0"),
        ({"downsampler": "convolution"}, r"at = \(\)"),
        ({"downsampler": "convolution", "at": 3}, "at = 3 must list"),
        ({"downsampler": "random", "keep": KEEP, "seed": "a"}, "seed = 'a' must be a whole number"),
        ({"downsampler": "none", "qk_norm": "l2", "alpha": "a"}, "alpha = 'a' must be a positive number"),
        ({"downsampler": "convolution", "at": [3, 1]}, "ascending order"),
        ({"downsampler": "convolution", "at": [0, 1, 2]}, "only 1 x 1 tokens are left"),
        ({"downsampler": "none", "qk_norm": "l1"}, "qk_norm = 'l1'"),
        ({"downsampler": "none", "alpha": 2.0}, 'need qk_norm="l2"'),
        ({"downsampler": "none", "qk_norm": "l2", "alpha": -1.0}, "alpha = -1.0 must be a positive number"),
        ({"downsampler": "key_medoids", "keep": KEEP, "by": "values"}, "by = 'values' must be one of 'keys', 'tokens'"),
        ({"downsampler": "key_medoids", "keep": KEEP, "iterations": 0}, "iterations = 0"),
        ({"downsampler": "power_bert", "keep": KEEP, "dense": True}, "'power_bert' does not"),
        ({"downsampler": "convolution", "at": [1], "dense": True}, "'convolution' does not"),
        ({"downsampler": "none", "dense": True}, "'none' does not"),
        ({"downsampler": "kmedoids", "gmacs": 1.0, "bogus": 3}, "downsampler 'kmedoids': .*bogus"),
        ({"downsampler": "kmediods", "gmacs": 1.0}, "unknown downsampler 'kmediods'"),
        ({"downsampler": "kmedoids", "keep": [9, 9, 9, 0], "dense": True}, r"keep\[3\] = 0 would leave nothing"),
    ],
)
def test_bad_settings_are_named(small, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tokenpool.patch(small, **arguments)


def test_bad_models_are_named(small, photos) -> None:
    with pytest.raises(ValueError, match="no model 'deit_smal_patch16_224'; close names: deit_small_patch16_224"):
        tokenpool.create_model("deit_smal_patch16_224")
    with pytest.raises(
        TypeError, match="ResNet cannot be pooled: it is hierarchical.*; supported are timm's VisionTransformer"
    ):
        tokenpool.create_model("resnet18", "wkmedoids", [1])
    with pytest.raises(TypeError, match="block 0 is a ParallelScalingBlock.*side by side"):
        tokenpool.patch(
            timm.create_model(
                "vit_tiny_patch16_224", depth=1, block_fn=timm.models.vision_transformer.ParallelScalingBlock
            ),
            "wkmedoids",
            [1],
        )
    with pytest.raises(ValueError, match="takes these options.*widht"):
        tokenpool.create_model("deit_tiny_patch16_224", widht=3)
    siglip = timm.create_model("vit_base_patch16_siglip_224", depth=1)
    with pytest.raises(ValueError, match="it reads patches"):
        tokenpool.patch(siglip, "wkmedoids", [0])
    with pytest.raises(ValueError, match="no downsamplers to trace"):
        tokenpool.trace(small, photos)
    tokenpool.patch(small, "wkmedoids", KEEP).set_grad_checkpointing()
    with pytest.raises(TypeError, match="gradient checkpointing"):
        small(photos)
    small.set_grad_checkpointing(False)
    for call in (
        lambda: small.prune_intermediate_layers(2),
        lambda: small.forward_intermediates(photos),
        lambda: small.get_intermediate_layers(photos),
        lambda: small(photos, attn_mask=torch.ones(37, 37)),
        lambda: small(photos, is_causal=True),
    ):
        with pytest.raises(TypeError, match="need a plain model: call tokenpool.unpatch first"):
            call()
    with pytest.raises(TypeError, match="features_only hands out the whole grid"):
        tokenpool.create_model("vit_tiny_patch16_224", "kmedoids", 0.9, features_only=True)
    with pytest.raises(ValueError, match="name = None must be"):
        tokenpool.create_model(None)


def test_tokens_that_are_not_finite_are_named(small, photos) -> None:
    photos[3] = torch.nan
    with pytest.raises(ValueError, match="those of image 3 of the batch"):
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


@pytest.mark.parametrize("weights", ["scores", "sizes", "both"])
@torch.no_grad()
def test_key_medoids_equals_its_parts(weights: str) -> None:
    """By loops: unit keys, Ward's centres, the nearest of them, weighted means. One iteration."""
    generator = torch.Generator().manual_seed(0)
    tokens, keys = torch.randn(2, 12, 5, generator=generator), torch.randn(2, 12, 4, generator=generator)
    scores, sizes = torch.rand(2, 12, generator=generator), torch.randint(1, 4, (2, 12), generator=generator).float()
    layer = METHODS["key_medoids"](4, iterations=1, weights=weights)
    found = layer(tokens, scores, sizes=sizes, keys=keys)
    for image in range(2):
        w = {"scores": scores, "sizes": sizes, "both": scores * sizes}[weights][image].tolist()
        unit = [key / key.norm() for key in keys[image]]
        distance = [[(a - b).square().sum().item() for b in unit] for a in unit]
        cost = [
            min(
                (w[i] * w[j] / (w[i] + w[j]) * distance[i][j] for j in range(12) if (w[j], -j) > (w[i], -i)),
                default=float("inf"),
            )
            for i in range(12)
        ]
        centres = sorted(range(12), key=lambda i: -cost[i])[:4]
        for i in range(12):
            assert found.assignment[image, i] == min(range(4), key=lambda c: distance[i][centres[c]])
        for c in range(4):
            members = [i for i in range(12) if found.assignment[image, i] == c]
            mean = sum(w[i] * tokens[image, i] for i in members) / sum(w[i] for i in members)
            torch.testing.assert_close(found.tokens[image, c], mean)


def test_convolution_needs_one_grid() -> None:
    model = timm.create_model("vit_tiny_patch16_224", depth=2, dynamic_img_size=True)
    with pytest.raises(ValueError, match="dynamic_img_size=True"):
        tokenpool.patch(model, "convolution", at=[0])


@pytest.mark.parametrize("method", ["wkmedoids", "wkmeans", "key_medoids"])
def test_without_any_attention_all_tokens_count_the_same(method: str) -> None:
    """Where the class token takes all attention, patches get none."""
    generator = torch.Generator().manual_seed(0)
    tokens, keys = torch.randn(2, 10, 4, generator=generator), torch.randn(2, 10, 3, generator=generator)
    hints = {"sizes": torch.ones(2, 10), "keys": keys} if method == "key_medoids" else {}
    layer = METHODS[method](3)
    found, expected = (layer(tokens, scores, **hints) for scores in (torch.zeros(2, 10), torch.ones(2, 10)))
    assert torch.equal(found.assignment, expected.assignment)
    torch.testing.assert_close(found.tokens, expected.tokens)


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
        block.forward = lambda stream, block=block: (
            calls.append(len(stream.tokens)) or type(block).forward(block, stream)
        )
    monkeypatch.setattr(tokenpool.micro_batch, "BLOCK_FLOATS", 2 * 48 * 37)
    images = torch.cat([photos, photos])[:5]
    with torch.no_grad():
        small(images)
    assert calls == [2, 2, 1, 2, 2, 1, 4, 1, 5]  # 36 + 1 tokens, 30 + 1, 17 + 1, 5 + 1
    calls.clear()
    small(images)
    assert calls == [5, 5, 5, 5]  # with gradients, all at once


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


def test_many_tokens_fit_into_memory() -> None:
    """Three or four matrices of the distances of one image at once, not of the batch."""
    tokens = torch.randn(4, 2048, 8)
    with torch.no_grad():
        peak = peak_memory(lambda: tokenpool.clustering.kmedoids(tokens, 1024, iterations=1), tokens.device)
    assert peak < 5 * 4 * 2048**2


@pytest.mark.parametrize("carry", [False, True])
@pytest.mark.parametrize("qk_norm", [None, "l2"])
@pytest.mark.usefixtures("triton_runs")
def test_kernels_give_the_same(small, photos, carry: bool, qk_norm: str | None) -> None:
    small, photos = small.to(DEVICE), photos.to(DEVICE)
    tokenpool.patch(small, "wkmedoids", [30, 17, 5, 2], carry=carry, qk_norm=qk_norm)
    with torch.no_grad():
        expected = small(photos)
        with gpu.using("triton"):
            torch.testing.assert_close(small(photos), expected, rtol=0, atol=1e-4)


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


@pytest.mark.parametrize("most", [(1, 1), (1, 10), (2, 37), (3, 37)])
@pytest.mark.parametrize("carry", [False, True])
def test_attention_in_pieces_gives_the_same(small, photos, monkeypatch, most: tuple[int, int], carry: bool) -> None:
    tokenpool.patch(small, "wkmedoids", KEEP, carry=carry)
    expected = small(photos)  # with gradients, in one piece
    monkeypatch.setattr(tokenpool.attention.ScoredAttention, "_micro_batch", lambda self, x: most)
    torch.testing.assert_close(small(photos), expected, rtol=0, atol=1e-5)


def test_attention_over_many_tokens_is_never_held_whole() -> None:
    attention = tokenpool.attention.ScoredAttention(timm.layers.Attention(8, num_heads=2)).eval()
    x = torch.randn(2, 2048, 8)
    with torch.no_grad():
        peak = peak_memory(lambda: attention(x, with_scores=True), x.device)
    assert peak < 2 * 4 * 2**20  # two matrices of 2^19 numbers, and the small rest; one head's would take 2^22
