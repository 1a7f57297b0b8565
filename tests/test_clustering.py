"""K-Means and K-Medoids against scikit-learn, loops and invariants."""

import itertools
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from torch import Tensor

from tokenpool import clustering, micro_batch
from tokenpool.clustering import kmeans, kmedoids, means, squared_distances, stable_topk, ward_init
from tokenpool.clustering.algorithm import alternate
from tokenpool.clustering.distances import AllDistances, FewDistances, few_distances
from tokenpool.runs.timing import peak_memory

ward = partial(kmedoids, init="ward")
BOTH = pytest.mark.parametrize("cluster", [kmeans, kmedoids])
ALL = pytest.mark.parametrize("cluster", [kmeans, kmedoids, ward], ids=["kmeans", "kmedoids", "ward"])
SEEDS = st.integers(0, 2**32 - 1)
few_examples = settings(max_examples=25, deadline=None, derandomize=True)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(batch: int = 4, n: int = 40, width: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Tokens in loose groups, and weights."""
    source = generator(seed)
    groups = torch.randn(batch, 6, width, generator=source) * 3
    member = torch.randint(6, (batch, n, 1), generator=source).expand(-1, -1, width)
    tokens = groups.gather(1, member) + torch.randn(batch, n, width, generator=source)
    return tokens, torch.rand(batch, n, generator=source) + 0.05


@st.composite
def problems(draw: st.DrawFn, most: int = 30) -> tuple[Tensor, Tensor, int]:
    """Tokens, weights, and a number of clusters, in float64."""
    n = draw(st.integers(1, most))
    tokens, weights = images(draw(st.integers(1, 4)), n, draw(st.integers(1, 6)), draw(SEEDS))
    return tokens.double(), weights.double(), draw(st.integers(1, n))


def whole_numbers(batch: int, n: int, width: int, seed: int) -> tuple[Tensor, Tensor]:
    """Tokens of mean zero and weights whose distances and costs are exact: many are equal, or equally far."""
    source = generator(seed)
    half = torch.randint(-4, 5, (batch, n // 2, width), generator=source).float()
    tokens = torch.cat([half, -half, half.new_zeros(batch, n % 2, width)], 1)
    weights = torch.randint(0, 5, (batch, n), generator=source).float() / 4
    weights[:, 0] = 1
    return tokens[:, torch.randperm(n, generator=source)], weights


def looped_kmedoids(x: np.ndarray, weights: np.ndarray, medoids: list[int], iterations: int) -> list[int]:
    """Equations (16)-(18) with weights, one image, by loops: the assignment of each token."""
    distance = ((x[:, None] - x[None]) ** 2).sum(-1)

    def assign() -> list[int]:
        return [min(range(len(medoids)), key=lambda j: distance[i, medoids[j]]) for i in range(len(x))]

    assignment = assign()
    for _ in range(iterations - 1):
        for j in range(len(medoids)):
            members = [i for i, a in enumerate(assignment) if a == j]
            if weights[members].sum() > 0:
                medoids[j] = min(members, key=lambda i: (weights[members] * distance[i, members]).sum())
        assignment = assign()
    return assignment


def looped_ward(x: np.ndarray, w: np.ndarray, k: int) -> list[int]:
    """Ward's criterion, one image: the indices of the K tokens that cost most to merge into one of higher weight."""
    cheapest = []
    for i in range(len(x)):
        higher = [j for j in range(len(x)) if w[j] > w[i] or (w[j] == w[i] and j < i)]
        costs = [w[i] * w[j] / (w[i] + w[j]) * ((x[i] - x[j]) ** 2).sum() for j in higher]
        cheapest.append(min(costs, default=np.inf))
    return sorted(range(len(x)), key=lambda i: -cheapest[i])[:k]


# Oracles


@pytest.mark.parametrize("k", [1, 3, 17, 39])
@pytest.mark.parametrize("weighted", [False, True])
def test_kmeans_equals_scikit_learn(k: int, weighted: bool) -> None:
    tokens, weights = (values.double() for values in images(batch=2))
    init = stable_topk(weights, k)
    for iterations in (1, 2, 60):  # sixty converge, so that scikit-learn's last extra assignment changes nothing
        found = kmeans(tokens, k, weights if weighted else None, init, iterations)
        for image in range(len(tokens)):
            oracle = KMeans(k, init=tokens[image, init[image]].numpy(), n_init=1, max_iter=iterations, tol=0)
            oracle.fit(tokens[image].numpy(), sample_weight=weights[image].numpy() if weighted else None)
            torch.testing.assert_close(found.centers[image], torch.tensor(oracle.cluster_centers_))
            if iterations == 60:
                assert found.assignment[image].tolist() == oracle.labels_.tolist()


@few_examples
@given(
    problems(), st.sampled_from(["indices", "points", "ward", None]), st.integers(1, 5), st.booleans(), st.booleans()
)
def test_kmedoids_equals_loops(
    problem, init: str | None, iterations: int, weighted: bool, some_weightless: bool
) -> None:
    tokens, weights, k = problem
    batch, n, _ = tokens.shape
    if some_weightless:
        weights[:, 1::3] = 0
    used = weights if weighted else torch.ones_like(weights)
    first = stable_topk(torch.rand(batch, n, generator=generator(0)), k)
    start = {"points": tokens.gather(1, first[:, :, None].expand(-1, -1, tokens.shape[2])), "indices": first}
    found = kmedoids(tokens, k, weights if weighted else None, start.get(init, init), iterations)
    for image, (x, w) in enumerate(zip(tokens.numpy(), used.numpy(), strict=True)):
        medoids = {
            "ward": lambda x=x, w=w: looped_ward(x, np.maximum(w, 1e-300), k),
            None: lambda w=w: sorted(range(n), key=lambda i: -w[i])[:k] if weighted else [i * n // k for i in range(k)],
        }.get(init, lambda image=image: first[image].tolist())()
        assert found.assignment[image].tolist() == looped_kmedoids(x, w, medoids, iterations)
        for j in range(k):
            members = found.assignment[image] == j
            if (total := used[image, members].sum()) > 0:
                mean = (used[image, members, None] * tokens[image, members]).sum(0) / total
                torch.testing.assert_close(found.centers[image, j], mean)


@few_examples
@given(SEEDS, st.booleans(), st.sampled_from([1, 20, 7 * 20, 19 * 20, 2**18]), st.integers(1, 20))
def test_ward_equals_loops(seed: int, equal: bool, budget: int, k: int) -> None:
    """From a matrix of distances, and from the points for a few images or rows at a time."""
    points, weights = images(3, 20, 4, seed)
    weights = torch.ones_like(weights) if equal else weights
    expected = [looped_ward(x, w, k) for x, w in zip(points.numpy(), weights.numpy(), strict=True)]
    assert ward_init(points, weights, k, squared_distances(points)).tolist() == expected
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(micro_batch, "DISTANCES", micro_batch.Budget(budget, budget))
        assert ward_init(points, weights, k).tolist() == expected


@few_examples
@given(SEEDS, st.integers(1, 6), st.integers(1, 40), st.integers(1, 5), st.booleans())
def test_engines_agree_to_the_last_tie(seed: int, width: int, k: int, iterations: int, repeated: bool) -> None:
    """`FewDistances`, where it suits, and `AllDistances`; on whole numbers, where both are exact."""
    tokens, weights = whole_numbers(20, 40, width, seed)
    medoids = stable_topk(weights, k)
    if repeated:
        medoids = medoids.clone()
        medoids[::3, -1] = medoids[::3, 0]
    few = few_distances(tokens, medoids)
    found = alternate(few, weights, medoids, iterations)
    expected = alternate(AllDistances(tokens), weights, medoids, iterations)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_ties_go_to_the_earlier_token() -> None:
    assert stable_topk(torch.tensor([[1.0, 2.0, 2.0, 0.0, 2.0]]), 3).tolist() == [[1, 2, 4]]


# Invariants


@ALL
@few_examples
@given(problem=problems(), seed=SEEDS)
def test_permuting_tokens_permutes_assignments(cluster, problem, seed: int) -> None:
    tokens, weights, k = problem
    order = torch.randperm(tokens.shape[1], generator=generator(seed))
    found, permuted = cluster(tokens, k, weights), cluster(tokens[:, order], k, weights[:, order])
    assert torch.equal(permuted.assignment, found.assignment[:, order])


@BOTH
@few_examples
@given(problem=problems(), seed=SEEDS)
def test_weight_two_is_the_token_twice(cluster, problem, seed: int) -> None:
    tokens, weights, k = problem
    n = tokens.shape[1]
    double = torch.rand(n, generator=generator(seed)) < 0.5
    init = torch.arange(k).expand(len(tokens), -1)
    one = cluster(tokens, k, weights * (1 + double), init)
    two = cluster(torch.cat([tokens, tokens[:, double]], 1), k, torch.cat([weights, weights[:, double]], 1), init)
    assert torch.equal(two.assignment, torch.cat([one.assignment, one.assignment[:, double]], 1))
    torch.testing.assert_close(one.centers, two.centers)


@ALL
@few_examples
@given(problem=problems())
def test_as_many_clusters_as_tokens_is_the_identity(cluster, problem) -> None:
    tokens, weights, _ = problem
    _, n, width = tokens.shape
    found = cluster(tokens, n, weights)
    torch.testing.assert_close(found.centers.gather(1, found.assignment[:, :, None].expand(-1, -1, width)), tokens)
    assert (found.assignment.sort(-1).values == torch.arange(n)).all()


@ALL
@few_examples
@given(problem=problems(most=80))
def test_the_objective_never_rises(cluster, problem) -> None:
    """Objective (13) of the centres (K-Means), or of the best medoids of each cluster."""
    tokens, weights, k = problem
    distance = torch.cdist(tokens, tokens).square()
    errors = []
    for iterations in range(1, 8):
        found = cluster(tokens, k, weights, iterations=iterations)
        if cluster is kmeans:
            errors.append((torch.cdist(tokens, found.centers).square().amin(-1) * weights).sum(-1))
            continue
        same = found.assignment[:, :, None] == found.assignment[:, None]
        cost = (distance * weights[:, None] * same).sum(-1)  # (B, N)
        errors.append(
            cost.new_zeros(len(tokens), k).scatter_reduce(1, found.assignment, cost, "amin", include_self=False).sum(-1)
        )
    for earlier, later in itertools.pairwise(errors):
        assert (later <= earlier * (1 + 1e-9) + 1e-9).all()


@ALL
@pytest.mark.parametrize("k", [8, 25])
@pytest.mark.parametrize("budget", [1, 3 * 900, 2**18])
def test_an_image_does_not_depend_on_its_batch(cluster, k: int, budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor on the size of micro-batches; also where some images need another engine, or a scale."""
    tokens, weights = images(batch=9, n=30)
    tokens[1] = 0
    tokens[2, :20] = tokens[2, 0]
    tokens[4] *= 2.0**90
    tokens[5] *= 2.0**-90
    monkeypatch.setattr(micro_batch, "DISTANCES", micro_batch.Budget(budget, budget))
    monkeypatch.setattr(micro_batch, "FEW_DISTANCES", micro_batch.Budget(budget, budget))
    together = cluster(tokens, k, weights)
    for image in range(9):
        alone = cluster(tokens[image : image + 1], k, weights[image : image + 1])
        assert torch.equal(alone.assignment[0], together.assignment[image])
        torch.testing.assert_close(alone.centers[0], together.centers[image], rtol=1e-5, atol=1e-5)


@ALL
@pytest.mark.parametrize("k", [3, 17])
def test_scales_are_irrelevant(cluster, k: int) -> None:
    tokens, weights = images(n=20)
    expected = cluster(tokens, k, weights)
    for factor in (2.0**-120, 2.0**-80, 2.0**48, 2.0**62, 2.0**70, 2.0**110):
        found = cluster(tokens * factor, k, weights)
        assert torch.equal(found.assignment, expected.assignment)
        torch.testing.assert_close(found.centers / factor, expected.centers)
    for factor in (1e-30, 1e30):
        found = cluster(tokens, k, weights * factor)
        assert torch.equal(found.assignment, expected.assignment)
        torch.testing.assert_close(found.centers, expected.centers)
    assert cluster(torch.full((1, 4, 2), 3e38), 2).centers.isfinite().all()


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


# Special cases


@ALL
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
    found = cluster(torch.tensor([[[0.0], [0.0], [10.0], [11.0]]]), 3, init=torch.tensor([[0, 1, 2]]))
    assert found.assignment.tolist() == [[0, 0, 2, 2]]
    assert found.centers.flatten().tolist() == [0.0, 0.0, 10.5]


@BOTH
def test_weightless_tokens_do_not_count(cluster) -> None:
    tokens, weights = images()
    weights[:, ::2] = 0
    found = cluster(tokens, 5, weights)
    moved = tokens.clone()
    moved[:, ::2] += 1e-4
    torch.testing.assert_close(cluster(moved, 5, weights).centers, found.centers)
    only_weightless = cluster(torch.tensor([[[0.0], [9.0], [9.5]]]), 2, torch.tensor([[1.0, 0.0, 0.0]]))
    assert only_weightless.centers.isfinite().all()


def test_weights_of_minus_zero() -> None:
    found = ward(torch.tensor([[[0.0], [1], [5], [9]]]), 2, torch.tensor([[1.0, 0.5, 0.0, -0.0]]))
    assert found.assignment.tolist() == [[0, 1, 1, 1]] and found.centers.tolist() == [[[0.0], [1.0]]]


@pytest.mark.parametrize("repeated", [[0, 1, 1], [0, 0, 0]])
def test_a_token_may_be_given_as_medoid_twice(repeated: list[int]) -> None:
    found = kmedoids(torch.tensor([[[0.0], [1.0], [10.0], [11.0]]]), 3, init=torch.tensor([repeated]), iterations=1)
    assert 2 not in found.assignment[0] and found.centers.isfinite().all()


@BOTH
def test_autocast_and_half_precision(cluster) -> None:
    tokens, weights = images()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = cluster(tokens, 7, weights)
    assert torch.equal(found.assignment, cluster(tokens, 7, weights).assignment)
    assert found.centers.dtype == torch.float32
    for dtype in (torch.bfloat16, torch.float16):
        half = tokens.to(dtype)
        assert torch.equal(cluster(half, 7, weights).assignment, cluster(half.float(), 7, weights).assignment)
        assert cluster(half, 7, weights).centers.dtype == dtype


@ALL
@pytest.mark.slow
def test_in_a_graph_without_a_break(cluster) -> None:
    tokens, weights = images()
    for k in (7, 35):
        found = torch.compile(cluster, backend="eager", fullgraph=True)(tokens, k, weights)
        expected = cluster(tokens, k, weights)
        assert torch.equal(found.assignment, expected.assignment)
        torch.testing.assert_close(found.centers, expected.centers)


@pytest.mark.slow
@BOTH
def test_compiled(cluster) -> None:
    tokens, weights = images()
    compiled, eager = torch.compile(cluster, fullgraph=True)(tokens, 7, weights), cluster(tokens, 7, weights)
    assert torch.equal(compiled.assignment, eager.assignment)
    torch.testing.assert_close(compiled.centers, eager.centers)


def test_distances_may_be_between_other_points() -> None:
    tokens, weights = images()
    by = torch.randn(*tokens.shape[:2], 3, generator=generator(8))
    for k in (7, 30):
        for points in (by, by.double()):
            found = kmedoids(tokens, k, weights, by=points)
            assert torch.equal(found.assignment, kmedoids(by, k, weights).assignment)
            torch.testing.assert_close(found.centers, means(tokens, weights, found.assignment, k))


def test_distances_are_symmetric_to_the_last_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some matrix products, such as ONNX Runtime's, round the two halves of a Gram matrix differently."""
    points = torch.randn(4, 61, 33, generator=generator(1)) + 100
    product = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda a, b: product(a, b) * (1 + 1e-6 * torch.ones(61, 61).triu(1)))
    distance = squared_distances(points)
    assert torch.equal(distance, distance.mT) and (distance.diagonal(dim1=1, dim2=2) == 0).all()
    torch.testing.assert_close(
        distance, torch.cdist(points.double(), points.double()).square().float(), rtol=1e-4, atol=1e-3
    )


def test_two_of_one_weight_cost_the_same_to_the_last_bit() -> None:
    """Beside a medoid without weight, the order decides which of them becomes the next, and not rounding."""
    points = torch.randn(500, 4, 7, generator=generator(0))
    medoids, weights = torch.tensor([[0, 1]]).expand(500, 2), torch.tensor([[0.0, 1, 1, 1]]).expand(500, 4)
    distances = FewDistances(points)
    assigned = distances.assign(medoids)
    costs = distances.costs(assigned, weights)
    both = (assigned.assignment[:, 2:] == 0).all(dim=1)
    assert both.sum() > 50 and torch.equal(costs[both, 2], costs[both, 3])


def test_few_distances_finds_medoids_at_the_same_place() -> None:
    points = torch.randn(2, 12, 5, generator=generator(0))
    medoids = torch.arange(8).expand(2, 8)
    points[1, 9] = points[1, 2]  # no medoid
    distances = FewDistances(points)
    assert distances.supports(medoids).tolist() == [True, True]
    assert distances.supports(medoids.where(medoids != 7, 9)).tolist() == [True, False]
    assert distances.supports(medoids.where(medoids != 7, 3)).tolist() == [False, False]  # one token twice
    circle = FewDistances(torch.tensor([[[3.0, 4], [-3, -4], [4, -3], [-4, 3], [5, 0], [-5, 0], [0, 5], [0, -5]]]))
    eight = torch.arange(8)[None]
    assert circle.supports(eight).all()  # equally far from the mean, but apart
    for first, second in itertools.combinations(range(8), 2):
        assert not circle.supports(eight.where(eight != second, first)).any()
    many = FewDistances(torch.eye(32)[None])
    assert many.supports(torch.arange(9)[None]).all() and not many.supports(torch.arange(20)[None]).any()
    overflow = FewDistances(torch.cat([points[:1] * 1e30, points[:1]]))
    assert overflow.supports(medoids).tolist() == [False, True]


def test_of_equal_points_the_first_are_wards_centres(monkeypatch: pytest.MonkeyPatch) -> None:
    """Merging equal points costs nothing, whatever rounding says, and of equal costs the earlier wins."""
    points = torch.randn(50, 10, 384, generator=generator(5)).repeat(1, 3, 1)
    for weights in (torch.ones(50, 30), torch.rand(50, 30, generator=generator(6))):
        expected = ward_init(points, weights, 25, squared_distances(points))
        for budget in (7 * 30, 2**18):
            monkeypatch.setattr(micro_batch, "DISTANCES", micro_batch.Budget(budget, budget))
            assert torch.equal(ward_init(points, weights, 25), expected)


def test_wards_centres_take_no_matrix_of_all_distances() -> None:
    tokens, weights = images(batch=1, n=2048)
    taken = peak_memory(lambda: ward(tokens, 2000, weights), tokens.device)
    assert taken < 2048**2 * 4 / 2


def test_wards_centres_keep_one_of_each_group() -> None:
    label = torch.tensor([0] * 9 + [1] * 5 + [2] * 3 + [3] * 2 + [4])[torch.randperm(20, generator=generator(4))]
    tokens = 10 * torch.randn(5, 6, generator=generator(4))[label] + 0.01 * torch.randn(20, 6, generator=generator(5))
    found = ward(tokens[None], 5, torch.rand(1, 20, generator=generator(6)), iterations=1)
    assert len(set(zip(found.assignment[0].tolist(), label.tolist(), strict=True))) == 5


# Arguments


def nan_at(image: int) -> Tensor:
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
        ({"tokens": nan_at(1)}, "tokens must be finite, but image 1"),
        ({"tokens": nan_at(2).nan_to_num(torch.inf)}, "tokens must be finite, but image 2"),
        ({"weights": torch.ones(3, 9)}, r"weights must have shape \(B, N\) = \(3, 10\)"),
        ({"weights": -torch.ones(3, 10)}, r"weights must be .* image 0 .* in -1\.\.-1"),
        ({"weights": torch.full((3, 10), torch.nan)}, "weights must be finite"),
        ({"weights": torch.zeros(3, 10)}, "not all zero"),
        ({"init": torch.zeros(3, 4, dtype=torch.int64)}, r"init must have shape \(3, 3\)"),
        ({"init": torch.full((3, 3), 10)}, r"init must hold token indices in 0\.\.9"),
        ({"init": torch.full((3, 3, 4), torch.inf)}, "init must be finite"),
        ({"iterations": 0}, "iterations = 0 must be a whole number, at least 1"),
        ({"iterations": 2.5}, "iterations = 2.5 must be a whole number"),
    ],
)
def test_bad_input_is_named(cluster: Callable, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cluster(**{"tokens": torch.randn(3, 10, 4), "k": 3} | arguments)


def test_bad_options_of_kmedoids_are_named() -> None:
    tokens, weights = images()
    with pytest.raises(ValueError, match="init = 'random' must be a tensor, None or \"ward\""):
        kmedoids(tokens, 3, weights, init="random")
    with pytest.raises(ValueError, match=r"by must have shape \(B, N, E\)"):
        kmedoids(tokens, 3, weights, by=tokens[:, :-1])
    with pytest.raises(ValueError, match="by must be finite"):
        kmedoids(tokens, 3, weights, by=tokens / 0)


@BOTH
def test_empty_batch_and_numpy_numbers(cluster) -> None:
    assert cluster(torch.randn(0, 5, 2), np.int64(3)).centers.shape == (0, 3, 2)
    with pytest.raises(TypeError, match="tokens must be a tensor, got ndarray"):
        cluster(np.ones((1, 5, 2)), 3)
    with pytest.raises(TypeError, match="weights must be a tensor, got list"):
        cluster(torch.randn(1, 5, 2), 3, [1, 1, 1, 1, 1])


def test_old_names_are_deprecated() -> None:
    tokens, weights = images()
    with pytest.warns(DeprecationWarning, match="use stable_topk"):
        assert clustering.highest is stable_topk
    with pytest.warns(DeprecationWarning, match="use ward_init"):
        found = clustering.dearest_to_merge(squared_distances(tokens), weights, 5)
    assert torch.equal(found, ward_init(tokens, weights, 5))
