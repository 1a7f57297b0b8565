"""Initial centres by Ward's criterion (Ward 1963). An extension of Algorithm 1."""

from collections.abc import Iterator

import torch
from torch import Tensor

from tokenpool import micro_batch
from tokenpool.clustering.distances import distances_between, scaled
from tokenpool.clustering.reductions import stable_topk, take_rows
from tokenpool.eager import is_in_graph


def ward_init(points: Tensor, weights: Tensor, k: int, distance: Tensor | None = None) -> Tensor:
    """Select the points with the highest cost of merging into a point of higher weight.

    Merging points i and j raises objective (13) by w_i w_j / (w_i + w_j) |i - j|^2 (Ward 1963). Each point is compared
    with all points of higher weight; among equal weights, the first point counts as the highest. The point of highest
    weight is always selected. Of two close points only one is selected, so the initial centres have high weights and
    are far from each other.

    Args:
        points: (B, N, E).
        weights: (B, N), not negative.
        k: number of centres, 1..N.
        distance: (B, N, N), squared distances between the points, if they are already known. Otherwise only half of
            the distances are computed, for a few images or rows at a time.

    Returns:
        Indices (B, K) of the points, highest cost first.
    """
    if distance is not None:
        return stable_topk(_costs_from_matrix(distance, weights), k)
    n = points.shape[1]
    size = micro_batch.max_items(n * n, micro_batch.DISTANCES.on(points.device))
    parts = micro_batch.split(size, points, weights)
    return torch.cat([stable_topk(_costs_from_points(scaled(some)[0], weight), k) for some, weight in parts])


def _costs_from_matrix(distance: Tensor, weights: Tensor) -> Tensor:
    """Return the lowest cost of merging each point into a point of higher weight: (B, N)."""
    order = stable_topk(weights, weights.shape[1])
    rank = torch.empty_like(order).scatter(1, order, torch.arange(order.shape[1], device=order.device).expand_as(order))
    inverse = _inverse(weights)
    cost = _merging_cost(distance, inverse, inverse)
    return cost.masked_fill(rank[:, None, :] >= rank[:, :, None], torch.inf).amin(dim=2)


def _costs_from_points(points: Tensor, weights: Tensor) -> Tensor:
    """Return the same costs (B, N), computed from points (B, N, E).

    The points are sorted by weight, so each point needs only the distances to earlier points.
    """
    n = points.shape[1]
    order = stable_topk(weights, n)
    points = take_rows(points - points.mean(dim=1, keepdim=True), order)
    norm, inverse = points.square().sum(dim=2), _inverse(weights).gather(1, order).to(points)
    lowest = torch.cat([_row_minima(points, norm, inverse, rows) for rows in _blocks(n, points.device)], dim=1)
    # Rounding gives equal points a small distance. Count it as zero, so that the first of equal points wins.
    lowest = lowest.masked_fill(lowest * inverse < 32 * torch.finfo(norm.dtype).eps * norm, 0)
    return torch.empty_like(lowest).scatter(1, order, lowest)


def _row_minima(points: Tensor, norm: Tensor, inverse: Tensor, rows: slice) -> Tensor:
    """Return the lowest cost (B, R) of merging each point in `rows` into an earlier point of the points (B, N, E)."""
    until = slice(rows.stop)
    distance = distances_between(points[:, rows], norm[:, rows], points[:, until], norm[:, until])
    cost = _merging_cost(distance, inverse[:, rows], inverse[:, until])
    size = cost.shape[1]
    not_earlier = torch.ones(size, size, dtype=torch.bool, device=points.device).triu()
    cost[:, :, rows.start :].masked_fill_(not_earlier, torch.inf)
    return cost.amin(dim=2)


def _blocks(n: int, device: torch.device) -> Iterator[slice]:
    """Split the n rows of the distance matrix into blocks that fit into the budget. A graph has one block."""
    step = n if is_in_graph() else min(micro_batch.max_items(n, micro_batch.DISTANCES.on(device)), n)
    starts = (0,) if is_in_graph() else range(0, n, step)
    return (slice(start, start + step) for start in starts)


def _merging_cost(distance: Tensor, row_inverse: Tensor, column_inverse: Tensor) -> Tensor:
    """Return the cost of merging (B, R, M).

    Args:
        distance: (B, R, M), squared distances.
        row_inverse: (B, R), inverse weights of the rows.
        column_inverse: (B, M), inverse weights of the columns.
    """
    return distance / (row_inverse[:, :, None] + column_inverse[:, None, :])


def _inverse(weights: Tensor) -> Tensor:
    """Return 1 / weight. It is infinite for a weight of 0 or -0, so that the cost of merging is zero."""
    return weights.abs().reciprocal()
