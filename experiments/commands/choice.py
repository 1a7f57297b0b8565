"""Which study, tables and figures a command means."""

import os
from pathlib import Path

from experiments import artifacts, presets
from experiments.artifacts import Artifact
from tokenpool.commands.sources import name_sources
from tokenpool.runs.data_sets import DATA, data_set
from tokenpool.runs.run import WEIGHTS, Run
from tokenpool.runs.study import Study


def study_of(
    preset: str,
    results: Path | None = None,
    quick: bool = False,
    data: Path | None = None,
    weights: Path | None = None,
    shipped: bool = True,
) -> Study:
    """The study of a preset. Environment variables name its images and weights from now on.

    Args:
        preset: name of the preset, or its file.
        results: folder of the runs; None for the default.
        quick: the study of `make reproduce`.
        data: images.
        weights: pretrained weights.
        shipped: whether shipped results may be the default.

    Raises:
        FileNotFoundError: if there are no such images or weights.
        ValueError: if the preset takes no images or no weights, or if `results` is a file.
    """
    chosen = presets.get(preset)
    named = data_set(chosen.data).must_be_named
    if data is not None and not named:
        raise ValueError(f"preset {chosen.name} has its own images ({chosen.data}): it takes no --data")
    if weights is not None and not chosen.pretrained:
        raise ValueError(f"preset {chosen.name} trains its models from scratch: it takes no --weights")
    name_sources(data, weights)
    if results is not None and results.exists() and not results.is_dir():
        raise ValueError(f"{results} is a file, not a folder of results")
    if results is None:
        from_outside = (named and DATA in os.environ) or (chosen.pretrained and WEIGHTS in os.environ)
        results = Path("results") / chosen.name
        if quick or not shipped or from_outside or not results.is_dir():
            results = Path("runs") / (chosen.name if quick else f"{chosen.name}-full")
    return Study(chosen, results, full=not quick)


def artifacts_of(kind: str, name: str) -> list[Artifact]:
    """The table or figure of that name, or all of them.

    Raises:
        ValueError: if it is unknown; the message lists the known ones.
    """
    return [artifacts.get(kind, one) for one in (artifacts.names(kind) if name == "all" else [name])]


def runs_of(study: Study, figure: str | None, table: str | None) -> list[Run]:
    """The runs of a figure or of a table, or all runs of the study if neither is named.

    Raises:
        ValueError: if the preset has no runs for it, or it is unknown.
    """
    if figure is None and table is None:
        return artifacts.everything(study)
    kind, name = ("table", str(table)) if figure is None else ("figure", figure)
    found = {run.name: run for artifact in artifacts_of(kind, name) for run in artifact.runs(study)}
    if not found:
        raise ValueError(f"{kind} {name} is not part of preset {study.preset.name}")
    return list(found.values())
