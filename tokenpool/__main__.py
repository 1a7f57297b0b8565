"""The command line of the package: `tokenpool <verb>`, the same as `python -m tokenpool <verb>`."""

from tokenpool.commands import start
from tokenpool.commands.table import COMMANDS


def main() -> None:
    """Run the command line, see `tokenpool.commands.start`."""
    start(COMMANDS, "Token reduction for vision transformers: evaluate, explain, export, time and compare models.")


if __name__ == "__main__":
    main()
