"""Bodies of the commands. Each command is a function that can be called without a shell.

`COMMANDS` names the commands without importing them, because their imports (PyTorch, Lightning, pandas) take seconds.
"""

from collections.abc import Callable
from importlib import import_module
from typing import NamedTuple


class Command(NamedTuple):
    """A command of `python -m experiments`.

    Attributes:
        module: module of this package with the function of the command.
        summary: first paragraph of the docstring of the function.
    """

    module: str
    summary: str


# In the order of `python -m experiments --help`. The function has the name of the command, with _ instead of -.
COMMANDS = {
    "reproduce": Command(
        "making",
        "Run the protocol of section 5: base model, search for schedules, fine-tuning. Ends with a table and a "
        "picture.",
    ),
    "table": Command(
        "showing",
        "Print a table of the paper and write it as Markdown, LaTeX and CSV: as printed, and from the runs of a "
        "preset.",
    ),
    "figure": Command(
        "showing",
        "Draw a figure of the paper as PNG and PDF: from its printed numbers, and from the runs of a preset.",
    ),
    "report": Command("showing", "Write all tables and figures, and what each was made from, on one page of HTML."),
    "run": Command(
        "making",
        "Make one run of a preset, as each task of a job array does. Goes on where an interrupted run stopped.",
    ),
    "submit": Command("making", "Submit the missing runs to Slurm, as job arrays that wait for each other."),
    "status": Command(
        "making", "Say which of the runs submitted to Slurm are done, running, queued, failed and missing."
    ),
    "train": Command(
        "single",
        "Train one setting, test it, and write weights and one JSON file. Goes on where an interrupted run stopped.",
    ),
    "evaluate": Command("single", "Test one setting without training, and write one JSON file."),
    "explain": Command(
        "extras",
        "Pool a pretrained model on one image: what it sees before and after, what it costs, and which patches merge.",
    ),
    "export": Command(
        "extras",
        "Export a model for deployment, for any batch size, and compare the logits of the file with eager mode.",
    ),
    "throughput": Command(
        "benchmark", "Time pooled models and timm's plain one in turns: is the speed-up what the FLOPs promise?"
    ),
    "clustering-speed": Command(
        "benchmark",
        "Time weighted K-Medoids against an implementation that loops over images and clusters in Python.",
    ),
    "benchmark-methods": Command(
        "methods",
        "Compare all methods that need no training at the same counted cost: on any model, with any labelled images.",
    ),
    "check-data": Command(
        "extras", "Read every image once, and name those that cannot be read. Goes on where it was interrupted."
    ),
}


def check_packages() -> None:
    """Check that the packages of all commands are installed.

    Raises:
        ModuleNotFoundError: if packages are missing. The message names them, and the extra that provides them.
    """
    from tokenpool.extras import require  # not at the top, because tokenpool imports PyTorch

    require("experiments", "experiments", "typer", "yaml", "tqdm", "pandas", "matplotlib", "lightning")


def function(name: str) -> Callable[..., None]:
    """Import the function of a command.

    Args:
        name: name of the command in `COMMANDS`.

    Raises:
        ModuleNotFoundError: see `check_packages`.
    """
    check_packages()
    module = import_module(f"{__name__}.{COMMANDS[name].module}")
    return getattr(module, name.replace("-", "_"))
