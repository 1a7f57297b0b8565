"""Where the curves of a training go: CSV files, TensorBoard or Weights & Biases, by Lightning's own loggers."""

import os
from importlib.util import find_spec
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger

VARIABLE = "TOKENPOOL_LOGGER"  # an environment variable: results do not depend on it, and it reaches all processes
NAMES = ("csv", "tensorboard", "wandb")
_PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}  # one of them is needed


def check(name: str) -> None:
    """Whether there is such a logger, and its package is installed.

    Raises:
        ValueError: if not; the message says what there is, or what to install.
    """
    if name not in NAMES:
        raise ValueError(f"unknown logger {name!r}; known are {', '.join(NAMES)}")
    packages = _PACKAGES.get(name, ())
    if packages and not any(map(find_spec, packages)):
        raise ValueError(f"the logger {name} needs the package {packages[0]}: pip install {packages[0]}")


def create(run: str, folder: Path) -> Logger:
    """The logger that $TOKENPOOL_LOGGER names, or CSV, for one run. What it writes goes into `folder`/logs.

    Weights & Biases works offline, and `wandb sync` sends later, unless $WANDB_MODE is "online".

    Raises:
        ValueError: as `check`.
    """
    name = os.environ.get(VARIABLE) or "csv"
    check(name)
    logs = folder / "logs"
    if name == "csv":
        return CSVLogger(logs, name=run)
    if name == "tensorboard":
        return TensorBoardLogger(logs, name=run)
    (logs / run).mkdir(parents=True, exist_ok=True)  # or it takes the system's folder for temporary files
    return WandbLogger(
        run, logs / run, project="tokenpool", offline=os.environ.get("WANDB_MODE") != "online", group=folder.name
    )


def close(logger: Logger | None) -> None:
    """Let the next run of this process have a log of its own; Weights & Biases would go on with this one."""
    if isinstance(logger, WandbLogger):
        logger.experiment.finish()
