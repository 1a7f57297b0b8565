"""The work behind the commands: explain and export a model, compare methods, time models, check images."""

from tokenpool.extras import require

require(__name__, "experiments", "jinja2", "lightning", "matplotlib", "pandas", "tabulate", "tqdm")
