"""The command line of a table of commands, made by Typer.

A command is imported when it runs, or when its own help is asked for. The imports at the top are fast.
"""

import os
import sys
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import typer
from tqdm import tqdm
from typer.core import TyperCommand, TyperGroup

from tokenpool.commands.table import Command, function


def application(commands: Mapping[str, Command], title: str) -> typer.Typer:
    """The command line of a table. Its own help is made from the table.

    Args:
        commands: by name.
        title: first line of the help.
    """

    class Commands(TyperGroup):
        def resolve_command(self, ctx: Any, args: list[str]) -> Any:
            """Find the command that the first argument names, and import it."""
            name, _, rest = super().resolve_command(ctx, args)
            return name, load(str(name), commands[str(name)]), rest

    app = typer.Typer(
        cls=Commands,
        help=title,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
    )
    for name, listed in commands.items():
        app.command(name, help=listed.summary)(_not_loaded)
    return app


def load(name: str, command: Command) -> TyperCommand:
    """Import a command, with its options.

    Args:
        name: of the command.
        command: its entry in the table.

    Raises:
        ModuleNotFoundError: if packages are missing.
    """
    body = function(name, command)
    from tokenpool.commands.options import describe_methods  # not at the top, because it imports PyTorch and Lightning

    describe_methods()
    single = typer.Typer(add_completion=False)
    single.command(name)(body)
    return cast(TyperCommand, typer.main.get_command(single))


def _not_loaded() -> None:
    """Stand in for the function of a command that is not imported."""


def _show_warning(
    otherwise: Callable[..., None], message: Warning | str, category: type[Warning], filename: str, *rest: Any
) -> None:
    """Show a warning of these packages in one line, without the code that gives it."""
    origins = [spec.origin for spec in map(find_spec, ("experiments", "tokenpool")) if spec and spec.origin]
    if issubclass(category, UserWarning) and {Path(origin).parent for origin in origins} & set(Path(filename).parents):
        tqdm.write(f"warning: {message}", file=sys.stderr)  # leaves progress bars alone
    else:
        otherwise(message, category, filename, *rest)


def run(commands: Mapping[str, Command], title: str) -> None:
    """Run a command line on `sys.argv`; a mistake in the input ends in one line, not in a traceback.

    Args:
        commands: by name.
        title: first line of the help.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # PyTorch's profiler would tell of each start and stop
    os.environ["MPLBACKEND"] = "Agg"  # pictures go into files, whatever Jupyter has set; also for started processes
    try:
        with warnings.catch_warnings():
            warnings.showwarning = partial(_show_warning, warnings.showwarning)
            application(commands, title)()
    except (ValueError, TypeError, OSError, RuntimeError, ArithmeticError, ModuleNotFoundError) as error:
        if os.environ.get("TOKENPOOL_TRACEBACK"):
            raise
        sys.exit(f"error: {error}")
    except SystemExit as error:
        if error.code == 130:  # typer's code for Ctrl-C
            print("interrupted; the same command goes on where this one stopped", file=sys.stderr)
        raise
    except Exception as error:
        from tokenpool.training.interruption import Interrupted  # not at the top, because it imports Lightning

        if not isinstance(error, Interrupted):
            raise
        print(error if error.requeued else f"{error}; the same command goes on", file=sys.stderr)
        sys.exit(0 if error.requeued else 1)
