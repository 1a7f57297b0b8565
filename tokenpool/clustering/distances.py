"""Squared distances between tokens, and the engines that compute them for K-Medoids.

An engine (`Distances`) computes the nearest medoid of each point, and the cost of each point as the medoid of its
cluster. `AllDistances` computes the distances between all points once. `FewDistances` computes, in each iteration, only
the distances from points that are not medoids. The results are the same up to rounding. `choose_engine` selects the
engine for a batch.
"""

from enum import Enum
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenpool import gpu, micro_batch
from tokenpool.clustering.reductions import cluster_sums, full_precision, take_columns, take_rows
from tokenpool.eager import at_least_float32, is_eager_cpu, is_exporting


class Engine(Enum):
    """The way in which K-Medoids computes distances."""

    KERNEL = "one GPU kernel runs all iterations"
    ALL = "the distances between all points, once"
    SWAPS = "in an exported graph: operators over the points that are not medoids"
    FEW = "the distances from points that are not medoids, in each iteration"


def choose_engine(tokens: Tensor, by: Tensor, k: int, init: Tensor | None, iterations: int) -> Engine:
    """Return the fastest engine, according to docs/results/speed-log.md.

    Args:
        tokens: (B, N, D), the tokens to average.
        by: (B, N, E), the points whose distances are used.
        k: number of clusters.
        init: initial medoids, as token indices (B, K) or as points (B, K, E). The kernel cannot start from points.
        iterations: maximum number of iterations.
    """
    has_indices = init is None or init.dim() == 2
    if has_indices and gpu.kmedoids_fits(by) and gpu.means_fits(tokens):
        return Engine.KERNEL
    n = by.shape[1]
    if is_exporting() and has_indices and k < n:
        return Engine.SWAPS
    # Medoids rarely move more than three times.
    if is_eager_cpu(by) and min(iterations, 4) * (n - k) <= 2 * n:
        return Engine.FEW
    return Engine.ALL


def images_at_a_time(engine: Engine, by: Tensor, k: int) -> int:
    """Return the micro-batch size of an engine for points (B, N, E)."""
    batch, n, width = by.shape
    if engine is Engine.KERNEL:
        return batch  # the kernel limits its memory itself
    if engine is Engine.FEW:
        return micro_batch.max_items(n * (n - k + width), micro_batch.FEW_DISTANCES.on(by.device))
    return micro_batch.max_items(n * n, micro_batch.DISTANCES.on(by.device))


class Assigned(NamedTuple):
    """Result of `Distances.assign`.

    Attributes:
        assignment: (B, N), the cluster of each point.
        medoids: (B, K), the medoids of the clusters.
        state: further data for `Distances.costs` of the same engine.
    """

    assignment: Tensor
    medoids: Tensor
    state: tuple = ()


class Distances(Protocol):
    """An engine. It holds the points and has no mutable state."""

    def assign(self, medoids: Tensor) -> Assigned:
        """Assign each point to the nearest medoid (B, K), equation (16). In a computed tie the first medoid wins."""

    def costs(self, assigned: Assigned, weights: Tensor) -> Tensor:
        """Return the cost (B, N) of each point as the medoid of its cluster: the weighted sums of equation (17)."""


class AllDistances:
    """Compute the squared distances between all points (B, N, E) once: N^2 E multiply-adds.

    Attributes:
        matrix: (B, N, N).
    """

    def __init__(self, points: Tensor) -> None:
        matrix = squared_distances(full_precision(points)) if is_eager_cpu(points) else None
        if matrix is None or not _is_in_range(matrix.amax(dim=(1, 2))).all():
            matrix = squared_distances(scaled(points)[0])
        self.matrix = matrix

    def assign(self, medoids: Tensor) -> Assigned:
        return Assigned(take_rows(self.matrix, medoids).min(dim=1).indices, medoids)

    def costs(self, assigned: Assigned, weights: Tensor) -> Tensor:
        assignment, medoids, _ = assigned
        if is_eager_cpu(assignment):
            sums = cluster_sums(self.matrix, weights, assignment, medoids.shape[1])  # (B, K, N)
            return sums.gather(1, assignment[:, None, :]).squeeze(1)
        same = assignment[:, :, None] == assignment[:, None, :]  # (B, N, N); a compiler fuses this into a single pass
        return (self.matrix * weights[:, None, :] * same).sum(dim=2)


class FewDistances:
    """Compute the squared distances from points that are not medoids: (N - K) N E multiply-adds in each iteration.

    Other distances are not needed, because the nearest medoid of a medoid is the medoid itself, and a cluster contains
    one medoid and points that are not medoids. In the paper's schedules K is close to N, so N - K is small.

    The engine works only for images that `supports` accepts.
    """

    def __init__(self, points: Tensor) -> None:
        points = full_precision(points)
        self.points = (points - points.mean(dim=1, keepdim=True)).contiguous()
        self.norm = self.points.square().sum(dim=2)  # (B, N), exact for whole numbers

    def supports(self, medoids: Tensor) -> Tensor:
        """Return for each image whether the engine works: (B,) booleans.

        Squares must not overflow or underflow. Two medoids (B, K) must not be equal points, because one medoid would
        then belong to the cluster of the other one. If more than nine medoids have the same distance to the mean, they
        are not compared, and the result is False.
        """
        supports = _is_in_range(self.norm.amax(dim=1))
        norm, order = self.norm.gather(1, medoids).sort(dim=1)
        for step in range(1, medoids.shape[1]):  # compare each medoid with the next one, then the second next, ...
            same = norm[:, step:] == norm[:, :-step]
            if not same.any():
                break
            if step > 8:
                return supports & ~same.any(dim=1)
            image, place = same.nonzero(as_tuple=True)
            first, second = (self.points[image, medoids[image, order[image, place + shift]]] for shift in (0, step))
            supports[image[(first == second).all(dim=1)]] = False
        return supports

    def assign(self, medoids: Tensor) -> Assigned:
        batch, n, width = self.points.shape
        k = medoids.shape[1]
        is_other = torch.ones_like(self.norm, dtype=torch.bool).scatter_(1, medoids, False)
        place = is_other.flatten().nonzero().squeeze(1)  # index into the concatenated points of all images
        points = self.points.view(batch * n, width).index_select(0, place).view(batch, n - k, width)
        norm = self.norm.flatten()[place].view(batch, n - k)
        distance = distances_between(points, norm, self.points, self.norm)  # (B, N - K, N)
        others = place.view(batch, n - k) - n * torch.arange(batch, device=place.device)[:, None]
        nearest, cluster = take_columns(distance, medoids).min(dim=2)  # (B, N - K)
        assignment = torch.empty_like(self.norm, dtype=torch.int64)
        assignment.scatter_(1, medoids, torch.arange(k, device=medoids.device).expand(batch, k))
        assignment.scatter_(1, others, cluster)
        return Assigned(assignment, medoids, (others, distance, nearest, cluster))

    def costs(self, assigned: Assigned, weights: Tensor) -> Tensor:
        medoids = assigned.medoids
        others, distance, nearest, cluster = assigned.state
        weights = weights.to(self.norm.dtype)
        weight = weights.gather(1, others)  # (B, N - K)
        of_medoids = torch.zeros_like(medoids, dtype=weights.dtype)
        of_medoids.scatter_add_(1, cluster, weight * nearest)
        between = take_columns(distance, others)  # (B, N - K, N - K)
        between = (between + between.mT).div_(2)  # symmetric, as in `squared_distances`
        between.mul_(cluster[:, :, None] == cluster[:, None, :]).diagonal(dim1=1, dim2=2).zero_()
        to_medoid = weights.gather(1, medoids).gather(1, cluster) * nearest
        of_others = torch.bmm(weight[:, None, :], between).squeeze(1).add_(to_medoid)
        costs = torch.empty_like(weights).scatter_(1, medoids, of_medoids)
        return costs.scatter_(1, others, of_others)


class _MixedDistances:
    """Use `FewDistances` for the images that it supports, and `AllDistances` for the other images."""

    def __init__(self, points: Tensor, supports: Tensor) -> None:
        good, bad = supports.nonzero().squeeze(1), (~supports).nonzero().squeeze(1)
        self.parts: tuple[tuple[Tensor, Distances], ...] = (
            (good, FewDistances(points[good])),
            (bad, AllDistances(points[bad])),
        )
        self.back = torch.cat([good, bad]).argsort()

    def assign(self, medoids: Tensor) -> Assigned:
        found = [engine.assign(medoids[images]) for images, engine in self.parts]
        return Assigned(torch.cat([part.assignment for part in found])[self.back], medoids, tuple(found))

    def costs(self, assigned: Assigned, weights: Tensor) -> Tensor:
        parts = zip(self.parts, assigned.state, strict=True)
        return torch.cat([engine.costs(found, weights[images]) for (images, engine), found in parts])[self.back]


def few_distances(points: Tensor, medoids: Tensor) -> Distances:
    """Return `FewDistances` of points (B, N, E), with `AllDistances` for images that it does not support.

    Args:
        points: (B, N, E).
        medoids: (B, K), the initial medoids.
    """
    engine = FewDistances(points)
    supports = engine.supports(medoids)
    if supports.all():
        return engine
    return _MixedDistances(points, supports) if supports.any() else AllDistances(points)


def squared_distances(points: Tensor) -> Tensor:
    """Compute squared Euclidean distances between the points of each image.

    The matrix is exactly symmetric and exactly zero on the diagonal, for any order of additions in the matrix product.
    So in a cluster of two points both points have the same cost, and rounding does not decide which point becomes the
    medoid.

    Args:
        points: (B, N, D), floating point.

    Returns:
        (B, N, N).
    """
    points = points - points.mean(dim=1, keepdim=True)  # a common offset would reduce the precision
    product = torch.bmm(points, points.mT)  # (B, N, N)
    norm = product.diagonal(dim1=1, dim2=2).contiguous()  # (B, N)
    return (norm[:, :, None] + norm[:, None, :]).sub_(product + product.mT).clamp_(min=0)


def distances_between(points: Tensor, points_norm: Tensor, others: Tensor, others_norm: Tensor) -> Tensor:
    """Compute squared distances from points to other points.

    Args:
        points: (B, R, E).
        points_norm: (B, R), squared lengths of the points.
        others: (B, M, E).
        others_norm: (B, M), squared lengths of the other points.

    Returns:
        (B, R, M).
    """
    distance = torch.baddbmm(others_norm[:, None, :], points, others.mT, alpha=-2)
    return distance.add_(points_norm[:, :, None]).clamp_(min=0)


def nearest_center(points: Tensor, centers: Tensor) -> Tensor:
    """Return the index of the nearest centre of each point, equation (14). In a tie the first centre wins.

    Args:
        points: (B, N, D).
        centers: (B, K, D).

    Returns:
        (B, N) int64.
    """
    offset = points.mean(dim=1, keepdim=True)
    points, centers = points - offset, centers - offset
    # Without the squared length of the point, which is the same for all centres.
    distance = torch.add(centers.square().sum(-1)[:, :, None], torch.bmm(centers, points.mT), alpha=-2)
    return distance.min(dim=1).indices


def scaled(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Scale the tokens of each image to values between -2 and 2, so that squares do not overflow or underflow.

    The scale is a power of two, so the division is exact.

    Args:
        tokens: (B, N, D).

    Returns:
        The scaled tokens (B, N, D), at least in float32, and the scale (B, 1, 1).
    """
    points = full_precision(tokens)
    largest = torch.maximum(-points.amin(dim=(1, 2)), points.amax(dim=(1, 2)))  # (B,)
    scale = largest.clamp(min=torch.finfo(points.dtype).tiny).log2().floor().exp2()[:, None, None]
    return points / scale, scale


def unit_vectors(vectors: Tensor) -> Tensor:
    """Scale vectors (B, N, E) to unit length, at least in float32. A zero vector stays zero."""
    return F.normalize(full_precision(vectors), dim=-1)


def stretched(vectors: Tensor, lengths: Tensor) -> Tensor:
    """Scale vectors (B, N, E) to the lengths (B, N). A zero vector stays zero."""
    wide = at_least_float32(vectors.dtype)
    length = torch.linalg.vector_norm(vectors, dim=-1, dtype=wide)
    return vectors * (lengths / length.clamp(min=torch.finfo(wide).tiny))[:, :, None].to(vectors.dtype)


def _is_in_range(largest: Tensor) -> Tensor:
    """Return for each image whether its largest squared distance (B,) is far from overflow and underflow."""
    return (largest > 1e-20) & (largest < 1e30)  # False for NaN
