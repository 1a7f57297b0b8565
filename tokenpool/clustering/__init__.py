"""Batched clustering of tokens: K-Means, K-Medoids and others, and the reductions over clusters.

`algorithm` is Algorithm 1 of Marin et al. 2021. It uses `distances` (the engines), `ward` (initial centres),
`reductions` (sums, means, highest weights) and `checks` (of arguments). `agglomeration` and `density_peaks` are the
clustering algorithms of other methods.
"""

import warnings
from typing import Any

from tokenpool.clustering.agglomeration import LINKAGES, agglomerate
from tokenpool.clustering.algorithm import Clusters, kmeans, kmedoids
from tokenpool.clustering.density_peaks import density_peaks
from tokenpool.clustering.distances import squared_distances, stretched, unit_vectors
from tokenpool.clustering.reductions import largest, means, positive, stable_topk, sums
from tokenpool.clustering.ward import ward_init
from tokenpool.eager import is_in_graph

__all__ = [
    "LINKAGES",
    "Clusters",
    "agglomerate",
    "density_peaks",
    "is_in_graph",
    "kmeans",
    "kmedoids",
    "largest",
    "means",
    "positive",
    "squared_distances",
    "stable_topk",
    "stretched",
    "sums",
    "unit_vectors",
    "ward_init",
]


def __getattr__(name: str) -> Any:
    """Old names: `highest` is `stable_topk`, and `dearest_to_merge` is `ward_init`."""
    if name == "highest":
        warnings.warn("clustering.highest is deprecated: use stable_topk", DeprecationWarning, stacklevel=2)
        return stable_topk
    if name == "dearest_to_merge":
        message = "clustering.dearest_to_merge is deprecated: use ward_init(points, weights, k)"
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        return lambda distance, weights, k: ward_init(distance, weights, k, distance)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
