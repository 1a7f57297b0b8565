"""Runs and studies: what is run, its identity, its result, and many runs in several processes."""

from tokenpool.extras import require

require(__name__, "experiments", "lightning", "pandas", "sklearn", "tqdm")
