"""Old names of modules and of their content, which stay importable for one version.

To move a module, add one line to `MOVED`; to move a function or class, add one line to `MOVED_NAMES`. The use of an old
name gives a DeprecationWarning.
"""

import sys
import warnings
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# From the old name of a module to the modules that hold its content now.
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
    "tokenpool.vit": ("tokenpool.patching", "tokenpool.blocks"),
}


# Names that have left a module that stays: by module, from the name to the module that holds it now.
MOVED_NAMES: dict[str, dict[str, str]] = {
    "tokenpool.flops": {
        "schedule_for": "tokenpool.budget",
        "ScheduleCost": "tokenpool.budget",
        "FlopsCallback": "tokenpool.training.callbacks",
    },
    "tokenpool.tracing": {"ReconstructionErrorCallback": "tokenpool.training.callbacks"},
}


class MovedFinder(MetaPathFinder, Loader):
    """Imports the new module, or modules, under the old name."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of an old name; None for any other name."""
        return ModuleSpec(fullname, self) if fullname in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        """Warn, and put the new module in place of `module`; if there are several, forward all attributes to them."""
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
    """Make the old names importable, once."""
    if any(isinstance(finder, MovedFinder) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, MovedFinder())  # first: another installed copy may still have the old files
    for module in MOVED_NAMES:
        import_module(module).__getattr__ = partial(_moved_name, module)  # type: ignore[method-assign]  # PEP 562


def _moved_name(module: str, name: str) -> Any:
    new = MOVED_NAMES[module].get(name)
    if new is None:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    warnings.warn(f"{module}.{name} has moved to {new}", DeprecationWarning, stacklevel=2)
    return getattr(import_module(new), name)
