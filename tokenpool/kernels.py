"""Triton kernels for a GPU: weighted K-Medoids, the means of its clusters, and attention that also yields scores.

Each does in one launch what `clustering` and `attention` do in many passes over (B, N, N) matrices. The results are the
same up to rounding. Every function here has a plain counterpart, and whether the kernel may take its place is asked
first: `kmedoids_fits`, `means_fits`, `attention_fits`.

They are used on Nvidia GPUs of compute capability 8.0 and later where Triton is installed, if at their first use they
find there what plain sums do. The environment variable
TOKENPOOL_KERNELS, or `using`, overrides this: "plain" never uses them; "triton" also uses them for tensors on the CPU,
through Triton's slow interpreter, if TRITON_INTERPRET=1 is set before `tokenpool` is imported.
"""

import functools
import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenpool import triton_kernels
from tokenpool.triton_kernels import INTERPRETED, available

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
    if kind != "cuda" or torch.version.hip is not None or torch.cuda.get_device_capability(index) < (8, 0):
        return False
    return choice == "triton" or _agree_with_plain(kind, index)


_IMAGES_TO_TRY = 64  # so that many programs run at a time


@functools.cache
def _agree_with_plain(kind: str, index: int | None) -> bool:
    """Whether the kernels work on a device, and find there what the plain functions do; if not, warns.

    Once for each device. Compiling needs a C compiler, and new GPUs may need a new Triton: neither must stop a user.
    """
    device = torch.device(kind, index)
    try:
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(kind, enabled=False):
            problem = None if all(_agrees(device, dtype) for dtype in DTYPES) else "their results are wrong"
    except Exception as error:  # whatever a compiler, an assembler or a driver may raise
        problem = f"{type(error).__name__}: {error}"
    if problem:
        warnings.warn(
            f"The Triton kernels are not used on {device}: {problem}. The plain functions are, which are slower.",
            stacklevel=2,
        )
    return problem is None


def _agrees(device: torch.device, dtype: torch.dtype) -> bool:
    """The kernels against plain sums, on whole numbers, where each is exact, and on a little attention."""
    batch, n, k, width = _IMAGES_TO_TRY, 197, 50, 64
    generator = torch.Generator().manual_seed(0)
    half = torch.randint(-3, 4, (batch, n // 2, width), generator=generator)
    points = torch.cat([half, -half, half.new_zeros(batch, 1, width)], dim=1).to(device, dtype)  # their mean is zero
    weights = torch.randint(1, 4, (batch, n), generator=generator).to(device, torch.float32)
    medoids = torch.arange(k, device=device).expand(batch, k)
    found = kmedoids(points, weights, medoids, 3)
    distance = torch.cdist(points.double(), points.double()).square().round()  # (B, N, N)
    rows = distance.gather(1, found.previous[:, :, None].expand(-1, -1, n))
    shared = means(points, weights, found.assignment, found.order, found.start).float()
    sums = shared.new_zeros(batch, k, width).index_put(
        (torch.arange(batch, device=device)[:, None].expand(-1, n), found.assignment),
        points.float() * weights[:, :, None],
        accumulate=True,
    )
    q, key, v = (points[:, None] / 4, points[:, None].flip(2) / 4, points[:, None])
    attended, scores = attention(q, key, v, weights, 0.5)
    matrix = (q.double() @ key.double().mT * 0.5 + weights.double()[:, None, None]).softmax(-1)
    return (
        torch.equal(rows.min(dim=1).indices, found.assignment)
        and torch.allclose(shared, sums, rtol=0.01, atol=0.01)
        and torch.allclose(attended.double(), matrix @ v.double(), rtol=0.02, atol=0.02)
        and torch.allclose(scores.double(), matrix.sum(dim=(1, 2)), rtol=0.02, atol=0.02)
    )


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
        medoids: (B, K) integers in 0..N-1, the indices of the first medoids. They are not checked.
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
    points, weights = _readable(points), weights.float().contiguous()
    found = _no_medoids(points, weights, medoids, iterations)
    found[1].copy_(medoids)
    row_length = -(-n // 16) * 16  # whole rows can then be read in pieces of 16 bytes
    at_once = max(min(2**28 // (n * row_length), batch), 1)  # 1 GiB
    scratch = points.new_empty(at_once, n + 2, row_length, dtype=torch.float32)  # distances, costs, lengths
    offset = points.new_empty(at_once, width, dtype=torch.float32)
    for first in range(0, batch, at_once):
        some = [part[first : first + at_once] for part in (points, weights, *found)]
        with _device(points):
            triton_kernels.kmedoids_kernel[(len(some[0]),)](
                *(*some, scratch, offset),
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
    tokens = _readable(tokens)
    out = tokens.new_empty(batch, k, width)
    if out.numel():
        shape = _mean_shape(width)
        with _device(tokens):
            triton_kernels.means_kernel[(batch * k, -(-width // shape["WIDTH"]))](
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


def _keep_for_gradient(ctx: Any, inputs: tuple, output: Tensor) -> None:
    tokens, share, assignment, _, _ = inputs
    ctx.dtype = tokens.dtype
    ctx.save_for_backward(share, assignment)


def _gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
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
            triton_kernels.attention_kernel[(batch * heads,)](
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


def _readable(points: Tensor) -> Tensor:
    """Points (B, N, D) as a kernel reads them: each in one piece, at a distance from its image's first below 2^31."""
    good = points.stride(2) == 1 and points.stride(1) * points.shape[1] < 2**31
    return points if good else points.contiguous()


def _device(values: Tensor) -> AbstractContextManager:
    """Triton launches on the current GPU, which need not be the tensors' own."""
    return torch.cuda.device(values.device) if values.is_cuda else nullcontext()
