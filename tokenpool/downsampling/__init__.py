"""Downsampling methods, with one interface and one registry.

`contract.py` defines the interface. `selection.py`, `pooling.py` and `convolution.py` contain the methods of the paper,
and the other files methods to compare with. `registry.py` gives each method its name, label, plot style and role in the
studies.
"""

from tokenpool.downsampling.atc import ATC
from tokenpool.downsampling.contract import Downsampled, Downsampler, Host
from tokenpool.downsampling.convolution import Convolution
from tokenpool.downsampling.dpc_knn import DPCKNN
from tokenpool.downsampling.evit import EViT
from tokenpool.downsampling.matching import BipartiteMatching, Matching
from tokenpool.downsampling.pitome import PiToMe
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
    "ATC",
    "DPCKNN",
    "KINDS",
    "METHODS",
    "REGISTRY",
    "BipartiteMatching",
    "Column",
    "Convolution",
    "Downsampled",
    "Downsampler",
    "EViT",
    "Host",
    "Importance",
    "KMeans",
    "KMedoids",
    "KeyMedoids",
    "Matching",
    "Method",
    "Noise",
    "PiToMe",
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
