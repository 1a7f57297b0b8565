"""ToMe's matching against a loop over tokens, written from the paper's words (Bolya et al. 2023, section 3)."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tokenpool.downsampling import BipartiteMatching


def by_hand(tokens: Tensor, keys: Tensor, sizes: Tensor, keep: int) -> tuple[Tensor, list[int]]:
    """One image: tokens (N, D), keys (N, d), sizes (N,)."""
    groups = [[index] for index in range(len(tokens))]
    while len(groups) > keep:
        mean_of = [[float(sizes[i]) for i in group] for group in groups]
        key = torch.stack(
            [
                sum(w * keys[i] for w, i in zip(weights, group, strict=True)) / sum(weights)
                for weights, group in zip(mean_of, groups, strict=True)
            ]
        )
        edges = []
        for a in range(0, len(groups), 2):
            similarity = [F.cosine_similarity(key[a], key[b], dim=0).item() for b in range(1, len(groups), 2)]
            best = max(range(len(similarity)), key=similarity.__getitem__) if similarity else None
            if best is not None:
                edges.append((similarity[best], a, 2 * best + 1))
        edges.sort(reverse=True)
        merged = set()
        for _, a, b in edges[: min(len(groups) - keep, len(groups) // 2)]:
            groups[b] = groups[b] + groups[a]
            merged.add(a)
        groups = [group for index, group in enumerate(groups) if index not in merged]
    weights = [torch.tensor([float(sizes[i]) for i in group]) for group in groups]
    means = torch.stack(
        [(w[:, None] * tokens[group]).sum(0) / w.sum() for w, group in zip(weights, groups, strict=True)]
    )
    assignment = [next(k for k, group in enumerate(groups) if i in group) for i in range(len(tokens))]
    return means, assignment


@pytest.mark.parametrize("n, keep", [(12, 8), (13, 7), (12, 6), (20, 3), (9, 1), (5, 4)])
def test_against_a_loop(n: int, keep: int) -> None:
    generator = torch.Generator().manual_seed(n)
    tokens, keys = torch.randn(3, n, 5, generator=generator), torch.randn(3, n, 4, generator=generator)
    sizes = torch.randint(1, 6, (3, n), generator=generator).float()
    found = BipartiteMatching(keep)(tokens, None, sizes=sizes, keys=keys)
    for image in range(3):
        means, assignment = by_hand(tokens[image], keys[image], sizes[image], keep)
        assert found.assignment[image].tolist() == assignment
        torch.testing.assert_close(found.tokens[image], means)


def test_an_image_does_not_depend_on_its_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens, keys = torch.randn(4, 30, 5, generator=generator), torch.randn(4, 30, 4, generator=generator)
    together = BipartiteMatching(11)(tokens, None, sizes=torch.ones(4, 30), keys=keys)
    alone = BipartiteMatching(11)(tokens[2:3], None, sizes=torch.ones(1, 30), keys=keys[2:3])
    assert torch.equal(together.assignment[2:3], alone.assignment)
    assert torch.equal(together.tokens[2:3], alone.tokens)
