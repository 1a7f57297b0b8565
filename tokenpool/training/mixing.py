"""timm's Mixup and CutMix, with results that do not depend on the number of processes."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from timm.data import Mixup
from torch import Tensor

from tokenpool.training.seeding import step_seed

PAIRS = 128  # pairs of images with the same mixing ratio, as in DeiT with 256 images on each GPU


def mixed(
    images: Tensor, labels: Tensor, mixup: Mixup, seed: int, step: int, rank: int = 0, ranks: int = 1
) -> tuple[Tensor, Tensor]:
    """Mix each image of the first half of a batch with an image of the second half, and vice versa.

    The batch is the share of one process: every `ranks`-th image of a larger batch, starting at image `rank`. Each pair
    gets the same ratio as in a training with one process.

    Args:
        images: (B, C, H, W), B even.
        labels: (B,) classes.
        mixup: timm's Mixup, in its mode "batch".
        seed: seed of the run. The ratios depend on `seed` and `step`.
        step: index of the batch in the whole training.
        rank: index of this process.
        ranks: number of processes.

    Returns:
        Images (B, C, H, W) and targets (B, classes), in the same order.
    """
    half = len(images) // 2
    groups = -(-half * ranks // PAIRS)
    # Pair p of this process is pair p * ranks + rank of all processes.
    starts = [min(max(-(-(group * PAIRS - rank) // ranks), 0), half) for group in range(groups)] + [half]
    found = torch.empty_like(images)
    targets = images.new_empty(len(images), mixup.num_classes, dtype=torch.float32)
    for group in range(groups):
        first = torch.arange(starts[group], starts[group + 1], device=images.device)
        if len(first):
            pairs = torch.cat([first, (half + first).flip(0)])  # timm mixes image i with image B - 1 - i
            with _seeded(step_seed(seed, step, group)):
                found[pairs], targets[pairs] = mixup(images[pairs], labels[pairs])
    return found, targets


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Set a seed of NumPy's global generator, which timm uses, during the block."""
    before = np.random.get_state()
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        np.random.set_state(before)
