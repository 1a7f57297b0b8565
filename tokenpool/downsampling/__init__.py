"""Downsampling methods, with one interface and one registry.

`contract.py` defines the interface. `selection.py`, `pooling.py` and `convolution.py` contain the methods of the paper;
`ward.py` and `pooling.KeyMedoids` methods for models that are not fine-tuned; the other files methods to compare with.
`registry.py` gives each method its name, label, plot style and role in the studies.
"""

from tokenpool.downsampling.atc import ATC
from tokenpool.downsampling.contract import Downsampled, Downsampler, Host, Masked
from tokenpool.downsampling.convolution import Convolution, Placed
from tokenpool.downsampling.diffrate import DiffRate
from tokenpool.downsampling.dpc_knn import DPCKNN
from tokenpool.downsampling.dynamic import DynamicSelection
from tokenpool.downsampling.evit import EViT
from tokenpool.downsampling.fusion import MultiCriteriaFusion, TokenFusion
from tokenpool.downsampling.hierarchical import HierarchicalPooling
from tokenpool.downsampling.matching import BipartiteMatching, Matching
from tokenpool.downsampling.mutual import MutualPairs
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
from tokenpool.downsampling.ward import WardPooling

__all__ = [
    "ATC",
    "DPCKNN",
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
    "EViT",
    "HierarchicalPooling",
    "Host",
    "Importance",
    "KMeans",
    "KMedoids",
    "KeyMedoids",
    "Masked",
    "Matching",
    "Method",
    "MultiCriteriaFusion",
    "MutualPairs",
    "Noise",
    "PiToMe",
    "Placed",
    "PowerBert",
    "Random",
    "Selection",
    "TokenFusion",
    "TokenPooling",
    "WKMeans",
    "WKMedoids",
    "WardPooling",
    "find",
    "register",
    "studied",
    "with_schedule",
]
