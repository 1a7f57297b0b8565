"""The decision whether to use the Triton kernels: by the user's choice, the device, the tensors, and a self-test."""

import functools
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from tokenpool.eager import is_exporting
from tokenpool.gpu import launch
from tokenpool.gpu.kernels import INTERPRETED, available

CHOICES = ("auto", "triton", "plain")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_POINTS = 1024  # points of an image in K-Medoids: a tile of the kernel contains a full row of the distance matrix
MAX_KEYS = 512  # keys in attention: a tile of the kernel contains a full row of logits
MAX_WIDTH = 128  # width of a head in attention
SIZES = (16, 32, 64, 128, 256, MAX_KEYS)  # of the blocks of attention, for which it is compiled


def _checked(choice: str, name: str) -> str:
    if choice not in CHOICES:
        raise ValueError(f"{name} = {choice!r} must be one of {', '.join(CHOICES)}")
    return choice


# A global and not a context variable, because torch.compile notices changes of globals and compiles again.
_choice = _checked(os.environ.get("TOKENPOOL_KERNELS", "plain"), "TOKENPOOL_KERNELS")


@contextmanager
def using(choice: str) -> Iterator[None]:
    """Choose between kernels and plain functions during the block, for all threads.

    Args:
        choice: "plain", the default, never uses the kernels. "auto" uses them on suitable GPUs, "triton" also in
            Triton's interpreter.

    Raises:
        ValueError: for another choice.
    """
    global _choice
    before, _choice = _choice, _checked(choice, "choice")
    try:
        yield
    finally:
        _choice = before


def kmedoids_fits(points: Tensor) -> bool:
    """Return whether to use `kmedoids` for points (B, N, E)."""
    return points.shape[1] <= MAX_POINTS and _fits(points)


def means_fits(tokens: Tensor) -> bool:
    """Return whether to use `means` for tokens (B, N, D)."""
    return _fits(tokens)


def attention_fits(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Return whether to use `attention` and `received` for queries, keys and values (B, H, N, d)."""
    if not (q.dtype == k.dtype == v.dtype and q.shape == k.shape == v.shape):
        return False
    n, width = q.shape[2:]
    if not (1 <= n <= MAX_KEYS and 1 <= width <= MAX_WIDTH and _fits(q)):
        return False
    kind, index = q.device.type, q.device.index
    if launch.attention_memory(n, width, q.element_size()) > _shared_memory(kind, index):
        return False
    # Numbers, because in a compiled graph n may be a symbol.
    keys, columns = (next(size for size in SIZES if most <= size) for most in (n, width))
    return _attention_runs(kind, index, q.dtype, keys, columns)


def _fits(values: Tensor) -> bool:
    if _choice == "plain" or is_exporting() or torch.jit.is_tracing():
        return False
    return values.dtype in DTYPES and _runs_on(values.device.type, values.device.index, _choice)


@torch.compiler.assume_constant_result
def _runs_on(kind: str, index: int | None, choice: str) -> bool:
    """Return whether the kernels run on a device: a suitable GPU, or Triton's interpreter for choice "triton"."""
    if not available:
        return False
    if INTERPRETED.value:
        return choice == "triton" and kind in ("cpu", "cuda")
    if kind != "cuda" or torch.version.hip is not None or torch.cuda.get_device_capability(index) < (8, 0):
        return False
    return passes_self_test(kind, index)


@torch.compiler.assume_constant_result
def _shared_memory(kind: str, index: int | None) -> int:
    """Return the maximum shared memory of a program, in bytes."""
    if kind != "cuda":
        return 232448  # of an H100
    return torch.cuda.get_device_properties(index).shared_memory_per_block_optin  # type: ignore[attr-defined]  # no stub


@torch.compiler.assume_constant_result
def _attention_runs(kind: str, index: int | None, dtype: torch.dtype, keys: int, width: int) -> bool:
    return passes_attention_test(kind, index, dtype, keys, width)  # a cached function cannot be decorated


@functools.cache
def passes_attention_test(kind: str, index: int | None, dtype: torch.dtype, keys: int, width: int) -> bool:
    """Return whether the attention kernel runs with correct results for this dtype and these sizes. Warn if not.

    The kernel is compiled for each size, and not all sizes of all Tritons fit into the shared memory of all GPUs. So
    the test runs once for each size.

    Args:
        kind: see `passes_self_test`.
        index: see `passes_self_test`.
        dtype: dtype of the queries, keys and values.
        keys: number of keys.
        width: width of a head.
    """

    def agrees(device: torch.device) -> bool:
        source = torch.Generator().manual_seed(0)
        q, k, v = torch.randint(-3, 4, (3, 1, 2, keys, width), generator=source).to(device, dtype)
        bias = torch.randint(1, 4, (1, keys), generator=source).to(device, torch.float32)
        return _attention_agrees(q / 4, k / 4, v, bias)

    return _passes(agrees, kind, index, f"attention kernel for {keys} keys of width {width} in {dtype}")


@functools.cache
def passes_self_test(kind: str, index: int | None, images: int = 64) -> bool:
    """Return whether the kernels run on a device with correct results. Warn if not.

    The test runs once for each device. It is needed because compilation requires a C compiler, and new GPUs can require
    a newer Triton. If the test fails, the plain functions are used.

    Args:
        kind: "cuda", or "cpu" for Triton's interpreter.
        index: index of the device.
        images: number of test images. With many images, many programs run at the same time.
    """
    return _passes(lambda device: all(_agrees(device, dtype, images) for dtype in DTYPES), kind, index, "kernels")


def _passes(agrees: Callable[[torch.device], bool], kind: str, index: int | None, name: str) -> bool:
    """Return whether a test passes on a device. Warn if not."""
    device = torch.device(kind) if index is None else torch.device(kind, index)
    try:
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(kind, enabled=False):
            problem = None if agrees(device) else "the results are wrong"
    except Exception as error:  # of any kind, from a compiler, an assembler or a driver
        problem = f"{type(error).__name__}: {error}"
    if problem:
        warnings.warn(
            f"The Triton {name} cannot be used on {device}: {problem}. The slower plain functions are used instead.",
            stacklevel=3,
        )
    return problem is None


def _agrees(device: torch.device, dtype: torch.dtype, images: int) -> bool:
    """Compare the kernels with plain sums of whole numbers, which are exact, and with plain attention."""
    batch, n, k, width = images, 197, 50, 64
    generator = torch.Generator().manual_seed(0)
    half = torch.randint(-3, 4, (batch, n // 2, width), generator=generator)
    points = torch.cat([half, -half, half.new_zeros(batch, 1, width)], dim=1).to(device, dtype)  # their mean is zero
    weights = torch.randint(1, 4, (batch, n), generator=generator).to(device, torch.float32)
    medoids = torch.arange(k, device=device).expand(batch, k)
    found = launch.kmedoids(points, weights, medoids, 3)
    distance = torch.cdist(points.double(), points.double()).square().round()  # (B, N, N)
    rows = distance.gather(1, found.previous[:, :, None].expand(-1, -1, n))
    shared = launch.means(points, weights, found.assignment, found.order, found.start).float()
    sums = shared.new_zeros(batch, k, width).index_put(
        (torch.arange(batch, device=device)[:, None].expand(-1, n), found.assignment),
        points.float() * weights[:, :, None],
        accumulate=True,
    )
    total = weights.new_zeros(batch, k).scatter_add(1, found.assignment, weights)
    centers = launch.weighted_means(points, weights, found).float()
    return (
        torch.equal(rows.min(dim=1).indices, found.assignment)
        and torch.allclose(shared, sums, rtol=0.01, atol=0.01)
        and torch.allclose(centers, sums / total[:, :, None], rtol=0.01, atol=0.01)
        and _attention_agrees(points[:, None] / 4, points[:, None].flip(2) / 4, points[:, None], weights)
    )


def _attention_agrees(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> bool:
    """Compare the attention kernel with plain attention."""
    attended, scores = launch.attention(q, k, v, bias, 0.5)
    matrix = (q.double() @ k.double().mT * 0.5 + bias.double()[:, None, None]).softmax(-1)
    return torch.allclose(attended.double(), matrix @ v.double(), rtol=0.02, atol=0.02) and torch.allclose(
        scores.double(), matrix.sum(dim=(1, 2)), rtol=0.02, atol=0.02
    )
