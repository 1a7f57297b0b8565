"""What would make runs fail on the cluster is said here, before anything is queued."""

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import timm

from experiments import protocol
from experiments.protocol import Run


def check_data(runs: Sequence[Run]) -> None:
    """Whether the images are there, with as many classes as the models have.

    Raises:
        FileNotFoundError: if a folder is missing.
        ValueError: if none is named, or if the classes are not as many.
    """
    for folder in {_folder(run) for run in runs if run.data != "digits"}:
        users = [run for run in runs if run.data != "digits" and _folder(run) == folder]
        for part in ["train", "val"] if any(run.epochs for run in users) else ["val"]:
            if not (folder / part).is_dir():
                raise FileNotFoundError(f"no folder {folder / part}: expected ImageNet's layout, <class>/<image> in it")
            count = sum(entry.is_dir() for entry in os.scandir(folder / part))
            for run in users:
                expected = _classes(run)
                if count != expected:
                    raise ValueError(
                        f"{folder / part} has {count} classes (folders), but the model of {run.name} has {expected}"
                    )


def check_weights(runs: Sequence[Run]) -> None:
    """Whether the weights that `--weights` names fit each model that starts from them.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is of another model.
    """
    if not os.environ.get(protocol.WEIGHTS):
        return
    models = {(run.variant, run.model): run for run in runs if run.pretrained}
    for run in models.values():
        plain = replace(run, downsampler="none", keep=None, budget=None, carry=False, options={})
        protocol.build_model(plain, Path())


def check_batches(runs: Sequence[Run], script: str, template: Path) -> None:
    """Whether the processes that train together can share each batch equally.

    Raises:
        ValueError: if not; the message names the template.
    """
    nodes, tasks = _option(script, "nodes", "N"), _option(script, "ntasks-per-node")
    for run in runs:
        if run.epochs and run.batch_size % (nodes * tasks):
            raise ValueError(
                f"{template} asks for {nodes} x {tasks} tasks, which cannot share the batch of {run.batch_size} images "
                f"of {run.name} equally"
            )


def _folder(run: Run) -> Path:
    folder = os.environ.get(protocol.DATA) if run.data == "imagenet" else run.data
    if not folder:
        raise ValueError(f"no images: --data FOLDER or the variable {protocol.DATA} must name a folder")
    return Path(folder)


def _classes(run: Run) -> int:
    config = timm.get_pretrained_cfg(run.model) or timm.models.PretrainedCfg()
    return run.model_options.get("num_classes", config.num_classes)


def _option(script: str, name: str, letter: str = "") -> int:
    """The number that a script's last #SBATCH line of this option gives; 1 if there is none."""
    names = f"--{name}[= ]" + (f"|-{letter} ?" if letter else "")
    found = re.findall(rf"^#SBATCH\s+(?:{names})\s*(\d+)", script, flags=re.MULTILINE)
    return int(found[-1]) if found else 1
