"""Seeds that depend on the step, not on earlier steps."""

import numpy as np


def step_seed(seed: int, step: int, rank: int = 0) -> int:
    """Compute the seed of one training step in one process, so that a resumed run draws the same random numbers.

    The seed is a hash. With a sum such as seed + epoch, seed 0 in epoch 1 would equal seed 1 in epoch 0.

    Args:
        seed: seed of the run.
        step: index of an optimiser step, of an epoch or of an image.
        rank: index of the process.

    Returns:
        A number in 0..2^63-1.
    """
    return int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0] >> np.uint64(1))
