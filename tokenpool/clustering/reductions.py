"""Reductions over tokens and clusters: sums, means, best members, and the highest weights."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenpool import gpu
from tokenpool.eager import is_eager_cpu, is_in_graph


def stable_topk(weights: Tensor, k: int) -> Tensor:
    """Indices (B, K) of the K highest weights (B, N), highest first. Of equal weights the earlier comes first."""
    if torch.compiler.is_exporting():  # ONNX has no name for a stable sort, but its sort is one
        return weights.sort(dim=-1, descending=True).indices[:, :k]
    return weights.argsort(dim=-1, descending=True, stable=True)[:, :k]


def sums(weights: Tensor, assignment: Tensor, k: int) -> Tensor:
    """Sum of the weights (B, N) over each cluster of the assignment (B, N): (B, K)."""
    if weights.is_cuda:
        return _membership_matrix(weights, assignment, k).sum(dim=2)
    return weights.new_zeros(weights.shape[0], k).scatter_add(1, assignment, weights)


def means(tokens: Tensor, weights: Tensor, assignment: Tensor, k: int) -> Tensor:
    """Weighted mean (B, K, D) of the tokens (B, N, D) of each cluster. The mean of a cluster without weight is zero."""
    return weighted_means(tokens, weights, assignment, tokens.new_zeros(tokens.shape[0], k, tokens.shape[2]))


def weighted_means(
    tokens: Tensor,
    weights: Tensor,
    assignment: Tensor,
    previous: Tensor,
    members: Sequence[Tensor] = (),
) -> Tensor:
    """Equation (15): the weighted mean (B, K, D) of each cluster's tokens. It carries the gradient to the tokens.

    Args:
        tokens: (B, N, D).
        weights: (B, N), in float32 at least.
        assignment: (B, N), the cluster of each token.
        previous: the centre of a cluster without weight, as a point (B, K, D) or as the index (B, K) of a token.
        members: `order` and `start` of `gpu.Medoids`. The GPU kernel then computes the sums.
    """
    k = previous.shape[1]
    with torch.autocast(tokens.device.type, enabled=False):
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
            found = cluster_sums(full_precision(tokens), share, assignment, k).to(tokens.dtype)  # (B, K, D)
        if all_weigh:
            return found
        stayed = take_rows(tokens, previous) if previous.dim() == 2 else previous
        return torch.where(total[:, :, None] > 0, found, stayed.to(tokens.dtype))


def best_members(cost: Tensor, weights: Tensor, assignment: Tensor, previous: Tensor) -> Tensor:
    """Equation (17): the member of lowest cost (B, N) of each cluster. Of equal costs the earlier member wins.

    Args:
        cost: (B, N), the cost of each token as the medoid of its cluster.
        weights: (B, N).
        assignment: (B, N), the cluster of each token.
        previous: (B, K), the old medoids. A cluster without weight keeps its old medoid.

    Returns:
        Indices (B, K) of the new medoids.
    """
    batch, n = assignment.shape
    k = previous.shape[1]
    lowest = cost.new_full((batch, k), torch.inf).scatter_reduce(1, assignment, cost, "amin")
    candidate = torch.arange(n, device=cost.device).expand(batch, n)
    candidate = candidate.masked_fill(cost > lowest.gather(1, assignment), n)
    best = assignment.new_full((batch, k), n - 1).scatter_reduce(1, assignment, candidate, "amin")
    return torch.where(sums(weights, assignment, k) > 0, best, previous)


def cluster_sums(values: Tensor, weights: Tensor, assignment: Tensor, k: int) -> Tensor:
    """Weighted sum of the rows of the values (B, N, E) over each cluster: (B, K, E)."""
    batch, n, width = values.shape
    if values.is_cuda:
        return torch.bmm(_membership_matrix(weights, assignment, k).to(values.dtype), values)
    target = _flat(assignment, k)
    if is_eager_cpu(values) and not (values.requires_grad and torch.is_grad_enabled()):
        # Several times as fast as index_add: it copies no rows and uses all cores.
        target, order = target.sort(stable=True)
        start = torch.searchsorted(target, torch.arange(batch * k, device=target.device))
        share = weights.flatten()[order].to(values.dtype)
        rows = values.reshape(batch * n, width)
        return F.embedding_bag(order, rows, start, mode="sum", per_sample_weights=share).view(batch, k, width)
    rows = (values * weights[:, :, None]).reshape(batch * n, width)
    return rows.new_zeros(batch * k, width).index_add(0, target, rows).view(batch, k, width)


def _membership_matrix(weights: Tensor, assignment: Tensor, k: int) -> Tensor:
    """Matrix (B, K, N) that holds each token's weight in the row of its cluster, and zero elsewhere.

    A sum on a GPU is a product with this matrix, because index_add and scatter_add add in a random order there.
    """
    zeros = weights.new_zeros(weights.shape[0], k, weights.shape[1])
    return zeros.scatter(1, assignment[:, None, :], weights[:, None, :])


def take_rows(values: Tensor, index: Tensor) -> Tensor:
    """Rows `index` (B, K) of the values (B, N, E) of each image: (B, K, E)."""
    batch, n, width = values.shape
    return values.reshape(batch * n, width).index_select(0, _flat(index, n)).view(batch, index.shape[1], width)


def take_columns(values: Tensor, index: Tensor) -> Tensor:
    """Columns `index` (B, K) of the values (B, M, N) of each image: (B, M, K)."""
    return values.gather(2, index[:, None, :].expand(-1, values.shape[1], -1))


def full_precision(tokens: Tensor) -> Tensor:
    """The tokens in float32 where their dtype has 16 bits."""
    return tokens.float() if tokens.dtype in (torch.float16, torch.bfloat16) else tokens


def _flat(index: Tensor, size: int) -> Tensor:
    """Indices (B * M,) into the rows of all images laid end to end, from indices (B, M) into `size` rows an image."""
    if not is_in_graph() and index.shape[0] == 1:
        return index.flatten()
    return (index + size * torch.arange(index.shape[0], device=index.device)[:, None]).flatten()
