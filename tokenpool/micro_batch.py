"""Micro-batches: large intermediate results are computed for a few images, heads or rows at a time.

A budget is the number of floats that an intermediate result may hold. On a CPU a small budget is faster, because the
numbers stay in the cache. On a GPU a budget only bounds the memory. docs/performance.md has the measurements.
"""

import math
from collections.abc import Iterator
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenpool.eager import is_in_graph


class Budget(NamedTuple):
    """Floats that an intermediate result may hold, on a CPU and on any other device."""

    cpu: int
    gpu: int

    def on(self, device: torch.device) -> int:
        """The budget on this device."""
        return self.cpu if device.type == "cpu" else self.gpu


_GIBIBYTE = 2**28  # in floats

# A matrix of squared distances. 1 MiB is about the second-level cache of a CPU core.
DISTANCES = Budget(cpu=2**18, gpu=_GIBIBYTE)

# Where most tokens are medoids, only a few rows of that matrix are computed. Then there is little work in each
# operation, and four times as many images at a time are faster (8 of 6, 8 and 16 images in the log).
FEW_DISTANCES = Budget(cpu=2**20, gpu=_GIBIBYTE)

# The attention matrices of some heads, or some rows of one of them. 2 MiB on a CPU.
ATTENTION = Budget(cpu=2**19, gpu=_GIBIBYTE)

# Tokens that go through a transformer block together on a CPU. With 1.5 * 2^20 the MLP's hidden layer, four times as
# wide, stays below 32 MiB. Larger allocations go back to the system each time, and cost page faults.
BLOCK_FLOATS = 3 * 2**19


def fitting(floats_each: int, budget: int) -> int:
    """How many items of `floats_each` floats fit into a budget, at least one."""
    return max(budget // max(floats_each, 1), 1)


def even_size(count: int, floats: int, budget: int) -> int:
    """Size of equal micro-batches of `count` items with `floats` floats in all: about a budget each, or one item."""
    return math.ceil(count / math.ceil(floats / budget))


def split(size: int, first: Tensor, *others: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """Micro-batches of `size` images of the tensors (B, ...). A None stays None.

    A graph is not split, because it must not depend on the batch size.
    """
    if is_in_graph() or len(first) <= size:
        return iter([(first, *others)])
    parts = (repeat(None) if value is None else value.split(size) for value in others)
    return zip(first.split(size), *parts, strict=False)


def join(parts: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Results of micro-batches, tuples of tensors (B, ...), put together."""
    return parts[0] if len(parts) == 1 else tuple(map(torch.cat, zip(*parts, strict=True)))
