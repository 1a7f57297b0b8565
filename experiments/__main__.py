"""The command line of a clone: `python -m experiments <verb>`."""

from experiments.commands import COMMANDS
from tokenpool.commands import start


def main() -> None:
    """Run the command line, see `tokenpool.commands.start`."""
    start(COMMANDS, "Experiments on token downsampling in vision transformers (Marin et al. 2021).")


if __name__ == "__main__":
    main()
