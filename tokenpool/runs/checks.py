"""Checks that find errors of runs before any of them starts, or waits in a queue."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import timm

from tokenpool.runs.data_sets import data_set
from tokenpool.runs.execute import build_model
from tokenpool.runs.run import WEIGHTS, Run, empty_model, image_source
from tokenpool.training.images import HUB, class_names, is_downloaded, open_images, part_folder
from tokenpool.training.labels import outputs_of


def check_data(runs: Sequence[Run]) -> None:
    """Check that the images exist, and have the classes of the models.

    Raises:
        FileNotFoundError: if a folder is missing.
        ValueError: if no source of images is given, if the images cannot be opened, or if their classes differ.
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
    """Check that the file of `--weights` matches each model that starts from it.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the weights are of another model.
    """
    if not os.environ.get(WEIGHTS):
        return
    models = {(run.variant, run.model): run for run in runs if run.pretrained}
    for run in models.values():
        plain = replace(run, downsampler="none", keep=None, budget=None, carry=False, options={})
        build_model(plain, Path())


def _class_names(root: str, part: str) -> list[str]:
    if root.startswith(HUB) or is_downloaded(root):
        return open_images(root, part).classes
    # List folders only, because listing a million images takes minutes on some file systems.
    return class_names(part_folder(Path(root), part))


def _classes(run: Run) -> int:
    config = timm.get_pretrained_cfg(run.model) or empty_model(run)
    return run.model_options.get("num_classes", config.num_classes)
