"""Attention with scores, sizes and normalised queries and keys, held against timm's and against closed forms."""

import pytest
import timm
import torch

import tokenpool
from tokenpool import micro_batch
from tokenpool.attention import Asked
from tokenpool.runs.timing import peak_memory

KEEP = [30, 17, 5, 2]


def test_scores_are_the_attention_received(small, photos) -> None:
    tokens = small._pos_embed(small.patch_embed(photos))
    block = small.blocks[0]
    x = block.norm1(tokens)
    q, k, _ = block.attn.qkv(x).reshape(5, 37, 3, 3, 16).permute(2, 0, 3, 1, 4)
    expected = (q @ k.mT / 4).softmax(-1).sum((1, 2))
    tokenpool.patch(small, "power_bert", KEEP)
    output, scores, keys, _ = small.blocks[0].attn(x, Asked(scores=True, keys=True))
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
    merged, scores, *_ = attention(tokens, Asked(repeats.expand(2, -1).float(), scores=with_scores))
    apart, apart_scores, *_ = attention(tokens.repeat_interleave(repeats, 1), Asked(scores=with_scores))
    first = repeats.cumsum(0) - repeats
    torch.testing.assert_close(merged, apart[:, first])
    if with_scores:  # queries count too: those of merged tokens stand for one each
        assert scores.shape == (2, 6) and apart_scores.shape == (2, 13)


@pytest.mark.parametrize("qk_norm, alpha", [(None, 1.0), ("l2", 3.0)])
@pytest.mark.parametrize("with_scores", [False, True])
def test_class_attention_is_the_first_row_of_the_attention(
    small, qk_norm: str, alpha: float, with_scores: bool
) -> None:
    tokenpool.patch(small, "none" if qk_norm else "power_bert", None if qk_norm else KEEP, qk_norm=qk_norm, alpha=alpha)
    attention, x = small.blocks[0].attn, torch.randn(2, 11, 48)
    sizes = torch.randint(1, 5, (2, 11), generator=torch.Generator().manual_seed(0)).float()
    q, k, _ = attention.qkv(x).reshape(2, 11, 3, 3, 16).permute(2, 0, 3, 1, 4)
    if qk_norm:
        q, k = torch.nn.functional.normalize(q, dim=-1), torch.nn.functional.normalize(k, dim=-1)
    logits = q @ k.mT * (alpha if qk_norm else 16**-0.5)  # (B, H, N, N)
    for given, weights in ((None, torch.ones_like(sizes)), (sizes, sizes)):
        weighted = logits.exp() * weights[:, None, None, :]
        expected = (weighted / weighted.sum(-1, keepdim=True)).mean(1)[:, 0]
        attended = attention(x, Asked(given, scores=with_scores, class_attention=True))
        assert not attended.class_attention.requires_grad
        torch.testing.assert_close(attended.class_attention, expected)
        plain = attention(x, Asked(given, scores=with_scores))
        assert plain.class_attention is None and torch.equal(attended.output, plain.output)


def test_class_attention_needs_a_class_token() -> None:
    """Register tokens are prefix tokens, too, but no class tokens."""

    class Hinted(tokenpool.Downsampler):
        uses_class_attention = True

    size = {"depth": 2, "embed_dim": 24, "num_heads": 2, "img_size": 32, "class_token": False, "global_pool": "avg"}
    for registers in (0, 2):
        model = timm.models.vision_transformer.VisionTransformer(**size, reg_tokens=registers)
        with pytest.raises(ValueError, match="Hinted needs the attention of a class token, but the model has no class"):
            tokenpool.patch(model, Hinted, [2, 2])
        assert not tokenpool.is_patched(model)


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


@pytest.mark.parametrize("images, floats", [(5, 1), (5, 5 * 37 * 10), (1, 2 * 37**2), (1, 3 * 37**2)])
@pytest.mark.parametrize("carry", [False, True])
def test_attention_in_pieces_gives_the_same(small, photos, monkeypatch, images: int, floats: int, carry: bool) -> None:
    """In the first block one row or ten rows of one head, two heads and all heads at a time."""
    tokenpool.patch(small, "wkmedoids", KEEP, carry=carry)
    expected = small(photos[:images])  # with gradients, in one piece
    monkeypatch.setattr(micro_batch, "ATTENTION", micro_batch.Budget(floats, floats))
    with torch.no_grad():
        torch.testing.assert_close(small(photos[:images]), expected, rtol=0, atol=1e-5)


def test_attention_over_many_tokens_is_never_held_whole() -> None:
    attention = tokenpool.attention.ScoredAttention(timm.layers.Attention(8, num_heads=2)).eval()
    x = torch.randn(2, 2048, 8)
    with torch.no_grad():
        peak = peak_memory(lambda: attention(x, Asked(scores=True)), x.device)
    assert peak < 2 * 4 * 2**20  # two matrices of 2^19 numbers, and the small rest; one head's would take 2^22
