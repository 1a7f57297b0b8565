"""Where a command's images and weights are."""

import os
from pathlib import Path

from tokenpool import files
from tokenpool.runs.data_sets import DATA
from tokenpool.runs.run import WEIGHTS
from tokenpool.training.images import HUB, is_downloaded


def name_sources(data: Path | None, weights: Path | None) -> None:
    """Store the paths of images and weights in environment variables, which the processes of a study inherit.

    Args:
        data: images; None leaves the variable as it is.
        weights: pretrained weights; None leaves the variable as it is.

    Raises:
        FileNotFoundError: if there are no such images or weights.
    """
    for variable, path in ((DATA, data), (WEIGHTS, weights)):
        if path is None:
            continue
        if not path.exists() and not str(path).startswith(HUB) and not is_downloaded(path):
            files.check_local(path)
            raise FileNotFoundError(f"no file or folder {path}")
        os.environ[variable] = str(path)
