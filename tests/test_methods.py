"""Downsampling methods, one by one, held against loops and frequencies."""

import pytest
import timm
import torch

import tokenpool
from tokenpool.downsampling import METHODS
from tokenpool.runs.timing import peak_memory

KEEP = [30, 17, 5, 2]


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


def test_convolution_needs_one_grid() -> None:
    model = timm.create_model("vit_tiny_patch16_224", depth=2, dynamic_img_size=True)
    with pytest.raises(ValueError, match="dynamic_img_size=True"):
        tokenpool.patch(model, "convolution", at=[0])


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


def test_many_tokens_fit_into_memory() -> None:
    """Three or four matrices of the distances of one image at once, not of the batch."""
    tokens = torch.randn(4, 2048, 8)
    with torch.no_grad():
        peak = peak_memory(lambda: tokenpool.clustering.kmedoids(tokens, 1024, iterations=1), tokens.device)
    assert peak < 5 * 4 * 2048**2
