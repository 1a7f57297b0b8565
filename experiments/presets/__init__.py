"""Presets: settings of a study. The docstring of each preset states commands, cost and expected results."""

import runpy
from dataclasses import fields, replace
from importlib import import_module
from pathlib import Path

from tokenpool.runs.preset import Preset, Variant
from tokenpool.runs.preset_checks import OF_A_STAGE
from tokenpool.training.recipe import Recipe

__all__ = ["DEFAULT", "NAMES", "Preset", "Variant", "get"]

NAMES = ("digits", "pretrained", "cifar10", "cifar10_128", "imagenet", "imagenet_printed")
DEFAULT = NAMES[0]  # of commands


def get(name: str) -> Preset:
    """Return a preset.

    Args:
        name: name of the preset, or path of a Python file that defines PRESET.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if there is no such preset. The message lists all presets.
    """
    if name.endswith(".py"):
        return _read(Path(name))
    if name not in NAMES:
        raise ValueError(f"unknown preset {name!r}; known are {', '.join(NAMES)}, and files like my_preset.py")
    return import_module(f"experiments.presets.{name}").PRESET


def _read(path: Path) -> Preset:
    if not path.is_file():
        raise FileNotFoundError(f"no preset {path}")
    try:
        preset = runpy.run_path(str(path)).get("PRESET")
    except (Exception, SystemExit) as error:  # the code in the file can raise any error
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"cannot read preset {path}: {kind}{error}{_hint(error)}") from error
    if not isinstance(preset, Preset) or preset.name in NAMES:
        raise ValueError(f"{path} must define PRESET, a Preset with a name other than {', '.join(NAMES)}")
    return replace(preset, file=path.resolve())


def _hint(error: BaseException) -> str:
    """Return advice for presets of versions before 0.1, which had hyper-parameters outside the recipe."""
    for each in fields(Recipe):
        if isinstance(error, TypeError) and f"argument '{each.name}'" in str(error) and each.name not in OF_A_STAGE:
            return f"; write recipe=Recipe({each.name}=...)"
    return ""
