"""Reductions over tokens and clusters: sums, means, best members, and the highest weights."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenpool import gpu
from tokenpool.eager import (
    at_least_float32,
    cast,
    is_eager_cpu,
    is_exporting,
    is_in_graph,
    needs_gradient,
    without_autocast,
)


def stable_topk(weights: Tensor, k: int) -> Tensor:
    """Return the indices of the K highest weights, highest first. Equal weights keep their order.

    Args:
        weights: (B, N).
        k: number of indices, 1..N.

    Returns:
        (B, K) int64.
    """
    if is_exporting() and torch.onnx.is_in_onnx_export():  # ONNX has no stable option, but its sort is stable
        return weights.sort(dim=-1, descending=True).indices.narrow(1, 0, k)
    return weights.argsort(dim=-1, descending=True, stable=True)[:, :k]


def positive(weights: Tensor) -> Tensor:
    """Make zero weights positive. If all weights of an image are zero, they become equal."""
    return weights.clamp(min=torch.finfo(weights.dtype).tiny)


def sums(weights: Tensor, assignment: Tensor, k: int) -> Tensor:
    """Sum the weights of each cluster.

    Args:
        weights: (B, N).
        assignment: (B, N) int64, the cluster of each token, in 0..K-1.
        k: number of clusters.

    Returns:
        (B, K).
    """
    if weights.is_cuda or is_exporting():
        return _membership_matrix(weights, assignment, k).sum(dim=2)
    return weights.new_zeros(weights.shape[0], k).scatter_add(1, assignment, weights)


def means(tokens: Tensor, weights: Tensor, assignment: Tensor, k: int) -> Tensor:
    """Compute the weighted mean of the tokens of each cluster. The mean of a cluster of weight zero is zero.

    Args:
        tokens: (B, N, D).
        weights: (B, N).
        assignment: (B, N) int64, the cluster of each token, in 0..K-1.
        k: number of clusters.

    Returns:
        (B, K, D).
    """
    return weighted_means(tokens, weights, assignment, tokens.new_zeros(tokens.shape[0], k, tokens.shape[2]))


def weighted_means(
    tokens: Tensor,
    weights: Tensor,
    assignment: Tensor,
    previous: Tensor,
    members: Sequence[Tensor] = (),
) -> Tensor:
    """Compute the weighted mean of the tokens of each cluster, equation (15). Gradients flow to the tokens.

    Args:
        tokens: (B, N, D).
        weights: (B, N), at least in float32.
        assignment: (B, N), the cluster of each token.
        previous: the result for a cluster of weight zero, as a point (B, K, D) or as the index (B, K) of a token.
        members: `order` and `start` of `gpu.Medoids`. If given, GPU kernels compute the sums, or without gradient the
            means in one launch.

    Returns:
        (B, K, D).
    """
    k = previous.shape[1]
    with without_autocast(tokens.device):
        if members and not needs_gradient(tokens):
            return gpu.weighted_means(tokens, weights, gpu.Medoids(assignment, previous, *members))
        if members:
            total = gpu.means(weights[:, :, None], torch.ones_like(weights), assignment, *members).squeeze(2)
        else:
            total = sums(weights, assignment, k)  # (B, K)
        all_weigh = is_eager_cpu(tokens) and total.numel() > 0 and total.amin().item() > 0
        divisor = total if all_weigh else torch.where(total > 0, total, 1)
        share = weights / divisor.gather(1, assignment)  # (B, N)
        if members:
            found = gpu.means(tokens, share, assignment, *members)
        else:
            found = cluster_sums(full_precision(tokens), share, assignment, k)  # (B, K, D)
            found = cast(found, tokens.dtype)
        if all_weigh:
            return found
        old = take_rows(tokens, previous) if previous.dim() == 2 else previous
        return torch.where(total[:, :, None] > 0, found, old.to(tokens.dtype))


def best_members(cost: Tensor, weights: Tensor, assignment: Tensor, previous: Tensor) -> Tensor:
    """Find the member of lowest cost of each cluster, equation (17). In a tie the first member wins.

    Args:
        cost: (B, N), the cost of each token as the medoid of its cluster.
        weights: (B, N).
        assignment: (B, N), the cluster of each token.
        previous: (B, K), the old medoids. A cluster of weight zero keeps its old medoid.

    Returns:
        Indices (B, K) of the new medoids.
    """
    batch, n = assignment.shape
    k = previous.shape[1]
    weigh = sums(weights, assignment, k) > 0
    if is_exporting():
        best = torch.where(is_member(assignment, k), cost.unsqueeze(1), torch.inf).argmin(dim=2)
        return torch.where(weigh, best, previous)
    lowest = cost.new_full((batch, k), torch.inf).scatter_reduce(1, assignment, cost, "amin")
    candidate = torch.arange(n, device=cost.device).expand(batch, n)
    candidate = candidate.masked_fill(cost > lowest.gather(1, assignment), n)
    best = assignment.new_full((batch, k), n - 1).scatter_reduce(1, assignment, candidate, "amin")
    return torch.where(weigh, best, previous)


def cluster_sums(values: Tensor, weights: Tensor, assignment: Tensor, k: int) -> Tensor:
    """Compute the weighted sum of the rows of each cluster.

    Args:
        values: (B, N, E).
        weights: (B, N).
        assignment: (B, N), the cluster of each row.
        k: number of clusters.

    Returns:
        (B, K, E).
    """
    batch, n, width = values.shape
    if values.is_cuda or is_exporting():
        return torch.bmm(cast(_membership_matrix(weights, assignment, k), values.dtype), values)
    target = _flat(assignment, k)
    if is_eager_cpu(values) and not needs_gradient(values):
        # Several times as fast as index_add, because it does not copy rows and uses all cores.
        target, order = target.sort(stable=True)
        start = torch.searchsorted(target, torch.arange(batch * k, device=target.device))
        share = weights.flatten()[order].to(values.dtype)
        rows = values.reshape(batch * n, width)
        return F.embedding_bag(order, rows, start, mode="sum", per_sample_weights=share).view(batch, k, width)
    rows = (values * weights[:, :, None]).reshape(batch * n, width)
    return rows.new_zeros(batch * k, width).index_add(0, target, rows).view(batch, k, width)


def _membership_matrix(weights: Tensor, assignment: Tensor, k: int) -> Tensor:
    """Return a matrix (B, K, N) with the weight of each token in the row of its cluster, and zero elsewhere.

    Sums on a GPU are products with this matrix, because index_add and scatter_add on a GPU add in a random order.
    """
    if is_exporting():
        return torch.where(is_member(assignment, k), weights.unsqueeze(1), 0)
    zeros = weights.new_zeros(weights.shape[0], k, weights.shape[1])
    return zeros.scatter(1, assignment[:, None, :], weights[:, None, :])


def is_member(assignment: Tensor, k: int) -> Tensor:
    """Return whether each token is in each cluster, (B, K, N) booleans, by the clusters (B, N) of the tokens."""
    return assignment.unsqueeze(1) == torch.arange(k, device=assignment.device).unsqueeze(1)


def largest(values: Tensor, assignment: Tensor, k: int) -> Tensor:
    """Return the highest value of each cluster, or zero for a cluster without members.

    Args:
        values: (B, N), not negative.
        assignment: (B, N) int64, the cluster of each token, in 0..K-1.
        k: number of clusters.

    Returns:
        (B, K).
    """
    if is_exporting():
        return torch.where(is_member(assignment, k), values.unsqueeze(1), 0).amax(dim=2)
    return values.new_zeros(values.shape[0], k).scatter_reduce(1, assignment, values, "amax")


def first_rows(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the index (B, 1) of the first row of each image, and the rows (B N, E) of values (B, N, E).

    In an exported graph, `F.embedding(index + first, rows)` is one operator that takes rows `index` (B, K).
    """
    batch, n, _ = values.shape
    return n * torch.arange(batch, device=values.device).unsqueeze(1), values.flatten(0, 1)


def take_rows(values: Tensor, index: Tensor) -> Tensor:
    """Take the rows `index` (B, K) of the values (B, N, E) of each image: (B, K, E)."""
    batch, n, width = values.shape
    if is_exporting():
        first, rows = first_rows(values)
        return F.embedding(index + first, rows)
    return values.reshape(batch * n, width).index_select(0, _flat(index, n)).view(batch, index.shape[1], width)


def take_columns(values: Tensor, index: Tensor) -> Tensor:
    """Take the columns `index` (B, K) of the values (B, M, N) of each image: (B, M, K)."""
    return values.gather(2, index[:, None, :].expand(-1, values.shape[1], -1))


def full_precision(tokens: Tensor) -> Tensor:
    """Return 16-bit tokens in float32, and other tokens unchanged."""
    return cast(tokens, at_least_float32(tokens.dtype))


def _flat(index: Tensor, size: int) -> Tensor:
    """Convert indices (B, M) into `size` rows of each image to indices (B * M,) into the rows of all images."""
    if not is_in_graph() and index.shape[0] == 1:
        return index.flatten()
    return (index + size * torch.arange(index.shape[0], device=index.device)[:, None]).flatten()
