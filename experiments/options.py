"""Options of the commands on studies, and the options for hyper-parameters, made from the fields of `Recipe`."""

import inspect
import os
from collections.abc import Callable
from dataclasses import fields
from functools import wraps
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any

import typer

from experiments import presets
from tokenpool.runs import loggers
from tokenpool.training.recipe import Recipe

PRESETS = f"Preset: {', '.join(presets.NAMES)}; or a file like theirs, my_preset.py, that defines PRESET."


def _log_to(name: str | None) -> str | None:
    """Name the logger by an environment variable, which the processes of a study inherit."""
    if name is not None:
        loggers.check(name)
        os.environ[loggers.VARIABLE] = name
    return name


Results = Annotated[
    Path | None,
    typer.Option(
        help="Folder of the runs. Default: results/<preset>, as shipped; runs/<preset>-full where nothing is shipped, "
        "or where images or weights are named."
    ),
]
Quick = Annotated[bool, typer.Option("--quick", help="Of the quick study of `make reproduce`, in runs/<preset>.")]
Output = Annotated[Path, typer.Option(help="Folder for what is written; a sub-folder for each preset.")]
Missing = Annotated[bool, typer.Option("--missing", help="Only list the runs that are missing, and their cost.")]
RunMissing = Annotated[bool, typer.Option("--run", help="Make the runs that are missing first.")]
Data = Annotated[
    Path | None,
    typer.Option(
        help="Images in ImageNet's layout, hf:NAME or cifar10, for presets that need them. Or: $TOKENPOOL_DATA."
    ),
]
Weights = Annotated[
    Path | None, typer.Option(help="Weights to use instead of timm's download. Or: $TOKENPOOL_WEIGHTS.")
]
LogTo = Annotated[
    str | None,
    typer.Option(
        "--logger",
        callback=_log_to,
        help="What logs training: csv, tensorboard or wandb (offline). Results stay the same. Or: $TOKENPOOL_LOGGER.",
    ),
]
FigureRuns = Annotated[str | None, typer.Option(help="The runs of this figure, or all.")]
TableRuns = Annotated[str | None, typer.Option(help="The runs of this table, or all.")]


def with_recipe_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command of Typer one option for each field of `Recipe`, in place of its parameter `recipe`.

    The command gets a dictionary of the fields that the user has given, as `recipe`.
    """
    options = [_option(each.name, each.type, each.metadata) for each in fields(Recipe)]
    parameters: list[Parameter] = []
    for name, parameter in inspect.signature(command, eval_str=True).parameters.items():
        parameters += options if name == "recipe" else [parameter]

    @wraps(command)
    def wrapped(**given: Any) -> None:
        values = {option.name: given.pop(option.name) for option in options}
        command(**given, recipe={name: value for name, value in values.items() if value is not None})

    wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # which Typer reads
    wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return wrapped


def _option(name: str, kind: Any, limits: Any) -> Parameter:
    """The option for one field; None where it is not given."""
    option = typer.Option(help=limits["help"], min=limits.get("least"), max=limits.get("most", limits.get("below")))
    return Parameter(name, Parameter.POSITIONAL_OR_KEYWORD, default=None, annotation=Annotated[kind | None, option])
