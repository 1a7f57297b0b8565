"""The command line. Each command is a function that can be called without a shell."""

import sys
from collections.abc import Mapping

from tokenpool.commands.table import Command, check_packages


def start(commands: Mapping[str, Command], title: str) -> None:
    """Run a command line on `sys.argv`. A mistake in the input ends in one line, and so does a missing package.

    Args:
        commands: by name.
        title: first line of the help.
    """
    try:
        check_packages()
    except ModuleNotFoundError as error:
        sys.exit(f"error: {error}")
    from tokenpool.commands import shell  # not at the top, because it imports packages of an extra

    shell.run(commands, title)
