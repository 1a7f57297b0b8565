"""Functions that launch the Triton kernels. Each function has a plain version in `clustering` or `attention`."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenpool import micro_batch
from tokenpool.gpu import kernels


class Medoids(NamedTuple):
    """The result of `kmedoids`.

    Attributes:
        assignment: (B, N) int64, the cluster in 0..K-1 of each point.
        previous: (B, K) int64, the medoids that the assignment belongs to.
        order: (B, N) int32, the points sorted by cluster, and by index within a cluster.
        start: (B, K + 1) int32. The points of cluster j are order[start[j]:start[j + 1]].
    """

    assignment: Tensor
    previous: Tensor
    order: Tensor
    start: Tensor


# ---------------------------------------------------------------------------------------------------------------------
# K-Medoids
# ---------------------------------------------------------------------------------------------------------------------


def kmedoids(points: Tensor, weights: Tensor, medoids: Tensor, iterations: int) -> Medoids:
    """Cluster points by weighted K-Medoids, see `tokenpool.clustering.kmedoids`.

    Distances and costs are computed in float32, without gradient.

    Args:
        points: (B, N, E), float16, bfloat16 or float32. N is at most `availability.MAX_POINTS`.
        weights: (B, N) float32, in 0..1.
        medoids: (B, K) integers in 0..N-1, the indices of the initial medoids. They are not checked.
        iterations: maximum number of assignments, at least 1.
    """
    return Medoids(*_kmedoids(points.detach(), weights.detach(), medoids, iterations))


def means(tokens: Tensor, share: Tensor, assignment: Tensor, order: Tensor, start: Tensor) -> Tensor:
    """Sum the tokens of each cluster, each multiplied by its share. Gradients flow to the tokens, not to the share.

    Args:
        tokens: (B, N, D).
        share: (B, N) float32. If the shares of a cluster sum to 1, the result is its weighted mean.
        assignment: see `Medoids`.
        order: see `Medoids`.
        start: see `Medoids`.

    Returns:
        (B, K, D), computed in float32 and returned in the dtype of the tokens. Zero for a cluster without members.
    """
    return _means(tokens, share, assignment, order, start)


@torch.library.custom_op("tokenpool::kmedoids", mutates_args=())
def _kmedoids(
    points: Tensor, weights: Tensor, medoids: Tensor, iterations: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, n, width = points.shape
    k = medoids.shape[1]
    points, weights = _readable(points), weights.float().contiguous()
    found = _empty_medoids(points, weights, medoids, iterations)
    found[1].copy_(medoids)
    row_length = -(-n // 16) * 16  # so that each row can be read 16 bytes at a time
    images = min(micro_batch.max_items(n * row_length, micro_batch.DISTANCES.gpu), max(batch, 1))
    scratch = points.new_empty(images, n + 2, row_length, dtype=torch.float32)  # distances, costs, lengths
    offset = points.new_empty(images, width, dtype=torch.float32)
    for first in range(0, batch, images):
        some = [part[first : first + images] for part in (points, weights, *found)]
        with _device(points):
            kernels.kmedoids_kernel[(len(some[0]),)](
                *(*some, scratch, offset),
                *(n, k, width, iterations, points.stride(0), points.stride(1), row_length),
                **medoid_shape(n, points.element_size()),
            )
    return found


def medoid_shape(n: int, item: int) -> dict[str, Any]:
    """Return block sizes and compile options of the K-Medoids kernel, for n points of numbers of `item` bytes."""
    tokens = max(1 << (n - 1).bit_length(), 16)
    return {
        "TOKENS": tokens,
        "ROWS": 4096 // tokens,
        "TILE": min(tokens, 64),
        "WIDTH": 128 // item,
        "num_warps": 8,
        "maxnreg": 128 if item == 2 else None,  # two programs then share the registers of a multiprocessor
        "enable_fp_fusion": True,  # Triton 3.9 warns if this option is missing
    }


@_kmedoids.register_fake
def _empty_medoids(
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
    tokens = _readable(tokens)
    out = tokens.new_empty(batch, k, width)
    if out.numel():
        shape = mean_shape(width)
        with _device(tokens):
            kernels.means_kernel[(batch * k, -(-width // shape["WIDTH"]))](
                *(tokens, share.float().contiguous(), order.contiguous(), start.contiguous(), out),
                *(n, k, width, tokens.stride(0), tokens.stride(1)),
                **shape,
            )
    return out


def mean_shape(width: int) -> dict[str, Any]:
    """Return block sizes and compile options of the kernel for means, for tokens of a width."""
    columns = min(max(1 << (width - 1).bit_length(), 32), 512)
    return {"ROWS": 4, "WIDTH": columns, "num_warps": 4, "enable_fp_fusion": True}


@_means.register_fake
def _empty_means(tokens: Tensor, share: Tensor, assignment: Tensor, order: Tensor, start: Tensor) -> Tensor:
    return tokens.new_empty(tokens.shape[0], start.shape[1] - 1, tokens.shape[2])


def _save_for_gradient(ctx: Any, inputs: tuple, output: Tensor) -> None:
    tokens, share, assignment, _, _ = inputs
    ctx.dtype = tokens.dtype
    ctx.save_for_backward(share, assignment)


def _gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    share, assignment = ctx.saved_tensors
    rows = gradient.gather(1, assignment[:, :, None].expand(-1, -1, gradient.shape[2]))  # (B, N, D)
    return (rows * share[:, :, None]).to(ctx.dtype), None, None, None, None


_means.register_autograd(_gradient, setup_context=_save_for_gradient)


def weighted_means(tokens: Tensor, weights: Tensor, found: Medoids) -> Tensor:
    """Compute the weighted mean of the tokens of each cluster in one launch. Without gradient.

    It replaces two calls of `means`, for the weights and for the tokens, and the operations between them.

    Args:
        tokens: (B, N, D).
        weights: (B, N) float32, not negative.
        found: the clusters. A cluster of weight zero gets its token `previous`.

    Returns:
        (B, K, D), computed in float32 and returned in the dtype of the tokens.
    """
    return _weighted_means(tokens.detach(), weights.detach(), found.order, found.start, found.previous)


@torch.library.custom_op("tokenpool::weighted_means", mutates_args=())
def _weighted_means(tokens: Tensor, weights: Tensor, order: Tensor, start: Tensor, previous: Tensor) -> Tensor:
    batch, n, width = tokens.shape
    k = previous.shape[1]
    tokens = _readable(tokens)
    out = tokens.new_empty(batch, k, width)
    if out.numel():
        shape = mean_shape(width)
        with _device(tokens):
            kernels.weighted_means_kernel[(batch * k, -(-width // shape["WIDTH"]))](
                *(tokens, weights.float().contiguous(), order.contiguous(), start.contiguous()),
                *(previous.contiguous(), out, n, k, width, tokens.stride(0), tokens.stride(1)),
                **shape,
            )
    return out


@_weighted_means.register_fake
def _empty_weighted_means(tokens: Tensor, weights: Tensor, order: Tensor, start: Tensor, previous: Tensor) -> Tensor:
    return tokens.new_empty(tokens.shape[0], previous.shape[1], tokens.shape[2])


# ---------------------------------------------------------------------------------------------------------------------
# Attention
# ---------------------------------------------------------------------------------------------------------------------


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Compute softmax attention, and the attention that each key receives. Without gradient.

    The softmax is exact and in float32. The attention matrix is never written to memory.

    Args:
        q: queries (B, H, N, d), float16, bfloat16 or float32, with any strides.
        k: keys, like `q`.
        v: values, like `q`.
        bias: (B, N), added to the logits of each key. It may be -inf, but not for all keys of an image.
        scale: factor of the logits, applied before the bias is added.

    Returns:
        The output (B, H, N, d), with the memory layout (B, N, H, d) unless it is float32. The attention (B, N) float32
        that each key receives, summed over queries and heads.
    """
    if q.dtype == torch.float32:  # keys and values, each with a high and a low part, exceed the shared memory
        mask = None if bias is None else bias[:, None, None, :]
        out = F.scaled_dot_product_attention(q.detach(), k.detach(), v.detach(), attn_mask=mask, scale=scale)
        return out, received(q, k, bias, scale)
    out, scores = _attention(q.detach(), k.detach(), v.detach(), bias, scale)
    return out.transpose(1, 2), scores


def received(q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Compute the attention (B, N) float32 that each key receives, the second result of `attention`.

    Args:
        q: see `attention`.
        k: see `attention`.
        bias: see `attention`.
        scale: see `attention`.
    """
    return _received(q.detach(), k.detach(), bias, scale)


@torch.library.custom_op("tokenpool::attention", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    out, _ = _empty_attention(q, k, v, bias, scale)
    return out, _launch_attention(q, k, v, bias, scale, out)


@_attention.register_fake
def _empty_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    batch, heads, n, width = q.shape
    return v.new_empty(batch, n, heads, width), q.new_empty(batch, n, dtype=torch.float32)


@torch.library.custom_op("tokenpool::received", mutates_args=())
def _received(q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    return _launch_attention(q, k, None, bias, scale, None)


@_received.register_fake
def _empty_received(q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], dtype=torch.float32)


def _launch_attention(
    q: Tensor, k: Tensor, v: Tensor | None, bias: Tensor | None, scale: float, out: Tensor | None
) -> Tensor:
    """Write the output to `out` (B, N, H, d), unless v is None, and return the received attention (B, N)."""
    batch, heads, n, width = q.shape
    q, k = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k))
    v = v if v is None or v.stride(3) == 1 else v.contiguous()
    bias = None if bias is None else bias.float().contiguous()
    by_head = q.new_empty(batch, heads, n, dtype=torch.float32)
    if by_head.numel():
        with _device(q):
            kernels.attention_kernel[(batch * heads,)](
                *(q, k, q if v is None else v, q if bias is None else bias, q if out is None else out, by_head),
                *(scale, heads, n, width, *q.stride()[:3], *k.stride()[:3], *(q if v is None else v).stride()[:3]),
                WITH_BIAS=bias is not None,
                WITH_OUTPUT=v is not None,
                **attention_shape(n, width, q.element_size()),
            )
    return by_head.sum(1)


def attention_shape(n: int, width: int, item: int) -> dict[str, Any]:
    """Return block sizes and compile options of the attention kernel, for numbers of `item` bytes.

    Each thread has 32 logits and 32 sums over rows in registers. So two or more programs fit on one multiprocessor, and
    one program computes while another one waits.
    """
    keys = max(1 << (n - 1).bit_length(), 16)
    columns = max(1 << (width - 1).bit_length(), 32)
    return {
        # Fewer rows than columns. Otherwise Triton assigns rows to warps, and there are too few rows for all warps.
        "ROWS": 32 if item == 2 and min(keys, columns) > 32 else 16,
        "KEYS": keys,
        "WIDTH": columns,
        "num_warps": min(max(keys // 32, 4), 16),
        "num_stages": 2,
        "maxnreg": 128 if item == 2 else None,
        "enable_fp_fusion": True,
    }


def attention_memory(n: int, width: int, item: int) -> int:
    """Return an upper bound on the shared memory of the attention kernel, in bytes.

    The memory contains all keys and values (or the high and low parts of the keys), two blocks of queries, and a block
    of attention weights.
    """
    shape = attention_shape(n, width, item)
    rows, keys, columns = shape["ROWS"], shape["KEYS"], shape["WIDTH"]
    return item * (2 * keys * columns + 2 * rows * columns + rows * keys) + 4096


def _readable(points: Tensor) -> Tensor:
    """Return points (B, N, D) in a layout for kernels: each point contiguous, offsets within an image below 2^31."""
    good = points.stride(2) == 1 and points.stride(1) * points.shape[1] < 2**31
    return points if good else points.contiguous()


def _device(values: Tensor) -> AbstractContextManager:
    """Make the GPU of the values the current GPU, because Triton launches kernels on the current GPU."""
    return torch.cuda.device(values.device) if values.is_cuda else nullcontext()
