"""Seeds that depend on the step, not on what ran before it."""


def step_seed(seed: int, step: int, rank: int = 0) -> int:
    """A seed for one training step on one device: a resumed run draws what an uninterrupted one would have drawn."""
    return (seed * 1_000_003 + step) * 1_009 + rank
