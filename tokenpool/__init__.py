"""Token Pooling in Vision Transformers (Marin et al. 2021), for every plain vision transformer of timm."""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from tokenpool import moved
from tokenpool.version import __version__

if TYPE_CHECKING:
    from tokenpool import analysis, clustering, deit, flops, gpu, hosts, schedules, training
    from tokenpool.analysis import comparison, pareto, plotting, redundancy, results
    from tokenpool.analysis.comparison import compare
    from tokenpool.budget import schedule_for
    from tokenpool.calibration import calibrate
    from tokenpool.checkpoint import load, load_weights, patch_from_config, save
    from tokenpool.downsampling import METHODS, Downsampled, Downsampler
    from tokenpool.hub import from_hub, push_to_hub
    from tokenpool.patching import create_model, is_patched, patch, unpatch
    from tokenpool.stream import unpool
    from tokenpool.tracing import trace
    from tokenpool.training import (
        data,
        images,
        interruption,
        mixing,
        module,
        sampling,
        seeding,
        soft_selection,
        stochastic_depth,
    )

__all__ = [
    "METHODS",
    "Downsampled",
    "Downsampler",
    "__version__",
    "analysis",
    "calibrate",
    "clustering",
    "compare",
    "comparison",
    "create_model",
    "data",
    "deit",
    "flops",
    "from_hub",
    "gpu",
    "hosts",
    "images",
    "interruption",
    "is_patched",
    "load",
    "load_weights",
    "mixing",
    "module",
    "pareto",
    "patch",
    "patch_from_config",
    "plotting",
    "push_to_hub",
    "redundancy",
    "results",
    "sampling",
    "save",
    "schedule_for",
    "schedules",
    "seeding",
    "soft_selection",
    "stochastic_depth",
    "trace",
    "training",
    "unpatch",
    "unpool",
]

# All names are imported when first used. PyTorch and timm take seconds to import, and the command line shows its help
# without them. Some rooms need optional packages (Lightning, pandas, Matplotlib, SciPy).
_MODULES = {
    "": (
        *("adoption", "analysis", "attention", "blocks", "budget", "calibration", "card", "checkpoint", "clustering"),
        *("deit", "downsampling", "files", "flops", "gpu", "hosts", "hub", "patching", "positions", "schedules"),
        *("stream", "tracing", "training", "weight_files"),
    ),
    "analysis.": ("comparison", "pareto", "plotting", "redundancy", "results"),
    "training.": (
        *("data", "images", "interruption", "mixing", "module"),
        *("sampling", "seeding", "soft_selection", "stochastic_depth"),
    ),
}
_NAMES = {
    "analysis.comparison": ("compare",),
    "budget": ("schedule_for",),
    "calibration": ("calibrate",),
    "checkpoint": ("load", "load_weights", "patch_from_config", "save"),
    "downsampling": ("METHODS", "Downsampled", "Downsampler"),
    "hub": ("from_hub", "push_to_hub"),
    "patching": ("create_model", "is_patched", "patch", "unpatch"),
    "stream": ("unpool",),
    "tracing": ("trace",),
}
_ON_DEMAND: dict[str, tuple[str, str | None]] = {
    name: (f"tokenpool.{room}{name}", None) for room, names in _MODULES.items() for name in names
}
_ON_DEMAND |= {name: (f"tokenpool.{module}", name) for module, names in _NAMES.items() for name in names}

moved.install()


def __getattr__(name: str) -> Any:
    if name not in _ON_DEMAND:
        raise AttributeError(f"module 'tokenpool' has no attribute {name!r}")
    path, attribute = _ON_DEMAND[name]
    module = import_module(path)
    return module if attribute is None else getattr(module, attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *_ON_DEMAND})


if "torch" in sys.modules:  # the import then costs little; it registers models with timm and operators with PyTorch
    import_module("tokenpool.hosts")
    import_module("tokenpool.gpu")
