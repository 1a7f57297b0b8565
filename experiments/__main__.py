"""The command line: `python -m experiments <verb>`."""

import os
import sys

if __name__ == "__main__":  # before the imports below: Matplotlib refuses unknown backends when it is imported
    os.environ["MPLBACKEND"] = "Agg"  # pictures go into files, whatever Jupyter has set

from tokenpool.extras import require

if __name__ == "__main__":  # before the imports below: one line, not a traceback
    try:
        require("experiments", "experiments", "typer", "yaml", "tqdm", "pandas", "matplotlib", "lightning")
    except ModuleNotFoundError as error:
        sys.exit(f"error: {error}")

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import typer
from tqdm import tqdm

from experiments.commands import benchmark, extras, making, methods, showing, single
from experiments.options import describe_methods
from tokenpool import files
from tokenpool.training.interruption import Interrupted

app = typer.Typer(
    help="Experiments on token downsampling in vision transformers (Marin et al. 2021).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)
for command in (
    *(making.reproduce, showing.table, showing.figure, showing.report),
    *(making.run, making.submit, making.status),
    *(single.train, single.evaluate, extras.explain, extras.export),
    *(benchmark.throughput, benchmark.clustering_speed, methods.benchmark_methods, extras.check_data),
):
    app.command(command.__name__.replace("_", "-"))(command)


def _show_warning(
    otherwise: Callable[..., None], message: Warning | str, category: type[Warning], filename: str, *rest: Any
) -> None:
    """Show a warning of these packages in one line, without the code that gives it."""
    own = {Path(__file__).parent, Path(files.__file__).parent}
    if issubclass(category, UserWarning) and own & set(Path(filename).parents):
        tqdm.write(f"warning: {message}", file=sys.stderr)  # leaves progress bars alone
    else:
        otherwise(message, category, filename, *rest)


def main() -> None:
    """Run the command line; a mistake in the input ends in one line, not in a traceback."""
    os.environ["MPLBACKEND"] = "Agg"  # for the processes that it starts
    matplotlib.use("Agg")
    describe_methods()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = partial(_show_warning, warnings.showwarning)
            app()
    except Interrupted as error:
        print(error if error.requeued else f"{error}; the same command goes on", file=sys.stderr)
        sys.exit(0 if error.requeued else 1)
    except (ValueError, TypeError, OSError, RuntimeError, ArithmeticError, ModuleNotFoundError) as error:
        if os.environ.get("TOKENPOOL_TRACEBACK"):
            raise
        sys.exit(f"error: {error}")
    except SystemExit as error:
        if error.code == 130:  # typer's code for Ctrl-C
            print("interrupted; the same command goes on where this one stopped", file=sys.stderr)
        raise


if __name__ == "__main__":
    main()
