"""K-Medoids by swaps, which exported graphs contain, gives the clusters of K-Medoids in eager mode."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tokenpool import clustering
from tokenpool.clustering.checks import checked
from tokenpool.clustering.swaps import Swapped, alternate_by_swaps, means_by_swaps, symmetric_distances


def swapped(points: Tensor, weights: Tensor, k: int, iterations: int) -> Swapped:
    scaled, medoids = checked(points, k, weights, None, iterations, True)
    return alternate_by_swaps(symmetric_distances(points), scaled, medoids, iterations)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(2, 40), share=st.floats(0, 1), iterations=st.integers(1, 6))
def test_equal_to_eager_mode(seed: int, n: int, share: float, iterations: int) -> None:
    torch.manual_seed(seed)
    k = min(1 + int(share * n), n - 1)
    tokens, weights = torch.randn(3, n, 5) + 3, torch.rand(3, n) + 0.01
    found = swapped(tokens, weights, k, iterations)
    centers, assignment = clustering.kmedoids(tokens, k, weights, iterations=iterations)
    assert torch.equal(found.labels.long(), assignment)
    torch.testing.assert_close(means_by_swaps(tokens, weights, found), centers, rtol=0, atol=1e-5)


def test_ties_as_in_eager_mode() -> None:
    """With equal weights, both tokens of a pair have the same cost as medoids, and the first one wins."""
    points = torch.tensor([[0.0, 1], [0, 0], [10, 1], [10, 0], [20, 0], [20, 1]])[None]
    weights, first = torch.ones(1, 6), torch.tensor([[1, 2, 5]])
    found = alternate_by_swaps(symmetric_distances(points), weights, first, 2)
    assert found.others.tolist() == [[1, 3, 5]]
    assert found.nearest.tolist() == [[0, 2, 4]]
    assert torch.equal(found.labels.long(), clustering.kmedoids(points, 3, init=first, iterations=2).assignment)


def test_others_and_medoids_are_all_tokens() -> None:
    """So no cluster is without a member, also if tokens are equal."""
    tokens = torch.zeros(2, 9, 4)
    tokens[:, ::3] = 1
    found = swapped(tokens, torch.ones(2, 9), 4, 5)
    assert all(len(row.unique()) == 4 for row in found.labels)
    assert all(len(row.unique()) == 5 for row in found.others)
    means = means_by_swaps(tokens, torch.ones(2, 9), found)
    assert means.unique().tolist() == [0, 1]


def test_distances_are_symmetric_and_zero_on_the_diagonal() -> None:
    points = torch.randn(2, 30, 7) * 100 + 1000
    distance = symmetric_distances(points)
    assert torch.equal(distance, distance.mT)
    assert (distance.diagonal(dim1=1, dim2=2) == 0).all()
    torch.testing.assert_close(
        distance, torch.cdist(points.double(), points.double()).square().float(), rtol=1e-4, atol=1
    )


@pytest.mark.parametrize("weights", ["equal", "zero"])
def test_means_have_gradients(weights: str) -> None:
    tokens = torch.randn(2, 12, 4, requires_grad=True)
    weight = torch.ones(2, 12)
    if weights == "zero":
        weight[:, 6:] = 0
    found = swapped(tokens.detach(), weight, 5, 3)
    means = means_by_swaps(tokens, weight, found)
    means.square().sum().backward()
    assert tokens.grad is not None and tokens.grad.isfinite().all() and tokens.grad.any()
