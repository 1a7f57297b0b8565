import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans

import tokenpool
from experiments.throughput import peak_memory
from tokenpool.clustering import (
    Clusters,
    _first_medoids,
    _OthersDistances,
    dearest_to_merge,
    highest,
    kmeans,
    kmedoids,
    means,
    squared_distances,
)

BOTH = pytest.mark.parametrize("cluster", [kmeans, kmedoids])


def images(batch: int = 4, n: int = 40, width: int = 8, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens in loose groups, and weights."""
    generator = torch.Generator().manual_seed(seed)
    groups = torch.randn(batch, 6, width, generator=generator) * 3
    member = torch.randint(6, (batch, n, 1), generator=generator).expand(-1, -1, width)
    tokens = groups.gather(1, member) + torch.randn(batch, n, width, generator=generator)
    return tokens, torch.rand(batch, n, generator=generator) + 0.05


def looped_kmedoids(tokens: torch.Tensor, weights: torch.Tensor, medoids: list[int], iterations: int) -> list[int]:
    """Objective (13) under the medoid constraint, one image, by loops: assignment of each token."""
    for _ in range(iterations):
        assignment = [min(range(len(medoids)), key=lambda j: (x - tokens[medoids[j]]).square().sum()) for x in tokens]
        updated = []
        for j, old in enumerate(medoids):
            members = [i for i, a in enumerate(assignment) if a == j]
            cost = {i: sum(weights[o] * (tokens[i] - tokens[o]).square().sum() for o in members) for i in members}
            updated.append(min(cost, key=cost.get) if cost else old)
        if updated == medoids:
            break
        medoids = updated
    return assignment


@pytest.mark.parametrize("k", [1, 3, 17, 39])
@pytest.mark.parametrize("weighted", [False, True])
def test_kmeans_equals_scikit_learn(k: int, weighted: bool) -> None:
    tokens, weights = images()
    tokens = tokens.double()
    init = highest(weights, k)
    # Sixty iterations converge, so that scikit-learn's last extra assignment changes nothing.
    found = kmeans(tokens, k, weights if weighted else None, init, iterations=60)
    for image in range(len(tokens)):
        oracle = KMeans(k, init=tokens[image, init[image]].numpy(), n_init=1, max_iter=60, tol=0, algorithm="lloyd")
        oracle.fit(tokens[image].numpy(), sample_weight=weights[image].numpy() if weighted else None)
        assert found.assignment[image].tolist() == oracle.labels_.tolist()
        torch.testing.assert_close(found.centers[image], torch.tensor(oracle.cluster_centers_))


def test_kmeans_stops_where_scikit_learn_does() -> None:
    tokens, weights = images(batch=1, n=120)
    tokens = tokens.double()
    init = tokens[:, :9]
    for iterations in (1, 2, 5):
        oracle = KMeans(9, init=init[0].numpy(), n_init=1, max_iter=iterations, tol=0).fit(
            tokens[0].numpy(), sample_weight=weights[0].numpy()
        )
        found = kmeans(tokens, 9, weights, init, iterations)
        torch.testing.assert_close(found.centers[0], torch.tensor(oracle.cluster_centers_))


@pytest.mark.parametrize("k", [1, 4, 15, 30])
@pytest.mark.parametrize("weighted", [False, True])
def test_kmedoids_equals_loops(k: int, weighted: bool) -> None:
    tokens, weights = images(batch=3, n=30)
    tokens, weights = tokens.double(), weights.double()
    ones = torch.ones_like(weights)
    init = highest(weights, k)
    found = kmedoids(tokens, k, weights if weighted else None, init)
    for image in range(len(tokens)):
        used = weights[image] if weighted else ones[image]
        expected = looped_kmedoids(tokens[image], used, init[image].tolist(), iterations=5)
        assert found.assignment[image].tolist() == expected
        for j in range(k):
            members = found.assignment[image] == j
            mean = (used[members, None] * tokens[image, members]).sum(0) / used[members].sum()
            torch.testing.assert_close(found.centers[image, j], mean)


def test_kmedoids_finds_the_best_medoid_of_one_cluster() -> None:
    """With K = 1 one update must find the global optimum over all medoids."""
    tokens, weights = images(batch=2, n=12)
    cost = (squared_distances(tokens) * weights[:, None, :]).sum(-1)  # (B, N)
    other = torch.full((2, 1), 3)
    medoid = cost.argmin(-1)
    # The medoid is not returned, but decides what a second cluster may take: compare with starting from it.
    from_best = kmedoids(tokens, 2, weights, torch.cat([medoid[:, None], other], 1), iterations=1)
    nearest = squared_distances(tokens).gather(1, torch.stack([medoid, other[:, 0]], 1)[:, :, None].expand(-1, -1, 12))
    assert torch.equal(from_best.assignment, nearest.argmin(1))


def objective(tokens: torch.Tensor, centers: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Objective (13): (B,)."""
    return (torch.cdist(tokens, centers).square().amin(-1) * weights).sum(-1)


def medoid_objective(tokens: torch.Tensor, weights: torch.Tensor, assignment: torch.Tensor) -> torch.Tensor:
    """Objective (13) of the best medoids of each cluster: (B,)."""
    same = assignment[:, :, None] == assignment[:, None, :]  # (B, N, N)
    cost = (squared_distances(tokens) * weights[:, None, :] * same).sum(-1)  # (B, N)
    best = torch.full((len(tokens), int(assignment.max()) + 1), torch.inf).scatter_reduce(1, assignment, cost, "amin")
    return best.nan_to_num(posinf=0).sum(-1)


@BOTH
def test_objective_never_rises(cluster) -> None:
    tokens, weights = images(n=80)
    found = [cluster(tokens, 9, weights, iterations=i) for i in range(1, 12)]
    if cluster is kmeans:
        errors = [objective(tokens, clusters.centers, weights) for clusters in found]
    else:
        errors = [medoid_objective(tokens, weights, clusters.assignment) for clusters in found]
    for earlier, later in itertools.pairwise(errors):
        assert (later <= earlier * (1 + 1e-5)).all()


@BOTH
def test_weight_two_is_the_token_twice(cluster) -> None:
    tokens, _ = images()
    doubled = torch.tensor([1.0, 2.0]).repeat(20).expand(4, -1)
    twice = torch.cat([tokens, tokens[:, 1::2]], 1)
    init = torch.arange(6).expand(4, -1)
    one, two = cluster(tokens, 6, doubled, init), cluster(twice, 6, None, init)
    assert torch.equal(one.assignment, two.assignment[:, :40])
    torch.testing.assert_close(one.centers, two.centers)


@BOTH
def test_scale_of_weights_is_irrelevant(cluster) -> None:
    tokens, weights = images()
    for factor in (1e-30, 1e30):
        found, expected = cluster(tokens, 7, weights * factor), cluster(tokens, 7, weights)
        assert torch.equal(found.assignment, expected.assignment)
        torch.testing.assert_close(found.centers, expected.centers)


@pytest.mark.parametrize("cluster", [kmeans, kmedoids, pytest.param(partial(kmedoids, init="ward"), id="ward")])
@pytest.mark.parametrize("n, width, k", [(196, 384, 98), (64, 48, 16)])
def test_an_image_does_not_depend_on_its_batch(cluster, n: int, width: int, k: int) -> None:
    tokens, weights = images(batch=9, n=n, width=width)
    together = cluster(tokens, k, weights)
    for image in range(9):
        alone = cluster(tokens[image : image + 1], k, weights[image : image + 1])
        assert torch.equal(alone.assignment[0], together.assignment[image])
        torch.testing.assert_close(alone.centers[0], together.centers[image], rtol=0, atol=1e-5)


@BOTH
def test_permuting_tokens_permutes_assignments(cluster) -> None:
    tokens, weights = images()
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    found, permuted = cluster(tokens, 7, weights), cluster(tokens[:, order], 7, weights[:, order])
    assert torch.equal(permuted.assignment, found.assignment[:, order])


@BOTH
def test_as_many_clusters_as_tokens_is_the_identity(cluster) -> None:
    tokens, weights = images()
    found = cluster(tokens, 40, weights)
    torch.testing.assert_close(found.centers.gather(1, found.assignment[:, :, None].expand(-1, -1, 8)), tokens)
    assert (found.assignment.sort(-1).values == torch.arange(40)).all()


@BOTH
@pytest.mark.parametrize("value", [0.0, 1.0, -1e4])
def test_all_duplicates(cluster, value: float) -> None:
    tokens = torch.full((2, 20, 5), value, requires_grad=True)
    found = cluster(tokens, 7, torch.rand(2, 20) + 0.1)
    torch.testing.assert_close(found.centers, torch.full((2, 7, 5), value))
    assert found.assignment.min() >= 0 and found.assignment.max() < 7
    found.centers.sum().backward()
    assert tokens.grad.isfinite().all()


@BOTH
def test_a_centre_without_members_stays(cluster) -> None:
    tokens = torch.tensor([[[0.0], [0.0], [10.0], [11.0]]])
    found = cluster(tokens, 3, init=torch.tensor([[0, 1, 2]]))
    assert found.assignment.tolist() == [[0, 0, 2, 2]]
    assert found.centers.flatten().tolist() == [0.0, 0.0, 10.5]


@BOTH
def test_weightless_tokens_do_not_count(cluster) -> None:
    tokens, weights = images()
    weights[:, ::2] = 0
    found = cluster(tokens, 5, weights)
    assert found.centers.isfinite().all()
    moved = tokens.clone()
    moved[:, ::2] += 1e-4
    torch.testing.assert_close(cluster(moved, 5, weights).centers, found.centers)
    only_weightless = cluster(torch.tensor([[[0.0], [9.0], [9.5]]]), 2, torch.tensor([[1.0, 0.0, 0.0]]))
    assert only_weightless.centers.isfinite().all()


@BOTH
def test_gradients_are_those_of_the_means(cluster) -> None:
    tokens, weights = images(batch=2)
    tokens.requires_grad_()
    weights.requires_grad_()
    found = cluster(tokens, 7, weights)
    pull = torch.randn(2, 7, 8)
    (found.centers * pull).sum().backward()
    total = torch.zeros(2, 7).scatter_add(1, found.assignment, weights.detach())
    share = weights.detach() / total.gather(1, found.assignment)
    expected = share[:, :, None] * pull.gather(1, found.assignment[:, :, None].expand(-1, -1, 8))
    torch.testing.assert_close(tokens.grad, expected)
    assert weights.grad is None


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_half_precision(cluster, dtype: torch.dtype) -> None:
    tokens, weights = images()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = cluster(tokens, 7, weights)
    assert torch.equal(found.assignment, cluster(tokens, 7, weights).assignment)
    assert found.centers.dtype == torch.float32
    half = tokens.to(dtype)
    assert torch.equal(cluster(half, 7, weights).assignment, cluster(half.float(), 7, weights).assignment)
    assert cluster(half, 7, weights).centers.dtype == dtype


@BOTH
def test_compiled(cluster) -> None:
    tokens, weights = images()
    compiled = torch.compile(cluster, fullgraph=True)(tokens, 7, weights)
    eager = cluster(tokens, 7, weights)
    assert torch.equal(compiled.assignment, eager.assignment)
    torch.testing.assert_close(compiled.centers, eager.centers)


def test_distances_survive_a_common_offset() -> None:
    tokens, _ = images()
    torch.testing.assert_close(squared_distances(tokens + 1000), torch.cdist(tokens, tokens).square(), rtol=0, atol=0.1)


def test_ties_go_to_the_earlier_token() -> None:
    assert highest(torch.tensor([[1.0, 2.0, 2.0, 0.0, 2.0]]), 3).tolist() == [[1, 2, 4]]


def nan_at(image: int) -> torch.Tensor:
    tokens = torch.randn(3, 10, 4)
    tokens[image, 2, 1] = torch.nan
    return tokens


@BOTH
@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"k": 0}, r"k = 0 must be a whole number in 1\.\.10"),
        ({"k": 11}, r"k = 11 must be a whole number in 1\.\.10"),
        ({"k": 2.0}, r"k = 2\.0"),
        ({"tokens": torch.randn(10, 4)}, r"tokens must be .* \(B, N, D\)"),
        ({"tokens": torch.ones(3, 10, 4, dtype=torch.int64)}, "tokens must be floating point"),
        ({"tokens": nan_at(1)}, "tokens must be finite, but those of image 1"),
        ({"tokens": nan_at(2).nan_to_num(torch.inf)}, "tokens must be finite, but those of image 2"),
        ({"weights": torch.ones(3, 9)}, r"weights must have shape \(B, N\) = \(3, 10\)"),
        ({"weights": -torch.ones(3, 10)}, r"weights must be .* image 0 .* lie in -1\.\.-1"),
        ({"weights": torch.full((3, 10), torch.nan)}, "weights must be finite"),
        ({"weights": torch.zeros(3, 10)}, "not all zero"),
        ({"init": torch.zeros(3, 4, dtype=torch.int64)}, r"init must have shape \(3, 3\)"),
        ({"init": torch.full((3, 3), 10)}, r"init must hold token indices in 0\.\.9"),
        ({"iterations": 0}, "iterations = 0 must be a whole number, at least 1"),
        ({"iterations": 2.5}, "iterations = 2.5 must be a whole number"),
    ],
)
def test_bad_input_is_named(cluster, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cluster(**{"tokens": torch.randn(3, 10, 4), "k": 3} | arguments)


def test_points_to_start_from_become_the_nearest_tokens() -> None:
    tokens, weights = images()
    chosen = torch.tensor([[3, 7, 21]]).expand(4, -1)
    near = tokens.gather(1, chosen[:, :, None].expand(-1, -1, 8)) + 1e-3
    assert torch.equal(kmedoids(tokens, 3, weights, near).assignment, kmedoids(tokens, 3, weights, chosen).assignment)


@BOTH
@pytest.mark.parametrize("factor", [2.0**-120, 2.0**110])
def test_huge_and_tiny_tokens(cluster, factor: float) -> None:
    tokens, weights = images()
    found, expected = cluster(tokens * factor, 7, weights), cluster(tokens, 7, weights)
    assert torch.equal(found.assignment, expected.assignment)
    torch.testing.assert_close(found.centers / factor, expected.centers)
    assert cluster(torch.full((1, 4, 2), 3e38), 2).centers.isfinite().all()


@BOTH
def test_empty_batch_and_numpy_numbers(cluster) -> None:
    assert cluster(torch.randn(0, 5, 2), np.int64(3)).centers.shape == (0, 3, 2)
    with pytest.raises(TypeError, match="tokens must be a tensor, got ndarray"):
        cluster(np.ones((1, 5, 2)), 3)
    with pytest.raises(TypeError, match="weights must be a tensor, got list"):
        cluster(torch.randn(1, 5, 2), 3, [1, 1, 1, 1, 1])


def test_distances_may_be_between_other_points() -> None:
    tokens, weights = images()
    by = torch.randn(*tokens.shape[:2], 3, generator=torch.Generator().manual_seed(8))
    found = kmedoids(tokens, 7, weights, by=by)
    assert torch.equal(found.assignment, kmedoids(by, 7, weights).assignment)
    assert torch.allclose(found.centers, means(tokens, weights, found.assignment, 7), atol=1e-6)
    for k in (7, 30):  # in another precision, too
        found = kmedoids(tokens, k, weights, by=by.double())
        assert torch.equal(found.assignment, kmedoids(by, k, weights).assignment)


def test_distances_are_symmetric_to_the_last_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a cluster of two both cost the same: which becomes the medoid is for the order to say, not for rounding.

    Some matrix products, such as ONNX Runtime's, round the two halves of a Gram matrix differently.
    """
    points = torch.randn(4, 61, 33, generator=torch.Generator().manual_seed(1))
    product = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda a, b: product(a, b) * (1 + 1e-6 * torch.ones(61, 61).triu(1)))
    distance = squared_distances(points)
    assert torch.equal(distance, distance.mT) and (distance.diagonal(dim1=1, dim2=2) == 0).all()


@pytest.mark.parametrize("floats_at_once", [None, 20, 7 * 20, 19 * 20, 20**2, 2**18])
@pytest.mark.parametrize("equal", [False, True])
def test_dearest_to_merge_equals_a_loop(
    equal: bool, floats_at_once: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the whole matrix (None), and by some rows of it at a time."""
    generator = torch.Generator().manual_seed(2)
    points = torch.randn(3, 20, 4, generator=generator)
    weights = torch.ones(3, 20) if equal else torch.rand(3, 20, generator=generator)
    if floats_at_once is None:
        found = dearest_to_merge(squared_distances(points), weights, 6)
    else:
        monkeypatch.setattr(tokenpool.clustering, "_floats_at_once", lambda points: floats_at_once)
        found = _first_medoids(points, weights, 6)
    for image in range(3):
        w = weights[image].tolist()
        cheapest = []
        for i in range(20):
            higher = [j for j in range(20) if w[j] > w[i] or (w[j] == w[i] and j < i)]
            costs = [
                w[i] * w[j] / (w[i] + w[j]) * (points[image, i] - points[image, j]).square().sum().item()
                for j in higher
            ]
            cheapest.append(min(costs, default=float("inf")))
        assert found[image].tolist() == sorted(range(20), key=lambda i: -cheapest[i])[:6]


@pytest.mark.parametrize("floats_at_once", [7 * 30, 2**18])
def test_of_equal_points_the_first_are_the_first_medoids(floats_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding has no say: what merging equal points costs is zero, and of equal costs the earlier wins."""
    monkeypatch.setattr(tokenpool.clustering, "_floats_at_once", lambda points: floats_at_once)
    generator = torch.Generator().manual_seed(5)
    points = torch.randn(50, 10, 384, generator=generator).repeat(1, 3, 1)
    for weights in (torch.ones(50, 30), torch.rand(50, 30, generator=generator)):
        expected = dearest_to_merge(squared_distances(points), weights, 25)
        assert torch.equal(_first_medoids(points, weights, 25), expected)


def test_first_medoids_in_a_graph() -> None:
    tokens, weights = images(n=30)
    expected = _first_medoids(tokens, weights, 25)
    assert torch.equal(torch.compile(_first_medoids, backend="eager", fullgraph=True)(tokens, weights, 25), expected)


@pytest.mark.parametrize("factor", [2.0**-100, 2.0**100])
def test_wards_centres_do_not_depend_on_the_scale(factor: float) -> None:
    tokens, weights = images(n=30)
    found, expected = kmedoids(tokens * factor, 25, weights, "ward"), kmedoids(tokens, 25, weights, "ward")
    assert torch.equal(found.assignment, expected.assignment)


def test_wards_centres_take_no_matrix_of_all_distances() -> None:
    tokens, weights = images(batch=1, n=2048)
    taken = peak_memory(lambda: kmedoids(tokens, 2000, weights, "ward"), tokens.device)
    assert taken < 2048**2 * 4 / 2


def test_merging_raises_the_objective_by_wards_cost() -> None:
    generator = torch.Generator().manual_seed(3)
    points, weights = torch.randn(1, 2, 5, generator=generator), torch.rand(1, 2, generator=generator)
    mean = means(points, weights, torch.zeros(1, 2, dtype=torch.int64), 1)
    objective = (weights * (points - mean).square().sum(-1)).sum()
    pair = weights.prod() / weights.sum() * (points[0, 0] - points[0, 1]).square().sum()
    torch.testing.assert_close(objective, pair)


def test_wards_centres_keep_one_of_each_group() -> None:
    """Tight groups of different sizes: every group gets one centre, and the objective is at its lowest at once."""
    generator = torch.Generator().manual_seed(4)
    groups = 10 * torch.randn(5, 6, generator=generator)
    label = torch.tensor([0] * 9 + [1] * 5 + [2] * 3 + [3] * 2 + [4])[torch.randperm(20, generator=generator)]
    tokens = (groups[label] + 0.01 * torch.randn(20, 6, generator=generator))[None]
    found = kmedoids(tokens, 5, torch.rand(1, 20, generator=generator), init="ward", iterations=1)
    assert len({(a, b) for a, b in zip(found.assignment[0].tolist(), label.tolist(), strict=True)}) == 5


def test_bad_options_of_kmedoids_are_named() -> None:
    tokens, weights = images()
    with pytest.raises(ValueError, match="init = 'random' must be a tensor, None or \"ward\""):
        kmedoids(tokens, 3, weights, init="random")
    with pytest.raises(ValueError, match=r"by must have shape \(B, N, E\)"):
        kmedoids(tokens, 3, weights, by=tokens[:, :-1])
    with pytest.raises(ValueError, match="by must be finite"):
        kmedoids(tokens, 3, weights, by=tokens / 0)


def both_ways(monkeypatch: pytest.MonkeyPatch, *arguments: Any, **options: Any) -> tuple[Clusters, Clusters]:
    """What K-Medoids finds by the distances of the other tokens, and by all distances."""
    found = []
    for few in (True, False):
        monkeypatch.setattr(tokenpool.clustering, "_are_few_others", lambda *given, few=few: few)
        found.append(kmedoids(*arguments, **options))
    return found


@pytest.mark.parametrize("n, k", [(2, 1), (2, 2), (30, 30), (30, 29), (30, 20), (61, 31), (61, 7), (61, 1)])
@pytest.mark.parametrize("init", [None, "ward"])
def test_distances_of_other_tokens_are_all_that_is_needed(
    n: int, k: int, init: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, weights = images(batch=5, n=n)
    weights[:, 3::5] = 0
    looked = []
    monkeypatch.setattr(_OthersDistances, "assign", spied(_OthersDistances.assign, looked))
    for iterations in (1, 2, 5):
        few, every = both_ways(monkeypatch, tokens, k, weights, init, iterations)
        assert torch.equal(few.assignment, every.assignment)
        torch.testing.assert_close(few.centers, every.centers)
    assert looked


def spied(function: Callable, calls: list) -> Callable:
    return lambda *given: calls.append(given) or function(*given)


@pytest.mark.parametrize("width", [1, 2, 6])
def test_ties_fall_alike_where_distances_are_exact(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole numbers with mean zero: many are equal, or equally far."""
    generator = torch.Generator().manual_seed(width)
    for n, k in ((40, 8), (40, 25), (40, 39)):
        half = torch.randint(-20, 21, (30, n // 2, width), generator=generator).float()
        tokens = torch.cat([half, -half], 1)[:, torch.randperm(n, generator=generator)]
        weights = torch.randint(0, 5, (30, n), generator=generator).float() / 4
        weights[:, 0] = 1
        few, every = both_ways(monkeypatch, tokens, k, weights)
        assert torch.equal(few.assignment, every.assignment)
        suits = _OthersDistances(tokens).suits(highest(weights, k))
        assert any(suits) or width == 1 or (width, k) == (2, 39)


def test_medoids_at_the_same_place_are_found() -> None:
    points = torch.randn(2, 12, 5, generator=torch.Generator().manual_seed(0))
    medoids = torch.arange(8).expand(2, 8)
    assert _OthersDistances(points).suits(medoids) == [True, True]
    points[1, 9] = points[1, 2]  # no medoid
    distances = _OthersDistances(points)
    assert distances.suits(medoids) == [True, True]
    assert distances.suits(medoids.where(medoids != 7, 9)) == [True, False]
    assert distances.suits(medoids.where(medoids != 7, 3)) == [False, False]  # one token twice
    circle = torch.tensor([[3.0, 4], [-3, -4], [4, -3], [-4, 3], [5, 0], [-5, 0], [0, 5], [0, -5]])
    assert _OthersDistances(circle[None]).suits(torch.arange(8)[None]) == [True]  # equally far from the mean, but apart
    for first, second in itertools.combinations(range(8), 2):
        repeated = torch.arange(8)[None].where(torch.arange(8) != second, first)
        assert _OthersDistances(circle[None]).suits(repeated) == [False]
    many = torch.eye(32)[None]
    assert _OthersDistances(many).suits(torch.arange(9)[None]) == [True]
    assert _OthersDistances(many).suits(torch.arange(20)[None]) == [False]  # too many to look at
    assert _OthersDistances(torch.cat([points[:1] * 1e30, points[:1]])).suits(medoids) == [False, True]


def test_an_image_does_not_depend_on_one_that_needs_all_distances() -> None:
    """By all distances the first two tokens coincide, so near are they. The other image has equal tokens only."""
    close = torch.tensor([[[4096], [4096 + 2**-11], [-4096], [-(4096 + 2**-11)]]])
    init = torch.tensor([[0, 1]])
    alone = kmedoids(close, 2, init=init, iterations=1)
    together = kmedoids(torch.cat([close, torch.zeros(1, 4, 1)]), 2, init=init.expand(2, 2), iterations=1)
    assert torch.equal(together.assignment[:1], alone.assignment) and torch.equal(together.centers[:1], alone.centers)
    assert together.assignment[1].tolist() == [0, 0, 0, 0]


def test_two_of_one_weight_cost_the_same_to_the_last_bit() -> None:
    """Beside a medoid without weight, which of them becomes the next is for the order to say, not for rounding."""
    points = torch.randn(500, 4, 7, generator=torch.Generator().manual_seed(0))
    medoids, weights = torch.tensor([[0, 1]]).expand(500, 2), torch.tensor([[0.0, 1, 1, 1]]).expand(500, 4)
    distances = _OthersDistances(points)
    assignment = distances.assign(medoids)
    costs = distances.costs(weights, assignment, medoids)
    both = (assignment[:, 2:] == 0).all(dim=1)
    assert both.sum() > 50 and torch.equal(costs[both, 2], costs[both, 3])


def test_weights_of_minus_zero() -> None:
    found = kmedoids(torch.tensor([[[0.0], [1], [5], [9]]]), 2, torch.tensor([[1.0, 0.5, 0.0, -0.0]]), "ward")
    assert found.assignment.tolist() == [[0, 1, 1, 1]] and found.centers.tolist() == [[[0.0], [1.0]]]


@pytest.mark.parametrize("repeated", [[0, 1, 1], [0, 0, 0]])
def test_a_token_may_be_given_as_medoid_twice(repeated: list[int]) -> None:
    found = kmedoids(torch.tensor([[[0.0], [1.0], [10.0], [11.0]]]), 3, init=torch.tensor([repeated]), iterations=1)
    assert 2 not in found.assignment[0] and found.centers.isfinite().all()


@pytest.mark.parametrize("k", [3, 17])
def test_where_squares_overflow_all_distances_are_scaled(k: int) -> None:
    tokens, weights = images(n=20)
    expected = kmedoids(tokens, k, weights)
    for factor in (2.0**-80, 2.0**48, 2.0**62, 2.0**70):
        assert torch.equal(kmedoids(tokens * factor, k, weights).assignment, expected.assignment)
    tokens[:, 0], weights[:, 0] = 8 * tokens[:, 0], 0  # the only one whose square overflows, and no medoid
    found = kmedoids(tokens * 2.0**58, k, weights)
    assert torch.equal(found.assignment, kmedoids(tokens, k, weights).assignment)


def test_a_few_images_at_a_time_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens, weights = torch.randn(7, 30, 6, generator=generator), torch.rand(7, 30, generator=generator)
    points = torch.randn(7, 8, 6, generator=generator)
    for k, init in ((8, None), (8, "ward"), (25, "ward"), (8, points), (8, highest(weights, 8))):
        expected = kmedoids(tokens, k, weights, init)
        for at_once in (1, 3, 7):
            monkeypatch.setattr(tokenpool.clustering, "_images_at_once", lambda *given, at_once=at_once: at_once)
            found = kmedoids(tokens, k, weights, init)
            assert torch.equal(found.assignment, expected.assignment)
            torch.testing.assert_close(found.centers, expected.centers)
        monkeypatch.undo()
