"""Analysis of finished runs: tables, Pareto fronts, plots and paired comparisons."""

from tokenpool.extras import require

require(__name__, "experiments", "matplotlib", "pandas", "scipy")
