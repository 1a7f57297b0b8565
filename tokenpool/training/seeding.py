"""Seeds that depend on the step, not on what ran before it."""

import numpy as np


def step_seed(seed: int, step: int, rank: int = 0) -> int:
    """A seed for one training step on one device: a resumed run draws what an uninterrupted one would have drawn.

    A hash, because with a sum such as seed + epoch, seed 0 would draw in its epoch 1 what seed 1 draws in its epoch 0.

    Args:
        seed: of the run.
        step: of the optimiser; or an epoch, or the number of an image.
        rank: of the process.

    Returns:
        A number in 0..2^63-1.
    """
    return int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0] >> np.uint64(1))
