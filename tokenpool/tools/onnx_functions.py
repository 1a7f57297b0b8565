"""K-Medoids as functions of ONNX, in onnxscript: the mathematics of `tokenpool.clustering.swaps`, explained there.

onnxscript compiles the source code of these functions. Its own `for` mixes up the variables of a loop. So the loop is
written as an operator, `Loop` of ONNX, which ends when no medoid moves in any image. Letters in comments are sizes:
B images, N tokens, K clusters, M = N - K tokens that are not medoids.
"""

import torch
from onnx import TensorProto
from onnxscript import BOOL, FLOAT, INT64, graph, script
from onnxscript import opset18 as op
from onnxscript.values import Opset

DOMAIN = Opset("tokenpool", 1)
_FLOAT = int(TensorProto.FLOAT)
_INT64 = int(TensorProto.INT64)
_TINY = float(torch.finfo(torch.float32).tiny)


@script(DOMAIN)
def first_rows(values: FLOAT[...], n: int) -> INT64[...]:
    """Return the index (B, 1) of the first row of each image among the rows of values (B, N, E) of all images."""
    batch = op.Squeeze(op.Shape(values, start=0, end=1))
    images = op.Range(op.Constant(value_int=0), batch, op.Constant(value_int=1))
    return op.Unsqueeze(images * op.Constant(value_int=n), op.Constant(value_ints=[1]))


@script(DOMAIN)
def rows(values: FLOAT[...]) -> FLOAT[...]:
    """Return the rows (B N, E) of values (B, N, E)."""
    return op.Reshape(values, op.Concat(op.Constant(value_ints=[-1]), op.Shape(values, start=2), axis=0))


@script(DOMAIN)
def indices(size: int) -> INT64[...]:
    """Return 0, 1, ..., size - 1."""
    return op.Range(op.Constant(value_int=0), op.Constant(value_int=size), op.Constant(value_int=1))


@script(DOMAIN)
def squared_distances(by: FLOAT[...], n: int) -> FLOAT[...]:
    """Return the squared distances (B, N, N) between points (B, N, E), exactly zero on the diagonal."""
    one = op.Constant(value_ints=[1])
    points = op.Cast(by, to=_FLOAT)
    points = points - op.ReduceMean(points, one)
    product = op.MatMul(points * op.Constant(value_float=-2.0), op.Transpose(points, perm=[0, 2, 1]))
    places = op.Unsqueeze(indices(size=n), one)  # (N, 1)
    index = op.Expand(places, op.Concat(op.Shape(points, start=0, end=2), one, axis=0))
    norm = op.GatherElements(product, index, axis=2) * op.Constant(value_float=-0.5)
    return product + (norm + op.Transpose(norm, perm=[0, 2, 1]))


@script(DOMAIN)
def ward_init(distance: FLOAT[...], weights: FLOAT[...], n: int, k: int) -> INT64[...]:
    """Return the indices (B, K) of the points with the highest cost of merging: `clustering.ward_init`."""
    one, two = op.Constant(value_ints=[1]), op.Constant(value_ints=[2])
    _, order = op.TopK(weights, op.Reshape(op.Constant(value_int=n), one))  # of equal weights, the first comes first
    rank = op.ScatterElements(order, order, op.Expand(indices(size=n), op.Shape(order)), axis=1)
    inverse = op.Reciprocal(op.Abs(weights))
    cost = distance / (op.Unsqueeze(inverse, two) + op.Unsqueeze(inverse, one))
    earlier = op.Less(op.Unsqueeze(rank, one), op.Unsqueeze(rank, two))
    infinite = op.Constant(value_float=float("inf"))
    lowest = op.ReduceMin(op.Where(earlier, cost, infinite), two, keepdims=0)
    _, best = op.TopK(lowest, op.Reshape(op.Constant(value_int=k), one))
    return best


@script(DOMAIN)
def alternate(
    distance: FLOAT[...], weights: FLOAT[...], medoids: INT64[...], first: INT64[...], n: int, k: int, iterations: int
) -> tuple[INT64[...], INT64[...], FLOAT[...]]:
    """Run the loop of Algorithm 1, lines 3-5: `swaps.alternate_by_swaps`.

    Returns the tokens that are not medoids (B, M), the medoid of each (B, M), and the cluster of each token (B, N), as
    floats.
    """
    one, two = op.Constant(value_ints=[1]), op.Constant(value_ints=[2])
    zeros = op.Sub(weights, weights)  # (B, N)
    clusters = op.Expand(op.Cast(indices(size=k), to=_FLOAT), op.Shape(medoids))
    descending = zeros + op.Cast(op.Constant(value_int=n) - indices(size=n), to=_FLOAT)
    open_places = op.ScatterElements(descending, medoids, op.Sub(clusters, clusters), axis=1)
    others_count = op.Reshape(op.Constant(value_int=n) - op.Constant(value_int=k), one)
    _, others = op.TopK(open_places, others_count)  # (B, M), ascending
    infinite = op.Expand(op.Constant(value_float=float("inf")), op.Shape(others))
    distances = rows(distance)  # (B N, N)
    row_weights = op.Unsqueeze(weights, one)  # (B, 1, N)
    labels = op.ScatterElements(zeros, medoids, clusters, axis=1)

    @graph()
    def body(  # noqa: ANN202
        iteration: INT64,
        runs: BOOL,
        candidates: INT64[None, None],
        others: INT64[None, None],
        nearest: INT64[None, None],
        labels: FLOAT[None, None],
    ):  # onnxscript would take annotated results for those of `alternate`
        own = op.Gather(distances, candidates + first)  # (B, M, N)
        empty = op.Sub(labels, labels)  # OpenVINO scatters into `zeros` itself, and the next iteration would read it
        closed = op.Unsqueeze(op.ScatterElements(empty, candidates, infinite, axis=1), one)
        medoid = op.ArgMin(own + closed, axis=2, keepdims=0)  # (16)
        label = op.GatherElements(labels, medoid, axis=1)
        assigned = op.ScatterElements(labels, candidates, label, axis=1)
        same = op.Equal(op.Unsqueeze(label, two), op.Unsqueeze(assigned, one))  # (B, M, N)
        terms = (own - op.Gather(distances, medoid + first)) * row_weights  # (17)
        difference = op.ReduceSum(op.Where(same, terms, op.Constant(value_float=0.0)), two, keepdims=0)
        weight = op.ReduceSum(op.Where(same, row_weights, op.Constant(value_float=0.0)), two, keepdims=0)
        weighs = op.Greater(weight, op.Constant(value_float=0.0))  # a cluster of weight zero keeps its medoid
        difference = op.Where(weighs, difference, op.Constant(value_float=float("inf")))
        differences = op.Unsqueeze(op.ScatterElements(empty, candidates, difference, axis=1), one)
        best = op.ArgMin(op.Where(same, differences, op.Constant(value_float=float("inf"))), axis=2, keepdims=0)
        swaps = op.Equal(best, candidates)
        moves = op.Greater(op.ReduceSum(op.CastLike(swaps, candidates), keepdims=0), op.Constant(value_int=0))
        return moves, op.Where(swaps, medoid, candidates), op.Identity(candidates), medoid, assigned

    # Results of the last assignment.
    _, assigned_others, nearest, assigned = op.Loop(
        op.Constant(value_int=iterations), None, others, others, others, labels, body=body
    )
    return assigned_others, nearest, assigned


@script(DOMAIN)
def means(
    tokens: FLOAT[...],
    weights: FLOAT[...],
    others: INT64[...],
    nearest: INT64[...],
    labels: FLOAT[...],
    first: INT64[...],
    k: int,
) -> FLOAT[...]:
    """Return the weighted mean (B, K, D) of each cluster, equation (15): `swaps.means_by_swaps`."""
    one, two = op.Constant(value_ints=[1]), op.Constant(value_ints=[2])
    label = op.GatherElements(labels, others, axis=1)  # (B, M)
    same = op.Equal(op.Unsqueeze(label, two), op.Unsqueeze(labels, one))  # (B, M, N)
    total = op.ReduceSum(op.Where(same, op.Unsqueeze(weights, one), op.Constant(value_float=0.0)), two, keepdims=0)
    share = op.GatherElements(weights, others, axis=1) / op.Max(total, op.Constant(value_float=_TINY))
    points = rows(op.Cast(tokens, to=_FLOAT))  # (B N, D)
    moved = op.Gather(points, others + first) - op.Gather(points, nearest + first)  # (B, M, D)
    clusters = op.Unsqueeze(op.Cast(indices(size=k), to=_FLOAT), one)  # (K, 1)
    cluster = op.Equal(clusters, op.Unsqueeze(label, one))  # (B, K, M)
    shares = op.Where(cluster, op.Unsqueeze(share, one), op.Constant(value_float=0.0))
    after = op.Expand(op.Cast(op.Constant(value_int=k), to=_FLOAT), op.Shape(label))
    places = op.ScatterElements(labels, others, after, axis=1)
    _, medoids = op.TopK(places, op.Reshape(op.Constant(value_int=k), one), largest=0)
    return op.CastLike(op.Gather(points, medoids + first) + op.MatMul(shares, moved), tokens)


@script(DOMAIN)
def as_indices(labels: FLOAT[...]) -> INT64[...]:
    """Return clusters as int64."""
    return op.Cast(labels, to=_INT64)


CALLED = (rows, indices)  # by the other functions
