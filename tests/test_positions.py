"""Rotary positions of merged tokens, held against a loop, against pairs of patches, and against unmerged attention."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import AttentionRope, create_rope_embed
from torch import Tensor

from tokenpool.hosts.timm_eva import RotaryAttention, four_dimensional
from tokenpool.positions import MergedPositions, representatives

HEADS, WIDTH = 4, 256  # the width of a head is 64, as in most models


def rotary_table(kind: str, grid: tuple[int, int] = (14, 14)) -> Tensor:
    """The table (1, H or 1, N, W) of a model with the frequencies of EVA-02 ("cat"), DINOv3 and rope-ViT ("mixed")."""
    torch.manual_seed(0)
    options = {
        "cat": {"feat_shape": grid, "in_pixels": False, "ref_feat_shape": (16, 16)},
        "dinov3": {"feat_shape": grid, "temperature": 100.0, "rotate_half": True},
        "mixed": {"feat_shape": grid, "depth": 1, "temperature": 10.0},
    }[kind]
    with torch.no_grad():
        table = create_rope_embed(kind, dim=WIDTH, num_heads=HEADS, **options).get_embed()
    return four_dimensional(table[0] if kind == "mixed" else table).double()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_rows_are_means_by_a_loop(data: st.DataObject) -> None:
    """With dropped patches, tokens without patches, no token at all, and a table for each image or head."""
    draw = data.draw
    batch, n, k = draw(st.integers(1, 3)), draw(st.integers(1, 12)), draw(st.integers(0, 6))
    heads, own = draw(st.sampled_from([1, 3])), draw(st.booleans())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    table = torch.randn(batch if own else 1, heads, n, 4, generator=generator, dtype=torch.float64)
    assignment = torch.randint(-1, max(k, 0), (batch, n), generator=generator)
    found = MergedPositions()(table, assignment, None, k)
    expected = torch.zeros(batch, heads, k, 4, dtype=torch.float64)
    for image in range(batch):
        for token in range(k):
            rows = [table[image if own else 0][:, place] for place in range(n) if assignment[image, place] == token]
            if rows:
                expected[image, :, token] = sum(rows) / len(rows)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)

    places = torch.randint(n, (batch, k), generator=generator)
    found = MergedPositions()(table, assignment, places, k)
    for image in range(batch):
        assert torch.equal(found[image], table[image if own else 0][:, places[image]])


def test_gradients_of_learned_tables_are_shared() -> None:
    table = torch.ones(1, 2, 5, 3, requires_grad=True)
    MergedPositions()(table, torch.tensor([[0, 1, 1, -1, 1], [0, 0, 0, 0, 1]]), None, 2).sum().backward()
    share = torch.tensor([1 + 1 / 4, 1 / 3 + 1 / 4, 1 / 3 + 1 / 4, 1 / 4, 1 / 3 + 1])
    assert torch.allclose(table.grad, share[None, None, :, None].expand(1, 2, 5, 3))


def test_representatives_by_hand() -> None:
    tokens = torch.tensor([[[0.0], [4.0], [5.0], [9.0], [7.0]]])
    kept = torch.tensor([[[5.0], [1.0], [7.0]]])
    assignment = torch.tensor([[1, 0, 0, -1, 0]])  # the last token has no member, and 9 was dropped
    assert representatives(tokens, kept, assignment)[0, :2].tolist() == [2, 0]
    assert representatives(tokens, kept[:, :0], torch.full((1, 5), -1)).shape == (1, 0)


@pytest.mark.parametrize("kind", ["cat", "dinov3", "mixed"])
@pytest.mark.parametrize("prefix", [0, 1])
@torch.no_grad()
def test_a_logit_of_merged_tokens_is_the_mean_logit_of_their_patches(kind: str, prefix: int) -> None:
    """If the patches of a token have equal content. Exact, in double precision. A prefix token is not rotated."""
    grid, k = (6, 5), 7
    table = rotary_table(kind, grid)
    torch.manual_seed(1)
    half = kind == "dinov3"
    attention = RotaryAttention(AttentionRope(WIDTH, HEADS, rotate_half=half, num_prefix_tokens=prefix).double())
    assignment = torch.randint(k, (2, 30)).sort(descending=True).values[:, torch.randperm(30)]
    merged = torch.randn(2, prefix + k, WIDTH, dtype=torch.float64)
    index = torch.cat([torch.arange(prefix).expand(2, -1), prefix + assignment], dim=1)  # (2, P + N)
    patches = merged.gather(1, index[:, :, None].expand(-1, -1, WIDTH))

    def logits(tokens: Tensor, rows: Tensor) -> Tensor:
        q, keys, _ = attention.project(tokens)
        return attention.rotate(q, rows) @ attention.rotate(keys, rows).mT

    member = torch.nn.functional.one_hot(index, prefix + k).double()  # (2, P + N, P + K)
    mean = member.mT / member.sum(1)[:, :, None]
    expected = mean[:, None] @ logits(patches, table) @ mean[:, None].mT
    found = logits(merged, MergedPositions()(table, assignment, None, k))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    places = representatives(patches[:, prefix:], merged[:, prefix:], assignment)
    medoids = MergedPositions()(table, assignment, places, k)
    assert not torch.allclose(logits(merged, medoids), expected, atol=1e-2)


# Mean against medoid


def compact(generator: torch.Generator) -> Tensor:
    """49 clusters of 2 x 2 patches of a 14 x 14 grid."""
    rows, columns = torch.meshgrid(torch.arange(14) // 2, torch.arange(14) // 2, indexing="ij")
    return (7 * rows + columns).flatten()


def scattered(generator: torch.Generator) -> Tensor:
    """49 clusters of 4 patches, anywhere in the grid."""
    return torch.arange(196)[torch.randperm(196, generator=generator)] // 4


def divergence(
    kind: str, clusters: Callable[[torch.Generator], Tensor], positions: str, local: float, seeds: int = 10
) -> float:
    """Divergence of merged from unmerged attention, in nats, averaged over patches, heads and random contents.

    Queries and keys of a cluster are normal, so that logits have a standard deviation of about one. Each patch adds
    noise of a tenth. A part that all queries and keys share makes attention local: it adds `local` to the logit of a
    patch with itself, and less to the logit with a distant patch.

    For each patch, the unmerged attention is summed over the patches of each cluster. The merged attention is the
    attention of the patch's token, with the log of the sizes added. The measure is the Kullback-Leibler divergence of
    the second from the first.
    """
    table, k, total = rotary_table(kind), 49, 0.0
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        assignment = clusters(generator)[None]  # (1, N)
        member = torch.nn.functional.one_hot(assignment, k).double()  # (1, N, K)
        centres = torch.randn(2, HEADS, k, 64, generator=generator, dtype=torch.float64)
        noise = torch.randn(2, HEADS, 196, 64, generator=generator, dtype=torch.float64)
        shared = torch.randn(HEADS, 1, 64, generator=generator, dtype=torch.float64)
        shared *= (8 * local) ** 0.5 / shared.norm(dim=-1, keepdim=True)
        contents = centres[:, :, assignment[0]] + 0.1 * noise + shared  # queries and keys (2, H, N, d)
        means = member.mT @ contents / member.sum(1)[:, :, None]  # (2, H, K, d)
        tokens, kept = (parts.permute(2, 0, 1, 3).reshape(1, -1, 2 * WIDTH) for parts in (contents, means))
        places = representatives(tokens, kept, assignment)
        rows = MergedPositions()(table, assignment, places if positions == "medoid" else None, k)
        attention = RotaryAttention(AttentionRope(WIDTH, HEADS, rotate_half=kind == "dinov3"))
        unmerged, merged = (
            (attention.rotate(q[None], rows) @ attention.rotate(keys[None], rows).mT) / 8
            for (q, keys), rows in ((contents, table), (means, rows))
        )  # (1, H, N, N) and (1, H, K, K)
        expected = unmerged.softmax(-1) @ member[:, None]  # (1, H, N, K)
        found = (merged + member.sum(1).log()[:, None, None]).log_softmax(-1)[:, :, assignment[0]]
        total += float((expected * (expected.log() - found)).sum(-1).mean())
    return total / seeds


@pytest.mark.parametrize("kind", ["dinov3", "cat", "mixed"])
@pytest.mark.parametrize("local", [0, 4])
def test_mean_against_medoid(kind: str, local: float) -> None:
    """Run with -s to see the numbers of docs/reference/backbones.md."""
    for clusters in (compact, scattered):
        mean, medoid = (divergence(kind, clusters, rule, local) for rule in ("mean", "medoid"))
        print(f"{kind:6} local {local} {clusters.__name__:9} mean {mean:.3f} medoid {medoid:.3f}")
        assert mean < 0.5 * medoid
