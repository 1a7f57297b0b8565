"""Agglomerative clustering: merge the two nearest clusters until K remain.

The distances between clusters follow Lance and Williams 1967. The function does not share code with `ward_init`, which
selects initial centres and merges nothing.

Ties: the pair of lowest distance is merged. Each cluster is named after its first token. Of several pairs with the same
*computed* distance, the pair whose first cluster comes first is merged; among its pairs, the one whose second cluster
comes first. scikit-learn breaks ties in another way, so its clusters may differ if distances are equal.
"""

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from tokenpool import micro_batch
from tokenpool.clustering.reductions import full_precision
from tokenpool.eager import is_eager_cpu, without_autocast

Linkage = Literal["average", "complete", "single", "ward"]
LINKAGES: tuple[Linkage, ...] = get_args(Linkage)


@torch.no_grad()
def agglomerate(distance: Tensor, k: int, linkage: Linkage = "average", weights: Tensor | None = None) -> Tensor:
    """Cluster by distances: each token begins as a cluster, and the two nearest clusters are merged N - K times.

    The distance of two clusters is the mean ("average"), the highest ("complete") or the lowest ("single") of the
    distances between their tokens. For "ward", it is the increase of objective (13) of K-Means if they are merged:
    w_i w_j / (w_i + w_j) |m_i - m_j|^2 for clusters of weights w and weighted means m (Ward 1963). The result equals
    scikit-learn's `AgglomerativeClustering`, except for ties. All images are clustered at the same time. The loop over
    merges has N - K steps.

    Args:
        distance: (B, N, N), finite distances; squared Euclidean distances for "ward". Only the mean of the matrix and
            its transpose matters.
        k: number of clusters, 1..N.
        linkage: "average", "complete", "single" or "ward".
        weights: (B, N), positive weights of the tokens, for "average" and "ward". A token of weight 2 counts as two
            equal tokens. Default: all equal.

    Returns:
        (B, N) int64, the cluster of each token, in 0..K-1. Clusters have the order of their first tokens.

    Raises:
        ValueError: for another linkage, a matrix that is not square, or `k` outside its range.
    """
    if linkage not in LINKAGES:
        raise ValueError(f"linkage = {linkage!r} must be one of {', '.join(map(repr, LINKAGES))}")
    if distance.dim() != 3 or distance.shape[1] != distance.shape[2]:
        raise ValueError(f"distance must have shape (B, N, N), got {tuple(distance.shape)}")
    n = distance.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"k = {k!r} must be a whole number in 1..{n}, the number of tokens")
    weights = torch.ones_like(distance[:, 0]) if weights is None else weights
    size = micro_batch.max_items(n * n, micro_batch.FEW_DISTANCES.on(distance.device))
    with without_autocast(distance.device):
        parts = micro_batch.split(size, distance, weights)
        return torch.cat([_agglomerate(some, weight, k, linkage) for some, weight in parts])


class _Nearest(NamedTuple):
    """The nearest other cluster of each cluster.

    Attributes:
        distance: (B, N), its distance, or the highest float for a cluster that was merged into another one.
        cluster: (B, N), its name, the index of its first token.
    """

    distance: Tensor
    cluster: Tensor


def _agglomerate(distance: Tensor, weights: Tensor, k: int, linkage: Linkage) -> Tensor:
    batch, n, _ = distance.shape
    distance = full_precision(distance)
    weights = weights.to(distance) / weights.to(distance).amax(dim=1, keepdim=True)
    weights = weights.clamp(min=torch.finfo(distance.dtype).tiny ** 0.5)  # their inverses and products are finite
    if linkage == "ward":
        inverse = weights.reciprocal()
        distance = distance / (inverse[:, :, None] + inverse[:, None, :])
    far = torch.finfo(distance.dtype).max  # not infinity, because inf - inf is no number
    itself = torch.eye(n, dtype=torch.bool, device=distance.device)
    # Exactly symmetric, and a copy, which the loop may overwrite.
    distance = ((distance + distance.mT) / 2).masked_fill(itself, far)
    first_token = torch.arange(n, device=distance.device).expand(batch, n)  # of the cluster of each token
    nearest = _Nearest(*distance.min(dim=2))
    for _ in range(n - k):
        first = nearest.distance.argmin(dim=1, keepdim=True)  # (B, 1)
        second = nearest.cluster.gather(1, first)  # (B, 1), after `first` because the distances are symmetric
        pair = torch.cat([first, second], dim=1)  # (B, 2)
        merged = _merged_row(distance, weights, pair, linkage).scatter(1, pair, far)  # (B, N)
        rows = torch.stack([merged, torch.full_like(merged, far)], dim=1)  # (B, 2, N), no row for the second cluster
        distance.scatter_(1, pair[:, :, None].expand(-1, -1, n), rows)
        distance.scatter_(2, pair[:, None, :].expand(-1, n, -1), rows.mT)
        weights = weights.scatter(1, first, weights.gather(1, pair).sum(dim=1, keepdim=True))
        first_token = torch.where(first_token == second, first, first_token)
        nearest = _nearest(distance, nearest, merged, pair)
    remains = first_token == torch.arange(n, device=distance.device)
    return (remains.cumsum(dim=1) - 1).gather(1, first_token)


def _merged_row(distance: Tensor, weights: Tensor, pair: Tensor, linkage: Linkage) -> Tensor:
    """Return the distances (B, N) from the union of two clusters `pair` (B, 2) to all clusters.

    The weights (B, N) are the weights of the clusters. Rows of merged clusters remain at the highest float.
    """
    n = distance.shape[1]
    one, other = distance.gather(1, pair[:, :, None].expand(-1, -1, n)).unbind(dim=1)  # (B, N) each
    if linkage == "single":
        return torch.minimum(one, other)
    if linkage == "complete":
        return torch.maximum(one, other)
    own = weights.gather(1, pair)  # (B, 2)
    share = own[:, 1:] / own.sum(dim=1, keepdim=True)
    mean = one + share * (other - one)  # exact for equal distances
    if linkage == "average":
        return mean
    between = one.gather(1, pair[:, 1:])  # (B, 1)
    # The formula of Lance and Williams, ((w_i + w_k) c_ik + (w_j + w_k) c_jk - w_k c_ij) / (w_i + w_j + w_k).
    total = own.sum(dim=1, keepdim=True) + weights
    merged = mean * (own.sum(dim=1, keepdim=True) / total) + (one + other - between) * (weights / total)
    return merged.clamp(max=torch.finfo(merged.dtype).max)


def _nearest(distance: Tensor, before: _Nearest, merged: Tensor, pair: Tensor) -> _Nearest:
    """Return the nearest clusters after a merge.

    Args:
        distance: (B, N, N), after the merge.
        before: the nearest clusters before the merge.
        merged: (B, N), the distances from the merged cluster to all clusters.
        pair: (B, 2), the merged clusters. The union has the name of the first one.
    """
    if not is_eager_cpu(distance):
        return _Nearest(*distance.min(dim=2))
    # Most clusters keep their neighbour, or the union becomes their neighbour. Search the other rows only.
    first, second = pair.split(1, dim=1)  # (B, 1) each
    is_nearer = (merged < before.distance) | ((merged == before.distance) & (first < before.cluster))
    found = torch.where(is_nearer, merged, before.distance)
    cluster = torch.where(is_nearer, first, before.cluster)
    lost = (before.cluster == first) | (before.cluster == second)
    image, row = lost.scatter(1, pair, True).nonzero(as_tuple=True)
    found[image, row], cluster[image, row] = distance[image, row].min(dim=1)
    return _Nearest(found, cluster)
