"""Downsampling methods, with one interface and one registry.

`contract.py` defines the interface. `selection.py`, `pooling.py`, `matching.py` and `convolution.py` contain the
methods. `registry.py` gives each method its name, label, plot style and role in the studies.
"""

from tokenpool.downsampling.contract import Downsampled, Downsampler, Host
from tokenpool.downsampling.convolution import Convolution
from tokenpool.downsampling.matching import BipartiteMatching
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
    "Downsampled",
    "Downsampler",
    "Host",
    "Importance",
    "KMeans",
    "KMedoids",
    "KeyMedoids",
    "Method",
    "Noise",
    "PowerBert",
    "Random",
    "Selection",
    "TokenPooling",
    "WKMeans",
    "WKMedoids",
    "find",
    "register",
    "studied",
    "with_schedule",
]
