"""Token Pooling in Vision Transformers (Marin et al. 2021), for every plain vision transformer of timm."""

import warnings
from importlib import import_module
from typing import Any

from tokenpool import clustering, deit, flops, gpu, hosts, pareto, results, schedules, soft_selection
from tokenpool.blocks import unpool
from tokenpool.budget import schedule_for
from tokenpool.checkpoint import load, load_weights, save
from tokenpool.downsampling import METHODS, Downsampled, Downsampler
from tokenpool.patching import create_model, is_patched, patch, unpatch
from tokenpool.tracing import trace
from tokenpool.version import __version__

__all__ = [
    "METHODS",
    "Downsampled",
    "Downsampler",
    "__version__",
    "clustering",
    "create_model",
    "deit",
    "flops",
    "gpu",
    "hosts",
    "is_patched",
    "load",
    "load_weights",
    "pareto",
    "patch",
    "results",
    "save",
    "schedule_for",
    "schedules",
    "soft_selection",
    "trace",
    "unpatch",
    "unpool",
]

# Imported when first used: they need Matplotlib, Lightning's data modules, torchvision, SciPy.
_ON_DEMAND = (
    "comparison",
    "data",
    "images",
    "interruption",
    "mixing",
    "module",
    "plotting",
    "redundancy",
    "sampling",
    "seeding",
    "stochastic_depth",
)


def __getattr__(name: str) -> Any:
    if name == "compare":
        return import_module("tokenpool.comparison").compare
    if name == "kernels":
        warnings.warn("tokenpool.kernels is deprecated: use tokenpool.gpu", DeprecationWarning, stacklevel=2)
        return gpu
    if name in _ON_DEMAND:
        return import_module(f"tokenpool.{name}")
    raise AttributeError(f"module 'tokenpool' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_ON_DEMAND, "compare"})
