"""Initial centres by Ward's criterion. An extension of Algorithm 1."""

from collections.abc import Iterator

import torch
from torch import Tensor

from tokenpool import micro_batch
from tokenpool.clustering.distances import distances_between, scaled
from tokenpool.clustering.reductions import stable_topk, take_rows
from tokenpool.eager import is_in_graph


def ward_init(points: Tensor, weights: Tensor, k: int, distance: Tensor | None = None) -> Tensor:
    """Indices (B, K) of the points that cost most to merge into another point of higher weight.

    Merging points i and j raises objective (13) by w_i w_j / (w_i + w_j) |i - j|^2 (Ward 1963). Of equal weights the
    earlier counts as higher. The point of highest weight is never merged. So one of two close points is kept, and the
    initial centres have high weights and lie apart.

    Args:
        points: (B, N, E).
        weights: (B, N), not negative.
        k: number of centres, 1..N.
        distance: (B, N, N), squared distances between the points, if they are known already. Otherwise only half of
            them are computed, for a few images or rows at a time.
    """
    if distance is not None:
        return stable_topk(_costs_from_matrix(distance, weights), k)
    n = points.shape[1]
    size = micro_batch.fitting(n * n, micro_batch.DISTANCES.on(points.device))
    parts = micro_batch.split(size, points, weights)
    return torch.cat([stable_topk(_costs_from_points(scaled(some)[0], weight), k) for some, weight in parts])


def _costs_from_matrix(distance: Tensor, weights: Tensor) -> Tensor:
    """The least that it costs to merge each point into one of higher weight: (B, N)."""
    order = stable_topk(weights, weights.shape[1])
    rank = torch.empty_like(order).scatter(1, order, torch.arange(order.shape[1], device=order.device).expand_as(order))
    inverse = _inverse(weights)
    cost = _merging_cost(distance, inverse, inverse)
    return cost.masked_fill(rank[:, None, :] >= rank[:, :, None], torch.inf).amin(dim=2)


def _costs_from_points(points: Tensor, weights: Tensor) -> Tensor:
    """The same, from points (B, N, E). They are sorted by weight, and each needs the distances to earlier ones only."""
    n = points.shape[1]
    order = stable_topk(weights, n)
    points = take_rows(points - points.mean(dim=1, keepdim=True), order)
    norm, inverse = points.square().sum(dim=2), _inverse(weights).gather(1, order).to(points)
    least = torch.cat([_least_of_rows(points, norm, inverse, rows) for rows in _blocks(n, points.device)], dim=1)
    # Rounding gives equal points a small distance. It counts as zero, so that the first of equal points win.
    least = least.masked_fill(least * inverse < 32 * torch.finfo(norm.dtype).eps * norm, 0)
    return torch.empty_like(least).scatter(1, order, least)


def _least_of_rows(points: Tensor, norm: Tensor, inverse: Tensor, rows: slice) -> Tensor:
    """The least that it costs to merge each of these rows of the points (B, N, E) into an earlier point: (B, R)."""
    until = slice(rows.stop)
    distance = distances_between(points[:, rows], norm[:, rows], points[:, until], norm[:, until])
    cost = _merging_cost(distance, inverse[:, rows], inverse[:, until])
    size = cost.shape[1]
    not_earlier = torch.ones(size, size, dtype=torch.bool, device=points.device).triu()
    cost[:, :, rows.start :].masked_fill_(not_earlier, torch.inf)
    return cost.amin(dim=2)


def _blocks(n: int, device: torch.device) -> Iterator[slice]:
    """Rows of the distances between n points, as many at a time as fit into the budget. All rows in a graph."""
    step = n if is_in_graph() else min(micro_batch.fitting(n, micro_batch.DISTANCES.on(device)), n)
    starts = (0,) if is_in_graph() else range(0, n, step)
    return (slice(start, start + step) for start in starts)


def _merging_cost(distance: Tensor, row_inverse: Tensor, column_inverse: Tensor) -> Tensor:
    """Cost of merging (B, R, M), from squared distances and the inverse weights of rows (B, R) and columns (B, M)."""
    return distance / (row_inverse[:, :, None] + column_inverse[:, None, :])


def _inverse(weights: Tensor) -> Tensor:
    """1 / weight. It is infinite where the weight is 0 or -0, so that merging costs nothing there."""
    return weights.abs().reciprocal()
