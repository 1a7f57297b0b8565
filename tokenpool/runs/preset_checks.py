"""Checks that a preset does not contradict itself, before a study starts.

The functions take a `Preset` or `Variant` of `tokenpool.runs.preset`, which imports this module.
"""

import json
import re
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import timm
import torch

from tokenpool import hosts
from tokenpool.downsampling import METHODS, studied, with_schedule
from tokenpool.runs.data_sets import data_set
from tokenpool.schedules import LEVELS, MODELS, paper
from tokenpool.training.recipe import Recipe

_NOT_NEGATIVE = ("search_learning_rate", "retention_learning_rate", "epoch_seconds", "evaluation_seconds")
OF_A_STAGE = ("epochs", "retention_penalty", "retention_learning_rate")  # recipe fields that fields of the preset set
_FIGURES = ("10a", "10b")  # figures of models with normalised queries and keys


def check(preset: Any) -> None:
    """Check that the settings of a preset are consistent.

    Raises:
        ValueError: if not. The message names the preset and all errors.
    """
    wrong = list(_wrong(preset))
    if wrong:
        raise ValueError(f"preset {preset.name}: {'; '.join(wrong)}")


def _wrong(preset: Any) -> Iterator[str]:
    if not re.fullmatch(r"[A-Za-z0-9_]+", preset.name):
        yield f"the name {preset.name!r} must consist of letters, digits and _"
    yield from _wrong_ranges(preset)
    yield from _wrong_lists(preset)
    yield from _wrong_variants(preset)
    yield from _wrong_stages(preset)
    yield from dict.fromkeys(found for variant in _all(preset) for found in _wrong_shape(preset, variant))


def _wrong_ranges(preset: Any) -> Iterator[str]:
    least = {"depth": 1, "grid": 1, "processes": 1}
    least |= dict.fromkeys(("base_epochs", "search_epochs", "finetune_epochs", "redundancy_images"), 0)
    for name, minimum in least.items():
        value = getattr(preset, name)
        if not isinstance(value, int) or value < minimum:
            yield f"{name} = {value!r} must be a whole number, at least {minimum}"
    for name in _NOT_NEGATIVE:
        if not getattr(preset, name) >= 0:
            yield f"{name} = {getattr(preset, name)!r} must not be negative"
    for name in OF_A_STAGE:
        value = getattr(preset.recipe, name)
        if value != getattr(Recipe(), name):
            yield f"recipe has {name} = {value!r}, which has no effect: set the preset's own field for each stage"


def _wrong_lists(preset: Any) -> Iterator[str]:
    for name in ("penalties", "full_penalties", "budgets"):
        values = getattr(preset, name)
        if any(not value > 0 for value in values):
            yield f"{name} = {values} must be above 0"
        if name != "budgets" and any(not first < second for first, second in pairwise(values)):
            yield f"{name} = {values} must be ascending, because level i is entry i"
    for name in ("penalties", "full_penalties"):  # with the digits that file names have
        yield from _repeated(name, [f"{value:g}" for value in getattr(preset, name)])
    yield from _repeated("budgets", [f"{value:g}" for value in preset.budgets])
    for name in ("seeds", "full_seeds", "extra_seeds", "added_seeds"):
        values = getattr(preset, name)
        yield from _repeated(name, values)
        if not values or any(not isinstance(seed, int) or seed < 0 for seed in values):
            yield f"{name} = {values} must be one or more whole numbers, 0 or larger"
    yield from _repeated("methods", preset.methods)
    for name in preset.methods:
        if name not in with_schedule():
            yield f"methods has {name!r}; methods with a schedule are {', '.join(with_schedule())}"
    yield from _wrong_rivals(preset)


def _wrong_rivals(preset: Any) -> Iterator[str]:
    yield from _repeated("rivals", preset.rivals)
    yield from _repeated("rival_placements", preset.rival_placements)
    for name in preset.rivals:
        if name not in METHODS or name == "none" or name in studied():
            yield f"rivals has {name!r}; expected methods that the study does not have already, of {', '.join(METHODS)}"
    placed = [name for name in preset.rivals if name in METHODS and name not in with_schedule()]
    if bool(placed) != bool(preset.rival_placements):
        yield (
            f"rival_placements = {preset.rival_placements}, but the rivals without a schedule are "
            f"{', '.join(placed) or 'none'}"
        )


def _repeated(name: str, values: Sequence[Any]) -> Iterator[str]:
    if len(set(values)) < len(values):
        yield f"{name} has equal entries: {', '.join(map(str, values))}"


def _wrong_variants(preset: Any) -> Iterator[str]:
    if preset.main.name:
        yield f"the name of main is {preset.main.name!r}, but must be empty"
    yield from _repeated("the names of family and normalised", [variant.name for variant in _all(preset)[1:]])
    for variant in _all(preset)[1:]:
        if not re.fullmatch(r"[A-Za-z0-9_]+", variant.name):
            yield f"the name of variant {variant.name!r} must consist of letters, digits and _"
    for name in (*([preset.stands_for] if preset.stands_for else []), *preset.family):
        if name not in ("deit_tiny", *MODELS):
            yield f"{name!r} is not a model of the paper, expected one of deit_tiny, {', '.join(MODELS)}"
    if preset.stands_for in preset.family:
        yield f"family has {preset.stands_for}, but main stands for it already"
    for figure, variant in preset.normalised.items():
        if figure not in _FIGURES or variant.qk_norm is None:
            yield f"normalised has {figure!r}: expected {' and '.join(_FIGURES)}, with qk_norm"
    for variant in _all(preset):
        if variant.schedules is not None and variant.schedules not in MODELS:
            yield f"schedules = {variant.schedules!r} must be one of {', '.join(MODELS)}"
        elif variant.schedules is not None and preset.depth != (blocks := len(paper(variant.schedules, 0))):
            yield f"the schedules of {variant.schedules} are for {blocks} blocks, not for {preset.depth}"


def _wrong_stages(preset: Any) -> Iterator[str]:
    pooled = [preset.main, *(variant for name, variant in preset.family.items() if name != "deit_tiny")]
    printed = [variant.schedules is not None for variant in pooled]
    levels = {"penalties": LEVELS, "full_penalties": LEVELS}
    if not all(printed):
        levels = {name: len(getattr(preset, name)) for name in levels}
    if any(printed) and not all(printed):
        yield "main and all models of family must have schedules, or none of them"
    only_budgets = not preset.trains and not any(printed) and bool(preset.budgets)  # then there are no levels
    for name, count in levels.items():
        if not only_budgets and not 0 <= preset.clustered_level < count:
            yield f"clustered_level = {preset.clustered_level}, but there are {count} {name}"
    if not preset.trains and not all(printed) and not only_budgets:
        yield "base_epochs = 0: without training there is no search, so main must have schedules"
    if preset.trains:
        for name in ("finetune_epochs", *([] if all(printed) else ["search_epochs"])):
            if getattr(preset, name) == 0:
                yield f"{name} = 0, but base_epochs = {preset.base_epochs}: each stage needs epochs"
        final, search = preset.recipe.final_learning_rate, preset.search_learning_rate
        if final > search and not all(printed):
            yield f"final_learning_rate = {final} is above search_learning_rate = {search}"
        unit = preset.processes * (2 if preset.recipe.mixup or preset.recipe.cutmix else 1)
        if preset.processes and preset.recipe.batch_size % unit:
            pairs = ", in pairs for mixup" if unit > preset.processes else ""
            size = preset.recipe.batch_size
            yield f"batch_size = {size} must be a multiple of {unit}, for {preset.processes} processes{pairs}"
    found = data_set(preset.data)
    if found.embedded and preset.redundancy_images:
        yield f"redundancy_images = {preset.redundancy_images} must be 0 for {found.title}"


def _wrong_shape(preset: Any, variant: Any) -> Iterator[str]:
    name = variant.model or preset.model
    options = preset.model_options | variant.model_options
    try:
        found = _shape(name, json.dumps(options, sort_keys=True))
    except Exception as error:  # timm raises many kinds of errors
        yield f"timm cannot create {name} with {options}: {error}"
        return
    if found is None:
        yield f"{name} belongs to no family that can be pooled"
    elif found != (preset.depth, preset.grid):
        has = f"{name} has {found[0]} blocks and {found[1]} tokens along a side"
        yield f"depth = {preset.depth} and grid = {preset.grid}, but {has}"


@cache
def _shape(name: str, options: str) -> tuple[int, int] | None:
    """Return blocks of a timm model and tokens along the shorter side, or None if the model cannot be pooled."""
    with torch.device("meta"):  # allocates no weights
        model = timm.create_model(name, **json.loads(options))
    adapter = hosts.find(model)
    return None if adapter is None else (adapter.depth, min(adapter.grid()))


def _all(preset: Any) -> list[Any]:
    return [preset.main, *preset.family.values(), *preset.normalised.values()]
