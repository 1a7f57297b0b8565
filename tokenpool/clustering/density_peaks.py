"""Density-peak clustering with K nearest neighbours (Du et al. 2016; equations (1) and (2) of Zeng et al. 2022)."""

import math

import torch
from torch import Tensor

from tokenpool.clustering.distances import squared_distances
from tokenpool.clustering.reductions import full_precision, stable_topk, take_rows
from tokenpool.eager import without_autocast


@torch.no_grad()
def density_peaks(tokens: Tensor, k: int, neighbours: int = 5) -> Tensor:
    """Cluster tokens around K density peaks.

    With d_ij = |x_i - x_j| / sqrt(D), the density of token i is rho_i = exp(-mean of d_ij^2 over its nearest
    neighbours j). Its distance delta_i is the lowest d_ij to a token j of higher density, or the highest d_ij for the
    densest token. The K tokens of highest rho_i delta_i are the centres, and each token goes to the nearest centre.

    Ties: of two tokens with the same density or the same product, the first one counts as higher. In a tie of
    distances the first centre wins. Densities are compared by their logarithms, which do not underflow.

    Args:
        tokens: (B, N, D), finite.
        k: number of clusters, 1..N.
        neighbours: number of nearest neighbours, not counting the token itself. If there are fewer other tokens, all
            of them.

    Returns:
        (B, N) int64, the cluster of each token, in 0..K-1. Clusters have the order of their centres. A centre belongs
        to its own cluster.

    Raises:
        ValueError: for `k` or `neighbours` outside its range.
    """
    _, n, width = tokens.shape
    if not 1 <= k <= n:
        raise ValueError(f"k = {k!r} must be a whole number in 1..{n}, the number of tokens")
    if neighbours < 1:
        raise ValueError(f"neighbours = {neighbours!r} must be a whole number, at least 1")
    with without_autocast(tokens.device):
        distance = squared_distances(full_precision(tokens)) / width  # (B, N, N), d_ij^2
        density = _log_density(distance, min(neighbours, n - 1))  # (B, N)
        separation = _separation(distance, density)  # (B, N), delta_i^2
        centres = stable_topk(density + separation.log() / 2, k).sort(dim=1).values  # (B, K)
        to_centres = take_rows(distance, centres).scatter(2, centres[:, :, None], -1)  # (B, K, N), own centre first
        return to_centres.min(dim=1).indices


def _log_density(distance: Tensor, neighbours: int) -> Tensor:
    """Return log rho (B, N) by squared distances (B, N, N)."""
    # The token itself has distance zero, so it is among the nearest and adds nothing.
    nearest = distance.topk(neighbours + 1, dim=2, largest=False).values
    return -nearest.sum(dim=2) / max(neighbours, 1)


def _separation(distance: Tensor, density: Tensor) -> Tensor:
    """Return the squared distance (B, N) to the nearest token of higher density, and the highest for the densest."""
    n = density.shape[1]
    earlier = torch.ones(n, n, dtype=torch.bool, device=density.device).tril(-1)  # column before row
    is_denser = (density[:, None, :] > density[:, :, None]) | ((density[:, None, :] == density[:, :, None]) & earlier)
    nearest = distance.masked_fill(~is_denser, math.inf).amin(dim=2)
    return torch.where(nearest < math.inf, nearest, distance.amax(dim=2))
