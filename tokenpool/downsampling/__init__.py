"""Downsampling methods, with one interface and one registry.

`contract.py` defines the interface. `selection.py`, `pooling.py` and `convolution.py` contain the methods of the paper.
`matching.py`, `fusion.py`, `mutual.py`, `diffrate.py`, `hierarchical.py` and `dynamic.py` contain methods of others.
`registry.py` gives each method its name, label, plot style and role in the studies.
"""

from tokenpool.downsampling.contract import Downsampled, Downsampler, Host, Masked
from tokenpool.downsampling.convolution import Convolution, Placed
from tokenpool.downsampling.diffrate import DiffRate
from tokenpool.downsampling.dynamic import DynamicSelection
from tokenpool.downsampling.fusion import MultiCriteriaFusion, TokenFusion
from tokenpool.downsampling.hierarchical import HierarchicalPooling
from tokenpool.downsampling.matching import BipartiteMatching
from tokenpool.downsampling.mutual import MutualPairs
from tokenpool.downsampling.pooling import KeyMedoids, KMeans, KMedoids, TokenPooling, WKMeans, WKMedoids
from tokenpool.downsampling.registry import (
    KINDS,
    METHODS,
    REGISTRY,
    Column,
    Method,
    find,
    register,
    studied,
    with_schedule,
)
from tokenpool.downsampling.selection import Importance, Noise, PowerBert, Random, Selection

__all__ = [
    "KINDS",
    "METHODS",
    "REGISTRY",
    "BipartiteMatching",
    "Column",
    "Convolution",
    "DiffRate",
    "Downsampled",
    "Downsampler",
    "DynamicSelection",
    "HierarchicalPooling",
    "Host",
    "Importance",
    "KMeans",
    "KMedoids",
    "KeyMedoids",
    "Masked",
    "Method",
    "MultiCriteriaFusion",
    "MutualPairs",
    "Noise",
    "Placed",
    "PowerBert",
    "Random",
    "Selection",
    "TokenFusion",
    "TokenPooling",
    "WKMeans",
    "WKMedoids",
    "find",
    "register",
    "studied",
    "with_schedule",
]
