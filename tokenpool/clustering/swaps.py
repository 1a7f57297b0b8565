"""K-Medoids for exported graphs: Algorithm 1 as swaps of medoids with other tokens.

An exported graph cannot branch, and each of its operators has a fixed shape. TensorRT computes wrong results for some
scatters with a reduction. So this form has no such scatter, and no operator of a cluster at a time.

K of N tokens are medoids, and M = N - K are not. Each of the M tokens belongs to the cluster of its nearest medoid. A
new medoid is one of these tokens, and changes places with the old medoid. So the work of an iteration is proportional
to M N, and M is small in the paper's schedules. The result is the same as in `algorithm.alternate`, up to the rounding
of distances. Equal points that are both medoids stay in clusters of their own.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenpool.clustering.reductions import first_rows, full_precision
from tokenpool.eager import cast


class Swapped(NamedTuple):
    """K clusters of the N tokens of each image, by their M = N - K tokens that are not medoids.

    Attributes:
        labels: (B, N), the cluster of each token, in 0..K-1, as floats.
        others: (B, M), indices of the tokens that are not medoids.
        nearest: (B, M), index of the medoid of each of these tokens.
        same: (B, M, N), whether a token is in the cluster of each of these tokens.
        label: (B, M), the cluster of each of these tokens.
        first: (B, 1), the index of the first token of each image among the tokens of all images.
    """

    labels: Tensor
    others: Tensor
    nearest: Tensor
    same: Tensor
    label: Tensor
    first: Tensor


def symmetric_distances(points: Tensor) -> Tensor:
    """Compute squared distances (B, N, N) between points (B, N, E). They are exactly zero on the diagonal.

    The same as `distances.squared_distances`, with fewer operators. Rounding can make them slightly negative.
    """
    points = full_precision(points)
    points = points - points.mean(dim=1, keepdim=True)  # a common offset would reduce the precision
    product = torch.bmm(points * -2, points.mT)  # (B, N, N)
    n = points.shape[1]
    norm = product.gather(2, torch.arange(n, device=points.device).unsqueeze(1).expand(points.shape[0], n, 1)) * -0.5
    return product + (norm + norm.mT)


def alternate_by_swaps(distance: Tensor, weights: Tensor, medoids: Tensor, iterations: int) -> Swapped:
    """Run the loop of Algorithm 1 for K-Medoids, lines 3-5.

    Args:
        distance: (B, N, N), squared distances.
        weights: (B, N).
        medoids: (B, K), the initial medoids, K < N different indices of points.
        iterations: number of assignments, at least 1.
    """
    batch, n = weights.shape
    k = medoids.shape[1]
    clusters = torch.arange(k, device=weights.device, dtype=weights.dtype).expand(batch, k)
    descending = torch.arange(n, 0, -1, device=weights.device, dtype=weights.dtype).expand(batch, n)
    zeros = torch.zeros_like(weights)
    others = descending.scatter(1, medoids, torch.zeros_like(clusters)).topk(n - k).indices  # (B, M), ascending
    first, rows = first_rows(distance)
    state = _Loop(first, rows, weights.unsqueeze(1), zeros, torch.full_like(others, torch.inf, dtype=weights.dtype))
    labels = zeros.scatter(1, medoids, clusters)
    for _ in range(iterations - 1):
        swapped, own = _assigned(state, labels, others)
        labels, others = swapped.labels, _moved(state, swapped, own)
    return _assigned(state, labels, others)[0]


class _Loop(NamedTuple):
    """The tensors that do not change.

    Attributes:
        first: see `Swapped`.
        rows: (B N, N), the distances of all tokens of all images.
        weights: (B, 1, N).
        zeros: (B, N).
        infinite: (B, M).
    """

    first: Tensor
    rows: Tensor
    weights: Tensor
    zeros: Tensor
    infinite: Tensor


def _assigned(loop: _Loop, labels: Tensor, others: Tensor) -> tuple[Swapped, Tensor]:
    """Assign the tokens that are not medoids to the nearest medoid, equation (16).

    Args:
        loop: tensors that do not change.
        labels: (B, N), the cluster of each medoid. Other values do not matter.
        others: (B, M), the tokens that are not medoids.

    Returns:
        The clusters, and the distances (B, M, N) of these tokens.
    """
    own = F.embedding(others + loop.first, loop.rows)
    to_medoids = own + loop.zeros.scatter(1, others, loop.infinite).unsqueeze(1)
    nearest = to_medoids.argmin(dim=2)
    label = labels.gather(1, nearest)
    labels = labels.scatter(1, others, label)
    same = label.unsqueeze(2) == labels.unsqueeze(1)
    return Swapped(labels, others, nearest, same, label, loop.first), own


def _moved(loop: _Loop, swapped: Swapped, own: Tensor) -> Tensor:
    """Move the medoids, equations (17) and (18). In a tie the first member wins.

    Returns:
        (B, M), the tokens that are not medoids.
    """
    _, others, nearest, same, _, first = swapped
    # The difference of the costs of a token and of its medoid, equation (17). The medoid's own difference is zero.
    terms = (own - F.embedding(nearest + first, loop.rows)) * loop.weights
    difference = torch.where(same, terms, 0).sum(dim=2)  # (B, M)
    weight = torch.where(same, loop.weights, 0).sum(dim=2)
    difference = torch.where(weight > 0, difference, torch.inf)  # a cluster of weight zero keeps its medoid
    differences = loop.zeros.scatter(1, others, difference).unsqueeze(1)
    best = torch.where(same, differences, torch.inf).argmin(dim=2)  # (B, M)
    return torch.where(best == others, nearest, others)


def means_by_swaps(tokens: Tensor, weights: Tensor, swapped: Swapped) -> Tensor:
    """Compute the weighted mean (B, K, D) of each cluster, equation (15).

    The mean is the medoid plus, for each other member, its share of the weight times its difference to the medoid.

    Args:
        tokens: (B, N, D).
        weights: (B, N).
        swapped: the clusters.
    """
    labels, others, nearest, same, label, first = swapped
    k = tokens.shape[1] - others.shape[1]
    total = torch.where(same, weights.unsqueeze(1), 0).sum(dim=2)  # (B, M)
    share = weights.gather(1, others) / total.clamp(min=torch.finfo(total.dtype).tiny)
    rows = full_precision(tokens).flatten(0, 1)  # (B N, D)
    moved = F.embedding(others + first, rows) - F.embedding(nearest + first, rows)  # (B, M, D)
    clusters = torch.arange(k, device=tokens.device, dtype=labels.dtype).unsqueeze(1)
    shares = torch.where(clusters == label.unsqueeze(1), share.unsqueeze(1), 0)  # (B, K, M)
    after = torch.full_like(label, k)
    medoids = labels.scatter(1, others, after).topk(k, largest=False).indices  # (B, K), in the order of clusters
    found = F.embedding(medoids + first, rows) + torch.bmm(cast(shares, rows.dtype), moved)
    return cast(found, tokens.dtype)
