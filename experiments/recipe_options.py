"""Options of the command line for the hyper-parameters, made from the fields of `Recipe`."""

import inspect
from collections.abc import Callable
from dataclasses import fields
from functools import wraps
from inspect import Parameter
from typing import Annotated, Any

import typer

from tokenpool.training.recipe import Recipe


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
