"""Agglomerative clustering, held against scikit-learn and against a loop over pairs of clusters."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import AgglomerativeClustering
from torch import Tensor

from tokenpool import micro_batch
from tokenpool.clustering import LINKAGES, agglomerate, agglomeration

SOME = settings(max_examples=40, deadline=None, derandomize=True)
SEEDS = st.integers(0, 10_000)
BY_PAIRS = ("average", "complete", "single")  # linkages that follow from the distances between two clusters' tokens


def random_distances(seed: int, batch: int, n: int) -> Tensor:
    distance = torch.rand(batch, n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (distance + distance.mT) * (1 - torch.eye(n))


def tied_distances(seed: int, batch: int, n: int, highest: int = 3) -> Tensor:
    """Whole numbers, of which many are equal, also zeros between different tokens."""
    distance = torch.randint(0, highest + 1, (batch, n, n), generator=torch.Generator().manual_seed(seed)).triu(1)
    return (distance + distance.mT).double()


def leaves(seed: int, batch: int, n: int) -> Tensor:
    """Distances of random leaves of a tree of depth three. Clusters of a level have equal distances for any linkage."""
    digits = torch.randint(0, 3, (batch, n, 3), generator=torch.Generator().manual_seed(seed))
    same = (digits[:, :, None] == digits[:, None]).cumprod(dim=3)  # digits of the common beginning
    return 3.0 - same.sum(dim=3).double()


def by_scikit_learn(distance: Tensor, k: int, linkage: str) -> list[np.ndarray]:
    model = AgglomerativeClustering(n_clusters=k, metric="precomputed", linkage=linkage)
    return [model.fit(image.numpy()).labels_ for image in distance]


def by_hand(distance: list[list[float]], k: int, linkage: str) -> list[int]:
    """One image, from the definition: the distance of two clusters is computed anew from those of their tokens."""
    clusters = [[token] for token in range(len(distance))]

    def between(pair: tuple[list[int], list[int]]) -> Fraction:
        values = [Fraction(distance[i][j]) for i in pair[0] for j in pair[1]]
        return {"average": sum(values) / len(values), "complete": max(values), "single": min(values)}[linkage]

    while len(clusters) > k:
        one, other = min(itertools.combinations(clusters, 2), key=between)  # the first one of the lowest
        clusters = sorted([cluster for cluster in clusters if cluster not in (one, other)] + [sorted(one + other)])
    return [next(c for c, cluster in enumerate(clusters) if token in cluster) for token in range(len(distance))]


def assert_same_clusters(found: Tensor, expected: list[np.ndarray]) -> None:
    for one, labels in zip(found.numpy(), expected, strict=True):
        assert np.array_equal(one[:, None] == one, labels[:, None] == labels)


@SOME
@given(seed=SEEDS, n=st.integers(2, 25), share=st.floats(0, 1), linkage=st.sampled_from(BY_PAIRS))
def test_clusters_are_scikit_learns(seed: int, n: int, share: float, linkage: str) -> None:
    k = 1 + round(share * (n - 1))
    distance = random_distances(seed, 3, n)
    assert_same_clusters(agglomerate(distance, k, linkage), by_scikit_learn(distance, k, linkage))


@SOME
@given(seed=SEEDS, n=st.integers(2, 25), share=st.floats(0, 1), linkage=st.sampled_from(("ward", "average")))
def test_a_token_of_weight_two_is_two_tokens_for_scikit_learn(seed: int, n: int, share: float, linkage: str) -> None:
    generator, k = torch.Generator().manual_seed(seed), 1 + round(share * (n - 1))
    points = torch.randn(3, n, 4, generator=generator, dtype=torch.float64)
    weights = torch.randint(1, 4, (3, n), generator=generator)
    distance = torch.cdist(points, points) ** 2
    found = agglomerate(distance, k, linkage, 0.3 * weights)  # only the ratios of weights matter
    for image in range(3):
        tokens = np.repeat(np.arange(n), weights[image])
        given_to = points[image][tokens] if linkage == "ward" else distance[image][tokens][:, tokens]
        metric = "euclidean" if linkage == "ward" else "precomputed"
        labels = AgglomerativeClustering(k, metric=metric, linkage=linkage).fit(given_to.numpy()).labels_
        assert_same_clusters(found[image : image + 1, tokens], [labels])
    if (weights == weights[:, :1]).all():
        assert torch.equal(found, agglomerate(distance, k, linkage))


def test_weights_without_use_do_not_spoil_the_merges() -> None:
    """Tokens of weight zero are merged first, and the others as without them."""
    points = torch.randn(2, 12, 3, generator=torch.Generator().manual_seed(0))
    weights = torch.rand(2, 12, generator=torch.Generator().manual_seed(1)) * (torch.arange(12) % 3 > 0)
    distance = torch.cdist(points, points) ** 2
    found = agglomerate(distance, 5, "ward", weights)
    heavy = torch.arange(12) % 3 > 0
    alone = agglomerate(distance[:, heavy][:, :, heavy], 5, "ward", weights[:, heavy])
    assert_same_clusters(found[:, heavy], list(alone.numpy()))


@SOME
@given(seed=SEEDS, n=st.integers(4, 25), linkage=st.sampled_from(BY_PAIRS))
def test_ties_that_leave_the_clusters_unique(seed: int, n: int, linkage: str) -> None:
    """K is the number of branches of a level of the tree. Equal distances decide only the order of merges."""
    distance = leaves(seed, 1, n)
    for level in (0, 1, 2):
        k = len(np.unique(distance[0].numpy() <= level, axis=0))
        found = agglomerate(distance, k, linkage)
        assert_same_clusters(found, by_scikit_learn(distance, k, linkage))
        assert torch.equal(found[:, :, None] == found[:, None], distance <= level)


@SOME
@given(seed=SEEDS, n=st.integers(2, 12), k=st.integers(1, 12), linkage=st.sampled_from(["complete", "single"]))
def test_of_equal_pairs_the_first_one_is_merged(seed: int, n: int, k: int, linkage: str) -> None:
    distance = tied_distances(seed, 2, n)
    found = agglomerate(distance, min(k, n), linkage)
    assert found.tolist() == [by_hand(image.tolist(), min(k, n), linkage) for image in distance]


@SOME
@given(seed=SEEDS, n=st.integers(2, 12), k=st.integers(1, 12))
def test_of_equal_averages_the_first_one_is_merged(seed: int, n: int, k: int) -> None:
    distance = leaves(seed, 2, n)  # averages of equal numbers do not round
    found = agglomerate(distance, min(k, n), "average")
    assert found.tolist() == [by_hand(image.tolist(), min(k, n), "average") for image in distance]


@pytest.mark.parametrize("linkage", LINKAGES)
@pytest.mark.parametrize("distances", [random_distances, tied_distances, leaves])
def test_a_graph_and_micro_batches_give_the_same(monkeypatch, distances, linkage: str) -> None:
    """A graph searches all rows for the nearest cluster, eager code a few."""
    distance = distances(0, 5, 30).float()
    for k in (1, 9, 29, 30):
        expected = agglomerate(distance, k, linkage)
        with monkeypatch.context() as patch:
            patch.setattr(agglomeration, "is_eager_cpu", lambda tensor: False)
            assert torch.equal(agglomerate(distance, k, linkage), expected)
        with monkeypatch.context() as patch:
            patch.setattr(micro_batch, "FEW_DISTANCES", micro_batch.Budget(2 * 30**2, 2 * 30**2))
            assert torch.equal(agglomerate(distance, k, linkage), expected)


def test_the_input_stays_and_clusters_have_the_order_of_their_first_tokens() -> None:
    distance = random_distances(1, 4, 20)
    before = distance.clone()
    found = agglomerate(distance, 6)
    assert torch.equal(distance, before)
    skewed = torch.rand(4, 20, 20, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    assert torch.equal(agglomerate(distance + (skewed - skewed.mT), 6), found)  # the mean with the transpose matters
    for image in found.tolist():
        assert list(dict.fromkeys(image)) == list(range(6))


@pytest.mark.parametrize(
    "shape, k, linkage, message",
    [
        ((1, 4, 4), 2, "median", "linkage = 'median' must be one of 'average', 'complete', 'single', 'ward'"),
        ((1, 4, 3), 2, "single", r"distance must have shape \(B, N, N\), got \(1, 4, 3\)"),
        ((4, 4), 2, "single", r"distance must have shape \(B, N, N\), got \(4, 4\)"),
        ((1, 4, 4), 0, "single", r"k = 0 must be a whole number in 1\.\.4"),
        ((1, 4, 4), 5, "single", r"k = 5 must be a whole number in 1\.\.4"),
    ],
)
def test_bad_arguments_are_named(shape: tuple, k: int, linkage: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        agglomerate(torch.zeros(shape), k, linkage)
