"""Old names of modules, functions and classes. They stay importable for one version.

To move a module, add one line to `MOVED`. To move or rename a function or class, add one line to `MOVED_NAMES`. An old
name gives a DeprecationWarning.
"""

import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# The old name of a module: the modules that hold its content now.
MOVED: dict[str, tuple[str, ...]] = {
    "tokenpool.bits": ("tokenpool.analysis.bits",),
    "tokenpool.comparison": ("tokenpool.analysis.comparison",),
    "tokenpool.data": ("tokenpool.training.data",),
    "tokenpool.fingerprint": ("tokenpool.training.fingerprint",),
    "tokenpool.images": ("tokenpool.training.images",),
    "tokenpool.interruption": ("tokenpool.training.interruption",),
    "tokenpool.kernels": ("tokenpool.gpu",),
    "tokenpool.labels": ("tokenpool.training.labels",),
    "tokenpool.mixing": ("tokenpool.training.mixing",),
    "tokenpool.module": ("tokenpool.training.module",),
    "tokenpool.pareto": ("tokenpool.analysis.pareto",),
    "tokenpool.plotting": ("tokenpool.analysis.plotting",),
    "tokenpool.redundancy": ("tokenpool.analysis.redundancy",),
    "tokenpool.results": ("tokenpool.analysis.results",),
    "tokenpool.sampling": ("tokenpool.training.sampling",),
    "tokenpool.seeding": ("tokenpool.training.seeding",),
    "tokenpool.soft_selection": ("tokenpool.training.soft_selection",),
    "tokenpool.stochastic_depth": ("tokenpool.training.stochastic_depth",),
    "tokenpool.stored": ("tokenpool.training.stored",),
    "tokenpool.triton_kernels": ("tokenpool.gpu.kernels",),
    "tokenpool.vit": ("tokenpool.patching", "tokenpool.blocks", "tokenpool.stream"),
}


# A module, an old name in it: the new module, or "module:name" if the name has changed, too. The module sets
# `__getattr__ = old_names(__name__)`.
MOVED_NAMES: dict[str, dict[str, str]] = {
    "tokenpool.analysis.results": {"read_if_whole": "tokenpool.analysis.results:read_or_none"},
    "tokenpool.files": {
        "DEAD_AFTER": "tokenpool.files:STALE_AFTER",
        "alone": "tokenpool.files:file_lock",
        "whole": "tokenpool.files:atomic_write",
    },
    "tokenpool.flops": {
        "schedule_for": "tokenpool.budget",
        "ScheduleCost": "tokenpool.budget",
        "FlopsCallback": "tokenpool.training.callbacks",
    },
    "tokenpool.gpu": {
        "MOST_KEYS": "tokenpool.gpu:MAX_KEYS",
        "MOST_POINTS": "tokenpool.gpu:MAX_POINTS",
        "MOST_WIDTH": "tokenpool.gpu:MAX_WIDTH",
    },
    "tokenpool.tracing": {"ReconstructionErrorCallback": "tokenpool.training.callbacks"},
    "tokenpool.training.interruption": {
        "WholeCheckpoints": "tokenpool.training.interruption:AtomicCheckpointIO",
        "listening": "tokenpool.training.interruption:recorded_signals",
    },
}


class MovedFinder(MetaPathFinder, Loader):
    """Import the new module, or modules, under the old name."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of an old name, and None for any other name."""
        return ModuleSpec(fullname, self) if fullname in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        """Warn, and replace `module` by the new module. If there are several, forward all attributes to them."""
        old = module.__name__
        new = MOVED[old]
        warnings.warn(f"{old} has moved to {' and '.join(new)}", DeprecationWarning, stacklevel=2)
        found = [import_module(name) for name in new]
        if len(found) == 1:
            sys.modules[old] = found[0]
            return

        def forward(name: str) -> Any:
            for each in found:
                if hasattr(each, name):
                    return getattr(each, name)
            raise AttributeError(f"module {old!r} has no attribute {name!r}")

        module.__getattr__ = forward  # type: ignore[method-assign]  # PEP 562


def install() -> None:
    """Make the old names importable. A second call does nothing."""
    if any(isinstance(finder, MovedFinder) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, MovedFinder())  # first: another installed copy may still have the old files


def old_names(module: str) -> Callable[[str], Any]:
    """Return the `__getattr__` of a module in `MOVED_NAMES` (PEP 562).

    Args:
        module: name of the module.
    """
    return partial(_moved_name, module)


def _moved_name(module: str, name: str) -> Any:
    if name not in MOVED_NAMES[module]:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    new, _, renamed = MOVED_NAMES[module][name].partition(":")
    place = f"{new}.{renamed}" if renamed else new
    warnings.warn(f"{module}.{name} has moved to {place}", DeprecationWarning, stacklevel=2)
    return getattr(import_module(new), renamed or name)
