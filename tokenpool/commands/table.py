"""The commands of `tokenpool`, by name.

The table names the commands without importing them, because their imports (PyTorch, Lightning, pandas) take seconds.
"""

from collections.abc import Callable
from importlib import import_module
from typing import NamedTuple

from tokenpool.extras import require


class Command(NamedTuple):
    """A command of the command line.

    Attributes:
        module: full name of the module with the function of the command.
        summary: first paragraph of the docstring of the function.
    """

    module: str
    summary: str


# In the order of `tokenpool --help`. The function has the name of the command, with _ instead of -.
COMMANDS = {
    "evaluate": Command("tokenpool.commands.evaluate", "Test one setting without training, and write one JSON file."),
    "explain": Command(
        "tokenpool.commands.extras",
        "Pool a pretrained model on one image: what it sees before and after, what it costs, and which patches merge.",
    ),
    "export": Command(
        "tokenpool.commands.extras",
        "Export a model for deployment, for any batch size, and compare the logits of the file with eager mode.",
    ),
    "throughput": Command(
        "tokenpool.commands.benchmark",
        "Time pooled models and timm's plain one in turns: is the speed-up what the FLOPs promise?",
    ),
    "benchmark-methods": Command(
        "tokenpool.commands.methods",
        "Compare all methods that need no training at the same counted cost: on any model, with any labelled images.",
    ),
    "benchmark-precisions": Command(
        "tokenpool.commands.precisions",
        "Quantise the plain model and pooled models to int8: accuracy, size and time in ONNX Runtime.",
    ),
    "check-data": Command(
        "tokenpool.commands.extras",
        "Read every image once, and name those that cannot be read. Goes on where it was interrupted.",
    ),
}


def check_packages() -> None:
    """Check that the packages of all commands are installed.

    Raises:
        ModuleNotFoundError: if packages are missing. The message names them, and the extra that provides them.
    """
    require("the command line", "experiments", "typer", "yaml", "tqdm", "pandas", "matplotlib", "lightning")


def function(name: str, command: Command) -> Callable[..., None]:
    """Import the function of a command.

    Args:
        name: of the command.
        command: its entry in the table.

    Raises:
        ModuleNotFoundError: see `check_packages`.
    """
    check_packages()
    return getattr(import_module(command.module), name.replace("-", "_"))
