"""Weighted K-Means and K-Medoids: Marin et al. 2021, Algorithm 1, equations (10)-(18).

The functions take and return tensors and do not depend on transformers. They cluster all images of a batch at the same
time, each image independently, without a Python loop over images, clusters or tokens.

Ties: if several centres have the same *computed* distance, the first one wins. The points are centred and the distances
are computed in float32, and both steps round. So a token with the same exact distance to two centres may be assigned to
the second one.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from tokenpool import gpu, micro_batch
from tokenpool.clustering.checks import check_by, checked
from tokenpool.clustering.distances import (
    AllDistances,
    Distances,
    Engine,
    choose_engine,
    few_distances,
    images_at_a_time,
    nearest_center,
    scaled,
)
from tokenpool.clustering.reductions import best_members, full_precision, take_rows, weighted_means
from tokenpool.clustering.swaps import alternate_by_swaps, means_by_swaps, symmetric_distances
from tokenpool.clustering.ward import ward_init
from tokenpool.eager import is_eager_cpu, needs_gradient, without_autocast
from tokenpool.operators import is_opaque, opaque


class Clusters(NamedTuple):
    """K clusters of the N tokens of each image.

    Attributes:
        centers: (B, K, D), the weighted mean of the tokens of each cluster.
        assignment: (B, N) int64, the cluster of each token, in 0..K-1.
    """

    centers: Tensor
    assignment: Tensor


def kmeans(
    tokens: Tensor,
    k: int,
    weights: Tensor | None = None,
    init: Tensor | None = None,
    iterations: int = 5,
    check_values: bool = True,
) -> Clusters:
    """Cluster tokens by weighted K-Means: alternate equations (14) and (15).

    With equal weights, these are equations (10) and (11). Assignments are computed in float32 and without gradient.
    Gradients flow through the returned means to the tokens. A cluster that has no members, or only members of weight
    zero, keeps its centre. The iterations stop early if no centre moves in any image.

    Args:
        tokens: (B, N, D), finite.
        k: number of clusters, 1..N.
        weights: (B, N), not negative, not all zero in any image. Only their ratios matter. Default: all equal.
        init: initial centres, as token indices (B, K) or as points (B, K, D). Default: the K tokens of highest weight,
            or K evenly spaced tokens if there are no weights.
        iterations: maximum number of updates of the centres, at least 1.
        check_values: check that the values are finite and the weights usable. On a GPU the check costs a
            synchronisation. Inside `torch.compile` there is no check.

    Returns:
        Centres (B, K, D) and assignment (B, N).

    Raises:
        TypeError: if an argument is not a tensor.
        ValueError: if an argument is outside its range or has the wrong shape. The message names the argument.
    """
    weights, init = checked(tokens, k, weights, init, iterations, check_values)
    centers, assignment, previous = _kmeans(tokens, weights, init, iterations)
    if is_opaque(tokens) and needs_gradient(tokens):  # the operator has none
        centers = weighted_means(tokens, weights, assignment, previous)
    return Clusters(centers, assignment)


def _kmeans_shapes(tokens: Tensor, weights: Tensor, init: Tensor, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    batch, n, width = tokens.shape
    centers = tokens.new_empty(batch, init.shape[1], width)
    return centers, tokens.new_empty(batch, n, dtype=torch.int64), full_precision(centers).clone()


@opaque(_kmeans_shapes)
def _kmeans(tokens: Tensor, weights: Tensor, init: Tensor, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """Run Algorithm 1 for K-Means, with arguments that are checked.

    Returns:
        Centres (B, K, D), assignment (B, N), and the previous centres (B, K, D).
    """
    with torch.no_grad(), without_autocast(tokens.device):
        points, scale = scaled(tokens)
        centers = take_rows(points, init) if init.dim() == 2 else init.to(points) / scale
        for _ in range(iterations):
            previous = centers
            assignment = nearest_center(points, centers)  # (14)
            centers = weighted_means(points, weights, assignment, previous)  # (15)
            if is_eager_cpu(tokens) and torch.equal(centers, previous):
                break
        previous = previous * scale
    return weighted_means(tokens, weights, assignment, previous), assignment, previous


def kmedoids(
    tokens: Tensor,
    k: int,
    weights: Tensor | None = None,
    init: Tensor | Literal["ward"] | None = None,
    iterations: int = 5,
    check_values: bool = True,
    by: Tensor | None = None,
) -> Clusters:
    """Cluster tokens by weighted K-Medoids: alternate equations (16)-(18).

    With equal weights, these are equations (10) and (12). The medoid of a cluster is the member with the lowest
    *weighted* sum of squared distances to the other members, as objective (13) requires. Equation (17) as printed
    omits the weight. The returned centre is the weighted *mean* of the cluster (Algorithm 1, line 6), not the medoid.

    Gradients and clusters without members are treated as in `kmeans`.

    Args:
        tokens: see `kmeans`.
        k: see `kmeans`.
        weights: see `kmeans`.
        init: initial medoids, as token indices (B, K), or as points (B, K, E) whose nearest tokens are taken. "ward",
            an extension, takes the K tokens with the highest cost of merging (see `ward_init`). Default: as in
            `kmeans`. In an exported graph, the indices of an image must differ.
        iterations: see `kmeans`.
        check_values: see `kmeans`.
        by: (B, N, E), points whose distances are used instead of the distances between tokens. An extension.

    Returns:
        Centres (B, K, D) and assignment (B, N).

    Raises:
        TypeError: if an argument is not a tensor.
        ValueError: if an argument is outside its range or has the wrong shape. The message names the argument.
    """
    if isinstance(init, str) and init != "ward":
        raise ValueError(f'init = {init!r} must be a tensor, None or "ward"')
    weights, first = checked(tokens, k, weights, None if isinstance(init, str) else init, iterations, check_values)
    if by is None:
        by = tokens
    else:
        check_by(by, tokens, check_values)
    start = None if isinstance(init, str) else first
    centers, assignment, medoids = _kmedoids(tokens, weights, by, start, k, iterations)
    if is_opaque(tokens) and needs_gradient(tokens):  # the operator has none
        centers = weighted_means(tokens, weights, assignment, medoids)
    return Clusters(centers, assignment)


def _kmedoids_shapes(
    tokens: Tensor, weights: Tensor, by: Tensor, init: Tensor | None, k: int, iterations: int
) -> tuple[Tensor, Tensor, Tensor]:
    batch, n, width = tokens.shape
    assignment, medoids = (tokens.new_empty(batch, size, dtype=torch.int64) for size in (n, k))
    return tokens.new_empty(batch, k, width), assignment, medoids


def _is_in_onnx(tokens: Tensor, weights: Tensor, by: Tensor, init: Tensor | None, k: int, iterations: int) -> bool:
    """Return whether `tokenpool.tools.onnx_functions` covers these arguments: float32, and indices as initial medoids.

    If the medoids start from points, two points can have the same nearest token.
    """
    return weights.dtype == torch.float32 and (init is None or init.dim() == 2)


@opaque(_kmedoids_shapes, exported_if=_is_in_onnx)
def _kmedoids(
    tokens: Tensor, weights: Tensor, by: Tensor, init: Tensor | None, k: int, iterations: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Run Algorithm 1 for K-Medoids, with arguments that are checked. An `init` of None means "ward".

    Returns:
        Centres (B, K, D), assignment (B, N), and medoids (B, K): the last, but in an exported graph the first ones.
    """
    engine = choose_engine(tokens, by, k, init, iterations)
    if engine is Engine.SWAPS:
        with torch.no_grad(), without_autocast(tokens.device):
            distance = symmetric_distances(by)
            medoids = _first_medoids(by, weights, k, init, distance)
            swapped = alternate_by_swaps(distance, weights, medoids, iterations)
        return means_by_swaps(tokens, weights, swapped), swapped.labels.long(), medoids
    with torch.no_grad(), without_autocast(tokens.device):
        parts = micro_batch.split(images_at_a_time(engine, by, k), by, weights, init)
        found = [_find_medoids(engine, k, iterations, *part) for part in parts]
        assignment, medoids, *members = micro_batch.join(found)
    return weighted_means(tokens, weights, assignment, medoids, members), assignment, medoids


def _find_medoids(
    engine: Engine, k: int, iterations: int, points: Tensor, weights: Tensor, init: Tensor | None
) -> tuple[Tensor, ...]:
    """Run lines 2-5 of Algorithm 1. Return the result of `alternate`, or `gpu.Medoids` from the GPU kernel."""
    if engine is Engine.ALL:
        distances = AllDistances(points)
        medoids = _first_medoids(points, weights, k, init, distances.matrix)
        return alternate(distances, weights, medoids, iterations)
    medoids = _first_medoids(points, weights, k, init)
    if engine is Engine.FEW:
        return alternate(few_distances(points, medoids), weights, medoids, iterations)
    return gpu.kmedoids(points, weights, medoids, iterations)


def _first_medoids(
    points: Tensor, weights: Tensor, k: int, init: Tensor | None, distance: Tensor | None = None
) -> Tensor:
    """Return indices (B, K): `init` itself, the points nearest to the points in `init`, or `ward_init` for None."""
    if init is None:
        return ward_init(points, weights, k, distance)
    if init.dim() == 2:
        return init
    points, scale = scaled(points)
    return nearest_center(init.to(points) / scale, points)


def alternate(distances: Distances, weights: Tensor, medoids: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Run the loop of Algorithm 1 for K-Medoids, lines 3-5.

    Args:
        distances: an engine of N points.
        weights: (B, N).
        medoids: (B, K), the initial medoids, as indices of points.
        iterations: maximum number of assignments, at least 1.

    Returns:
        The last assignment (B, N), and the medoids (B, K) that it belongs to.
    """
    assigned = distances.assign(medoids)  # (16)
    for _ in range(iterations - 1):
        previous = medoids
        cost = distances.costs(assigned, weights)
        medoids = best_members(cost, weights, assigned.assignment, previous)  # (17), (18)
        if is_eager_cpu(medoids) and torch.equal(medoids, previous):
            break
        assigned = distances.assign(medoids)  # (16)
    return assigned.assignment, medoids
