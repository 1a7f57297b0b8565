"""Triton kernels for a GPU: weighted K-Medoids, the means of its clusters, and attention that also yields scores.

Each does in one launch, and out of the cache of one processor of the GPU, what `clustering` and `attention` do in many
passes over (B, N, N) matrices. The results are the same up to rounding. Every function here has a plain counterpart,
and whether the kernel may take its place is asked first: `kmedoids_fits`, `means_fits`, `attention_fits`.

They are used on Nvidia GPUs of compute capability 8.0 and later where Triton is installed. The environment variable
TOKENPOOL_KERNELS, or `using`, overrides this: "plain" never uses them; "triton" also uses them for tensors on the CPU,
through Triton's slow interpreter, if TRITON_INTERPRET=1 is set before `tokenpool` is imported.
"""

# ruff: noqa: ANN001, ANN202 (what a kernel takes are pointers and numbers, as the launches show)

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # not on every system
    triton = None
    tl = SimpleNamespace(constexpr=bool)  # what is mentioned outside of the kernels

available = triton is not None
CHOICES = ("auto", "triton", "plain")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MOST_POINTS = 1024  # of an image, for K-Medoids: its tiles hold a whole row of the distance matrix
MOST_KEYS = 512  # for attention: its tiles hold a whole row of logits
MOST_WIDTH = 128  # of a head


class Medoids(NamedTuple):
    """What `kmedoids` finds.

    Attributes:
        assignment: (B, N) int64, the cluster in 0..K-1 of each point.
        previous: (B, K) int64, the medoids that the assignment was made from.
        order: (B, N) int32, the points sorted by cluster, and by index within a cluster.
        start: (B, K + 1) int32; the points of cluster j are order[start[j]:start[j + 1]].
    """

    assignment: Tensor
    previous: Tensor
    order: Tensor
    start: Tensor


# ---------------------------------------------------------------------------------------------------------------------
# Whether to use them
# ---------------------------------------------------------------------------------------------------------------------


def _checked(choice: str, name: str) -> str:
    if choice not in CHOICES:
        raise ValueError(f"{name} = {choice!r} must be one of {', '.join(CHOICES)}")
    return choice


# A plain global, and no context variable: torch.compile sees that it changes, and compiles anew.
_choice = _checked(os.environ.get("TOKENPOOL_KERNELS", "auto"), "TOKENPOOL_KERNELS")


@contextmanager
def using(choice: str) -> Iterator[None]:
    """Within this context use the kernels "auto"(matically), "triton" wherever they run at all, or "plain" never.

    It holds for all threads.
    """
    global _choice
    before, _choice = _choice, _checked(choice, "choice")
    try:
        yield
    finally:
        _choice = before


def kmedoids_fits(points: Tensor) -> bool:
    """Whether `kmedoids` is to be used for these points (B, N, E)."""
    return points.shape[1] <= MOST_POINTS and _fits(points)


def means_fits(tokens: Tensor) -> bool:
    """Whether `means` is to be used for these tokens (B, N, D)."""
    return _fits(tokens)


def attention_fits(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `attention` and `received` are to be used for these queries, keys and values (B, H, N, d)."""
    if not (q.dtype == k.dtype == v.dtype and q.shape == k.shape == v.shape):
        return False
    n, width = q.shape[2:]
    if not (1 <= n <= MOST_KEYS and 1 <= width <= MOST_WIDTH and _fits(q)):
        return False
    return _attention_memory(n, width, q.element_size()) <= _shared_memory(q.device.type, q.device.index)


def _fits(values: Tensor) -> bool:
    if _choice == "plain" or torch.compiler.is_exporting() or torch.jit.is_tracing():
        return False
    return values.dtype in DTYPES and _runs_on(values.device.type, values.device.index, _choice)


@torch.compiler.assume_constant_result
def _runs_on(kind: str, index: int | None, choice: str) -> bool:
    """Whether the kernels run on a device: on a suitable GPU, or, if demanded, where Triton interprets them."""
    if not available:
        return False
    if INTERPRETED.value:
        return choice == "triton" and kind in ("cpu", "cuda")
    return kind == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(index) >= (8, 0)


@torch.compiler.assume_constant_result
def _shared_memory(kind: str, index: int | None) -> int:
    """Bytes of shared memory that a program may have."""
    return torch.cuda.get_device_properties(index).shared_memory_per_block_optin if kind == "cuda" else 232448


# ---------------------------------------------------------------------------------------------------------------------
# K-Medoids
# ---------------------------------------------------------------------------------------------------------------------


def kmedoids(points: Tensor, weights: Tensor, medoids: Tensor, iterations: int) -> Medoids:
    """Weighted K-Medoids: see `tokenpool.clustering.kmedoids`.

    Distances and costs are computed in float32. Without gradient.

    Args:
        points: (B, N, E), float16, bfloat16 or float32; N is at most `MOST_POINTS`.
        weights: (B, N) float32, at most 1, not negative.
        medoids: (B, K) integers in 0..N-1, the indices of the first medoids.
        iterations: how many assignments are made, at least 1.
    """
    return Medoids(*_kmedoids(points.detach(), weights.detach(), medoids, iterations))


def means(tokens: Tensor, share: Tensor, assignment: Tensor, order: Tensor, start: Tensor) -> Tensor:
    """Sum (B, K, D) over the members of each cluster of the tokens (B, N, D) times their share (B, N) float32.

    Summed in float32, returned in the tokens' dtype; a cluster without members becomes zero. It carries the gradient to
    the tokens, but not to the share. The other arguments are those of `Medoids`.
    """
    return _means(tokens, share, assignment, order, start)


@torch.library.custom_op("tokenpool::kmedoids", mutates_args=())
def _kmedoids(
    points: Tensor, weights: Tensor, medoids: Tensor, iterations: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, n, width = points.shape
    k = medoids.shape[1]
    points = points if points.stride(2) == 1 else points.contiguous()
    found = _no_medoids(points, weights, medoids, iterations)
    found[1].copy_(medoids)
    row_length = triton.cdiv(n, 16) * 16  # whole rows can then be read in pieces of 16 bytes
    scratch = points.new_empty(batch, n + 2, row_length, dtype=torch.float32)  # distances, costs, lengths
    offset = points.new_empty(batch, width, dtype=torch.float32)
    if batch:
        with _device(points):
            _kmedoids_kernel[(batch,)](
                *(points, weights.float().contiguous(), *found, scratch, offset),
                *(n, k, width, iterations, points.stride(0), points.stride(1), row_length),
                **_medoid_shape(n, points.element_size()),
            )
    return found


def _medoid_shape(n: int, item: int) -> dict[str, int | bool | None]:
    """Sizes of the blocks of the K-Medoids kernel, for numbers of `item` bytes, and how it is compiled."""
    tokens = max(1 << (n - 1).bit_length(), 16)
    return {
        "TOKENS": tokens,
        "ROWS": 4096 // tokens,
        "TILE": min(tokens, 64),
        "WIDTH": 128 // item,
        "num_warps": 8,
        "maxnreg": 128 if item == 2 else None,  # two programs then fit into a processor's registers
        "enable_fp_fusion": True,  # Triton 3.9 warns where it is not said
    }


@_kmedoids.register_fake
def _no_medoids(
    points: Tensor, weights: Tensor, medoids: Tensor, iterations: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, n, _ = points.shape
    k = medoids.shape[1]
    assignment, previous = (points.new_empty(batch, size, dtype=torch.int64) for size in (n, k))
    order, start = (points.new_empty(batch, size, dtype=torch.int32) for size in (n, k + 1))
    return assignment, previous, order, start


@torch.library.custom_op("tokenpool::means", mutates_args=())
def _means(tokens: Tensor, share: Tensor, assignment: Tensor, order: Tensor, start: Tensor) -> Tensor:
    batch, n, width = tokens.shape
    k = start.shape[1] - 1
    tokens = tokens if tokens.stride(2) == 1 else tokens.contiguous()
    out = tokens.new_empty(batch, k, width)
    if out.numel():
        shape = _mean_shape(width)
        with _device(tokens):
            _means_kernel[(batch * k, triton.cdiv(width, shape["WIDTH"]))](
                *(tokens, share.float().contiguous(), order.contiguous(), start.contiguous(), out),
                *(n, k, width, tokens.stride(0), tokens.stride(1)),
                **shape,
            )
    return out


def _mean_shape(width: int) -> dict[str, int | bool]:
    """Sizes of the blocks of the kernel of the means, and how it is compiled."""
    columns = min(max(1 << (width - 1).bit_length(), 32), 512)
    return {"ROWS": 4, "WIDTH": columns, "num_warps": 4, "enable_fp_fusion": True}


@_means.register_fake
def _no_means(tokens: Tensor, share: Tensor, assignment: Tensor, order: Tensor, start: Tensor) -> Tensor:
    return tokens.new_empty(tokens.shape[0], start.shape[1] - 1, tokens.shape[2])


def _keep_for_gradient(ctx, inputs: tuple, output: Tensor) -> None:
    tokens, share, assignment, _, _ = inputs
    ctx.dtype = tokens.dtype
    ctx.save_for_backward(share, assignment)


def _gradient(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
    share, assignment = ctx.saved_tensors
    rows = gradient.gather(1, assignment[:, :, None].expand(-1, -1, gradient.shape[2]))  # (B, N, D)
    return (rows * share[:, :, None]).to(ctx.dtype), None, None, None, None


_means.register_autograd(_gradient, setup_context=_keep_for_gradient)


# ---------------------------------------------------------------------------------------------------------------------
# Attention
# ---------------------------------------------------------------------------------------------------------------------


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Output of softmax attention, and the attention that each key receives.

    Exact softmax in float32; the matrix of the attention is never written. Without gradient.

    Args:
        q, k, v: (B, H, N, d), of one dtype: float16, bfloat16 or float32. Any strides.
        bias: (B, N), what is added to the logits of each key; may be -inf, but not for all keys of an image.
        scale: what the logits are multiplied by before that.

    Returns:
        The output (B, H, N, d), which lies in memory as (B, N, H, d) unless it is float32; and the attention (B, N)
        float32 that each key receives, summed over queries and heads.
    """
    if q.dtype == torch.float32:  # keys and values, each in a high and a low part, exceed the shared memory
        mask = None if bias is None else bias[:, None, None, :]
        out = F.scaled_dot_product_attention(q.detach(), k.detach(), v.detach(), attn_mask=mask, scale=scale)
        return out, received(q, k, bias, scale)
    out, scores = _attention(q.detach(), k.detach(), v.detach(), bias, scale)
    return out.transpose(1, 2), scores


def received(q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """The attention (B, N) float32 that each key receives: the second result of `attention`, by itself."""
    return _received(q.detach(), k.detach(), bias, scale)


@torch.library.custom_op("tokenpool::attention", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    out, _ = _no_attention(q, k, v, bias, scale)
    return out, _launch_attention(q, k, v, bias, scale, out)


@_attention.register_fake
def _no_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    batch, heads, n, width = q.shape
    return v.new_empty(batch, n, heads, width), q.new_empty(batch, n, dtype=torch.float32)


@torch.library.custom_op("tokenpool::received", mutates_args=())
def _received(q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    return _launch_attention(q, k, None, bias, scale, None)


@_received.register_fake
def _no_received(q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], dtype=torch.float32)


def _launch_attention(
    q: Tensor, k: Tensor, v: Tensor | None, bias: Tensor | None, scale: float, out: Tensor | None
) -> Tensor:
    """Write the output to `out` (B, N, H, d), unless v is None; return the attention received (B, N)."""
    batch, heads, n, width = q.shape
    q, k, v = (x if x is None or x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    bias = None if bias is None else bias.float().contiguous()
    by_head = q.new_empty(batch, heads, n, dtype=torch.float32)
    if by_head.numel():
        with _device(q):
            _attention_kernel[(batch * heads,)](
                *(q, k, q if v is None else v, q if bias is None else bias, q if out is None else out, by_head),
                *(scale, heads, n, width, *q.stride()[:3], *k.stride()[:3], *(q if v is None else v).stride()[:3]),
                WITH_BIAS=bias is not None,
                WITH_OUTPUT=v is not None,
                **_attention_shape(n, width, q.element_size()),
            )
    return by_head.sum(1)


def _attention_shape(n: int, width: int, item: int) -> dict[str, int | bool | None]:
    """Sizes of the blocks of the attention kernel, for numbers of `item` bytes, and how it is compiled.

    A row of logits and the sums over rows stay in registers: 32 numbers of each in a thread. So two or more programs
    share a processor of the GPU, and one computes while another waits.
    """
    keys = max(1 << (n - 1).bit_length(), 16)
    columns = max(1 << (width - 1).bit_length(), 32)
    return {
        # Of fewer rows than columns, or Triton gives each warp its own rows, of which there are too few.
        "ROWS": 32 if item == 2 and min(keys, columns) > 32 else 16,
        "KEYS": keys,
        "WIDTH": columns,
        "num_warps": min(max(keys // 32, 4), 16),
        "num_stages": 2,
        "maxnreg": 128 if item == 2 else None,
        "enable_fp_fusion": True,
    }


def _attention_memory(n: int, width: int, item: int) -> int:
    """Bytes of shared memory that the attention kernel takes, at most.

    They hold all keys and values, or the high and low parts of the keys; two blocks of queries; and a block of weights.
    """
    shape = _attention_shape(n, width, item)
    rows, keys, columns = shape["ROWS"], shape["KEYS"], shape["WIDTH"]
    return item * (2 * keys * columns + 2 * rows * columns + rows * keys) + 4096


def _device(values: Tensor) -> AbstractContextManager:
    """Triton launches on the current GPU, which need not be the tensors' own."""
    return torch.cuda.device(values.device) if values.is_cuda else nullcontext()


# ---------------------------------------------------------------------------------------------------------------------
# The kernels
# ---------------------------------------------------------------------------------------------------------------------


def _jit(*sizes: str) -> Callable:
    """`triton.jit`; not compiled anew for special values of these sizes, which differ from layer to layer."""
    return triton.jit(do_not_specialize=sizes) if available else lambda function: function


@_jit()
def _rounded_to_tf32(value):
    return ((value.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


INTERPRETED = tl.constexpr(available and not isinstance(_rounded_to_tf32, triton.JITFunction))


@_jit()
def _operand(value):
    """Triton's interpreter cannot multiply matrices of bfloat16. In float32 the products are the same."""
    if INTERPRETED:
        value = value.to(tl.float32)
    return value


@_jit("n", "k", "iterations")
def _kmedoids_kernel(
    points, weights, assignment, medoids, order, start, scratch, offset,
    n, k, width, iterations, image_stride, row_stride, row_length,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One image a program. What its threads tell each other goes through memory, with a barrier between."""
    image = tl.program_id(0).to(tl.int64)
    points += image * image_stride
    weights += image * n
    assignment += image * n
    medoids += image * k
    order += image * n
    start += image * (k + 1)
    offset += image * width
    distance = scratch + image * (n + 2) * row_length
    cost = distance + n * row_length
    length = cost + row_length

    _distances(points, distance, length, offset, n, width, row_stride, row_length, TILE, WIDTH)
    tl.debug_barrier()
    _assign(distance, medoids, assignment, n, k, row_length, TOKENS, ROWS)
    tl.debug_barrier()
    moved = 1
    for _ in range(1, iterations):
        if moved > 0:  # else nothing would change any more
            _costs(distance, weights, assignment, cost, n, row_length, TOKENS, ROWS)
            tl.debug_barrier()
            moved = _update(weights, assignment, cost, medoids, n, k, TOKENS, ROWS)
            tl.debug_barrier()
            _assign(distance, medoids, assignment, n, k, row_length, TOKENS, ROWS)
            tl.debug_barrier()
    _sort(assignment, order, start, n, k, TOKENS, ROWS)


@_jit()
def _distances(
    points, distance, length, offset, n, width, row_stride, row_length, TILE: tl.constexpr, WIDTH: tl.constexpr
):
    """Squared distances (n, n), as rows of `row_length`: symmetric and zero on the diagonal to the last bit.

    Each product of two points is computed once, and in the same order of additions wherever it stands, so that two
    equal points are at no distance and equally far from any other.
    """
    inverse = _inverse_scale_and_offset(points, offset, n, width, row_stride, TILE, WIDTH)
    tl.debug_barrier()
    lane = tl.arange(0, TILE)
    blocks = tl.cdiv(n, TILE)
    for step in range(blocks):
        first = blocks - 1 - step  # from the end, so that the squared lengths of later points are known
        row = first * TILE + lane
        product = _products(points, offset, inverse, row, row, n, width, row_stride, TILE, WIDTH)
        row_square = tl.sum(tl.where(lane[:, None] == lane[None, :], product, 0.0), 1)
        tl.store(length + row, row_square, mask=row < n)
        tl.debug_barrier()
        for second in range(first, blocks):
            column = second * TILE + lane
            if second > first:
                product = _products(points, offset, inverse, row, column, n, width, row_stride, TILE, WIDTH)
            column_square = tl.load(length + column, mask=column < n, other=0.0)
            squared = tl.maximum(row_square[:, None] + column_square[None, :] - 2 * product, 0.0)
            upper = (row[:, None] <= column[None, :]) & (column[None, :] < n)
            tl.store(distance + row[:, None] * row_length + column[None, :], squared, mask=upper)
            tl.store(distance + column[None, :] * row_length + row[:, None], squared, mask=upper)


@_jit()
def _inverse_scale_and_offset(points, offset, n, width, row_stride, TILE: tl.constexpr, WIDTH: tl.constexpr):
    """Inverse of the power of two that brings the largest value below 2; the mean point goes to `offset`.

    Squares of float16 fit into float32 anyway: no scale. Products of 16-bit numbers are exact in float32: taking out
    the mean would gain no more digits than rounding to 16 bits has lost. So only float32 needs it.
    """
    inverse = 1.0
    if points.dtype.element_ty != tl.float16:
        largest = tl.zeros((WIDTH,), tl.float32)
        for first in range(0, width, WIDTH):
            column = first + tl.arange(0, WIDTH)
            total = tl.zeros((WIDTH,), tl.float32)
            for top in range(0, n, TILE):
                row = top + tl.arange(0, TILE)
                inside = (row[:, None] < n) & (column[None, :] < width)
                value = tl.load(points + row[:, None] * row_stride + column[None, :], mask=inside, other=0.0)
                value = value.to(tl.float32)
                largest = tl.maximum(largest, tl.max(tl.abs(value), 0))
                total += tl.sum(value / 1024, 0)  # cannot overflow
            tl.store(offset + column, total * (1024 / n), mask=column < width)
        exponent = tl.max(largest, 0).to(tl.int32, bitcast=True) >> 23
        exponent = tl.minimum(tl.maximum(exponent, 1), 253)
        inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    return inverse


@_jit()
def _products(points, offset, inverse, row, column, n, width, row_stride, TILE: tl.constexpr, WIDTH: tl.constexpr):
    """Products (TILE, TILE) of the points `row` with the points `column`.

    Tensor cores multiply float32 as TF32, of eleven binary digits. A number is the sum of two of these; of the four
    products the one of the two remainders is dropped (CUTLASS's 3xTF32). Each has a sum of its own, so that swapping
    the two points gives the same to the last bit, which `input_precision="tf32x3"` does not.
    """
    product = tl.zeros((TILE, TILE), tl.float32)
    if points.dtype.element_ty == tl.float32:
        left_rest = tl.zeros((TILE, TILE), tl.float32)
        right_rest = tl.zeros((TILE, TILE), tl.float32)
        for first in range(0, width, WIDTH):
            left = _some_points(points, offset, inverse, row, first, n, width, row_stride, WIDTH)
            right = _some_points(points, offset, inverse, column, first, n, width, row_stride, WIDTH)
            left_high, right_high = _rounded_to_tf32(left), _rounded_to_tf32(right)
            product = tl.dot(left_high, tl.trans(right_high), product, input_precision="tf32")
            left_rest = tl.dot(left - left_high, tl.trans(right_high), left_rest, input_precision="tf32")
            right_rest = tl.dot(left_high, tl.trans(right - right_high), right_rest, input_precision="tf32")
        product += left_rest + right_rest
    else:
        for first in range(0, width, WIDTH):
            left = _some_points(points, offset, inverse, row, first, n, width, row_stride, WIDTH)
            right = _some_points(points, offset, inverse, column, first, n, width, row_stride, WIDTH)
            product = tl.dot(_operand(left), tl.trans(_operand(right)), product)
    return product


@_jit()
def _some_points(points, offset, inverse, row, first, n, width, row_stride, WIDTH: tl.constexpr):
    """Columns from `first` on of the points `row`, scaled and centred."""
    column = first + tl.arange(0, WIDTH)
    inside = (row[:, None] < n) & (column[None, :] < width)
    value = tl.load(points + row[:, None] * row_stride + column[None, :], mask=inside, other=0.0)
    if points.dtype.element_ty == tl.float32:
        value = value * inverse - (tl.load(offset + column, mask=column < width, other=0.0) * inverse)[None, :]
    elif points.dtype.element_ty == tl.bfloat16:
        value = (value.to(tl.float32) * inverse).to(tl.bfloat16)  # a power of two: nothing is rounded
    return value


@_jit()
def _assign(distance, medoids, assignment, n, k, row_length, TOKENS: tl.constexpr, ROWS: tl.constexpr):
    """Each token to the nearest medoid, in a tie to the first."""
    token = tl.arange(0, TOKENS)
    nearest = tl.full((ROWS, TOKENS), float("inf"), tl.float32)
    index = tl.zeros((ROWS, TOKENS), tl.int32)
    for first in range(0, k, ROWS):
        cluster = first + tl.arange(0, ROWS)
        medoid = tl.load(medoids + cluster, mask=cluster < k, other=0).to(tl.int32)
        inside = (cluster[:, None] < k) & (token[None, :] < n)
        away = tl.load(distance + medoid[:, None] * row_length + token[None, :], mask=inside, other=float("inf"))
        closer = away < nearest
        nearest = tl.where(closer, away, nearest)
        index = tl.where(closer, cluster[:, None], index)
    candidate = tl.where(nearest == tl.min(nearest, 0)[None, :], index, k)
    tl.store(assignment + token, tl.min(candidate, 0).to(tl.int64), mask=token < n)


@_jit()
def _costs(distance, weights, assignment, cost, n, row_length, TOKENS: tl.constexpr, ROWS: tl.constexpr):
    """What each token would cost as the medoid of its cluster."""
    token = tl.arange(0, TOKENS)
    own = tl.load(assignment + token, mask=token < n, other=-1).to(tl.int32)
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    for first in range(0, n, ROWS):
        row = first + tl.arange(0, ROWS)
        cluster = tl.load(assignment + row, mask=row < n, other=-2).to(tl.int32)
        weight = tl.load(weights + row, mask=row < n, other=0.0)
        inside = (row[:, None] < n) & (token[None, :] < n)
        away = tl.load(distance + row[:, None] * row_length + token[None, :], mask=inside, other=0.0)
        total += tl.where(cluster[:, None] == own[None, :], weight[:, None] * away, 0.0)
    tl.store(cost + token, tl.sum(total, 0), mask=token < n)


@_jit()
def _update(weights, assignment, cost, medoids, n, k, TOKENS: tl.constexpr, ROWS: tl.constexpr):
    """Each cluster's medoid to its cheapest member, in a tie to the first; how many medoids moved."""
    token = tl.arange(0, TOKENS)
    own = tl.load(assignment + token, mask=token < n, other=-1).to(tl.int32)
    weight = tl.load(weights + token, mask=token < n, other=0.0)
    price = tl.load(cost + token, mask=token < n, other=0.0)
    moved = 0
    for first in range(0, k, ROWS):
        cluster = first + tl.arange(0, ROWS)
        member = cluster[:, None] == own[None, :]
        lowest = tl.min(tl.where(member, price[None, :], float("inf")), 1)
        candidate = tl.where(member & (price[None, :] == lowest[:, None]), token[None, :], n - 1)
        weighs = tl.max(tl.where(member, weight[None, :], 0.0), 1) > 0
        old = tl.load(medoids + cluster, mask=cluster < k, other=0).to(tl.int32)
        new = tl.where(weighs, tl.min(candidate, 1), old)
        moved += tl.sum((new != old).to(tl.int32), 0)
        tl.debug_barrier()  # several threads may hold the same medoid: all must have read the old one
        tl.store(medoids + cluster, new.to(tl.int64), mask=cluster < k)
    return moved


@_jit()
def _sort(assignment, order, start, n, k, TOKENS: tl.constexpr, ROWS: tl.constexpr):
    """Tokens sorted by cluster: a token's place is the number of tokens that come before it."""
    token = tl.arange(0, TOKENS)
    own = tl.load(assignment + token, mask=token < n, other=k).to(tl.int32)
    rank = own * TOKENS + token
    before = tl.zeros((ROWS, TOKENS), tl.int32)
    for first in range(0, n, ROWS):
        row = first + tl.arange(0, ROWS)
        other = tl.load(assignment + row, mask=row < n, other=k).to(tl.int32) * TOKENS + row
        before += (other[:, None] < rank[None, :]).to(tl.int32)
    tl.store(order + tl.sum(before, 0), token, mask=token < n)
    for first in range(0, k + 1, ROWS):
        cluster = first + tl.arange(0, ROWS)
        tl.store(start + cluster, tl.sum((own[None, :] < cluster[:, None]).to(tl.int32), 1), mask=cluster <= k)


@_jit("n", "k")
def _means_kernel(
    tokens, share, order, start, out, n, k, width, image_stride, row_stride, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    """One cluster of one image a program, and WIDTH of its columns."""
    program = tl.program_id(0).to(tl.int64)
    image, cluster = program // k, program % k
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    first = tl.load(start + image * (k + 1) + cluster)
    end = tl.load(start + image * (k + 1) + cluster + 1)
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    for place in range(first, end, ROWS):
        member = place + tl.arange(0, ROWS)
        token = tl.load(order + image * n + member, mask=member < end, other=0)
        part = tl.load(share + image * n + token, mask=member < end, other=0.0)
        inside = (member[:, None] < end) & (column[None, :] < width)
        address = tokens + image * image_stride + token[:, None] * row_stride + column[None, :]
        total += part[:, None] * tl.load(address, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + program * width + column, tl.sum(total, 0).to(out.dtype.element_ty), mask=column < width)


@_jit("n", "heads")
def _attention_kernel(
    q, k, v, bias, out, received, scale, heads, n, width,
    q_image, q_head, q_row, k_image, k_head, k_row, v_image, v_head, v_row,
    ROWS: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr, WITH_BIAS: tl.constexpr, WITH_OUTPUT: tl.constexpr,
):  # fmt: skip
    """One head of one image a program: blocks of queries, one after the other, against all keys at once."""
    program = tl.program_id(0).to(tl.int64)
    image, head = program // heads, program % heads
    key, column = tl.arange(0, KEYS), tl.arange(0, WIDTH)
    real = (key[:, None] < n) & (column[None, :] < width)
    address = k + image * k_image + head * k_head + key[:, None] * k_row + column[None, :]
    keys = _operand(tl.load(address, mask=real, other=0.0))
    if WITH_OUTPUT:
        address = v + image * v_image + head * v_head + key[:, None] * v_row + column[None, :]
        values = _operand(tl.load(address, mask=real, other=0.0))
    log2_e: tl.constexpr = 1.4426950408889634  # exp(x) = exp2(x log2(e)), and exp2 is what the GPU has
    added = tl.where(key < n, 0.0, float("-inf"))
    if WITH_BIAS:
        added += tl.load(bias + image * n + key, mask=key < n, other=0.0) * log2_e
    total = tl.zeros((ROWS, KEYS), tl.float32)
    for first in range(0, n, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row[:, None] < n) & (column[None, :] < width)
        source = q + image * q_image + head * q_head + row[:, None] * q_row + column[None, :]
        queries = _operand(tl.load(source, mask=inside, other=0.0))
        logits = tl.dot(queries, tl.trans(keys), input_precision="tf32x3") * (scale * log2_e) + added[None, :]
        weight = tl.exp2(logits - tl.max(logits, 1)[:, None])
        inverse = 1 / tl.sum(weight, 1)
        total += weight * tl.where(row < n, inverse, 0.0)[:, None]
        if WITH_OUTPUT:
            rounded = _operand(weight.to(v.dtype.element_ty))
            result = tl.dot(rounded, values, input_precision="tf32x3") * inverse[:, None]
            target = out + ((image * n + row[:, None]) * heads + head) * width + column[None, :]
            tl.store(target, result.to(out.dtype.element_ty), mask=inside)
    tl.store(received + program * n + key, tl.sum(total, 0), mask=key < n)
