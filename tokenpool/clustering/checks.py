"""Checks of the arguments of `kmeans` and `kmedoids`, and their defaults."""

import math
from numbers import Integral

import torch
from torch import Tensor

from tokenpool.clustering.reductions import stable_topk
from tokenpool.eager import at_least_float32, cast, detached, is_eager_cpu, is_in_graph


def checked(
    tokens: Tensor, k: int, weights: Tensor | None, init: Tensor | None, iterations: int, check_values: bool
) -> tuple[Tensor, Tensor]:
    """Check the arguments of `kmeans` and fill in the defaults.

    Returns:
        Weights (B, N), scaled to at most 1, and the initial centres (B, K) or (B, K, D).

    Raises:
        TypeError: if an argument is not a tensor.
        ValueError: if an argument is unusable. The message names the argument.
    """
    _check_shapes(tokens, k, weights, init, iterations)
    if check_values and not is_in_graph():
        _check_values(tokens, weights, init)
    batch, n, _ = tokens.shape
    precision = at_least_float32(tokens.dtype)
    if weights is None:
        evenly_spaced = torch.arange(k, device=tokens.device).mul(n).div(k, rounding_mode="floor").expand(batch, k)
        return tokens.new_ones(batch, n, dtype=precision), evenly_spaced if init is None else init
    weights = cast(detached(weights), precision)
    largest = weights.amax(dim=1, keepdim=True).clamp(min=torch.finfo(precision).tiny)
    weights = weights / largest  # prevents overflow of sums and underflow of means
    return weights, stable_topk(weights, k) if init is None else init


def check_by(by: Tensor, tokens: Tensor, check_values: bool) -> None:
    """Check the argument `by` of `kmedoids`.

    Raises:
        ValueError: if it has the wrong shape or is not finite.
    """
    if by.dim() != 3 or by.shape[:2] != tokens.shape[:2]:
        raise ValueError(f"by must have shape (B, N, E), B, N = {tuple(tokens.shape[:2])}, got {tuple(by.shape)}")
    if check_values and is_eager_cpu(by) and not _all_finite(by):
        raise ValueError("by must be finite")


def _check_shapes(tokens: Tensor, k: int, weights: Tensor | None, init: Tensor | None, iterations: int) -> None:
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
    if init is None:
        return
    shape = (batch, k, width) if init.is_floating_point() else (batch, k)
    if init.shape != shape:
        raise ValueError(f"init must have shape {shape}, got {tuple(init.shape)}")


def _check_values(tokens: Tensor, weights: Tensor | None, init: Tensor | None) -> None:
    if not _all_finite(tokens):
        image = int((~tokens.isfinite()).flatten(1).any(1).nonzero()[0])
        raise ValueError(f"tokens must be finite, but image {image} of the batch has NaN or infinite tokens")
    if weights is not None and weights.numel() and not _are_usable(weights):
        usable = (weights.isfinite() & (weights >= 0)).all(1) & (weights > 0).any(1)  # (B,)
        image = int((~usable).nonzero()[0])
        raise ValueError(
            "weights must be finite, not negative, and not all zero, "
            f"but image {image} of the batch has weights in {weights[image].min():g}..{weights[image].max():g}"
        )
    if init is None:
        return
    if init.is_floating_point():
        if not init.isfinite().all():
            raise ValueError("init must be finite")
    elif init.numel() and (init.amin().item() < 0 or init.amax().item() >= tokens.shape[1]):
        raise ValueError(f"init must hold token indices in 0..{tokens.shape[1] - 1}")


def _all_finite(values: Tensor) -> bool:
    # If the sum is finite, all values are: one pass. The sum of finite values may overflow, so check each value then.
    return math.isfinite(values.sum().item()) or bool(values.isfinite().all())


def _are_usable(weights: Tensor) -> bool:
    largest = weights.amax(dim=1)
    return weights.amin().item() >= 0 and largest.amin().item() > 0 and largest.amax().item() < torch.inf  # no NaN
