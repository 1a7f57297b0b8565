"""Weighted K-Means and K-Medoids: Marin et al. 2021, Algorithm 1, equations (10)-(18).

Tensors in, tensors out, and nothing known of transformers. Every image of a batch is clustered on its own, at the same
time as the others, without a Python loop over images, clusters or tokens.

Ties: of centres at equal *computed* distance the first wins. Distances are taken between centred points in float32, and
both steps round. So a token that is exactly as near to two centres may go to the later one.
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
from tokenpool.clustering.reductions import best_members, take_rows, weighted_means
from tokenpool.clustering.ward import ward_init
from tokenpool.eager import is_eager_cpu


class Clusters(NamedTuple):
    """K clusters of the N tokens of each image.

    Attributes:
        centers: (B, K, D), the weighted mean of each cluster's tokens.
        assignment: (B, N) int64, the cluster in 0..K-1 that each token belongs to.
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
    """Weighted K-Means: alternate equations (14) and (15), which are (10) and (11) where all weights are 1.

    Assignments are decided in float32 and without gradient. The returned means carry the gradient to the tokens. A
    cluster without members, or whose members weigh nothing, stays where it was, and its output is that centre.
    Iterating stops early once no centre moves in any image.

    Args:
        tokens: (B, N, D), finite.
        k: number of clusters, 1..N.
        weights: (B, N), not negative, not all zero in any image. Only their ratios matter. Default: all equal.
        init: initial centres, as token indices (B, K) or as points (B, K, D). Default: the K tokens of highest weight,
            or K evenly spaced tokens where there are no weights.
        iterations: the most updates of the centres, at least 1.
        check_values: look for values that are not finite and for unusable weights. On a GPU this costs a
            synchronisation. Inside `torch.compile` it is left out.

    Raises:
        TypeError: where an argument is no tensor.
        ValueError: where an argument breaks the rules above. The message names it.
    """
    weights, init = checked(tokens, k, weights, init, iterations, check_values)
    with torch.no_grad(), torch.autocast(tokens.device.type, enabled=False):
        points, scale = scaled(tokens)
        centers = take_rows(points, init) if init.dim() == 2 else init.to(points) / scale
        for _ in range(iterations):
            previous = centers
            assignment = nearest_center(points, centers)  # (14)
            centers = weighted_means(points, weights, assignment, previous)  # (15)
            if is_eager_cpu(tokens) and torch.equal(centers, previous):
                break
    return Clusters(weighted_means(tokens, weights, assignment, previous * scale), assignment)


def kmedoids(
    tokens: Tensor,
    k: int,
    weights: Tensor | None = None,
    init: Tensor | Literal["ward"] | None = None,
    iterations: int = 5,
    check_values: bool = True,
    by: Tensor | None = None,
) -> Clusters:
    """Weighted K-Medoids: alternate equations (16)-(18), which are (10) and (12) where all weights are 1.

    The medoid of a cluster is the member with the lowest *weighted* sum of squared distances to the members of its
    cluster, as objective (13) demands. Equation (17) as printed omits the weight. The output is the weighted *mean* of
    each cluster (Algorithm 1, line 6), not the medoid.

    Arguments, errors, gradients, and the treatment of clusters without members are those of `kmeans`, except for:

    Args:
        init: where it holds points, the tokens nearest to them are the first medoids. "ward", an extension, takes the K
            tokens that cost most to merge into another (see `ward_init`).
        by: (B, N, E), the points that distances are measured between, instead of the tokens. An extension.
    """
    if isinstance(init, str) and init != "ward":
        raise ValueError(f'init = {init!r} must be a tensor, None or "ward"')
    weights, first = checked(tokens, k, weights, None if isinstance(init, str) else init, iterations, check_values)
    if by is None:
        by = tokens
    else:
        check_by(by, tokens, check_values)
    with torch.no_grad(), torch.autocast(tokens.device.type, enabled=False):
        start = None if isinstance(init, str) else first
        engine = choose_engine(tokens, by, k, start, iterations)
        parts = micro_batch.split(images_at_a_time(engine, by, k), by, weights, start)
        found = [_find_medoids(engine, k, iterations, *part) for part in parts]
        assignment, medoids, *members = micro_batch.join(found)
    return Clusters(weighted_means(tokens, weights, assignment, medoids, members), assignment)


def _find_medoids(
    engine: Engine, k: int, iterations: int, points: Tensor, weights: Tensor, init: Tensor | None
) -> tuple[Tensor, ...]:
    """Lines 2-5 of Algorithm 1. Returns the result of `alternate`, or `gpu.Medoids` from the GPU kernel."""
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
    """Indices (B, K): `init`, or the points nearest to it where it holds points, or `ward_init` where it is None."""
    if init is None:
        return ward_init(points, weights, k, distance)
    if init.dim() == 2:
        return init
    points, scale = scaled(points)
    return nearest_center(init.to(points) / scale, points)


def alternate(distances: Distances, weights: Tensor, medoids: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """The loop of Algorithm 1 for K-Medoids, lines 3-5.

    Args:
        distances: an engine of N points.
        weights: (B, N).
        medoids: (B, K), the first medoids, as indices of points.
        iterations: how many assignments are made at most, at least 1.

    Returns:
        The assignment (B, N), and the medoids (B, K) that it was made from.
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
