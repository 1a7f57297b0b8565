"""The command line: `python -m experiments <verb>`.

A command is imported when it runs, or when its own help is asked for. The imports at the top are fast.
"""

import os
import sys
import warnings
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from experiments.commands import COMMANDS, check_packages, function

try:
    import typer
    from tqdm import tqdm
    from typer.core import TyperCommand, TyperGroup
except ModuleNotFoundError:
    if __name__ != "__main__":
        raise
    try:
        check_packages()
    except ModuleNotFoundError as error:
        sys.exit(f"error: {error}")  # one line, not a traceback


class Commands(TyperGroup):
    """A group of commands that are imported when they are used. Its own help is made from `COMMANDS`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command that the first argument names, and import it."""
        name, _, rest = super().resolve_command(ctx, args)
        return name, load(str(name)), rest


def load(name: str) -> TyperCommand:
    """Import a command, with its options.

    Args:
        name: name of the command in `COMMANDS`.

    Raises:
        ModuleNotFoundError: if packages are missing.
    """
    body = function(name)
    from experiments.options import describe_methods  # not at the top, because it imports PyTorch and Lightning

    describe_methods()
    single = typer.Typer(add_completion=False)
    single.command(name)(body)
    return typer.main.get_command(single)


def _not_loaded() -> None:
    """Stand in for the function of a command that is not imported."""


app = typer.Typer(
    cls=Commands,
    help="Experiments on token downsampling in vision transformers (Marin et al. 2021).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)
for name, listed in COMMANDS.items():
    app.command(name, help=listed.summary)(_not_loaded)


def _show_warning(
    otherwise: Callable[..., None], message: Warning | str, category: type[Warning], filename: str, *rest: Any
) -> None:
    """Show a warning of these packages in one line, without the code that gives it."""
    origins = [spec.origin for spec in map(find_spec, ("experiments", "tokenpool")) if spec and spec.origin]
    if issubclass(category, UserWarning) and {Path(origin).parent for origin in origins} & set(Path(filename).parents):
        tqdm.write(f"warning: {message}", file=sys.stderr)  # leaves progress bars alone
    else:
        otherwise(message, category, filename, *rest)


def main() -> None:
    """Run the command line; a mistake in the input ends in one line, not in a traceback."""
    os.environ["MPLBACKEND"] = "Agg"  # pictures go into files, whatever Jupyter has set; also for started processes
    try:
        with warnings.catch_warnings():
            warnings.showwarning = partial(_show_warning, warnings.showwarning)
            app()
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


if __name__ == "__main__":
    main()
