"""Squared distances between tokens, and the engines that K-Medoids gets them from.

An engine (`Distances`) answers two questions: which medoid is nearest to each point, and what would each point cost as
the medoid of its cluster. `AllDistances` computes the distances between all points once. `FewDistances` computes the
distances from the points that are no medoids, in each iteration. The answers are the same up to rounding.
`choose_engine` decides which engine a batch gets.
"""

from enum import Enum
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from tokenpool import gpu, micro_batch
from tokenpool.clustering.reductions import cluster_sums, full_precision, take_columns, take_rows
from tokenpool.eager import is_eager_cpu


class Engine(Enum):
    """How K-Medoids gets its distances."""

    KERNEL = "one GPU kernel makes all iterations"
    ALL = "the distances between all points, once"
    FEW = "the distances from the points that are no medoids, in each iteration"


def choose_engine(tokens: Tensor, by: Tensor, k: int, init: Tensor | None, iterations: int) -> Engine:
    """The engine that takes the least time: see the log in docs/performance.md.

    Args:
        tokens: (B, N, D), the tokens whose means are wanted.
        by: (B, N, E), the points that distances are measured between.
        k: number of clusters.
        init: first medoids, as token indices (B, K) or as points (B, K, E). The kernel cannot start from points.
        iterations: the most iterations.
    """
    has_indices = init is None or init.dim() == 2
    if has_indices and gpu.kmedoids_fits(by) and gpu.means_fits(tokens):
        return Engine.KERNEL
    n = by.shape[1]
    # Medoids seldom move more often than three times.
    if is_eager_cpu(by) and min(iterations, 4) * (n - k) <= 2 * n:
        return Engine.FEW
    return Engine.ALL


def images_at_a_time(engine: Engine, by: Tensor, k: int) -> int:
    """Size of the micro-batches of an engine for points (B, N, E)."""
    batch, n, width = by.shape
    if engine is Engine.KERNEL:
        return batch  # the kernel bounds its memory itself
    if engine is Engine.FEW:
        return micro_batch.fitting(n * (n - k + width), micro_batch.FEW_DISTANCES.on(by.device))
    return micro_batch.fitting(n * n, micro_batch.DISTANCES.on(by.device))


class Assigned(NamedTuple):
    """What `Distances.assign` returns.

    Attributes:
        assignment: (B, N), the cluster of each point.
        medoids: (B, K), the medoids that the assignment was made from.
        state: the rest that `Distances.costs` of the same engine needs.
    """

    assignment: Tensor
    medoids: Tensor
    state: tuple = ()


class Distances(Protocol):
    """An engine. It holds the points, and nothing that changes."""

    def assign(self, medoids: Tensor) -> Assigned:
        """Equation (16): each point goes to the nearest of the medoids (B, K), the lowest in a computed tie."""

    def costs(self, assigned: Assigned, weights: Tensor) -> Tensor:
        """The sums of equation (17), weighted: the cost (B, N) of each point as the medoid of its cluster."""


class AllDistances:
    """The squared distances between all points (B, N, E): N^2 E multiply-adds, once.

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
        same = assignment[:, :, None] == assignment[:, None, :]  # (B, N, N): compiled, a single pass over the matrix
        return (self.matrix * weights[:, None, :] * same).sum(dim=2)


class FewDistances:
    """The squared distances from the points that are no medoids: (N - K) N E multiply-adds, in each iteration.

    Other distances are not needed. A medoid is nearest to itself, and a cluster is its medoid and some of the other
    points. In the paper's schedules K is close to N, and N - K is small.

    The engine is for points that `suits` accepts.
    """

    def __init__(self, points: Tensor) -> None:
        points = full_precision(points)
        self.points = (points - points.mean(dim=1, keepdim=True)).contiguous()
        self.norm = self.points.square().sum(dim=2)  # (B, N), exact for whole numbers

    def suits(self, medoids: Tensor) -> Tensor:
        """Whether the engine can be used for each image: (B,).

        Squares must neither over- nor underflow. No two of the medoids (B, K) may coincide, because one of them would
        then go to the cluster of the other. Where more than nine medoids are equally far from the mean, the answer
        is no without a look at them.
        """
        suits = _is_in_range(self.norm.amax(dim=1))
        norm, order = self.norm.gather(1, medoids).sort(dim=1)
        for step in range(1, medoids.shape[1]):  # equal ones are neighbours, then every other one, and so on
            same = norm[:, step:] == norm[:, :-step]
            if not same.any():
                break
            if step > 8:
                return suits & ~same.any(dim=1)
            image, place = same.nonzero(as_tuple=True)
            first, second = (self.points[image, medoids[image, order[image, place + shift]]] for shift in (0, step))
            suits[image[(first == second).all(dim=1)]] = False
        return suits

    def assign(self, medoids: Tensor) -> Assigned:
        batch, n, width = self.points.shape
        k = medoids.shape[1]
        is_other = torch.ones_like(self.norm, dtype=torch.bool).scatter_(1, medoids, False)
        place = is_other.flatten().nonzero().squeeze(1)  # among the points of all images laid end to end
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


class _ByImage:
    """Some images by one engine and the others by another: `FewDistances` where it suits, else `AllDistances`."""

    def __init__(self, points: Tensor, suits: Tensor) -> None:
        good, bad = suits.nonzero().squeeze(1), (~suits).nonzero().squeeze(1)
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
    """`FewDistances` of the points (B, N, E); `AllDistances` for images whose first medoids (B, K) do not suit it."""
    engine = FewDistances(points)
    suits = engine.suits(medoids)
    if suits.all():
        return engine
    return _ByImage(points, suits) if suits.any() else AllDistances(points)


def squared_distances(points: Tensor) -> Tensor:
    """Squared Euclidean distances between the points (B, N, D) of each image: (B, N, N).

    The matrix is symmetric and zero on the diagonal to the last bit, whatever order a matrix product adds in. In a
    cluster of two points both then cost the same, and rounding does not decide which becomes the medoid.
    """
    points = points - points.mean(dim=1, keepdim=True)  # a common offset would only cost digits
    product = torch.bmm(points, points.mT)  # (B, N, N)
    norm = product.diagonal(dim1=1, dim2=2).contiguous()  # (B, N)
    return (norm[:, :, None] + norm[:, None, :]).sub_(product + product.mT).clamp_(min=0)


def distances_between(some: Tensor, some_norm: Tensor, others: Tensor, others_norm: Tensor) -> Tensor:
    """Squared distances (B, R, M) of points (B, R, E) to others (B, M, E).

    Args:
        some: (B, R, E).
        some_norm: (B, R), their squared lengths.
        others: (B, M, E).
        others_norm: (B, M), their squared lengths.
    """
    distance = torch.baddbmm(others_norm[:, None, :], some, others.mT, alpha=-2)
    return distance.add_(some_norm[:, :, None]).clamp_(min=0)


def nearest_center(points: Tensor, centers: Tensor) -> Tensor:
    """Equation (14): index (B, N) of the nearest center (B, K, D) of each point (B, N, D), the lowest in a tie."""
    offset = points.mean(dim=1, keepdim=True)
    points, centers = points - offset, centers - offset
    # The squared length of the point itself is the same for all centres and left out.
    distance = torch.add(centers.square().sum(-1)[:, :, None], torch.bmm(centers, points.mT), alpha=-2)
    return distance.min(dim=1).indices


def scaled(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens (B, N, D) between -2 and 2, so that squares neither over- nor underflow, and their scale (B, 1, 1).

    The scale is a power of two, so that nothing is rounded.
    """
    points = full_precision(tokens)
    largest = torch.maximum(-points.amin(dim=(1, 2)), points.amax(dim=(1, 2)))  # (B,)
    scale = largest.clamp(min=torch.finfo(points.dtype).tiny).log2().floor().exp2()[:, None, None]
    return points / scale, scale


def _is_in_range(largest: Tensor) -> Tensor:
    """Whether squared distances, the largest of each image (B,), neither over- nor underflow."""
    return (largest > 1e-20) & (largest < 1e30)  # not if NaN
