"""Micro-batches: compute large intermediate results for a few images, heads or rows at a time.

A budget is the maximum number of floats in an intermediate result. On a CPU a small budget is faster, because the
floats stay in the cache. On a GPU a budget only limits the memory. See docs/results/speed-log.md for measurements.
"""

import math
from collections.abc import Iterator
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenpool.eager import is_in_graph


class Budget(NamedTuple):
    """Maximum number of floats in an intermediate result, on a CPU and on other devices."""

    cpu: int
    gpu: int

    def on(self, device: torch.device) -> int:
        """Return the budget on a device."""
        return self.cpu if device.type == "cpu" else self.gpu


_GIBIBYTE = 2**28  # in floats

# Squared distances between all tokens. 1 MiB on a CPU, about the second-level cache of a core.
DISTANCES = Budget(cpu=2**18, gpu=_GIBIBYTE)

# Squared distances from tokens that are not medoids. These are few numbers for each image, so a four times larger
# budget is faster (see "6, 8, 16" images in docs/results/speed-log.md).
FEW_DISTANCES = Budget(cpu=2**20, gpu=_GIBIBYTE)

# Attention matrices of some heads, or some rows of one matrix. 2 MiB on a CPU.
ATTENTION = Budget(cpu=2**19, gpu=_GIBIBYTE)

# Tokens that pass a transformer block together on a CPU. With 1.5 * 2^20 floats, the hidden layer of the MLP, which is
# four times as wide, stays below 32 MiB. Larger allocations are returned to the system each time and cost page faults.
BLOCK_FLOATS = 3 * 2**19


def max_items(floats_each: int, budget: int) -> int:
    """Return how many items of `floats_each` floats fit into a budget, but at least 1."""
    return max(budget // max(floats_each, 1), 1)


def even_size(count: int, floats: int, budget: int) -> int:
    """Return the size of micro-batches of nearly equal size.

    Args:
        count: number of items.
        floats: number of floats of all items together.
        budget: approximate number of floats in a micro-batch.
    """
    return math.ceil(count / math.ceil(floats / budget))


def split(size: int, first: Tensor, *others: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """Split tensors (B, ...) into micro-batches of `size` images. None stays None.

    In a graph nothing is split, because a graph must not depend on the batch size.
    """
    if is_in_graph() or len(first) <= size:
        return iter([(first, *others)])
    parts = (repeat(None) if value is None else value.split(size) for value in others)
    return zip(first.split(size), *parts, strict=False)


def join(parts: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Concatenate the results of micro-batches, which are tuples of tensors (B, ...)."""
    return parts[0] if len(parts) == 1 else tuple(map(torch.cat, zip(*parts, strict=True)))
