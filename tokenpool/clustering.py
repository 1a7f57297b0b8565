"""Batched, weighted K-Means and K-Medoids: tensors in, tensors out, nothing known of transformers.

Marin et al. 2021, Algorithm 1, equations (10)-(12) and appendix A. Every image of a batch is clustered on its own, at
the same time as the others, without a Python loop over images, clusters or tokens.

Ties: of centres at equal *computed* distance the first one wins. Points are centred before their distances are taken
in float32, and both round. So of tokens that are exactly as near to two centres, as on whole numbers, some go to a
later one.
"""

import math
from itertools import repeat
from numbers import Integral
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenpool import kernels


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

    Assignments are decided in float32 and without gradient; the returned means carry the gradient to the tokens. A
    cluster that loses all its members (or whose members weigh nothing) stays where it was, and its output is that
    centre. Iterating stops early once no centre moves in any image.

    Args:
        tokens: (B, N, D), finite.
        k: number of clusters, 1..N.
        weights: (B, N), not negative, not all zero in any image; only their ratios matter. Default: all equal.
        init: initial centres, as token indices (B, K) or as points (B, K, D). Default: the K tokens of highest weight,
            or K evenly spaced tokens where there are no weights.
        iterations: the most updates of the centres, at least 1.
        check_values: look for values that are not finite and for unusable weights. On a GPU the look costs a
            synchronisation; inside `torch.compile` it is left out.

    Raises:
        TypeError: where an argument is no tensor.
        ValueError: where an argument breaks the rules above; the message names it.
    """
    weights, init = _checked(tokens, k, weights, init, iterations, check_values)
    with torch.no_grad(), torch.autocast(tokens.device.type, enabled=False):
        points, scale = _scaled(tokens)
        centers = _take(points, init) if init.dim() == 2 else init.to(points) / scale
        for _ in range(iterations):
            previous = centers
            assignment = _nearest_center(points, centers)
            centers = _weighted_means(points, weights, assignment, previous)
            if _can_branch(tokens) and torch.equal(centers, previous):
                break
    return Clusters(_weighted_means(tokens, weights, assignment, previous * scale), assignment)


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

    The medoid of a cluster is that member which minimises the *weighted* sum of squared distances to the members of
    its own cluster, as objective (13) demands; equation (17) as printed omits the weight. The distances are computed
    once; or, on a CPU and where most tokens are medoids, those from all others, in each iteration, and "ward" looks at
    distances of its own. The output is the weighted *mean* of each cluster (Algorithm 1, line 6), not the medoid.

    Arguments, errors, gradients, and the treatment of clusters without members are those of `kmeans`, but for these:

    Args:
        init: where it holds points, the tokens nearest to them are the first medoids. "ward", an extension, takes the K
            tokens that cost most to merge into another (see `dearest_to_merge`).
        by: (B, N, E), what distances are measured between, instead of the tokens. An extension.
    """
    init, chosen = (None, init) if isinstance(init, str) else (init, None)
    if chosen not in (None, "ward"):
        raise ValueError(f'init = {chosen!r} must be a tensor, None or "ward"')
    weights, init = _checked(tokens, k, weights, init, iterations, check_values)
    if by is None:
        by = tokens
    elif by.dim() != 3 or by.shape[:2] != tokens.shape[:2]:
        raise ValueError(f"by must have shape (B, N, E), B, N = {tuple(tokens.shape[:2])}, got {tuple(by.shape)}")
    elif check_values and _can_branch(tokens) and not _all_finite(by):
        raise ValueError("by must be finite")
    has_indices = chosen is not None or init.dim() == 2
    if has_indices and kernels.kmedoids_fits(by) and kernels.means_fits(tokens):
        medoids = _first_medoids(by, weights, k) if chosen else init
        found = kernels.kmedoids(by, weights, medoids, iterations)
        members = (found.order, found.start)
        return Clusters(_weighted_means(tokens, weights, found.assignment, found.previous, members), found.assignment)
    with torch.no_grad(), torch.autocast(tokens.device.type, enabled=False):
        if is_in_graph() or (at_once := _images_at_once(by, k, iterations)) >= by.shape[0]:
            assignment, medoids = _kmedoids(by, weights, chosen or init, k, iterations)
        else:
            starts = repeat(chosen) if chosen else init.split(at_once)
            groups = zip(by.split(at_once), weights.split(at_once), starts, strict=False)
            found = [_kmedoids(*group, k, iterations) for group in groups]
            assignment, medoids = map(torch.cat, zip(*found, strict=True))
    return Clusters(_weighted_means(tokens, weights, assignment, medoids), assignment)


def _kmedoids(by: Tensor, weights: Tensor, init: Tensor | str, k: int, iterations: int) -> tuple[Tensor, Tensor]:
    """Assignment (B, N) of the points (B, N, E), and the medoids (B, K) that it was made from."""
    if isinstance(init, Tensor) and init.dim() == 3:
        points, scale = _scaled(by)
        init = _nearest_center(init.to(points) / scale, points)
    if not (_can_branch(by) and _are_few_others(by.shape[1], k, iterations)):
        distances = _AllDistances(by)
        medoids = init if isinstance(init, Tensor) else dearest_to_merge(distances.matrix, weights, k)
        return _iterate(distances, weights, medoids, iterations)
    medoids = init if isinstance(init, Tensor) else _first_medoids(by, weights, k)
    distances = _OthersDistances(_full_precision(by))
    suits = distances.suits(medoids)
    if all(suits):
        return _iterate(distances, weights, medoids, iterations)
    if len(suits) == 1:
        return _iterate(_AllDistances(by), weights, medoids, iterations)
    images = zip(by.split(1), weights.split(1), medoids.split(1), strict=True)  # so that none depends on others: rare
    found = [_kmedoids(*image, k, iterations) for image in images]
    return tuple(map(torch.cat, zip(*found, strict=True)))


def _iterate(
    distances: "_AllDistances | _OthersDistances", weights: Tensor, medoids: Tensor, iterations: int
) -> tuple[Tensor, Tensor]:
    """What `_kmedoids` returns, from the first medoids (B, K) on."""
    assignment = distances.assign(medoids)
    for _ in range(iterations - 1):
        previous = medoids
        medoids = _best_members(distances.costs(weights, assignment, previous), weights, assignment, previous)
        if _can_branch(medoids) and torch.equal(medoids, previous):
            break
        assignment = distances.assign(medoids)
    return assignment, medoids


class _AllDistances:
    """The squared distances between all points (B, N, E): N^2 E multiply-adds, once."""

    def __init__(self, points: Tensor) -> None:
        matrix = squared_distances(_full_precision(points)) if _can_branch(points) else None  # (B, N, N)
        if matrix is None or not _is_in_range(matrix.amax(dim=(1, 2))).all():
            matrix = squared_distances(_scaled(points)[0])
        self.matrix = matrix

    def assign(self, medoids: Tensor) -> Tensor:
        """Which of the medoids (B, K) is nearest to each point, the lowest in a computed tie: (B, N)."""
        return _take(self.matrix, medoids).min(dim=1).indices

    def costs(self, weights: Tensor, assignment: Tensor, medoids: Tensor) -> Tensor:
        """What each point would cost its cluster as the medoid: (B, N)."""
        if _can_branch(assignment):
            sums = _cluster_sums(self.matrix, weights, assignment, medoids.shape[1])  # (B, K, N)
            return sums.gather(1, assignment[:, None, :]).squeeze(1)
        same = assignment[:, :, None] == assignment[:, None, :]  # (B, N, N): compiled, a single pass over the matrix
        return (self.matrix * weights[:, None, :] * same).sum(dim=2)


class _OthersDistances:
    """The squared distances from the points that are no medoids: (N - K) N E multiply-adds, in each iteration.

    No others are needed: a medoid is nearest to itself, and a cluster is its medoid and some of the other points.
    The paper's schedules take away few tokens at a time, and there it is much less than all distances.
    """

    def __init__(self, points: Tensor) -> None:
        self.points = (points - points.mean(dim=1, keepdim=True)).contiguous()
        self.norm = self.points.square().sum(dim=2)  # (B, N), exact for whole numbers

    def suits(self, medoids: Tensor) -> list[bool]:
        """For each image, whether squares neither over- nor underflow and no two of its medoids (B, K) coincide.

        Of two medoids at the same place one goes to the cluster of the other. Where very many are equally far from the
        mean, some count as coinciding without a look.
        """
        suits = _is_in_range(self.norm.amax(dim=1))  # (B,)
        norm, order = self.norm.gather(1, medoids).sort(dim=1)
        for step in range(1, medoids.shape[1]):  # those equally far are neighbours, then every other one, and so on
            same = norm[:, step:] == norm[:, :-step]
            if not same.any():
                break
            if step > 8:
                suits &= ~same.any(dim=1)
                break
            image, place = same.nonzero(as_tuple=True)
            first, second = (self.points[image, medoids[image, order[image, place + shift]]] for shift in (0, step))
            suits[image[(first == second).all(dim=1)]] = False
        return suits.tolist()

    def assign(self, medoids: Tensor) -> Tensor:
        """Which of the medoids (B, K) is nearest to each point, the lowest in a computed tie: (B, N)."""
        batch, n, width = self.points.shape
        k = medoids.shape[1]
        is_other = torch.ones_like(self.norm, dtype=torch.bool).scatter_(1, medoids, False)
        place = is_other.flatten().nonzero().squeeze(1)  # among the points of all images laid end to end
        others = self.points.view(batch * n, width).index_select(0, place).view(batch, n - k, width)
        norm = self.norm.flatten()[place].view(batch, n - k)
        self.distance = _distances_between(others, norm, self.points, self.norm)  # (B, N - K, N)
        self.others = place.view(batch, n - k) - n * torch.arange(batch, device=place.device)[:, None]
        self.nearest, self.cluster = _columns(self.distance, medoids).min(dim=2)  # (B, N - K)
        assignment = torch.empty_like(self.norm, dtype=torch.int64)
        assignment.scatter_(1, medoids, torch.arange(k, device=medoids.device).expand(batch, k))
        return assignment.scatter_(1, self.others, self.cluster)

    def costs(self, weights: Tensor, assignment: Tensor, medoids: Tensor) -> Tensor:
        """What each point would cost its cluster as the medoid, if assigned by the last call of `assign`: (B, N)."""
        weights = weights.to(self.norm.dtype)
        weight = weights.gather(1, self.others)  # (B, N - K)
        of_medoids = torch.zeros_like(medoids, dtype=weights.dtype)
        of_medoids.scatter_add_(1, self.cluster, weight * self.nearest)
        between = _columns(self.distance, self.others)  # (B, N - K, N - K)
        between = (between + between.mT).div_(2)  # symmetric, as `squared_distances`
        between.mul_(self.cluster[:, :, None] == self.cluster[:, None, :]).diagonal(dim1=1, dim2=2).zero_()
        to_medoid = weights.gather(1, medoids).gather(1, self.cluster) * self.nearest
        of_others = torch.bmm(weight[:, None, :], between).squeeze(1).add_(to_medoid)
        costs = torch.empty_like(weights).scatter_(1, medoids, of_medoids)
        return costs.scatter_(1, self.others, of_others)


@torch.no_grad()
def _first_medoids(points: Tensor, weights: Tensor, k: int) -> Tensor:
    """Indices (B, K) of those of the points (B, N, E) that `dearest_to_merge` finds, for a few images at a time."""
    with torch.autocast(points.device.type, enabled=False):
        at_once = len(points) if is_in_graph() else _images_at_once(points)
        groups = zip(points.split(at_once), weights.split(at_once), strict=True)
        return torch.cat([highest(_merging_costs(_scaled(some)[0], weight), k) for some, weight in groups])


def _merging_costs(points: Tensor, weights: Tensor) -> Tensor:
    """The least that it costs to merge each of the points (B, N, E) into one of higher weight: (B, N).

    Of equal weights the earlier counts as higher; the highest of all gets infinity. Behind one another by weight, each
    point looks at those before it only. Where the distances are more than are held at once, they come some rows at a
    time: half of them are never computed then.
    """
    n = points.shape[1]
    order = highest(weights, n)
    points = _take(points - points.mean(dim=1, keepdim=True), order)
    norm, inverse = points.square().sum(dim=2), _inverse(weights).gather(1, order).to(points)
    step = n if is_in_graph() else min(max(_floats_at_once(points) // n, 1), n)
    barred = torch.ones(step, step, dtype=torch.bool, device=points.device).triu()
    least = []
    for start in (0,) if is_in_graph() else range(0, n, step):
        rows, until = slice(start, start + step), slice(start + step)
        distance = _distances_between(points[:, rows], norm[:, rows], points[:, until], norm[:, until])
        cost = distance / (inverse[:, rows, None] + inverse[:, None, until])
        last = min(step, n - start)
        cost[:, :, start:].masked_fill_(barred[:last, :last], torch.inf)
        least.append(cost.amin(dim=2))
    least = torch.cat(least, dim=1)
    # What rounding makes of the distance between equal points is no cost: of equal points the first are as good.
    least = least.masked_fill(least * inverse < 32 * torch.finfo(norm.dtype).eps * norm, 0)
    return torch.empty_like(least).scatter(1, order, least)


def dearest_to_merge(distance: Tensor, weights: Tensor, k: int) -> Tensor:
    """Indices (B, K) of the tokens that cost most to merge into another of higher weight.

    Merging i and j raises objective (13) by w_i w_j / (w_i + w_j) |i - j|^2 (Ward 1963). Looking at higher weights only
    (of equal ones, at the earlier) keeps one of two close tokens. The initial centres then are weighty and lie apart,
    at one pass over the distance matrix. An extension.

    Args:
        distance: (B, N, N), squared distances.
        weights: (B, N).
        k: how many.
    """
    order = highest(weights, weights.shape[1])
    rank = torch.empty_like(order).scatter(1, order, torch.arange(order.shape[1], device=order.device).expand_as(order))
    inverse = _inverse(weights)
    cost = distance / (inverse[:, :, None] + inverse[:, None, :])
    return highest(cost.masked_fill(rank[:, None, :] >= rank[:, :, None], torch.inf).amin(dim=2), k)


def _inverse(weights: Tensor) -> Tensor:
    """1 / weight; infinite where there is no weight (nor at -0), so that merging costs nothing there."""
    return weights.abs().reciprocal()


def squared_distances(points: Tensor) -> Tensor:
    """Squared Euclidean distances between the points (B, N, D) of each image: (B, N, N).

    Symmetric and zero on the diagonal to the last bit, whatever order a matrix product adds in: in a cluster of two
    both members cost the same, and which becomes the medoid must not be left to rounding.
    """
    points = points - points.mean(dim=1, keepdim=True)  # a common offset would only cost digits
    product = torch.bmm(points, points.mT)  # (B, N, N)
    norm = product.diagonal(dim1=1, dim2=2).contiguous()  # (B, N)
    return (norm[:, :, None] + norm[:, None, :]).sub_(product + product.mT).clamp_(min=0)


def _distances_between(some: Tensor, some_norm: Tensor, others: Tensor, others_norm: Tensor) -> Tensor:
    """Squared distances (B, R, M) of points (B, R, E) to others (B, M, E), given squared lengths (B, R) and (B, M)."""
    distance = torch.baddbmm(others_norm[:, None, :], some, others.mT, alpha=-2)
    return distance.add_(some_norm[:, :, None]).clamp_(min=0)


def highest(weights: Tensor, k: int) -> Tensor:
    """Indices (B, K) of the K highest of the weights (B, N), highest first; the earlier token wins a tie."""
    if torch.compiler.is_exporting():  # ONNX has no name for a stable sort, but its sort is one
        return weights.sort(dim=-1, descending=True).indices[:, :k]
    return weights.argsort(dim=-1, descending=True, stable=True)[:, :k]


def sums(weights: Tensor, assignment: Tensor, k: int) -> Tensor:
    """Sum of the weights (B, N) over each cluster of the assignment (B, N): (B, K)."""
    if weights.is_cuda:
        return _memberships(weights, assignment, k).sum(dim=2)
    return weights.new_zeros(weights.shape[0], k).scatter_add(1, assignment, weights)


def means(tokens: Tensor, weights: Tensor, assignment: Tensor, k: int) -> Tensor:
    """Weighted mean (B, K, D) of the tokens (B, N, D) of each cluster; a cluster without weight becomes zero."""
    return _weighted_means(tokens, weights, assignment, tokens.new_zeros(tokens.shape[0], k, tokens.shape[2]))


def _nearest_center(points: Tensor, centers: Tensor) -> Tensor:
    """Index of the nearest center (B, K, D) for each point (B, N, D), the lowest in a computed tie: (B, N)."""
    offset = points.mean(dim=1, keepdim=True)
    points, centers = points - offset, centers - offset
    # The squared length of the point itself is the same for all centres and left out.
    distance = torch.add(centers.square().sum(-1)[:, :, None], torch.bmm(centers, points.mT), alpha=-2)
    return distance.min(dim=1).indices


def _best_members(cost: Tensor, weights: Tensor, assignment: Tensor, previous: Tensor) -> Tensor:
    """The member of lowest cost (B, N) of each cluster, `previous` (B, K) where a cluster has no weight: (B, K)."""
    batch, n = assignment.shape
    k = previous.shape[1]
    lowest = cost.new_full((batch, k), torch.inf).scatter_reduce(1, assignment, cost, "amin")
    candidate = torch.arange(n, device=cost.device).expand(batch, n)
    candidate = candidate.masked_fill(cost > lowest.gather(1, assignment), n)
    best = assignment.new_full((batch, k), n - 1).scatter_reduce(1, assignment, candidate, "amin")
    return torch.where(sums(weights, assignment, k) > 0, best, previous)


def _weighted_means(
    tokens: Tensor,
    weights: Tensor,
    assignment: Tensor,
    previous: Tensor,
    members: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Weighted mean (B, K, D) of each cluster's tokens.

    A cluster without weight stays at its `previous` centre, a point (B, K, D) or the index (B, K) of a token. Where
    `members` are given, order and start of `kernels.Medoids`, the kernel sums them.
    """
    k = previous.shape[1]
    with torch.autocast(tokens.device.type, enabled=False):
        if members is None:
            total = sums(weights, assignment, k)  # (B, K)
        else:
            total = kernels.means(weights[:, :, None], torch.ones_like(weights), assignment, *members).squeeze(2)
        all_weigh = _can_branch(tokens) and total.numel() > 0 and total.amin().item() > 0
        divisor = total if all_weigh else torch.where(total > 0, total, 1)
        share = weights / divisor.gather(1, assignment)  # (B, N)
        if members is None:
            means = _cluster_sums(_full_precision(tokens), share, assignment, k).to(tokens.dtype)  # (B, K, D)
        else:
            means = kernels.means(tokens, share, assignment, *members)
        if all_weigh:
            return means
        stayed = _take(tokens, previous) if previous.dim() == 2 else previous
        return torch.where(total[:, :, None] > 0, means, stayed.to(tokens.dtype))


def _cluster_sums(values: Tensor, weights: Tensor, assignment: Tensor, k: int) -> Tensor:
    """Weighted sum of the rows of values (B, N, E) over each cluster: (B, K, E)."""
    batch, n, width = values.shape
    if values.is_cuda:
        return torch.bmm(_memberships(weights, assignment, k).to(values.dtype), values)
    target = _flat(assignment, k)
    if values.device.type == "cpu" and _can_branch(values) and not (values.requires_grad and torch.is_grad_enabled()):
        # Several times as fast as index_add: the rows are read where they lie, on all cores.
        target, order = target.sort(stable=True)
        start = torch.searchsorted(target, torch.arange(batch * k, device=target.device))
        share = weights.flatten()[order].to(values.dtype)
        rows = values.reshape(batch * n, width)
        return F.embedding_bag(order, rows, start, mode="sum", per_sample_weights=share).view(batch, k, width)
    rows = (values * weights[:, :, None]).reshape(batch * n, width)
    return rows.new_zeros(batch * k, width).index_add(0, target, rows).view(batch, k, width)


def _memberships(weights: Tensor, assignment: Tensor, k: int) -> Tensor:
    """The weights (B, N) as a matrix (B, K, N), zero but in the row of the token's own cluster.

    On a GPU sums are products with it: the order in which index_add and scatter_add add is left to chance there.
    """
    zeros = weights.new_zeros(weights.shape[0], k, weights.shape[1])
    return zeros.scatter(1, assignment[:, None, :], weights[:, None, :])


def _take(values: Tensor, index: Tensor) -> Tensor:
    """Rows `index` (B, K) of the values (B, N, E) of each image: (B, K, E)."""
    batch, n, width = values.shape
    return values.reshape(batch * n, width).index_select(0, _flat(index, n)).view(batch, index.shape[1], width)


def _columns(values: Tensor, index: Tensor) -> Tensor:
    """Columns `index` (B, K) of the values (B, M, N) of each image: (B, M, K)."""
    return values.gather(2, index[:, None, :].expand(-1, values.shape[1], -1))


def _flat(index: Tensor, size: int) -> Tensor:
    """Indices (B, M) into rows of length `size` as indices (B * M,) into all rows laid end to end."""
    if not is_in_graph() and index.shape[0] == 1:
        return index.flatten()
    return (index + size * torch.arange(index.shape[0], device=index.device)[:, None]).flatten()


def _can_branch(tokens: Tensor) -> bool:
    """Whether the course may depend on values: not in a compiled or traced graph; on a GPU it would stall the queue.

    Where it may not, nothing but time is lost: iterating past a fixed point, for instance, changes nothing.
    """
    return not (is_in_graph() or tokens.is_cuda)


def is_in_graph() -> bool:
    """Whether what runs is being compiled, exported or traced, and must not depend on values or on the batch."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def _scaled(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens (B, N, D) between -2 and 2, and the scale (B, 1, 1) that was taken out, lest squares over- or underflow.

    The scale is a power of two, so that nothing is rounded.
    """
    points = _full_precision(tokens)
    largest = torch.maximum(-points.amin(dim=(1, 2)), points.amax(dim=(1, 2)))  # (B,)
    scale = largest.clamp(min=torch.finfo(points.dtype).tiny).log2().floor().exp2()[:, None, None]
    return points / scale, scale


def _are_few_others(n: int, k: int, iterations: int) -> bool:
    """Whether `_OthersDistances` takes less time than `_AllDistances`: see the log in docs/performance.md.

    Medoids seldom move more often than three times.
    """
    return min(iterations, 4) * (n - k) <= 2 * n


def _images_at_once(points: Tensor, k: int | None = None, iterations: int = 1) -> int:
    """How many images' distances are held at once, of points (B, N, E) of which K are medoids, or of all without k.

    Where few distances are needed, points count too, and four times as much is best: there are fewer operations then.
    """
    _, n, width = points.shape
    if k is not None and points.device.type == "cpu" and _are_few_others(n, k, iterations):
        return max(4 * _floats_at_once(points) // (n * (n - k + width)), 1)
    return max(_floats_at_once(points) // n**2, 1)


def _floats_at_once(points: Tensor) -> int:
    """How many numbers one matrix of distances has at most: a CPU's cache holds 1 MiB or so, a GPU 1 GiB easily."""
    return 2**18 if points.device.type == "cpu" else 2**28


def _is_in_range(largest: Tensor) -> Tensor:
    """Whether squared distances, the largest of each image (B,), neither over- nor underflow, and need no scale."""
    return (largest > 1e-20) & (largest < 1e30)  # not if NaN


def _full_precision(tokens: Tensor) -> Tensor:
    return tokens.float() if tokens.dtype in (torch.float16, torch.bfloat16) else tokens


def _checked(
    tokens: Tensor, k: int, weights: Tensor | None, init: Tensor | None, iterations: int, check_values: bool
) -> tuple[Tensor, Tensor]:
    """Check the arguments of `kmeans` and `kmedoids`; return weights (B, N), at most 1, and initial centres."""
    for name, value in (("tokens", tokens), ("weights", weights), ("init", init)):
        if not isinstance(value, Tensor) and (value is not None or name == "tokens"):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if tokens.dim() != 3 or not tokens.is_floating_point():
        raise ValueError(f"tokens must be floating point of shape (B, N, D), got {tokens.dtype} {tuple(tokens.shape)}")
    batch, n, width = tokens.shape
    if isinstance(k, bool) or not isinstance(k, Integral) or not 1 <= k <= n:
        raise ValueError(f"k = {k!r} must be a whole number in 1..{n}, the number of tokens")
    if not isinstance(iterations, Integral) or iterations < 1:
        raise ValueError(f"iterations = {iterations!r} must be a whole number, at least 1")
    if weights is not None and weights.shape != (batch, n):
        raise ValueError(f"weights must have shape (B, N) = {(batch, n)}, got {tuple(weights.shape)}")
    if init is not None:
        shape = (batch, k, width) if init.is_floating_point() else (batch, k)
        if init.shape != shape:
            raise ValueError(f"init must have shape {shape}, got {tuple(init.shape)}")
    if check_values and not is_in_graph():
        _check_values(tokens, weights, init)

    precision = _full_precision(tokens).dtype
    if weights is None:
        indices = torch.arange(k, device=tokens.device).mul(n).div(k, rounding_mode="floor").expand(batch, k)
        return tokens.new_ones(batch, n, dtype=precision), indices if init is None else init
    weights = weights.detach().to(precision)
    largest = weights.amax(dim=1, keepdim=True).clamp(min=torch.finfo(precision).tiny)
    weights = weights / largest  # no overflow in sums, no underflow in means
    return weights, highest(weights, k) if init is None else init


def _all_finite(values: Tensor) -> bool:
    # Where the sum is finite, all are: one pass in place of several, and the exact look only in need.
    return math.isfinite(values.sum().item()) or bool(values.isfinite().all())


def _usable(weights: Tensor) -> bool:
    largest = weights.amax(dim=1)
    return weights.amin().item() >= 0 and largest.amin().item() > 0 and largest.amax().item() < torch.inf  # not if NaN


def _check_values(tokens: Tensor, weights: Tensor | None, init: Tensor | None) -> None:
    if not _all_finite(tokens):
        image = int((~tokens.isfinite()).flatten(1).any(1).nonzero()[0])
        raise ValueError(f"tokens must be finite, but those of image {image} of the batch hold NaN or infinity")
    if weights is not None and weights.numel() and not _usable(weights):
        good = (weights.isfinite() & (weights >= 0)).all(1) & (weights > 0).any(1)  # (B,)
        image = int((~good).nonzero()[0])
        raise ValueError(
            "weights must be finite, not negative, and not all zero, "
            f"but those of image {image} of the batch lie in {weights[image].min():g}..{weights[image].max():g}"
        )
    if init is not None and not init.is_floating_point():
        if init.numel() and (init.amin().item() < 0 or init.amax().item() >= tokens.shape[1]):
            raise ValueError(f"init must hold token indices in 0..{tokens.shape[1] - 1}")
    elif init is not None and not init.isfinite().all():
        raise ValueError("init must be finite")
