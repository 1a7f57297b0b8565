"""What would make runs fail on the cluster is said here, before anything is queued."""

import os
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import timm

from experiments.data_sets import data_set
from experiments.execute import build_model
from experiments.run import WEIGHTS, Run, empty_model, image_source
from tokenpool.training.images import HUB, class_names, is_downloaded, open_images, part_folder
from tokenpool.training.labels import outputs_of


def check_data(runs: Sequence[Run]) -> None:
    """Whether the images are there, with the classes that the models have.

    Raises:
        FileNotFoundError: if a folder is missing.
        ValueError: if no images are named, if they cannot be opened, or if their classes are others.
    """
    runs = [run for run in runs if not data_set(run.data).embedded]
    for root in sorted({image_source(run) for run in runs}):
        users = [run for run in runs if image_source(run) == root]
        for part in ["train", "val"] if any(run.recipe.epochs for run in users) else ["val"]:
            classes = _class_names(root, part)
            for run in users:
                expected = _classes(run)
                try:
                    outputs_of(classes, expected)
                except ValueError as error:
                    found = f"{part} of {root} has {len(classes)} classes, but the model of {run.name} has {expected}"
                    raise ValueError(f"{found}: {error}") from error


def check_weights(runs: Sequence[Run]) -> None:
    """Whether the weights that `--weights` names fit each model that starts from them.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is of another model.
    """
    if not os.environ.get(WEIGHTS):
        return
    models = {(run.variant, run.model): run for run in runs if run.pretrained}
    for run in models.values():
        plain = replace(run, downsampler="none", keep=None, budget=None, carry=False, options={})
        build_model(plain, Path())


def check_batches(runs: Sequence[Run], script: str, template: Path) -> None:
    """Whether the processes that train together can share each batch equally.

    Raises:
        ValueError: if not; the message names the template.
    """
    nodes, tasks = _number(script, "--nodes", "-N"), _number(script, "--ntasks-per-node")
    if not tasks and _number(script, "--ntasks", "-n"):
        raise ValueError(f"{template} has --ntasks: expected --ntasks-per-node, which says what runs where")
    nodes, tasks = nodes or 1, tasks or 1
    for run in runs:
        recipe = run.recipe
        pairs = 2 if recipe.mixup or recipe.cutmix else 1
        if recipe.epochs and recipe.batch_size % (nodes * tasks * pairs):
            raise ValueError(
                f"{template} asks for {nodes} x {tasks} tasks, which cannot share the batch of {recipe.batch_size} "
                f"images of {run.name} equally{', in pairs for mixup' if pairs > 1 else ''}"
            )


def _class_names(root: str, part: str) -> list[str]:
    if root.startswith(HUB) or is_downloaded(root):
        return open_images(root, part).classes
    # The folders are listed; listing a million images takes minutes on some file systems.
    return class_names(part_folder(Path(root), part))


def _classes(run: Run) -> int:
    config = timm.get_pretrained_cfg(run.model) or empty_model(run)
    return run.model_options.get("num_classes", config.num_classes)


def _number(script: str, *names: str) -> int:
    """What a script's last #SBATCH option of these names gives; 0 if there is none."""
    lines = [line for line in script.splitlines() if line.startswith("#SBATCH")]
    words = [word for line in lines for word in shlex.split(line.removeprefix("#SBATCH"), comments=True)]
    pairs = [(word, following) for word, following in zip(words, [*words[1:], ""], strict=True)]
    pairs += [tuple(word.split("=", 1)) for word in words if "=" in word]
    pairs += [(word[:2], word[2:]) for word in words if not word.startswith("--")]
    found = [value for name, value in pairs if name in names and value.isdecimal()]
    return int(found[-1]) if found else 0
