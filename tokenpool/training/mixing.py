"""Mixup and CutMix by timm, drawn alike whatever the number of processes."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from timm.data import Mixup
from torch import Tensor

from tokenpool.training.seeding import step_seed

PAIRS = 128  # that share a mixing ratio: DeiT's 256 images a GPU


def mixed(
    images: Tensor, labels: Tensor, mixup: Mixup, seed: int, step: int, rank: int = 0, ranks: int = 1
) -> tuple[Tensor, Tensor]:
    """Mix each image of the first half of a batch with one of the second, and the other way round.

    The batch is one process's share of a larger one, of which it has every `ranks`-th image from the `rank`-th on. Each
    pair gets the ratio that it would have got in one process, so that the number of processes changes nothing.

    Args:
        images: (B, C, H, W), B even.
        labels: (B,) classes.
        mixup: timm's, in its mode "batch".
        seed: with `step`, of the ratios.
        step: number of the batch in the whole training.
        rank: number of this process.
        ranks: number of processes.

    Returns:
        Images and targets (B, classes), in the same order.
    """
    half = len(images) // 2
    groups = -(-half * ranks // PAIRS)
    # Pair p of this process is number p * ranks + rank of them all.
    starts = [min(max(-(-(group * PAIRS - rank) // ranks), 0), half) for group in range(groups)] + [half]
    found = torch.empty_like(images)
    targets = images.new_empty(len(images), mixup.num_classes, dtype=torch.float32)
    for group in range(groups):
        first = torch.arange(starts[group], starts[group + 1], device=images.device)
        if len(first):
            pairs = torch.cat([first, (half + first).flip(0)])  # timm mixes the i-th with the i-th from the end
            with _seeded(step_seed(seed, step, group)):
                found[pairs], targets[pairs] = mixup(images[pairs], labels[pairs])
    return found, targets


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """NumPy's global generator, from which timm draws, with a seed of its own."""
    before = np.random.get_state()
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        np.random.set_state(before)
